"""The agent's local socket: who may open it, one request for each connection, nobody can stall it.

The socket belongs to one agent: a lock beside it says whether that one lives, so what a dead one
left behind is replaced. A caller has a few seconds to say a line and to take the answer; a caller
who says nothing, half a line, or too much is told so where it can be told, and hung up on.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from stoker.core.clock import Clock
from stoker.core.errors import BadInput, ExitCode, InUse, StokerError, StoreError, StoreFull
from stoker.core.local import (
    REQUEST_BYTES_MAX,
    Answer,
    Refusal,
    Request,
    checked_path,
    decode_request,
    encode,
)

# The owner and the group: who is in neither may not even ask.
SOCKET_MODE = 0o660
# Callers at one time. They cost a descriptor each; one more is told to come back.
CALLERS_MAX = 32
# How long a caller may take to say its line, and then to take the answer.
LINE_SECONDS_MAX = 5.0
# What is read of a caller that said too much, so that it gets to hear the answer.
_DRAIN_BYTES_MAX = 2**20
# When not even a connection can be taken: the process has no descriptor left.
_BREATH_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the kernel says."""

    pid: int
    uid: int


Desk = Callable[[Request, Caller], Awaitable[Answer]]


class LocalDoor:
    """The listening socket. `serve` must run for callers to be answered."""

    def __init__(self, path: Path, listener: socket.socket, lock: int) -> None:
        """Take what `open` has made."""
        self.path = path
        self._listener = listener
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> Self:
        """Listen at `path`; what a dead agent left there is replaced.

        Raises InUse when somebody lives there, BadInput when no socket can be there, StoreError.
        """
        checked_path(path)
        try:
            lock = _lock(path)
        except OSError as error:
            raise _explained(path, error) from error
        try:
            _clear(path)
            return cls(path, _listen(path), lock)
        except OSError as error:
            os.close(lock)
            raise _explained(path, error) from error
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Listen no more, and leave no socket behind."""
        self._listener.close()
        self.path.unlink(missing_ok=True)
        os.close(self._lock)

    async def serve(
        self, desk: Desk, *, clock: Clock, line_seconds: float = LINE_SECONDS_MAX
    ) -> None:
        """Let `desk` answer every caller, until cancelled."""
        loop = asyncio.get_running_loop()
        callers: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    line, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    _log.error("%s: no connection can be taken: %s", self.path, error.strerror)
                    await clock.sleep(_BREATH_SECONDS)
                    continue
                line.setblocking(False)
                if len(callers) >= CALLERS_MAX:
                    _turn_away(line)
                    continue
                visit = tasks.create_task(_visit(line, desk, line_seconds), name="local caller")
                callers.add(visit)
                visit.add_done_callback(callers.discard)


def _turn_away(line: socket.socket) -> None:
    """Say that there are too many callers, where that can be said at once."""
    with line, contextlib.suppress(OSError):
        line.send(encode(Refusal(f"{CALLERS_MAX} callers are being answered; ask again")))


async def _visit(line: socket.socket, desk: Desk, line_seconds: float) -> None:
    """Take a request, answer it, hang up; whatever the caller does."""
    loop = asyncio.get_running_loop()
    with line:
        try:
            answer = await _answer(line, desk, line_seconds)
            async with asyncio.timeout(line_seconds):
                await loop.sock_sendall(line, encode(answer))
                line.shutdown(socket.SHUT_WR)
                # A socket that is closed with something unread takes the answer back.
                for _ in range(_DRAIN_BYTES_MAX // REQUEST_BYTES_MAX):
                    if not await loop.sock_recv(line, REQUEST_BYTES_MAX):
                        break
        except (OSError, TimeoutError) as error:
            _log.debug("a local caller is gone: %s", error)


async def _answer(line: socket.socket, desk: Desk, line_seconds: float) -> Answer:
    caller = _caller(line)
    try:
        async with asyncio.timeout(line_seconds):
            said = await _read_line(line)
    except TimeoutError:
        return Refusal(f"no whole line came within {line_seconds:g} s", ExitCode.USAGE)
    except BadInput as error:
        return Refusal(str(error), error.exit_code)
    try:
        return await desk(decode_request(said), caller)
    except StokerError as error:
        return Refusal(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001 (the agent goes on whatever a caller has found)
        _log.exception("request of process %d failed", caller.pid)
        return Refusal(f"{type(error).__name__}: {error} (a bug)", ExitCode.FAILED)


async def _read_line(line: socket.socket) -> bytes:
    """Return the line that the caller says; raises BadInput when it is none."""
    loop = asyncio.get_running_loop()
    said = bytearray()
    while b"\n" not in said:
        part = await loop.sock_recv(line, REQUEST_BYTES_MAX)
        said += part
        if len(said) > REQUEST_BYTES_MAX:
            raise BadInput(f"the request is longer than {REQUEST_BYTES_MAX} bytes")
        if not part:
            raise BadInput(f"the request ends after {len(said)} bytes, before its line does")
    request, _, rest = bytes(said).partition(b"\n")
    if rest:
        raise BadInput(f"{len(rest)} bytes came after the request; one line is one connection")
    return request


def _caller(line: socket.socket) -> Caller:
    facts = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(facts)
    return Caller(pid, uid)


def _lock(path: Path) -> int:
    """Return the lock that says that an agent lives at `path`; raises InUse when another does."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path.with_name(path.name + ".lock"), flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise InUse(f"socket: another agent answers at {path}") from None
    return file


def _clear(path: Path) -> None:
    """Remove the socket of a dead agent; raises BadInput or InUse for anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadInput(f"socket: {path} is there, and it is no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # so many wait that one more would have to
            pass
    raise InUse(f"socket: another program answers at {path}")


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(os.fsencode(path))
        path.chmod(SOCKET_MODE)  # before anybody can connect
        listener.listen(CALLERS_MAX)
    except OSError:
        listener.close()
        raise
    return listener


def _explained(path: Path, error: OSError) -> StokerError:
    kind = StoreFull if error.errno in _NO_ROOM else StoreError
    return kind(f"socket: {path}: {error.strerror}")
