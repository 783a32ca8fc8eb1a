"""Accepts those who may ask, and has each of them answered by a process of its own."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time

from stoker.agent.helper.memory import Hanging
from stoker.agent.helper.requests import Refused, Told
from stoker.agent.helper.verbs import HEARTBEAT_SECONDS, Paths, Work, answer

REQUEST_BYTES_MAX = 1024
# At one time; a follower of the log is one for as long as it likes.
CONNECTIONS_MAX = 16
# How long a caller may take to say its line, and to take a line of the answer.
LINE_SECONDS_MAX = 5.0
# After which the kernel ends whoever answers, whatever it is doing; renewed by every line. A verb
# that may take longer says so itself (`helper.partitions`).
_ALARM_SECONDS = int(HEARTBEAT_SECONDS + 2 * LINE_SECONDS_MAX)
# When not even a connection can be taken: the machine has no descriptor left.
_BREATH_SECONDS = 0.2
_STRANGERS_REMEMBERED = 64
_CREDENTIALS = struct.Struct("3i")
_DRAIN_PARTS_MAX = 64


class Server:
    """Answers at a listening socket, until SIGTERM or SIGINT."""

    def __init__(
        self, listener: socket.socket, uid: int, paths: Paths, *, lock: int | None = None
    ) -> None:
        """`uid`: who may ask, beside root; `paths`: what the verbs look at.

        `lock`: a descriptor that must be open in this process alone.
        """
        self._listener = listener
        self._lock = lock
        self._uids = {0, uid}
        self._paths = paths
        self._pid = os.getpid()
        self._children: set[int] = set()
        self._hanging = Hanging()
        self._strangers: set[int] = set()  # told of in the journal, once each
        self._notes, self._notes_in = os.pipe()
        self._signals, self._signals_in = os.pipe()
        for end in (self._signals, self._signals_in):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._signals_in, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)

    def serve(self) -> None:
        """Return when it is told to end; nobody is being answered then."""
        self._listener.setblocking(False)
        ready = select.poll()
        for each in (self._signals, self._notes, self._listener.fileno()):
            ready.register(each, select.POLLIN)
        while True:
            found = {descriptor for descriptor, _ in ready.poll()}
            if self._signals in found:
                came = os.read(self._signals, 1 << 12)
                if signal.SIGTERM in came or signal.SIGINT in came:
                    return self._end()
                self._reap()
            if self._notes in found:
                self._hanging.note(os.read(self._notes, 1 << 16))
            if self._listener.fileno() in found:
                self._accept()

    def _reap(self) -> None:
        for child in list(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(child, os.WNOHANG)[0]:
                    self._children.discard(child)

    def _end(self) -> None:
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except BlockingIOError:  # it is gone again
            return
        except OSError as error:
            _note(f"no connection can be taken: {error.strerror}")
            time.sleep(_BREATH_SECONDS)
            return
        with caller:
            if reason := self._objection(caller):
                _turn_away(caller, reason)
                return
            self._hanging.review()
            try:
                child = os.fork()
            except OSError as error:
                _turn_away(caller, f"there is no room for a process: {error.strerror}")
                return
            if child == 0:
                self._attend(caller)
            self._children.add(child)

    def _objection(self, caller: socket.socket) -> str:
        """Return why a caller is turned away; empty: it is not."""
        said = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(said)
        if uid not in self._uids:
            if uid not in self._strangers and len(self._strangers) < _STRANGERS_REMEMBERED:
                self._strangers.add(uid)
                _note(f"the user with UID {uid} asked, and was refused")
            return f"the user with UID {uid} may not ask"
        if len(self._children) >= CONNECTIONS_MAX:
            return f"{CONNECTIONS_MAX} connections are being answered; ask again"
        return ""

    def _attend(self, caller: socket.socket) -> None:
        """Answer one caller, in a process that ends with that."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for each in (self._signals, self._signals_in, self._notes):
                os.close(each)
            if self._lock is not None:
                os.close(self._lock)  # else a reader that hangs keeps the next helper from its path
            self._listener.close()
            work = Work(
                self._paths,
                hanging=self._hanging,
                notes=self._notes_in,
                caller=caller,
                parent=self._pid,
            )
            attend(caller, work)
            status = 0
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            status = 0  # the caller has gone, or takes nothing
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            raise
        finally:
            os._exit(status)


def attend(caller: socket.socket, work: Work) -> None:
    """Hear a line and say the answer; raises OSError when the caller does not take it."""
    signal.alarm(_ALARM_SECONDS)
    try:
        for told in answer(_hear(caller), work):
            handed_over, work.handed_over = work.handed_over, None
            _say(caller, told, handed_over)
            signal.alarm(_ALARM_SECONDS)
    except Refused as refusal:
        _say(caller, {"refused": str(refusal)})
    # A socket that is closed with something unread takes back what was said.
    caller.shutdown(socket.SHUT_WR)
    for _ in range(_DRAIN_PARTS_MAX):
        if not caller.recv(REQUEST_BYTES_MAX):
            break


def _hear(caller: socket.socket) -> bytes:
    """Return the line that a caller says; raises Refused when it is none."""
    said = b""
    deadline = time.monotonic() + LINE_SECONDS_MAX
    while b"\n" not in said:
        caller.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = caller.recv(REQUEST_BYTES_MAX)
        except TimeoutError:
            raise Refused(f"no whole line came within {LINE_SECONDS_MAX:g} s") from None
        said += part
        if len(said) > REQUEST_BYTES_MAX:
            raise Refused(f"the request is longer than {REQUEST_BYTES_MAX} bytes")
        if not part:
            raise Refused("the request ends before its line does")
    request, _, more = said.partition(b"\n")
    if more:
        raise Refused("something came after the request; one line is one connection")
    return request


def _say(caller: socket.socket, told: Told, handed_over: socket.socket | None = None) -> None:
    caller.settimeout(LINE_SECONDS_MAX)
    said = json.dumps(told).encode() + b"\n"
    if handed_over is not None:
        said = said[socket.send_fds(caller, [said], [handed_over.fileno()]) :]
    caller.sendall(said)


def _turn_away(caller: socket.socket, reason: str) -> None:
    """Say why, where that can be said at once."""
    caller.setblocking(False)
    with contextlib.suppress(OSError):
        caller.send(json.dumps({"refused": reason}).encode() + b"\n")


def _note(text: str) -> None:
    sys.stderr.write(f"stoker-agent-helper: {text}\n")
    sys.stderr.flush()
