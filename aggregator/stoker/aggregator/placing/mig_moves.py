"""Room for an instance that fits nowhere: the cheapest one or two others that go elsewhere first.

Theory of operation. An instance begins at one of a few starts, so what is in its way on a GPU are
the instances that overlap it there. A GPU's layout (which instances lie where) is a set of bits;
for each layout and shape the ways to make room are worked out once and kept. GPUs are grouped by
layout, so a search looks at each distinct layout once. Everybody who leaves takes a new place while
the old one is still held, as with all moves of the rebalancer: a copy is made before the original
ends, and nothing is in between.

Room costs the worth (`mig_slices`) that is lost by it, where it is made and where the movers go,
and a little for each slice that is carried.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from stoker.aggregator.placing.mig_slices import SlicePool, SliceTable, pool_of

MOVES_MAX = 2  # for one request
SHARE_DEFAULT = 0.05  # of the requests, that may cause a move
BURST_DEFAULT = 50.0  # requests
RESERVE = 0.5  # of the burst, that the smallest requests leave to larger ones
# Ways to make room that are tried with all their moves.
_ATTEMPTS_MAX = 16
# What it costs to carry a slice, in terms of worth: a little more than nothing, since most moves
# are for whole GPUs, and what they leave behind is used for long.
_SLICE_COST = 0.1


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an instance lies."""

    gpu: int
    shape: int
    start: int


@dataclass(frozen=True, slots=True)
class SliceMove:
    """An instance from one place to another."""

    origin: Spot
    goal: Spot


@dataclass(frozen=True, slots=True)
class Room:
    """Where an instance goes once these have moved, in their order."""

    spot: Spot
    moves: tuple[SliceMove, ...]


class MoveBudget:
    """How many requests may cause a move: never more than a share of all that have come.

    What is not used is kept, up to `burst` requests. The smaller a request is, the more must be
    left for it: when there is not enough for all, large ones need it most, and gain most by it.
    """

    def __init__(self, share: float = SHARE_DEFAULT, burst: float = BURST_DEFAULT) -> None:
        self._share = share
        self._burst = burst
        self._left = 0.0

    def count_request(self) -> None:
        """Let a request have come."""
        self._left = min(self._burst, self._left + self._share)

    def allows(self, size: int, slices: int) -> bool:
        """Whether a request for `size` of a board's memory slices may cause a move."""
        return self._left >= 1.0 + RESERVE * self._burst * (1.0 - size / slices)

    def take(self) -> None:
        """Let a request have caused a move."""
        assert self._left >= 1.0, "no request may cause a move"
        self._left -= 1.0


@dataclass(frozen=True, slots=True)
class _Way:
    """How room for a shape can be made on a layout."""

    cost: float  # where room is made, and of carrying
    start: int
    leaving: tuple[int, ...]  # the numbers of their places
    shapes: int  # of those who leave, as bits


