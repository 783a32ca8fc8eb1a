"""The driver's codes, units and habits become ours: tables of what it answers and what we tell."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest

from stoker.agent import driver
from stoker.agent.driver import DriverError, GpuLost, Suspect
from stoker.agent.driver_nvml import NO_GPU, NvmlDriver, nvidia_ml_py
from stoker.agent.readings import GpuIdentity, GpuReading, ProcessReading, ReadFailure
from stoker.agent.simulated import SimulatedNvml
from stoker.agent.simulated_scenario import (
    Answer,
    Fail,
    Fault,
    Lose,
    Scenario,
    ScriptedProcess,
    Vanish,
)
from stoker.core.gpu_models import MODELS

NVML: Any = pynvml
MIB, GIB = 2**20, 2**30
ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1
NO_PROCESSES = str(Path(__file__).parent)  # a folder that is no /proc


class Rig:
    """A driver on four simulated cards, with the calls that it made."""

    def __init__(self, *faults: Fault, model: str = "H100-80GB", **scenario: Any) -> None:
        self.now = 5_000.0
        self.calls: list[tuple[int, str]] = []
        self.nvml = SimulatedNvml(
            [MODELS[model]] * 4,
            node="n1",
            scenario=Scenario(faults=faults, **scenario),
            now=lambda: self.now,
            proc=NO_PROCESSES,
        )
        self.driver = NvmlDriver(
            self.nvml,
            simulated=True,
            now=lambda: self.now,
            announce=lambda index, function: self.calls.append((index, function)),
        )

    def opened(self) -> "Rig":
        self.driver.open()
        self.inventory = self.driver.inventory()
        self.calls.clear()
        return self

    def sample(self) -> tuple[GpuReading, ...]:
        self.now += 1
        self.calls.clear()
        return self.driver.sample()

    def asked(self, index: int) -> list[str]:
        return [function for gpu, function in self.calls if gpu == index]


def facts_of(reading: GpuReading) -> set[str]:
    names = {field.name for field in fields(reading)} - {"uuid", "at", "failures"}
    return {name for name in names if getattr(reading, name) is not None}


ALL_FACTS = facts_of(Rig().opened().sample()[0])


# Readings -------------------------------------------------------------------------------------


def test_a_whole_reading_is_in_base_units() -> None:
    work = ScriptedProcess(gpu=1, pid=5_000_001, memory="20GiB", utilization=0.9)
    rig = Rig(processes=(work,)).opened()
    for _ in range(9):
        rig.sample()
    idle, busy, *_ = rig.sample()
    assert (busy.uuid, busy.at, busy.failures) == (rig.nvml.uuids[1], 5_010.0, ())
    assert busy.memory_total_bytes == 81559 * MIB
    assert busy.memory_used_bytes == 20 * GIB
    assert busy.memory_reserved_bytes == 480 * MIB
    assert busy.memory_free_bytes == (81559 - 480 - 20 * 1024) * MIB
    assert busy.utilization_ratio == pytest.approx(0.9, abs=0.06)
    assert busy.memory_utilization_ratio == pytest.approx(0.4, abs=0.1)
    assert busy.temperature_celsius == pytest.approx(39, abs=5)
    assert busy.power_watts == pytest.approx(590, rel=0.05)
    assert busy.energy_joules == pytest.approx(5_400, rel=0.1)
    assert busy.sm_clock_hertz == pytest.approx(1.95e9, rel=0.03)
    assert busy.memory_clock_hertz == 2.619e9
    assert (idle.utilization_ratio, idle.sm_clock_hertz) == (0.0, 345e6)


def test_identity() -> None:
    rig = Rig().opened()
    assert rig.inventory.gpus[1] == GpuIdentity(
        index=1,
        uuid=rig.nvml.uuids[1],
        model="NVIDIA H100 80GB HBM3",
        memory_total_bytes=81559 * MIB,
        pci_bus_id="00000000:25:00.0",
        serial=rig.inventory.gpus[1].serial,
        board_part_number="692-2G520-0200-000",
        vbios_version="96.00.99.00.01",
        minor_number=1,
        compute_capability="9.0",
        power_limit_watts=700.0,
        mig_enabled=False,
        numa_node=0,
    )
    assert rig.inventory.gpus[3].numa_node == 1
    assert (rig.inventory.at, rig.inventory.simulated) == (5_000.0, True)
    assert (rig.inventory.driver_version, rig.inventory.cuda_driver_version) == (
        "580.105.08",
        "13.0",
    )


@pytest.mark.parametrize(
    ("function", "value", "absent"),
    [
        ("nvmlDeviceGetUtilizationRates", {"gpu": ALL_ONES_32}, "utilization_ratio"),
        ("nvmlDeviceGetUtilizationRates", {"memory": 101}, "memory_utilization_ratio"),
        ("nvmlDeviceGetMemoryInfo_v2", {"used": ALL_ONES_64}, "memory_used_bytes"),
        ("nvmlDeviceGetTemperatureV", ALL_ONES_32, "temperature_celsius"),
        ("nvmlDeviceGetPowerUsage", ALL_ONES_32, "power_watts"),
        ("nvmlDeviceGetTotalEnergyConsumption", ALL_ONES_64, "energy_joules"),
    ],
)
def test_a_sentinel_is_an_absent_fact_that_is_counted(
    function: str, value: Any, absent: str
) -> None:
    rig = Rig(Answer(gpu=2, function=function, value=value)).opened()
    readings = rig.sample()
    assert facts_of(readings[2]) == ALL_FACTS - {absent}
    uuid = rig.nvml.uuids[2]
    expected = ReadFailure(absent, "not_available", f"{uuid}: {absent} is not told")
    assert readings[2].failures == (expected,)
    assert all(facts_of(r) == ALL_FACTS and not r.failures for r in readings if r.uuid != uuid)


@pytest.mark.parametrize("error", ["TIMEOUT", "UNKNOWN", "NO_PERMISSION", "IN_USE", "NOT_READY"])
def test_one_fact_that_fails_leaves_the_others(error: str) -> None:
    rig = Rig(Fail(gpu=2, function="nvmlDeviceGetPowerUsage", error=error)).opened()
    reading = rig.sample()[2]
    assert facts_of(reading) == ALL_FACTS - {"power_watts"}
    (failure,) = reading.failures
    assert failure.fact == "power_watts"
    assert failure.message.startswith(f"{reading.uuid}: nvmlDeviceGetPowerUsage: ")
    assert f"NVML code {getattr(NVML, f'NVML_ERROR_{error}')}" in failure.message
    rig.nvml.play(Scenario())
    assert facts_of(rig.sample()[2]) == ALL_FACTS  # asked again, and there again


@pytest.mark.parametrize("error", ["NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "DEPRECATED"])
def test_what_a_card_does_not_have_is_absent_without_failure_and_not_asked_again(
    error: str,
) -> None:
    rig = Rig(Fail(gpu=2, function="nvmlDeviceGetPowerUsage", error=error)).opened()
    for _ in range(3):
        reading = rig.sample()[2]
        assert facts_of(reading) == ALL_FACTS - {"power_watts"}
        assert reading.failures == ()
    assert "nvmlDeviceGetPowerUsage" not in rig.asked(2)
    assert "nvmlDeviceGetPowerUsage" in rig.asked(1)
    rig.nvml.play(Scenario())
    rig.driver.inventory()  # a mode may have changed: what there is, is found out anew
    assert facts_of(rig.sample()[2]) == ALL_FACTS


@pytest.mark.parametrize(
    ("error", "reserved"), [("FUNCTION_NOT_FOUND", None), ("ARGUMENT_VERSION_MISMATCH", None)]
)
def test_memory_falls_back_to_its_first_form(error: str, reserved: int | None) -> None:
    work = ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB")
    rig = Rig(Fail(function="nvmlDeviceGetMemoryInfo_v2", error=error), processes=(work,)).opened()
    reading = rig.sample()[0]
    assert reading.memory_reserved_bytes is reserved
    # The first form cannot tell the driver's share apart.
    assert reading.memory_used_bytes == 1 * GIB + 480 * MIB
    assert reading.failures == ()
    assert rig.asked(0).count("nvmlDeviceGetMemoryInfo_v2") == 0


def test_temperature_falls_back_to_its_first_form() -> None:
    fault = Fail(function="nvmlDeviceGetTemperatureV", error="FUNCTION_NOT_FOUND")
    reading = Rig(fault).opened().sample()[0]
    assert facts_of(reading) == ALL_FACTS


def test_a_missing_symbol_behind_an_unversioned_function_is_no_crash() -> None:
    rig = Rig(processes=(ScriptedProcess(gpu=0, pid=5_000_001),)).opened()
    functions = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")

    def missing(handle: Any) -> Any:
        raise NVML.NVMLLibraryMismatchError("Unversioned function called")

    for function in functions:
        setattr(rig.nvml, function, missing)
    told = rig.driver.processes()
    assert [p.pid for p in told.processes] == [5_000_001]  # by the second form
    setattr(rig.nvml, f"{functions[0]}_v2", missing)
    rig.driver.inventory()
    told = rig.driver.processes()
    assert told.processes == ()
    assert [fault.error_kind for fault in told.failed_gpus] == ["not_supported"] * 4
    assert "nvmlDeviceGetComputeRunningProcesses or " in told.failed_gpus[0].message


def test_a_name_that_is_no_utf_8_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.driver.open()

    def name(handle: Any) -> str:
        return b"H\xff100".decode()

    monkeypatch.setattr(rig.nvml, "nvmlDeviceGetName", name)
    inventory = rig.driver.inventory()
    assert inventory.gpus == ()
    assert "the text is no UTF-8: b'H\\xff100'" in inventory.missing[0].message


def test_bytes_become_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.driver.open()

    def name(handle: Any) -> bytes:
        return b"Tesla K80"

    monkeypatch.setattr(rig.nvml, "nvmlDeviceGetName", name)
    assert {gpu.model for gpu in rig.driver.inventory().gpus} == {"Tesla K80"}


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNINITIALIZED", driver.NotInitialized),
        ("NO_PERMISSION", driver.NoPermission),
        ("NOT_FOUND", driver.NotFound),
        ("DRIVER_NOT_LOADED", driver.DriverNotLoaded),
        ("TIMEOUT", driver.DriverTimeout),
        ("LIBRARY_NOT_FOUND", driver.LibraryMissing),
        ("FUNCTION_NOT_FOUND", driver.FunctionMissing),
        ("NOT_SUPPORTED", driver.NotSupported),
        ("DEPRECATED", driver.NotSupported),
        ("ARGUMENT_VERSION_MISMATCH", driver.FunctionMissing),
        ("GPU_IS_LOST", driver.GpuLost),
        ("RESET_REQUIRED", driver.ResetRequired),
        ("LIB_RM_VERSION_MISMATCH", driver.LibraryMismatch),
        ("OPERATING_SYSTEM", driver.UnknownDriverError),
        ("IN_USE", driver.UnknownDriverError),
        ("UNKNOWN", driver.UnknownDriverError),
    ],
)
def test_codes_become_types(code: str, kind: type[DriverError]) -> None:
    rig = Rig().opened()
    rig.nvml.play(Scenario(faults=(Fail(function="nvmlDeviceGetCount", error=code),)))
    with pytest.raises(DriverError) as raised:
        rig.driver.inventory()
    assert type(raised.value) is kind
    assert raised.value.function == "nvmlDeviceGetCount"
    assert isinstance(raised.value.__cause__, NVML.NVMLError)


def test_a_driver_that_cannot_be_opened_is_unavailable_whatever_it_says() -> None:
    rig = Rig(Fail(function="nvmlInit", error="UNKNOWN"))  # as when a container lost its devices
    with pytest.raises(driver.DriverUnavailable, match=re.escape("nvmlInit: Unknown Error")):
        rig.driver.open()


def test_a_module_that_is_not_loaded_is_named() -> None:
    with pytest.raises(driver.DriverNotLoaded, match="load `nvidia`"):
        Rig(driver_loaded=False).driver.open()


def test_a_session_that_is_gone_ends_every_question() -> None:
    rig = Rig().opened()
    rig.nvml.nvmlShutdown()
    for ask in (rig.driver.sample, rig.driver.processes, rig.driver.inventory):
        with pytest.raises(driver.NotInitialized):
            ask()


def test_a_missing_library_is_named_with_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/nowhere")
    table = nvidia_ml_py()

    def init() -> None:  # as nvidia-ml-py does it
        try:
            raise OSError("libnvidia-ml.so.1: cannot open shared object file: No such file")
        except OSError:
            raise NVML.NVMLError(NVML.NVML_ERROR_LIBRARY_NOT_FOUND)  # noqa: B904

    monkeypatch.setattr(table, "nvmlInit", init)
    with pytest.raises(driver.LibraryMissing) as missing:
        NvmlDriver(table).open()
    for part in (
        "libnvidia-ml.so.1: cannot open shared object file: No such file",
        "LD_LIBRARY_PATH=/opt/nowhere",
        "comes with the NVIDIA driver",
        "--simulate 8xH100-80GB",
    ):
        assert part in str(missing.value)


# Faults of one GPU ----------------------------------------------------------------------------


def test_a_lost_gpu_is_read_no_more_and_the_others_are() -> None:
    rig = Rig(Lose(gpu=1, function="nvmlDeviceGetPowerUsage")).opened()
    for _ in range(2):
        readings = rig.sample()
        assert [facts_of(r) == ALL_FACTS for r in readings] == [True, False, True, True]
        lost = readings[1]
        assert facts_of(lost) == set()  # what was read before it went is gone too
        assert [(f.fact, f.error_kind) for f in lost.failures] == [("gpu", "gpu_lost")]
    assert rig.asked(1) == []
    users = rig.driver.processes()
    assert [(f.index, f.error_kind) for f in users.failed_gpus] == [(1, "gpu_lost")]
    inventory = rig.driver.inventory()
    assert [gpu.index for gpu in inventory.gpus] == [0, 2, 3]
    assert [(f.index, f.error_kind) for f in inventory.missing] == [(1, "gpu_lost")]


def test_a_gpu_that_needs_a_reset_is_asked_again() -> None:
    fault = Fail(gpu=1, function="nvmlDeviceGetUtilizationRates", error="RESET_REQUIRED")
    rig = Rig(fault).opened()
    reading = rig.sample()[1]
    assert facts_of(reading) == set()
    assert [f.error_kind for f in reading.failures] == ["reset_required"]
    rig.nvml.play(Scenario())
    assert facts_of(rig.sample()[1]) == ALL_FACTS


def test_a_gpu_that_vanished_is_lost_then_gone() -> None:
    rig = Rig().opened()
    rig.nvml.play(Scenario(faults=(Vanish(gpu=1),)))
    assert [f.error_kind for f in rig.sample()[1].failures] == [GpuLost.kind]
    inventory = rig.driver.inventory()
    assert [(gpu.index, gpu.uuid) for gpu in inventory.gpus] == [
        (0, rig.nvml.uuids[0]),
        (1, rig.nvml.uuids[2]),
        (2, rig.nvml.uuids[3]),
    ]
    assert inventory.missing == ()
    assert all(facts_of(reading) == ALL_FACTS for reading in rig.sample())


@pytest.mark.parametrize(
    ("suspect", "left_alone", "is_touched"),
    [
        (Suspect(2, None, 4, "hung"), 2, False),
        (Suspect(2, None, None, "hung"), 2, False),
        (Suspect(2, "the third", 4, "hung"), 2, False),
        # The numbering may have changed: only its UUID tells, and that has to be asked for.
        (Suspect(1, "the third", 5, "hung"), 2, True),
    ],
)
def test_a_suspect_is_left_alone(suspect: Suspect, left_alone: int, is_touched: bool) -> None:
    rig = Rig().opened()
    uuid = rig.nvml.uuids[2] if suspect.uuid else None
    suspect = Suspect(suspect.index, uuid, suspect.gpu_count, suspect.found)
    inventory = rig.driver.inventory((suspect,))
    assert [gpu.index for gpu in inventory.gpus] == [i for i in range(4) if i != left_alone]
    (fault,) = inventory.missing
    assert (fault.index, fault.error_kind) == (left_alone, "driver_timeout")
    assert "left alone: hung" in fault.message
    assert bool(rig.asked(left_alone)) is is_touched
    assert len(rig.sample()) == 3
    assert rig.asked(left_alone) == []
    assert len(rig.driver.inventory().gpus) == 4


# Processes ------------------------------------------------------------------------------------


def test_every_process_is_listed_once_per_gpu() -> None:
    rig = Rig(
        processes=(
            ScriptedProcess(gpu=0, pid=5_000_001, name="train", memory="1GiB"),
            ScriptedProcess(gpu=1, pid=5_000_001, name="train", memory="2GiB"),
            ScriptedProcess(gpu=1, pid=5_000_001, name="train", kind="graphics", memory="9GiB"),
            ScriptedProcess(gpu=1, pid=5_000_002, kind="graphics", memory_known=False),
        )
    ).opened()
    rig.now += 1
    told = rig.driver.processes()
    first, second = rig.nvml.uuids[:2]
    assert told.processes == (
        ProcessReading(first, 5_000_001, "compute", 1 * GIB, "train"),
        ProcessReading(second, 5_000_001, "compute", 2 * GIB, "train"),
        ProcessReading(second, 5_000_002, "graphics", None, None),
    )
    assert (told.started_at, told.failed_gpus) == (5_001.0, ())


@pytest.mark.parametrize("error", ["TIMEOUT", "UNKNOWN", "NO_PERMISSION"])
def test_unknown_users_are_not_no_users(error: str) -> None:
    fault = Fail(gpu=3, function="nvmlDeviceGetComputeRunningProcesses", error=error)
    rig = Rig(fault, processes=(ScriptedProcess(gpu=0, pid=5_000_001),)).opened()
    told = rig.driver.processes()
    assert [p.pid for p in told.processes] == [5_000_001]
    assert [(f.index, f.uuid) for f in told.failed_gpus] == [(3, rig.nvml.uuids[3])]


def test_a_card_that_draws_nothing_has_no_graphics_users() -> None:
    fault = Fail(function="nvmlDeviceGetGraphicsRunningProcesses", error="NOT_SUPPORTED")
    second = Fail(function="nvmlDeviceGetGraphicsRunningProcesses_v2", error="NOT_SUPPORTED")
    told = Rig(fault, second).opened().driver.processes()
    assert (told.processes, told.failed_gpus) == ((), ())


# What the driver host relies on ---------------------------------------------------------------


def test_every_call_is_announced_before_it_is_made() -> None:
    rig = Rig()
    rig.driver.open()
    assert rig.calls == [(NO_GPU, "nvmlInit")]
    rig.driver.inventory()
    asked = {index for index, _ in rig.calls}
    assert asked == {NO_GPU, 0, 1, 2, 3}
    assert all(re.fullmatch(r"nvml[A-Za-z_0-9]{3,55}", function) for _, function in rig.calls)


def test_closing_lets_go_and_opening_again_works() -> None:
    rig = Rig().opened()
    rig.driver.close()
    assert rig.driver.sample() == ()
    with pytest.raises(driver.NotInitialized):
        rig.driver.close()
    rig.opened()
    assert len(rig.sample()) == 4
