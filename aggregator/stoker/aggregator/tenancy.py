"""Who holds what on a node, and who speaks for a node that is called otherwise by now.

A host that was renamed is another node for the ledger, and the same agent: the journal under the
new name holds what was granted under the old one, so its report speaks for both.
"""

from collections.abc import Mapping
from typing import Protocol

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
    def tenants(self) -> Mapping[str, tuple[str, ...]]: ...
    def status(self, node: str) -> NodeStatus: ...


def allocations_on(fleet: Tables, node: str) -> dict[str, Allocation]:
    """Return by id what the node shall hold or let go of: granted and releasing.

    Also what it shall let go of that was granted under a former name of the node.
    """
    own = {id_: fleet.allocations[id_] for id_ in fleet.tenants.get(node, ())}
    former = granted_under_former_name(fleet, node)
    return own | {a.id: a for a in former if a.state is AllocationState.RELEASING}


def granted_under_former_name(fleet: Tables, node: str) -> list[Allocation]:
    """Return what is granted on GPUs of the node under another name that its agent had."""
    agent = fleet.nodes[node].facts
    found: dict[str, Allocation] = {}
    for claim in (c for gpu in agent.gpus for c in fleet.claims.get(gpu.uuid, ())):
        allocation = fleet.allocations[claim.allocation_id]
        for name in allocation.nodes:
            is_same_agent = (
                name != node and fleet.nodes[name].facts.incarnation == agent.incarnation
            )
            if is_same_agent and fleet.status(name).session == 0:
                found[allocation.id] = allocation
    return list(found.values())


def voice_of(fleet: Tables, node: str) -> str:
    """Return the node that speaks for it: itself, or what its agent is called by now."""
    if fleet.status(node).session != 0 or node not in fleet.nodes:
        return node
    incarnation = fleet.nodes[node].facts.incarnation
    for name, other in fleet.nodes.items():
        if other.facts.incarnation == incarnation and fleet.status(name).session != 0:
            return name
    return node
