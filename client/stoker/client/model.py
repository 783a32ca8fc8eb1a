"""What the aggregator tells a client, as values in base units; None is absent: not known."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class AllocationState(StrEnum):
    """The life of an allocation: waiting -> granted -> releasing -> ended."""

    WAITING = "waiting"  # in the queue, holds nothing
    GRANTED = "granted"  # holds its devices
    RELEASING = "releasing"  # given up; its node has not yet confirmed that it let go
    ENDED = "ended"  # over, its devices are free
    UNKNOWN = "unknown"  # a state of a newer aggregator


class NodeState(StrEnum):
    """How far a node can be trusted now."""

    READY = "ready"  # connected, its samples are fresh
    STALE = "stale"  # connected, its newest sample is older than three intervals
    DISCONNECTED = "disconnected"  # its agent has no stream to the aggregator
    UNKNOWN = "unknown"  # a state of a newer aggregator


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: whole GPUs on one node, or a share of one GPU's memory."""

    gpus: int
    holder: str
    ttl_seconds: float
    memory_bytes: int | None = None  # a share of one GPU; None: whole GPUs, exclusive
    model: str = ""  # empty: any; so are pool, node and host
    pool: str = ""
    node: str = ""
    host_boot_id: str = ""  # only nodes under this kernel boot: the caller's own host
    labels: Mapping[str, str] | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or a share of it, that an allocation holds."""

    uuid: str
    model: str
    index: int  # on its node, in PCI order; for people
    memory_bytes: int  # what the allocation may use of it: its share, or all
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Allocation:
    """A lease of whole GPUs or of a share, from when it is asked for. Times are Unix seconds."""

    id: str
    state: AllocationState
    node: str  # empty while waiting
    devices: tuple[Device, ...]
    env: Mapping[str, str]  # what makes a CUDA process see exactly these devices
    expires_at: float | None  # when it ends without a keep-alive; None while waiting and once ended
    request: Request
    requested_at: float
    granted_at: float | None
    ended_at: float | None
    ended_reason: str  # why it ended or is being given up
    queue_position: int | None  # 1 is next; None unless waiting
    resource_version: int
    held_by_node: bool  # whether the node has confirmed that it holds it

    @property
    def uuids(self) -> tuple[str, ...]:
        """The UUIDs of its GPUs."""
        return tuple(device.uuid for device in self.devices)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one node cannot host a request."""

    node: str
    filter: str  # stable name for programs: "cordoned", "gpus_free", ...
    reason: str  # one sentence for a person
    wanted: str
    found: str


@dataclass(frozen=True, slots=True)
class Refusals:
    """Why a request cannot be placed now."""

    summary: str  # one line over the whole fleet
    nodes: tuple[Refusal, ...]  # at most 1,000 of them
    nodes_total: int
    ahead: int  # requests before it in the queue that compete for the same nodes


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why something waits, or what would come of a request now."""

    placeable: bool
    node: str  # where, when it would be placed
    summary: str
    refusals: Refusals | None
    allocation: Allocation | None  # when the question was about one


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """What a keep-alive was answered with."""

    allocation_id: str
    state: AllocationState
    expires_at: float | None
    ended_reason: str


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has a context on a GPU."""

    pid: int
    user: str  # empty: cannot be seen; so is the command
    command: str
    memory_used_bytes: int | None
    allocation_id: str  # empty: foreign, nobody's of ours
    started_at: float | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU with its newest sample; a reading is None when it failed or is no longer fresh."""

    uuid: str
    model: str
    index: int
    pci_bus_id: str
    memory_total_bytes: int
    memory_used_bytes: int | None
    utilization_ratio: float | None
    memory_utilization_ratio: float | None
    temperature_celsius: float | None
    power_watts: float | None
    energy_joules: float | None
    sm_clock_hertz: int | None
    memory_clock_hertz: int | None
    last_sample_at: float | None
    allocation_ids: tuple[str, ...]
    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True)
class MissingGpu:
    """A GPU that the driver counts and that cannot be read: it is out of use until it can be."""

    index: int  # on its node, in PCI order
    uuid: str  # empty: nobody ever read it
    error_kind: str  # stable name for programs: "driver_timeout", "gpu_lost", ...
    reason: str  # one sentence for a person


@dataclass(frozen=True, slots=True)
class Node:
    """A host of GPUs, as the aggregator knows it."""

    name: str
    state: NodeState
    state_reason: str  # why it is not ready
    simulated: bool
    cordoned: str | None  # the operator's reason; None: not cordoned
    pool: str
    labels: Mapping[str, str]
    boot_id: str
    agent_version: str
    driver_version: str
    cuda_version: str
    interval_seconds: float  # between two samples
    last_sample_at: float | None
    gpus: tuple[Gpu, ...]  # also those that are out of use, as they were known
    missing_gpus: tuple[MissingGpu, ...] = ()  # those that are out of use, and why


@dataclass(frozen=True, slots=True)
class Nodes:
    """Every node, as of one resource version."""

    nodes: tuple[Node, ...]
    resource_version: int
    aggregator_version: str


@dataclass(frozen=True, slots=True)
class Allocations:
    """The allocations, as of one resource version."""

    allocations: tuple[Allocation, ...]
    resource_version: int


@dataclass(frozen=True, slots=True)
class Change:
    """A durable change of the fleet, with the object as it was after it."""

    resource_version: int
    at: float
    event: str  # such as "AllocationGranted"
    object: Allocation | Node | None  # None: a kind that this client does not know
