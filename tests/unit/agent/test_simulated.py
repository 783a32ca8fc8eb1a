"""A simulated driver behaves as a real one: its values, its life, its faults, its processes."""

import inspect
import json
import os
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from tests.support.simulated_nodes import GIB, NVML, World, node, refused

from stoker.agent.nvml.table import NvmlTable
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Answer,
    Fail,
    Field,
    Hang,
    Lose,
    Missing,
    Scenario,
    ScenarioFile,
    ScriptedEvent,
    ScriptedMig,
    ScriptedProcess,
    Vanish,
    parse_scenario,
)
from stoker.core.errors import BadInput
from stoker.core.gpu_models import MODELS

H100 = MODELS["H100-80GB"]


@pytest.fixture
def world() -> World:
    return World()


def simulated_functions() -> dict[str, Any]:
    """Functions that the simulation defines itself, without the stubs of the protocol."""
    theirs = [c for c in SimulatedNvml.__mro__ if "simulated" in c.__module__]
    found = {name: value for c in reversed(theirs) for name, value in vars(c).items()}
    return {
        name: value
        for name, value in found.items()
        if name.startswith("nvml") and isinstance(value, FunctionType)
    }


def test_every_function_that_the_driver_calls_is_simulated(world: World) -> None:
    table: NvmlTable = node(world)  # the type checker compares the signatures
    called = {name for name in vars(NvmlTable) if name.startswith("nvml")}
    assert len(called) > 50
    assert called - simulated_functions().keys() == set()
    for name in NvmlTable.__annotations__:
        assert getattr(table, name) is getattr(NVML, name), name


@pytest.mark.parametrize("name", sorted(simulated_functions()))
def test_no_function_is_invented(name: str) -> None:
    theirs = inspect.signature(getattr(NVML, name)).parameters.values()
    ours = list(inspect.signature(simulated_functions()[name]).parameters.values())[1:]
    assert len(ours) <= len(theirs)
    needed = [p for p in theirs if p.default is inspect.Parameter.empty]
    assert len([p for p in ours if p.default is inspect.Parameter.empty]) == len(needed)


def test_constants_and_structs_are_those_of_the_library(world: World) -> None:
    nvml: Any = node(world)
    assert nvml.NVML_FI_DEV_MEMORY_TEMP == 82
    assert nvml.nvmlEventTypeXidCriticalError == 8
    assert nvml.c_nvmlFieldValue_t is NVML.c_nvmlFieldValue_t
    with pytest.raises(AttributeError):
        nvml.nvmlDeviceSetComputeMode  # noqa: B018 (what it does not simulate it does not have)


def test_the_same_node_has_the_same_uuids_and_no_other_has_them(world: World) -> None:
    uuids = node(world).uuids
    assert uuids == node(world).uuids
    others = {*node(world, node="n2").uuids, *node(world, seed=1).uuids}
    assert len({*uuids, *others}) == 12
    for uuid in uuids:
        assert re.fullmatch(
            r"GPU-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-\w{12}", uuid
        )


def test_identity_is_told_as_the_driver_tells_it(world: World) -> None:
    nvml = node(world, count=2)
    gpu = nvml.nvmlDeviceGetHandleByIndex(1)
    assert nvml.nvmlDeviceGetName(gpu) == "NVIDIA H100 80GB HBM3"
    assert nvml.nvmlDeviceGetPciInfo(gpu).busId == "00000000:25:00.0"
    assert nvml.nvmlDeviceGetPciInfo(gpu).pciDeviceId == 0x233010DE
    assert nvml.nvmlDeviceGetCudaComputeCapability(gpu) == (9, 0)
    assert nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) == 700_000
    assert nvml.nvmlDeviceGetMigMode(gpu) == [0, 0]
    assert nvml.nvmlDeviceGetMinorNumber(gpu) == 1
    assert len({nvml.nvmlDeviceGetHandleByIndex(i).pci_bus_id for i in (0, 1)}) == 2


