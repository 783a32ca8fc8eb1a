"""Which GPUs had better be cut up otherwise for what waits: proposals, each with its reason.

Theory of operation. A pool is cut up by demand only where its operator said so. A request must
have waited for a while (hysteresis) before a GPU is touched for it, and a GPU that was changed is
left alone for a while (dwell) unless all it takes is one more instance beside those that are
there: so two kinds of request cannot make one GPU go back and forth. Instances that are in use
stay where they are, always; idle ones may go.

The best place for an instance is looked for in this order: beside what a cut GPU has; on a GPU that
is not cut, of which so many stay free as the pool keeps for requests for whole GPUs, and those for
which such requests wait ahead in the queue; in place of idle instances. That comes last since they
were made for somebody: with room for both kinds each finds its own again, and nothing changes any
more. Among equals decides the least growth of fragmentation (`placing.mig_slices`). In turn, GPUs
in MIG mode that nobody uses are made whole for requests for whole GPUs that wait.

What none of this helps may be helped by moving holders away. That is never done unasked: the
proposal names who would have to move, and where to.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stoker.aggregator.cuts import (
    CutGpu,
    Demand,
    InstanceUse,
    PartitioningOptions,
    Proposal,
    ProposalKind,
    Relocation,
)
from stoker.aggregator.deck import Card, Cards, Deck, Order, leaving, mask_of, profile_for
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import describe
from stoker.core.units import format_duration

__all__ = [
    "CutGpu",
    "Demand",
    "InstanceUse",
    "PartitioningOptions",
    "Proposal",
    "ProposalKind",
    "Relocation",
    "profile_for",
    "propose",
]

# Requests that are looked at in one go; what is behind them waits for the next.
DEMANDS_MAX = 64
# Ways to make room by moving holders that are tried for one request, the cheapest first.
_ATTEMPTS_MAX = 16


def propose(
    gpus: Sequence[CutGpu],
    waiting: Sequence[Demand],
    options: Mapping[str, PartitioningOptions],
    now: float,
) -> tuple[Proposal, ...]:
    """Return at most one proposal for each GPU, for what waits in the order of the queue.

    `options` are by pool; GPUs of other pools are left as they are.
    """
    if not waiting:
        return ()
    planner = _Planner([gpu for gpu in gpus if gpu.pool in options], options, now)
    for demand in waiting[:DEMANDS_MAX]:
        if demand.whole_gpus:
            planner.serve_whole(demand)
        else:
            planner.serve_slices(demand)
    return planner.proposals()


class _Planner:
    """Serves one demand after the other, on cards as the ones before leave them."""

    def __init__(
        self, gpus: Iterable[CutGpu], options: Mapping[str, PartitioningOptions], now: float
    ) -> None:
        self._options = options
        self._now = now
        self._deck = Deck(gpus, options, now)

    # --- MIG devices

    def serve_slices(self, demand: Demand) -> None:
        """Find MIG devices for a demand, all on one node; else note who would have to move."""
        if demand.count > 1:
            self._serve_several(demand)
            return
        best = self._deck.find(demand, lambda card: _is_among(card, demand), {})
        if best is not None:
            self._deck.put(best.taken(demand))
        else:
            self._defragment(demand)

    def _serve_several(self, demand: Demand) -> None:
        best: tuple[list[Order], Cards] | None = None
        for node, uuids in self._deck.by_node.items():
            if demand.nodes is None or node in demand.nodes:
                found = self._all_on(demand, {uuid: self._deck.cards[uuid] for uuid in uuids})
                if found is not None and (best is None or found[0] < best[0]):
                    best = found
        if best is not None:
            self._put(best[1])

    def _all_on(self, demand: Demand, cards: Cards) -> tuple[list[Order], Cards] | None:
        """Return the cards of a node with all that is asked for on them, and what that takes."""
        orders: list[Order] = []
        for _ in range(demand.count):
            best = self._deck.find_among(demand, cards)
            if best is None:
                return None
            orders.append(best.order)
            cards[best.card.gpu.uuid] = best.taken(demand)
        orders.sort(reverse=True)  # of two ways the one whose worst part takes less
        return orders, cards

    # --- whole GPUs

    def serve_whole(self, demand: Demand) -> None:
        """Keep free GPUs of one node for a demand; turn MIG mode off where that is enough."""
        best: tuple[tuple[int, int, str], list[Card], list[Card]] | None = None
        for node, uuids in self._deck.by_node.items():
            if demand.nodes is not None and node not in demand.nodes:
                continue
            here = [self._deck.cards[uuid] for uuid in uuids]
            whole = [card for card in here if card.is_whole]
            idle = [card for card in here if self._may_be_whole(card, demand)]
            idle.sort(key=lambda card: (not card.gpu.toggles_at_once, card.gpu.index))
            lacking = max(0, demand.whole_gpus - len(whole))
            changed = idle[:lacking]
            # Enough with the fewest changes; where there is not enough, most is kept.
            order = (lacking - len(changed), lacking, node)
            if best is None or order < best[0]:
                best = order, whole[: demand.whole_gpus], changed
        if best is None:
            return
        (missing, _, _), whole, changed = best
        for card in whole:
            self._deck.put(replace(card, is_kept=True))
        for card in changed if not missing else ():
            self._deck.put(
                replace(
                    card,
                    is_enabled=False,
                    idle=(),
                    destroyed=card.idle,
                    demands=(demand,),
                    is_kept=True,
                )
            )

    def _may_be_whole(self, card: Card, demand: Demand) -> bool:
        is_idle = card.is_enabled and not card.staying and card.gpu.is_free
        return is_idle and self._deck.has_waited(demand, card) and self._deck.is_rested(card)

    # --- who would have to move

    def _defragment(self, demand: Demand) -> None:
        """Note the cheapest way to make room by moving holders; none may be there."""
        ways: list[tuple[int, float, str, Placed]] = []
        for card in self._deck.kinds(lambda card: _is_among(card, demand)):
            profile = profile_for(demand, card.gpu.geometry)
            may_change = card.is_enabled and card.is_open and self._deck.has_waited(demand, card)
            if profile is None or not may_change:
                continue
            for start in profile.starts:
                placed = Placed(start, profile.memory_slices, profile.name)
                moved = leaving(card, placed)
                if moved is not None:
                    staying = tuple(each for each in card.staying if each not in moved)
                    loss = card.table.loss(mask_of(staying), placed.mask)
                    ways.append((sum(each.size for each in moved), loss, card.gpu.uuid, placed))
        for _, _, uuid, placed in sorted(ways)[:_ATTEMPTS_MAX]:
            cleared = self._cleared(self._deck.cards[uuid], placed, demand)
            if cleared is not None:
                self._put(cleared)
                return

    def _cleared(self, card: Card, placed: Placed, demand: Demand) -> Cards | None:
        """Return the cards with those moved that are in the way; None: one finds no place."""

        def may(other: Card) -> bool:
            return other.gpu.uuid != card.gpu.uuid and other.gpu.pool == card.gpu.pool

        users = {use.placed: use for use in card.gpu.instances}
        moved = leaving(card, placed) or ()
        changed: Cards = {}
        moves: list[Relocation] = []
        for each in sorted(moved, key=lambda each: -each.size):
            ids = users[each].allocation_ids
            # It has waited for long enough, for it does not wait at all.
            mover = Demand(ids[0], "", -math.inf, profile=each.profile)
            way = self._deck.find(mover, may, changed)
            if way is None:
                return None
            to = way.card.gpu.uuid
            moves += [Relocation(id_, card.gpu.uuid, each, to, way.placed) for id_ in ids]
            there = way.taken(None)
            changed[to] = replace(there, for_movers=(*there.for_movers, *ids))
        gone = tuple(each for each in card.idle if each.mask & placed.mask)
        changed[card.gpu.uuid] = replace(
            card,
            staying=(*(each for each in card.staying if each not in moved), placed),
            idle=tuple(each for each in card.idle if each not in gone),
            created=(*card.created, placed),
            destroyed=(*card.destroyed, *gone),
            demands=(*card.demands, demand),
            relocations=(*card.relocations, *moves),
        )
        return changed

    def _put(self, cards: Cards) -> None:
        for card in cards.values():
            self._deck.put(card)

    # --- what comes of it

    def proposals(self) -> tuple[Proposal, ...]:
        """Return what is to be changed, by node and index of the GPU."""
        changed = [
            card
            for card in self._deck.cards.values()
            if card.created or card.destroyed or card.is_enabled is not card.gpu.is_enabled
        ]
        changed.sort(key=lambda card: (card.gpu.node, card.gpu.index))
        return tuple(self._proposal(card) for card in changed)

    def _proposal(self, card: Card) -> Proposal:
        gpu = card.gpu
        if card.relocations:
            kind = ProposalKind.DEFRAGMENT
        else:
            kind = ProposalKind.CUT if card.is_enabled else ProposalKind.MAKE_WHOLE
        needs_reset = card.is_enabled is not gpu.is_enabled and not gpu.toggles_at_once
        is_unasked = not (needs_reset or card.relocations or card.for_movers)
        return Proposal(
            kind=kind,
            node=gpu.node,
            gpu_uuid=gpu.uuid,
            gpu_index=gpu.index,
            wanted=Wanted(card.is_enabled, _devices(card.layout)),
            layout=card.layout,
            for_allocations=(*(each.allocation_id for each in card.demands), *card.for_movers),
            destroys=tuple(sorted(card.destroyed)),
            blast_radius=card.relocations,
            needs_reset=needs_reset,
            is_automatic=is_unasked and self._options[gpu.pool].is_automatic,
            why=_why(card, needs_reset, self._now),
        )


def _is_among(card: Card, demand: Demand) -> bool:
    return demand.nodes is None or card.gpu.node in demand.nodes


def _devices(layout: Layout) -> tuple[tuple[str, int], ...]:
    """Return how many of each MIG device a layout has."""
    names = [
        name
        for each in layout
        for name in (
            [f"{slices}c.{each.profile}" for slices in each.compute]
            if each.compute
            else [each.profile]
        )
    ]
    return tuple(sorted(Counter(names).items()))


def _why(card: Card, needs_reset: bool, now: float) -> str:
    """Return the reason, with what stays, what goes and who waits for it."""
    whom = [
        f"allocation {each.allocation_id} ({each.holder}, waits for "
        f"{format_duration(now - each.since)})"
        for each in dict.fromkeys(card.demands)
    ]
    whom += [f"allocation {each}, which is to move" for each in card.for_movers]
    if card.is_enabled:
        beside = [each for each in card.layout if each not in card.created]
        what = f"{describe(card.created)} for {'; '.join(whom)}"
        what += f"; {describe(tuple(beside))} stays" if beside else ""
    else:
        what = f"whole again for {'; '.join(whom)}"
    if card.destroyed:
        what += f"; {describe(card.destroyed)}, which nobody uses, goes"
    for each in card.relocations:
        place = f"{each.to_placed.profile}@{each.to_placed.start} of {each.to_uuid}"
        what += f"; allocation {each.allocation_id} would have to move to {place} first"
    if needs_reset:
        what += "; MIG mode changes with a reset of the GPU or a reboot"
    return what
