"""Questions about a request, and their answers: where it would go, or why nowhere and what helps.

A question holds the fleet as it was when it was asked, so that it can be answered in a thread of
its own while the fleet goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import Allocation, Plan, Request
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.whatif import Supposition, WhatIf
from stoker.aggregator.placing.why import Explanation, why_not
from stoker.aggregator.queueing import Hosts, kept_for
from stoker.aggregator.views import FleetView

NOTHING_SUPPOSED: Sequence[Supposition] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, of a fleet that does not change any more."""

    request: Request
    view: FleetView
    ahead: Sequence[Allocation]  # what goes before it in the queue, in order
    supposed: Sequence[Supposition] = ()
    plan: Plan | None = None  # where the fleet's own placer would put it
    choice: str = ""  # why there


def ask(
    request: Request,
    fleet: Fleet,
    now: float,
    until: str | None = None,
    supposed: Sequence[Supposition] = NOTHING_SUPPOSED,
    placer: Placer | None = None,
    hosts: Hosts | None = None,
) -> Question:
    """Return the question; for a newcomer, or with `until` for the waiting allocation of that id.

    Where nothing is supposed, the fleet's placer is asked for the place at once: it is quick.
    `hosts` may be kept from question to question, for one and the same fleet.
    """
    view, ahead = fleet.view(now), _ahead(request, fleet.queue(), until)
    if placer is not None and not supposed:
        kept = kept_for(ahead, view, hosts)
        plan = placer.find(request, view, kept)
        if plan is not None:
            choice = _choice(request, plan, view, kept, placer)
            return Question(request, view, ahead, plan=plan, choice=choice)
    return Question(request, _standing_still(view), ahead, supposed)


def answer(question: Question) -> Explanation:
    """Return the answer. Raises UnknownModel and KeyError for a supposition that cannot be."""
    if question.plan is not None:
        return Explanation(question.plan, choice=question.choice)
    request, view = question.request, question.view
    for supposition in question.supposed:
        view = WhatIf(view).suppose(supposition)
    blocked = kept_for(question.ahead, view)
    plan = find_place(request, view, blocked)
    if plan is not None:
        return Explanation(plan, choice="the best fit of the nodes that can host it")
    competing = _competing(request, question.ahead, view)
    return why_not(request, view, blocked, question.ahead, kept_for, competing)


def _ahead(request: Request, queue: Sequence[Allocation], until: str | None) -> list[Allocation]:
    ahead: list[Allocation] = []
    for waiting in queue:
        if waiting.id == until or waiting.request.priority < request.priority:
            break
        ahead.append(waiting)
    return ahead


def _competing(
    request: Request, ahead: Sequence[Allocation], view: FleetView
) -> Sequence[Allocation]:
    """Return those ahead that could go to a node where the request could."""
    hosts = Hosts()
    mine = hosts.of(request, view)
    return [each for each in ahead if not mine.isdisjoint(hosts.of(each.request, view))]


def _choice(
    request: Request, plan: Plan, view: FleetView, kept: Mapping[str, str], placer: Placer
) -> str:
    """Return by which policy the place was chosen, among how many, and which is next."""
    policy = placer.policy_of(view.nodes[plan.node].node.facts.pool)
    ranked = [name for _, name in placer.ranked(request, view, kept)]
    others = [name for name in ranked if name not in {each.node for each in plan.placements}]
    if not others:
        among = "no other node can host it"
    else:
        count = len(others) + len(plan.placements)
        among = f"{count:,} nodes can host it, next would be {others[0]}"
    return f"policy {policy.name} ({policy.summary}); {among}"


def _standing_still(view: FleetView) -> FleetView:
    """Return the fleet as it is now; its nodes and allocations are values, its tables are not."""
    return replace(
        view,
        nodes=dict(view.nodes),
        fresh_until=dict(view.fresh_until),
        statuses=dict(view.statuses),
        allocations=dict(view.allocations),
    )