def test_the_two_forms_of_memory_count_the_reserve_differently(world: World) -> None:
    process = ScriptedProcess(gpu=0, pid=5_000_001, memory="20GiB")
    nvml = node(world, scenario=Scenario(processes=(process,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    new = nvml.nvmlDeviceGetMemoryInfo(gpu, NVML.nvmlMemory_v2)
    old = nvml.nvmlDeviceGetMemoryInfo(gpu)
    assert isinstance(new, NVML.c_nvmlMemory_v2_t)
    assert isinstance(old, NVML.c_nvmlMemory_t)
    assert (new.used, new.reserved) == (20 * GIB, H100.memory_reserved_bytes)
    assert old.used == new.used + new.reserved
    assert new.total == old.total == new.used + new.reserved + new.free


def test_processes_cannot_hold_more_than_there_is(world: World) -> None:
    hogs = tuple(ScriptedProcess(gpu=0, pid=5_000_000 + n, memory="60GiB") for n in range(2))
    nvml = node(world, scenario=Scenario(processes=hogs))
    memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0), NVML.nvmlMemory_v2)
    assert memory.free == 0
    assert memory.used + memory.reserved == memory.total


def test_without_a_session_nothing_works(world: World) -> None:
    nvml = node(world)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    nvml.nvmlShutdown()
    with refused("UNINITIALIZED"):
        nvml.nvmlDeviceGetCount()
    with refused("UNINITIALIZED"):
        nvml.nvmlDeviceGetPowerUsage(gpu)
    with refused("UNINITIALIZED"):
        nvml.nvmlShutdown()


def test_wrong_arguments_are_refused_as_by_the_driver(world: World) -> None:
    nvml = node(world, count=2)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetHandleByIndex(2)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetClockInfo(nvml.nvmlDeviceGetHandleByIndex(0), 17)
    with refused("NOT_FOUND"):
        nvml.nvmlSystemGetProcessName(5_000_009)


def test_a_card_without_mig_says_so(world: World) -> None:
    nvml = SimulatedNvml([MODELS["T4"]], node="n1", now=lambda: world.now)
    nvml.nvmlInit()
    with refused("NOT_SUPPORTED"):
        nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByIndex(0))


def test_nobody_has_to_watch(world: World) -> None:
    nvml = node(world, count=1)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    world.now += 30 * 86400
    joules = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000
    assert joules == pytest.approx(30 * 86400 * H100.power_idle_watts, rel=0.02)


# What is scripted -----------------------------------------------------------------------------


def test_a_scripted_process_comes_works_and_goes(world: World) -> None:
    process = ScriptedProcess(
        gpu=1,
        pid=5_000_001,
        name="train",
        memory="20GiB",
        utilization=0.8,
        from_seconds=10,
        until_seconds=20,
    )
    nvml = node(world, scenario=Scenario(processes=(process,)))
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(4)]

    def users() -> list[tuple[int, int, int | None]]:
        return [
            (index, p.pid, p.usedGpuMemory)
            for index, gpu in enumerate(gpus)
            for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        ]

    assert users() == []
    world.now += 12
    assert users() == [(1, 5_000_001, 20 * GIB)]
    assert nvml.nvmlSystemGetProcessName(5_000_001) == "train"
    assert nvml.nvmlDeviceGetUtilizationRates(gpus[1]).gpu > 70
    assert nvml.nvmlDeviceGetUtilizationRates(gpus[0]).gpu == 0
    assert nvml.nvmlDeviceGetGraphicsRunningProcesses(gpus[1]) == []
    world.now += 12
    assert users() == []
    assert nvml.nvmlDeviceGetUtilizationRates(gpus[1]).gpu == 0


