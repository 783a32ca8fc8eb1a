"""A plan against the fleet of this instant: what still holds is admitted whole, or not at all."""

from stoker.aggregator.model import Plan
from stoker.aggregator.views import FleetView


def objection(plan: Plan, view: FleetView) -> str:
    """Return why `plan` no longer holds on the fleet as it is now; empty: it holds.

    A planner may have worked on an older view; this is the last look before a grant is durable.
    """
    node = view.nodes.get(plan.node)
    if node is None:
        return f"node {plan.node} is gone"
    if node.node.cordoned is not None:
        return f"node {plan.node} is cordoned: {node.node.cordoned}"
    if node.problem:
        return f"node {plan.node}: {node.problem}"
    if view.now > view.fresh_until.get(plan.node, float("-inf")):
        return f"node {plan.node}: its newest sample is stale"
    gpus = {gpu.gpu.uuid: gpu for gpu in node.gpus}
    for device in plan.devices:
        gpu = gpus.get(device.uuid)
        if gpu is None:
            return f"GPU {device.uuid} is no longer on node {plan.node}"
        if gpu.cordon is not None:
            return f"GPU {device.uuid} on node {plan.node} is cordoned: {gpu.cordon.reason}"
        if device.exclusive and not gpu.is_free:
            return f"GPU {device.uuid} on node {plan.node} is no longer free"
        if not device.exclusive and gpu.room_bytes < device.memory_bytes:
            return (
                f"GPU {device.uuid} on node {plan.node}: wanted {device.memory_bytes} bytes, "
                f"{gpu.room_bytes} are left"
            )
    return ""
