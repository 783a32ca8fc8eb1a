"""What a node must never forget: the records of its journal, and what they add up to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from stoker.agent.model import HeldAllocation, Release
from stoker.agent.verdicts import (
    Check,
    ExpectedGpu,
    FaultRecord,
    History,
    KernelLogPosition,
    Life,
)


@dataclass(frozen=True, slots=True)
class IncarnationBegun:
    """The first record of a journal: the random name of this life of it."""

    incarnation: str


@dataclass(frozen=True, slots=True)
class SequencesReserved:
    """Frames may use sequence numbers below this one; after a restart numbering goes on from it."""

    below: int


@dataclass(frozen=True, slots=True)
class GpuNumbered:
    """The GPU with this UUID has this number in frames."""

    uuid: str
    number: int


@dataclass(frozen=True, slots=True)
class AllocationHeld:
    """The node began to hold an allocation."""

    allocation: HeldAllocation


@dataclass(frozen=True, slots=True)
class AllocationDropped:
    """The node let go of an allocation, after it had looked at the processes on its devices."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class DriverReleased:
    """The driver is not to be opened, in this life of the process and in later ones."""

    release: Release


@dataclass(frozen=True, slots=True)
class DriverResumed:
    """The driver may be opened again."""


@dataclass(frozen=True, slots=True)
class FaultNoted:
    """A GPU has, or had, a fault: all that is remembered of it."""

    fault: FaultRecord


@dataclass(frozen=True, slots=True)
class FaultForgotten:
    """A fault is over for so long that it says nothing any more."""

    uuid: str
    check: Check
    code: str


@dataclass(frozen=True, slots=True)
class LifeBegun:
    """A GPU was reset, or its host booted."""

    uuid: str
    life: Life


@dataclass(frozen=True, slots=True)
class GpusExpected:
    """The node's inventory was whole with these GPUs, or a person said that it is."""

    gpus: tuple[ExpectedGpu, ...]


@dataclass(frozen=True, slots=True)
class KernelLogTaken:
    """The kernel's log was taken in up to there."""

    position: KernelLogPosition


HealthRecord = FaultNoted | FaultForgotten | LifeBegun | GpusExpected | KernelLogTaken

Record = (
    IncarnationBegun
    | SequencesReserved
    | GpuNumbered
    | AllocationHeld
    | AllocationDropped
    | DriverReleased
    | DriverResumed
    | HealthRecord
)


@dataclass(frozen=True, slots=True)
class Durable:
    """The sum of a journal's records."""

    incarnation: str = ""  # empty: the journal is new
    reserved_below: int = 1
    numbers: Mapping[str, int] = field(default_factory=dict[str, int])  # by UUID
    held: Mapping[str, HeldAllocation] = field(default_factory=dict[str, HeldAllocation])  # by id
    release: Release | None = None
    history: History = field(default_factory=History)

    def after(self, records: Iterable[Record]) -> "Durable":
        """Return the sum with further records; a record that is applied twice equals once."""
        sum_ = self
        for record in records:
            sum_ = _after(sum_, record)
        return sum_

    def records(self) -> tuple[Record, ...]:
        """Return the fewest records that add up to this."""
        return (
            *([IncarnationBegun(self.incarnation)] if self.incarnation else []),
            *([SequencesReserved(self.reserved_below)] if self.reserved_below > 1 else []),
            *(GpuNumbered(uuid, number) for uuid, number in self.numbers.items()),
            *(AllocationHeld(allocation) for allocation in self.held.values()),
            *([DriverReleased(self.release)] if self.release else []),
            *_health_records(self.history),
        )


def _after(durable: Durable, record: Record) -> Durable:
    match record:
        case IncarnationBegun(incarnation):
            return replace(durable, incarnation=incarnation)
        case SequencesReserved(below):
            return replace(durable, reserved_below=max(below, durable.reserved_below))
        case GpuNumbered(uuid, number):
            return replace(durable, numbers={**durable.numbers, uuid: number})
        case AllocationHeld(allocation):
            return replace(durable, held={**durable.held, allocation.id: allocation})
        case AllocationDropped(allocation_id):
            held = {id_: each for id_, each in durable.held.items() if id_ != allocation_id}
            return replace(durable, held=held)
        case DriverReleased(release):
            return replace(durable, release=release)
        case DriverResumed():
            return replace(durable, release=None)
        case FaultNoted() | FaultForgotten() | LifeBegun() | GpusExpected() | KernelLogTaken():
            return replace(durable, history=_remembered(durable.history, record))
        case _:
            assert_never(record)


def _remembered(history: History, record: HealthRecord) -> History:
    match record:
        case FaultNoted(fault):
            return replace(history, faults={**history.faults, fault.key: fault})
        case FaultForgotten(uuid, check, code):
            gone = (uuid, check, code)
            faults = {key: fault for key, fault in history.faults.items() if key != gone}
            return replace(history, faults=faults)
        case LifeBegun(uuid, life):
            return replace(history, lives={**history.lives, uuid: life})
        case GpusExpected(gpus):
            return replace(history, expected=gpus)
        case KernelLogTaken(position):
            return replace(history, kernel_log=position)
        case _:
            assert_never(record)


def _health_records(history: History) -> tuple[HealthRecord, ...]:
    return (
        *map(FaultNoted, history.faults.values()),
        *(LifeBegun(uuid, life) for uuid, life in history.lives.items()),
        *([GpusExpected(history.expected)] if history.expected else []),
        *([KernelLogTaken(history.kernel_log)] if history.kernel_log else []),
    )
