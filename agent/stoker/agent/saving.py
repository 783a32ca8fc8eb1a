"""Records that are on their way to the disk: they count as claims, and are not yet facts."""

from collections.abc import Iterator

from stoker.agent.actions import SaveJournal
from stoker.agent.model import HeldAllocation
from stoker.agent.records import (
    AllocationDropped,
    AllocationHeld,
    HealthRecord,
    Record,
    SequencesReserved,
)

# Sequence numbers that one record in the journal reserves: one write in half an hour at one per
# second. The rest of a block is skipped at a restart.
SEQUENCES_RESERVED_AT_ONCE = 4000
# How long a full journal is left alone before numbers are reserved again.
RESERVATION_RETRY_SECONDS = 60.0


def reserved_until(next_sequence: int) -> int:
    """Return below which number frames may be numbered, once that is on disk."""
    return next_sequence + SEQUENCES_RESERVED_AT_ONCE


class Saving:
    """The records that were handed out to be saved and not yet answered for, by ticket."""

    def __init__(self) -> None:
        self._records: dict[int, tuple[Record, ...]] = {}
        self._next_ticket = 1
        self._reservation_not_before = 0.0

    def begin(self, *records: Record) -> SaveJournal:
        """Return the action that saves these records."""
        save = SaveJournal(self._next_ticket, records)
        self._records[save.ticket] = records
        self._next_ticket += 1
        return save

    def end(self, ticket: int) -> tuple[Record, ...]:
        """Return the records of a save that was answered for, which is under way no more."""
        return self._records.pop(ticket)

    @property
    def holds(self) -> dict[str, HeldAllocation]:
        """What is about to be held, by id."""
        found = (each.allocation for each in self if isinstance(each, AllocationHeld))
        return {allocation.id: allocation for allocation in found}

    @property
    def drops(self) -> set[str]:
        """The ids of what is about to be let go of."""
        return {each.allocation_id for each in self if isinstance(each, AllocationDropped)}

    @property
    def is_saving_health(self) -> bool:
        """Whether something about health is being saved."""
        return any(isinstance(each, HealthRecord) for each in self)

    def is_reservation_due(self, next_sequence: int, reserved_below: int, now: float) -> bool:
        """Whether sequence numbers run low and are not being reserved already."""
        is_low = reserved_below - next_sequence < SEQUENCES_RESERVED_AT_ONCE // 2
        is_under_way = any(isinstance(each, SequencesReserved) for each in self)
        return is_low and not is_under_way and now >= self._reservation_not_before

    def put_off_reservation(self, now: float) -> None:
        """Leave the journal alone for a while: it could not take a reservation."""
        self._reservation_not_before = now + RESERVATION_RETRY_SECONDS

    def __iter__(self) -> Iterator[Record]:
        return (record for records in self._records.values() for record in records)
