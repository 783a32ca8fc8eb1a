"""Suppositions from messages, and explanations to messages; raises Malformed with the path."""

from collections.abc import Callable, Sequence
from typing import assert_never

from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Allocation, Plan, Refusals
from stoker.aggregator.placing.smallest import Proposal
from stoker.aggregator.placing.whatif import (
    AddNodes,
    RemoveNode,
    Supposition,
    Uncordon,
    cordoned_gpus,
)
from stoker.aggregator.placing.why import Explanation
from stoker.aggregator.views import FleetView, describe_placements
from stoker.aggregator.wire_allocations import placement_message
from stoker.aggregator.wire_fleet import refusals_message
from stoker.aggregator.wire_requests import request_message
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.v1 import placing_pb2

WHAT_IFS_MAX = 16
NODES_ADDED_MAX = 1_000
AHEAD_MAX = 100  # of those ahead that are told of


def read_what_ifs(
    messages: Sequence[placing_pb2.WhatIf], view: FleetView, check_model: Callable[[str, str], None]
) -> list[Supposition]:
    """Return what to suppose of this fleet; `check_model` raises Malformed for a path and a name.

    Raises Malformed, also for a node that is not there, or that was supposed away before.
    """
    if len(messages) > WHAT_IFS_MAX:
        raise Malformed("what_if", f"at most {WHAT_IFS_MAX} changes, found {len(messages)}")
    gone: set[str] = set()
    found: list[Supposition] = []
    for place, message in enumerate(messages):
        path = f"what_if[{place}]"
        match message.WhichOneof("change"):
            case "add":
                check_model(f"{path}.add.model", message.add.model)
                found.append(_read_add(message.add, f"{path}.add"))
            case "remove_node":
                name = _known(message.remove_node, f"{path}.remove_node", view, gone)
                gone.add(name)
                found.append(RemoveNode(name))
            case "uncordon_node":
                name = _known(message.uncordon_node, f"{path}.uncordon_node", view, gone)
                found.append(Uncordon(name, cordoned_gpus(view.nodes[name])))
            case _:
                raise Malformed(path, "must add nodes, remove a node or uncordon one")
    return found


def explanation_message(explained: Explanation) -> placing_pb2.ExplainResponse:
    """Return the explanation as a message."""
    match explained.answer:
        case Plan(placements):
            return placing_pb2.ExplainResponse(
                placeable=True,
                node=explained.answer.node,
                summary=f"it would be placed on {describe_placements(placements)}",
                placements=[placement_message(each) for each in placements],
                choice=explained.choice,
            )
        case Refusals(summary):
            proposal = explained.proposal
            return placing_pb2.ExplainResponse(
                refusals=refusals_message(explained.answer),
                summary=summary,
                change=None if proposal is None else _change(proposal),
                ahead=[_ahead(each) for each in explained.ahead[:AHEAD_MAX]],
            )
        case _:
            assert_never(explained.answer)


def _read_add(message: placing_pb2.AddNodes, path: str) -> AddNodes:
    return AddNodes(
        int(limits.number(message.nodes, f"{path}.nodes", 1, NODES_ADDED_MAX)),
        int(limits.number(message.gpus, f"{path}.gpus", 1, GPUS_PER_NODE_MAX)),
        limits.text(message.model, f"{path}.model", required=True),
        limits.text(message.pool, f"{path}.pool"),
    )


def _known(value: str, path: str, view: FleetView, gone: set[str]) -> str:
    name = limits.dns_name(value, path)
    if name not in view.nodes:
        raise Malformed(path, f"there is no node {name}")
    if name in gone:
        raise Malformed(path, f"node {name} is supposed to be removed already")
    return name


def _change(proposal: Proposal) -> placing_pb2.ProposedChange:
    change = proposal.change
    return placing_pb2.ProposedChange(
        kind=change.kind,
        summary=change.summary,
        request=None if change.supposed is not None else request_message(change.request),
        node=change.node,
        gpu_uuids=change.gpu_uuids,
        allocation_ids=change.allocation_ids,
        placements=[placement_message(each) for each in proposal.plan.placements],
    )


def _ahead(waiting: Allocation) -> placing_pb2.RequestAhead:
    return placing_pb2.RequestAhead(
        allocation_id=waiting.id,
        holder=waiting.request.holder,
        wanted=waiting.request.described(),
        priority=waiting.request.priority,
        requested_at=waiting.requested_at,
    )
