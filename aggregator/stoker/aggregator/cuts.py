"""How GPUs are cut up (MIG), who asks for what, and proposals to cut them otherwise: values."""

from dataclasses import dataclass
from enum import StrEnum

from stoker.core.mig.geometry import Geometry, Layout, Placed, Wanted


@dataclass(frozen=True, slots=True)
class PartitioningOptions:
    """How the GPUs of one pool may be cut up by demand."""

    is_automatic: bool = False  # what is proposed is done
    dwell_seconds: float = 600.0  # a GPU that was changed is left alone for so long
    hysteresis_seconds: float = 30.0  # a request must have waited for so long
    whole_gpus_kept: int = 0  # that are free stay so, for requests for whole GPUs


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """A GPU instance, and who uses it."""

    placed: Placed
    allocation_ids: tuple[str, ...] = ()  # that hold a MIG device of it
    # A process, pod or job that is none of ours, or nobody knows whether one is there.
    is_foreign: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether somebody uses it."""
        return self.is_foreign or bool(self.allocation_ids)


@dataclass(frozen=True, slots=True)
class CutGpu:
    """A GPU that can be cut up, as it is now; only such as placement may use and nobody works on.

    Not cordoned, withheld, unhealthy, nor handed out by others.
    """

    node: str
    uuid: str
    index: int
    pool: str
    geometry: Geometry
    is_enabled: bool  # MIG mode in force
    toggles_at_once: bool  # a change of the mode needs no reset of the GPU
    instances: tuple[InstanceUse, ...] = ()  # by place
    is_free: bool = True  # nobody holds it whole, or a share of it, and no process has it open
    changed_at: float | None = None  # its partitions, last (Unix seconds); None: not known


@dataclass(frozen=True, slots=True)
class Demand:
    """A request that waits: for MIG devices, or for whole GPUs."""

    allocation_id: str
    holder: str
    since: float  # waits since then (Unix seconds)
    whole_gpus: int = 0  # of one node; 0: it is for MIG devices
    profile: str = ""  # "1g.10gb"; empty: the smallest that has the next two
    memory_bytes_min: int = 0
    compute_slices_min: int = 0
    count: int = 1  # MIG devices, all on one node
    nodes: frozenset[str] | None = None  # that could host it if they had such devices; None: all


class ProposalKind(StrEnum):
    """What is to become of a GPU."""

    CUT = "cut"  # instances are created; idle ones may go
    MAKE_WHOLE = "make-whole"  # MIG mode is turned off
    DEFRAGMENT = "defragment"  # holders have to move first


@dataclass(frozen=True, slots=True)
class Relocation:
    """A holder that would have to move."""

    allocation_id: str
    from_uuid: str  # of the GPU
    from_placed: Placed
    to_uuid: str
    to_placed: Placed


@dataclass(frozen=True, slots=True)
class Proposal:
    """A GPU that had better be cut up otherwise."""

    kind: ProposalKind
    node: str
    gpu_uuid: str
    gpu_index: int
    wanted: Wanted  # of the whole GPU, what stays included
    layout: Layout  # where that is meant to lie; what is busy lies where it is
    for_allocations: tuple[str, ...]  # that wait for it
    destroys: Layout  # idle instances that go
    blast_radius: tuple[Relocation, ...]  # in the order in which they are to be done
    needs_reset: bool  # a change of the mode takes effect with a reset of the GPU or a reboot
    # It may be done without asking anybody: the pool's options say so, no reset, no relocation.
    is_automatic: bool
    why: str  # what is made, for whom, what stays and what goes; without naming the GPU
