"""The aggregator's words as values: nodes, GPUs, allocations, and what a node last reported."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.verdicts import GpuHealth
from stoker.core.units import format_bytes


class AllocationState(StrEnum):
    """The life of an allocation; TRANSITIONS says which step may follow which."""

    WAITING = "waiting"  # in the queue, holds nothing
    GRANTED = "granted"  # holds its devices; durable since before it was acknowledged
    RELEASING = "releasing"  # given up; the node has not yet confirmed that it let go
    ENDED = "ended"  # over, its devices are free


# from -> {to: the events that take it there}; None: it does not exist yet. Ended allocations are
# forgotten in the end. docs/architecture.md draws its diagram from this table.
TRANSITIONS: Mapping[AllocationState | None, Mapping[AllocationState, tuple[str, ...]]] = {
    None: {
        AllocationState.WAITING: ("AllocationRequested",),
        AllocationState.GRANTED: ("AllocationGranted", "AllocationAdopted"),
    },
    AllocationState.WAITING: {
        AllocationState.GRANTED: ("AllocationGranted",),
        AllocationState.ENDED: ("AllocationEnded",),
    },
    AllocationState.GRANTED: {AllocationState.RELEASING: ("AllocationReleasing",)},
    AllocationState.RELEASING: {AllocationState.ENDED: ("AllocationEnded",)},
    AllocationState.ENDED: {},
}


class GpuTopology(StrEnum):
    """How the GPUs of an allocation shall lie to each other on their node."""

    ANY = "any"
    NUMA = "numa"  # all on one memory node of the host
    NVLINK = "nvlink"  # each linked to each by NVLink, directly or through NVSwitches


COMPUTE_MILLI = 1000  # all of a GPU's compute, in thousandths
MIG_ANY = "any"  # the smallest MIG device that has the memory


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for; `wire` makes it from the message and refuses what is out of range.

    Whole GPUs, a share of one GPU (`memory_bytes` and/or `compute_milli`), or MIG devices of one
    node (`mig_profile`). `gpus` is 0 only for replays of recorded workloads, which also have tasks
    that take CPU alone.
    """

    gpus: int  # whole GPUs on each node, or MIG devices; 1 for a share
    holder: str
    ttl_seconds: float
    memory_bytes: int | None = None  # of a share; with `mig_profile`: each at least so many
    # Of a share; alone it takes the same part of the memory. With MIG_ANY: each at least so much.
    compute_milli: int | None = None
    mig_profile: str | None = None  # "1g.10gb", or MIG_ANY
    nodes: int = 1  # more than one: a gang, all or nothing
    cpu_milli: int = 0  # on each node; so is the next
    host_memory_bytes: int = 0
    models: tuple[str, ...] = ()  # any of these; none: any at all
    gpu_memory_min_bytes: int = 0
    compute_capability_min: tuple[int, int] | None = None
    driver_version_min: tuple[int, ...] | None = None
    pool: str | None = None
    node: str | None = None
    host_boot_id: str | None = None  # only nodes under this kernel boot: the caller's own host
    node_labels: Mapping[str, str] | None = None  # only nodes that have these
    gpu_topology: GpuTopology = GpuTopology.ANY
    gpu_topology_required: bool = False  # otherwise it is preferred
    same_label: str | None = None  # of a gang: a node label whose value all nodes share
    same_label_required: bool = False
    service: str | None = None  # what follows speaks of allocations of the same
    anti_affinity: str | None = None  # never on the same "gpu", "node", or value of a node label
    spread: str | None = None  # preferred where fewest are: "gpu", "node", or a node label
    near_service: str | None = None  # preferred on a node where that service is
    preferred_gpu_uuid: str | None = None
    duration_seconds: float | None = None  # expected; None: not known
    movable: bool = False  # its holder agrees to be asked to move
    labels: Mapping[str, str] | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.nodes < 1 or (self.gpus == 0 and self.cpu_milli == 0):
            raise ValueError(f"a request for {self.gpus} GPUs on {self.nodes} nodes")
        most = 1 if self.is_share else self.gpus
        if not self.is_whole and (self.nodes != 1 or not 1 <= self.gpus <= most):
            raise ValueError(f"a part of a GPU on {self.nodes} nodes with {self.gpus} GPUs each")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"a request for {self.memory_bytes} bytes")
        if self.compute_milli is not None and not 0 < self.compute_milli <= COMPUTE_MILLI:
            raise ValueError(f"a request for {self.compute_milli} thousandths of a GPU")

    @property
    def is_share(self) -> bool:
        """Whether it is for a part of one GPU's memory and compute, beside others."""
        if self.mig_profile is not None:
            return False
        return self.memory_bytes is not None or self.compute_milli is not None

    @property
    def is_whole(self) -> bool:
        """Whether it is for whole GPUs."""
        return not self.is_share and self.mig_profile is None

    @property
    def gpus_total(self) -> int:
        """How many GPUs it takes, or takes a part of."""
        return self.gpus * self.nodes

    def is_same_wish(self, other: "Request") -> bool:
        """Whether both ask for the same; no labels and empty labels are the same."""
        mine = replace(self, labels=None, node_labels=None)
        theirs = replace(other, labels=None, node_labels=None)
        return (
            mine == theirs
            and dict(self.labels or {}) == dict(other.labels or {})
            and dict(self.node_labels or {}) == dict(other.node_labels or {})
        )

    def share_bytes(self, usable_bytes: int) -> int:
        """Return the bytes that a share takes of a GPU of which the driver leaves so many."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        assert self.compute_milli is not None, f"no share: {self}"
        return usable_bytes * self.compute_milli // COMPUTE_MILLI

    def described(self) -> str:
        """Return the wish in a few words: `2 x H100-80GB` or `20 GiB of one GPU`."""
        model = " or ".join(self.models) or "GPU"
        if self.mig_profile is not None:
            return f"{'one' if self.gpus == 1 else self.gpus} {self._described_mig()} of a {model}"
        if self.is_share:
            parts = [] if self.memory_bytes is None else [format_bytes(self.memory_bytes)]
            if self.compute_milli is not None:
                parts.append(f"{self.compute_milli / 10:g} % of the compute")
            return f"{' and '.join(parts)} of one {model}"
        if self.gpus == 0:
            return f"{self.cpu_milli / 1000:g} CPUs"
        each = f"{self.gpus} x {model}"
        return each if self.nodes == 1 else f"{self.nodes} nodes with {each} each"

    def _described_mig(self) -> str:
        profile = "MIG device" if self.mig_profile == MIG_ANY else f"MIG {self.mig_profile}"
        if self.gpus > 1:
            profile += "s" if self.mig_profile == MIG_ANY else " devices"
        least = [format_bytes(self.memory_bytes)] if self.memory_bytes else []
        if self.compute_milli is not None:
            least.append(f"{self.compute_milli / 10:g} % of the compute")
        return f"{profile} with {' and '.join(least)}" if least else profile


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, a share of it, or one of its MIG devices, that an allocation holds."""

    uuid: str  # the GPU's
    model: str
    index: int
    memory_bytes: int  # its share, or all of the memory of the GPU or MIG device
    exclusive: bool  # the whole GPU
    compute_milli: int | None = None  # None: none is promised, or all of it (exclusive)
    mig_device_uuid: str = ""  # empty: the GPU itself
    mig_profile: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """What an allocation holds on one node; beside its devices the request's CPU and memory."""

    node: str
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A lease of whole GPUs or of a share, from the moment it is asked for.

    When it expires is not here: keep-alives are not durable (see `Fleet.expires_at`).
    """

    id: str
    state: AllocationState
    request: Request
    requested_at: float
    version: int  # resource version of its last change
    idempotency_key: str = ""
    wait_until: float | None = None  # while waiting: when it gives up
    placements: tuple[Placement, ...] = ()  # one for each node, of a gang several
    granted_at: float | None = None
    ended_at: float | None = None
    reason: str = ""  # why it is being given up, or ended

    @property
    def node(self) -> str:
        """The node that hosts it, the first of a gang's; empty while it waits."""
        return self.placements[0].node if self.placements else ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that host it."""
        return tuple(placement.node for placement in self.placements)

    @property
    def devices(self) -> tuple[Device, ...]:
        """What it holds, on all of its nodes."""
        return tuple(device for placement in self.placements for device in placement.devices)

    def devices_on(self, node: str) -> tuple[Device, ...]:
        """Return what it holds on that node."""
        return next((each.devices for each in self.placements if each.node == node), ())


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A compute instance in a GPU instance of a card in MIG mode."""

    uuid: str  # "MIG-..."
    profile: str  # "1g.10gb"; with a smaller compute instance "1c.2g.20gb"
    memory_total_bytes: int  # of its GPU instance
    gpu_instance_id: int
    compute_instance_id: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """What does not change while a GPU is in its slot."""

    uuid: str
    model: str  # NVML's product name
    index: int  # position in PCI order
    memory_total_bytes: int
    number: int = 0  # the agent's short number in frames
    pci_bus_id: str = ""
    serial: str = ""
    compute_capability: str = ""
    power_limit_watts: float | None = None
    minor_number: int | None = None
    vbios_version: str = ""
    mig_enabled: bool | None = None  # None: the card has no MIG mode
    numa_node: int | None = None  # the host's memory node nearest to it; None: not known
    nvlink_peers: tuple[tuple[str, int], ...] = ()  # GPU UUID, active links to it
    nvswitch_links: int = 0  # active links to NVSwitches
    mig_devices: tuple[MigDevice, ...] = ()  # complete while MIG mode is on


