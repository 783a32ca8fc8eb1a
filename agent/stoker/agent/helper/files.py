"""What files tell without ever waiting: of a process in /proc its memory is not touched."""

import os
import stat
from collections.abc import Iterable

DEVICES_MAX = 64  # of one process
DESCRIPTORS_MAX = 1 << 16  # of one process
_DEVICE_CHARACTERS_MAX = 64  # the driver's own are shorter
_PART_BYTES = 1 << 16
_STAT_BYTES_MAX = 4096
_STAT_FIELDS = 20
_KERNEL_THREAD = 0x00200000  # of the flags in /proc/PID/stat
_GPU = "/dev/nvidia"


class Process:
    """What /proc/PID/stat tells."""

    __slots__ = ("is_kernel_thread", "name", "pid", "started_ticks")

    def __init__(self, pid: int, name: str, started_ticks: int, *, is_kernel_thread: bool) -> None:
        """`started_ticks`: since boot; with the PID it names the process for good."""
        self.pid = pid
        self.name = name
        self.started_ticks = started_ticks
        self.is_kernel_thread = is_kernel_thread


def read_process(proc: str, pid: int) -> Process:
    """Return that process; raises OSError when there is none."""
    before, _, after = read(f"{proc}/{pid}/stat", _STAT_BYTES_MAX).rpartition(b")")
    fields = after.split()
    if len(fields) < _STAT_FIELDS:  # it ended while this was read
        raise ProcessLookupError
    return Process(
        pid,
        printable(before.partition(b"(")[2]),
        int(fields[19]),
        is_kernel_thread=bool(int(fields[6]) & _KERNEL_THREAD),
    )


def read(path: str, bytes_max: int) -> bytes:
    """Return the beginning of a file; raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    parts: list[bytes] = []
    room = bytes_max
    try:
        while part := os.read(file, min(_PART_BYTES, room)):
            parts.append(part)
            room -= len(part)
    finally:
        os.close(file)
    return b"".join(parts)


def printable(said: bytes) -> str:
    """Return text from outside with a question mark for what is no printable character."""
    return _shown(said.decode("utf-8", "replace"))


def real_uid(status: bytes) -> int:
    """Return who a process belongs to by its /proc/PID/status; raises OSError when it ended."""
    for line in status.splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    raise ProcessLookupError


def open_devices(proc: str, pid: int) -> tuple[set[str], bool]:
    """Return the driver's devices that a process has open, and whether that is all of them.

    Raises OSError.
    """
    found: set[str] = set()
    folder = f"{proc}/{pid}/fd"
    numbers = os.listdir(folder)
    for number in numbers[:DESCRIPTORS_MAX]:
        try:
            device = driver_device(os.readlink(f"{folder}/{number}"))
        except FileNotFoundError:  # closed meanwhile
            continue
        if device:
            found.add(device)
    return found, len(numbers) <= DESCRIPTORS_MAX


def driver_device(path: str) -> str | None:
    """Return the device that a path names, if it is one of the driver's."""
    device = path.removesuffix(" (deleted)")  # and made anew since
    return _shown(device[:_DEVICE_CHARACTERS_MAX]) if device.startswith(_GPU) else None


def sorted_devices(devices: Iterable[str]) -> list[str]:
    """Return the first devices, those of GPUs before all others."""

    def rank(device: str) -> tuple[bool, int, str]:
        return (not device.removeprefix(_GPU).isdigit(), len(device), device)

    return sorted(devices, key=rank)[:DEVICES_MAX]


def _shown(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def why_unsafe(folder: str) -> str:
    """Return why others than root, or than us, could put something of theirs into a folder.

    Empty: they could not. Raises OSError.
    """
    facts = os.stat(folder)
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written to by others"
    return ""
