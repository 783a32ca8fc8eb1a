"""GPUs as the proposals so far would leave them, and the best of them for one more instance.

A fleet has few kinds of GPU that differ in what may be done to them: cards that are alike are
grouped, and ways to give an instance are worked out once for each group.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from operator import attrgetter

from stoker.aggregator.cuts import CutGpu, Demand, PartitioningOptions, Relocation
from stoker.aggregator.placing.mig_moves import MOVES_MAX
from stoker.aggregator.placing.mig_slices import SliceTable, plain_profiles, table_of
from stoker.core.mig.geometry import Geometry, Layout, MigProfile, Placed
from stoker.core.mig.layouts import free_starts

_MIB = 1 << 20


def profile_for(demand: Demand, geometry: Geometry) -> MigProfile | None:
    """Return the profile that a board has for a demand: the one it names, or the smallest.

    None: it has none. Parts of a GPU instance ("1c.2g.20gb") are nobody's: who wants some cuts a
    GPU for them.
    """
    if demand.profile:
        return geometry.profile(demand.profile)
    enough = [
        each
        for each in plain_profiles(geometry)
        if each.memory_mib * _MIB >= demand.memory_bytes_min
        and each.compute_slices >= demand.compute_slices_min
    ]
    order = attrgetter("memory_slices", "compute_slices", "memory_mib")
    return min(enough, key=order, default=None)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as the proposals so far would leave it."""

    gpu: CutGpu
    table: SliceTable
    is_enabled: bool
    staying: Layout  # busy, or meant for somebody who waits
    idle: Layout  # nobody's
    created: Layout = ()  # of `staying`
    destroyed: Layout = ()
    demands: tuple[Demand, ...] = ()  # for which it is changed
    relocations: tuple[Relocation, ...] = ()
    is_kept: bool = False  # whole, for a request for whole GPUs
    for_movers: tuple[str, ...] = ()  # allocations that shall move here

    @property
    def layout(self) -> Layout:
        """All that it would have, by place."""
        return tuple(sorted((*self.staying, *self.idle)))

    @property
    def is_whole(self) -> bool:
        """Whether a request for whole GPUs could take it."""
        return not self.is_enabled and self.gpu.is_free and not self.is_kept

    @property
    def is_open(self) -> bool:
        """Whether it may have more instances."""
        return self.gpu.is_free and not self.is_kept


Cards = dict[str, Card]  # by UUID


class Tier(IntEnum):
    """What it takes to give an instance, the least first."""

    THERE = 0
    BESIDE = 1  # it is created
    FRESH = 2  # MIG mode is turned on
    INSTEAD = 3  # idle ones go, which somebody wanted lately
    RESET = 4  # MIG mode is turned on, and that takes a reset of the GPU