@dataclass(frozen=True, slots=True)
class MissingGpu:
    """A GPU that the driver counts and the node cannot read: out of use until it can."""

    index: int  # position in PCI order
    uuid: str  # empty: nobody ever read it
    error_kind: str  # stable for programs: "driver_timeout", "gpu_lost", "reset_required", ...
    reason: str  # one sentence for a person


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What an agent says of its node at hello; durable, so that a restart knows the fleet."""

    name: str
    incarnation: str
    boot_id: str
    agent_version: str
    simulated: bool
    pool: str = ""
    labels: Mapping[str, str] | None = None
    interval_seconds: float = 1.0
    driver_version: str = ""
    cuda_version: str = ""
    # Also those that cannot be read now: which those are is `NodeStatus.missing`, and not durable.
    gpus: tuple[Gpu, ...] = ()
    cpu_milli: int | None = None  # of the host, in thousandths of a core; None: not known
    host_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the ledger knows it."""

    facts: NodeFacts
    registered_at: float
    version: int
    cordoned: str | None = None  # the operator's reason; None: not cordoned
    drain_at: float | None = None  # while cordoned: when what it still holds is released


@dataclass(frozen=True, slots=True)
class Claim:
    """What one allocation takes of one GPU, from the grant until its node has let go."""

    allocation_id: str
    memory_bytes: int | None  # None: the whole GPU
    compute_milli: int = 0  # that a share was promised
    mig_device_uuid: str = ""  # not empty: that device, and nothing else of the GPU


