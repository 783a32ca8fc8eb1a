"""Which GPUs are kept from use for their health, and which of them may be used again.

The rules. A GPU is cordoned by itself when its verdict reaches the bar (`cordon_at`), and never
more of them at one time than a share of the fleet: when something judges everything ill, the judge
is ill. Those cordoned stay so while a worse one is found: to trade one for another would put a bad
GPU back to use. Among those found together the worst goes first, then the one that has been so
longest. When the fleet shrinks so that more are cordoned than the share, the least bad are let go
in the next round: no round leaves more than the share, whatever was done when there were more GPUs.

A cordon by health is undone once the verdict has been below the bar for a while and nobody judges
it otherwise, and when the card is gone. One that an operator made is never touched; where an
operator undid one, the same fault (check and since) is no reason any more.

Nothing is decided on what a node told before it was lost: until its agent has judged its GPUs anew,
cordons of its GPUs stay as they are.
"""

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stoker.aggregator.verdicts import (
    ACTION_RANK,
    Condition,
    GpuCordon,
    RepairAction,
    Verdict,
    by_severity,
)


class CordonAt(StrEnum):
    """From which verdict on a GPU is cordoned by itself."""

    UNHEALTHY = "unhealthy"
    DEGRADED = "degraded"  # also these, where it is to be drained or more


@dataclass(frozen=True, slots=True)
class CordonPolicy:
    """When GPUs are cordoned for their health, how many at one time, and for how long."""

    cordon_at: CordonAt = CordonAt.UNHEALTHY
    share_max: float = 0.2  # of all GPUs of the fleet
    gpus_min: int = 1  # so many may be, however small the fleet
    uncordon_after_seconds: float = 60.0
    changes_per_hour_max: int = 30  # of one GPU's verdict; more is flapping

    def limit(self, gpus_total: int) -> int:
        """Return how many GPUs may be cordoned for their health in a fleet of so many."""
        # What is a whole number but for the rounding of floats counts as that number.
        return max(self.gpus_min, math.floor(self.share_max * gpus_total + 1e-9))

    def is_at_bar(self, condition: Condition) -> bool:
        """Whether the verdict calls for a cordon."""
        if condition.verdict is Verdict.UNHEALTHY:
            return True
        is_degraded = condition.verdict is Verdict.DEGRADED
        if self.cordon_at is CordonAt.UNHEALTHY or not is_degraded:
            return False
        return ACTION_RANK[condition.action] >= ACTION_RANK[RepairAction.DRAIN]

    def is_well(self, condition: Condition) -> bool:
        """Whether the verdict says that it may be used; one that is not known does not."""
        is_judged = condition.health is not None and condition.verdict is not Verdict.UNKNOWN
        return is_judged and not self.is_at_bar(condition)


@dataclass(frozen=True, slots=True)
class Case:
    """One GPU with which something is wrong or about which something was done."""

    condition: Condition
    is_listed: bool  # a node of the fleet has it
    heard_at: float | None  # since when its node's verdicts count, on this stream; None: not yet


@dataclass(frozen=True, slots=True)
class Review:
    """What is to be done now."""

    cordon: tuple[Condition, ...] = ()  # also those whose cordon names a fault that has changed
    uncordon: tuple[Condition, ...] = ()
    # Why a GPU that is at the bar is not cordoned, by UUID.
    withheld: Mapping[str, str] = field(default_factory=dict[str, str])
    withheld_for_share: int = 0  # how many of these because so many are cordoned already
    due_at: float | None = None  # when time alone changes this; None: never


