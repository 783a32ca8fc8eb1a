"""Older drivers, as far as they can be told from a simulated node."""

import pytest
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.simulated.drivers import parse_release
from stoker.agent.simulated.scenario import Scenario, ScriptedDriver
from stoker.core.errors import BadInput


@pytest.mark.parametrize(
    ("version", "nvml_version", "cuda_version"),
    [
        ("450.80.02", "11.450.80.02", 11000),
        ("470.57.02", "11.470.57.02", 11040),
        ("470", "11.470", 11040),
        ("535.104.05", "12.535.104.05", 12020),
        ("580.105.08", "13.580.105.08", 13000),
        ("585.1", "13.585.1", 13000),  # between two that are known: as the older
    ],
)
def test_versions_belong_together(version: str, nvml_version: str, cuda_version: int) -> None:
    nvml = node(World(), 1, scenario=Scenario(driver=ScriptedDriver(version)))
    assert nvml.nvmlSystemGetDriverVersion() == version
    assert nvml.nvmlSystemGetNVMLVersion() == nvml_version
    assert nvml.nvmlSystemGetCudaDriverVersion() == cuda_version


@pytest.mark.parametrize("version", ["", "470.x", "v470.57", "44.1", "418.226.00"])
def test_what_is_no_version_or_too_old_is_refused(version: str) -> None:
    with pytest.raises(BadInput, match="driver version"):
        parse_release(version)


MISSING = "FUNCTION_NOT_FOUND"


@pytest.mark.parametrize(
    ("function", "arguments", "r470", "r535", "r580"),
    [
        ("nvmlDeviceGetMarginTemperature", (), MISSING, MISSING, int),
        ("nvmlDeviceGetTemperatureV", (0,), MISSING, MISSING, int),
        ("nvmlDeviceGetTemperature", (0,), int, int, int),
        ("nvmlDeviceGetCurrentClocksEventReasons", (), MISSING, int, int),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", (), int, int, int),
        ("nvmlDeviceGetJpgUtilization", (), MISSING, list, list),
        ("nvmlDeviceGetEncoderUtilization", (), list, list, list),
        ("nvmlDeviceGetComputeRunningProcesses_v3", (), MISSING, list, list),
        ("nvmlDeviceGetComputeRunningProcesses_v2", (), list, list, list),
        ("nvmlDeviceGetMemoryInfo", (NVML.nvmlMemory_v2,), MISSING, object, object),
        ("nvmlDeviceGetMemoryInfo", (), object, object, object),
        ("nvmlGpmQueryDeviceSupport", (), MISSING, object, object),
        ("nvmlDeviceGetRemappedRows", (), tuple, tuple, tuple),
    ],
)
def test_a_driver_lacks_what_came_later(
    function: str, arguments: tuple[int, ...], r470: object, r535: object, r580: object
) -> None:
    for version, expected in (("470.57.02", r470), ("535.54.03", r535), ("580.105.08", r580)):
        nvml = node(World(), 1, scenario=Scenario(driver=ScriptedDriver(version)))
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        answer = outcome(getattr(nvml, function), gpu, *arguments)
        if isinstance(expected, type):
            assert answer != MISSING
            assert isinstance(answer, expected)
        else:
            assert answer == expected


def test_an_unversioned_list_says_that_the_library_does_not_match() -> None:
    nvml = node(World(), 1, scenario=Scenario(driver=ScriptedDriver("470.57.02")))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
        nvml.nvmlDeviceGetMPSComputeRunningProcesses,
    ):
        with pytest.raises(NVML.NVMLLibraryMismatchError, match=ask.__name__):
            ask(gpu)
    with refused(MISSING):
        nvml.nvmlGpmSampleAlloc()
