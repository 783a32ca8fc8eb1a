"""Who uses a GPU: each process once, by the list that says most, with its MIG instance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import Rig

from stoker.agent.readings import ProcessReading
from stoker.agent.simulated.scenario import Fail, Missing, ScriptedMig, ScriptedProcess

NVML: Any = pynvml
GIB = 2**30
COMPUTE = "nvmlDeviceGetComputeRunningProcesses"
MPS = "nvmlDeviceGetMPSComputeRunningProcesses"
GRAPHICS = "nvmlDeviceGetGraphicsRunningProcesses"
NONE = 0xFFFFFFFF


def entry(pid: int, used: int | None = 0, instance: int = NONE) -> Any:
    return NVML.nvmlFriendlyObject(
        {"pid": pid, "usedGpuMemory": used, "gpuInstanceId": instance, "computeInstanceId": NONE}
    )


def telling(listed: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    return lambda handle: listed


def rig_with(lists: Mapping[str, Sequence[Any]], *faults: Any, **scenario: Any) -> Rig:
    rig = Rig(*faults, gpus=1, **scenario)
    for function in (COMPUTE, MPS, GRAPHICS):
        listed = list(lists.get(function, ()))
        setattr(rig.nvml, function, telling(listed))
    return rig.opened()


@pytest.mark.parametrize(
    ("listed", "memory"),
    [
        ([], {}),
        ([(7, 5), (8, 6)], {7: 5, 8: 6}),
        ([(7, 5), (7, 6)], {7: 11}),  # on two MIG instances
        ([(7, None)], {7: None}),
        ([(7, 5), (7, None), (7, 6)], {7: None}),  # a part of the sum is not the sum
        ([(7, 2**64 - 1)], {7: None}),
    ],
)
def test_memory(listed: list[tuple[int, int | None]], memory: dict[int, int | None]) -> None:
    told = rig_with({COMPUTE: [entry(pid, used) for pid, used in listed]}).driver.processes()
    assert {p.pid: p.memory_used_bytes for p in told.processes} == memory


def test_one_list_speaks_for_a_process_that_is_in_several() -> None:
    lists = {
        COMPUTE: [entry(1, 10)],
        MPS: [entry(1, 99), entry(2, 20)],
        GRAPHICS: [entry(1, 99), entry(2, 99), entry(3, 30)],
    }
    told = rig_with(lists).driver.processes()
    assert [(p.pid, p.kind, p.memory_used_bytes) for p in told.processes] == [
        (1, "compute", 10),
        (2, "compute", 20),
        (3, "graphics", 30),
    ]


@pytest.mark.parametrize(
    ("mig", "instances", "told"),
    [
        (True, [3], 3),
        (True, [NONE], None),
        (True, [3, 3], 3),
        (True, [3, 4], None),  # it runs in several
        (False, [0], None),  # outside MIG mode older drivers leave the number as they found it
    ],
)
def test_the_instance_that_a_process_runs_in(
    mig: bool, instances: list[int], told: int | None
) -> None:
    layout = (ScriptedMig(gpu=0, devices=("1g.10gb",)),) if mig else ()
    listed = [entry(1, 1, instance) for instance in instances]
    (process,) = rig_with({COMPUTE: listed}, mig=layout).driver.processes().processes
    assert process.gpu_instance_id == told


@pytest.mark.parametrize(
    "lacking", [(MPS, f"{MPS}_v2"), (GRAPHICS, f"{GRAPHICS}_v2"), (MPS,), (GRAPHICS,), (COMPUTE,)]
)
def test_lists_that_a_driver_lacks(lacking: tuple[str, ...]) -> None:
    work = ScriptedProcess(gpu=0, pid=5_000_001)
    rig = Rig(*(Missing(function=each) for each in lacking), processes=(work,)).opened()
    for _ in range(2):
        rig.calls.clear()
        told = rig.driver.processes()
        assert [p.pid for p in told.processes] == [5_000_001]
        assert told.failed_gpus == ()
    assert not set(rig.asked(0)) & set(lacking)


@pytest.mark.parametrize("error", ["NOT_FOUND", "NO_PERMISSION", "UNKNOWN"])
def test_a_process_that_ended_since_it_was_listed_is_no_failure(error: str) -> None:
    fault = Fail(function="nvmlSystemGetProcessName", error=error)
    rig = Rig(fault, processes=(ScriptedProcess(gpu=0, pid=5_000_001, name="train"),)).opened()
    told = rig.driver.processes()
    assert [(p.pid, p.name) for p in told.processes] == [(5_000_001, None)]
    assert told.failed_gpus == ()


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


# Without privileges: the whole GPU's list is not told, that of each MIG device is ---------------

LAYOUT = ScriptedMig(gpu=0, devices=("3g.40gb", "1c.2g.20gb", "1c.2g.20gb"))
SMALLER = ScriptedMig(gpu=0, devices=("1g.10gb",))
WORK = (
    ScriptedProcess(gpu=0, pid=5_000_001, memory="8GiB", mig_device=0),
    ScriptedProcess(gpu=0, pid=5_000_002, memory="4GiB", mig_device=1),
)
Listing = Callable[[Any], Sequence[Any]]


def unprivileged(rig: Rig, listing: Callable[[Listing], Listing] = lambda ask: ask) -> Rig:
    """Let lists of whole GPUs not be told; `listing` may change what is told of MIG devices."""
    for function in (COMPUTE, GRAPHICS, MPS):
        ask: Listing = getattr(rig.nvml, function)
        of_part = listing(ask)

        def asked(handle: Any, of_part: Listing = of_part) -> Sequence[Any]:
            if handle in [rig.nvml.nvmlDeviceGetHandleByIndex(index) for index in range(4)]:
                raise NVML.NVMLError(NVML.NVML_ERROR_NO_PERMISSION)
            return of_part(handle)

        setattr(rig.nvml, function, asked)
    return rig.opened()


def test_who_may_not_ask_the_gpu_asks_its_mig_devices() -> None:
    rig = unprivileged(Rig(mig=(LAYOUT,), processes=WORK))
    rig.now += 1
    told = rig.driver.processes()
    large, left, right = rig.inventory.gpus[0].mig_devices
    assert large.gpu_instance_id != left.gpu_instance_id == right.gpu_instance_id
    gpu = rig.nvml.uuids[0]
    assert sorted(told.processes, key=lambda each: each.pid) == [
        ProcessReading(gpu, 5_000_001, "compute", 8 * GIB, None, large.gpu_instance_id),
        ProcessReading(gpu, 5_000_002, "compute", 4 * GIB, None, left.gpu_instance_id),
    ]
    # Whole GPUs have nobody else to ask.
    assert [(each.index, each.error_kind) for each in told.failed_gpus] == [
        (index, "no_permission") for index in (1, 2, 3)
    ]


def test_a_gpu_without_mig_devices_yet_has_no_users() -> None:
    told = unprivileged(Rig(mig=(ScriptedMig(gpu=0),))).driver.processes()
    assert told.processes == ()
    assert [each.index for each in told.failed_gpus] == [1, 2, 3]


def test_a_process_in_several_parts_is_told_once() -> None:
    def everywhere(ask: Listing) -> Listing:
        return lambda handle: [entry(7, 5)]

    rig = unprivileged(Rig(mig=(LAYOUT,)), everywhere)
    (process,) = rig.driver.processes().processes
    # Two GPU instances; the second has two compute instances, which share its memory.
    assert (process.pid, process.memory_used_bytes, process.gpu_instance_id) == (7, 10, None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("GPU_IS_LOST", "inventory_changed"),
        ("INVALID_ARGUMENT", "inventory_changed"),
        ("NO_PERMISSION", "no_permission"),
    ],
)
def test_a_part_that_does_not_tell_leaves_its_gpu_unknown_and_not_lost(
    error: str, kind: str
) -> None:
    def failing(ask: Listing) -> Listing:
        def asked(handle: Any) -> Sequence[Any]:
            raise NVML.NVMLError(getattr(NVML, f"NVML_ERROR_{error}"))

        return asked

    rig = unprivileged(Rig(mig=(LAYOUT,)), failing)
    first, *others = rig.driver.processes().failed_gpus
    assert (first.index, first.error_kind, len(others)) == (0, kind, 3)
    assert not rig.driver.sample()[0].is_lost


@pytest.mark.parametrize("function", [COMPUTE, GRAPHICS], ids=["amid the lists", "after them"])
def test_parts_that_change_meanwhile_leave_their_gpu_unknown(function: str) -> None:
    rig = Rig(mig=(ScriptedMig(gpu=0, devices=("3g.40gb",)),))
    last: Listing = getattr(rig.nvml, function)

    def changing(ask: Listing) -> Listing:
        def asked(handle: Any) -> Sequence[Any]:
            listed = ask(handle)
            if ask == last:
                rig.play(mig=(SMALLER,))
            return listed

        return asked

    unprivileged(rig, changing)
    (first, *_) = rig.driver.processes().failed_gpus
    assert (first.index, first.error_kind) == (0, "inventory_changed")
    assert not rig.sample()[0].is_lost
    told = rig.driver.processes()
    assert [each.index for each in told.failed_gpus] == [1, 2, 3]


def test_parts_that_could_not_all_be_listed_leave_their_gpu_unknown() -> None:
    fault = Fail(function="nvmlDeviceGetMaxMigDeviceCount", error="UNKNOWN")
    rig = unprivileged(Rig(fault, mig=(LAYOUT,)))
    (first, *_) = rig.driver.processes().failed_gpus
    assert (first.index, first.error_kind) == (0, "unknown")
