"""Compute instances of simulated GPUs, the devices they make, and the processes upon those."""

from collections.abc import Callable
from ctypes import byref, c_uint, pointer
from itertools import product
from typing import Any

import pytest
from tests.support.mig_cards import MOST, MigCard, in_mig_mode
from tests.support.simulated_nodes import GIB, MIB, NVML, fields_of, outcome, refused

from stoker.agent.simulated.scenario import (
    Fail,
    Missing,
    Scenario,
    ScriptedDriver,
    ScriptedProcess,
)


def test_without_a_compute_instance_there_is_no_device() -> None:
    gpu = in_mig_mode()
    instance = gpu.create("3g.20gb", 4)
    assert gpu.uuids == []
    with refused("NOT_FOUND"):
        gpu.nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.gpu, 0)
    part = gpu.split(instance, "3g.20gb")
    (uuid,) = gpu.uuids
    device = gpu.nvml.nvmlDeviceGetHandleByUUID(uuid)
    assert gpu.nvml.nvmlDeviceGetName(device) == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert gpu.nvml.nvmlDeviceGetGpuInstanceId(device) == 2
    assert gpu.nvml.nvmlDeviceGetComputeInstanceId(device) == 0
    assert gpu.nvml.nvmlDeviceGetMemoryInfo(device).total == 19968 * MIB
    with refused("NOT_SUPPORTED"):
        gpu.nvml.nvmlDeviceGetUtilizationRates(gpu.gpu)
    with refused("IN_USE"):
        gpu.nvml.nvmlGpuInstanceDestroy(instance)
    gpu.nvml.nvmlComputeInstanceDestroy(part)
    with refused("INVALID_ARGUMENT"):
        gpu.nvml.nvmlDeviceGetUUID(device)
    with refused("NOT_FOUND"):
        gpu.nvml.nvmlDeviceGetHandleByUUID(uuid)
    gpu.nvml.nvmlGpuInstanceDestroy(instance)
    assert gpu.places == {}


def test_uuids_are_others_after_every_making() -> None:
    gpu, seen = in_mig_mode(), set[str]()
    instance = gpu.create("2g.10gb", 0)
    for _ in range(5):
        part = gpu.split(instance, "2g.10gb")
        seen |= set(gpu.uuids)
        gpu.nvml.nvmlComputeInstanceDestroy(part)
    gpu.nvml.nvmlGpuInstanceDestroy(instance)
    seen.add(gpu.device("2g.10gb", 0))
    other = MigCard(gpu.nvml, 1)
    other.enable()
    seen.add(other.device("2g.10gb", 0))
    assert len(seen) == 7


def test_devices_that_stay_keep_uuid_and_handle() -> None:
    gpu = in_mig_mode()
    uuid = gpu.device("3g.20gb", 4)
    device = gpu.nvml.nvmlDeviceGetHandleByUUID(uuid)
    other = gpu.create("1g.5gb", 0)
    gpu.split(other, "1g.5gb")
    assert gpu.nvml.nvmlDeviceGetUUID(device) == uuid
    assert uuid in gpu.uuids


@pytest.mark.parametrize(
    ("model", "name", "offered"),
    [
        ("A100-40GB", "3g.20gb", {0: (0, 1, 3, 14), 1: (1, 2, 1, 28), 2: (2, 3, 1, 42)}),
        ("H100-80GB", "1g.10gb", {0: (0, 1, 1, 16)}),
        ("H100-80GB", "1g.20gb", {7: (7, 1, 1, 26)}),  # more SMs than a slice has
        ("A30-24GB", "4g.24gb", {0: (0, 1, 4, 14), 1: (1, 2, 2, 28), 3: (3, 4, 1, 56)}),
    ],
)
def test_a_gpu_instance_offers_compute_instances(
    model: str, name: str, offered: dict[int, tuple[int, int, int, int]]
) -> None:
    gpu = in_mig_mode(model)
    instance = gpu.create(name)
    ask = gpu.nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo
    told = [outcome(ask, instance, constant, 0) for constant in range(10)]
    assert told[9] == "INVALID_ARGUMENT"
    found = {
        number: (info.id, info.sliceCount, info.instanceCount, info.multiprocessorCount)
        for number, info in enumerate(told[:9])
        if info != "NOT_SUPPORTED"
    }
    assert found == offered
    whole = max(offered)
    assert ask(instance, whole, 0).name == f"MIG {name}"
    assert fields_of(ask(instance, whole, 0, 1)).keys() < fields_of(ask(instance, whole, 0)).keys()
    with refused("INVALID_ARGUMENT"):
        ask(instance, whole, 1)


