"""Who a process is, as /proc tells it: its user, its command, its cgroup, its allocation.

Nothing of a process changes while its inode in /proc is the same, but for what it does to itself
(another program, another user, another cgroup). So one `stat` a reading is enough to know that a
process is the one it was, and everything about it is read anew once a minute.

Its command and its environment lie in its memory, which the kernel does not show while the process
hangs in a driver call that holds that memory's lock. So another thread reads them, and a process
that hangs is told without them; it must not hide all the others.
"""

import concurrent.futures
import os
import pwd
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from stoker.agent.helper.variables import ALLOCATION, JOB_VARIABLES
from stoker.agent.procfs import Stat, parse_boot_time, parse_stat, parse_variables, read
from stoker.agent.readings import ProcessReading

COMMAND_CHARACTERS_MAX = 200
# For so long what was read of a process is told again, while it is the same process.
REMEMBER_SECONDS = 60.0
# Reading the memory of a process takes some microseconds, or for as long as that process hangs.
MEMORY_SECONDS_MAX = 0.5
# Threads that wait for one; while there are so many, no memory is read.
HANGING_MAX = 64
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process. What /proc does not tell is None, or empty."""

    pid: int
    command: str  # as it was called, cut to COMMAND_CHARACTERS_MAX
    started_at: float | None = None  # Unix seconds; with the PID it names the process for good
    user: str | None = None  # a name, or the number of a user who has none here
    allocation_id: str | None = None  # None also when its environment may not be read
    started_ticks: int | None = None  # the same as `started_at`, as the kernel counts: since boot
    cgroup: str = ""  # the text of its cgroup file
    slurm: Mapping[str, str] | None = None  # of SLURM_VARIABLES; None: it may not be read


class _Identity(NamedTuple):
    """What a process keeps; a PID that was given away has another inode."""

    inode: int
    made_at: int  # when the kernel made that inode, in nanoseconds
    uid: int


@dataclass(frozen=True, slots=True)
class _Remembered:
    """A process as it was found, and what tells that it still is that one."""

    identity: _Identity
    until: float  # monotonic
    facts: ProcessFacts


class ProcTable:
    """The processes of this machine. It reads when asked; use it in one thread at a time."""

    def __init__(
        self, root: str = "/proc", *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the mount of /proc; in a container this is the host's."""
        self._root = root
        self._monotonic = monotonic
        self._users: dict[int, str] = {}  # looking one up may ask a directory server
        self._remembered: dict[int, _Remembered] = {}
        self._memory = _Memory()
        # Taken once: the kernel recomputes it from the wall clock, and a start must not wander.
        self._booted_at = parse_boot_time(read(f"{root}/stat"))

    def look_up(self, pid: int) -> ProcessFacts | None:
        """Return the process as it is now, or None when there is none (any more)."""
        found = self._read(pid)
        return None if found is None else found[0]

    def describe(self, process: ProcessReading) -> ProcessFacts:
        """Return who uses a GPU: a process of this machine, or else only what the driver told.

        A process that the driver lists and /proc does not have is simulated, is in a PID namespace
        that is hidden from us, or has just ended. It uses the GPU until the driver says otherwise.
        """
        facts = self._recall(process.pid)
        return facts or ProcessFacts(process.pid, process.name or "(not visible here)")

    def remember_only(self, pids: Collection[int]) -> None:
        """Forget what was read of other processes."""
        for pid in self._remembered.keys() - pids:
            del self._remembered[pid]
        self._memory.forget_others(f"{self._root}/{pid}" for pid in pids)

    def user_name(self, uid: int) -> str:
        """Return the name of a user; the number of one who has none here."""
        if uid not in self._users:
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self._users[uid] = str(uid)
        return self._users[uid]

    def started_at(self, ticks: int) -> float:
        """Return when a process started, in Unix seconds."""
        return self._booted_at + ticks / _TICKS_PER_SECOND

    def _recall(self, pid: int) -> ProcessFacts | None:
        """Return the process, read anew only if it may be another one or tell something else."""
        identity = self._identity(pid)
        if identity is None:
            self._remembered.pop(pid, None)
            return None
        now = self._monotonic()
        known = self._remembered.get(pid)
        if known is not None and known.identity != identity:
            del self._remembered[pid]
            known = None
        if known is not None and now < known.until:
            return known.facts
        found = self._read(pid)
        if found is None:
            self._remembered.pop(pid, None)
            return None
        facts, is_whole = found
        if not is_whole:
            return facts if known is None else _with_memory_of(known.facts, facts)
        # Given away while it was read: what was read may be of either, and is not kept.
        if self._identity(pid) != identity:
            self._remembered.pop(pid, None)
            return facts
        if known is not None and known.facts == facts:
            facts = known.facts  # whoever made something of it need not do so again
        self._remembered[pid] = _Remembered(identity, now + REMEMBER_SECONDS, facts)
        return facts

    def _read(self, pid: int) -> tuple[ProcessFacts, bool] | None:
        """Return the process, and whether that is all that may be read of it."""
        folder = f"{self._root}/{pid}"
        stat = self._stat(pid)
        identity = self._identity(pid)
        if stat is None or identity is None:
            return None
        memory = self._memory.read(folder)
        cmdline, environ = memory or (b"", b"")
        variables = parse_variables(environ, JOB_VARIABLES)
        facts = ProcessFacts(
            pid=pid,
            command=parse_command(cmdline) or f"[{stat.name}]",
            started_at=self.started_at(stat.started_ticks),
            user=self.user_name(identity.uid),
            allocation_id=variables.pop(ALLOCATION, None),
            started_ticks=stat.started_ticks,
            cgroup=read(f"{folder}/cgroup").decode("utf-8", "replace"),
            slurm=variables if environ else None,
        )
        # The PID may have been given to another process while it was read.
        again = self._stat(pid)
        if again is None or again.started_ticks != stat.started_ticks:
            return None
        return facts, memory is not None

    def _identity(self, pid: int) -> _Identity | None:
        try:
            found = os.stat(f"{self._root}/{pid}")
        except OSError:
            return None
        return _Identity(found.st_ino, found.st_ctime_ns, found.st_uid)

    def _stat(self, pid: int) -> Stat | None:
        text = read(f"{self._root}/{pid}/stat")
        return parse_stat(text) if text else None