def test_a_process_whose_memory_the_driver_cannot_tell(world: World) -> None:
    process = ScriptedProcess(gpu=0, pid=5_000_001, kind="graphics", memory_known=False)
    nvml = node(world, scenario=Scenario(processes=(process,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    (listed,) = nvml.nvmlDeviceGetGraphicsRunningProcesses(gpu)
    assert (listed.pid, listed.usedGpuMemory) == (5_000_001, None)
    assert nvml.nvmlDeviceGetComputeRunningProcesses(gpu) == []


def test_a_call_fails_as_scripted_and_others_do_not(world: World) -> None:
    fault = Fail(gpu=2, function="nvmlDeviceGetPowerUsage", error="TIMEOUT")
    nvml = node(world, scenario=Scenario(faults=(fault,)))
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(4)]
    with refused("TIMEOUT"):
        nvml.nvmlDeviceGetPowerUsage(gpus[2])
    assert nvml.nvmlDeviceGetPowerUsage(gpus[1]) > 0
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(gpus[2]) >= 0


def test_a_fault_strikes_only_some_calls_and_only_for_some_time(world: World) -> None:
    faults = (
        Fail(function="nvmlDeviceGetPowerUsage", error="UNKNOWN", gpu=0, after_calls=1, calls=2),
        Fail(
            function="nvmlDeviceGetPowerUsage",
            error="UNKNOWN",
            gpu=1,
            from_seconds=5,
            until_seconds=10,
        ),
    )
    nvml = node(world, scenario=Scenario(faults=faults))

    def works(index: int) -> bool:
        try:
            return nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(index)) > 0
        except NVML.NVMLError:
            return False

    assert [works(0) for _ in range(5)] == [True, False, False, True, True]
    told: list[bool] = []
    for _ in range(4):
        told.append(works(1))
        world.now += 4
    assert told == [True, True, False, True]


def test_a_call_hangs_for_as_long_as_scripted(world: World) -> None:
    fault = Hang(gpu=0, function="nvmlDeviceGetPowerUsage", seconds=2)
    nvml = node(world, scenario=Scenario(faults=(fault,)))
    began = world.now
    assert nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(0)) > 0
    assert world.now - began == pytest.approx(2, abs=0.1)


def test_a_lost_gpu_stays_lost_until_the_driver_is_opened_anew(world: World) -> None:
    fault = Lose(gpu=1, function="nvmlDeviceGetPowerUsage", calls=1)
    nvml = node(world, scenario=Scenario(faults=(fault,)))
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(2)]
    assert nvml.nvmlDeviceGetUUID(gpus[1]) == nvml.uuids[1]
    for ask in (nvml.nvmlDeviceGetPowerUsage, nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName):
        with refused("GPU_IS_LOST"):
            ask(gpus[1])
        assert ask(gpus[0])
    assert nvml.nvmlDeviceGetCount() == 4
    nvml.nvmlShutdown()
    nvml.nvmlInit()
    assert nvml.nvmlDeviceGetName(gpus[1])


def test_a_vanished_gpu_is_not_counted_and_the_others_move_up(world: World) -> None:
    nvml = node(world)
    gpu = nvml.nvmlDeviceGetHandleByIndex(1)
    nvml.play(Scenario(faults=(Vanish(gpu=1),)))
    assert nvml.nvmlDeviceGetCount() == 3
    moved = nvml.nvmlDeviceGetHandleByIndex(1)
    assert nvml.nvmlDeviceGetUUID(moved) == nvml.uuids[2]
    with refused("GPU_IS_LOST"):
        nvml.nvmlDeviceGetUUID(gpu)


def test_an_answer_replaces_a_number_or_fields_of_a_struct(world: World) -> None:
    faults = (
        Answer(gpu=0, function="nvmlDeviceGetPowerUsage", value=0xFFFFFFFF),
        Answer(gpu=0, function="nvmlDeviceGetUtilizationRates", value={"gpu": 0xFFFFFFFF}),
    )
    nvml = node(world, scenario=Scenario(faults=faults))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetPowerUsage(gpu) == 0xFFFFFFFF
    rates = nvml.nvmlDeviceGetUtilizationRates(gpu)
    assert (rates.gpu, rates.memory) == (0xFFFFFFFF, 0)


