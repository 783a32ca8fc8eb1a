"""Which allocations had better be elsewhere: moves that defragment the fleet or relieve hot GPUs.

Theory of operation. Only what its holder marked movable moves, at most once in a plan, and never
more than the budget allows. Moves hold in their order: each takes its new place while the old one
is still held, on the fleet as the moves before it leave it, and every filter of placement lets it
go there. Three reasons are looked at, in this order, on one `Board`:

1. A waiting request that would fit on a node if some of what it holds were elsewhere. In the
   queue's order: what could be helped takes its place before the next one is looked at, and nothing
   moves to a node that is kept for one that could not. On each node the holders that must go are
   found by taking all away and putting back the dearest first, as long as the request fits.
2. A GPU that is hot. It is relieved by one holder at a time, the cheapest whose leaving cools it,
   of a GPU that stays cool after it. The two thresholds lie apart, so that nothing goes to and fro.
3. Fragments: the move, or the few moves off one GPU or one node, that gain most usable capacity
   beyond what they cost; again and again, as long as one gains enough.

The cost of a move is what its holder has to carry, the gain is capacity that becomes usable, or
load that leaves a hot GPU; all in GPUs' worth. Work is bounded by the named sizes, not by the
fleet.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stoker.aggregator import hotspots
from stoker.aggregator.admission import objection
from stoker.aggregator.board import Board
from stoker.aggregator.model import Allocation, AllocationState, Placement, Plan
from stoker.aggregator.moves import Move, MoveKind, MovePlan, MovePolicy, gain_min_of, worth
from stoker.aggregator.placing.filters import could_ever_fit, refuse
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.queueing import Kept
from stoker.aggregator.relocating import Accepts, Off, Spot, may_go, move, spots, stays_below
from stoker.aggregator.usable import Kind, Usable, kinds_of, size_milli
from stoker.aggregator.views import FleetView, GpuView, NodeView

WAITING_MAX = 32  # waiting requests that are looked at
ROOM_NODES_MAX = 128  # nodes on which room for one of them is looked for
ATTEMPTS_MAX = 16  # of these, so many are tried with all their moves
SOURCES_MAX = 256  # nodes from which fragments are looked at in one go
BUNDLES_MAX = 128  # of what could leave them, so much is tried with all its moves


# A bound of the gain beyond the cost, what leaves together, and where that shall not go.
_Bundle = tuple[float, tuple[str, ...], Off]


@dataclass(frozen=True, slots=True)
class _Step:
    """One move on a board, before its gain is known."""

    allocation: Allocation
    spot: Spot
    cost_milli: int


def plan_moves(
    view: FleetView,
    moves_max: int,
    policy: MovePolicy | None = None,
    pool: str | None = None,
    skip: Collection[str] = (),
) -> MovePlan:
    """Return the moves that are worth their cost, at most `moves_max`, as of `view.now`.

    With `pool`, only from nodes of it to nodes of it. `skip` are ids of allocations that are not to
    be asked. The view must not change meanwhile (`board.standing`).
    """
    planner = _Planner(view, moves_max, policy or MovePolicy(), pool, skip)
    planner.help_waiting()
    planner.relieve()
    planner.defragment()
    return MovePlan(tuple(planner.moves), planner.summary(), planner.kinds)


def confirmed(
    offered: Move,
    view: FleetView,
    kinds: tuple[Kind, ...],
    tenants: Mapping[str, tuple[str, ...]],
    kept: Collection[str] = (),
    policy: MovePolicy | None = None,
) -> Plan | str:
    """Return where an allocation goes whose holder agreed to move, or why it stays.

    It is the place that was offered, if that still holds, else another that keeps enough of the
    gain. `tenants`: by node what it holds; `kinds`: of the plan; `kept`: nodes kept for others.
    """
    allocation = view.allocations.get(offered.allocation_id)
    if allocation is None or allocation.state is not AllocationState.GRANTED:
        return f"allocation {offered.allocation_id} is no longer granted"
    is_kept = any(placement.node in kept for placement in offered.to_placements)
    if not is_kept and may_go(allocation, offered.to_placements, view):
        plan = Plan(offered.to_placements)
        if not objection(plan, allocation.request, view):
            return plan
    policy = policy or MovePolicy()
    board, usable = Board(view, tenants), Usable(kinds)
    is_relief = offered.kind is MoveKind.RELIEVE
    limit = policy.cool_milli if is_relief else policy.hot_milli
    gain_min = gain_min_of(offered.kind, policy) * offered.cost_milli
    accepts = stays_below(limit, allocation, view)
    for spot in spots(allocation, board, usable, offered.off.union(kept), accepts):
        more = 0.0 if is_relief else max(0.0, spot.loss_milli - offered.loss_milli)
        if offered.gain_milli - more >= gain_min:
            return Plan(spot.placements)
    return f"the place that was offered to {allocation.id} is taken, and no other is worth a move"


class _Planner:
    """Works on one board; each of its three parts adds to `moves`."""

    def __init__(
        self,
        view: FleetView,
        moves_max: int,
        policy: MovePolicy,
        pool: str | None,
        skip: Collection[str],
    ) -> None:
        self._policy = policy
        self._moves_max = moves_max
        self._pool = pool
        self._board = Board(view)
        self.kinds = kinds_of(view.allocations.values())
        self._usable = Usable(self.kinds)
        self._movable = {
            each.id
            for each in view.allocations.values()
            if each.state is AllocationState.GRANTED
            and each.request.movable
            and each.id not in skip
            and self._is_in_pool(each.nodes)
        }
        self._sizes = {
            id_: size_milli(view.allocations[id_], view.nodes) for id_ in sorted(self._movable)
        }
        self.moves: list[Move] = []
        self._helped: list[str] = []  # descriptions of waiting requests
        self._kept: Collection[str] = ()  # nodes that are kept for others
        self._bounds: dict[str, tuple[NodeView, int, list[_Bundle]]] = {}  # by node
        self._relieved: dict[str, hotspots.Heat] = {}  # GPU UUID -> what left it in this plan

    def summary(self) -> str:
        """Return the plan in one sentence."""
        if not self.moves:
            of = f"{len(self._sizes)} movable allocation{'' if len(self._sizes) == 1 else 's'}"
            return f"nothing to move: {of}, and no move that gains enough for what it costs"
        cost = sum(each.cost_milli for each in self.moves)
        gains: list[str] = []
        for kind, what in ((MoveKind.DEFRAGMENT, "become usable"), (MoveKind.RELIEVE, "cool down")):
            gain = sum(each.gain_milli for each in self.moves if each.kind is kind)
            if gain:
                gains.append(f"{worth(gain)} {what}")
        count = f"{len(self.moves)} move{'' if len(self.moves) == 1 else 's'}"
        helped = f"; then there is room for {', '.join(self._helped)}" if self._helped else ""
        return f"{count}: {' and '.join(gains)}, for {worth(cost)} carried over{helped}"

    # --- room for what waits

    def help_waiting(self) -> None:
        """Plan moves by which waiting requests would fit."""
        view = self._board.view
        queue = sorted(
            (each for each in view.allocations.values() if each.state is AllocationState.WAITING),
            key=lambda each: (-each.request.priority, each.version),
        )
        kept = Kept(view)
        self._kept = kept.nodes  # by those whom nothing helps, as they come
        for number, waiting in enumerate(queue):
            placements: tuple[Placement, ...] | None = None
            if number < WAITING_MAX and not kept.leaves_nothing_for(waiting.request):
                plan = find_place(waiting.request, view, kept.nodes)
                placements = plan.placements if plan else self._make_room(waiting, kept)
            if placements is None:
                kept.keep_for(waiting)
            else:
                self._board.put(waiting, placements)

    def _make_room(self, waiting: Allocation, kept: Kept) -> tuple[Placement, ...] | None:
        """Plan moves for one waiting request; returns where it would go then."""
        for nodes, ids in self._rooms(waiting, kept):
            off = frozenset(nodes)
            found = self._try(ids, off)
            if found is None:
                continue
            trial, steps = found
            plan = find_place(waiting.request, trial.view, kept.nodes)
            if plan is None:
                continue
            trial.put(waiting, plan.placements)
            gain = size_milli(trial.view.allocations[waiting.id], trial.view.nodes)
            cost = sum(step.cost_milli for step in steps)
            if gain < self._policy.defragment_gain_min * cost:
                continue
            what = waiting.request.described()
            where = f"node{'' if len(nodes) == 1 else 's'} {', '.join(nodes)}"
            self._commit(
                steps,
                MoveKind.DEFRAGMENT,
                gain,
                off,
                f"makes room on {where} for {what}, which {waiting.request.holder} waits for",
                waiting.id,
            )
            self._helped.append(what)
            return plan.placements
        return None

    def _rooms(
        self, waiting: Allocation, kept: Kept
    ) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Yield nodes on which the request would fit, and what must leave them, cheapest first."""
        request, view = waiting.request, self._board.view
        label = request.same_label if request.same_label_required else None
        by_value: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {}
        nodes = [
            node
            for node in view.nodes.values()
            if node.name not in kept.nodes and could_ever_fit(request, node, view)
        ]
        nodes.sort(key=lambda node: -node.free_gpus)  # least has to leave them
        for node in nodes[:ROOM_NODES_MAX]:
            ids = self._in_the_way(waiting, node)
            if ids is not None:
                cost = sum(self._sizes[id_] for id_ in ids)
                value = (node.node.facts.labels or {}).get(label, "") if label else ""
                by_value.setdefault(value, []).append((cost, node.name, ids))
        rooms: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = []
        for found in by_value.values():
            found.sort(key=lambda one: one[0])
            for start in range(len(found) - request.nodes + 1):
                chosen = found[start : start + request.nodes]
                ids = tuple(dict.fromkeys(id_ for _, _, each in chosen for id_ in each))
                rooms.append((sum(c for c, _, _ in chosen), tuple(n for _, n, _ in chosen), ids))
        rooms.sort(key=lambda one: one[0])
        budget = self._moves_max - len(self.moves)
        within = [(nodes, ids) for _, nodes, ids in rooms if 0 < len(ids) <= budget]
        yield from within[:ATTEMPTS_MAX]

    def _in_the_way(self, waiting: Allocation, node: NodeView) -> tuple[str, ...] | None:
        """Return which holders must leave the node for the request to fit; None: it never would."""
        request = waiting.request
        holders = [id_ for id_ in self._board.tenants.get(node.name, ()) if id_ in self._movable]
        holders.sort(key=lambda id_: -self._sizes[id_])
        empty = self._board.trial()
        for id_ in holders:
            empty.take(id_)
        if refuse(request, empty.view.nodes[node.name], empty.view) is not None:
            return None
        leaving = list(holders)
        for id_ in holders:
            without = [each for each in leaving if each != id_]
            trial = self._board.trial()
            for each in without:
                trial.take(each)
            if refuse(request, trial.view.nodes[node.name], trial.view) is None:
                leaving = without
        return tuple(leaving)

    # --- hot GPUs

    def relieve(self) -> None:
        """Plan moves off hot GPUs, the hottest first."""
        while len(self.moves) < self._moves_max:
            hot = hotspots.hot_gpus(
                self._board.view, self._movable, self._relieved, self._policy.hot_milli
            )
            found = next((one for each in hot if (one := self._relief(*each))), None)
            if found is None:
                return
            step, gain, uuid, brought, reason = found
            self._relieved[uuid] = self._relieved.get(uuid, hotspots.NO_HEAT) + brought
            self._commit([step], MoveKind.RELIEVE, gain, frozenset((uuid,)), reason)

    def _relief(
        self, node: NodeView, gpu: GpuView, heat: hotspots.Heat
    ) -> tuple[_Step, int, str, hotspots.Heat, str] | None:
        """Return the best move off a hot GPU: its step, gain, GPU, what leaves with it, reason."""
        view, policy = self._board.view, self._policy
        found: list[tuple[bool, int, int, Allocation, hotspots.Heat]] = []
        for claim in gpu.claims:
            if claim.allocation_id not in self._movable:
                continue
            brought = hotspots.brought_by(claim.allocation_id, node, gpu, view)
            if brought is None:
                continue
            allocation = view.allocations[claim.allocation_id]
            cost = size_milli(allocation, view.nodes)
            after = heat - brought
            gain = heat.milli - after.milli
            if gain > 0 and gain >= policy.relieve_gain_min * cost:
                stays_hot = after.milli >= policy.hot_milli
                found.append(
                    (stays_hot, cost if not stays_hot else -gain, gain, allocation, brought)
                )
        off = frozenset((gpu.gpu.uuid,))
        for _, _, gain, allocation, brought in sorted(found, key=lambda one: one[:2]):
            accepts = stays_below(
                policy.cool_milli, allocation, view, heat.milli - policy.imbalance_min_milli
            )
            best = self._best_spot(allocation, self._board, off, accepts)
            if best is None:
                continue
            cost = size_milli(allocation, view.nodes)
            reason = (
                f"GPU {gpu.gpu.index} of {node.name} is hot ({heat.described()}); "
                f"without it {(heat - brought).described()}"
            )
            return _Step(allocation, best, cost), gain, gpu.gpu.uuid, brought, reason
        return None

    # --- fragments

    def defragment(self) -> None:
        """Plan the moves that gain the most usable capacity beyond their cost."""
        while len(self.moves) < self._moves_max:
            best = self._best_bundle()
            if best is None:
                return
            steps, gain, off, reason = best
            self._commit(steps, MoveKind.DEFRAGMENT, gain, off, reason)

    def _best_bundle(self) -> tuple[list[_Step], int, Off, str] | None:
        view, usable = self._board.view, self._usable
        best: tuple[list[_Step], int, Off, str] | None = None
        best_net = 0.0
        for bound, ids, off in self._bundles()[:BUNDLES_MAX]:
            if bound <= best_net:
                break  # nor does any after it gain more
            found = self._try(ids, off)
            if found is None:
                continue
            trial, steps = found
            touched = dict.fromkeys(name for step in steps for name in _nodes_of(step))
            gain = round(
                sum(
                    usable.milli(trial.view.nodes[name], trial.view)
                    - usable.milli(view.nodes[name], view)
                    for name in touched
                )
            )
            cost = sum(step.cost_milli for step in steps)
            if gain - cost <= best_net or gain < self._policy.defragment_gain_min * cost:
                continue
            source = steps[0].allocation.node
            before, after = view.nodes[source].free_gpus, trial.view.nodes[source].free_gpus
            freed = (
                f"{source} has {after} free GPUs instead of {before}"
                if after > before
                else (f"less of what is free on {source} is fragments")
            )
            reason = f"{freed}: {worth(gain)} more of use to the requests that the fleet has had"
            best, best_net = (steps, gain, off, reason), gain - cost
        return best

    def _bundles(self) -> list[_Bundle]:
        """Return what could leave together, with a bound of its gain beyond its cost, best first.

        One holder, all of one GPU, and of a node the cheapest few: together they may free what none
        of them frees alone.
        """
        budget = self._moves_max - len(self.moves)
        found: list[_Bundle] = []
        for node in self._sources():
            # Nothing else has changed on a node that looks as it did.
            known = self._bounds.get(node.name)
            if known is None or known[0] is not node or known[1] != budget:
                known = self._bounds[node.name] = (node, budget, self._bundles_of(node, budget))
            found += known[2]
        found.sort(key=lambda one: -one[0])
        return found

    def _bundles_of(self, node: NodeView, budget: int) -> list[_Bundle]:
        view, usable = self._board.view, self._usable
        now = usable.milli(node, view)
        found: list[_Bundle] = []
        for ids, off in _together(node, self._holders(node), budget):
            trial = self._board.trial()
            for id_ in ids:
                trial.take(id_)
            cost = sum(self._sizes[id_] for id_ in ids)
            bound = usable.milli(trial.view.nodes[node.name], trial.view) - now - cost
            if bound > 0:
                found.append((bound, ids, off))
        return found

    def _sources(self) -> list[NodeView]:
        """Return the nodes with something to move, those with least to move first."""
        view = self._board.view
        sizes: dict[str, int] = {}
        for id_ in sorted(self._movable):
            allocation = view.allocations[id_]
            if len(allocation.placements) == 1:
                sizes[allocation.node] = sizes.get(allocation.node, 0) + self._sizes[id_]
        names = sorted(sizes, key=lambda name: (sizes[name], name))
        return [view.nodes[name] for name in names[:SOURCES_MAX]]

    def _holders(self, node: NodeView) -> list[Allocation]:
        """Return what could leave the node, the cheapest first."""
        view = self._board.view
        found = [
            view.allocations[id_]
            for id_ in self._board.tenants.get(node.name, ())
            if id_ in self._movable
        ]
        simple = [each for each in found if each.request.mig_profile is None and each.devices]
        single = [each for each in simple if len(each.placements) == 1]
        return sorted(single, key=lambda each: (self._sizes[each.id], each.id))

    # --- all

    def _try(self, ids: Iterable[str], off: Off) -> tuple[Board, list[_Step]] | None:
        """Move these away on a trial, the largest first; None: one of them has nowhere to go."""
        trial = self._board.trial()
        leaving = [self._board.view.allocations[id_] for id_ in ids]
        steps: list[_Step] = []
        for allocation in sorted(leaving, key=lambda each: (-self._sizes[each.id], each.id)):
            accepts = stays_below(self._policy.hot_milli, allocation, trial.view)
            spot = self._best_spot(allocation, trial, off, accepts)
            if spot is None:
                return None
            move(allocation, spot.placements, trial)
            steps.append(_Step(allocation, spot, self._sizes[allocation.id]))
        return trial, steps

    def _best_spot(
        self, allocation: Allocation, board: Board, off: Off, accepts: Accepts
    ) -> Spot | None:
        for spot in spots(allocation, board, self._usable, off.union(self._kept), accepts):
            if self._is_in_pool(placement.node for placement in spot.placements):
                return spot
        return None

    def _commit(
        self,
        steps: Sequence[_Step],
        kind: MoveKind,
        gain_milli: int,
        off: Off,
        reason: str,
        goal: str = "",
    ) -> None:
        """Take the steps on the board; each has the part of the gain that it has of the cost."""
        total = sum(step.cost_milli for step in steps)
        carried, given = 0, 0
        for number, step in enumerate(steps, 1):
            carried += step.cost_milli
            gain = gain_milli * carried // total - given
            given += gain
            self._movable.discard(step.allocation.id)
            move(step.allocation, step.spot.placements, self._board)
            said = reason if len(steps) == 1 else f"{reason} (move {number} of {len(steps)})"
            self.moves.append(
                Move(
                    step.allocation.id,
                    step.allocation.placements,
                    step.spot.placements,
                    kind,
                    said,
                    step.cost_milli,
                    gain,
                    step.spot.loss_milli,
                    off,
                    goal,
                )
            )

    def _is_in_pool(self, names: Iterable[str]) -> bool:
        if self._pool is None:
            return True
        nodes = self._board.view.nodes
        return all(nodes[name].node.facts.pool == self._pool for name in names)


def _together(
    node: NodeView, holders: Sequence[Allocation], budget: int
) -> Iterator[tuple[tuple[str, ...], Off]]:
    """Yield what of these holders, cheapest first, could leave together, and where it may not go.

    A share may go to another GPU of its node when only its GPU is to become free.
    """
    by_gpu: dict[str, list[str]] = {}
    for holder in holders:
        for device in holder.devices:
            by_gpu.setdefault(device.uuid, []).append(holder.id)
        whole_node = frozenset((node.name,))
        gpus = frozenset(device.uuid for device in holder.devices)
        yield (holder.id,), whole_node if holder.request.is_whole else gpus
    for uuid, ids in by_gpu.items():
        if 1 < len(ids) <= budget:
            yield tuple(ids), frozenset((uuid,))
    for count in range(2, min(len(holders), budget) + 1):
        yield tuple(each.id for each in holders[:count]), frozenset((node.name,))


def _nodes_of(step: _Step) -> tuple[str, ...]:
    """Return the nodes that the step changes."""
    return (*step.allocation.nodes, *(placement.node for placement in step.spot.placements))
