"""What the keeper of partitions asks the edges to do, in the order in which it is to be begun.

Each is answered by an event, but for `Answer` and `Report`. At most one of each kind is under way,
but for `Save`, whose answers come in the order of their tickets.
"""

from dataclasses import dataclass

from stoker.agent.mig.in_the_way import ProcessToEnd
from stoker.agent.mig.operations import Book
from stoker.agent.partitions import GpuMigStatus, Step


@dataclass(frozen=True, slots=True)
class Save:
    """Make the book durable, then answer `Saved` or `SavingFailed`."""

    ticket: int
    book: Book


@dataclass(frozen=True, slots=True)
class ReadPartitions:
    """Read how the GPU is partitioned, then answer `PartitionsRead` or `ReadingFailed`."""

    gpu_uuid: str


@dataclass(frozen=True, slots=True)
class LookForUsers:
    """Read the processes anew, then answer `UsersSeen` with this ticket.

    When they cannot be read it is answered all the same (`GpuUsers.unknown`).
    """

    ticket: int
    gpu_uuid: str


@dataclass(frozen=True, slots=True)
class DoStep:
    """Have the step done, then answer `StepDone` or `StepFailed`."""

    gpu_uuid: str
    step: Step


@dataclass(frozen=True, slots=True)
class LetGoOfDriver:
    """Close every handle of the driver, then answer `DriverLetGo` or `LettingGoFailed`.

    Somebody else may have had it released already: then it is let go of, and stays so.
    """


@dataclass(frozen=True, slots=True)
class TakeDriver:
    """Open the driver again, unless somebody else has it released; then answer `DriverTaken`."""


@dataclass(frozen=True, slots=True)
class EndProcesses:
    """End these processes, none of which is of an allocation; then answer `ProcessesEnded`."""

    gpu_uuid: str
    processes: tuple[ProcessToEnd, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell who asked that it is noted, or why it is refused; nothing was touched then."""

    ticket: int  # of the question
    refusal: str = ""  # empty: it is noted


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the node's state, the log and the aggregator how these GPUs are now."""

    gpus: tuple[GpuMigStatus, ...]


MigAction = (
    Save
    | ReadPartitions
    | LookForUsers
    | DoStep
    | LetGoOfDriver
    | TakeDriver
    | EndProcesses
    | Answer
    | Report
)
