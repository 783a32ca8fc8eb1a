"""What has happened: durable events, which the ledger keeps, and volatile ones, which it applies.

A durable event carries all that replaying it needs; `KINDS` names every kind as it stands in the
store. All carry `at`, Unix seconds on the aggregator's clock.
"""

from dataclasses import dataclass

from stoker.aggregator.model import (
    Command,
    Frame,
    HeldAllocation,
    MissingGpu,
    NodeFacts,
    Placement,
    Request,
)
from stoker.aggregator.verdicts import FaultId, GpuHealth

# --- durable


@dataclass(frozen=True, slots=True)
class NodeRegistered:
    """An agent said hello, or told its inventory, with facts that are new to the ledger."""

    at: float
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class NodeCordoned:
    """No new allocation goes to the node; with `drain_at`, what it holds then is released."""

    at: float
    node: str
    reason: str
    drain_at: float | None = None


@dataclass(frozen=True, slots=True)
class NodeUncordoned:
    """The node takes allocations again."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class GpuHealthChanged:
    """A node judges a GPU otherwise than before, or has it in another slot (a PCI address)."""

    at: float
    node: str
    uuid: str
    slot: str
    health: GpuHealth


@dataclass(frozen=True, slots=True)
class GpuForgotten:
    """A GPU is on no node any more, and no node tells of it: the card was taken out."""

    at: float
    node: str
    uuid: str


@dataclass(frozen=True, slots=True)
class GpuCordoned:
    """No new allocation goes to the GPU; with `drain_at`, what it holds then is released."""

    at: float
    node: str
    uuid: str
    reason: str
    by_health: bool  # otherwise by an operator
    drain_at: float | None = None
    fault: FaultId | None = None  # for which it was done by health


@dataclass(frozen=True, slots=True)
class GpuUncordoned:
    """The GPU takes allocations again.

    `acknowledged` is the fault that an operator knows of: it is no reason to cordon it again.
    """

    at: float
    node: str
    uuid: str
    by_health: bool  # otherwise by an operator
    acknowledged: FaultId | None = None


@dataclass(frozen=True, slots=True)
class AllocationRequested:
    """A request entered the queue."""

    at: float
    id: str
    request: Request
    idempotency_key: str
    wait_until: float


@dataclass(frozen=True, slots=True)
class AllocationGranted:
    """A request, new or from the queue, got its devices."""

    at: float
    id: str
    request: Request
    idempotency_key: str
    requested_at: float
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class AllocationAdopted:
    """A node holds what the ledger has no memory of (its database was lost or restored)."""

    at: float
    id: str
    request: Request
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class AllocationReleasing:
    """An allocation was given up: released, expired, or refused by its node."""

    at: float
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AllocationEnded:
    """Its node has let go, or it left the queue."""

    at: float
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AllocationsForgotten:
    """Ended allocations that are no longer remembered."""

    at: float
    ids: tuple[str, ...]


DurableEvent = (
    NodeRegistered
    | NodeCordoned
    | NodeUncordoned
    | GpuHealthChanged
    | GpuForgotten
    | GpuCordoned
    | GpuUncordoned
    | AllocationRequested
    | AllocationGranted
    | AllocationAdopted
    | AllocationReleasing
    | AllocationEnded
    | AllocationsForgotten
)

KINDS: dict[str, type[DurableEvent]] = {
    kind.__name__: kind
    for kind in (
        NodeRegistered,
        NodeCordoned,
        NodeUncordoned,
        GpuHealthChanged,
        GpuForgotten,
        GpuCordoned,
        GpuUncordoned,
        AllocationRequested,
        AllocationGranted,
        AllocationAdopted,
        AllocationReleasing,
        AllocationEnded,
        AllocationsForgotten,
    )
}

# --- volatile


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """A stream of an agent was welcomed.

    `held` is complete: what the node holds, is about to hold, and has let go of without having been
    able to say so. What else is known of the node was known of its last stream: the first frame
    made on this one tells driver, processes and `held` anew, whole, and resent frames carry only
    telemetry (`stoker.agent.state`).
    """

    at: float
    node: str
    session: int  # above 0, different for every stream
    held: tuple[HeldAllocation, ...]
    acked_sequence: int  # of this incarnation; 0: none
    missing: tuple[MissingGpu, ...] | None = None  # None: the driver has not told of its GPUs yet


@dataclass(frozen=True, slots=True)
class AgentDisconnected:
    """A stream ended. One that was already replaced changes nothing."""

    at: float
    node: str
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """A frame of a live stream; what it changed durably has been applied before.

    `sampled_at` is its samples' time on the aggregator's clock.
    """

    at: float
    node: str
    session: int
    frame: Frame
    sampled_at: float


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """The holder of a granted allocation said that it is still there."""

    at: float
    id: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """The aggregator started from its store, or has stood still: nobody could be heard meanwhile.

    Every lease gets its full TTL from here, and no GPU counts as well for longer. Comes after
    everything that was stored has been applied and before anything is decided.
    """

    at: float


@dataclass(frozen=True, slots=True)
class WaiterAttached:
    """A client is on the line for a waiting request."""

    at: float
    id: str


@dataclass(frozen=True, slots=True)
class WaiterDetached:
    """The line to a waiting request's client broke; it keeps its place for a grace period."""

    at: float
    id: str


@dataclass(frozen=True, slots=True)
class CommandsSent:
    """Commands went out on a node's stream."""

    at: float
    node: str
    session: int
    commands: tuple[Command, ...]


VolatileEvent = (
    AgentConnected
    | AgentDisconnected
    | FrameArrived
    | KeptAlive
    | Recovered
    | WaiterAttached
    | WaiterDetached
    | CommandsSent
)
