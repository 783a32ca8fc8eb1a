"""The root helper as a real process: its verbs, and how little it is."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import psutil
import pytest
from tests.support.root_helper import (
    BOOT_ID,
    SECONDS_MAX,
    LogPipe,
    ProcTree,
    RunningHelper,
    open_folder,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.helper import verbs
from stoker.agent.helper.files import DEVICES_MAX, Process, read_process
from stoker.agent.helper.memory import Memory
from stoker.agent.helper.verbs import CGROUP_BYTES_MAX
from stoker.agent.privileged import Helper, HelperUnavailable, LogPart, RawHolder
from stoker.agent.verdicts import KernelLogPosition

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."
RSS_BYTES_MAX = 24 << 20
# What a Python that does nothing has loaded is not counted.
MODULES_MAX = 60
EXPENSIVE = {"asyncio", "logging", "typing", "threading", "subprocess", "ssl", "argparse"}


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def tree(folder: Path) -> ProcTree:
    return ProcTree(folder / "proc")


@pytest.fixture
def log(folder: Path) -> Generator[LogPipe]:
    pipe = LogPipe(folder / "kmsg")
    yield pipe
    pipe.close()


@pytest.fixture
def helper(folder: Path, tree: ProcTree, log: LogPipe) -> Generator[Helper]:
    with running(folder, "--proc", str(tree.root), "--kmsg", str(log.path)) as found:
        yield found.helper


# --- who holds the devices


async def test_holders_are_who_has_a_device_open_or_mapped(helper: Helper, tree: ProcTree) -> None:
    tree.add(
        100,
        uid=1001,
        ticks=777,
        open_files=["/dev/null", "/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidia1", "socket:[1]"],
        cgroup="0::/system.slice/jupyter.service\n",
    )
    tree.add(
        20, maps=b"7f00-7f01 rw-s 00000000 00:05 6 /dev/nvidia-uvm\n", cmdline=b"\0", name="a)b"
    )
    tree.add(30, open_files=["/dev/null"])
    tree.add(2, open_files=["/dev/nvidia0"], is_kernel_thread=True)
    assert await helper.holders() == (
        RawHolder(20, 1000, "[a)b]", 500, "0::/user.slice\n", ("/dev/nvidia-uvm",)),
        RawHolder(
            100,
            1001,
            "python3 train.py",
            777,
            "0::/system.slice/jupyter.service\n",
            ("/dev/nvidia1", "/dev/nvidiactl"),
        ),
    )
    assert helper.holders_shortfall == ""


async def test_names_that_a_user_makes_up_do_no_harm(helper: Helper, tree: ProcTree) -> None:
    made_up = [f"/dev/nvidia-{chr(0x1F600 + n) * 60}" for n in range(75)]
    maps = "".join(f"7f00-7f01 rw-s 00000000 00:05 6 {name * 4}\n" for name in made_up)
    tree.add(10, open_files=[*made_up, "/dev/nvidia0"], maps=maps.encode())
    tree.add(20, open_files=["/dev/nvidia0"], cgroup="0::/" + "\udcff" * 9000)
    first, second = await helper.holders()
    assert first.devices[0] == "/dev/nvidia0"
    assert len(first.devices) == DEVICES_MAX
    assert len(second.cgroup) <= CGROUP_BYTES_MAX
    assert helper.holders_shortfall == ""


@pytest.mark.parametrize("file", ["cmdline", "maps"])
async def test_a_process_whose_memory_hangs_hides_nobody(
    file: str, helper: Helper, tree: ProcTree
) -> None:
    tree.add(10, open_files=["/dev/nvidia0"])
    if file == "cmdline":
        hung = tree.add(20, open_files=["/dev/nvidia1"], name="stuck", cmdline=None)
    else:
        hung = tree.add(20, open_files=["/dev/nvidia1"], name="stuck", maps=None)
    tree.add(30, open_files=["/dev/nvidia2"])
    found = {holder.pid: holder.command for holder in await helper.holders()}
    assert found == {10: "python3 train.py", 20: "[stuck]", 30: "python3 train.py"}
    # What it has mapped may be more than what it has open.
    assert ("could not all be read: 1" in helper.holders_shortfall) == (file == "maps")
    # It is not tried again for a while, so that nothing piles up.
    (hung / file).unlink()
    (hung / file).write_bytes(b"")
    (hung / "cmdline").write_bytes(b"mended\0")
    again = {holder.pid: holder.command for holder in await helper.holders()}
    assert again == found


class NoMemory(Memory):
    """In no process is anything to be found; `meanwhile` happens while it is looked for."""

    def __init__(self, found: list[str], meanwhile: Callable[[], object]) -> None:
        self._found = found
        self._meanwhile = meanwhile

    def read(self, name: str, process: Process) -> list[str]:
        self._meanwhile()
        return self._found


class Work(verbs.Work):
    """Works with a tree, in the process of the test."""

    def __init__(
        self, tree: ProcTree, found: list[str], meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        self.proc = str(tree.root)
        self._memory = NoMemory(found, meanwhile)

    def memory(self) -> Memory:
        return self._memory


def test_files_that_may_not_be_read_are_told_of(
    tree: ProcTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(10)
    tree.add(20)

    def open_devices(proc: str, pid: int) -> tuple[set[str], bool]:
        if pid == 10:
            raise PermissionError(13, "Permission denied")
        return {"/dev/nvidia0"}, True

    monkeypatch.setattr(verbs, "open_devices", open_devices)
    (told,) = verbs.list_holders(Work(tree, []), {})
    assert told["shortfall"] == "processes whose open files may not be read (CAP_SYS_PTRACE): 1"
    assert len(cast(list[object], told["holders"])) == 1


@pytest.mark.parametrize(("bound", "value"), [("HOLDERS_MAX", 2), ("HOLDERS_BYTES_MAX", 200)])
def test_holders_beyond_a_bound_are_counted(
    bound: str, value: int, tree: ProcTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, bound, value)
    for pid in range(1, 6):
        tree.add(pid, open_files=["/dev/nvidia0"])
    (told,) = verbs.list_holders(Work(tree, []), {})
    assert len(cast(list[object], told["holders"])) == 2
    assert told["shortfall"] == "processes not looked at, for there are too many: 3"


# --- the job of a process


async def test_variables_of_the_job_of_a_real_process_and_no_others(folder: Path) -> None:
    environment = {
        "STOKER_ALLOCATION_ID": "a-1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_GPUS": "0,1",
        "SLURM_JWT": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    job = await asyncio.create_subprocess_exec("sleep", "1000", env=environment)
    try:
        with running(folder) as found:
            told = await found.helper.job_variables(job.pid)
            assert told is not None
            assert told.variables == {
                "STOKER_ALLOCATION_ID": "a-1",
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_GPUS": "0,1",
            }
            assert told.started_ticks == read_process("/proc", job.pid).started_ticks
            job.kill()
            await job.wait()
            assert await found.helper.job_variables(job.pid) is None
    finally:
        if job.returncode is None:
            job.kill()
        await job.wait()


async def test_a_process_that_names_no_job_has_none_of_these_variables(
    helper: Helper, tree: ProcTree
) -> None:
    tree.add(10, environ=b"PATH=/bin\0")
    told = await helper.job_variables(10)
    assert told is not None
    assert (told.started_ticks, told.variables) == (500, {})


async def test_an_environment_that_hangs_is_said_to_hang(helper: Helper, tree: ProcTree) -> None:
    tree.add(10, environ=None)
    tree.add(11, environ=b"SLURM_JOB_ID=1\0")
    for reason in ("hangs", "hung before"):
        with pytest.raises(HelperUnavailable, match=f"which job process 10 is of.*{reason}"):
            await helper.job_variables(10)
    told = await helper.job_variables(11)
    assert told is not None
    assert told.variables == {"SLURM_JOB_ID": "1"}


def test_a_pid_that_is_another_processs_meanwhile_tells_nothing(tree: ProcTree) -> None:
    tree.add(10, open_files=["/dev/nvidia0"])
    starts = itertools.count(900)

    def pass_on() -> None:
        tree.set_start(10, next(starts))

    slurm = Work(tree, ["SLURM_JOB_ID=1"], pass_on)
    assert list(verbs.job_variables(slurm, {"pid": 10})) == [{"ok": True, "process": None}]
    (told,) = verbs.list_holders(Work(tree, [], pass_on), {})
    assert told["holders"] == []


# --- the kernel's log


async def next_lines(parts: AsyncGenerator[LogPart], count: int) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    async with asyncio.timeout(SECONDS_MAX):
        while len(found) < count:
            part = await anext(parts)
            found += [(line.sequence, line.text) for line in part.lines]
    return found


async def test_the_log_is_told_from_its_beginning_and_goes_on(helper: Helper, log: LogPipe) -> None:
    log.write(1, "Linux version 6.1")
    log.write(2, XID)
    log.write(3, "nvidia 0000:3b:00.0: enabling device\n SUBSYSTEM=pci\n DEVICE=+pci:0000:3b:00.0")
    async with aclosing(helper.follow_kernel_log(BOOT_ID, None)) as parts:
        assert await anext(parts) == LogPart()
        assert await next_lines(parts, 2) == [(2, XID), (3, "nvidia 0000:3b:00.0: enabling device")]
        log.write(4, "eth0: link is up")
        log.write(5, "NVRM: again")
        before = time.time()
        part = await anext(parts)
    assert [line.sequence for line in part.lines] == [5]
    assert before - SECONDS_MAX < part.lines[0].at <= time.time()


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (KernelLogPosition(BOOT_ID, 2), [3]),
        (KernelLogPosition(BOOT_ID, 0), [1, 2, 3]),
        (KernelLogPosition("another boot", 2), [1, 2, 3]),
        (None, [1, 2, 3]),
    ],
)
async def test_the_log_is_told_from_after_what_is_known_of_this_boot(
    position: KernelLogPosition | None, expected: list[int], helper: Helper, log: LogPipe
) -> None:
    for sequence in (1, 2, 3):
        log.write(sequence, "NVRM: line")
    async with aclosing(helper.follow_kernel_log(BOOT_ID, position)) as parts:
        found = await next_lines(parts, len(expected))
    assert [sequence for sequence, _ in found] == expected


async def test_a_position_counts_only_for_the_boot_that_the_helper_sees(
    helper: Helper, log: LogPipe
) -> None:
    log.write(1, "NVRM: line")
    of_before = KernelLogPosition("the agent's, before", 5)
    async with aclosing(helper.follow_kernel_log("the agent's, before", of_before)) as parts:
        assert await next_lines(parts, 1) == [(1, "NVRM: line")]


async def test_a_log_that_cannot_be_opened_is_named(folder: Path, tree: ProcTree) -> None:
    nowhere = str(folder / "nowhere")
    with (
        running(folder, "--proc", str(tree.root), "--kmsg", nowhere) as found,
        pytest.raises(HelperUnavailable, match=r"it refuses: .*nowhere: No such file"),
    ):
        await anext(found.helper.follow_kernel_log(BOOT_ID, None))


async def test_a_follower_hears_that_the_helper_lives(
    folder: Path, tree: ProcTree, log: LogPipe
) -> None:
    tuning = {"verbs.HEARTBEAT_SECONDS": 0.02}
    options = ("--proc", str(tree.root), "--kmsg", str(log.path))
    with running(folder, *options, tuning=tuning) as found:
        reader, writer = await asyncio.open_unix_connection(found.path)
        writer.write(b'{"verb": "follow_kernel_log", "boot_id": "", "after": null}\n')
        async with asyncio.timeout(SECONDS_MAX):
            assert [await reader.readline() for _ in range(3)] == [
                b'{"ok": true}\n',
                b"{}\n",
                b"{}\n",
            ]
        writer.close()
        await writer.wait_closed()
        await until_true("the end of the follower", lambda: not found.children)


async def test_followers_end_with_the_helper(helper: Helper, folder: Path) -> None:
    async with aclosing(helper.follow_kernel_log(BOOT_ID, None)) as parts:
        await anext(parts)
        (follower,) = psutil.Process(_pid_of(folder)).children()
        os.kill(_pid_of(folder), signal.SIGTERM)
        with pytest.raises(HelperUnavailable, match="it has hung up"):
            await next_lines(parts, 1)
    await until_true("the end of the follower", lambda: not follower.is_running())


def _pid_of(folder: Path) -> int:
    for process in psutil.process_iter(["cmdline"]):
        if str(folder / "helper.sock") in (process.info["cmdline"] or ()):
            return int(process.pid)
    raise AssertionError("there is no helper")


# --- how little it is


def test_it_loads_next_to_nothing() -> None:
    lines = (
        "import sys; before = set(sys.modules)",
        "import stoker.agent.helper.__main__",
        "print(*(set(sys.modules) - before))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.partition(".")[0] == "stoker"}
    foreign = {name.partition(".")[0].lstrip("_") for name in loaded - ours}
    assert {name.rpartition("helper")[0] for name in ours} <= {"", "stoker.agent."}
    assert foreign <= set(sys.stdlib_module_names) | {"sre"}, "it wants something installed"
    assert foreign & EXPENSIVE == set()
    assert len(loaded) <= MODULES_MAX, sorted(loaded)


def test_it_is_small(folder: Path) -> None:
    with running(folder) as found:
        found.ask(b'{"verb": "list_holders"}\n')
        rss = psutil.Process(found.process.pid).memory_info().rss
    assert rss < RSS_BYTES_MAX, f"{rss} bytes"


async def test_nothing_is_left_of_callers(folder: Path, tree: ProcTree) -> None:
    tree.add(10, open_files=["/dev/nvidia0"])
    with running(folder, "--proc", str(tree.root)) as found:
        await asyncio.to_thread(_ask_many, found, 20)
        await until_true("the end of all callers' processes", lambda: not found.children)


def _ask_many(found: RunningHelper, count: int) -> None:
    for _ in range(count):
        (told,) = found.ask(b'{"verb": "list_holders"}\n')
        assert [holder["pid"] for holder in told["holders"]] == [10]