Order = tuple[int, int, float, str, int, int]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to give an instance."""

    tier: Tier
    destroyed: Layout
    loss: float  # of worth, by what stays
    placed: Placed
    card: Card

    @property
    def order(self) -> Order:
        """By what it takes, the least first; among equals by node and index."""
        gone = sum(each.size for each in self.destroyed)
        gpu = self.card.gpu
        return (self.tier, gone, self.loss, gpu.node, gpu.index, self.placed.start)

    def taken(self, demand: Demand | None) -> Card:
        """Return the card with the instance, meant for a demand or for somebody who moves."""
        card = self.card
        gone = {self.placed, *self.destroyed}
        card = replace(
            card,
            staying=(*card.staying, self.placed),
            idle=tuple(each for each in card.idle if each not in gone),
            is_enabled=True,
        )
        if self.tier is Tier.THERE:
            return card
        return replace(
            card,
            created=(*card.created, self.placed),
            destroyed=(*card.destroyed, *self.destroyed),
            demands=card.demands if demand is None else (*card.demands, demand),
        )


class Deck:
    """All cards, by UUID and by what they have in common."""

    def __init__(
        self, gpus: Iterable[CutGpu], options: Mapping[str, PartitioningOptions], now: float
    ) -> None:
        self.cards: Cards = {}
        self.by_node: dict[str, list[str]] = {}
        self._options = options
        self._now = now
        self._numbers: dict[tuple[object, ...], int] = {}  # of kinds of card
        self._kind_of: dict[str, int] = {}
        self._groups: dict[int, dict[str, None]] = {}  # kind -> its cards, in order
        self._ways: dict[tuple[object, ...], Option | None] = {}
        self._whole: Counter[str] = Counter()  # by pool: what a request for whole GPUs could take
        tables: dict[int, SliceTable] = {}  # by the geometry's identity: its hash takes long
        for gpu in sorted(gpus, key=lambda each: (each.node, each.index)):
            if id(gpu.geometry) not in tables:
                tables[id(gpu.geometry)] = table_of(gpu.geometry)
            busy = tuple(each.placed for each in gpu.instances if each.is_busy)
            idle = tuple(each.placed for each in gpu.instances if not each.is_busy)
            self.by_node.setdefault(gpu.node, []).append(gpu.uuid)
            self.put(Card(gpu, tables[id(gpu.geometry)], gpu.is_enabled, busy, idle))

    def put(self, card: Card) -> None:
        """Let a card be so from now on."""
        uuid, before = card.gpu.uuid, self.cards.get(card.gpu.uuid)
        if before is not None:
            self._whole[before.gpu.pool] -= before.is_whole
            group = self._groups[self._kind_of[uuid]]
            del group[uuid]
            if not group:
                del self._groups[self._kind_of[uuid]]
        self.cards[uuid] = card
        self._kind_of[uuid] = self._kind(card)
        self._groups.setdefault(self._kind_of[uuid], {})[uuid] = None
        self._whole[card.gpu.pool] += card.is_whole

    def kinds(self, may: Callable[[Card], bool]) -> Iterator[Card]:
        """Yield the first card of each kind, of those that may be used."""
        for group in self._groups.values():
            found = next((uuid for uuid in group if may(self.cards[uuid])), None)
            if found is not None:
                yield self.cards[found]

    def find(
        self, demand: Demand, may: Callable[[Card], bool], supposed: Mapping[str, Card]
    ) -> Option | None:
        """Return what takes least, on the cards that may be used; None: nothing will do.

        `supposed` are cards as they would be; they are used if they may.
        """
        whole = self._whole_with(supposed)
        known = self.kinds(lambda card: card.gpu.uuid not in supposed and may(card))
        return self._best((*known, *filter(may, supposed.values())), demand, whole)

    def find_among(self, demand: Demand, cards: Mapping[str, Card]) -> Option | None:
        """Return what takes least on these cards, as they would be."""
        return self._best(cards.values(), demand, self._whole_with(cards))

    def _best(
        self, cards: Iterable[Card], demand: Demand, whole: Mapping[str, int]
    ) -> Option | None:
        found = [way for card in cards if (way := self._best_on(card, demand, whole)) is not None]
        return min(found, key=lambda each: each.order, default=None)

    def has_waited(self, demand: Demand, card: Card) -> bool:
        """Whether it has waited for long enough that a card may be changed for it."""
        return self._now - demand.since >= self._options[card.gpu.pool].hysteresis_seconds

    def is_rested(self, card: Card) -> bool:
        """Whether what it has may be changed: more than once in a dwell time is too often."""
        at = card.gpu.changed_at
        return at is None or self._now - at >= self._options[card.gpu.pool].dwell_seconds

    def _whole_with(self, supposed: Mapping[str, Card]) -> Mapping[str, int]:
        whole = self._whole.copy()
        for uuid, card in supposed.items():
            whole[card.gpu.pool] += card.is_whole - self.cards[uuid].is_whole
        return whole

    def _best_on(self, card: Card, demand: Demand, whole: Mapping[str, int]) -> Option | None:
        pool = card.gpu.pool
        may_cut = card.is_enabled or whole[pool] > self._options[pool].whole_gpus_kept
        if not card.is_open or not may_cut:
            return None
        has_waited = self.has_waited(demand, card)
        asked = (demand.profile, demand.memory_bytes_min, demand.compute_slices_min)
        key = (self._kind(card), has_waited, *asked)
        if key not in self._ways:
            ways = self._ways_on(card, demand, has_waited=has_waited)
            self._ways[key] = min(ways, key=lambda each: each.order, default=None)
        way = self._ways[key]
        return None if way is None else replace(way, card=card)

    def _ways_on(self, card: Card, demand: Demand, *, has_waited: bool) -> Iterator[Option]:
        profile = profile_for(demand, card.gpu.geometry)
        if profile is None:
            return
        for placed in card.idle:
            if placed.profile == profile.name and not placed.compute:
                yield Option(Tier.THERE, (), 0.0, placed, card)
        is_rested = self.is_rested(card)
        if not has_waited or not (card.is_enabled or is_rested):
            return
        taken = mask_of(card.staying)
        for start in profile.starts:
            placed = Placed(start, profile.memory_slices, profile.name)
            gone = tuple(each for each in card.idle if each.mask & placed.mask)
            if taken & placed.mask or (gone and not is_rested):
                continue
            left = tuple(each for each in card.layout if each not in gone)
            if start in free_starts(card.gpu.geometry, left, profile.name):
                tier = Tier.INSTEAD if gone else Tier.BESIDE
                if not card.is_enabled:
                    tier = Tier.FRESH if card.gpu.toggles_at_once else Tier.RESET
                yield Option(tier, gone, card.table.loss(taken, placed.mask), placed, card)

    def _kind(self, card: Card) -> int:
        """Return the number of what can be told of a card but which it is."""
        gpu = card.gpu
        key = (
            *(id(card.table), gpu.pool, gpu.is_free, gpu.toggles_at_once, self.is_rested(card)),
            *(card.is_enabled, card.is_kept, card.staying, card.idle, tuple(_ours(card))),
        )
        return self._numbers.setdefault(key, len(self._numbers))


def mask_of(layout: Collection[Placed]) -> int:
    """Return the memory slices that these take, as bits."""
    return sum(each.mask for each in layout)


def leaving(card: Card, placed: Placed) -> Layout | None:
    """Return the instances whose holders would have to move for another; None: it cannot be.

    One of them is used by somebody who is none of ours, is a part or meant for somebody who waits,
    or there are too many; or, without them, it would still not be allowed.
    """
    found = tuple(each for each in card.staying if each.mask & placed.mask)
    ours = set(_ours(card))
    if not 0 < len(found) <= MOVES_MAX or any(e not in ours or e.compute for e in found):
        return None
    left = tuple(each for each in card.layout if not each.mask & placed.mask)
    is_allowed = placed.start in free_starts(card.gpu.geometry, left, placed.profile)
    return found if is_allowed else None


def _ours(card: Card) -> Iterator[Placed]:
    """Yield the instances that allocations alone use."""
    return (use.placed for use in card.gpu.instances if use.is_busy and not use.is_foreign)
