"""Partitions changed through the root helper, and through a child: every verb, good and bad."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

import psutil
import pytest
from tests.support.mig_steps import Node, destroy, empty, fill, instance_at, make, turned_on
from tests.support.root_helper import RunningHelper, open_folder, running
from tests.support.waiting import until

from stoker.agent.mig.stepping import (
    ChildStepper,
    FailureKind,
    HelperStepper,
    LineStepper,
    StepFailed,
)
from stoker.agent.partitions import Activation, GpuPartitions, SetMode, Step

GPU = "GPU-0000000a-0000-4000-8000-00000000000f"
# Not to wait for whoever is at a GPU: what is tested is that one does not go on without.
IMPATIENT = {"partitions.WAIT_SECONDS_MAX": 0.05}


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def node(folder: Path) -> Node:
    return Node(folder)


@pytest.fixture
def found(node: Node) -> Generator[RunningHelper]:
    with running(node.folder, *node.options) as found:
        yield found


@pytest.fixture(params=["helper", "child"])
def stepper(request: pytest.FixtureRequest, node: Node) -> Generator[LineStepper]:
    if request.param == "child":
        yield ChildStepper(node.source, node.folder / "locks")
        return
    with running(node.folder, *node.options) as found:
        yield HelperStepper(found.helper, is_simulated=True)


async def do(
    stepper: LineStepper, node: Node, *steps: Callable[[GpuPartitions], Step]
) -> GpuPartitions:
    """Do one step after the other, each as it follows from what is there."""
    (now,) = await stepper.read(node.uuids[0])
    for step in steps:
        await stepper.do(node.uuids[0], step(now), now)
        (now,) = await stepper.read(node.uuids[0])
    return now


def made(now: GpuPartitions) -> Step:
    return make(now, "3g.40gb", 4)


def filled(now: GpuPartitions) -> Step:
    return fill(now, 4)


# --- every verb, good


async def test_every_step_and_back(stepper: LineStepper, node: Node) -> None:
    before = node.now()
    assert await stepper.set_mode(node.uuids[0], True) is Activation.DONE
    now = await do(stepper, node, made, filled)
    (instance,) = now.instances
    (compute,) = instance.compute_instances
    assert (instance.profile, instance.start, instance.size) == ("3g.40gb", 4, 4)
    assert compute.uuid.startswith("MIG-")
    now = await do(stepper, node, lambda now: empty(now, 4), lambda now: destroy(now, 4))
    assert now.instances == ()
    assert await stepper.set_mode(node.uuids[0], False) is Activation.DONE
    assert await stepper.read(node.uuids[0]) == (before,)


async def test_parts_of_a_gpu_instance_one_by_one(stepper: LineStepper, node: Node) -> None:
    node.do(turned_on, made, lambda now: fill(now, 4, 2))
    now = await do(stepper, node, lambda now: fill(now, 4, 1))
    slices = [each.compute_slices for each in instance_at(now, 4).compute_instances]
    assert slices == [2, 1]


async def test_all_gpus_are_told_and_those_that_cannot_be_read_are_named(
    stepper: LineStepper, node: Node
) -> None:
    assert [gpu.uuid for gpu in await stepper.read(None)] == list(node.uuids)
    assert stepper.shortfall == ""
    node.play({"fault": "lose", "gpu": 1, "function": "nvmlDeviceGetMigMode"})
    assert [gpu.uuid for gpu in await stepper.read(None)] == [node.uuids[0]]
    assert node.uuids[1] in stepper.shortfall
    node.play()
    assert len(await stepper.read(None)) == 2
    assert stepper.shortfall == ""


# --- what the driver refuses

FUNCTIONS: dict[str, tuple[str, Callable[[GpuPartitions], Step]]] = {
    "mode": ("nvmlDeviceSetMigMode", lambda now: SetMode(is_enabled=False)),
    "create": (
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        lambda now: make(now, "1g.10gb", 0),
    ),
    "fill": ("nvmlGpuInstanceCreateComputeInstance", lambda now: fill(now, 4, 1)),
    "empty": ("nvmlComputeInstanceDestroy", lambda now: empty(now, 4)),
    "destroy": ("nvmlGpuInstanceDestroy", lambda now: destroy(now, 2)),
}


def prepared(node: Node, name: str) -> GpuPartitions:
    """Have MIG mode on; where steps need them, a part of a 3g at 4, and an empty 1g at 2."""
    if name == "mode":
        return node.do(turned_on)
    return node.do(
        *(turned_on, made),
        lambda now: fill(now, 4, 2),
        lambda now: make(now, "1g.10gb", 2),
    )


KINDS = {"NO_PERMISSION": FailureKind.NO_PERMISSION, "IN_USE": FailureKind.BUSY}


@pytest.mark.parametrize("name", FUNCTIONS)
async def test_what_the_driver_refuses_changes_nothing_and_is_named(
    name: str, node: Node, found: RunningHelper
) -> None:
    stepper = HelperStepper(found.helper, is_simulated=True)
    function, step = FUNCTIONS[name]
    before = prepared(node, name)
    for error, kind in KINDS.items():
        node.play({"fault": "fail", "function": function, "error": error})
        with pytest.raises(StepFailed, match=f"{node.uuids[0]}: .*{error}") as raised:
            await stepper.do(node.uuids[0], step(before), before)
        assert raised.value.kind is kind
        assert node.now() == before


async def test_a_mode_that_is_pending_is_said_to_be(node: Node, folder: Path) -> None:
    ampere = Node(folder, model="A100-40GB")
    stepper = ChildStepper(ampere.source, folder)
    ampere.play(processes=[{"gpu": 0, "pid": 5_000_001}])
    assert await stepper.set_mode(ampere.uuids[0], True) is Activation.IN_USE
    now = ampere.now()
    assert (now.is_enabled, now.is_pending) == (False, True)
    with pytest.raises(StepFailed, match="not in force: in_use") as raised:
        await stepper.do(ampere.uuids[0], SetMode(is_enabled=True), now)
    assert raised.value.kind is FailureKind.BUSY


async def test_a_step_that_comes_late_hits_nobody_else(stepper: LineStepper, node: Node) -> None:
    meant = node.do(turned_on, made, filled)
    late = empty(meant, 4)
    before = node.do(lambda now: late, filled)
    assert instance_at(before, 4).compute_instances[0].id == late.compute_instance_id
    for step in (late, filled(meant)):
        with pytest.raises(StepFailed) as raised:
            await stepper.do(node.uuids[0], step, meant)
        assert raised.value.kind in (FailureKind.NOT_FOUND, FailureKind.NO_ROOM)
    assert node.now() == before


async def test_a_gpu_that_is_not_there(stepper: LineStepper) -> None:
    with pytest.raises(StepFailed, match=f"{GPU}: the driver has no such GPU") as raised:
        await stepper.read(GPU)
    assert raised.value.kind is FailureKind.NOT_FOUND


async def test_a_driver_that_is_not_loaded(stepper: LineStepper, node: Node) -> None:
    node.play(driver_loaded=False)
    with pytest.raises(StepFailed, match="DRIVER_NOT_LOADED") as raised:
        await stepper.read(None)
    assert raised.value.kind is FailureKind.DRIVER_GONE


async def test_a_simulation_whose_files_are_spoilt(stepper: LineStepper, node: Node) -> None:
    node.state.write_text("{", encoding="ascii")
    with pytest.raises(StepFailed, match="mig.json"):
        await stepper.read(None)


# --- one at a time, and what is cut off in the middle


@contextlib.asynccontextmanager
async def hanging(
    stepper: LineStepper, node: Node, function: str, step: Callable[[GpuPartitions], Step]
) -> AsyncGenerator[asyncio.Task[None]]:
    """Give a step on the first GPU that hangs in the driver until the scenario is another."""
    now = node.now()
    node.play({"fault": "hang", "function": function, "gpu": 0})
    task = asyncio.create_task(stepper.do(node.uuids[0], step(now), now))
    try:
        yield task
    finally:
        node.play()
        if not task.done():
            await task


async def one_who_holds(lock: Path) -> psutil.Process:
    """Return the process that has this lock, once there is one."""

    async def look() -> psutil.Process | None:
        return _holder(lock)

    return await until("a step that is under way", look)


def _holder(lock: Path) -> psutil.Process | None:
    if not lock.exists():
        return None
    inode = lock.stat().st_ino
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[3] == "WRITE" and words[5].endswith(f":{inode}"):
            return psutil.Process(int(words[4]))
    return None


def lock_of(stepper: LineStepper, node: Node) -> Path:
    folder = node.folder if isinstance(stepper, HelperStepper) else node.folder / "locks"
    return folder / f"mig-{node.uuids[0]}.lock"


@pytest.mark.parametrize(
    ("stepper", "name"),
    [*(("helper", name) for name in FUNCTIONS), ("child", "create"), ("child", "empty")],
    indirect=["stepper"],
)
async def test_killed_in_the_middle_of_a_step(name: str, stepper: LineStepper, node: Node) -> None:
    function, step = FUNCTIONS[name]
    before = prepared(node, name)
    async with hanging(stepper, node, function, step) as task:
        worker = await one_who_holds(lock_of(stepper, node))
        worker.send_signal(signal.SIGKILL)
        with pytest.raises(StepFailed, match=r"hung up|ended by SIGKILL") as raised:
            await task
    assert raised.value.kind is FailureKind.INTERRUPTED
    # It is as it was, nobody is kept out, and what is wanted can be done.
    assert await stepper.read(node.uuids[0]) == (before,)
    await stepper.do(node.uuids[0], step(before), before)
    assert node.now() != before


async def test_a_step_that_hangs_is_ended_by_the_kernel(node: Node) -> None:
    tuning = {"partitions.STEP_SECONDS_MAX": 1}
    with running(node.folder, *node.options, tuning=tuning) as found:
        stepper = HelperStepper(found.helper, is_simulated=True)
        before = node.do(turned_on)
        function = "nvmlDeviceCreateGpuInstanceWithPlacement"
        async with hanging(stepper, node, function, made) as task:
            with pytest.raises(StepFailed, match="hung up") as raised:
                await task
        assert raised.value.kind is FailureKind.INTERRUPTED
        assert node.now() == before


async def test_a_step_is_one_at_a_time_on_a_gpu_and_others_go_on(node: Node) -> None:
    with running(node.folder, *node.options, tuning=IMPATIENT) as found:
        stepper = HelperStepper(found.helper, is_simulated=True)
        await stepper.set_mode(node.uuids[1], True)
        before = node.do(turned_on)
        function = "nvmlDeviceCreateGpuInstanceWithPlacement"
        async with hanging(stepper, node, function, made):
            await one_who_holds(lock_of(stepper, node))
            for asked in (
                stepper.do(node.uuids[0], make(before, "1g.10gb", 0), before),
                stepper.read(node.uuids[0]),
            ):
                with pytest.raises(StepFailed, match="another step is still under way") as raised:
                    await asked
                assert raised.value.kind is FailureKind.BUSY
            # What is told of it may be half done, and that is said.
            assert len(await stepper.read(None)) == 2
            assert f"still under way on {node.uuids[0]}" in stepper.shortfall
            other = node.now(1)
            await stepper.do(node.uuids[1], make(other, "1g.10gb", 0), other)
            # The one that hangs has the driver open, so no mode can be changed.
            with pytest.raises(StepFailed, match="still under way") as raised:
                await stepper.set_mode(node.uuids[1], False)
            assert raised.value.kind is FailureKind.BUSY
        assert len(node.now().instances) == 1


async def test_who_comes_while_a_step_is_under_way_waits_for_it(
    stepper: LineStepper, node: Node
) -> None:
    node.do(turned_on)
    function = "nvmlDeviceCreateGpuInstanceWithPlacement"
    async with hanging(stepper, node, function, made) as task:
        await one_who_holds(lock_of(stepper, node))
        reading = asyncio.create_task(stepper.read(node.uuids[0]))
        node.play()
        await task
        (now,) = await reading
        assert [each.start for each in now.instances] == [4]


async def test_who_takes_the_answer_no_more_leaves_no_child_behind(node: Node) -> None:
    stepper = ChildStepper(node.source, node.folder / "locks")
    node.do(turned_on)
    function = "nvmlDeviceCreateGpuInstanceWithPlacement"
    async with hanging(stepper, node, function, made) as task:
        worker = await one_who_holds(lock_of(stepper, node))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not worker.is_running()
