"""Who a process is, as /proc tells it: its user, its command, its allocation."""

import os
import pwd
from dataclasses import dataclass

from stoker.agent.procfs import Stat, parse_boot_time, parse_stat, parse_variable, read
from stoker.agent.readings import ProcessReading

ALLOCATION = "STOKER_ALLOCATION_ID"

COMMAND_CHARACTERS_MAX = 200
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process. What /proc does not tell is None."""

    pid: int
    command: str  # as it was called, cut to COMMAND_CHARACTERS_MAX
    started_at: float | None = None  # Unix seconds; with the PID it names the process for good
    user: str | None = None  # a name, or the number of a user who has none here
    allocation_id: str | None = None  # None also when its environment may not be read


class ProcTable:
    """The processes of this machine. It reads when asked, and remembers only names of users."""

    def __init__(self, root: str = "/proc") -> None:
        """Take the mount of /proc; in a container this is the host's."""
        self._root = root
        self._users: dict[int, str] = {}  # looking one up may ask a directory server
        # Taken once: the kernel recomputes it from the wall clock, and a start must not wander.
        self._booted_at = parse_boot_time(read(f"{root}/stat"))

    def look_up(self, pid: int) -> ProcessFacts | None:
        """Return the process, or None when there is none (any more)."""
        stat = self._stat(pid)
        if stat is None:
            return None
        try:
            uid = os.stat(f"{self._root}/{pid}").st_uid
        except OSError:
            return None
        facts = ProcessFacts(
            pid=pid,
            command=parse_command(read(f"{self._root}/{pid}/cmdline")) or f"[{stat.name}]",
            started_at=self._booted_at + stat.started_ticks / _TICKS_PER_SECOND,
            user=self._user(uid),
            allocation_id=parse_variable(read(f"{self._root}/{pid}/environ"), ALLOCATION),
        )
        # The PID may have been given to another process while it was read.
        again = self._stat(pid)
        return facts if again is not None and again.started_ticks == stat.started_ticks else None

    def describe(self, process: ProcessReading) -> ProcessFacts:
        """Return who uses a GPU: a process of this machine, or else only what the driver told.

        A process that the driver lists and /proc does not have is simulated, is in a PID namespace
        that is hidden from us, or has just ended. It uses the GPU until the driver says otherwise.
        """
        facts = self.look_up(process.pid)
        return facts or ProcessFacts(process.pid, process.name or "(not visible here)")

    def _stat(self, pid: int) -> Stat | None:
        text = read(f"{self._root}/{pid}/stat")
        return parse_stat(text) if text else None

    def _user(self, uid: int) -> str:
        if uid not in self._users:
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self._users[uid] = str(uid)
        return self._users[uid]


def parse_command(text: bytes) -> str:
    """Return a command line on one line, cut; empty for a kernel thread or a zombie."""
    words = text.rstrip(b"\0").decode("utf-8", "replace").split("\0")
    line = "".join(c if c.isprintable() else "?" for c in " ".join(words))
    if len(line) > COMMAND_CHARACTERS_MAX:
        line = line[: COMMAND_CHARACTERS_MAX - 3] + "..."
    return line
