"""What a check finds: a status in Nagios' words, what is so, and what to do about it."""

from dataclasses import dataclass
from enum import IntEnum

from stoker.agent.doctor.observed import Unseen


class Status(IntEnum):
    """How bad it is; the number is the exit code of a Nagios plugin."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3

    @property
    def weight(self) -> int:
        """Which of several counts: CRITICAL, then WARNING, then UNKNOWN.

        As `max_state_alt` of the Monitoring Plugins has it.
        """
        return (Status.OK, Status.UNKNOWN, Status.WARNING, Status.CRITICAL).index(self)


@dataclass(frozen=True, slots=True)
class Judged:
    """What a check found."""

    status: Status
    found: str  # one line
    advice: tuple[str, ...] = ()  # what to do, in this order; one line each
    details: tuple[str, ...] = ()  # one line for each thing that is not as it should be
    because_of: str = ""  # the check that says what is wrong, where this one only follows from it


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check of that name found."""

    name: str
    status: Status
    found: str
    advice: tuple[str, ...]
    details: tuple[str, ...]
    because_of: str
    source: str  # where the rule is from


def ok(found: str) -> Judged:
    """Return that all is well."""
    return Judged(Status.OK, found)


def warning(found: str, *advice: str, details: tuple[str, ...] = ()) -> Judged:
    """Return that something should be mended, and work goes on."""
    return Judged(Status.WARNING, found, advice, details)


def critical(found: str, *advice: str, details: tuple[str, ...] = ()) -> Judged:
    """Return that GPUs, or some of them, cannot be used until something is mended."""
    return Judged(Status.CRITICAL, found, advice, details)


def unknown(found: str, *advice: str, details: tuple[str, ...] = ()) -> Judged:
    """Return that it cannot be told."""
    return Judged(Status.UNKNOWN, found, advice, details)


def unseen(look: Unseen, *advice: str) -> Judged:
    """Return that it cannot be told, for the look's reason."""
    return Judged(Status.UNKNOWN, look.why, advice)


def follows(check: str, found: str) -> Judged:
    """Return that it cannot be told because of what another check found."""
    return Judged(Status.UNKNOWN, found, because_of=check)


def several(status: Status, found: list[str], advice: tuple[str, ...]) -> Judged:
    """Return that several things are so, one at least: the first in the line, all below it."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Judged(status, f"{found[0]}{more}", advice, tuple(found) if more else ())


def counted(count: int, noun: str) -> str:
    """Return "1 GPU", "2 GPUs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    """Return the names, the first ones of many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
