"""What GPUs' health and drains ask of the ledger: reports compared with what it has, as events.

Each function looks at the tables of a draft and returns events that are not there yet; done once
more on what they give, it returns none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from stoker.aggregator import events as e
from stoker.aggregator.conditions import COUNTED_SECONDS
from stoker.aggregator.cordoning import Case, CordonPolicy, Review, cordon_reason, review
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.leaving import evictions
from stoker.aggregator.model import AllocationState
from stoker.aggregator.verdicts import Condition, GpuHealth, by_severity

# A look at so many GPUs that are not well costs next to nothing. Where more are, because something
# judges a whole fleet ill, looks are spaced by so much for each, or they would hold up the loop.
REVIEWED_AT_ONCE = 1_000
SPACED_SECONDS_PER_GPU = 50e-6


@dataclass(slots=True)
class CordonWatch:
    """The policy, and up to where all that it asks for was done; kept from round to round."""

    policy: CordonPolicy = field(default_factory=CordonPolicy)
    version: int = -1  # of the conditions
    due_at: float | None = None
    looked_at: float = float("-inf")
    # Node -> when its verdicts are compared again, as one of them flaps.
    flapping: dict[str, float] = field(default_factory=dict[str, float])

    def next_due(self, fleet: Fleet) -> float | None:
        """Return when cordons are to be looked at, as of the fleet's tables; None: never."""
        due_at = 0.0 if self.version != fleet.conditions.version else self.due_at
        more = len(fleet.conditions.notable) - REVIEWED_AT_ONCE
        if due_at is None or more <= 0:
            return due_at
        return max(due_at, self.looked_at + more * SPACED_SECONDS_PER_GPU)

    def is_due(self, fleet: Fleet, now: float) -> bool:
        """Whether something may have to be cordoned or un-cordoned at `now`."""
        if now < self.looked_at:  # the clock was set back
            self.looked_at = float("-inf")
        due_at = self.next_due(fleet)
        return due_at is not None and due_at <= now


def judgements(
    fleet: Fleet, name: str, policy: CordonPolicy, now: float
) -> Iterator[e.DurableEvent]:
    """Yield what the verdicts of a node change: its report against the ledger's table.

    A verdict that has changed too often within an hour is flapping. Only what is worse is noted
    then, until the hour is over (`settles_at`): the GPU stays as bad as it was found, and the
    ledger does not fill up.
    """
    status = fleet.status(name)
    if name not in fleet.nodes or status.session == 0 or status.health is None:
        return
    slots = {gpu.uuid: gpu.pci_bus_id for gpu in fleet.nodes[name].facts.gpus}
    for uuid, health in status.health.items():
        known = fleet.conditions.get(uuid)
        slot = slots.get(uuid, "")
        if known is not None and _is_known(known, name, slot, health):
            continue
        if known is None or _may_be_noted(known, health, policy, now):
            yield e.GpuHealthChanged(now, name, uuid, slot, health)
    for uuid in fleet.conditions.told_by.get(name, ()):
        known = fleet.conditions.get(uuid)
        if known is None or uuid in status.health or uuid in fleet.homes:
            continue
        if known.cordon is None or known.cordon.by_health:  # an operator's waits for the card
            yield e.GpuForgotten(now, name, uuid)


def settles_at(fleet: Fleet, name: str, now: float) -> float | None:
    """Return when the node's verdicts are to be compared again; None: all that it told is noted.

    To be asked after what `judgements` yields has been applied.
    """
    status = fleet.status(name)
    if status.session == 0:
        return None
    waiting = [
        known.counted_since + COUNTED_SECONDS
        for uuid, health in (status.health or {}).items()
        if (known := fleet.conditions.get(uuid)) is not None
        and not _is_known(known, name, "", health)
    ]
    return min(waiting, default=None)


def review_of(fleet: Fleet, policy: CordonPolicy, now: float) -> Review:
    """Return what is to be cordoned and un-cordoned in the fleet as it is."""
    conditions = fleet.conditions
    notable = (conditions.table[uuid] for uuid in conditions.notable)
    cases = (Case(each, each.uuid in fleet.homes, _heard_at(fleet, each.node)) for each in notable)
    return review(cases, len(fleet.homes), policy, now)


def cordons(found: Review, now: float) -> Iterator[e.DurableEvent]:
    """Yield what the review asks for; what is let go first, so that the share is never exceeded."""
    for condition in found.uncordon:
        yield e.GpuUncordoned(now, condition.node, condition.uuid, by_health=True)
    for condition in found.cordon:
        assert condition.health is not None
        yield e.GpuCordoned(
            now,
            condition.node,
            condition.uuid,
            cordon_reason(condition),
            by_health=True,
            fault=condition.health.fault,
        )


def drained(fleet: Fleet, now: float) -> Iterator[e.DurableEvent]:
    """Yield the end of what is still held where a drain's grace is over."""
    told: set[str] = set()
    for due_at, id_, reason in _drains(fleet):
        if due_at <= now and id_ not in told:
            told.add(id_)
            yield e.AllocationReleasing(now, id_, f"drained: {reason}")


def next_drain(fleet: Fleet) -> float | None:
    """Return when a drain ends something that is held; None: never."""
    return min((due_at for due_at, _, _ in _drains(fleet)), default=None)


def _is_known(known: Condition, node: str, slot: str, health: GpuHealth) -> bool:
    if known.health is None or not known.health.says_the_same_as(health):
        return False
    return known.node == node and slot in ("", known.slot)


def _may_be_noted(known: Condition, health: GpuHealth, policy: CordonPolicy, now: float) -> bool:
    """Whether its verdict may change: it does not flap, or is worse than what is noted."""
    if known.changes < policy.changes_per_hour_max:
        return True
    if not 0.0 <= now - known.counted_since < COUNTED_SECONDS:
        return True
    return by_severity(health.verdict, health.action) < by_severity(known.verdict, known.action)


def _drains(fleet: Fleet) -> Iterator[tuple[float, str, str]]:
    """Yield what is granted where it is drained, or made to go: when it ends, its id, and why."""
    for name, due_at in fleet.drains.items():
        reason = fleet.nodes[name].cordoned or ""
        for id_ in fleet.tenants.get(name, ()):
            if fleet.allocations[id_].state is AllocationState.GRANTED:
                yield due_at, id_, reason
    for uuid, due_at in fleet.conditions.drains.items():
        cordon = fleet.conditions.cordon_of(uuid)
        assert cordon is not None
        for claim in fleet.claims.get(uuid, ()):
            if fleet.allocations[claim.allocation_id].state is AllocationState.GRANTED:
                yield due_at, claim.allocation_id, cordon.reason
    yield from evictions(fleet)


def _heard_at(fleet: Fleet, name: str) -> float | None:
    """Return since when the node's verdicts of its present stream count; None: they do not."""
    status = fleet.status(name)
    return status.health_at if status.session != 0 else None