def test_a_driver_that_was_replaced_underneath_answers_nothing(world: World) -> None:
    fault = Fail(error="LIB_RM_VERSION_MISMATCH", from_seconds=5)
    nvml = node(world, scenario=Scenario(faults=(fault,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 0
    world.now += 6
    for ask in (nvml.nvmlInit, nvml.nvmlDeviceGetCount, nvml.nvmlSystemGetDriverVersion):
        with refused("LIB_RM_VERSION_MISMATCH"):
            ask()
    with refused("LIB_RM_VERSION_MISMATCH"):
        nvml.nvmlDeviceGetPowerUsage(gpu)
    nvml.play(Scenario())
    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 0


def test_a_missing_symbol_is_told_as_nvidia_ml_py_tells_it(world: World) -> None:
    faults = (
        Missing(function="nvmlDeviceGetMarginTemperature"),
        Missing(function="nvmlDeviceGetComputeRunningProcesses_v3"),
        Missing(function="nvmlDeviceGetMemoryInfo_v2"),
    )
    nvml = node(world, scenario=Scenario(faults=faults))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    with refused("FUNCTION_NOT_FOUND"):
        nvml.nvmlDeviceGetMarginTemperature(gpu)
    with refused("FUNCTION_NOT_FOUND"):
        nvml.nvmlDeviceGetComputeRunningProcesses_v3(gpu)
    with pytest.raises(NVML.NVMLLibraryMismatchError):
        nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    assert nvml.nvmlDeviceGetComputeRunningProcesses_v2(gpu) == []
    with refused("FUNCTION_NOT_FOUND"):
        nvml.nvmlDeviceGetMemoryInfo(gpu, NVML.nvmlMemory_v2)
    assert nvml.nvmlDeviceGetMemoryInfo(gpu).total == H100.memory_total_bytes


def test_counters_begin_anew_when_the_driver_is_loaded_anew(world: World) -> None:
    work = ScriptedProcess(gpu=0, pid=5_000_001, utilization=1.0)
    nvml = node(world, scenario=Scenario(processes=(work,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    world.now += 60
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) > 30e6
    nvml.play(Scenario(driver_loaded=False))
    with refused("DRIVER_NOT_LOADED"):
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    nvml.play(Scenario())
    assert nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) < 1e6


def test_a_process_that_ended_has_no_name(world: World) -> None:
    process = ScriptedProcess(gpu=0, pid=5_000_001, name="train", until_seconds=10)
    nvml = node(world, scenario=Scenario(processes=(process,)))
    assert nvml.nvmlSystemGetProcessName(5_000_001) == "train"
    world.now += 11
    with refused("NOT_FOUND"):
        nvml.nvmlSystemGetProcessName(5_000_001)


def test_a_gpu_is_found_by_its_names(world: World) -> None:
    nvml = node(world)
    gpu = nvml.nvmlDeviceGetHandleByIndex(2)
    assert nvml.nvmlDeviceGetHandleByUUID(nvml.uuids[2]) is gpu
    assert nvml.nvmlDeviceGetHandleByPciBusId(gpu.pci_bus_id) is gpu
    assert nvml.nvmlDeviceGetIndex(gpu) == 2
    for ask in (nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetHandleByPciBusId):
        with refused("NOT_FOUND"):
            ask("GPU-nowhere")


def test_a_driver_that_is_not_loaded_cannot_be_opened(world: World) -> None:
    nvml = SimulatedNvml([H100], node="n1", scenario=Scenario(driver_loaded=False))
    with refused("DRIVER_NOT_LOADED"):
        nvml.nvmlInit()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"fault": []}', "unknown field `fault`"),
        ('{"faults": [{"fault": "hung"}]}', "'hung'"),
        ('{"faults": [{"fault": "hang", "gp": 1}]}', "unknown field `gp`"),
        ('{"faults": [{"fault": "fail"}]}', "missing required field `error`"),
        ('{"processes": [{"gpu": 0, "pid": 1, "memory": "20G"}]}', "'20G' is not a size"),
        ('{"processes": [{"gpu": 0, "pid": 1, "memory": -1}]}', "process 1: memory"),
        ('{"processes": [{"gpu": 0, "pid": 1, "utilization": 80}]}', "or utilization is out"),
        ('{"processes": [{"gpu": 0, "pid": 1, "decoder": 2}]}', "process 1: memory or"),
        ('{"counters": [{"gpu": 0, "fact": "power_watts", "value": 1}]}', "follows from the load"),
        ('{"counters": [{"gpu": 0, "fact": "nvlink_up", "value": 0}]}', "needs a label, its link"),
        (
            '{"counters": [{"gpu": 0, "fact": "pcie_replays", "label": "1", "value": 0}]}',
            "pcie_replays has no label",
        ),
        ('{"counters": [{"gpu": 0, "fact": "happiness", "value": 0}]}', "'happiness'"),
        ('{"driver": {"version": "newest"}}', "driver version 'newest' is not like 470.57.02"),
        ('{"driver": {"version": "390.12"}}', "nothing older than R450"),
        ("{", "truncated"),
    ],
)
def test_a_wrong_scenario_is_refused_with_the_place_and_the_key(text: str, told: str) -> None:
    with pytest.raises(BadInput) as refusal:
        parse_scenario(text.encode(), "demo.json")
    assert str(refusal.value).startswith("demo.json: ")
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        (Scenario(faults=(Lose(gpu=4),)), "there is no GPU 4"),
        (Scenario(processes=(ScriptedProcess(gpu=-1, pid=1),)), "there is no GPU -1"),
        (Scenario(faults=(Fail(error="ON_FIRE"),)), "'ON_FIRE' is no error of NVML"),
        (Scenario(faults=(Field(field=82, error="COLD"),)), "'COLD' is no error of NVML"),
        (Scenario(faults=(Missing(),)), "a missing function has to be named"),
        (Scenario(events=(ScriptedEvent(gpu=9, xid=79),)), "there is no GPU 9"),
        (
            Scenario(mig=(ScriptedMig(gpu=0, devices=("5g.50gb",)),)),
            "'5g.50gb' is no MIG device of H100-80GB, which has 1g.10gb, 1g.10gb+me, 1g.20gb",
        ),
        (
            Scenario(mig=(ScriptedMig(gpu=0, devices=("4g.40gb", "4g.40gb")),)),
            "4g.40gb, 4g.40gb do not fit on one H100-80GB",
        ),
        (
            Scenario(mig=(ScriptedMig(gpu=0, devices=("3c.2g.20gb",)),)),
            "'3c.2g.20gb' has more compute slices than its GPU instance",
        ),
    ],
)
def test_a_scenario_about_what_is_not_there_is_refused(
    scenario: Scenario, told: str, world: World
) -> None:
    with pytest.raises(BadInput, match=re.escape(told)):
        node(world, scenario=scenario)


