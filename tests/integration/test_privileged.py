"""The agent's side of the root helper: what it says when the helper is not there, or not sound."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from stoker.agent import privileged
from stoker.agent.privileged import Helper, HelperUnavailable, LogPart, PodResourcesLine
from stoker.agent.verdicts import KernelLine

SECONDS_MAX = 20.0
# How long a helper may take, where the test is about one that takes longer.
HASTE = 0.05


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "helper.sock"


@contextlib.asynccontextmanager
async def one_who_says(
    path: Path, *said: bytes, stays: bool = False
) -> AsyncGenerator[list[bytes]]:
    """Listen in place of the helper; give what was asked."""
    asked: list[bytes] = []
    visits: list[asyncio.Task[None]] = []

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        for part in said:
            writer.write(part)
        with contextlib.suppress(ConnectionError):
            if stays:
                await reader.read()
            writer.close()
            await writer.wait_closed()

    def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(asyncio.create_task(visit(reader, writer)))

    async with await asyncio.start_unix_server(receive, path):
        yield asked
        await asyncio.gather(*visits)


async def holders(helper: Helper) -> object:
    return await helper.holders()


async def job_variables(helper: Helper) -> object:
    return await helper.job_variables(1234)


async def connect_pod_resources(helper: Helper) -> object:
    return await helper.connect_pod_resources()


async def follow(helper: Helper, found: list[LogPart] | None = None) -> object:
    told = [] if found is None else found
    async with contextlib.aclosing(helper.follow_kernel_log("boot", None)) as parts:
        async for part in parts:
            told.append(part)
    return told


ASK = {
    "who has the driver's device files open cannot be seen: ": holders,
    "which job process 1234 is of cannot be read: ": job_variables,
    "the kubelet cannot be reached through the helper: ": connect_pod_resources,
    "the kernel's log cannot be followed through the helper: ": follow,
}
SAID = {
    "no word": (b"", "it has hung up"),
    "half a line": (b'{"ok": tr', "it has hung up in the middle of a line"),
    "no JSON": (b"hello\n", "it said 'hello', which cannot be understood"),
    "no object": (b"[1]\n", "it said '[1]', which cannot be understood"),
    "not UTF-8": (b'{"refused": "\xff"}\n', "which cannot be understood"),
    "neither yes nor no": (b"{}\n", "it neither agrees nor refuses"),
    "no": (b'{"refused": "not today"}\n', "it refuses: not today"),
    "a holder that is none": (
        b'{"ok": true, "holders": [{"pid": "x"}]}\n',
        "which cannot be understood",
    ),
    "variables that are none": (
        b'{"ok": true, "process": {"started_ticks": 1, "variables": {"A": 7}}}\n',
        "which cannot be understood",
    ),
    "a record that is none": (b'{"ok": true, "sequence": 1.5}\n', "cannot be understood"),
}


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("name", SAID)
async def test_what_cannot_be_used_is_said_to_be_so(what: str, name: str, path: Path) -> None:
    said, reason = SAID[name]
    async with one_who_says(path, said):
        with pytest.raises(HelperUnavailable) as caught:
            await ASK[what](Helper(path))
    text = str(caught.value)
    assert text.startswith(what)
    assert reason in text
    assert str(path) in text


@pytest.mark.parametrize("what", ASK)
async def test_one_who_says_nothing_is_waited_for_only_so_long(what: str, path: Path) -> None:
    async with one_who_says(path, stays=True):
        with pytest.raises(HelperUnavailable, match=f"{what}.*: it says nothing"):
            await ASK[what](Helper(path, timeout_seconds=HASTE))


async def test_one_who_follows_and_falls_silent_is_gone(path: Path) -> None:
    async with one_who_says(path, b'{"ok": true}\n', stays=True):
        with pytest.raises(HelperUnavailable, match="it says nothing"):
            await follow(Helper(path, silence_seconds=HASTE))


@pytest.mark.parametrize("what", ASK)
async def test_a_helper_that_is_not_there_is_named(what: str, path: Path) -> None:
    with pytest.raises(
        HelperUnavailable, match=f"{what}.*nothing is there; is stoker-agent-helper"
    ):
        await ASK[what](Helper(path))


async def test_a_helper_that_has_ended_is_named(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fsencode(path))
    with pytest.raises(HelperUnavailable, match="nobody listens there any more"):
        await Helper(path).holders()


async def test_a_helper_that_lets_no_more_wait_is_named(path: Path) -> None:
    with contextlib.ExitStack() as opened:
        busy = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        busy.bind(os.fsencode(path))
        busy.listen(0)
        first = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        first.connect(os.fsencode(path))
        with pytest.raises(HelperUnavailable, match="more wait for it than it lets wait"):
            await Helper(path).holders()


async def test_a_line_without_end_is_not_taken_in(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privileged, "ANSWER_BYTES_MAX", 1 << 17)
    async with one_who_says(path, b"x" * (1 << 18), stays=True):
        with pytest.raises(HelperUnavailable, match=r"a line of more than \d+ bytes"):
            await Helper(path).holders()


async def test_lines_that_come_in_pieces_are_whole_again(path: Path) -> None:
    first = b'{"ok": true}\n{"lost": true}\n{"sequence": 1, "at": 2.5, "text": "NVRM: \\u00fc'
    async with one_who_says(path, first, b'"}\n{}\n{"sequence": 3, "at"', stays=True):
        found: list[LogPart] = []
        with pytest.raises(HelperUnavailable):
            await follow(Helper(path, silence_seconds=HASTE), found)
    assert found[0] == LogPart()
    assert [line for part in found for line in part.lines] == [KernelLine(1, 2.5, "NVRM: ü")]
    assert any(part.has_lost for part in found)


async def test_a_connection_that_is_said_to_be_handed_over_and_is_not(path: Path) -> None:
    async with one_who_says(path, b'{"ok": true, "is_there": true}\n'):
        with pytest.raises(HelperUnavailable, match="it hands nothing over"):
            await Helper(path).connect_pod_resources()


@pytest.mark.parametrize(
    "said",
    [
        b'{"ok": true, "is_there": false}\n',
        b'{"ok": true, "is_there": true, "why": "no"}\n',
        b'{"refused": "no"}\n',
        b"hello\n",
        b'{"ok": ',
    ],
)
async def test_what_is_handed_over_with_another_answer_is_closed(path: Path, said: bytes) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        contextlib.ExitStack() as opened,
    ):
        listener.bind(os.fsencode(path))
        listener.listen()
        ours, theirs = socket.socketpair()
        opened.enter_context(ours)

        def answer() -> None:
            with listener.accept()[0] as caller, theirs:
                caller.recv(100)
                socket.send_fds(caller, [said], [theirs.fileno()])

        answering = asyncio.create_task(asyncio.to_thread(answer))
        with contextlib.suppress(HelperUnavailable):
            assert (await Helper(path).connect_pod_resources()).line is None
        await answering
        ours.settimeout(SECONDS_MAX)
        assert ours.recv(1) == b"", "somebody still holds the other end"


async def test_what_is_asked_is_one_line(path: Path) -> None:
    async with one_who_says(path, b'{"ok": true}\n') as asked:
        helper = Helper(path)
        assert await helper.holders() == ()
        assert await helper.job_variables(7) is None
        assert await helper.connect_pod_resources() == PodResourcesLine(is_there=False)
    assert asked == [
        b'{"verb":"list_holders"}\n',
        b'{"verb":"job_variables","pid":7}\n',
        b'{"verb":"connect_pod_resources"}\n',
    ]
