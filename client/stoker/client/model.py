"""What the aggregator tells a client, as values in base units; None is absent: not known."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from stoker.client.leaving import LeaveRequest
from stoker.client.partitions import GpuMig

_ID_CHARACTERS = 12  # of a container's, as its own tools show them


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


class GpuVerdict(StrEnum):
    """Whether work should run on a GPU."""

    HEALTHY = "healthy"  # nothing is wrong with it
    DEGRADED = "degraded"  # it works, with less than it should have, or not for long
    UNHEALTHY = "unhealthy"  # no work should be placed on it
    # It is not read now, and nothing worse is known of it; or a verdict of a newer aggregator.
    UNKNOWN = "unknown"


class RepairAction(StrEnum):
    """What is to be done about a GPU; each includes those before it."""

    NONE = "none"
    RESTART_APP = "restart_app"  # start the program again that met the fault
    DRAIN = "drain"  # let work end and place none, then look at what the reason names
    RESET_GPU = "reset_gpu"
    REBOOT = "reboot"  # the host
    RMA = "rma"  # inspect the hardware, replace it if that finds what the reason names
    UNKNOWN = "unknown"  # an action of a newer aggregator


class GpuTopology(StrEnum):
    """How the GPUs of an allocation shall lie to each other on their node."""

    ANY = "any"
    NUMA = "numa"  # all on one memory node of the host
    NVLINK = "nvlink"  # each linked to each, directly or through NVSwitches
    UNKNOWN = "unknown"  # a word of a newer aggregator


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; what is empty, zero or None does not matter to the caller."""

    gpus: int  # whole GPUs on each node; 1 for a share and for a MIG device
    holder: str
    ttl_seconds: float
    memory_bytes: int | None = None  # a share of one GPU; with `mig_profile` at least so many
    compute_milli: int | None = None  # a share of one GPU's compute, in thousandths
    mig_profile: str = ""  # "1g.10gb"; "any": the smallest that has the memory
    nodes: int = 1  # more than one: a gang, all or nothing
    cpu_milli: int = 0  # thousandths of a CPU core, on each node; so is the next
    host_memory_bytes: int = 0
    models: tuple[str, ...] = ()  # any of these
    gpu_memory_min_bytes: int = 0
    compute_capability_min: str = ""  # "8.0"
    driver_version_min: str = ""  # "570.124.06"
    pool: str = ""
    node: str = ""
    host_boot_id: str = ""  # only nodes under this kernel boot: the caller's own host
    node_labels: Mapping[str, str] | None = None  # only nodes that have these
    gpu_topology: GpuTopology = GpuTopology.ANY
    gpu_topology_required: bool = False  # otherwise it is preferred
    same_label: str = ""  # of a gang: a node label whose value all of its nodes share
    same_label_required: bool = False
    service: str = ""  # what it is a replica of; what follows speaks of others of the same
    anti_affinity: str = ""  # never on the same "gpu", "node", or value of a node label
    spread: str = ""  # preferred where fewest are: "gpu", "node", or a node label
    near_service: str = ""  # preferred on a node where that service is
    preferred_gpu_uuid: str = ""
    duration_seconds: float | None = None  # expected
    movable: bool = False  # whether its holder agrees to be asked to move
    labels: Mapping[str, str] | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, a share of it, or one of its MIG devices, that an allocation holds."""

    uuid: str  # the GPU's
    model: str
    index: int  # on its node, in PCI order; for people
    memory_bytes: int  # what the allocation may use of it: its share, or all
    exclusive: bool  # the whole GPU
    compute_milli: int | None = None  # None: none is promised, or all of it (exclusive)
    mig_device_uuid: str = ""  # empty: the GPU itself
    mig_profile: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """What an allocation holds, or would hold, on one node."""

    node: str
    devices: tuple[Device, ...]
    env: Mapping[str, str]  # what makes a CUDA process there see exactly these devices
    held_by_node: bool = False


@dataclass(frozen=True, slots=True)
class Allocation:
    """A lease of whole GPUs or of a share, from when it is asked for. Times are Unix seconds."""

    id: str
    state: AllocationState
    node: str  # of a gang the first; empty while waiting
    devices: tuple[Device, ...]  # on that node
    env: Mapping[str, str]  # what makes a CUDA process see exactly these devices
    expires_at: float | None  # when it ends without a keep-alive; None while waiting and once ended
    request: Request
    requested_at: float
    granted_at: float | None
    ended_at: float | None
    ended_reason: str  # why it ended or is being given up
    queue_position: int | None  # 1 is next; None unless waiting
    resource_version: int
    held_by_node: bool  # whether its nodes have confirmed that they hold it
    placements: tuple[Placement, ...] = ()  # of a gang: all of its nodes

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
class AddNodes:
    """To suppose: nodes more, idle and well."""

    gpus: int  # on each
    model: str  # of the catalogue ("H100-80GB") or of the fleet
    nodes: int = 1
    pool: str = ""


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """To suppose: the fleet without this node."""

    node: str


@dataclass(frozen=True, slots=True)
class UncordonNode:
    """To suppose: this node, and all of its GPUs, not cordoned."""

    node: str


WhatIf = AddNodes | RemoveNode | UncordonNode


@dataclass(frozen=True, slots=True)
class ProposedChange:
    """The cheapest change, of those that are looked for, that would place a request now."""

    kind: str  # stable for programs: "fewer_gpus", "other_model", "uncordon", "release", ...
    summary: str
    request: Request | None  # to make instead; None: the request stays and the fleet changes
    node: str  # to uncordon, mend, repartition or free; empty: none
    gpu_uuids: tuple[str, ...]  # of that node; empty: all, or the request changes
    allocation_ids: tuple[str, ...]  # what would have to be released
    placements: tuple[Placement, ...]  # where the request would go then


@dataclass(frozen=True, slots=True)
class RequestAhead:
    """A request in the queue that goes before."""

    allocation_id: str
    holder: str
    wanted: str  # in a few words
    priority: int
    requested_at: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why something waits, or what would come of a request now."""

    placeable: bool
    node: str  # where, when it would be placed
    summary: str
    refusals: Refusals | None
    allocation: Allocation | None  # when the question was about one
    placements: tuple[Placement, ...] = ()  # where, when it would be placed
    choice: str = ""  # why there
    change: ProposedChange | None = None  # None: it would be placed, or nothing was found
    ahead: tuple[RequestAhead, ...] = ()  # the first 100; `refusals.ahead` counts all