class LayoutPool:
    """GPUs of one board with the instances that lie on them, by number."""

    def __init__(self, table: SliceTable, gpus: int) -> None:
        self.table = table
        self.pool: SlicePool = pool_of(table, [0] * gpus)
        places = [(number, start) for number, s in enumerate(table.shapes) for start in s.starts]
        self._places = places  # shape and start by the number of the place
        self._number = {place: number for number, place in enumerate(places)}
        self._masks = [table.shapes[shape].mask(start) for shape, start in places]
        self._layouts = [0] * gpus  # the numbers of the places that are taken, as bits
        # Layout -> its GPUs; a dict is a set that keeps its order.
        self._groups: dict[int, dict[int, None]] = {0: dict.fromkeys(range(gpus))}
        self._ways: dict[tuple[int, int], tuple[_Way, ...]] = {}

    def put(self, spot: Spot) -> None:
        """Let an instance lie there; the place must be free."""
        mask = self._mask(spot)
        assert not self.pool.masks[spot.gpu] & mask, f"{spot} is taken"
        self.pool.change(spot.gpu, self.pool.masks[spot.gpu] | mask)
        self._flip(spot)

    def take(self, spot: Spot) -> None:
        """Let the instance be gone."""
        mask = self._mask(spot)
        assert self._has(spot), f"{spot} is not there"
        self.pool.change(spot.gpu, self.pool.masks[spot.gpu] & ~mask)
        self._flip(spot)

    def find(self, shape: int) -> Spot | None:
        """Return the best free place; None: there is none."""
        found = self.pool.find(shape)
        return None if found is None else Spot(found[0], shape, found[1])

    def make_room(self, shape: int) -> Room | None:
        """Return the cheapest moves that let an instance in which fits nowhere; None: too many.

        Nothing is changed yet.
        """
        # For these there is no place on any GPU, nor is there when others have moved.
        shapes = range(len(self.table.shapes))
        nowhere = sum(1 << each for each in shapes if self.pool.find(each) is None)
        # The next way of each layout, the cheapest first.
        heads = [
            (ways[0].cost, layout, 0)
            for layout in self._groups
            if (ways := self._ways_of(layout, shape))
        ]
        heapify(heads)
        best: tuple[float, Room] | None = None
        attempts = 0
        while heads and attempts < _ATTEMPTS_MAX:
            cost, layout, number = heads[0]
            # The new places of those who move cost worth too: what comes next is hardly better.
            if best is not None and cost >= best[0]:
                break
            ways = self._ways_of(layout, shape)
            if number + 1 < len(ways):
                heapreplace(heads, (ways[number + 1].cost, layout, number + 1))
            else:
                heappop(heads)
            if ways[number].shapes & nowhere:
                continue
            tried = self._try(next(iter(self._groups[layout])), shape, ways[number])
            if tried is not None:
                attempts += 1
                best = tried if best is None or tried[0] < best[0] else best
        return None if best is None else best[1]

    def _try(self, gpu: int, shape: int, way: _Way) -> tuple[float, Room] | None:
        """Return the moves of a way, and what they cost; None: somebody finds no place."""
        spot = Spot(gpu, shape, way.start)
        pool, before = self.pool, {gpu: self.pool.masks[gpu]}
        cost, moves = way.cost, list[SliceMove]()
        # Held as long as anybody moves: what comes, and what has not left.
        pool.change(gpu, before[gpu] | self._mask(spot))
        for number in way.leaving:
            mover, start = self._places[number]
            found = pool.find(mover)
            if found is None:
                break
            goal = Spot(found[0], mover, found[1])
            mask = pool.masks[goal.gpu]
            before.setdefault(goal.gpu, mask)
            cost += self.table.loss(mask, self._mask(goal))
            pool.change(goal.gpu, mask | self._mask(goal))
            moves.append(SliceMove(Spot(gpu, mover, start), goal))
        for each, mask in before.items():
            pool.change(each, mask)
        return (cost, Room(spot, tuple(moves))) if len(moves) == len(way.leaving) else None

    def carry_out(self, room: Room) -> None:
        """Move everybody, and let the instance in."""
        for move in room.moves:
            self.put(move.goal)
            self.take(move.origin)
        self.put(room.spot)

    def _ways_of(self, layout: int, shape: int) -> tuple[_Way, ...]:
        ways = self._ways.get((layout, shape))
        if ways is None:
            found = sorted(self._work_out(layout, shape), key=lambda way: (way.cost, way.start))
            ways = self._ways[layout, shape] = tuple(found)
        return ways

    def _work_out(self, layout: int, shape: int) -> Iterator[_Way]:
        there = [number for number in range(len(self._places)) if layout >> number & 1]
        mask = sum(self._masks[number] for number in there)
        for start in self.table.shapes[shape].starts:
            taken = self.table.shapes[shape].mask(start)
            leaving = tuple(number for number in there if self._masks[number] & taken)
            if 0 < len(leaving) <= MOVES_MAX:
                gone = sum(self._masks[number] for number in leaving)
                yield _Way(
                    cost=_SLICE_COST * gone.bit_count()
                    + self.table.worth[mask]
                    - self.table.worth[mask & ~gone | taken],
                    start=start,
                    # The largest first: it has fewest places to go to.
                    leaving=tuple(sorted(leaving, key=lambda each: -self._masks[each].bit_count())),
                    shapes=sum({1 << self._places[number][0] for number in leaving}),
                )

    def _mask(self, spot: Spot) -> int:
        return self.table.shapes[spot.shape].mask(spot.start)

    def _has(self, spot: Spot) -> bool:
        return bool(self._layouts[spot.gpu] >> self._number[spot.shape, spot.start] & 1)

    def _flip(self, spot: Spot) -> None:
        before = self._layouts[spot.gpu]
        after = before ^ 1 << self._number[spot.shape, spot.start]
        group = self._groups[before]
        del group[spot.gpu]
        if not group:
            del self._groups[before]
        self._groups.setdefault(after, {})[spot.gpu] = None
        self._layouts[spot.gpu] = after


def slices_moved(table: SliceTable, moves: Sequence[SliceMove]) -> int:
    """Return how many memory slices these carry."""
    return sum(table.shapes[move.origin.shape].size for move in moves)
