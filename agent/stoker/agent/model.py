"""What a node tells about itself: who it is, what it holds, and the frames that carry it.

Times (`at`) are Unix seconds on the node's own clock; `monotonic_seconds` is the clock that never
goes back, whose differences alone mean something. `None` means absent: not read, or not known.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from stoker.agent.owners import NOBODY, Assignment, Owner
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import GpuFault, GpuIdentity, GpuSample, MigDeviceIdentity
from stoker.agent.telemetry import GpuTelemetry, XidCount
from stoker.agent.verdicts import GpuHealth, KernelLogPosition, KernelLogStatus

COMPUTE_MILLI = 1000  # all of a GPU's compute, in thousandths


@dataclass(frozen=True, slots=True)
class Host:
    """What a host has beside its GPUs."""

    cpu_milli: int  # CPUs that processes may run on, in thousandths of a core
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who the agent is; fixed while its process lives."""

    node: str
    agent_version: str
    boot_id: str
    simulated: bool
    pool: str
    labels: Mapping[str, str]
    interval_seconds: float
    process_id: str  # random for every start of the process
    host: Host | None = None  # None: it cannot be told


@dataclass(frozen=True, slots=True)
class HeldAllocation:
    """An allocation that this node holds, or is told to hold."""

    id: str
    gpu_uuids: tuple[str, ...]
    memory_bytes: int | None  # a share of one GPU; None: exclusive
    holder: str
    ttl_seconds: float
    held_since: float  # when the node began to hold it
    is_leaving: bool = False  # told to let go of it; only what is reported says so
    mig_device_uuids: tuple[str, ...] = ()  # of those GPUs; empty: the GPUs themselves
    compute_milli: int | None = None  # of a share; None: none is promised
    cpu_milli: int = 0
    host_memory_bytes: int = 0
    gang_nodes: int = 1  # that hold a part of the allocation, this one included

    @property
    def is_whole(self) -> bool:
        """Whether the GPUs are its alone."""
        return self.memory_bytes is None and not self.mig_device_uuids

    def is_same_as(self, other: "HeldAllocation") -> bool:
        """Whether both are the same claim on the same devices; since when does not matter."""
        return self.claim == other.claim

    @property
    def claim(self) -> tuple[object, ...]:
        """What it takes, in a form that can be compared."""
        devices = (sorted(self.gpu_uuids), sorted(self.mig_device_uuids))
        shares = (self.memory_bytes, self.compute_milli, self.cpu_milli, self.host_memory_bytes)
        return (self.id, devices, shares)


@dataclass(frozen=True, slots=True)
class Hold:
    """A command: hold this allocation from now on."""

    allocation: HeldAllocation


@dataclass(frozen=True, slots=True)
class Drop:
    """A command: let go of this allocation."""

    allocation_id: str
    reason: str


Command = Hold | Drop


@dataclass(frozen=True, slots=True)
class HoldRefusal:
    """Why the node cannot hold what it was told to hold."""

    allocation_id: str
    reason: str


class DriverState(StrEnum):
    """Whether the GPUs of the node can be read."""

    STARTING = "starting"
    READING = "reading"
    BLOCKED = "blocked"  # a call did not return in time
    FAILED = "failed"  # there is no driver, or it does not answer sensibly
    RELEASED = "released"  # let go of, because somebody asked for it


@dataclass(frozen=True, slots=True)
class DriverStatus:
    """The driver as the agent sees it, and how often its host process had to be started anew."""

    state: DriverState
    reason: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Release:
    """Somebody wants the driver let go of: no handle open, nothing read."""

    at: float
    until: float | None  # on the wall clock; None: until it is resumed
    by: str

    def is_over(self, now: float) -> bool:
        """Whether its time has come to an end."""
        return self.until is not None and now >= self.until


@dataclass(frozen=True, slots=True)
class NumberedGpu:
    """A GPU with the short number that frames use for it."""

    number: int
    identity: GpuIdentity


@dataclass(frozen=True, slots=True)
class NumberedInventory:
    """The GPUs of the node."""

    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[NumberedGpu, ...]
    missing: tuple[GpuFault, ...] = ()  # counted by the driver, and not to be read
    nvml_version: str | None = None
    host: Host | None = None  # None: it cannot be told

    @property
    def uuids(self) -> set[str]:
        """Those that can be read."""
        return {gpu.identity.uuid for gpu in self.gpus}

    @property
    def partitioned(self) -> set[str]:
        """Those in MIG mode."""
        return {gpu.identity.uuid for gpu in self.gpus if gpu.identity.mig_enabled}

    def gpu(self, uuid: str) -> GpuIdentity | None:
        """Return the GPU of that UUID, if the node has it."""
        return next((gpu.identity for gpu in self.gpus if gpu.identity.uuid == uuid), None)

    def mig_devices(self, uuid: str) -> tuple[MigDeviceIdentity, ...]:
        """Return the MIG devices of the GPU of that UUID."""
        gpu = self.gpu(uuid)
        return () if gpu is None else gpu.mig_devices


@dataclass(frozen=True, slots=True)
class NumberedSample:
    """A sample of the GPU with that number."""

    number: int
    sample: GpuSample


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """A process with a context on a GPU, and what tells whose it is."""

    gpu_uuid: str
    pid: int
    user: str = ""  # empty: it cannot be seen
    command: str = ""  # empty: it cannot be seen
    memory_used_bytes: int | None = None
    started_at: float | None = None
    # The allocation that its environment names; None: it names none, or it cannot be seen.
    claimed_allocation_id: str | None = None
    owner: Owner = NOBODY  # beyond its user
    gpu_instance_id: int | None = None  # of MIG; None: the whole GPU, several, or not told