@dataclass(frozen=True, slots=True)
class MoveOffer:
    """The fleet asks the holder of a movable allocation to move it."""

    id: str
    allocation_id: str  # what would move
    placements: tuple[Placement, ...]  # where to; not held for the offer
    reason: str  # one sentence
    expires_at: float  # until when an answer counts


@dataclass(frozen=True, slots=True)
class KeptAlive:
    """What a keep-alive was answered with."""

    allocation_id: str
    state: AllocationState
    expires_at: float | None
    ended_reason: str
    move: MoveOffer | None = None  # the fleet asks to move it elsewhere
    leave: LeaveRequest | None = None  # the fleet asks to give it back


@dataclass(frozen=True, slots=True)
class Move:
    """One move of a plan; cost and gain are thousandths of a GPU."""

    allocation_id: str
    from_placements: tuple[Placement, ...]
    to_placements: tuple[Placement, ...]
    kind: str  # "defragment" or "relieve"
    reason: str  # one sentence with its numbers
    cost_milli: int  # what the holder carries over
    gain_milli: int  # capacity that becomes usable, or load that leaves a hot GPU
    offer_id: str  # empty: its holder has not been asked


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Moves in the order in which they hold."""

    moves: tuple[Move, ...]
    summary: str  # one sentence for a person


@dataclass(frozen=True, slots=True)
class Owner:
    """What a process is part of. What is empty does not exist or cannot be seen."""

    unit: str = ""  # of systemd, such as "jupyter.service"
    container_id: str = ""  # as its runtime names it, whole
    container_runtime: str = ""  # "docker", "containerd", "cri-o", "podman"
    container_name: str = ""  # in its pod, or its own
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    slurm_job: str = ""
    slurm_step: str = ""

    def described(self) -> str:
        """Return it in the words that agents use for it; empty: nothing is known."""
        if self.pod_name:
            container = f" (container {self.container_name})" if self.container_name else ""
            return f"pod {self.pod_namespace}/{self.pod_name}{container}"
        if self.pod_uid:
            return f"pod with UID {self.pod_uid}"
        if self.slurm_job:
            return f"Slurm job {self.slurm_job}"
        if self.container_id:
            name = self.container_name or self.container_id[:_ID_CHARACTERS]
            return f"{self.container_runtime or 'a'} container {name}"
        return f"unit {self.unit}" if self.unit else ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has a context on a GPU."""

    pid: int
    user: str  # empty: cannot be seen; so is the command
    command: str
    memory_used_bytes: int | None
    allocation_id: str  # empty: foreign, nobody's of ours
    started_at: float | None
    owner: Owner | None = None  # None: nothing is known of it


