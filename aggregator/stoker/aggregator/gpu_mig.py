"""A GPU's partitions (MIG) as its node tells of them, and what is being done to them."""

from collections.abc import Mapping
from dataclasses import dataclass

from stoker.core.mig.geometry import Geometry, Layout, MigState


@dataclass(frozen=True, slots=True)
class GpuMig:
    """The partitions of one GPU. Times are Unix seconds on the aggregator's clock."""

    gpu_uuid: str
    state: MigState | None = None  # None: nothing was ever declared for it
    reason: str = ""
    config: str = ""  # the name of what is declared
    operation_id: str = ""  # of the newest operation on it
    is_withheld: bool = False  # nothing new may be placed on it
    leave_by: float | None = None  # holders are asked to be gone by then; None: nobody is asked
    is_evicting: bool = False  # who is not gone by then is made to go
    leaving: tuple[str, ...] = ()  # ids of the allocations that are asked; others may stay
    changed_at: float | None = None  # when its partitions were changed last; None: not known
    layout: Layout | None = None  # None: its node may not read the places
    geometry: Geometry | None = None  # None: a card without MIG, or not told


ByGpu = Mapping[str, GpuMig]  # by UUID


def withheld(told: ByGpu | None) -> frozenset[str]:
    """Return the GPUs on which nothing new may be placed."""
    return frozenset(uuid for uuid, each in (told or {}).items() if each.is_withheld)


def is_asking(told: ByGpu | None) -> bool:
    """Whether holders of any of these GPUs are asked to be gone."""
    return any(each.leave_by is not None for each in (told or {}).values())


def progress(mig: GpuMig) -> str:
    """Return what is declared and how far it is, in a clause."""
    what = f"its MIG layout {mig.config!r}" if mig.config else "its MIG layout"
    how = "" if mig.state is None else str(mig.state)
    told = ": ".join(each for each in (how, mig.reason) if each)
    return f"{what} is not in place" + (f": {told}" if told else "")


def why_leave(index: int, mig: GpuMig) -> str:
    """Return why holders of a GPU are asked to be gone, naming the operation."""
    what = f"GPU {index} is to be partitioned anew"
    declared = f" as MIG layout {mig.config!r}" if mig.config else ""
    return what + declared + (f" (operation {mig.operation_id})" if mig.operation_id else "")
