"""A partitioned GPU: its devices, what the whole still tells, and what a new layout makes stale."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.simulated_nodes import GIB, MIB, NVML, World, fields_of, node, outcome, refused

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Hang,
    Lose,
    Scenario,
    ScenarioFile,
    ScriptedMig,
    ScriptedProcess,
)
from stoker.core.errors import BadInput

LAYOUT = ("3g.40gb", "2g.20gb", "1g.10gb")
NO_INSTANCE = 0xFFFFFFFF


def partitioned(
    world: World, devices: Sequence[str] = LAYOUT, model: str = "H100-80GB", **scenario: Any
) -> SimulatedNvml:
    """Two cards, the first of which is partitioned."""
    layout = ScriptedMig(gpu=0, devices=tuple(devices))
    return node(world, 2, model, scenario=Scenario(mig=(layout,), **scenario))


def devices_of(nvml: SimulatedNvml, index: int = 0) -> list[Any]:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    found = [
        outcome(nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, place)
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu))
    ]
    return [device for device in found if device != "NOT_FOUND"]


@pytest.mark.parametrize(("index", "count"), [(0, 7), (1, 0)])
def test_only_a_partitioned_gpu_has_room_for_devices(index: int, count: int) -> None:
    nvml = partitioned(World())
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    assert nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) == count


def uuids_of(nvml: SimulatedNvml, index: int = 0) -> list[str]:
    return [nvml.nvmlDeviceGetUUID(device) for device in devices_of(nvml, index)]


def test_devices_are_told_as_the_driver_tells_them() -> None:
    nvml = partitioned(World())
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByIndex(1)) == [0, 0]
    devices = devices_of(nvml)
    names = [nvml.nvmlDeviceGetName(device) for device in devices]
    assert names == [f"NVIDIA H100 80GB HBM3 MIG {profile}" for profile in LAYOUT]
    # IDs of GPU instances follow from their places.
    assert [nvml.nvmlDeviceGetGpuInstanceId(device) for device in devices] == [2, 3, 9]
    assert [nvml.nvmlDeviceGetComputeInstanceId(device) for device in devices] == [0, 0, 0]
    for device in devices:
        assert re.fullmatch(r"MIG-[0-9a-f]{8}(-[0-9a-f]{4}){3}-\w{12}", uuid(nvml, device))
        assert nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device) is gpu
        assert nvml.nvmlDeviceGetHandleByUUID(uuid(nvml, device)) is device
        assert nvml.nvmlDeviceIsMigDeviceHandle(device).value == 1
    assert nvml.nvmlDeviceIsMigDeviceHandle(gpu).value == 0
    assert len({*uuids_of(nvml), *nvml.uuids}) == 5


def uuid(nvml: SimulatedNvml, device: Any) -> str:
    return nvml.nvmlDeviceGetUUID(device)


@pytest.mark.parametrize(
    ("model", "profile", "mib", "sm_count", "slices"),
    [
        ("A100-40GB", "3g.20gb", 19968, 42, 3),
        ("A100-80GB", "1g.10gb", 9728, 14, 1),
        ("H100-80GB", "1g.20gb", 20096, 26, 1),
        ("H100-80GB", "7g.80gb", 81152, 132, 7),
        ("H200-141GB", "2g.35gb", 33024, 32, 2),
        ("B200", "1g.23gb", 22528, 18, 1),
    ],
)
def test_a_device_has_the_size_of_its_profile(
    model: str, profile: str, mib: int, sm_count: int, slices: int
) -> None:
    nvml = partitioned(World(), [profile], model)
    (device,) = devices_of(nvml)
    assert nvml.nvmlDeviceGetMemoryInfo(device).total == mib * MIB
    attributes = fields_of(nvml.nvmlDeviceGetAttributes_v2(device))
    assert attributes["multiprocessorCount"] == sm_count
    assert attributes["gpuInstanceSliceCount"] == slices
    assert attributes["computeInstanceSliceCount"] == slices
    assert attributes["memorySizeMB"] == mib


def test_compute_instances_share_a_gpu_instance_while_it_has_slices() -> None:
    nvml = partitioned(World(), ["1c.3g.40gb", "2c.3g.40gb", "1c.3g.40gb"])
    told = [
        (
            nvml.nvmlDeviceGetName(device).removeprefix("NVIDIA H100 80GB HBM3 MIG "),
            nvml.nvmlDeviceGetGpuInstanceId(device),
            nvml.nvmlDeviceGetComputeInstanceId(device),
            nvml.nvmlDeviceGetAttributes(device).multiprocessorCount,
        )
        for device in devices_of(nvml)
    ]
    assert told == [("1c.3g.40gb", 1, 0, 16), ("1c.3g.40gb", 2, 0, 16), ("2c.3g.40gb", 2, 1, 32)]


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetEncoderUtilization",
        "nvmlDeviceGetDecoderUtilization",
        "nvmlDeviceGetJpgUtilization",
        "nvmlDeviceGetOfaUtilization",
    ],
)
def test_the_load_of_a_partitioned_gpu_is_not_told(function: str) -> None:
    nvml = partitioned(World())
    ask = getattr(nvml, function)
    with refused("NOT_SUPPORTED"):
        ask(nvml.nvmlDeviceGetHandleByIndex(0))
    assert ask(nvml.nvmlDeviceGetHandleByIndex(1))


def test_the_rest_of_a_partitioned_gpu_is_told_for_the_whole_and_not_for_a_device() -> None:
    nvml = partitioned(World())
    gpu, device = nvml.nvmlDeviceGetHandleByIndex(0), devices_of(nvml)[0]
    for ask in (
        nvml.nvmlDeviceGetPowerUsage,
        nvml.nvmlDeviceGetTotalEnergyConsumption,
        nvml.nvmlDeviceGetMarginTemperature,
        nvml.nvmlDeviceGetPerformanceState,
        nvml.nvmlDeviceGetEccMode,
    ):
        assert ask(gpu) is not None
        with refused("NOT_SUPPORTED"):
            ask(device)
    for ask_device in (nvml.nvmlDeviceGetGpuInstanceId, nvml.nvmlDeviceGetAttributes):
        with refused("INVALID_ARGUMENT"):
            ask_device(gpu)


def test_processes_belong_to_devices() -> None:
    world = World()
    processes = (
        ScriptedProcess(gpu=0, pid=5_000_001, memory="20GiB", utilization=0.7, mig_device=0),
        ScriptedProcess(gpu=0, pid=5_000_002, memory="4GiB", utilization=0.7, mig_device=2),
        ScriptedProcess(gpu=0, pid=5_000_003, memory="4GiB", mig_device=3),  # there is none
        ScriptedProcess(gpu=1, pid=5_000_004, memory="1GiB", mig_device=3),
    )
    nvml = partitioned(world, processes=processes)
    world.now += 10
    gpu, devices = nvml.nvmlDeviceGetHandleByIndex(0), devices_of(nvml)

    def listed(device: Any) -> list[tuple[int, int, int]]:
        return [
            (p.pid, p.gpuInstanceId, p.computeInstanceId)
            for p in nvml.nvmlDeviceGetComputeRunningProcesses(device)
        ]

    assert listed(gpu) == [(5_000_001, 2, 0), (5_000_002, 9, 0)]
    assert [listed(device) for device in devices] == [[(5_000_001, 2, 0)], [], [(5_000_002, 9, 0)]]
    assert listed(nvml.nvmlDeviceGetHandleByIndex(1)) == [(5_000_004, NO_INSTANCE, NO_INSTANCE)]
    used = [nvml.nvmlDeviceGetMemoryInfo(device).used for device in devices]
    assert used == [20 * GIB, 0, 4 * GIB]
    assert nvml.nvmlDeviceGetMemoryInfo(gpu, NVML.nvmlMemory_v2).used == 24 * GIB
    # Four of seven slices are busy to seven tenths.
    assert nvml.nvmlDeviceGetPowerUsage(gpu) > 200_000


def test_a_device_has_no_more_memory_than_its_profile() -> None:
    hog = ScriptedProcess(gpu=0, pid=5_000_001, memory="60GiB", mig_device=2)
    nvml = partitioned(World(), processes=(hog,))
    memory = nvml.nvmlDeviceGetMemoryInfo(devices_of(nvml)[2])
    assert (memory.free, memory.used) == (0, 9984 * MIB)


def test_no_devices_are_no_devices() -> None:
    nvml = partitioned(World(), [])
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    assert nvml.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert devices_of(nvml) == []
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 7)


@pytest.mark.parametrize("model", ["L40S", "T4"])
def test_a_board_without_mig_refuses(model: str) -> None:
    with pytest.raises(BadInput, match=f"a {model} cannot be partitioned"):
        partitioned(World(), [], model)
    nvml = node(World(), 1, model)
    with refused("NOT_SUPPORTED"):
        nvml.nvmlDeviceGetMigDeviceHandleByIndex(nvml.nvmlDeviceGetHandleByIndex(0), 0)


# Other layouts --------------------------------------------------------------------------------


def test_uuids_stay_as_long_as_the_layout_does() -> None:
    uuids = uuids_of(partitioned(World()))
    assert uuids_of(partitioned(World())) == uuids  # a driver that is opened anew
    assert set(uuids_of(partitioned(World(), ["3g.40gb"]))) <= set(uuids)
    later = Scenario(mig=(ScriptedMig(gpu=0, devices=LAYOUT, from_seconds=1),))
    world = World()
    nvml = node(world, 2, scenario=later)
    world.now += 2
    assert not set(uuids_of(nvml)) & set(uuids)  # made at another time


def test_a_new_layout_makes_the_old_handles_stale() -> None:
    world = World()
    scenario = Scenario(
        mig=(
            ScriptedMig(gpu=0, devices=LAYOUT, until_seconds=10),
            ScriptedMig(gpu=0, devices=("7g.80gb",), from_seconds=10, until_seconds=20),
        )
    )
    nvml = node(world, 2, scenario=scenario)
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    events = nvml.nvmlEventSetCreate()
    nvml.nvmlDeviceRegisterEvents(gpu, NVML.nvmlEventMigConfigChange, events)
    first = devices_of(nvml)
    with refused("TIMEOUT"):
        nvml.nvmlEventSetWait(events, 0)
    world.now += 12
    for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlDeviceGetName):
        with refused("INVALID_ARGUMENT"):
            ask(first[0])
    assert nvml.nvmlEventSetWait(events, 0).device is gpu
    (whole,) = devices_of(nvml)
    assert nvml.nvmlDeviceGetGpuInstanceId(whole) == 0
    world.now += 10
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetUUID(whole)
    assert nvml.nvmlDeviceGetMigMode(gpu) == [0, 0]
    assert nvml.nvmlDeviceGetUtilizationRates(gpu).gpu == 0
    assert nvml.nvmlEventSetWait(events, 0).eventType == NVML.nvmlEventMigConfigChange
    with refused("TIMEOUT"):
        nvml.nvmlEventSetWait(events, 0)


def test_a_layout_can_change_while_a_call_hangs() -> None:
    world = World()
    scenario = Scenario(
        mig=(ScriptedMig(gpu=0, devices=LAYOUT, until_seconds=1),),
        faults=(Hang(gpu=0, function="nvmlDeviceGetMemoryInfo", seconds=2),),
    )
    nvml = node(world, 1, scenario=scenario)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceGetMemoryInfo(devices_of(nvml)[0])


def test_devices_go_with_their_gpu() -> None:
    nvml = partitioned(World(), faults=(Lose(gpu=0, function="nvmlDeviceGetPowerUsage"),))
    device = devices_of(nvml)[0]
    with refused("GPU_IS_LOST"):
        nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(0))
    with refused("GPU_IS_LOST"):
        nvml.nvmlDeviceGetUUID(device)


def test_a_file_that_changes_something_else_leaves_the_devices_alone(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "scenario.json"

    def write(**scenario: Any) -> None:
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(scenario))
        os.utime(draft, (world.now, world.now))
        draft.rename(path)

    mig = [{"gpu": 0, "devices": ["1g.10gb"] * 7}]
    write(mig=mig)
    nvml = node(world, 1, scenario=ScenarioFile(path))
    devices = devices_of(nvml)
    assert len(devices) == 7
    world.now += 5
    write(mig=mig, processes=[{"gpu": 0, "pid": 5_000_001, "mig_device": 6, "memory": "1GiB"}])
    assert nvml.nvmlDeviceGetMemoryInfo(devices[6]).used == GIB
    assert devices_of(nvml) == devices
    write()
    assert devices_of(nvml) == []
