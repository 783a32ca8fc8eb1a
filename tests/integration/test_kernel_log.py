"""The agent follows the kernel's log: through the helper, or directly, or it says why not."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.root_helper import BOOT_ID, LogPipe, ProcTree, open_folder, running
from tests.support.waiting import until_true

from stoker.agent.events import Event, KernelLogChanged, KernelLogRead
from stoker.agent.kernel_log import FILE_SECONDS, RETRY_SECONDS, KernelLogFollower
from stoker.agent.privileged import Helper
from stoker.agent.verdicts import KernelLogPosition, KernelLogStatus
from stoker.testing.clock import VirtualClock

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."


@dataclass
class State:
    """Stands in for the agent's state: remembers what happened, and the position."""

    boot_id: str = BOOT_ID
    position: KernelLogPosition | None = None
    clock: VirtualClock = field(default_factory=VirtualClock)
    statuses: list[KernelLogStatus] = field(default_factory=list[KernelLogStatus])
    lines: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    times: list[float] = field(default_factory=list[float])

    def happen(self, event: Event) -> None:
        assert isinstance(event, KernelLogChanged | KernelLogRead)
        assert event.at == self.clock.now()
        if isinstance(event, KernelLogChanged):
            self.statuses.append(event.status)
            return
        assert event.lines
        self.lines += [(line.sequence, line.text) for line in event.lines]
        self.times += [line.at for line in event.lines]
        self.position = KernelLogPosition(self.boot_id, event.lines[-1].sequence)

    async def has_seen(self, *sequences: int) -> None:
        await until_true(
            f"the records {sequences}", lambda: [number for number, _ in self.lines] == [*sequences]
        )

    async def is_followed(self, source: str) -> None:
        wanted = KernelLogStatus(is_followed=True, source=source, reason="")
        await until_true(f"following by {source}", lambda: self.statuses[-1:] == [wanted])

    async def is_not_followed(self, count: int = 1) -> str:
        def look() -> bool:
            return sum(not status.is_followed for status in self.statuses) == count

        await until_true("why it is not followed", look)
        return self.statuses[-1].reason


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def log(folder: Path) -> Generator[LogPipe]:
    pipe = LogPipe(folder / "kmsg")
    yield pipe
    pipe.close()


@pytest.fixture
def options(folder: Path) -> tuple[str, ...]:
    """The helper's own log is another than that which the agent may read itself."""
    return ("--proc", str(ProcTree(folder / "proc").root), "--kmsg", str(folder / "kmsg"))


@contextlib.asynccontextmanager
async def following(
    state: State, folder: Path, *, kmsg: Path | None = None, script: Path | None = None
) -> AsyncGenerator[None]:
    follower = KernelLogFollower(
        Helper(folder / "helper.sock"),
        state.boot_id,
        position=lambda: state.position,
        happen=state.happen,
        clock=state.clock,
        kmsg=kmsg or folder / "nowhere",
        script=script,
    )
    task = asyncio.create_task(follower.run())
    try:
        yield
        assert not task.done(), "it goes on whatever happens"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_through_the_helper(folder: Path, log: LogPipe, options: tuple[str, ...]) -> None:
    state = State(position=KernelLogPosition(BOOT_ID, 1))
    log.write(1, "NVRM: known")
    log.write(2, XID)
    with running(folder, *options):
        async with following(state, folder):
            await state.has_seen(2)
            log.write(3, "eth0: link is up")
            log.write(4, "NVRM: more")
            await state.has_seen(2, 4)
    assert state.lines[0] == (2, XID)
    assert state.statuses == [KernelLogStatus(is_followed=True, source="helper", reason="")]


async def test_directly_where_that_is_allowed(folder: Path, log: LogPipe) -> None:
    state = State(position=KernelLogPosition(BOOT_ID, 1))
    log.write(1, "NVRM: known")
    log.write(2, XID + "\n SUBSYSTEM=pci")
    async with following(state, folder, kmsg=log.path):
        await state.has_seen(2)
        before = time.time()
        log.write(3, "eth0: link is up")
        log.write(4, "NVRM: more")
        await state.has_seen(2, 4)
    assert before - 1.0 <= state.times[-1] <= time.time()
    assert state.statuses == [KernelLogStatus(is_followed=True, source="direct", reason="")]


