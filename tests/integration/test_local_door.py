"""The agent's local socket on a real disk: who owns it, what a caller may say, what it cannot."""

import asyncio
import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.waiting import until, until_true

from stoker.agent.local import CALLERS_MAX, SOCKET_MODE, Caller, LocalDoor
from stoker.core import local
from stoker.core.clock import SystemClock
from stoker.core.errors import BadInput, ExitCode, InUse, StoreError
from stoker.core.local import AskRelease, AskStatus, Profiling, Refusal, Request

ANSWER = Profiling(is_paused=True, until=12.5)
# How long a caller may take for its line, where the test is about one that takes longer.
HASTE = 0.05


@dataclass
class Desk:
    """Answers everything alike, and remembers who asked what."""

    asked: list[tuple[Request, Caller]] = field(default_factory=list[tuple[Request, Caller]])
    error: Exception | None = None

    async def answer(self, request: Request, caller: Caller) -> local.Answer:
        self.asked.append((request, caller))
        if self.error is not None:
            raise self.error
        return ANSWER


@contextlib.asynccontextmanager
async def served(path: Path, desk: Desk, line_seconds: float = 5.0) -> AsyncGenerator[None]:
    door = LocalDoor.open(path)
    serving = asyncio.create_task(
        door.serve(desk.answer, clock=SystemClock(), line_seconds=line_seconds)
    )
    try:
        yield
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        door.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def say(path: Path, said: bytes, *, end: bool = False) -> bytes:
    """Say something and return all that comes back until the agent hangs up."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(said)
        if end:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


def mode_of(path: Path) -> int:
    return path.lstat().st_mode


async def ask(path: Path, request: Request) -> Profiling:
    return await asyncio.to_thread(local.ask, [path], request, Profiling)


def refusal(answer: bytes) -> Refusal:
    assert answer.count(b"\n") == 1
    assert answer.endswith(b"\n")
    found = local.decode_answer(answer)
    assert isinstance(found, Refusal)
    return found


# --- who calls, and what is said


async def test_a_request_is_answered_and_the_kernel_says_who_asks(path: Path) -> None:
    desk = Desk()
    async with served(path, desk):
        assert await ask(path, AskRelease(600.0)) == ANSWER
    assert desk.asked == [(AskRelease(600.0), Caller(os.getpid(), os.geteuid()))]


async def test_only_the_owner_and_the_group_may_open_it_whatever_the_umask_is(path: Path) -> None:
    before = os.umask(0)
    try:
        async with served(path, Desk()):
            mode = mode_of(path)
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == SOCKET_MODE == 0o660


@dataclass(frozen=True, slots=True)
class Row:
    """What a caller says, and words of the answer."""

    said: bytes
    named: str


ROWS = {
    "an empty line": Row(b"\n", "cannot be understood"),
    "no JSON": Row(b"status\n", "cannot be understood"),
    "no UTF-8": Row(b'{"verb":"\xff\xfe"}\n', "cannot be understood"),
    "a list": Row(b'["status"]\n', "cannot be understood"),
    "no verb": Row(b"{}\n", "verb"),
    "a verb of a newer stoker": Row(b'{"verb":"lease_memory"}\n', "lease_memory"),
    "a verb that is a number": Row(b'{"verb":7}\n', "cannot be understood"),
    "an unknown field": Row(b'{"verb":"release","until":12}\n', "until"),
    "a time that is a word": Row(b'{"verb":"release","for_seconds":"10m"}\n', "for_seconds"),
    "a time below nothing": Row(b'{"verb":"release","for_seconds":-1}\n', "for_seconds"),
    "no time": Row(b'{"verb":"release","for_seconds":0}\n', "for_seconds"),
    "a time without end": Row(b'{"verb":"release","for_seconds":1e300}\n', "for_seconds"),
    "a time that is no number": Row(b'{"verb":"release","for_seconds":NaN}\n', "understood"),
    "brackets without end": Row(b'{"a":' + b"[" * 4000 + b"\n", "cannot be understood"),
    "two requests": Row(b'{"verb":"status"}\n{"verb":"resume"}\n', "one line is one connection"),
    "too much": Row(b" " * 100_000 + b"\n", "longer than 65536 bytes"),
    "too much without an end": Row(b'"' + b"a" * 100_000, "longer than 65536 bytes"),
}


@pytest.mark.parametrize("name", ROWS)
async def test_what_cannot_be_understood_is_answered_and_not_done(name: str, path: Path) -> None:
    desk = Desk()
    async with served(path, desk):
        found = refusal(await say(path, ROWS[name].said))
        assert ROWS[name].named in found.reason
        assert found.exit_code == ExitCode.USAGE
        assert len(found.reason) < 500
        assert desk.asked == []
        assert await ask(path, AskStatus()) == ANSWER, "the next caller is answered"


@pytest.mark.parametrize("said", [b"", b'{"verb":"rel', b'{"verb":"release"}'])
async def test_half_a_line_is_answered_when_it_ends(said: bytes, path: Path) -> None:
    desk = Desk()
    async with served(path, desk):
        found = refusal(await say(path, said, end=True))
    assert f"ends after {len(said)} bytes" in found.reason
    assert desk.asked == []


@pytest.mark.parametrize("said", [b"", b'{"verb":"rel'])
async def test_who_says_nothing_or_half_a_line_is_hung_up_on(said: bytes, path: Path) -> None:
    desk = Desk()
    async with served(path, desk, line_seconds=HASTE):
        found = refusal(await say(path, said))
    assert "no whole line" in found.reason
    assert desk.asked == []


async def test_who_does_not_take_the_answer_holds_up_nobody(path: Path) -> None:
    desk = Desk()
    async with served(path, desk, line_seconds=HASTE):
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(path))
            deaf.sendall(local.encode(AskStatus()))
            assert await ask(path, AskStatus()) == ANSWER


async def test_who_is_gone_before_the_answer_disturbs_nobody(path: Path) -> None:
    desk = Desk()
    async with served(path, desk):
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(path))
            hasty.sendall(local.encode(AskRelease()))
            # Closed with a reset, where the kernel knows such a thing.
            linger = struct.pack("ii", 1, 0)
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await until_true("the request", lambda: len(desk.asked) == 1)
        assert await ask(path, AskStatus()) == ANSWER


async def test_one_caller_too_many_is_told_to_come_back(path: Path) -> None:
    desk = Desk()
    async with served(path, desk):
        silent = [socket.socket(socket.AF_UNIX) for _ in range(CALLERS_MAX)]
        for each in silent:
            each.connect(str(path))
        with pytest.raises(local.Refused, match="ask again"):
            await ask(path, AskStatus())
        for each in silent:
            each.close()

        async def is_answered() -> bool:
            with contextlib.suppress(local.Refused, local.NoAgent):
                return await ask(path, AskStatus()) == ANSWER
            return False

        await until("an answer", is_answered)


async def test_a_request_that_fails_is_answered_and_the_agent_goes_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(error=KeyError("surprise"))
    async with served(path, desk):
        with pytest.raises(local.Refused, match="KeyError: 'surprise'") as raised:
            await ask(path, AskStatus())
        assert raised.value.exit_code is ExitCode.FAILED
        desk.error = None
        assert await ask(path, AskStatus()) == ANSWER
    assert "surprise" in caplog.text


async def test_an_error_keeps_its_exit_code(path: Path) -> None:
    async with served(path, Desk(error=StoreError("no room"))):
        with pytest.raises(local.Refused, match="no room") as raised:
            await ask(path, AskStatus())
    assert raised.value.exit_code is ExitCode.STORE


# --- whose the socket is


async def test_nothing_is_left_behind_that_looks_like_a_living_agent(path: Path) -> None:
    async with served(path, Desk()):
        assert local.is_answered(path)
    assert not local.is_answered(path)
    with pytest.raises(FileNotFoundError):
        mode_of(path)


async def test_the_socket_of_a_dead_agent_is_replaced(path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from stoker.agent.local import LocalDoor; "
        "LocalDoor.open(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, str(path)], check=False)
    assert stat.S_ISSOCK(mode_of(path))
    async with served(path, Desk()):
        assert await ask(path, AskStatus()) == ANSWER


async def test_the_socket_of_a_living_agent_is_refused(path: Path) -> None:
    async with served(path, Desk()):
        with pytest.raises(InUse, match=f"another agent answers at {path}"):
            LocalDoor.open(path)
        assert await ask(path, AskStatus()) == ANSWER


def test_the_socket_of_another_program_is_refused(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(InUse, match=f"another program answers at {path}"):
            LocalDoor.open(path)
        assert path.is_socket()


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_file, a_folder, a_link_to_nowhere])
def test_what_is_no_socket_is_left_alone(make: Callable[[Path], None], path: Path) -> None:
    make(path)
    with pytest.raises(BadInput, match=f"{path} is there, and it is no socket"):
        LocalDoor.open(path)
    assert os.path.lexists(path)


def test_a_path_that_is_too_long_is_refused_with_its_length(tmp_path: Path) -> None:
    longest = tmp_path / ("s" * (107 - len(str(tmp_path)) - 1))
    LocalDoor.open(longest).close()
    with pytest.raises(BadInput, match="has 108 bytes, the kernel takes at most 107"):
        LocalDoor.open(Path(f"{longest}s"))
    with pytest.raises(BadInput, match="has 108 bytes"):
        local.ask([Path(f"{longest}s")], AskStatus(), Profiling)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "agent.sock"
    with pytest.raises(StoreError, match=f"{path}: No such file"):
        LocalDoor.open(path)


# --- the caller's side


def test_no_agent_is_told_with_every_socket_that_was_tried(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    with pytest.raises(local.NoAgent) as raised:
        local.ask([tmp_path / "gone", stale], AskStatus(), Profiling)
    assert f"{tmp_path / 'gone'}: not there" in str(raised.value)
    assert f"{stale}: nobody listens" in str(raised.value)
    assert raised.value.exit_code is ExitCode.UNREACHABLE


async def test_a_socket_without_an_agent_is_passed_over(tmp_path: Path, path: Path) -> None:
    async with served(path, Desk()):
        paths = [tmp_path / "gone", path]
        assert await asyncio.to_thread(local.ask, paths, AskStatus(), Profiling) == ANSWER


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"", "it hung up"),
        (b"what?\n", "cannot be understood"),
        (b'{"answer":"resu', "cannot be understood"),
        (b'{"answer":"resumed","was_released":true,"unsaved":""}\n', "something else"),
    ],
)
async def test_an_answer_that_is_none_is_said_to_be_none(
    answer: bytes, found: str, path: Path
) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(reply, path):
        with pytest.raises(local.NoAgent, match=found):
            await ask(path, AskStatus())
