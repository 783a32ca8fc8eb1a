"""Ending a process that has a GPU open: through the helper, by PID and start, and no other ever."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from tests.support.mig_steps import Node, fill, make, turned_on
from tests.support.root_helper import (
    NOBODY,
    SECONDS_MAX,
    ProcTree,
    RunningHelper,
    open_folder,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.helper.files import read_process
from stoker.agent.mig.stepping import (
    ChildStepper,
    FailureKind,
    HelperStepper,
    LineStepper,
    StepFailed,
    StepsUnavailable,
)
from stoker.agent.simulated.workloads import DEVICES, WORKLOAD

GPU = "GPU-0000000a-0000-4000-8000-00000000000f"
OTHER = "GPU-0000000b-0000-4000-8000-00000000000f"
# A process that does not listen; it says when it does not.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def tree(folder: Path) -> ProcTree:
    """A /proc in which the kernel module has two GPUs, at minor numbers 0 and 3."""
    tree = ProcTree(folder / "proc")
    for address, uuid, minor in (("0000:01:00.0", OTHER, 0), ("0000:41:00.0", GPU, 3)):
        card = tree.root / "driver" / "nvidia" / "gpus" / address
        card.mkdir(parents=True)
        (card / "information").write_text(
            f"Model: \t\t NVIDIA H100\nIRQ:   \t\t 17\nGPU UUID: \t {uuid}\n"
            f"Bus Location: \t {address}\nDevice Minor: \t {minor}\n",
            encoding="ascii",
        )
    return tree


@pytest.fixture
def found(folder: Path, tree: ProcTree) -> Generator[RunningHelper]:
    tuning = {"ending.TERM_SECONDS_MAX": 0.3}
    with running(folder, "--proc", str(tree.root), tuning=tuning) as found:
        yield found


@pytest.fixture
def stepper(found: RunningHelper) -> LineStepper:
    return HelperStepper(found.helper)


@pytest.fixture
async def user() -> AsyncGenerator[asyncio.subprocess.Process]:
    """A process, which the tree is told about."""
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    yield process
    await ended(process)


async def ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def started(process: asyncio.subprocess.Process) -> int:
    return read_process("/proc", process.pid).started_ticks


def holding(
    tree: ProcTree, process: asyncio.subprocess.Process, *files: str, ticks: int | None = None
) -> int:
    """Have a process hold these files, in the tree; return when it began."""
    begun = started(process) if ticks is None else ticks
    tree.add(process.pid, ticks=begun, open_files=files)
    return begun


async def test_who_has_the_gpu_open_is_asked_to_end(
    stepper: LineStepper, tree: ProcTree, user: asyncio.subprocess.Process
) -> None:
    ticks = holding(tree, user, "/dev/null", "/dev/nvidiactl", "/dev/nvidia3")
    assert await stepper.end_holder(GPU, user.pid, ticks)
    assert await user.wait() == -signal.SIGTERM


async def test_who_does_not_listen_is_killed(stepper: LineStepper, tree: ProcTree) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEAF, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"deaf\n"
        ticks = holding(tree, process, "/dev/nvidia3")
        assert await stepper.end_holder(GPU, process.pid, ticks)
        assert await process.wait() == -signal.SIGKILL
    finally:
        await ended(process)


@pytest.mark.parametrize(
    "files",
    [
        (),
        ("/dev/nvidiactl", "/dev/nvidia-uvm"),
        ("/dev/nvidia0", "/dev/nvidia33", "/dev/nvidia-caps/nvidia-cap3"),
        ("/tmp/dev/nvidia3",),
    ],
)
async def test_who_does_not_have_that_gpu_open_is_left_alone(
    files: tuple[str, ...], stepper: LineStepper, tree: ProcTree, user: asyncio.subprocess.Process
) -> None:
    ticks = holding(tree, user, *files)
    found = f"process {user.pid} does not have /dev/nvidia3 open"
    with pytest.raises(StepFailed, match=found) as raised:
        await stepper.end_holder(GPU, user.pid, ticks)
    assert raised.value.kind is FailureKind.NOT_FOUND
    assert user.returncode is None


async def test_who_has_the_pid_by_now_is_left_alone(
    stepper: LineStepper, tree: ProcTree, user: asyncio.subprocess.Process
) -> None:
    ticks = holding(tree, user, "/dev/nvidia3")
    assert await stepper.end_holder(GPU, user.pid, ticks - 1), "the one that is meant has ended"
    assert started(user) == ticks


async def test_who_has_ended_is_gone(
    stepper: LineStepper, user: asyncio.subprocess.Process
) -> None:
    ticks = started(user)
    await ended(user)
    assert await stepper.end_holder(GPU, user.pid, ticks)


async def test_a_gpu_that_the_kernel_module_does_not_know(
    stepper: LineStepper, tree: ProcTree, user: asyncio.subprocess.Process
) -> None:
    ticks = holding(tree, user, "/dev/nvidia3")
    with pytest.raises(StepsUnavailable, match="the kernel module knows no GPU-0000000c"):
        await stepper.end_holder(GPU.replace("a", "c"), user.pid, ticks)
    assert started(user) == ticks


async def test_without_the_kernel_module_nobody_is_ended(
    folder: Path, user: asyncio.subprocess.Process
) -> None:
    bare = ProcTree(folder / "bare")
    ticks = holding(bare, user, "/dev/nvidia3")
    with running(folder, "--proc", str(bare.root)) as found:
        stepper = HelperStepper(found.helper)
        with pytest.raises(StepsUnavailable, match="/driver/nvidia/gpus: No such file"):
            await stepper.end_holder(GPU, user.pid, ticks)
    assert started(user) == ticks


async def test_the_first_process_and_the_helper_itself_are_not_ended(
    found: RunningHelper, stepper: LineStepper, tree: ProcTree
) -> None:
    for pid in (1, found.process.pid):
        ticks = read_process("/proc", pid).started_ticks
        tree.add(pid, ticks=ticks, open_files=["/dev/nvidia3"])
        with pytest.raises(StepsUnavailable, match=f"process {pid} is not one to be ended"):
            await stepper.end_holder(GPU, pid, ticks)
    assert found.process.poll() is None


async def test_a_thread_of_the_kernel_is_not_ended(
    stepper: LineStepper, tree: ProcTree, user: asyncio.subprocess.Process
) -> None:
    ticks = started(user)
    tree.add(user.pid, ticks=ticks, open_files=["/dev/nvidia3"], is_kernel_thread=True)
    with pytest.raises(StepsUnavailable, match=f"process {user.pid} is the kernel's"):
        await stepper.end_holder(GPU, user.pid, ticks)
    assert started(user) == ticks


@pytest.mark.root
async def test_a_helper_that_may_not_end_it_says_so(folder: Path, tree: ProcTree) -> None:
    become = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    few = ("setpriv", "--bounding-set=-all,+sys_ptrace,+dac_read_search")  # not kill
    process = await asyncio.create_subprocess_exec(*become, "sleep", "1000")
    try:
        await until_true("another user's process", lambda: name_of(process.pid) == "sleep")
        ticks = holding(tree, process, "/dev/nvidia3")
        with running(folder, "--proc", str(tree.root), prefix=few) as found:
            stepper = HelperStepper(found.helper)
            with pytest.raises(StepFailed, match=f"process {process.pid}: .*CAP_KILL") as raised:
                await stepper.end_holder(GPU, process.pid, ticks)
        assert raised.value.kind is FailureKind.NO_PERMISSION
        assert started(process) == ticks
    finally:
        await ended(process)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


# --- on simulated GPUs


@pytest.mark.parametrize("on_mig_device", [False, True], ids=["the GPU", "a MIG device of it"])
async def test_a_real_process_on_a_simulated_gpu(on_mig_device: bool, folder: Path) -> None:
    node = Node(folder)
    device = node.uuids[0]
    if on_mig_device:
        now = node.do(turned_on, lambda now: make(now, "3g.40gb", 4), lambda now: fill(now, 4))
        device = now.instances[0].compute_instances[0].uuid
    environment = {**os.environ, WORKLOAD: "memory=1GiB", DEVICES: device}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "print('up', flush=True); import time; time.sleep(1000)"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        stepper = ChildStepper(node.source, folder)
        with pytest.raises(StepFailed, match=f"{node.uuids[1]} of the simulated driver"):
            await stepper.end_holder(node.uuids[1], process.pid, started(process))
        assert await stepper.end_holder(node.uuids[0], process.pid, started(process))
        async with asyncio.timeout(SECONDS_MAX):
            assert await process.wait() == -signal.SIGTERM
    finally:
        await ended(process)
