"""What clients may wish for, and what can be answered, as values."""

from dataclasses import dataclass

from stoker.aggregator.model import Refusals, Request
from stoker.aggregator.moves import Move
from stoker.aggregator.usable import Kind


@dataclass(frozen=True, slots=True)
class Allocate:
    """Grant the request; when that cannot be now and `wait_seconds` is above 0, queue it."""

    request: Request
    idempotency_key: str = ""
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Release:
    """Give the allocation up, or leave the queue; what is over stays as it is."""

    id: str
    reason: str = "released"


@dataclass(frozen=True, slots=True)
class Cordon:
    """Place nothing more on the node, or on one GPU of it; a drain that is under way goes on."""

    node: str
    reason: str
    gpu_uuid: str = ""  # empty: the whole node


@dataclass(frozen=True, slots=True)
class Uncordon:
    """Place on the node, or on one GPU of it, again, and end its drain."""

    node: str
    gpu_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Cordon, and release what is still held after a grace; None: wait without end."""

    node: str
    reason: str
    gpu_uuid: str = ""
    grace_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class MoveOver:
    """Grant an allocation anew at another place, since its holder agreed to move there.

    The old one stays: it is the holder's to release.
    """

    move: Move
    kinds: tuple[Kind, ...]  # of request, by which the move's gain was measured
    idempotency_key: str


Wish = Allocate | Release | Cordon | Uncordon | Drain | MoveOver


@dataclass(frozen=True, slots=True)
class Settled:
    """The wish holds: the named allocation or node stands as the ledger now says."""

    id: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits under this id."""

    id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The request cannot be placed now."""

    refusals: Refusals


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The idempotency key stands for another request, the one of this allocation."""

    id: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is no allocation, node, or GPU of that node, of that name."""

    what: str
    known: str = ""  # what there is instead, for a person


Reply = Settled | Queued | Refused | KeyReused | Unknown
