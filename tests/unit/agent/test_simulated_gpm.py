"""GPM: two samples make means of the time between them."""

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Fail, Scenario, ScriptedMig, ScriptedProcess

SM, TENSOR, DRAM = 2, 5, 10
PCIE_SENT, NVLINK_SENT, NVLINK_RECEIVED, LINK_0_RECEIVED, LINK_17_SENT = 20, 61, 60, 62, 97
C2C = 100
NOT_SUPPORTED = NVML.NVML_ERROR_NOT_SUPPORTED


def metrics(nvml: SimulatedNvml, older: Any, newer: Any, ids: Sequence[int]) -> list[float | str]:
    """Return the values, "-" where a metric is not supported."""
    wanted = NVML.c_nvmlGpmMetricsGet_t()
    wanted.version = NVML.NVML_GPM_METRICS_GET_VERSION
    wanted.numMetrics, wanted.sample1, wanted.sample2 = len(ids), older, newer
    for place, metric in enumerate(ids):
        wanted.metrics[place].metricId = metric
    nvml.nvmlGpmMetricsGet(wanted)
    found = list(wanted.metrics[: len(ids)])
    assert {metric.nvmlReturn for metric in found} <= {0, NOT_SUPPORTED}
    return ["-" if metric.nvmlReturn else metric.value for metric in found]


def between(
    nvml: SimulatedNvml, world: World, seconds: float, ids: Sequence[int], index: int = 0
) -> list[float | str]:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    older, newer = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
    nvml.nvmlGpmSampleGet(gpu, older)
    world.now += seconds
    nvml.nvmlGpmSampleGet(gpu, newer)
    return metrics(nvml, older, newer, ids)


@pytest.mark.parametrize(
    ("model", "supported"),
    [("A100-40GB", 0), ("L40S", 0), ("T4", 0), ("H100-80GB", 1), ("H200-141GB", 1), ("B200", 1)],
)
def test_hopper_and_later_have_it(model: str, supported: int) -> None:
    nvml = node(World(), 1, model)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice == supported
    answer = outcome(nvml.nvmlGpmSampleGet, gpu, nvml.nvmlGpmSampleAlloc())
    assert (answer == "NOT_SUPPORTED") == (not supported)


def test_ratios_follow_the_load_between_the_samples() -> None:
    world = World()
    work = ScriptedProcess(
        gpu=0, pid=5_000_001, utilization=0.8, decoder=0.5, from_seconds=100, until_seconds=150
    )
    nvml = node(world, 2, scenario=Scenario(processes=(work,)))
    ids = (1, SM, TENSOR, DRAM, 30, PCIE_SENT, NVLINK_SENT, LINK_17_SENT)
    assert between(nvml, world, 90, ids) == [0.0] * 8
    world.now += 20
    busy = [float(value) for value in between(nvml, world, 20, ids)]
    assert busy[0] == pytest.approx(80, abs=4)
    assert busy[1] == pytest.approx(0.93 * busy[0])
    assert busy[2] == pytest.approx(0.58 * busy[0])
    assert busy[3] == pytest.approx(0.47 * busy[0])
    assert busy[4] == 50
    # MiB per second.
    assert busy[5] == pytest.approx(0.03 * 63e9 / 2**20 * busy[0] / 100, rel=0.01)
    assert busy[6] == pytest.approx(18 * busy[7])
    assert between(nvml, world, 10, ids, index=1) == [0.0] * 8
    # Half of the time until it ended, half after: at 140 s now.
    (half,) = between(nvml, world, 20, (1,))
    assert half == pytest.approx(40, abs=3)


def test_a_metric_that_the_board_lacks_says_so_in_its_own_entry() -> None:
    world = World()
    nvml = node(world, 1)
    assert between(nvml, world, 1, (SM, C2C, LINK_0_RECEIVED, NVLINK_RECEIVED, 98, 14)) == [
        *(0.0, "-", 0.0),
        *(0.0, "-", "-"),
    ]


def test_samples_are_of_one_gpu_and_in_order() -> None:
    world = World()
    nvml = node(world, 2)
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in (0, 1)]
    older, newer, other, empty = (nvml.nvmlGpmSampleAlloc() for _ in range(4))
    nvml.nvmlGpmSampleGet(gpus[0], older)
    world.now += 1
    nvml.nvmlGpmSampleGet(gpus[0], newer)
    nvml.nvmlGpmSampleGet(gpus[1], other)
    assert metrics(nvml, older, newer, (SM,)) == [0.0]
    for pair in ((newer, older), (older, older), (older, other), (older, empty)):
        with refused("INVALID_ARGUMENT"):
            metrics(nvml, *pair, (SM,))
    wanted = NVML.c_nvmlGpmMetricsGet_t()
    wanted.version, wanted.sample1, wanted.sample2 = 2, older, newer
    with refused("ARGUMENT_VERSION_MISMATCH"):
        nvml.nvmlGpmMetricsGet(wanted)


def test_a_freed_sample_is_gone() -> None:
    nvml = node(World(), 1)
    gpu, sample = nvml.nvmlDeviceGetHandleByIndex(0), nvml.nvmlGpmSampleAlloc()
    nvml.nvmlGpmSampleFree(sample)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlGpmSampleGet(gpu, sample)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlGpmSampleFree(sample)


def test_metrics_have_the_faults_of_the_gpu_they_are_of() -> None:
    world = World()
    fault = Fail(gpu=1, function="nvmlGpmMetricsGet", error="UNKNOWN")
    nvml = node(world, 2, scenario=Scenario(faults=(fault,)))
    assert between(nvml, world, 1, (SM,), index=0) == [0.0]
    with refused("UNKNOWN"):
        between(nvml, world, 1, (SM,), index=1)


def test_each_gpu_instance_has_its_own_counters() -> None:
    world = World()
    layout = ScriptedMig(gpu=0, devices=("3g.40gb", "2g.20gb", "1c.2g.20gb"))
    work = ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.6, mig_device=1)
    nvml = node(world, 1, scenario=Scenario(mig=(layout,), processes=(work,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    devices = [nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index) for index in range(3)]
    instances = [nvml.nvmlDeviceGetGpuInstanceId(device) for device in devices]
    samples = [(nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()) for _ in range(5)]
    for turn in (0, 1):
        world.now += 10
        for instance, pair in zip(instances, samples, strict=False):
            nvml.nvmlGpmMigSampleGet(gpu, instance, pair[turn])
        nvml.nvmlGpmSampleGet(devices[1], samples[3][turn])  # by the device's own handle
        nvml.nvmlGpmSampleGet(gpu, samples[4][turn])
    ids = (1, SM, PCIE_SENT, NVLINK_SENT)
    found = [metrics(nvml, *pair, ids) for pair in samples]
    assert found[0] == found[2] == [0.0, 0.0, "-", "-"]
    assert found[1] == found[3] == [pytest.approx(60), pytest.approx(0.93 * 60), "-", "-"]
    assert found[4][0] == pytest.approx(60 * 2 / 7, abs=5)
    with refused("NOT_FOUND"):
        nvml.nvmlGpmMigSampleGet(gpu, 13, samples[0][0])
