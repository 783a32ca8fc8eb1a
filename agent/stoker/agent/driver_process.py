"""One driver host process as the agent holds it: the line to it, its note page, its end."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from stoker.agent.driver import DriverError, HostEnded, Suspect
from stoker.agent.driver_frames import (
    LENGTH,
    DriverSource,
    Note,
    NotePage,
    Reply,
    Request,
    Verb,
    arguments_of,
    decode_body,
    frame_length,
    from_failure,
    pack,
)
from stoker.agent.processes import start

T = TypeVar("T")

# Starts a process that serves the other end of the socket, with the page's descriptor.
Spawn = Callable[[DriverSource, socket.socket, int], subprocess.Popen[bytes]]


def spawn_host(source: DriverSource, agent: socket.socket, page: int) -> subprocess.Popen[bytes]:
    """Start a driver host in a session of its own, so that a terminal's Ctrl-C is not for it.

    The service manager's socket is not for it either: a stray message there would end the unit.
    """
    argv = [sys.executable, "-P", "-m", "stoker.agent.driver_host"]
    argv += [f"--socket={agent.fileno()}", f"--page={page}", f"--parent={os.getpid()}"]
    argv += arguments_of(source)
    return start(
        argv,
        env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
        stdout=subprocess.DEVNULL,
        pass_fds=(agent.fileno(), page),
        new_session=True,
    )


class HostProcess:
    """A driver host and the line to it. Once condemned it answers nothing any more."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        page: NotePage,
    ) -> None:
        """Take a process that was started; `receive` must run for questions to be answered."""
        self.process = process
        self.condemned: asyncio.Future[DriverError] = asyncio.get_running_loop().create_future()
        self._reader, self._writer, self._page = reader, writer, page
        self._number = 0
        self._pending: asyncio.Future[Reply] | None = None

    @classmethod
    async def begin(cls, source: DriverSource, spawn: Spawn) -> "HostProcess":
        """Start a driver host; raises OSError when that is not possible."""
        page = NotePage.create()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                try:
                    # The process comes last, so that a cancellation finds none to leave behind.
                    reader, writer = await asyncio.open_unix_connection(sock=ours)
                except BaseException:
                    ours.close()
                    raise
                try:
                    process = spawn(source, theirs, page)
                except OSError:
                    writer.close()
                    raise
            return cls(process, reader, writer, NotePage(page))
        finally:
            os.close(page)

    @property
    def pid(self) -> int:
        """Its PID."""
        return self.process.pid

    @property
    def note(self) -> Note | None:
        """The call into the driver that it is making, if any."""
        return self._page.read()

    async def ask(self, verb: Verb, type_: type[T], suspects: tuple[Suspect, ...] = ()) -> T:
        """Ask and return the answer; raises the DriverError that came instead of one."""
        if self.condemned.done():
            raise self.condemned.result()
        self._number += 1
        self._pending = asyncio.get_running_loop().create_future()
        self._writer.write(pack(Request(self._number, verb, suspects)))
        either: list[asyncio.Future[Any]] = [self._pending, self.condemned]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._pending.done():
            raise self.condemned.result()
        reply = self._pending.result()
        if reply.failure is not None:
            raise from_failure(reply.failure)
        try:
            return decode_body(reply.body, type_)
        except msgspec.DecodeError as error:
            # Its code is not ours: stoker was upgraded since the agent started.
            self.condemn(self._nonsense(error))
            raise self._nonsense(error) from error

    async def receive(self) -> None:
        """Take replies until the line breaks, which condemns the host."""
        decoder = msgspec.msgpack.Decoder(Reply)
        try:
            while True:
                length = frame_length(await self._reader.readexactly(LENGTH.size))
                reply = decoder.decode(await self._reader.readexactly(length))
                # One that nobody waits for any more answers a question that was given up.
                waiting = self._pending
                if waiting is not None and reply.number == self._number and not waiting.done():
                    waiting.set_result(reply)
        except (asyncio.IncompleteReadError, OSError):
            self.condemn(HostEnded(f"driver host {self.pid} ended"))
        except (ValueError, msgspec.DecodeError) as error:
            self.condemn(self._nonsense(error))

    def condemn(self, error: DriverError) -> None:
        """Let it be ended; the first reason counts."""
        if not self.condemned.done():
            self.condemned.set_result(error)

    async def ask_to_end(self) -> None:
        """Hang up, and say so by a signal too."""
        self.process.terminate()
        self._writer.close()
        with contextlib.suppress(OSError):  # it hung up first
            await self._writer.wait_closed()

    def _nonsense(self, error: Exception) -> HostEnded:
        return HostEnded(f"driver host {self.pid} does not speak as this agent does: {error}")