@dataclass(frozen=True, slots=True)
class Assignment:
    """A GPU, or a part of one, that somebody else has handed out: not free, though maybe idle."""

    gpu_uuid: str
    by: str  # "kubelet", "slurm"
    holder: str  # for a person: "pod ml/train-0 (container trainer)"
    mig_device_uuid: str = ""  # empty: all of the GPU, or not told


@dataclass(frozen=True, slots=True)
class HealthFault:
    """A fault that lasts. Times are Unix seconds on the node's clock."""

    check: str  # stable name for programs: "xid", "row_remap_failed", ...
    code: str  # which of its kind: the Xid's number, the link; empty: there is one
    verdict: GpuVerdict  # what this fault alone would make of the GPU
    action: RepairAction
    reason: str  # one sentence for a person
    since: float
    last_at: float
    count: int  # how often it was seen since it began


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The verdict on one GPU: the worst of its faults, and what mends them all."""

    uuid: str
    verdict: GpuVerdict
    action: RepairAction
    check: str = ""  # of the worst fault; empty: healthy; so is the reason
    reason: str = ""
    since: float | None = None  # on the node's clock; None: since it is known
    faults: tuple[HealthFault, ...] = ()  # worst first


@dataclass(frozen=True, slots=True)
class GpuCordon:
    """Why no new allocation goes to a GPU."""

    reason: str  # shown in every refusal
    by_health: bool  # the fleet did it, and undoes it once the GPU is well again
    at: float
    drain_at: float | None = None  # while it is drained: when what it still holds is ended


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
    health: GpuHealth | None = None  # None: its agent has judged nothing yet
    cordon: GpuCordon | None = None  # its own; the node may be cordoned beside it
    assignments: tuple[Assignment, ...] = ()
    mig: GpuMig | None = None  # None: a card without MIG, or not told


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
    drain_at: float | None = None  # while it is drained: when what it still holds is ended
    # Why it is not known what others have handed out, so that no GPU is free; empty: it is known.
    assignments_unknown: str = ""


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


@dataclass(frozen=True, slots=True)
class GpuCondition:
    """One GPU of the fleet: how it is, and what is done about it."""

    node: str
    uuid: str
    index: int  # on its node, in PCI order
    model: str
    pci_bus_id: str  # empty: not known
    health: GpuHealth | None  # None: its agent has judged nothing yet
    cordon: GpuCordon | None
    cordon_withheld: str  # why it is not cordoned though its health calls for it
    allocation_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What the fleet noticed by comparing over time or with peers. It changes nothing by itself."""

    kind: str  # "lemon_gpu", "lemon_slot", "straggler"
    node: str
    gpu_uuid: str  # empty for a slot
    pci_bus_id: str  # empty: not known
    reason: str  # one sentence with the numbers behind it
    since: float
    allocation_id: str  # of a straggler


@dataclass(frozen=True, slots=True)
class FleetHealth:
    """Which GPUs are not well, which are kept from use for it, and what was noticed."""

    gpus: tuple[GpuCondition, ...]  # worst first
    findings: tuple[Finding, ...]
    gpus_total: int
    cordoned_by_health: int
    cordoned_by_health_max: int  # how many may be at one time
    resource_version: int