def test_a_scenario_file_is_followed_while_it_changes(world: World, tmp_path: Path) -> None:
    path = tmp_path / "scenario.json"
    complaints: list[str] = []
    nvml = node(world, scenario=ScenarioFile(path), complain=complaints.append)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)

    def write(text: str) -> None:
        draft = path.with_suffix(".new")
        draft.write_text(text)
        os.utime(draft, (world.now, world.now))
        draft.rename(path)

    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 0  # no file: nothing happens
    fault = {"fault": "fail", "error": "UNKNOWN", "function": "nvmlDeviceGetPowerUsage"}
    write(json.dumps({"faults": [{**fault, "from_seconds": 5}]}))
    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 0
    world.now += 6  # seconds count from when the file was written
    with refused("UNKNOWN"):
        nvml.nvmlDeviceGetPowerUsage(gpu)
    write('{"faults": 3}')
    for _ in range(2):
        with refused("UNKNOWN"):
            nvml.nvmlDeviceGetPowerUsage(gpu)
    assert len(complaints) == 1
    assert "scenario.json: Expected `array`" in complaints[0]
    path.unlink()
    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 0


def test_a_hang_ends_when_it_is_taken_from_the_scenario(world: World, tmp_path: Path) -> None:
    path = tmp_path / "scenario.json"
    path.write_text('{"faults": [{"fault": "hang", "gpu": 0}]}')
    os.utime(path, (world.now, world.now))

    def mend(seconds: float) -> None:
        world.now += seconds
        if world.now > 1_000_003:
            path.unlink(missing_ok=True)

    nvml = SimulatedNvml(
        [H100], node="n1", scenario=ScenarioFile(path), now=lambda: world.now, pause=mend
    )
    nvml.nvmlInit()
    assert nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
    assert world.now == pytest.approx(1_000_003, abs=0.1)
