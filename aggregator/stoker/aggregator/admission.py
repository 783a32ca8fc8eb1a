"""A plan against the fleet of this instant: what still holds is admitted whole, or not at all."""

from stoker.aggregator.model import Device, Placement, Plan, Request
from stoker.aggregator.views import FleetView, GpuView


def objection(plan: Plan, request: Request, view: FleetView) -> str:
    """Return why `plan` no longer holds on the fleet as it is now; empty: it holds.

    A planner may have worked on an older view; this is the last look before a grant is durable.
    """
    for placement in plan.placements:
        why_not = _of_node(placement, request, view)
        if why_not:
            return why_not
    return ""


def _of_node(placement: Placement, request: Request, view: FleetView) -> str:
    name = placement.node
    node = view.nodes.get(name)
    if node is None:
        return f"node {name} is gone"
    if node.node.cordoned is not None:
        return f"node {name} is cordoned: {node.node.cordoned}"
    if node.problem:
        return f"node {name}: {node.problem}"
    if view.now > view.fresh_until.get(name, float("-inf")):
        return f"node {name}: its newest sample is stale"
    if request.cpu_milli > (node.cpu_free_milli or 0):
        return f"node {name}: wanted {request.cpu_milli} milli of CPU, found {node.cpu_free_milli}"
    if request.host_memory_bytes > (node.host_memory_free_bytes or 0):
        found = node.host_memory_free_bytes
        return f"node {name}: wanted {request.host_memory_bytes} bytes of its memory, found {found}"
    for device in placement.devices:
        gpu = next((each for each in node.gpus if each.gpu.uuid == device.uuid), None)
        if gpu is None:
            return f"GPU {device.uuid} is no longer on node {name}"
        why_not = _of_gpu(device, gpu)
        if why_not:
            return f"GPU {device.uuid} on node {name}{why_not}"
    return ""


def _of_gpu(device: Device, gpu: GpuView) -> str:
    if gpu.cordon is not None:
        return f" is cordoned: {gpu.cordon.reason}"
    if gpu.is_withheld:
        return " is withheld until it is partitioned"
    if device.exclusive:
        return "" if gpu.is_free else " is no longer free"
    if device.mig_device_uuid:
        if any(each.uuid == device.mig_device_uuid for each in gpu.mig_free):
            return ""
        return f" has no free MIG device {device.mig_device_uuid}"
    if gpu.room_bytes < device.memory_bytes:
        return f": wanted {device.memory_bytes} bytes, {gpu.room_bytes} are left"
    if gpu.compute_free_milli < (device.compute_milli or 0):
        return (
            f": wanted {device.compute_milli} thousandths of its compute, "
            f"{gpu.compute_free_milli} are left"
        )
    return ""
