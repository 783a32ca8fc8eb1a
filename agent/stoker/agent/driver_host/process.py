"""One driver host process as the agent holds it: the line to it, its note page, its end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, assert_never, cast

import msgspec

from stoker.agent.driver import DriverError, HostEnded
from stoker.agent.driver_host.frames import (
    LENGTH,
    REPLIES,
    DriverSource,
    NotePage,
    Reply,
    Request,
    arguments_of,
    frame_length,
    from_failure,
    pack,
    to_failure,
)
from stoker.agent.driver_host.watch import CallWatch, Limits, Note, Overdue
from stoker.agent.processes import Child, start
from stoker.agent.procfs import parse_stat, read

T = TypeVar("T")

# Starts a process that serves the other end of the socket, with the page's descriptor.
Spawn = Callable[[DriverSource, socket.socket, int], Child]
# Tells how the kernel sees a process: the letter that `state_of` returns.
ReadState = Callable[[int], str | None]

_UNINTERRUPTIBLE = "D"


class Late(Exception):
    """A question was given up."""

    def __init__(self, overdue: Overdue) -> None:
        """Take why."""
        self.overdue = overdue
        super().__init__(overdue.found)


def spawn_host(
    source: DriverSource, agent: socket.socket, page: int, *, keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a driver host in a session of its own, so that a terminal's Ctrl-C is not for it.

    It has the descriptors `keep` open for as long as it lives. The service manager's socket is not
    for it either: a stray message there would end the unit.
    """
    argv = [sys.executable, "-P", "-m", "stoker.agent.driver_host"]
    argv += [f"--socket={agent.fileno()}", f"--page={page}", f"--parent={os.getpid()}"]
    argv += arguments_of(source)
    return start(
        argv,
        env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
        stdout=subprocess.DEVNULL,
        pass_fds=(agent.fileno(), page, *keep),
        new_session=True,
    )


