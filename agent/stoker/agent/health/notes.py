"""What has to be written down of faults and lives, and when: a change at once, the rest later.

So that a fault that comes a thousand times a minute, or flaps, does not wear out a disk, what is
only more of the same is put off (`SETTLE_SECONDS`): a crash loses that much of a count, and nothing
else. What could not be written is told again. Times are seconds on a clock that never goes back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from stoker.agent.records import (
    FaultForgotten,
    FaultNoted,
    GpusExpected,
    HealthRecord,
    KernelLogTaken,
    LifeBegun,
)
from stoker.agent.verdicts import Ending, FaultKey, FaultRecord, KernelLogPosition

# What only adds to a fault that lasts is told and written so often.
SETTLE_SECONDS = 60.0
# A fault that ends more often in so long is flapping: more ends are put off, too.
ENDS_PER_MINUTE_MAX = 3

# What a record is about; a later one replaces an earlier one.
_Subject = (
    tuple[Literal["fault"], FaultKey]
    | tuple[Literal["life"], str]
    | tuple[Literal["expected", "position"], None]
)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was told of a fault last."""

    at: float  # when the minute began in which it was
    fault: FaultRecord
    ends: int  # how often it ended in that minute


class Notes:
    """Records on their way to the journal."""

    def __init__(self, position: KernelLogPosition | None) -> None:
        """Take up to where the kernel's log was taken in, as it is written."""
        self._now, self._has_ticked = 0.0, False
        self._out: dict[_Subject, HealthRecord] = {}
        self._told: dict[_Subject, HealthRecord] = {}  # the newest of each, also when written
        self._lost: dict[_Subject, HealthRecord] = {}  # could not be written
        self._lost_until = 0.0  # when they are told again
        self._written: dict[FaultKey, _Written] = {}
        self._unwritten: dict[FaultKey, FaultRecord] = {}
        self._position, self._position_written = position, position
        self._position_at = 0.0  # when it may be written again

    def restore(self, fault: FaultRecord) -> None:
        """Take in a fault that is written."""
        self._written[fault.key] = _Written(self._now, fault, 0)

    def age(self, key: FaultKey) -> float:
        """Return how long ago the minute began in which a fault was told last."""
        written = self._written.get(key)
        return float("inf") if written is None else self._now - written.at

    def change(self, fault: FaultRecord) -> None:
        """Tell of a fault as it is now: at once, or with what else comes soon."""
        written = self._written.get(fault.key)
        if (
            written is None
            or self._now - written.at >= SETTLE_SECONDS
            or (fault.ended_at is None and written.fault.ended_at is not None)
            or (fault.ended_at is not None and written.ends < ENDS_PER_MINUTE_MAX)
            or fault.lives != written.fault.lives
            or fault.ending not in (None, Ending.RECOVERED)
        ):
            self.note(fault)
        else:
            self._unwritten[fault.key] = fault

    def note(self, fault: FaultRecord) -> None:
        """Tell of a fault as it is now."""
        before = self._written.get(fault.key)
        if before is None or self._now - before.at >= SETTLE_SECONDS:
            before = _Written(self._now, fault, 0)
        ends = before.ends + (fault.ended_at is not None)
        self._written[fault.key] = _Written(before.at, fault, ends)
        self._unwritten.pop(fault.key, None)
        self.tell(FaultNoted(fault))

    def forget(self, key: FaultKey) -> None:
        """Tell that a fault is not remembered any more."""
        self._written.pop(key, None)
        self._unwritten.pop(key, None)
        self.tell(FaultForgotten(*key))
        self._told.pop(("fault", key))

    def tell(self, record: HealthRecord) -> None:
        """Tell a record."""
        subject = _subject(record)
        self._lost.pop(subject, None)
        self._out[subject] = self._told[subject] = record

    def take_position(self, position: KernelLogPosition) -> None:
        """Take in up to where the kernel's log was taken in."""
        self._position = position
        if self._out:  # what the lines have told is not to be told again after a crash
            self._position_at = self._now
        self._write_position()

    def tick(self, now: float) -> None:
        """Take in that time has passed."""
        if not self._has_ticked:  # until now nobody knew what the clock says
            self._written = {key: replace(each, at=now) for key, each in self._written.items()}
            self._has_ticked = True
        self._now = now
        if self._unwritten:
            for fault in tuple(self._unwritten.values()):
                if self.age(fault.key) >= SETTLE_SECONDS:
                    self.note(fault)
        if self._position != self._position_written:
            self._write_position()
        if self._lost and now >= self._lost_until:
            for subject, record in tuple(self._lost.items()):
                self.tell(self._told.get(subject, record))

    def take(self) -> tuple[HealthRecord, ...]:
        """Return what has to be written since the last call; applied twice it equals once."""
        if not self._out:
            return ()
        records, self._out = tuple(self._out.values()), {}
        return records

    def take_loss(self, records: Iterable[HealthRecord]) -> None:
        """Take in that these could not be written."""
        self._lost.update((_subject(record), record) for record in records)
        self._lost_until = self._now + SETTLE_SECONDS

    def _write_position(self) -> None:
        if self._position is not None and self._now >= self._position_at:
            self._position_at = self._now + SETTLE_SECONDS
            self._position_written = self._position
            self.tell(KernelLogTaken(self._position))


def _subject(record: HealthRecord) -> _Subject:
    match record:
        case FaultNoted(fault):
            return ("fault", fault.key)
        case FaultForgotten(uuid, check, code):
            return ("fault", (uuid, check, code))
        case LifeBegun(uuid, _):
            return ("life", uuid)
        case GpusExpected():
            return ("expected", None)
        case KernelLogTaken():
            return ("position", None)
        case _:
            assert_never(record)
