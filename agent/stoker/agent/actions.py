"""What the state asks the edges to do, in the order in which they are to be begun."""

from dataclasses import dataclass

from stoker.agent.model import Frame, Hello
from stoker.agent.records import Record


@dataclass(frozen=True, slots=True)
class SendHello:
    """Say this first on the stream that just came up."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Send this on the stream that is up; if it is gone meanwhile, forget it: it will be resent."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class SaveJournal:
    """Make these records durable, all or none, then answer `JournalSaved` or `JournalFailed`.

    Saves are done in the order of their tickets.
    """

    ticket: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class ReadProcesses:
    """Begin a reading of processes now, or right after the one that is under way."""


@dataclass(frozen=True, slots=True)
class ReadInventory:
    """Ask the driver which GPUs there are: it sampled one that is not known."""


@dataclass(frozen=True, slots=True)
class ReleaseDriver:
    """Let go of the driver, and do not open it before `ResumeDriver`."""


@dataclass(frozen=True, slots=True)
class ResumeDriver:
    """Take the driver again."""


Action = (
    SendHello
    | SendFrame
    | SaveJournal
    | ReadProcesses
    | ReadInventory
    | ReleaseDriver
    | ResumeDriver
)
