"""The partitions of a GPU as the driver tells them to root, and the steps that change them."""

from dataclasses import dataclass
from enum import StrEnum

from stoker.core.mig.geometry import Geometry, Layout, MigState


@dataclass(frozen=True, slots=True)
class ComputeInstance:
    """A compute instance: with its GPU instance, a MIG device."""

    id: int  # in its GPU instance
    profile_id: int
    compute_slices: int
    start: int  # its first compute slice in the GPU instance
    uuid: str  # of the MIG device; empty: not told


@dataclass(frozen=True, slots=True)
class GpuInstance:
    """A GPU instance; without compute instances it is of no use to anybody."""

    id: int  # in its GPU
    profile_id: int
    profile: str  # "3g.40gb"
    start: int  # its first memory slice
    size: int  # in memory slices
    compute_instances: tuple[ComputeInstance, ...]


@dataclass(frozen=True, slots=True)
class GpuPartitions:
    """One GPU, as it is partitioned now."""

    uuid: str
    index: int
    model: str
    pci_device_id: int  # device and vendor: 0x233010DE
    is_enabled: bool  # MIG mode in force
    is_pending: bool  # MIG mode after the next reset of the GPU
    # Whether a change of mode takes effect at once (Hopper and later) or by a reset (Ampere).
    toggles_at_once: bool
    geometry: Geometry
    instances: tuple[GpuInstance, ...]  # by place


class Activation(StrEnum):
    """What became of a change of mode, as the driver says: not what the call returned."""

    DONE = "done"
    IN_USE = "in_use"  # somebody has the GPU open: the mode is pending
    RESET_REQUIRED = "reset_required"  # the GPU cannot be reset from here (a pass-through VM)


# --- steps: each one call of the helper, in the order in which they are to be done


@dataclass(frozen=True, slots=True)
class SetMode:
    """Turn MIG mode on or off."""

    is_enabled: bool


@dataclass(frozen=True, slots=True)
class DestroyComputeInstance:
    """Take a compute instance away; its MIG device's UUID is gone with it."""

    gpu_instance_id: int
    compute_instance_id: int
    uuid: str


@dataclass(frozen=True, slots=True)
class DestroyGpuInstance:
    """Take a GPU instance away that has no compute instances any more."""

    gpu_instance_id: int
    profile: str
    start: int


@dataclass(frozen=True, slots=True)
class CreateGpuInstance:
    """Make a GPU instance at this place."""

    profile_id: int
    profile: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class CreateComputeInstance:
    """Make a compute instance in the GPU instance that is at this place."""

    start: int  # of the GPU instance: its ID is known once it is made
    profile_id: int
    compute_slices: int


Step = (
    SetMode
    | DestroyComputeInstance
    | DestroyGpuInstance
    | CreateGpuInstance
    | CreateComputeInstance
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a GPU is to get, down to the places; decided once, before the first step."""

    is_enabled: bool
    layout: Layout = ()


@dataclass(frozen=True, slots=True)
class GpuMigStatus:
    """What a node tells of one GPU's partitions and of what is being done to them."""

    gpu_uuid: str
    state: MigState | None = None  # None: nothing was ever declared for it
    reason: str = ""
    config: str = ""  # the name of what is declared
    operation_id: str = ""  # of the newest operation on it
    is_withheld: bool = False  # nothing new may be placed on it
    leave_by: float | None = None  # holders are asked to be gone by then (Unix seconds)
    is_evicting: bool = False  # who is not gone by then is made to go
    # Who is asked, of the allocations on it: those on instances that stay are not.
    leaving_allocation_ids: tuple[str, ...] = ()
    changed_at: float | None = None  # when its partitions were changed last (Unix seconds)
    # None: the node may not read the places of its instances (that takes root, or the helper).
    layout: Layout | None = None
    geometry: Geometry | None = None  # None: a card without MIG, or not told