async def test_a_position_of_another_boot_is_none(folder: Path, log: LogPipe) -> None:
    state = State(position=KernelLogPosition("before", 100))
    log.write(1, XID)
    async with following(state, folder, kmsg=log.path):
        await state.has_seen(1)


async def test_a_flood_is_told_whole_and_others_have_their_turn(folder: Path, log: LogPipe) -> None:
    state = State()
    async with following(state, folder, kmsg=log.path):
        await state.is_followed("direct")
        for sequence in range(1000):
            log.write(sequence, "NVRM: flood")
        await state.has_seen(*range(1000))


async def test_what_stands_in_the_way_is_told_once_and_tried_again(
    folder: Path, log: LogPipe, options: tuple[str, ...]
) -> None:
    state = State()
    async with following(state, folder):
        reason = await state.is_not_followed()
        assert "helper.sock: nothing is there" in reason
        assert "nowhere: No such file or directory" in reason
        await state.clock.advance(RETRY_SECONDS - 1.0)
        log.write(1, XID)
        with running(folder, *options):
            assert len(state.statuses) == 1
            await state.clock.advance(1.0)
            await state.has_seen(1)
            await state.is_followed("helper")
        assert "it has hung up" in await state.is_not_followed(count=2)
        for _ in range(3):
            await state.clock.advance(RETRY_SECONDS)
    # A helper that is gone for good is gone for another reason than one that has just hung up.
    assert [status.is_followed for status in state.statuses] == [False, True, False, False]


async def test_when_the_helper_goes_the_log_is_read_directly_from_where_it_was(
    folder: Path, log: LogPipe, options: tuple[str, ...]
) -> None:
    state = State()
    log.write(1, XID)
    async with following(state, folder, kmsg=log.path):
        await state.is_followed("direct")
    assert state.position == KernelLogPosition(BOOT_ID, 1)
    state.statuses.clear()
    with running(folder, *options) as found:
        async with following(state, folder, kmsg=log.path):
            await state.is_followed("helper")
            log.write(1, XID)
            log.write(2, "NVRM: more")
            await state.has_seen(1, 2)
            found.process.terminate()
            await state.is_followed("direct")
            log.write(2, "NVRM: more")
            log.write(3, "NVRM: still more")
            await state.has_seen(1, 2, 3)


async def test_a_log_that_cannot_be_waited_for_is_named(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    state = State()
    async with following(state, folder, kmsg=folder / "file"):
        assert "file: " in await state.is_not_followed()


# --- a file in its place


async def test_a_file_is_followed_as_it_grows(folder: Path) -> None:
    script = folder / "kernel.log"
    script.write_text(f"4,1,0,-;{XID}\n4,2,0,-;eth0: up\n SUBSYSTEM=net\n4,3,", encoding="ascii")
    state = State()
    async with following(state, folder, script=script):
        await state.has_seen(1)
        with script.open("a", encoding="ascii") as file:
            file.write("0,-;NVRM: more\n")
        await state.clock.advance(FILE_SECONDS)
        await state.has_seen(1, 3)
        script.write_text("4,4,0,-;NVRM: anew\n", encoding="ascii")
        await state.clock.advance(FILE_SECONDS)
        await state.has_seen(1, 3, 4)
    # Without a time in it, a record is of when it is seen.
    assert state.times[0] == VirtualClock().now()
    assert state.statuses == [KernelLogStatus(is_followed=True, source="file", reason="")]


async def test_a_file_is_followed_from_after_what_is_known(folder: Path) -> None:
    script = folder / "kernel.log"
    script.write_text("4,1,0,-;NVRM: a\n4,2,5000000,-;NVRM: b\n", encoding="ascii")
    state = State(position=KernelLogPosition(BOOT_ID, 1))
    async with following(state, folder, script=script):
        await state.has_seen(2)
    assert state.times[0] == pytest.approx(state.clock.now() - time.monotonic() + 5.0, abs=60.0)


async def test_a_file_that_is_not_there_yet_is_named_and_looked_for(folder: Path) -> None:
    script = folder / "kernel.log"
    state = State()
    async with following(state, folder, script=script):
        assert await state.is_not_followed() == f"{script}: No such file or directory"
        script.write_text("4,1,0,-;NVRM: a\n", encoding="ascii")
        await state.clock.advance(RETRY_SECONDS)
        await state.has_seen(1)