def test_compute_instances_share_what_their_gpu_instance_has() -> None:
    gpu = in_mig_mode()
    instance = gpu.create("3g.20gb", 4)
    capacity = gpu.nvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity
    assert [capacity(instance, number) for number in (0, 1, 2)] == [3, 1, 1]
    two = gpu.split(instance, "3g.20gb", 2)
    assert [capacity(instance, number) for number in (0, 1, 2)] == [1, 0, 0]
    gpu.split(instance, "3g.20gb", 1)
    with refused("INSUFFICIENT_RESOURCES"):
        gpu.split(instance, "3g.20gb", 1)
    for number, wrong in ((3, "NOT_SUPPORTED"), (9, "INVALID_ARGUMENT")):
        with refused(wrong):
            gpu.nvml.nvmlGpuInstanceCreateComputeInstance(instance, number)
    names = [
        gpu.nvml.nvmlDeviceGetName(gpu.nvml.nvmlDeviceGetHandleByUUID(uuid)).rpartition(" ")[2]
        for uuid in gpu.uuids
    ]
    assert names == ["2c.3g.20gb", "1c.3g.20gb"]
    info = gpu.nvml.nvmlComputeInstanceGetInfo(two)
    assert (info.id, info.profileId, info.placement.start, info.placement.size) == (0, 1, 0, 2)
    within = gpu.nvml.nvmlGpuInstanceGetInfo(info.gpuInstance)
    assert (within.id, within.placement.start) == (2, 4)
    handles, count = (NVML.c_nvmlComputeInstance_t * MOST)(), c_uint()
    gpu.nvml.nvmlGpuInstanceGetComputeInstances(instance, 0, handles, byref(count))
    assert [gpu.nvml.nvmlComputeInstanceGetInfo_v2(h).id for h in handles[: count.value]] == [1]
    gpu.nvml.nvmlComputeInstanceDestroy(two)
    # The number that is free is used again.
    assert gpu.nvml.nvmlComputeInstanceGetInfo_v2(gpu.split(instance, "3g.20gb", 1)).id == 0
    by_id = gpu.nvml.nvmlGpuInstanceGetComputeInstanceById(instance, 1)
    assert gpu.nvml.nvmlComputeInstanceGetInfo_v2(by_id).placement.start == 2
    with refused("NOT_FOUND"):
        gpu.nvml.nvmlGpuInstanceGetComputeInstanceById(instance, 2)


def test_a_compute_instance_has_its_place() -> None:
    gpu = in_mig_mode()
    instance, count = gpu.create("4g.20gb"), c_uint()
    places = (NVML.c_nvmlComputeInstancePlacement_t * MOST)()
    gpu.nvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(instance, 1, places, byref(count))
    assert [(place.start, place.size) for place in places[: count.value]] == [
        (0, 2),
        (1, 2),
        (2, 2),
    ]
    create = gpu.nvml.nvmlGpuInstanceCreateComputeInstanceWithPlacement
    place = NVML.c_nvmlComputeInstancePlacement_t
    made = create(instance, 1, pointer(place(2, 2)))
    assert gpu.nvml.nvmlComputeInstanceGetInfo_v2(made).placement.start == 2
    with refused("INSUFFICIENT_RESOURCES"):
        create(instance, 0, pointer(place(3, 1)))
    for wrong in (place(4, 1), place(0, 2)):
        with refused("INVALID_ARGUMENT"):
            create(instance, 0, pointer(wrong))
    assert create(instance, 0, pointer(place(1, 1)))


