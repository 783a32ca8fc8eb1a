"""The fleet at one instant, for the page for Prometheus: values that never change."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.findings import Finding, Findings
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import AllocationState, NodeStatus
from stoker.aggregator.upkeep import review_of
from stoker.aggregator.verdicts import Condition
from stoker.aggregator.views import NodeView


@dataclass(frozen=True, slots=True)
class Picture:
    """The fleet at one instant."""

    now: float
    nodes: Mapping[str, NodeView]
    statuses: Mapping[str, NodeStatus]
    fresh_until: Mapping[str, float]
    allocations: Mapping[AllocationState, int]
    version: int
    conditions: Mapping[str, Condition]  # by GPU UUID
    cordons_max: int
    cordons_withheld: int
    findings: tuple[Finding, ...]


def take_picture(
    fleet: Fleet, now: float, policy: CordonPolicy | None = None, findings: Findings | None = None
) -> Picture:
    """Return the fleet as it is; what it consists of never changes, so any thread may read it."""
    view = fleet.view(now)
    policy = policy or CordonPolicy()
    return Picture(
        now=now,
        nodes=dict(view.nodes),
        statuses=dict(fleet.statuses),
        fresh_until=dict(view.fresh_until),
        allocations=Counter(allocation.state for allocation in fleet.allocations.values()),
        version=fleet.version,
        conditions=dict(fleet.conditions.table),
        cordons_max=policy.limit(len(fleet.homes)),
        cordons_withheld=review_of(fleet, policy, now).withheld_for_share,
        findings=findings.found(fleet, now) if findings is not None else (),
    )
