"""Why a request waits, or where it would go: everything that a person is told about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stoker.aggregator.model import Allocation, Plan, Refusals, Request
from stoker.aggregator.placing.changes import Keep, Situation
from stoker.aggregator.placing.place import explain
from stoker.aggregator.placing.smallest import Proposal, smallest
from stoker.aggregator.views import FleetView


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to one question."""

    answer: Plan | Refusals
    proposal: Proposal | None = None  # None: it can be placed, or nothing that is looked at helps
    ahead: Sequence[Allocation] = ()  # that compete with it, in the queue's order
    choice: str = ""  # why the place was chosen


def why_not(
    request: Request,
    view: FleetView,
    blocked: Mapping[str, str],
    ahead: Sequence[Allocation],
    keep: Keep,
    competing: Sequence[Allocation] = (),
) -> Explanation:
    """Return why the request cannot be placed now, and the cheapest change that would do it.

    `ahead`: all that go before it; `competing`: those of them that could go to the same nodes.
    """
    refusals = explain(request, view, blocked, len(competing))
    proposal = smallest(situation(request, view, refusals, blocked, ahead, keep))
    return Explanation(refusals, proposal, competing)


def situation(
    request: Request,
    view: FleetView,
    refusals: Refusals,
    blocked: Mapping[str, str],
    ahead: Sequence[Allocation],
    keep: Keep,
) -> Situation:
    """Return what `smallest` goes by; `refusals` are those of the request on this fleet."""
    refused = {refusal.node: refusal for refusal in refusals.nodes}
    able = [name for name in view.nodes if name not in refused]
    return Situation(request, view, refused, blocked, ahead, keep, able)
