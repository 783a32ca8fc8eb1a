"""Who is asked to give a GPU back because it is to be partitioned anew, and until when.

The node asks; what it asks for is not durable here, and is told anew with every stream. Where it
evicts, what is still held when the time is over is released, durably, as a drain does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from stoker.aggregator.gpu_mig import GpuMig, why_leave
from stoker.aggregator.model import Allocation, AllocationState, Claim, Node, NodeStatus


class Tables(Protocol):
    """What is looked at of the fleet."""

    @property
    def nodes(self) -> Mapping[str, Node]: ...
    @property
    def allocations(self) -> Mapping[str, Allocation]: ...
    @property
    def claims(self) -> Mapping[str, tuple[Claim, ...]]: ...
    @property
    def leaving(self) -> set[str]: ...
    def status(self, node: str) -> NodeStatus: ...


@dataclass(frozen=True, slots=True)
class Leave:
    """What a holder is asked."""

    reason: str  # a sentence for a person
    leave_by: float  # Unix seconds
    is_evicting: bool  # it is ended then


def leave_of(fleet: Tables, allocation: Allocation) -> Leave | None:
    """Return what the holder of an allocation is asked, the soonest first; None: nothing."""
    if allocation.state is not AllocationState.GRANTED:
        return None
    asked: list[Leave] = []
    for placement in allocation.placements:
        if placement.node not in fleet.leaving:
            continue
        told = fleet.status(placement.node).mig or {}
        for uuid, index in {device.uuid: device.index for device in placement.devices}.items():
            mig = told.get(uuid)
            if mig is not None and mig.leave_by is not None and allocation.id in mig.leaving:
                reason = f"{why_leave(index, mig)} on node {placement.node}"
                asked.append(Leave(reason, mig.leave_by, mig.is_evicting))
    return min(asked, key=lambda each: each.leave_by, default=None)


def evictions(fleet: Tables) -> Iterator[tuple[float, str, str]]:
    """Yield what is granted on GPUs that are being cleared: when it ends, its id, and why.

    A node that cannot be heard may have been told otherwise meanwhile: nobody is made to go there.
    """
    for name in fleet.leaving:
        status = fleet.status(name)
        if status.session == 0:
            continue
        for mig in (status.mig or {}).values():
            if mig.is_evicting and mig.leave_by is not None:
                yield from _held(fleet, name, mig, mig.leave_by)


def _held(
    fleet: Tables, node: str, mig: GpuMig, leave_by: float
) -> Iterator[tuple[float, str, str]]:
    gpus = fleet.nodes[node].facts.gpus
    index = next((gpu.index for gpu in gpus if gpu.uuid == mig.gpu_uuid), None)
    if index is None:
        return
    for claim in fleet.claims.get(mig.gpu_uuid, ()):
        allocation = fleet.allocations[claim.allocation_id]
        if claim.allocation_id in mig.leaving and allocation.state is AllocationState.GRANTED:
            yield leave_by, claim.allocation_id, why_leave(index, mig)