def review(cases: Iterable[Case], gpus_total: int, policy: CordonPolicy, now: float) -> Review:
    """Return which GPUs to cordon and un-cordon at `now`, and why some are not.

    All may be ill at once, so only those are put in order between which there is a choice.
    """
    limit = policy.limit(gpus_total)
    standing: list[Case] = []
    asking: list[Case] = []
    uncordon: list[Condition] = []
    due: list[float] = []
    withheld: dict[str, str] = {}
    for case in cases:
        condition, cordon = case.condition, case.condition.cordon
        if cordon is not None and cordon.by_health:
            well_at = _well_at(case, policy)
            if not case.is_listed or (well_at is not None and well_at <= now):
                uncordon.append(condition)
                continue
            standing.append(case)
            if well_at is not None:
                due.append(well_at)
        elif cordon is None and policy.is_at_bar(condition) and case.is_listed:
            why_not = _why_not(case)
            if why_not:
                withheld[condition.uuid] = why_not
            else:
                asking.append(case)
    standing.sort(key=_worst_first)
    uncordon += [case.condition for case in standing[limit:]]
    room = max(0, limit - len(standing))
    chosen = [case.condition for case in heapq.nsmallest(room, asking, key=_worst_first)]
    if len(chosen) < len(asking):
        is_spent = dict.fromkeys(
            (case.condition.uuid for case in asking), _share_is_spent(limit, gpus_total, policy)
        )
        for condition in chosen:
            del is_spent[condition.uuid]
        withheld |= is_spent
    renamed = (case.condition for case in standing[:limit] if _names_another_fault(case, policy))
    return Review(
        cordon=(*chosen, *renamed),
        uncordon=tuple(uncordon),
        withheld=withheld,
        withheld_for_share=len(asking) - len(chosen),
        due_at=min(due, default=None),
    )


def cordon_reason(condition: Condition) -> str:
    """Return what refusals say of a GPU that is cordoned for its health."""
    health = condition.health
    assert health is not None, f"{condition} is cordoned for a health that nobody judged"
    return health.reason or f"{health.verdict}: {health.check or 'no reason given'}"


def _worst_first(case: Case) -> tuple[tuple[int, int], float, str]:
    condition = case.condition
    severity = by_severity(condition.verdict, condition.action)
    return (severity, condition.changed_at, condition.uuid)


def _well_at(case: Case, policy: CordonPolicy) -> float | None:
    """Return when it has been well for long enough; None: it is not well, or nobody knows."""
    is_well = policy.is_well(case.condition) or _is_left_with_what_is_known(case.condition)
    if case.heard_at is None or not is_well:
        return None
    return max(case.condition.changed_at, case.heard_at) + policy.uncordon_after_seconds


def _is_left_with_what_is_known(condition: Condition) -> bool:
    """Whether what it was cordoned for is over, and an operator wants no cordon for the rest."""
    health, cordon = condition.health, condition.cordon
    if health is None or cordon is None or condition.acknowledged != health.fault:
        return False
    return all((fault.check, fault.since) != cordon.fault for fault in health.faults)


def _why_not(case: Case) -> str:
    condition = case.condition
    assert condition.health is not None
    if condition.acknowledged == condition.health.fault:
        return "an operator has un-cordoned it knowing of this fault"
    if case.heard_at is None:
        return f"node {condition.node} has not judged its GPUs since it connected"
    return ""


def _share_is_spent(limit: int, gpus_total: int, policy: CordonPolicy) -> str:
    if limit == 0:
        return "no GPU may be cordoned by itself (health.cordon_share_max, health.cordon_gpus_min)"
    return (
        f"{limit} of {gpus_total} GPUs are cordoned for their health already, and no more may be "
        f"(health.cordon_share_max {policy.share_max:g}, health.cordon_gpus_min {policy.gpus_min})"
    )


def _names_another_fault(case: Case, policy: CordonPolicy) -> bool:
    """Whether it is at the bar for another fault than its cordon says."""
    condition = case.condition
    cordon, health = condition.cordon, condition.health
    assert isinstance(cordon, GpuCordon)
    if health is None or case.heard_at is None or not policy.is_at_bar(condition):
        return False
    return health.fault not in (cordon.fault, condition.acknowledged)
