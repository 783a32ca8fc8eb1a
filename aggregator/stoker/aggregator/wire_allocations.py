"""Allocations as messages: where they are, and the variables that show a process its devices."""

from collections.abc import Collection

from stoker.aggregator.model import Allocation, AllocationState, Device, Placement
from stoker.aggregator.wire_requests import request_message
from stoker.v1 import types_pb2

ALLOCATION_STATES = {
    AllocationState.WAITING: types_pb2.ALLOCATION_STATE_WAITING,
    AllocationState.GRANTED: types_pb2.ALLOCATION_STATE_GRANTED,
    AllocationState.RELEASING: types_pb2.ALLOCATION_STATE_RELEASING,
    AllocationState.ENDED: types_pb2.ALLOCATION_STATE_ENDED,
}


def environment(allocation: Allocation, placement: Placement) -> dict[str, str]:
    """Return the variables that make a CUDA process see exactly the devices of one placement."""
    uuids = ",".join(device.mig_device_uuid or device.uuid for device in placement.devices)
    variables = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": uuids,
        "NVIDIA_VISIBLE_DEVICES": uuids or "void",
        "STOKER_ALLOCATION_ID": allocation.id,
        "STOKER_NODE": placement.node,
    }
    if allocation.request.is_share:
        device = placement.devices[0]
        variables["STOKER_MEMORY_LIMIT_BYTES"] = str(device.memory_bytes)
        if device.compute_milli is not None:
            # What MPS clients honour; without MPS it is a promise among the tenants.
            variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{device.compute_milli / 10:g}"
    if len(allocation.placements) > 1:
        variables["STOKER_NODES"] = ",".join(allocation.nodes)
        variables["STOKER_NODE_RANK"] = str(allocation.nodes.index(placement.node))
    return variables


def allocation_message(
    allocation: Allocation,
    expires_at: float | None = None,
    queue_position: int | None = None,
    *,
    held_by: Collection[str] = (),
) -> types_pb2.Allocation:
    """Return the allocation as a message; `held_by` are the nodes that said they hold it."""
    placements = allocation.placements
    first = placements[0] if placements else None
    is_gang = len(placements) > 1
    return types_pb2.Allocation(
        id=allocation.id,
        state=ALLOCATION_STATES[allocation.state],
        node=allocation.node,
        devices=[device_message(device) for device in first.devices] if first else (),
        env=environment(allocation, first) if first else None,
        expires_at=expires_at,
        request=request_message(allocation.request),
        requested_at=allocation.requested_at,
        granted_at=allocation.granted_at,
        ended_at=allocation.ended_at,
        ended_reason=allocation.reason,
        queue_position=queue_position,
        resource_version=allocation.version,
        held_by_node=first is not None and all(name in held_by for name in allocation.nodes),
        placements=[
            placement_message(each, environment(allocation, each), is_held=each.node in held_by)
            for each in placements
        ]
        if is_gang
        else (),
    )


def placement_message(
    placement: Placement, env: dict[str, str] | None = None, *, is_held: bool = False
) -> types_pb2.Placement:
    """Return what is, or would be, held on one node as a message."""
    return types_pb2.Placement(
        node=placement.node,
        devices=[device_message(device) for device in placement.devices],
        env=env,
        held_by_node=is_held,
    )


def device_message(device: Device) -> types_pb2.Device:
    """Return the device as a message."""
    return types_pb2.Device(
        uuid=device.uuid,
        model=device.model,
        index=device.index,
        memory_bytes=device.memory_bytes,
        exclusive=device.exclusive,
        compute_milli=device.compute_milli,
        mig_device_uuid=device.mig_device_uuid,
        mig_profile=device.mig_profile,
    )
