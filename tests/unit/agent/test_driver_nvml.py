"""The driver's codes, units and habits become ours: tables of what it answers and what we tell."""

import re
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import FAST, SLOW, Rig, failed, told

from stoker.agent import driver
from stoker.agent.driver import DriverError, GpuLost, Suspect
from stoker.agent.facts import CLOCK_EVENT_BITS, FACTS, Fact, Rate
from stoker.agent.nvml.driver import NO_GPU, NvmlDriver, kernel_gpus, nvidia_ml_py
from stoker.agent.readings import GpuIdentity, ReadFailure
from stoker.agent.simulated.scenario import (
    Answer,
    Fail,
    Fault,
    Field,
    Lose,
    Missing,
    ScriptedProcess,
    Vanish,
)

NVML: Any = pynvml
MIB, GIB = 2**20, 2**30
ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1


ALL_FACTS = told(Rig().opened().sample()[0])


# Readings -------------------------------------------------------------------------------------


def test_a_whole_reading_is_in_base_units() -> None:
    work = ScriptedProcess(gpu=1, pid=5_000_001, memory="20GiB", utilization=0.9)
    rig = Rig(processes=(work,)).opened()
    for _ in range(9):
        rig.sample()
    idle, busy, *_ = rig.sample()
    assert (busy.uuid, busy.at, busy.failures) == (rig.nvml.uuids[1], 5_010.0, ())
    facts = busy.facts
    assert facts[Fact.MEMORY_TOTAL_BYTES] == 81559 * MIB
    assert facts[Fact.MEMORY_USED_BYTES] == 20 * GIB
    assert facts[Fact.MEMORY_RESERVED_BYTES] == 480 * MIB
    assert facts[Fact.MEMORY_FREE_BYTES] == (81559 - 480 - 20 * 1024) * MIB
    assert facts[Fact.UTILIZATION_RATIO] == pytest.approx(0.9, abs=0.06)
    assert facts[Fact.MEMORY_UTILIZATION_RATIO] == pytest.approx(0.4, abs=0.1)
    assert facts[Fact.TEMPERATURE_CELSIUS] == pytest.approx(39, abs=5)
    assert facts[Fact.POWER_WATTS] == pytest.approx(590, rel=0.05)
    assert facts[Fact.ENERGY_JOULES] == pytest.approx(5_400, rel=0.1)
    assert facts[Fact.SM_CLOCK_HERTZ] == pytest.approx(1.95e9, rel=0.03)
    assert facts[Fact.MEMORY_CLOCK_HERTZ] == 2.619e9
    assert idle.facts[Fact.UTILIZATION_RATIO] == 0.0
    assert idle.facts[Fact.SM_CLOCK_HERTZ] == 345e6
    assert busy.by_label[Fact.CLOCK_EVENT_ACTIVE].keys() == set(CLOCK_EVENT_BITS.values())
    assert idle.by_label[Fact.CLOCK_EVENT_ACTIVE]["gpu_idle"] == 1.0
    assert busy.by_label[Fact.CLOCK_EVENT_ACTIVE]["gpu_idle"] == 0.0


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ("H100-80GB", {"fan_speed_ratio", "retired_pages", "retired_pages_pending"}),
        # The page retirement of Turing has become the row remapping of Ampere.
        ("T4", {"remapped_rows", "remapped_rows_pending", "remapped_rows_failed"}),
        ("L40S", {"mig_mode", "mig_mode_pending", "nvlink_up", "memory_temperature_celsius"}),
    ],
)
def test_all_that_a_card_can_tell_is_read_and_nothing_else_fails(
    model: str, absent: set[str]
) -> None:
    rig = Rig(model=model).opened()
    rig.sample(SLOW, profiling=True)
    reading = rig.sample(SLOW, profiling=True)[0]
    assert reading.failures == ()
    assert not told(reading) & absent
    if model == "H100-80GB":
        assert told(reading) == set(Fact) - absent
    assert reading.rates == SLOW


def test_facts_come_at_their_rate() -> None:
    rig = Rig().opened()
    fast, slow = rig.sample()[0], rig.sample(SLOW)[0]
    assert {FACTS[fact].rate for fact in told(fast)} == {Rate.FAST}
    assert told(slow) > told(fast)
    assert {FACTS[fact].rate for fact in told(slow) - told(fast)} == {Rate.SLOW}


def test_labels_are_those_that_facts_name() -> None:
    reading = Rig().opened().sample(SLOW)[0]
    assert {fact for fact in told(reading) if FACTS[fact].label} == set(reading.by_label)