def state_of(pid: int) -> str | None:
    """Return the kernel's letter for a process, "D" when any thread of it sleeps uninterruptibly.

    None when there is no such process. After SIGKILL the first thread may be a zombie while
    another one is held. Reading `stat` waits for nobody, other than reading `cmdline` or `maps`.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return None
    states = {
        each: parse_stat(text).state
        for each in threads
        if (text := read(f"/proc/{pid}/task/{each}/stat"))
    }
    return _UNINTERRUPTIBLE if _UNINTERRUPTIBLE in states.values() else states.get(str(pid))


# How a process ends that stumbled inside of the library; killed from outside is another matter.
_CRASHES = frozenset(
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE),
)


class HostProcess:
    """A driver host and the line to it. Once condemned it answers nothing any more."""

    def __init__(self, process: Child, line: "_Line", page: NotePage) -> None:
        """Take a process that was just started at the other end of the line."""
        self.process = process
        self.condemned: asyncio.Future[DriverError] = asyncio.get_running_loop().create_future()
        self._line, self._page = line, page
        self._number = 0
        self._pending: asyncio.Future[Reply | Overdue | DriverError] | None = None
        line.serve(self._take, self._break)

    @classmethod
    async def begin(cls, source: DriverSource, spawn: Spawn) -> "HostProcess":
        """Start a driver host; raises OSError when that is not possible."""
        page = NotePage.create()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                try:
                    # The process comes last, so that a cancellation finds none to leave behind.
                    loop = asyncio.get_running_loop()
                    _, line = await loop.create_unix_connection(_Line, sock=ours)
                except BaseException:
                    ours.close()
                    raise
                try:
                    process = spawn(source, theirs, page)
                except OSError:
                    line.close()
                    raise
            return cls(process, line, NotePage(page))
        finally:
            os.close(page)

    @property
    def crash(self) -> str | None:
        """How it stumbled inside of the library, if that is what ended it."""
        code = self.process.returncode
        return signal.strsignal(-code) if code is not None and -code in _CRASHES else None

    @property
    def pid(self) -> int:
        """Which process it is."""
        return self.process.pid

    @property
    def note(self) -> Note | None:
        """The call into the driver that is being made, if any."""
        return self._page.read()

    async def ask(
        self, question: Request, answers: msgspec.msgpack.Decoder[T], limits: Limits
    ) -> T:
        """Ask and return the answer.

        Raises Late when it is overdue, or the DriverError that came instead of an answer.
        """
        if self.condemned.done():
            raise self._why_condemned()
        loop = asyncio.get_running_loop()
        self._number += 1
        pending: asyncio.Future[Reply | Overdue | DriverError] = loop.create_future()
        self._pending = pending
        self._line.send(pack(msgspec.structs.replace(question, number=self._number)))
        watch = CallWatch(limits)
        timer = loop.call_later(watch.pause_seconds, self._look, watch, pending)
        try:
            outcome = await pending
        finally:
            timer.cancel()
            self._pending = None
        match outcome:
            case Overdue():
                raise Late(outcome)
            case DriverError():
                raise self._why_condemned()
            case Reply():
                if outcome.failure is not None:
                    raise from_failure(outcome.failure)
                return self._decoded(outcome, answers)
            case _:
                assert_never(outcome)

    def condemn(self, error: DriverError) -> None:
        """Let it be ended; the first reason counts."""
        if not self.condemned.done():
            self.condemned.set_result(error)
            if self._pending is not None and not self._pending.done():
                self._pending.set_result(error)

    def ask_to_end(self) -> None:
        """Hang up, and say so by a signal too."""
        self.process.terminate()
        self._line.close()

    def _look(
        self, watch: CallWatch, pending: "asyncio.Future[Reply | Overdue | DriverError]"
    ) -> None:
        """Look at the page until the question is answered or overdue."""
        if pending.done():
            return
        if (overdue := watch.look(self.note)) is not None:
            pending.set_result(overdue)
        else:
            asyncio.get_running_loop().call_later(watch.pause_seconds, self._look, watch, pending)

    def _decoded(self, reply: Reply, answers: msgspec.msgpack.Decoder[T]) -> T:
        try:
            return answers.decode(reply.body)
        except msgspec.DecodeError as error:
            # Its code is not ours: stoker was upgraded since the agent started.
            self.condemn(self._nonsense(error))
            raise self._nonsense(error) from error

    def _why_condemned(self) -> DriverError:
        return from_failure(to_failure(self.condemned.result()))  # a traceback of its own

    def _take(self, reply: Reply) -> None:
        # One that nobody waits for any more answers a question that was given up.
        waiting = self._pending
        if waiting is not None and reply.number == self._number and not waiting.done():
            waiting.set_result(reply)

    def _break(self, error: Exception | None) -> None:
        ended = HostEnded(f"driver host {self.pid} ended")
        self.condemn(ended if error is None else self._nonsense(error))

    def _nonsense(self, error: Exception) -> HostEnded:
        return HostEnded(f"driver host {self.pid} does not speak as this agent does: {error}")


class _Line(asyncio.Protocol):
    """The agent's end of the socket: takes the replies apart as they come in."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._take: Callable[[Reply], None] = lambda reply: None
        self._broken: Callable[[Exception | None], None] = lambda error: None

    def serve(
        self, take: Callable[[Reply], None], broken: Callable[[Exception | None], None]
    ) -> None:
        """Name who takes each reply, and who hears of the end: None, or what was not understood."""
        self._take, self._broken = take, broken

    def send(self, frame: bytearray) -> None:
        self._transport.write(frame)

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        try:
            while len(received) >= LENGTH.size:
                end = LENGTH.size + frame_length(received)
                if len(received) < end:
                    return
                reply = REPLIES.decode(bytes(received[LENGTH.size : end]))
                del received[:end]
                self._take(reply)
        except (ValueError, msgspec.DecodeError) as error:
            self._broken(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken(None)