@dataclass(frozen=True, slots=True)
class AttributedProcess:
    """A process and the allocation it belongs to; an empty id: none of ours."""

    process: ProcessSeen
    allocation_id: str


@dataclass(frozen=True, slots=True)
class ProcessTable:
    """The processes on the node's GPUs; complete, but for the GPUs that could not be read."""

    started_at: float  # when reading began: what started later is not in it
    processes: tuple[AttributedProcess, ...]
    unread_gpu_uuids: tuple[str, ...]
    assignments: tuple[Assignment, ...] = ()  # what others have handed out, idle or not
    assignments_unknown: str = ""  # why that is not known; empty: it is

    def unread_with(self, uuids: Iterable[str]) -> tuple[str, ...]:
        """Return the GPUs whose processes are not known, with further ones."""
        return tuple(sorted({*self.unread_gpu_uuids, *uuids}))

    def says_the_same_as(self, other: "ProcessTable | None") -> bool:
        """Whether nothing but the time of reading differs."""
        return other is not None and self == replace(other, started_at=self.started_at)


@dataclass(frozen=True, slots=True)
class Frame:
    """One numbered report. What is absent has not changed; absent samples were not read."""

    sequence: int
    at: float
    monotonic_seconds: float
    samples: tuple[NumberedSample, ...] = ()
    processes: ProcessTable | None = None
    held: tuple[HeldAllocation, ...] | None = None
    refusals: tuple[HoldRefusal, ...] = ()
    inventory: NumberedInventory | None = None
    driver: DriverStatus | None = None
    health: tuple[GpuHealth, ...] | None = None
    frames_dropped: int = 0  # since the process started
    commands_done: int = 0  # every command of this stream up to this one is carried out or refused
    mig: tuple[GpuMigStatus, ...] | None = None

    @property
    def is_telemetry_only(self) -> bool:
        """Whether it can be left out without leaving a wrong picture."""
        parts = (self.processes, self.held, self.inventory, self.driver, self.health, self.mig)
        return not self.refusals and all(part is None for part in parts)

    def only_telemetry(self) -> "Frame":
        """Return the frame without what only the stream that it was made for may say."""
        return replace(
            self,
            processes=None,
            held=None,
            refusals=(),
            inventory=None,
            driver=None,
            health=None,
            commands_done=0,
            mig=None,
        )

    def merged_into(self, later: "Frame") -> "Frame":
        """Return the later frame, with what it does not itself tell anew."""
        return replace(
            later,
            processes=later.processes or self.processes,
            held=self.held if later.held is None else later.held,
            refusals=self.refusals + later.refusals,
            inventory=later.inventory or self.inventory,
            driver=later.driver or self.driver,
            health=self.health if later.health is None else later.health,
            mig=self.mig if later.mig is None else later.mig,
        )


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on every stream.

    `held` is all that the aggregator must still reckon with: what the node holds, what it is just
    noting down, and what it has let go of without having been able to say so.
    """

    identity: NodeIdentity
    incarnation: str
    monotonic_seconds: float
    first_sequence: int
    inventory: NumberedInventory | None
    held: tuple[HeldAllocation, ...]


@dataclass(frozen=True, slots=True)
class CollectorStatus:
    """How the newest run of one of the agent's readers went.

    `None`: it has not run yet, or its runs are suspended because the driver is released.
    """

    succeeded: bool | None = None
    duration_seconds: float | None = None
    last_success_at: float | None = None  # Unix seconds


@dataclass(frozen=True, slots=True)
class NodeView:
    """Everything that readers of the state may see, at one moment."""

    identity: NodeIdentity
    incarnation: str
    inventory: NumberedInventory | None
    # Of the newest sampling tick; empty when it failed.
    samples: tuple[GpuSample, ...]
    telemetry: tuple[GpuTelemetry, ...]  # all that those GPUs told, and what was made of it
    xids: Mapping[str, Mapping[int, XidCount]]  # since the agent started; by UUID, by number
    # How often reading a fact failed since the agent started, by fact and kind of error.
    read_failures: Mapping[tuple[str, str], int]
    processes: ProcessTable | None
    processes_monotonic_seconds: float | None  # when they were told; None: they are not known
    held: tuple[HeldAllocation, ...]
    ending: frozenset[str]  # held, told to let go, not yet verified
    driver: DriverStatus
    connected: bool
    outbox_frames: int
    frames_dropped: int
    samples_total: int
    sample_failures: Mapping[str, int]  # by kind
    last_success_at: float | None  # when a sampling tick was last answered
    last_success_monotonic_seconds: float | None
    # GPUs that told nothing in the newest sampling tick, by UUID: why.
    unread: Mapping[str, str] = field(default_factory=dict[str, str])
    release: Release | None = None  # while the driver is to be let go of
    # Why a restart would not find the driver released (or resumed) as it is; empty: it would.
    release_unsaved: str = ""
    health: tuple[GpuHealth, ...] = ()  # of every GPU that is known of, in no order
    health_unsaved: str = ""  # why a restart would judge otherwise; empty: it would not
    kernel_log: KernelLogStatus = field(default_factory=KernelLogStatus)
    kernel_log_position: KernelLogPosition | None = None  # up to where it is remembered
    # Memory in use on a GPU that no process accounts for, by UUID; absent: it cannot be told.
    memory_unattributed_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    mig: tuple[GpuMigStatus, ...] = ()  # of the GPUs that can be partitioned, as far as is known