@pytest.mark.parametrize(
    ("rates", "calls"),
    # A fast reading is every second on every GPU of the fleet: a call more is a decision.
    [(FAST, 12), (SLOW, 43)],
)
def test_calls_of_one_gpu(rates: tuple[Rate, ...], calls: int) -> None:
    rig = Rig().opened()
    for _ in range(2):
        rig.sample(rates)
    assert len(rig.asked(0)) == calls
    assert max(rig.count(0).values()) <= 6
    assert "nvmlDeviceGetPcieThroughput" not in rig.asked(0)  # it blocks for 20 ms


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
        nvswitch_links=18,
        nvlinks_active=18,
    )
    assert rig.inventory.gpus[3].numa_node == 1
    assert (rig.inventory.at, rig.inventory.simulated) == (5_000.0, True)
    assert (rig.inventory.driver_version, rig.inventory.cuda_driver_version) == (
        "580.105.08",
        "13.0",
    )


@pytest.mark.parametrize(
    ("fault", "absent"),
    [
        (
            Answer(gpu=2, function="nvmlDeviceGetUtilizationRates", value={"gpu": ALL_ONES_32}),
            Fact.UTILIZATION_RATIO,
        ),
        (
            Answer(gpu=2, function="nvmlDeviceGetUtilizationRates", value={"memory": 101}),
            Fact.MEMORY_UTILIZATION_RATIO,
        ),
        (
            Answer(gpu=2, function="nvmlDeviceGetMemoryInfo_v2", value={"used": ALL_ONES_64}),
            Fact.MEMORY_USED_BYTES,
        ),
        (
            Answer(gpu=2, function="nvmlDeviceGetTemperatureV", value=ALL_ONES_32),
            Fact.TEMPERATURE_CELSIUS,
        ),
        (
            Answer(gpu=2, function="nvmlDeviceGetPerformanceState", value=32),  # unknown
            Fact.PERFORMANCE_STATE,
        ),
        (
            Answer(gpu=2, function="nvmlDeviceGetCurrentClocksEventReasons", value=ALL_ONES_64),
            Fact.CLOCK_EVENT_ACTIVE,
        ),
        (Field(gpu=2, field=82, value=ALL_ONES_32), Fact.MEMORY_TEMPERATURE_CELSIUS),
        (Field(gpu=2, field=82, value=2**31 - 16), Fact.MEMORY_TEMPERATURE_CELSIUS),  # a blank
        (Field(gpu=2, field=82, value=251), Fact.MEMORY_TEMPERATURE_CELSIUS),
        (Field(gpu=2, field=83, value=ALL_ONES_64), Fact.ENERGY_JOULES),
        (Field(gpu=2, field=185, value=ALL_ONES_32), Fact.POWER_WATTS),
        (Field(gpu=2, field=186, value=-1), Fact.POWER_INSTANT_WATTS),
    ],
)
def test_a_sentinel_is_an_absent_fact_that_is_counted(fault: Fault, absent: Fact) -> None:
    rig = Rig().opened()
    rig.play(fault)
    readings = rig.sample()
    assert told(readings[2]) == ALL_FACTS - {absent}
    uuid = rig.nvml.uuids[2]
    expected = ReadFailure(absent, "not_available", f"{uuid}: {absent} is not told")
    assert readings[2].failures == (expected,)
    assert all(told(r) == ALL_FACTS and not r.failures for r in readings if r.uuid != uuid)


def test_memory_larger_than_the_card_is_not_told() -> None:
    rig = Rig().opened()
    rig.play(Answer(gpu=2, function="nvmlDeviceGetMemoryInfo_v2", value={"total": 2**48}))
    memory = {fact for fact in ALL_FACTS if fact.startswith("memory_") and "bytes" in fact}
    reading = rig.sample()[2]
    assert told(reading) == ALL_FACTS - memory
    assert failed(reading) == dict.fromkeys(memory, "not_available")


@pytest.mark.parametrize("error", ["TIMEOUT", "UNKNOWN", "NO_PERMISSION", "IN_USE", "NOT_READY"])
def test_one_fact_that_fails_leaves_the_others(error: str) -> None:
    rig = Rig(Fail(gpu=2, function="nvmlDeviceGetPerformanceState", error=error)).opened()
    reading = rig.sample()[2]
    assert told(reading) == ALL_FACTS - {Fact.PERFORMANCE_STATE}
    (failure,) = reading.failures
    assert failure.fact == Fact.PERFORMANCE_STATE
    assert failure.message.startswith(f"{reading.uuid}: nvmlDeviceGetPerformanceState: ")
    assert f"NVML code {getattr(NVML, f'NVML_ERROR_{error}')}" in failure.message
    rig.play()
    assert told(rig.sample()[2]) == ALL_FACTS  # asked again, and there again


