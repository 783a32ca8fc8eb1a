"""Asks the root helper for what an agent without root may not read or do; every wait is bounded.

The helper answers one line with a line of JSON, or, where it follows something, with line after
line. Nothing is kept open between two questions, so a helper that is started anew is not noticed.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.agent.verdicts import KernelLine, KernelLogPosition
from stoker.core.errors import StokerError, shown

# One that follows the kernel's log says something every 10 s; one that misses two is gone.
SILENCE_SECONDS_MAX = 25.0
# More than a sound helper says at once.
ANSWER_BYTES_MAX = 1 << 25
_PART_BYTES = 1 << 16


class HelperUnavailable(StokerError):
    """What the helper would tell cannot be seen; the text says what, and why."""


class HelperInterrupted(HelperUnavailable):
    """The helper has heard what was asked, and did not answer: it may have done it, or not."""


@dataclass(frozen=True, slots=True)
class RawHolder:
    """A process that has device files of the driver open or mapped, as /proc tells it."""

    pid: int
    uid: int  # the real one
    command: str  # as it was called, cut to 200 characters; "[name]" where that cannot be read
    started_ticks: int  # since boot; with the PID it names the process for good
    cgroup: str  # the text of /proc/PID/cgroup, cut to 4096 characters
    devices: tuple[str, ...]  # "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap21"


@dataclass(frozen=True, slots=True)
class JobVariables:
    """What the environment of a process says whose it is; its user can put there anything."""

    started_ticks: int  # of the process that was read: the PID may be another's by now
    variables: Mapping[str, str]  # of JOB_VARIABLES; empty: it names no job and no allocation


@dataclass(frozen=True, slots=True)
class PodResourcesLine:
    """A connection to the kubelet's pod-resources API, or why there is none."""

    is_there: bool  # whether the kubelet has such a socket
    line: socket.socket | None = None  # connected, does not block; whoever gets it closes it
    why: str = ""  # there is a socket, and nobody answers; empty: somebody does


@dataclass(frozen=True, slots=True)
class LogPart:
    """Records of the kernel's log that came together."""

    lines: tuple[KernelLine, ...] = ()
    has_lost: bool = False  # some before these were overwritten before anybody read them


class Helper:
    """The helper that listens at a path."""

    def __init__(
        self,
        path: Path,
        *,
        timeout_seconds: float = 5.0,
        silence_seconds: float = SILENCE_SECONDS_MAX,
    ) -> None:
        """Take where it listens, and how long an answer may take altogether.

        `silence_seconds`: after which one that follows the kernel's log counts as gone.
        """
        self.path = path
        # Why some holders may be lacking in the answer given last; empty: none is.
        self.holders_shortfall = ""
        self._timeout_seconds = timeout_seconds
        self._silence_seconds = silence_seconds

    async def holders(self) -> tuple[RawHolder, ...]:
        """Return every process that has /dev/nvidia* open or mapped, by PID.

        Raises HelperUnavailable. Afterwards `holders_shortfall` says whether some may be lacking.
        """
        what = "who has the driver's device files open cannot be seen"
        told = await self._ask(what, {"verb": "list_holders"})
        self.holders_shortfall = told.shortfall
        return told.holders

    async def job_variables(self, pid: int) -> JobVariables | None:
        """Return which job and allocation a process names, or None when there is no such process.

        Raises HelperUnavailable, also when the environment of that process cannot be read.
        """
        what = f"which job process {pid} is of cannot be read"
        return (await self._ask(what, {"verb": "job_variables", "pid": pid})).process

    async def connect_pod_resources(self) -> PodResourcesLine:
        """Return a connection to the kubelet; raises HelperUnavailable."""
        what = "the kubelet cannot be reached through the helper"
        with (
            self._explained(what),
            self._connected() as line,
            contextlib.ExitStack() as received,
        ):
            async with asyncio.timeout(self._timeout_seconds):
                await _say(line, {"verb": "connect_pod_resources"})
                said, descriptors = await _hear_with_descriptors(line, received)
            told = _parsed(said)
            _expect_agreement(told)
            if told.why or not told.is_there:
                return PodResourcesLine(told.is_there, why=told.why)
            if not descriptors:
                raise _Unfit("it hands nothing over")
            connected = socket.fromfd(descriptors[0], socket.AF_UNIX, socket.SOCK_STREAM)
            connected.setblocking(False)
            return PodResourcesLine(is_there=True, line=connected)

    async def ask(self, what: str, request: Mapping[str, object], seconds: float) -> bytes:
        """Return the line with which the helper answers, within so many seconds.

        `what`: how the error begins. Raises HelperUnavailable when it was not asked, or refuses,
        and HelperInterrupted when it was asked and did not answer.
        """
        with self._explained(what), self._connected() as line:
            try:
                async with asyncio.timeout(seconds):
                    await _say(line, request)
                    (said, *_), _ = await _hear(line, b"")
                told = _parsed(said)
            except TimeoutError as error:
                found = f"it has not answered for {seconds:g} s"
                raise HelperInterrupted(f"{what}: helper at {self.path}: {found}") from error
            except (OSError, _Unfit) as error:
                raise HelperInterrupted(
                    f"{what}: helper at {self.path}: {_reason(error)}"
                ) from error
            if told.refused:
                raise _Unfit(f"it refuses: {told.refused}")
            return said

    async def follow_kernel_log(
        self, boot_id: str, after: KernelLogPosition | None
    ) -> AsyncGenerator[LogPart]:
        """Yield what the kernel's log tells about GPUs, from after that position on, for ever.

        The first part is empty: the helper has agreed. A position of another boot counts for
        nothing. Raises HelperUnavailable when the helper goes away or falls silent.
        """
        sequence = after.sequence if after is not None and after.boot_id == boot_id else None
        request = {"verb": "follow_kernel_log", "boot_id": boot_id, "after": sequence}
        what = "the kernel's log cannot be followed through the helper"
        with self._explained(what), self._connected() as line:
            async with asyncio.timeout(self._timeout_seconds):
                await _say(line, request)
                said, rest = await _hear(line, b"")
            _expect_agreement(_parsed(said.pop(0)))
            yield LogPart()
            while True:
                if part := _log_part([_parsed(each) for each in said]):
                    yield part
                async with asyncio.timeout(self._silence_seconds):
                    said, rest = await _hear(line, rest)

    async def _ask(self, what: str, request: Mapping[str, object]) -> "_Told":
        """Return the answer to a question that has one."""
        with self._explained(what):
            with self._connected() as line:
                async with asyncio.timeout(self._timeout_seconds):
                    await _say(line, request)
                    (said, *_), _ = await _hear(line, b"")
            told = _parsed(said)
            _expect_agreement(told)
        return told

    @contextlib.contextmanager
    def _connected(self) -> Generator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.setblocking(False)
            line.connect(os.fsencode(self.path))  # at once, or not at all
            yield line

    @contextlib.contextmanager
    def _explained(self, what: str) -> Generator[None]:
        """Raise what goes wrong as HelperUnavailable."""
        try:
            yield
        except TimeoutError as error:
            reason = "it says nothing"
            raise HelperUnavailable(f"{what}: helper at {self.path}: {reason}") from error
        except (OSError, _Unfit) as error:
            raise HelperUnavailable(f"{what}: helper at {self.path}: {_reason(error)}") from error


