"""How a GPU of the fleet is partitioned (MIG), and what is being done about that."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MigInstance:
    """A GPU instance."""

    profile: str  # "2g.20gb"
    start: int  # its first memory slice
    size: int  # in memory slices
    compute: tuple[int, ...] = ()  # compute slices of its parts; empty: one that takes all of it


@dataclass(frozen=True, slots=True)
class GpuMig:
    """The partitions of one GPU; times are Unix seconds."""

    # "pending", "draining", "applying", "rolling-back", "reboot-required", "success", "failed";
    # empty: nothing was ever declared for it.
    state: str
    reason: str  # why it is in this state
    config: str  # the name of what was declared
    operation_id: str  # of the newest operation on it
    is_withheld: bool  # nothing new may be placed on it
    leave_by: float | None  # holders are asked to be gone by then; None: nobody is asked
    is_evicting: bool  # who is not gone by then is made to go
    changed_at: float | None  # when its partitions were changed last; None: not known
    instances: tuple[MigInstance, ...] | None  # by place; None: its node cannot tell the places
