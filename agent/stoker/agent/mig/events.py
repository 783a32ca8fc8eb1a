"""What can happen on a GPU's way to another layout: the events that `Keeper.handle` takes.

`Keeper.handle(event, now)` is given the time beside the event: Unix seconds, since the deadlines
that holders are told are such.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stoker.agent.mig.in_the_way import GpuUsers
from stoker.agent.mig.operations import Book, Declared
from stoker.agent.partitions import Activation, GpuPartitions


@dataclass(frozen=True, slots=True)
class Loaded:
    """The agent has started, and this is what an earlier one has noted. Always the first event."""

    book: Book


@dataclass(frozen=True, slots=True)
class Configured:
    """What the agent's configuration declares, by GPU UUID: all of it, after the first partitions.

    It may come again, as when a GPU has come; what it has said before changes nothing.
    """

    declared: Mapping[str, Declared]


@dataclass(frozen=True, slots=True)
class PartitionsRead:
    """How GPUs are partitioned now.

    `is_all`: GPUs that are not in it are gone; a look around that nobody asked for. Otherwise it is
    the answer to `ReadPartitions`: the one GPU, read after that was asked.
    """

    gpus: tuple[GpuPartitions, ...]
    is_all: bool = True


@dataclass(frozen=True, slots=True)
class ReadingFailed:
    """Partitions were to be read, and cannot be told."""

    gpu_uuid: str  # of the `ReadPartitions` that it answers; empty: all, in a look around
    reason: str


@dataclass(frozen=True, slots=True)
class UsersSeen:
    """Who uses the GPUs, by UUID.

    `ticket`: of the `LookForUsers` that it answers; the processes, and what is held, were read
    after that was asked. 0: it was not asked for; then it may be about any of the GPUs.
    """

    users: Mapping[str, GpuUsers]
    ticket: int = 0


@dataclass(frozen=True, slots=True)
class ApplyAsked:
    """Somebody wants these GPUs, by UUID, to be like that. Answered by `Answer`."""

    ticket: int  # chosen by the sender
    operation_id: str
    wanted: Mapping[str, Declared]
    drain_seconds: float = 0.0
    evict: bool = False


@dataclass(frozen=True, slots=True)
class UndoAsked:
    """Somebody wants these GPUs to be as before their newest change. Answered by `Answer`."""

    ticket: int  # chosen by the sender
    operation_id: str
    gpu_uuids: tuple[str, ...]  # empty: every one that has something to undo
    drain_seconds: float = 0.0
    evict: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """The book of that `Save` is durable."""

    ticket: int


@dataclass(frozen=True, slots=True)
class SavingFailed:
    """The book of that `Save` could not be written down."""

    ticket: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """The driver says that a step is done."""

    gpu_uuid: str
    activation: Activation | None = None  # of a `SetMode`


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The driver would not do a step, or nobody could be asked to do it."""

    gpu_uuid: str
    kind: str  # a word for counting: "in_use", "no_permission", "unavailable"
    reason: str


@dataclass(frozen=True, slots=True)
class DriverLetGo:
    """The agent has no handle of the driver open."""


@dataclass(frozen=True, slots=True)
class LettingGoFailed:
    """The agent could not let go of the driver, in time or at all."""

    reason: str


@dataclass(frozen=True, slots=True)
class DriverTaken:
    """The agent reads the driver again, or tries to."""


@dataclass(frozen=True, slots=True)
class ProcessesEnded:
    """The processes of `EndProcesses` are gone, but for those that would not go."""

    gpu_uuid: str
    failures: tuple[str, ...] = ()  # a sentence each


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed; wanted by `Keeper.due`."""


MigEvent = (
    Loaded
    | Configured
    | PartitionsRead
    | ReadingFailed
    | UsersSeen
    | ApplyAsked
    | UndoAsked
    | Saved
    | SavingFailed
    | StepDone
    | StepFailed
    | DriverLetGo
    | LettingGoFailed
    | DriverTaken
    | ProcessesEnded
    | Ticked
)