class _Unfit(Exception):
    """What the helper said cannot be used."""


class _Told(msgspec.Struct, frozen=True):
    """A line of the helper: one of these, by what is in it; a line with nothing says it lives."""

    ok: bool = False
    refused: str = ""
    # list_holders
    holders: tuple[RawHolder, ...] = ()
    shortfall: str = ""
    # job_variables
    process: JobVariables | None = None
    # connect_pod_resources
    is_there: bool = False
    why: str = ""
    # follow_kernel_log
    sequence: int | None = None
    at: float = 0.0
    text: str = ""
    lost: bool = False


_decoder: msgspec.json.Decoder[_Told] = msgspec.json.Decoder(_Told)


async def _say(line: socket.socket, request: Mapping[str, object]) -> None:
    # Who is refused is hung up on before the request is read; the answer is there all the same.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await asyncio.get_running_loop().sock_sendall(line, msgspec.json.encode(request) + b"\n")


async def _hear(line: socket.socket, begun: bytes) -> tuple[list[bytes], bytes]:
    """Return the next whole lines, one at least, and the beginning of one more."""
    said = bytearray(begun)
    while True:
        try:
            part = await asyncio.get_running_loop().sock_recv(line, _PART_BYTES)
        except ConnectionResetError:  # it did not hear us out, and has no more to say
            part = b""
        if not part:
            raise _Unfit(_hung_up(said))
        said += part
        if b"\n" in part:
            *whole, rest = bytes(said).split(b"\n")
            return whole, rest
        if len(said) > ANSWER_BYTES_MAX:
            raise _Unfit(f"it says a line of more than {ANSWER_BYTES_MAX} bytes")


async def _hear_with_descriptors(
    line: socket.socket, received: contextlib.ExitStack
) -> tuple[bytes, list[int]]:
    """Return one line, and what was handed over with it; `received` closes that."""
    said, found = b"", list[int]()
    while b"\n" not in said:
        await _readable(line)
        try:
            part, descriptors, _, _ = socket.recv_fds(line, _PART_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it did not hear us out, and has no more to say
            part, descriptors = b"", []
        for each in descriptors:
            received.callback(os.close, each)
        found += descriptors
        if not part:
            raise _Unfit(_hung_up(said))
        said += part
        if len(said) > ANSWER_BYTES_MAX:
            raise _Unfit(f"it says a line of more than {ANSWER_BYTES_MAX} bytes")
    return said.partition(b"\n")[0], found


async def _readable(line: socket.socket) -> None:
    """Return once there is something to be read, or the other side has hung up."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(line, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(line)


def _hung_up(said: bytes | bytearray) -> str:
    return "it has hung up" + " in the middle of a line" * bool(said)


def _parsed(said: bytes) -> _Told:
    try:
        return _decoder.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = shown(said.decode("utf-8", "replace"))
        raise _Unfit(f"it said {text}, which cannot be understood: {error}") from error


def _expect_agreement(told: _Told) -> None:
    if told.refused:
        raise _Unfit(f"it refuses: {told.refused}")
    if not told.ok:
        raise _Unfit("it neither agrees nor refuses")


def _log_part(told: list[_Told]) -> LogPart | None:
    lines = tuple(
        KernelLine(each.sequence, each.at, each.text) for each in told if each.sequence is not None
    )
    has_lost = any(each.lost for each in told)
    return LogPart(lines, has_lost) if lines or has_lost else None


def _reason(error: OSError | _Unfit) -> str:
    match error:
        case FileNotFoundError():
            return "nothing is there; is stoker-agent-helper running?"
        case ConnectionRefusedError():
            return "nobody listens there any more; is stoker-agent-helper running?"
        case PermissionError():
            return f"its socket is not for the user with UID {os.geteuid()} (its option --user)"
        case BlockingIOError():
            return "more wait for it than it lets wait"
        case OSError():
            return error.strerror or str(error)
        case _Unfit():
            return str(error)
