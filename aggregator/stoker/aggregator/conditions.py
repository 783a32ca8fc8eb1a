"""The GPUs' condition as the ledger knows it: verdicts, cordons, and who failed when.

Kept by UUID, like claims: a card that is listed by two nodes is one thing. Only durable events
change it, so that a restart and a replay give the same. What a node reports is compared with this
table (`upkeep`), and what differs becomes an event.
"""

from collections import deque
from collections.abc import MutableMapping
from dataclasses import replace

from stoker.aggregator import events as e
from stoker.aggregator.draft import Overlay
from stoker.aggregator.lemons import Failure
from stoker.aggregator.tables import Names, add_name, drop_name
from stoker.aggregator.verdicts import Condition, GpuCordon, Verdict

# What is older says nothing of a card any more. `health.lemon_days` cannot be more.
FAILURES_KEPT_SECONDS = 90 * 86_400.0
# A fleet in which more fail has another trouble than single cards; the oldest are forgotten first.
FAILURES_MAX = 10_000
# For so long changes of a GPU's verdict are counted together.
COUNTED_SECONDS = 3600.0

ConditionEvent = e.GpuHealthChanged | e.GpuForgotten | e.GpuCordoned | e.GpuUncordoned


class Conditions:
    """The table and what follows from it. For reading only, but for `apply`."""

    def __init__(self) -> None:
        self.table: MutableMapping[str, Condition] = {}  # by UUID
        # Oldest first. Not a tuple: where a whole fleet fails at once, each would copy all others.
        self._failures: deque[Failure] = deque(maxlen=FAILURES_MAX)
        # What follows: UUIDs of those with which something is wrong or done, those that are
        # cordoned by health, drains, and what each node told of.
        self.notable: MutableMapping[str, None] = {}
        self.cordoned_by_health: MutableMapping[str, None] = {}
        self.drains: MutableMapping[str, float] = {}
        self.told_by: Names = {}
        self.version = 0  # rises with every change, and with what else cordons depend on

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Who failed when, oldest first."""
        return tuple(self._failures)

    def get(self, uuid: str) -> Condition | None:
        """Return what is known of a GPU; None: nothing."""
        return self.table.get(uuid)

    def cordon_of(self, uuid: str) -> GpuCordon | None:
        """Return why no new allocation goes to a GPU; None: it is not cordoned."""
        condition = self.table.get(uuid)
        return None if condition is None else condition.cordon

    def apply(self, event: ConditionEvent) -> None:
        """Take in what happened; events that change nothing are harmless."""
        match event:
            case e.GpuHealthChanged(at, node, uuid, _, _):
                self._judge(event, self._of(uuid, node))
                self._forget_failures(at - FAILURES_KEPT_SECONDS)
            case e.GpuForgotten(_, _, uuid):
                self._drop(uuid)
            case e.GpuCordoned(at, node, uuid, reason, by_health, drain_at, fault):
                before = self._of(uuid, node)
                same = before.cordon if before.cordon and before.cordon.by_health else None
                # Another fault of a GPU that is cordoned by health already goes on with it.
                since = same.at if same is not None and by_health else at
                cordon = GpuCordon(since, reason, by_health, drain_at, fault)
                self._put(replace(before, cordon=cordon))
            case e.GpuUncordoned(_, node, uuid, _, acknowledged):
                before = self._of(uuid, node)
                known = acknowledged or before.acknowledged
                self._put(replace(before, cordon=None, acknowledged=known))

    def _judge(self, event: e.GpuHealthChanged, before: Condition) -> None:
        health = event.health
        is_well = health.verdict is Verdict.HEALTHY
        is_same_hour = 0.0 <= event.at - before.counted_since < COUNTED_SECONDS
        after = replace(
            before,
            node=event.node,
            slot=event.slot or before.slot,
            health=health,
            changed_at=event.at,
            acknowledged=None if is_well else before.acknowledged,
            changes=before.changes + 1 if is_same_hour else 1,
            counted_since=before.counted_since if is_same_hour else event.at,
        )
        # Unread for a while and found as it was is not another failure.
        if health.verdict is Verdict.UNHEALTHY and before.failed != health.fault:
            if before.verdict is not Verdict.UNHEALTHY:
                what = health.check_in_words
                self._failures.append(Failure(event.at, event.uuid, event.node, after.slot, what))
            after = replace(after, failed=health.fault)
        self._put(after)

    def _forget_failures(self, since: float) -> None:
        """Forget what is older; the oldest of too many are gone already."""
        while self._failures and self._failures[0].at <= since:
            self._failures.popleft()

    def _of(self, uuid: str, node: str) -> Condition:
        return self.table.get(uuid) or Condition(uuid, node)

    def _put(self, condition: Condition) -> None:
        uuid, before = condition.uuid, self.table.get(condition.uuid)
        self.table[uuid] = condition
        if before is None or before.node != condition.node:
            if before is not None:
                drop_name(self.told_by, before.node, uuid)
            add_name(self.told_by, condition.node, uuid)
        _keep(self.notable, uuid, is_in=condition.is_notable)
        cordon = condition.cordon
        by_health = cordon is not None and cordon.by_health
        _keep(self.cordoned_by_health, uuid, is_in=by_health)
        if cordon is not None and cordon.drain_at is not None:
            self.drains[uuid] = cordon.drain_at
        else:
            self.drains.pop(uuid, None)
        self.version += 1

    def _drop(self, uuid: str) -> None:
        gone = self.table.pop(uuid, None)
        if gone is None:
            return
        drop_name(self.told_by, gone.node, uuid)
        for table in (self.notable, self.cordoned_by_health, self.drains):
            table.pop(uuid, None)
        self.version += 1

    # --- drafts and snapshots

    def draft(self) -> "Conditions":
        """Return a table laid over this one; see `Fleet.draft`."""
        draft = Conditions()
        draft.table = Overlay(self.table)
        draft._failures = self._failures.copy()
        draft.notable = Overlay(self.notable)
        draft.cordoned_by_health = Overlay(self.cordoned_by_health)
        draft.drains = Overlay(self.drains)
        draft.told_by = Overlay(self.told_by)
        draft.version = self.version
        return draft

    def restore(self, conditions: tuple[Condition, ...], failures: tuple[Failure, ...]) -> None:
        """Take over what a snapshot has."""
        for condition in conditions:
            self._put(condition)
        self._failures = deque(failures, FAILURES_MAX)


def _keep(table: MutableMapping[str, None], uuid: str, *, is_in: bool) -> None:
    if is_in:
        table[uuid] = None
    else:
        table.pop(uuid, None)
