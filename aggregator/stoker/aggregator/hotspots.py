"""Which shared GPUs are hot, and what each allocation on them brings with it, from live samples.

A GPU's heat is its utilisation or the part of its memory that is in use, whichever is more. How
much of it comes from one allocation is told by its processes as far as memory goes; the driver
does not say whose the utilisation is, so that is split by what was promised. An allocation that was
granted so lately that it may not show in the samples yet counts with what it was promised.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stoker.aggregator.model import Allocation, Claim, GpuSample
from stoker.aggregator.usable import GPU_MILLI
from stoker.aggregator.views import FleetView, GpuView, NodeView

# How long after a grant the work may take to show.
SETTLING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Heat:
    """How busy a GPU is, or how busy an allocation keeps it; thousandths of a GPU."""

    utilization_milli: int
    memory_milli: int

    @property
    def milli(self) -> int:
        """The one of both that is more."""
        return max(self.utilization_milli, self.memory_milli)

    def __add__(self, other: "Heat") -> "Heat":
        return Heat(
            self.utilization_milli + other.utilization_milli,
            self.memory_milli + other.memory_milli,
        )

    def __sub__(self, other: "Heat") -> "Heat":
        return Heat(
            max(0, self.utilization_milli - other.utilization_milli),
            max(0, self.memory_milli - other.memory_milli),
        )

    def described(self) -> str:
        """Return it for a sentence: `96 % busy, 40 % of its memory in use`."""
        return (
            f"{self.utilization_milli / 10:.0f} % busy, "
            f"{self.memory_milli / 10:.0f} % of its memory in use"
        )


NO_HEAT = Heat(0, 0)


def hot_gpus(
    view: FleetView, movable: Collection[str], relieved: Mapping[str, Heat], hot_milli: int
) -> list[tuple[NodeView, GpuView, Heat]]:
    """Return the shared GPUs from which somebody could go and that are hot, the hottest first.

    `relieved`: by GPU UUID what will leave that the samples still show.
    """
    found: list[tuple[NodeView, GpuView, Heat]] = []
    for node in view.nodes.values():
        for gpu in node.gpus:
            # Where one has it alone, it would be as hot elsewhere.
            ids = [claim.allocation_id for claim in gpu.claims]
            heat = measured(node, gpu, view) if len(ids) > 1 else None
            if heat is None or not any(id_ in movable for id_ in ids):
                continue
            heat = heat - relieved.get(gpu.gpu.uuid, NO_HEAT)
            if heat.milli >= hot_milli:
                found.append((node, gpu, heat))
    found.sort(key=lambda one: -one[2].milli)  # equal ones in the nodes' order
    return found


def measured(node: NodeView, gpu: GpuView, view: FleetView) -> Heat | None:
    """Return the GPU's heat by its newest sample; None: that is stale, or does not tell."""
    status = view.statuses.get(node.name)
    if status is None or view.now > view.fresh_until.get(node.name, float("-inf")):
        return None
    samples: Mapping[str, GpuSample] = status.samples or {}
    sample = samples.get(gpu.gpu.uuid)
    if sample is None or sample.utilization_ratio is None or sample.memory_used_bytes is None:
        return None
    return Heat(
        round(sample.utilization_ratio * GPU_MILLI),
        sample.memory_used_bytes * GPU_MILLI // gpu.gpu.memory_total_bytes,
    )


def expected(node: NodeView, gpu: GpuView, view: FleetView) -> Heat | None:
    """Return the GPU's heat with what will show soon; None: its newest sample does not tell."""
    now = measured(node, gpu, view)
    if now is None:
        return None
    soon = NO_HEAT
    for claim in gpu.claims:
        if _is_settling(view.allocations.get(claim.allocation_id), view.now):
            soon = soon + promised(claim, gpu)
    return now + soon


def brought_by(id_: str, node: NodeView, gpu: GpuView, view: FleetView) -> Heat | None:
    """Return what the allocation adds to the GPU's heat; None: the samples do not tell yet."""
    now = measured(node, gpu, view)
    mine = next((claim for claim in gpu.claims if claim.allocation_id == id_), None)
    if now is None or mine is None or _is_settling(view.allocations.get(id_), view.now):
        return None
    weight = sum(max(1, promised(claim, gpu).utilization_milli) for claim in gpu.claims)
    promise = promised(mine, gpu)
    utilization = now.utilization_milli * max(1, promise.utilization_milli) // weight
    used = _used_bytes(id_, node, gpu, view)
    if used is None:
        return Heat(utilization, min(promise.memory_milli, now.memory_milli))
    total = gpu.gpu.memory_total_bytes
    return Heat(utilization, min(used * GPU_MILLI // total, now.memory_milli))


def promised(claim: Claim, gpu: GpuView) -> Heat:
    """Return what the allocation may make of the GPU at most, as far as it was told a limit."""
    memory = claim.memory_bytes
    total = gpu.gpu.memory_total_bytes
    part = GPU_MILLI if memory is None else memory * GPU_MILLI // total
    return Heat(claim.compute_milli or part, part)


def _is_settling(allocation: Allocation | None, now: float) -> bool:
    if allocation is None or allocation.granted_at is None:
        return False
    return now - allocation.granted_at < SETTLING_SECONDS


def _used_bytes(id_: str, node: NodeView, gpu: GpuView, view: FleetView) -> int | None:
    """Return the memory that the allocation's processes hold on the GPU; None: not told."""
    status = view.statuses.get(node.name)
    if status is None or status.processes is None:
        return None
    used = 0
    for process in status.processes.processes:
        if process.gpu_uuid == gpu.gpu.uuid and process.allocation_id == id_:
            if process.memory_used_bytes is None:
                return None
            used += process.memory_used_bytes
    return used