# Users ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "busy"),
    [
        (ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_start=0), "2g.10gb"),
        (ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_start=4), "3g.20gb"),
        (ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_device=1), "2g.10gb"),
        (ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_start=2), None),
        (ScriptedProcess(gpu=1, pid=5_000_001, memory="1GiB", mig_start=4), None),
    ],
)
def test_what_a_process_uses_is_not_destroyed(process: ScriptedProcess, busy: str | None) -> None:
    gpu = in_mig_mode()
    parts = {
        name: gpu.split(gpu.create(name, start), name)
        for name, start in (("3g.20gb", 4), ("2g.10gb", 0))
    }
    gpu.nvml.play(Scenario(processes=(process,)))
    listed = gpu.nvml.nvmlDeviceGetComputeRunningProcesses(gpu.gpu)
    ids = {"3g.20gb": 2, "2g.10gb": 3}
    assert [each.gpuInstanceId for each in listed] == ([ids[busy]] if busy else [])
    assert gpu.nvml.nvmlDeviceGetMemoryInfo(gpu.gpu).used - 518 * MIB == (GIB if busy else 0)
    for name, part in sorted(parts.items(), key=lambda each: each[0] != busy):
        told = outcome(gpu.nvml.nvmlComputeInstanceDestroy, part)
        assert told == ("IN_USE" if name == busy else NVML.NVML_SUCCESS)


def test_a_process_is_on_a_device_as_soon_as_that_is_made() -> None:
    process = ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB", mig_start=4)
    gpu = in_mig_mode()
    gpu.nvml.play(Scenario(processes=(process,)))
    device = gpu.nvml.nvmlDeviceGetHandleByUUID(gpu.device("3g.20gb", 4))
    assert gpu.nvml.nvmlDeviceGetMemoryInfo(device).used == GIB
    assert [p.pid for p in gpu.nvml.nvmlDeviceGetComputeRunningProcesses(device)] == [5_000_001]


@pytest.mark.parametrize(("gpu", "strikes"), [(0, True), (1, False), (None, True)])
def test_faults_of_a_gpu_strike_what_is_asked_of_its_instances(
    gpu: int | None, strikes: bool
) -> None:
    on = in_mig_mode()
    instance = on.create("2g.10gb", 0)
    part = on.split(instance, "2g.10gb")
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (on.nvml.nvmlGpuInstanceGetInfo, (instance,)),
        (on.nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo, (instance, 1, 0)),
        (on.nvml.nvmlComputeInstanceGetInfo_v2, (part,)),
        (on.nvml.nvmlComputeInstanceDestroy, (part,)),
        (on.nvml.nvmlGpuInstanceDestroy, (instance,)),
    ]
    for ask, arguments in calls:
        fault = Fail(gpu=gpu, function=ask.__name__, error="UNKNOWN")
        on.nvml.play(Scenario(faults=(fault,)))
        assert (outcome(ask, *arguments) == "UNKNOWN") == strikes


def test_a_fault_leaves_things_as_they_are() -> None:
    on = in_mig_mode()
    instance = on.create("2g.10gb", 0)
    for function, error in product(
        ("nvmlGpuInstanceCreateComputeInstance", "nvmlGpuInstanceDestroy"),
        ("IN_USE", "NO_PERMISSION"),
    ):
        on.nvml.play(Scenario(faults=(Fail(gpu=0, function=function, error=error),)))
        with refused(error):
            if function == "nvmlGpuInstanceDestroy":
                on.nvml.nvmlGpuInstanceDestroy(instance)
            else:
                on.split(instance, "2g.10gb")
        assert on.places == {3: (0, 14)}
        assert on.uuids == []


def test_an_older_driver_has_the_older_forms_only() -> None:
    on = in_mig_mode(scenario=Scenario(driver=ScriptedDriver("470.57.02")))
    instance = on.create("2g.10gb", 0)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (on.nvml.nvmlDeviceGetGpuInstanceProfileInfo, (on.gpu, 1)),
        (on.nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo, (instance, 1, 0)),
    ]
    for ask, arguments in calls:
        with refused("FUNCTION_NOT_FOUND"):
            ask(*arguments)
        assert ask(*arguments, 1).sliceCount == 2
    with refused("FUNCTION_NOT_FOUND"):
        on.nvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(instance, 1, None, None)


def test_a_missing_form_leaves_the_other() -> None:
    form = Missing(function="nvmlDeviceGetGpuInstanceProfileInfoV")
    on = in_mig_mode(scenario=Scenario(faults=(form,)))
    with refused("FUNCTION_NOT_FOUND"):
        on.nvml.nvmlDeviceGetGpuInstanceProfileInfo(on.gpu, 0)
    assert on.nvml.nvmlDeviceGetGpuInstanceProfileInfo(on.gpu, 0, 1).id == 19
