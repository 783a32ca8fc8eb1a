"""Where a request goes, found fast: the fleet as columns, and scores that are kept up to date.

Theory of operation. A request is of a *shape*: all of it that decides where it could go and how
good a place is. The fleet is kept as *columns*, one row for the GPUs of one model on one node. For
each shape the *scores* on all rows are remembered; when one comes again, only those rows are scored
that have changed since, which a log of changed rows tells. The best row is the one with the highest
key: the policy's score, then its tie-break, then the order of nodes by name.

What a shape does not tell is looked at afterwards, on the best rows first, by the filters: one
certain node, other allocations of a service, how GPUs lie to each other. Whether a node's samples
are fresh is looked at when it is about to be chosen; one that is stale is put aside until the
fleet's log names it again.

Rounds decide on drafts that may never be stored. What a draft showed is therefore looked at once
more when another draft, or the fleet itself, is decided on. The columns know what they hold, so
that this costs no new scores where nothing is different.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from stoker.aggregator.changelog import ChangeLog
from stoker.aggregator.model import Device, Placement, Plan, Request
from stoker.aggregator.placing import gangs
from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.balanced import Balancer
from stoker.aggregator.placing.columns import Columns
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.filters import refuse, share_bytes_of
from stoker.aggregator.placing.kernels import INTERPRETED, Flags, Ints, Kernels
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.parts import taken_values
from stoker.aggregator.placing.policies import BALANCED, RANDOM, Policies, Policy
from stoker.aggregator.placing.preferences import Tiers, has_preferences
from stoker.aggregator.placing.scoring import Scores, Scoring
from stoker.aggregator.placing.shapes import Shape, Take, is_plain, label_names, shape_of
from stoker.aggregator.placing.tables import Tables
from stoker.aggregator.views import FleetView

NOTHING_BLOCKED: Mapping[str, str] = {}

# When so many of the best places turn out to be stale, all nodes are looked at at once.
_STALE_MAX = 16
_NONE_EXCLUDED: Flags = np.zeros(0, np.uint8)


class Placer:
    """Finds the best place for requests on one fleet and its drafts; kept from round to round.

    `mix`: what requests are like; with `is_learning` it is learnt from `learn` as they come.
    `order`: the nodes in the order in which ties are resolved; those that it does not name come
    after, and without it all go by name. `draw(n)` returns a number below n, for the policy
    `random` alone.
    """

    def __init__(
        self,
        policies: Policies | None = None,
        mix: Mix | None = None,
        is_learning: bool = True,
        order: Sequence[str] | None = None,
        draw: Callable[[int], int] | None = None,
        kernels: Kernels = INTERPRETED,
        balancer: Balancer | None = None,
    ) -> None:
        self._policies = policies or Policies()
        self._columns = Columns(keeps_kinds=k.CLUSTERING in self._policies.modes())
        self._tables = Tables(self._columns, self._policies, mix or Mix(), is_learning=is_learning)
        self._scoring = Scoring(self._columns, self._policies, self._tables, kernels)
        self._balancer = balancer or Balancer()
        self._places = {name: place for place, name in enumerate(order or ())}
        assert draw is not None or RANDOM not in self._policies.all(), "no chance for `random`"
        self._draw = draw
        # What has been taken in: up to where in the fleet's log, and in that of a draft of it.
        self._log: ChangeLog | None = None
        self._position = 0
        self._draft_log: ChangeLog | None = None
        self._draft_position = 0
        self._from_draft: dict[str, None] = {}
        self._now = float("-inf")
        self._order: Ints = np.zeros(0, np.int64)
        self._ordered_at = -1
        self._blocked: tuple[Mapping[str, str], int, int] = (NOTHING_BLOCKED, 0, -1)
        self._excluded = _NONE_EXCLUDED

    def use(self, kernels: Kernels) -> None:
        """Run these loops from now on; what is decided stays the same."""
        self._scoring.kernels = kernels

    def policy_of(self, pool: str) -> Policy:
        """Return the policy that the nodes of the pool follow; empty: those of none."""
        return self._policies.of(pool)

    # --- taking in

    def learn(self, request: Request) -> None:
        """Note that a request has arrived: the mix of requests decides what places are worth."""
        self._tables.learn(shape_of(request))

    def sync(self, view: FleetView) -> None:
        """Take in what is other than it was; the other methods do it themselves."""
        columns = self._columns
        loaded = columns.nodes
        for name in self._changed(view):
            node = view.nodes.get(name)
            if node is None:
                if name in loaded:
                    columns.remove(name)
            elif loaded.get(name) is not node or columns.is_aside(name):
                columns.load(node)
        if view.now < self._now:  # the clock was set back, so what was stale may be fresh
            for name in columns.aside():
                columns.load(loaded[name])
        self._now = view.now

    def _changed(self, view: FleetView) -> Iterable[str]:
        """Return the names of the nodes to look at."""
        draft_log: ChangeLog | None = None
        log = view.log
        if log.parent is not None:
            log, draft_log = log.parent, log
        names = log.since(self._position) if log is self._log else None
        if names is None:
            names = dict.fromkeys([*self._columns.nodes, *view.nodes])
        self._log, self._position = log, log.end
        if draft_log is not self._draft_log:
            # What another draft showed may never have come to be.
            names |= self._from_draft
            self._from_draft = {}
            self._draft_log, self._draft_position = draft_log, 0
        if draft_log is not None:
            tried = draft_log.since(self._draft_position)
            if tried is None:
                tried = dict.fromkeys(view.nodes)
            self._draft_position = draft_log.end
            self._from_draft |= tried
            names |= tried
        return names

    # --- finding

    def find(
        self, request: Request, view: FleetView, blocked: Mapping[str, str] = NOTHING_BLOCKED
    ) -> Plan | None:
        """Return the best place; None: there is none. `blocked`: nodes kept for others."""
        shape = self._prepare(request, view)
        if request.nodes > 1:
            names = list(self._names(request, shape, view, blocked))
            return gangs.find(request, view, names)
        policies = self._policies_of(shape)
        if len(policies) == 1:
            return self._find_under(policies[0], request, shape, view, blocked)
        plans = [self._find_under(each, request, shape, view, blocked) for each in policies]
        # Each policy proposes, and the default says which proposal is taken.
        default = self._scoring.scores(shape, self._policies.default, everywhere=True)
        order = self._ordered()

        def key(plan: Plan) -> tuple[int, int]:
            rows = self._columns.rows_of(plan.node)
            return -max(int(default.keys[row]) for row in rows), int(order[rows[0]])

        return min((plan for plan in plans if plan is not None), key=key, default=None)

    def feasible(
        self, request: Request, view: FleetView, blocked: Mapping[str, str] = NOTHING_BLOCKED
    ) -> list[str]:
        """Return the nodes that can host (a part of) the request now, in the order of ties."""
        shape = self._prepare(request, view)
        return sorted(self._names(request, shape, view, blocked), key=self._place_of)

    def ranked(
        self, request: Request, view: FleetView, blocked: Mapping[str, str] = NOTHING_BLOCKED
    ) -> list[tuple[float, str]]:
        """Return those nodes with their policy's scores, the best first."""
        shape = self._prepare(request, view)
        found: dict[str, float] = {}
        for policy in self._policies_of(shape):
            scores = self._scores(shape, policy)
            for row in self._rows(request, shape, policy, view, blocked):
                score = int(scores.keys[row]) / (1 << k.TIE_BITS)
                found.setdefault(self._columns.row_nodes[row], score)
        return [(score, name) for name, score in found.items()]

    # --- helpers

    def _prepare(self, request: Request, view: FleetView) -> Shape:
        self.sync(view)
        shape = shape_of(request)
        if shape.node_labels or shape.same_label:
            self._columns.ask_labels(label_names(shape))
        self._tables.bring_up_to_date()
        return shape

    def _policies_of(self, shape: Shape) -> Sequence[Policy]:
        """Return the policies of the nodes where the shape may go."""
        if shape.pool is not None:
            return [self._policies.of(shape.pool)]
        return self._policies.all()

    def _scores(self, shape: Shape, policy: Policy) -> Scores:
        return self._scoring.scores(shape, policy, everywhere=not self._policies.by_pool)

    def _find_under(
        self,
        policy: Policy,
        request: Request,
        shape: Shape,
        view: FleetView,
        blocked: Mapping[str, str],
    ) -> Plan | None:
        """Return the best place on the nodes that follow the policy."""
        if policy is BALANCED:
            rows = self._rows(request, shape, policy, view, blocked)
            names = dict.fromkeys(self._columns.row_nodes[row] for row in rows)
            return self._balancer.find(request, view, names)
        if not is_plain(request):
            return self._find_among(policy, request, shape, view, blocked)
        row, scores = self._best(policy, shape, view, self._exclude(blocked))
        if row < 0:
            return None
        name = self._columns.row_nodes[row]
        return Plan((Placement(name, self._devices(policy, request, shape, view, row, scores)),))

    def _best(
        self, policy: Policy, shape: Shape, view: FleetView, excluded: Flags
    ) -> tuple[int, Scores]:
        """Return the best row, -1 for none, and the scores; stale nodes go aside."""
        stale = 0
        while True:
            scores = self._scores(shape, policy)
            if policy is RANDOM:
                row = self._pick_any(scores, excluded)
            else:
                row = self._scoring.kernels.pick(scores.keys, self._ordered(), excluded)
            if row < 0:
                return row, scores
            name = self._columns.row_nodes[row]
            if _is_fresh(name, view):
                return row, scores
            self._columns.put_aside(name)
            stale += 1
            if stale == _STALE_MAX:
                for each in list(self._columns.nodes):
                    if not _is_fresh(each, view) and not self._columns.is_aside(each):
                        self._columns.put_aside(each)

    def _pick_any(self, scores: Scores, excluded: Flags) -> int:
        rows = np.flatnonzero(_fitting(scores, excluded))
        return int(rows[self._chance(len(rows))]) if len(rows) else -1

    def _chance(self, below: int) -> int:
        assert self._draw is not None
        return self._draw(below)

    def _devices(
        self,
        policy: Policy,
        request: Request,
        shape: Shape,
        view: FleetView,
        row: int,
        scores: Scores,
    ) -> tuple[Device, ...]:
        gpus = self._columns.gpus_of(row)
        take = shape.take
        if take is Take.SHARE:
            slot = int(scores.best[row])
            if policy is RANDOM:
                slots = self._scoring.slots_of(scores, row)
                slot = slots[self._chance(len(slots))]
            facts = gpus[slot].gpu
            size, milli = share_bytes_of(request, gpus[slot]), request.compute_milli
            return (Device(facts.uuid, facts.model, facts.index, size, False, milli),)
        if take is Take.WHOLE and self._columns.is_even(row):
            free = [gpu.gpu for gpu in gpus if gpu.is_free]
            return tuple(
                [
                    Device(gpu.uuid, gpu.model, gpu.index, gpu.memory_total_bytes, True)
                    for gpu in free[: request.gpus]
                ]
            )
        name = self._columns.row_nodes[row]
        model = gpus[0].gpu.model if gpus and shape.gpus else None
        devices = choose(request, view.nodes[name], view, model=model)
        assert devices is not None, f"{name} fits in the columns, not in the view: {request}"
        return devices

    def _find_among(
        self,
        policy: Policy,
        request: Request,
        shape: Shape,
        view: FleetView,
        blocked: Mapping[str, str],
    ) -> Plan | None:
        """Return the best place of a request that asks for more than its shape says."""
        rows = self._rows(request, shape, policy, view, blocked)
        if has_preferences(request):
            tiers = Tiers(request, view)
            nodes = self._columns.nodes
            names = self._columns.row_nodes
            row = min(rows, key=lambda each: tiers.of(nodes[names[each]]), default=-1)
        else:
            row = next(rows, -1)
        if row < 0:
            return None
        name = self._columns.row_nodes[row]
        hint: tuple[str, ...] = ()
        if shape.take is Take.SHARE:
            best = int(self._scores(shape, policy).best[row])
            hint = (self._columns.gpus_of(row)[best].gpu.uuid,)
        devices = choose(request, view.nodes[name], view, hint)
        assert devices is not None, f"{name} was not refused for {request}"
        return Plan((Placement(name, devices),))

    # --- rows in order

    def _names(
        self, request: Request, shape: Shape, view: FleetView, blocked: Mapping[str, str]
    ) -> Iterable[str]:
        """Return the nodes where (a part of) the request fits, the best of each policy first."""
        found: dict[str, None] = {}
        for policy in self._policies_of(shape):
            rows = self._rows(request, shape, policy, view, blocked)
            names = dict.fromkeys(self._columns.row_nodes[row] for row in rows)
            found |= dict.fromkeys(
                self._balancer.ordered(view, names) if policy is BALANCED else names
            )
        return found

    def _rows(
        self,
        request: Request,
        shape: Shape,
        policy: Policy,
        view: FleetView,
        blocked: Mapping[str, str],
    ) -> Iterator[int]:
        """Yield the rows of the policy's nodes where the request fits, the best first."""
        columns = self._columns
        scores = self._scores(shape, policy)
        rows = np.flatnonzero(_fitting(scores, self._exclude(blocked)))
        if request.node is not None:
            rows = rows[np.isin(rows, columns.rows_of(request.node))]
        rows = rows[np.lexsort((self._ordered()[rows], -scores.keys[rows]))]
        taken = taken_values(request, view)
        plain = is_plain(request)
        for row in map(int, rows):
            name = columns.row_nodes[row]
            if _is_fresh(name, view) and (
                plain or refuse(request, view.nodes[name], view, taken) is None
            ):
                yield row

    def _place_of(self, name: str) -> tuple[int, str]:
        return self._places.get(name, len(self._places)), name

    def _ordered(self) -> Ints:
        """Return for each row where it comes when scores are equal."""
        columns = self._columns
        if self._ordered_at != columns.naming:
            self._ordered_at = columns.naming
            names = columns.row_nodes
            rows = sorted(range(columns.count), key=lambda row: (self._place_of(names[row]), row))
            order = np.zeros(len(columns.rows), np.int64)
            order[rows] = np.arange(len(rows))
            self._order = order
        return self._order

    def _exclude(self, blocked: Mapping[str, str]) -> Flags:
        """Return flags on the rows of the nodes that are kept for others; empty: there are none."""
        if not blocked:
            return _NONE_EXCLUDED
        columns = self._columns
        # Who keeps nodes adds to the mapping, and never takes out.
        known, length, naming = self._blocked
        if known is not blocked or (length, naming) != (len(blocked), columns.naming):
            self._blocked = (blocked, len(blocked), columns.naming)
            flags = np.zeros(len(columns.rows), np.uint8)
            flags[[row for name in blocked for row in columns.rows_of(name)]] = 1
            self._excluded = flags
        return self._excluded


def _is_fresh(name: str, view: FleetView) -> bool:
    until = view.fresh_until.get(name)
    return until is not None and view.now <= until


def _fitting(scores: Scores, excluded: Flags) -> Flags:
    fits: Flags = np.not_equal(scores.keys, k.NO_FIT).astype(np.uint8)
    if len(excluded):
        fits[excluded == 1] = 0
    return fits