# Eight of these come with every frame of a node: made as a dataclass they took half of the time
# that the aggregator spends on a frame. They refer to nothing, so the collector can pass them by.
class GpuSample(msgspec.Struct, frozen=True, gc=False):
    """One GPU at one instant; None is "not read" or "not supported", never zero.

    A GPU that could not be read at all has a sample without any fact.
    """

    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    utilization_ratio: float | None = None
    memory_utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    sm_clock_hertz: int | None = None
    memory_clock_hertz: int | None = None
    at: float = 0.0  # on the aggregator's clock

    @property
    def is_read(self) -> bool:
        """Whether the card told anything at all."""
        return (
            self.memory_used_bytes is not None
            or self.utilization_ratio is not None
            or self.temperature_celsius is not None
            or self.power_watts is not None
            or self.memory_reserved_bytes is not None
            or self.memory_utilization_ratio is not None
            or self.energy_joules is not None
            or self.sm_clock_hertz is not None
            or self.memory_clock_hertz is not None
        )


@dataclass(frozen=True, slots=True)
class HeldAllocation:
    """An allocation as a node reports to hold it."""

    id: str
    gpu_uuids: tuple[str, ...]
    memory_bytes: int | None
    holder: str
    ttl_seconds: float
    held_since: float
    is_leaving: bool = False  # the node was told to let go of it, and has not been heard to have
    mig_device_uuids: tuple[str, ...] = ()  # empty: the GPUs themselves
    compute_milli: int | None = None
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    gang_nodes: int = 1  # how many nodes hold a part of it


