"""The files of /proc about a process: reading them, and apart from that, parsing them."""

import os
from collections.abc import Collection
from dataclasses import dataclass

_READ_BYTES_MAX = 1 << 20
_PART_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/PID/stat that is used."""

    name: str
    state: str  # one letter; "Z" ended and was not reaped
    started_ticks: int  # since boot


def read(path: str) -> bytes:
    """Return the file's beginning; empty when the process is gone or belongs to another user."""
    # Most of these files are short. Room for the longest one would be mapped and unmapped for each
    # of them, which takes three times as long as all the rest.
    parts: list[bytes] = []
    room = _READ_BYTES_MAX
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while part := os.read(file, min(_PART_BYTES, room)):
                parts.append(part)
                room -= len(part)
        finally:
            os.close(file)
    except OSError:
        return b""
    return b"".join(parts)


def parse_stat(text: bytes) -> Stat:
    """Return the facts in a /proc/PID/stat; the name in it may hold spaces and parentheses."""
    before, _, after = text.rpartition(b")")
    fields = after.split()
    return Stat(
        name=before.partition(b"(")[2].decode("utf-8", "replace"),
        state=fields[0].decode("ascii"),
        started_ticks=int(fields[19]),
    )


def parse_boot_time(text: bytes) -> float:
    """Return Unix seconds from the text of /proc/stat."""
    for line in text.splitlines():
        if line.startswith(b"btime "):
            return float(line.split()[1])
    raise ValueError("/proc/stat has no line `btime`")


def parse_variable(environ: bytes, name: str) -> str | None:
    """Return the value of a variable in a /proc/PID/environ, or None."""
    start = f"{name}=".encode()
    for entry in environ.split(b"\0"):
        if entry.startswith(start):
            return entry[len(start) :].decode("utf-8", "replace")
    return None


def parse_variables(environ: bytes, names: Collection[str]) -> dict[str, str]:
    """Return those of the named variables that a /proc/PID/environ has."""
    found: dict[str, str] = {}
    for entry in environ.split(b"\0"):
        name, is_variable, value = entry.partition(b"=")
        # As programs do, take the first of several; most are of other names, and stay bytes.
        if is_variable and (key := name.decode("utf-8", "replace")) in names:
            found.setdefault(key, value.decode("utf-8", "replace"))
    return found
