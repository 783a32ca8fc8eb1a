"""Reads what a process has in its memory: its arguments, its environment, what it has mapped.

That can take for ever: the kernel may hold the lock of that memory in a driver call that hangs, or
its user may have put the page on a file system of his own. So another process reads it, which is
given up when it takes too long; whose memory hung is remembered, so that nothing piles up.
"""

import json
import os
import signal
import socket
import time

from stoker.agent.helper.files import Process, driver_device, printable, read, sorted_devices
from stoker.agent.helper.variables import JOB_VARIABLES

# Enough for the UUIDs of 16 GPUs: a list of them that is cut would name one that is none.
VARIABLE_CHARACTERS_MAX = 1024
COMMAND_CHARACTERS_MAX = 200
_COMMAND_BYTES_MAX = 4096
_FILE_BYTES_MAX = 1 << 24

# A reading that takes longer hangs. The process is tried again when the other time has passed and
# its reader is gone; while that many hang, no memory is read at all.
HANG_SECONDS = 0.5
HANGING_MAX = 64
_RETRY_SECONDS = 60.0
# After which the kernel ends a reader, if it can.
_ALARM_SECONDS = 20
_ANSWER_BYTES_MAX = 1 << 17


class Hangs(Exception):
    """The memory of a process cannot be read now; the text says why."""


def mapped_devices(maps: bytes) -> list[str]:
    """Return the driver's devices in a /proc/PID/maps."""
    # An address, rights, an offset, a device, an inode, and the path.
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if b" /dev/nvidia" in line}
    devices = (driver_device(os.fsdecode(path)) for path in paths)
    return sorted_devices(device for device in devices if device)


def command_line(cmdline: bytes) -> list[str]:
    """Return a /proc/PID/cmdline as one line, cut; an empty one for what has no arguments."""
    line = printable(cmdline[:_COMMAND_BYTES_MAX].rstrip(b"\0").replace(b"\0", b" "))
    is_longer = len(line) > COMMAND_CHARACTERS_MAX
    return [line[: COMMAND_CHARACTERS_MAX - 3] + "..." if is_longer else line]


def job_variables(environ: bytes) -> list[str]:
    """Return the variables of a /proc/PID/environ that are on the list, as "NAME=value"."""
    found: dict[str, str] = {}
    for entry in environ.split(b"\0"):
        name, _, value = entry.partition(b"=")
        key = name.decode("ascii", "replace")
        if key in JOB_VARIABLES:  # the first counts, as for getenv(3)
            found.setdefault(key, printable(value)[:VARIABLE_CHARACTERS_MAX])
    return [f"{key}={value}" for key, value in found.items()]


# By the name of the file in /proc/PID. Nothing else of the file leaves the process that reads it.
FINDERS = {"maps": mapped_devices, "cmdline": command_line, "environ": job_variables}


class Hanging:
    """Processes whose memory could not be read, and who is still trying."""

    def __init__(self) -> None:
        """Begin with none."""
        self._found: dict[tuple[int, int], tuple[float, int]] = {}

    def __contains__(self, process: Process) -> bool:
        """Whether there is no use in trying."""
        is_full = len(self._found) >= HANGING_MAX
        return is_full or (process.pid, process.started_ticks) in self._found

    def note(self, lines: bytes) -> None:
        """Take in lines of `pid ticks reader`."""
        for line in lines.splitlines():
            pid, ticks, reader = map(int, line.split())
            self._found[pid, ticks] = (time.monotonic() + _RETRY_SECONDS, reader)

    def review(self) -> None:
        """Forget those that may be tried again."""
        now = time.monotonic()
        for key, (until, reader) in list(self._found.items()):
            if now >= until and not os.path.exists(f"/proc/{reader}"):
                del self._found[key]


class Memory:
    """Reads the memory of processes for one caller; use it as a context."""

    def __init__(
        self, proc: str, hanging: Hanging, notes: int, caller: socket.socket, seconds: float
    ) -> None:
        """Take `seconds` for all readings, and a pipe to whoever remembers what hangs."""
        self._proc = proc
        self._hanging = hanging
        self._notes = notes
        self._caller = caller
        self._deadline = time.monotonic() + seconds
        self._line: socket.socket | None = None
        self._reader = 0

    def read(self, name: str, process: Process) -> list[str]:
        """Return what the finder of that file finds.

        Raises OSError when it may not be read or is gone, Hangs when that takes too long.
        """
        if process in self._hanging:
            raise Hangs("reading its memory hung before")
        if time.monotonic() > self._deadline - HANG_SECONDS:
            raise Hangs("reading the memory of processes took too long")
        line = self._line = self._line or self._begin()
        try:
            line.send(f"{name} {process.pid}".encode())
            said = line.recv(_ANSWER_BYTES_MAX)
        except (TimeoutError, BrokenPipeError):
            said = b""
        if not said:  # or the reader has been ended, as for want of memory
            self._give_up(line, process)
            raise Hangs("reading its memory hangs")
        told = json.loads(said)
        if isinstance(told, int):
            raise OSError(told, os.strerror(told))
        found: list[str] = told
        return found

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._reader = os.fork()
        except OSError as error:
            raise Hangs(f"there is no room for a process: {error.strerror}") from error
        if self._reader == 0:
            try:
                # A reader that hangs must hold nothing that somebody waits for the end of.
                ours.close()
                self._caller.close()
                os.close(self._notes)
                _read_for_ever(self._proc, theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(HANG_SECONDS)
        return ours

    def _give_up(self, line: socket.socket, process: Process) -> None:
        line.close()
        self._line = None
        os.kill(self._reader, signal.SIGKILL)
        note = f"{process.pid} {process.started_ticks} {self._reader}\n".encode()
        self._hanging.note(note)
        os.write(self._notes, note)


def _read_for_ever(proc: str, line: socket.socket) -> None:
    """Answer `name pid` after `name pid` with what was found, or the number of an error."""
    while wish := line.recv(64):
        signal.alarm(_ALARM_SECONDS)
        name, pid = wish.decode().split()
        try:
            told: object = FINDERS[name](read(f"{proc}/{pid}/{name}", _FILE_BYTES_MAX))
        except OSError as error:
            told = error.errno
        line.send(json.dumps(told).encode())
        signal.alarm(0)