class DriverState(StrEnum):
    """What the agent says of its driver host."""

    STARTING = "starting"
    READING = "reading"
    BLOCKED = "blocked"
    FAILED = "failed"
    RELEASED = "released"  # on request, until it is told otherwise


@dataclass(frozen=True, slots=True)
class HoldRefusal:
    """The node cannot hold what it was told to hold."""

    allocation_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One numbered report of an agent. None: not in this frame, so not changed or not read."""

    sequence: int  # rising within one incarnation of the agent's journal
    at: float  # node's wall clock
    monotonic_seconds: float
    commands_done: int = 0
    samples: Mapping[str, GpuSample] | None = None  # by UUID
    processes: ProcessTable | None = None
    held: tuple[HeldAllocation, ...] | None = None
    refusals: tuple[HoldRefusal, ...] = ()
    missing: tuple[MissingGpu, ...] | None = None  # told with an inventory, complete
    driver: DriverState | None = None
    driver_reason: str = ""
    health: tuple[GpuHealth, ...] | None = None  # of every GPU, when a verdict changed
    mig: Mapping[str, GpuMig] | None = None  # by UUID, complete, when one changed
    frames_dropped: int = 0


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node last reported; volatile, gone with the aggregator's process."""

    session: int = 0  # which stream; 0: not connected
    disconnected_reason: str = "its agent has not connected since the aggregator started"
    last_frame_at: float | None = None  # aggregator's clock
    last_sample_at: float | None = None  # aggregator's clock, never later than arrival
    samples: Mapping[str, GpuSample] | None = None
    processes: ProcessTable | None = None  # None: not known yet
    held: Mapping[str, HeldAllocation] | None = None  # None: not known yet
    refusals: Mapping[str, str] | None = None  # allocation id -> why the node cannot hold it
    missing: tuple[MissingGpu, ...] = ()  # by the last inventory
    commands_done: int = 0
    driver: DriverState = DriverState.STARTING
    driver_reason: str = ""
    health: Mapping[str, GpuHealth] | None = None  # by UUID; None: not told on this stream yet
    # Since when that is listened to: it was first told on this stream. Aggregator's clock.
    health_at: float | None = None
    mig: Mapping[str, GpuMig] | None = None  # by UUID; None: not told on this stream yet
    frames_dropped: int = 0
    acked_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one node cannot host a request: the filter that said no, what it wanted and found."""

    node: str
    filter: str  # stable name for programs
    reason: str  # one sentence for a person
    wanted: str = ""
    found: str = ""


@dataclass(frozen=True, slots=True)
class Refusals:
    """Why a request cannot be placed now."""

    summary: str
    nodes: tuple[Refusal, ...]
    ahead: int = 0  # requests in the queue before it that compete for the same nodes


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request would go: one placement for each of its nodes."""

    placements: tuple[Placement, ...]

    @property
    def node(self) -> str:
        """The first of its nodes."""
        return self.placements[0].node

    @property
    def devices(self) -> tuple[Device, ...]:
        """What it takes, on all of its nodes."""
        return tuple(device for placement in self.placements for device in placement.devices)


@dataclass(frozen=True, slots=True)
class Command:
    """Told to a node: hold this allocation, or let go of it."""

    id: int  # rising within one stream
    allocation_id: str
    hold: HeldAllocation | None  # None: drop
    reason: str = ""

    @property
    def is_hold(self) -> bool:
        """Whether the node shall hold the allocation; otherwise it shall let go of it."""
        return self.hold is not None