def _with_memory_of(before: ProcessFacts, facts: ProcessFacts) -> ProcessFacts:
    """Return what is known of a process that hangs now, by what it told before."""
    return replace(
        facts, command=before.command, allocation_id=before.allocation_id, slurm=before.slurm
    )


_Bytes = tuple[bytes, bytes]  # of cmdline and environ


class _Memory:
    """Reads what lies in the memory of processes, waiting for each of them once."""

    def __init__(self) -> None:
        self._reader: _Reader | None = None  # idle
        self._awaited: dict[str, concurrent.futures.Future[_Bytes]] = {}  # by folder

    def read(self, folder: str) -> _Bytes | None:
        """Return both, or None while they cannot be read."""
        awaited = self._awaited.get(folder)
        if awaited is not None:
            if not awaited.done():
                return None
            del self._awaited[folder]  # of back then: it is read anew
        if sum(not each.done() for each in self._awaited.values()) >= HANGING_MAX:
            return None
        reader = self._reader or _Reader()
        self._reader = None
        result = reader.read(folder)
        try:
            found = result.result(MEMORY_SECONDS_MAX)
        except TimeoutError:
            reader.end()  # once it can
            self._awaited[folder] = result
            return None
        self._reader = reader
        return found

    def forget_others(self, folders: Iterable[str]) -> None:
        """Forget processes that have ended; who is still being waited for has not."""
        kept = set(folders)
        self._awaited = {
            folder: result
            for folder, result in self._awaited.items()
            if folder in kept or not result.done()
        }


class _Reader:
    """A thread that reads one process after the other; it keeps nothing from ending."""

    def __init__(self) -> None:
        self._asked = queue.SimpleQueue[tuple[str, concurrent.futures.Future[_Bytes]] | None]()
        threading.Thread(target=self._run, daemon=True, name="memory reader").start()

    def read(self, folder: str) -> concurrent.futures.Future[_Bytes]:
        result: concurrent.futures.Future[_Bytes] = concurrent.futures.Future()
        self._asked.put((folder, result))
        return result

    def end(self) -> None:
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            folder, result = asked
            result.set_result((read(f"{folder}/cmdline"), read(f"{folder}/environ")))


def parse_command(text: bytes) -> str:
    """Return a command line on one line, cut; empty for a kernel thread or a zombie."""
    words = text.rstrip(b"\0").decode("utf-8", "replace").split("\0")
    line = "".join(c if c.isprintable() else "?" for c in " ".join(words))
    if len(line) > COMMAND_CHARACTERS_MAX:
        line = line[: COMMAND_CHARACTERS_MAX - 3] + "..."
    return line
