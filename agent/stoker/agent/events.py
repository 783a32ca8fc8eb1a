"""What can happen to a node: the events that `NodeState.handle` takes.

All carry `at`, Unix seconds on the node's clock. Where only differences of time matter, the state
uses the monotonic time that `handle` is given beside the event.
"""

from dataclasses import dataclass

from stoker.agent.model import Command, DriverStatus, ProcessSeen
from stoker.agent.owners import Assignment
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import GpuReading, Inventory
from stoker.agent.verdicts import KernelLine, KernelLogStatus


@dataclass(frozen=True, slots=True)
class Started:
    """The agent process began, and the journal was read. Always the first event."""

    at: float


@dataclass(frozen=True, slots=True)
class InventoryRead:
    """The driver told which GPUs there are."""

    at: float
    inventory: Inventory


@dataclass(frozen=True, slots=True)
class SampleTaken:
    """A sampling tick was answered; a GPU that could not be read has a reading without facts."""

    at: float
    readings: tuple[GpuReading, ...]


@dataclass(frozen=True, slots=True)
class SamplingFailed:
    """A sampling tick was not answered."""

    at: float
    kind: str  # a word for counting, `DriverError.kind`
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessReadingBegun:
    """The driver is being asked for processes. One reading at a time; its outcome comes next."""

    at: float


@dataclass(frozen=True, slots=True)
class ProcessesTaken:
    """The reading that was begun last has ended."""

    at: float
    started_at: float
    processes: tuple[ProcessSeen, ...]
    unread_gpu_uuids: tuple[str, ...] = ()
    has_unnamed_unread: bool = False  # a GPU whose UUID is not known could not be read either
    assignments: tuple[Assignment, ...] = ()  # what others have handed out, idle or not
    assignments_unknown: str = ""  # why that is not known; empty: it is


@dataclass(frozen=True, slots=True)
class ProcessReadingFailed:
    """The reading that was begun last told nothing."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class KernelLogRead:
    """The kernel's log tells something about GPUs; each record comes once, or once more."""

    at: float
    lines: tuple[KernelLine, ...]


@dataclass(frozen=True, slots=True)
class KernelLogChanged:
    """The kernel's log is followed now, or cannot be."""

    at: float
    status: KernelLogStatus


@dataclass(frozen=True, slots=True)
class FaultsForgiven:
    """A person says that what was found on this GPU is mended, or that it is gone for good."""

    at: float
    uuid: str
    by: str


@dataclass(frozen=True, slots=True)
class DriverChanged:
    """The driver is in another state."""

    at: float
    status: DriverStatus


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """Somebody on this machine wants the driver let go of, or for another time than before."""

    at: float
    until: float | None  # on the wall clock; None: until it is resumed
    by: str


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    """Somebody on this machine wants the driver taken again."""

    at: float
    by: str


@dataclass(frozen=True, slots=True)
class ReleaseTimePassed:
    """The wall clock has moved on while the driver is released; perhaps to its end."""

    at: float


@dataclass(frozen=True, slots=True)
class MigChanged:
    """The partitions of GPUs are others, or what is being done to them; all are told whole."""

    at: float
    gpus: tuple[GpuMigStatus, ...]


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """The aggregator wants something else of this node than it reported."""

    at: float
    id: int  # rising on one stream
    command: Command


@dataclass(frozen=True, slots=True)
class LinkUp:
    """There is a new stream to the aggregator; nothing was said on it yet."""

    at: float


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The aggregator answered the hello; it has taken in every frame up to `acked_sequence`."""

    at: float
    acked_sequence: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The stream is gone, and what was not acknowledged on it may or may not have arrived."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class FrameAcked:
    """The aggregator has taken in every frame up to `sequence`."""

    at: float
    sequence: int


@dataclass(frozen=True, slots=True)
class JournalSaved:
    """The records of that `SaveJournal` are durable."""

    at: float
    ticket: int


@dataclass(frozen=True, slots=True)
class JournalFailed:
    """None of the records of that `SaveJournal` is durable."""

    at: float
    ticket: int
    reason: str


Event = (
    Started
    | InventoryRead
    | SampleTaken
    | SamplingFailed
    | ProcessReadingBegun
    | ProcessesTaken
    | ProcessReadingFailed
    | KernelLogRead
    | KernelLogChanged
    | FaultsForgiven
    | DriverChanged
    | ReleaseAsked
    | ResumeAsked
    | ReleaseTimePassed
    | MigChanged
    | CommandReceived
    | LinkUp
    | Welcomed
    | LinkDown
    | FrameAcked
    | JournalSaved
    | JournalFailed
)