@pytest.mark.parametrize("error", ["NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "DEPRECATED"])
def test_what_a_card_does_not_have_is_absent_without_failure_and_not_asked_again(
    error: str,
) -> None:
    rig = Rig(Fail(gpu=2, function="nvmlDeviceGetPerformanceState", error=error)).opened()
    for _ in range(3):
        reading = rig.sample()[2]
        assert told(reading) == ALL_FACTS - {Fact.PERFORMANCE_STATE}
        assert reading.failures == ()
    assert "nvmlDeviceGetPerformanceState" not in rig.asked(2)
    assert "nvmlDeviceGetPerformanceState" in rig.asked(1)
    rig.play()
    rig.driver.inventory()  # a mode may have changed: what there is, is found out anew
    assert told(rig.sample()[2]) == ALL_FACTS


@pytest.mark.parametrize("error", ["FUNCTION_NOT_FOUND", "ARGUMENT_VERSION_MISMATCH"])
def test_memory_falls_back_to_its_first_form(error: str) -> None:
    work = ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB")
    rig = Rig(Fail(function="nvmlDeviceGetMemoryInfo_v2", error=error), processes=(work,)).opened()
    rig.sample()
    reading = rig.sample()[0]
    assert Fact.MEMORY_RESERVED_BYTES not in reading.facts
    # The first form cannot tell the driver's share apart.
    assert reading.facts[Fact.MEMORY_USED_BYTES] == 1 * GIB + 480 * MIB
    assert reading.failures == ()
    assert rig.count(0)["nvmlDeviceGetMemoryInfo_v2"] == 0


def test_clock_events_fall_back_to_their_older_name() -> None:
    fault = Missing(function="nvmlDeviceGetCurrentClocksEventReasons")
    assert told(Rig(fault).opened().sample()[0]) == ALL_FACTS


def test_temperature_falls_back_to_its_first_form() -> None:
    fault = Fail(function="nvmlDeviceGetTemperatureV", error="FUNCTION_NOT_FOUND")
    reading = Rig(fault).opened().sample()[0]
    assert told(reading) == ALL_FACTS


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
    rig.play(Fail(function="nvmlDeviceGetCount", error=code))
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
    rig = Rig(Lose(gpu=1, function="nvmlDeviceGetTemperatureV")).opened()
    for _ in range(2):
        readings = rig.sample()
        assert [told(r) == ALL_FACTS for r in readings] == [True, False, True, True]
        lost = readings[1]
        assert told(lost) == set()  # what was read before it went is gone too
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
    assert told(reading) == set()
    assert [f.error_kind for f in reading.failures] == ["reset_required"]
    rig.play()
    assert told(rig.sample()[1]) == ALL_FACTS


def test_a_gpu_that_vanished_is_lost_then_gone() -> None:
    rig = Rig().opened()
    rig.play(Vanish(gpu=1))
    assert [f.error_kind for f in rig.sample()[1].failures] == [GpuLost.kind]
    inventory = rig.driver.inventory()
    assert [(gpu.index, gpu.uuid) for gpu in inventory.gpus] == [
        (0, rig.nvml.uuids[0]),
        (1, rig.nvml.uuids[2]),
        (2, rig.nvml.uuids[3]),
    ]
    assert inventory.missing == ()
    assert all(told(reading) == ALL_FACTS for reading in rig.sample())


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


def test_a_gpu_that_is_plugged_in_is_found_by_a_fresh_session() -> None:
    """The library counts what was there at nvmlInit; the kernel knows better."""
    rig = Rig(Vanish(gpu=3)).opened()
    assert len(rig.inventory.gpus) == 3
    rig.plugged_in.add("0000:32:00.0")
    assert len(rig.sample(FAST)) == 3
    with pytest.raises(driver.InventoryChanged, match=r"came: 0000:32:00\.0; went: none"):
        rig.sample(SLOW)
    assert [function for _, function in rig.calls][-2:] == ["nvmlShutdown", "nvmlInit"]
    rig.play()
    assert len(rig.driver.inventory().gpus) == 4
    assert len(rig.sample(SLOW)) == 4, "it is looked for once"


def test_the_kernel_s_gpus_are_folders(tmp_path: Path) -> None:
    (tmp_path / "0000:18:00.0").mkdir()
    assert kernel_gpus(str(tmp_path)) == {"0000:18:00.0"}
    assert kernel_gpus(str(tmp_path / "none")) == frozenset(), "no module is loaded"


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
