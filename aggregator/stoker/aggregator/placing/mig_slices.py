"""Where on which GPU a GPU instance had better lie, so that what is left is of most use.

Theory of operation. A GPU is the mask of its memory slices that are taken, so a policy is a table:
for each mask that can come about and each shape of instance the best start and what that costs. It
is worked out once for each board. The GPUs of a pool are grouped by their mask, and for each shape
a set of bits tells which of the masks that it fits on are there, the best at the lowest bit: a
decision is that bit, whatever the number of GPUs.

The cost of a place is what the worth of all places falls by when it is taken. A shape that could
begin at k more starts of a mask has the worth of its first place, of its second, ... of its k-th:

    worth(mask) = sum over shapes of (w[shape][1] + ... + w[shape][k])

With w[shape][i] = size / shapes this is the least growth of the mean over the shapes of idle slices
that the shape cannot use (`mfi`); with the mix of requests in the weights, of its expectation
(`fgd-mig`); with 1 in place of the size, most remaining placements (`mcc`). `places`, which we go
by, has weights of its own for boards of seven slices. They were found by search (CMA-ES over the
eighteen of them) for the best worst case over mixes of requests at full load, in runs with other
seeds than those of any figure that is reported. What they say beyond the sizes: 1g goes into the
rest of a pair that is broken already, and rather where 2g could not go. Other boards go by sizes.

Profiles that differ in name and engines alone (`+me`, `+gfx`, `-me`) are one shape. How many of
those there may be is for `core.mig.layouts` to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import assert_never

from stoker.core.mig.geometry import Geometry, MigProfile


class SlicePolicy(StrEnum):
    """By what rule instances are placed."""

    FIRST_FIT = "first-fit"  # the first GPU that has room, its first start
    BEST_FIT = "best-fit"  # the fullest GPU, its first start
    BEST_FIT_BEST_INDEX = "best-fit-bi"  # the fullest GPU, the start that keeps most placements
    MOST_PLACEMENTS = "mcc"
    FRAGMENTATION = "mfi"
    EXPECTED_FRAGMENTATION = "fgd-mig"
    PLACES = "places"


# Published rules that break ties by the GPU's number; to all others equal masks are equal.
_BY_NUMBER = frozenset(SlicePolicy) - {SlicePolicy.PLACES}


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Profiles that take the same places."""

    size: int  # in memory slices
    starts: tuple[int, ...]

    def mask(self, start: int) -> int:
        """The memory slices that one takes from there on, as bits."""
        return (1 << self.size) - 1 << start


@dataclass(frozen=True, slots=True)
class Choice:
    """The best place for a shape on a GPU."""

    start: int
    cost: float  # the lower the better, against other GPUs as well


@dataclass(frozen=True, slots=True)
class SliceTable:
    """A policy for one board."""

    policy: SlicePolicy
    shapes: tuple[Shape, ...]
    shape_of: Mapping[str, int]  # profile -> its place in `shapes`
    choices: tuple[Mapping[int, Choice], ...]  # by shape: mask -> where; where it fits at all
    worth: Mapping[int, float]  # of what is left of a mask

    @property
    def is_by_number(self) -> bool:
        """Whether among equals the GPU with the lowest number goes first."""
        return self.policy in _BY_NUMBER

    def loss(self, mask: int, taken: int) -> float:
        """Return what the worth falls by when these free slices are taken."""
        return self.worth[mask] - self.worth[mask | taken]


def plain_profiles(geometry: Geometry) -> tuple[MigProfile, ...]:
    """Return the profiles without variants of media engines or graphics, which add no shapes."""
    return tuple(each for each in geometry.profiles if not ("+" in each.name or "-" in each.name))


@lru_cache(maxsize=64)
def table_of(
    geometry: Geometry,
    policy: SlicePolicy = SlicePolicy.PLACES,
    mix: tuple[tuple[str, float], ...] = (),
) -> SliceTable:
    """Return the policy's table for a board.

    `mix`: how often each profile is asked for; what `fgd-mig` goes by, no other policy does.
    """
    plain = plain_profiles(geometry)
    shapes = tuple(dict.fromkeys(Shape(each.memory_slices, each.starts) for each in plain))
    shape_of = {
        each.name: shapes.index(shape)
        for each in geometry.profiles
        if (shape := Shape(each.memory_slices, each.starts)) in shapes
    }
    weights = _weights(policy, shapes, _shares(shape_of, dict(mix), len(shapes)))
    masks = _reachable(shapes)
    worth = {mask: _worth(mask, shapes, weights) for mask in masks}
    placements = {mask: sum(map(len, _places(mask, shapes))) for mask in masks}
    choices = tuple(
        {
            mask: _choose(policy, mask, shape, worth, placements)
            for mask in masks
            if any(not mask & shape.mask(start) for start in shape.starts)
        }
        for shape in shapes
    )
    return SliceTable(policy, shapes, shape_of, choices, worth)


class SlicePool:
    """GPUs of one board, by number, grouped by what is taken of them."""

    def __init__(self, table: SliceTable, masks: Sequence[int]) -> None:
        self.table = table
        self.masks = list(masks)
        self._ranks = _Ranks(table)
        self._groups: dict[int, list[int]] = {mask: [] for mask in table.worth}
        self._positions = [0] * len(self.masks)  # in the group
        self._present = [0] * len(table.shapes)  # by shape: bits in the order of the ranks
        for gpu, mask in enumerate(self.masks):
            self._enter(gpu, mask)

    def find(self, shape: int) -> tuple[int, int] | None:
        """Return the GPU and the start that are best for an instance; None: it fits nowhere."""
        present = self._present[shape]
        if not present:
            return None
        mask, start = self._ranks.places[shape][(present & -present).bit_length() - 1]
        return self._groups[mask][-1], start

    def change(self, gpu: int, mask: int) -> None:
        """Let a GPU have that mask."""
        before, groups, positions = self.masks[gpu], self._groups, self._positions
        group = groups[before]
        last = group.pop()
        if last != gpu:
            group[positions[gpu]] = last
            positions[last] = positions[gpu]
        if not group:
            present = self._present
            for shape, bit in self._ranks.bits[before]:
                present[shape] ^= bit
        self.masks[gpu] = mask
        self._enter(gpu, mask)

    def _enter(self, gpu: int, mask: int) -> None:
        group = self._groups[mask]
        if not group:
            present = self._present
            for shape, bit in self._ranks.bits[mask]:
                present[shape] |= bit
        self._positions[gpu] = len(group)
        group.append(gpu)


class NumberedPool(SlicePool):
    """The same where among equals the GPU with the lowest number goes first, as published.

    A decision takes longer with more GPUs: it is for comparison.
    """

    def __init__(self, table: SliceTable, masks: Sequence[int]) -> None:
        self._members = dict.fromkeys(table.worth, 0)  # the numbers of the GPUs, as bits
        super().__init__(table, masks)

    def find(self, shape: int) -> tuple[int, int] | None:
        """Return the GPU and the start that are best for an instance; None: it fits nowhere."""
        present = self._present[shape]
        if not present:
            return None
        equals = present & self._ranks.equals[shape][(present & -present).bit_length() - 1]
        lowest: tuple[int, int] | None = None
        while equals:
            mask, start = self._ranks.places[shape][(equals & -equals).bit_length() - 1]
            members = self._members[mask]
            gpu = (members & -members).bit_length() - 1
            if lowest is None or gpu < lowest[0]:
                lowest = gpu, start
            equals &= equals - 1
        return lowest

    def change(self, gpu: int, mask: int) -> None:
        """Let a GPU have that mask."""
        self._members[self.masks[gpu]] ^= 1 << gpu
        super().change(gpu, mask)

    def _enter(self, gpu: int, mask: int) -> None:
        self._members[mask] |= 1 << gpu
        super()._enter(gpu, mask)


def pool_of(table: SliceTable, masks: Sequence[int]) -> SlicePool:
    """Return the GPUs in the form that the policy's ties call for."""
    return NumberedPool(table, masks) if table.is_by_number else SlicePool(table, masks)


class _Ranks:
    """For each shape the masks that it fits on, the best first, and each mask's bit among them."""

    def __init__(self, table: SliceTable) -> None:
        self.places: list[list[tuple[int, int]]] = []  # by shape, by rank: mask and start
        self.equals: list[list[int]] = []  # by shape, by rank: the ranks of equal cost, as bits
        self.bits: dict[int, list[tuple[int, int]]] = {mask: [] for mask in table.worth}
        for shape, choices in enumerate(table.choices):
            ranked = sorted(choices.items(), key=lambda each: (each[1].cost, each[0]))
            self.places.append([(mask, choice.start) for mask, choice in ranked])
            by_cost: dict[float, int] = {}
            for rank, (mask, choice) in enumerate(ranked):
                by_cost[choice.cost] = by_cost.get(choice.cost, 0) | 1 << rank
                self.bits[mask].append((shape, 1 << rank))
            self.equals.append([by_cost[choice.cost] for _, choice in ranked])


# --- what places are worth

# By size and number of starts, on boards of seven slices: what the first place is worth, the
# second, ... Only the ratios matter.
_SEVEN_SLICES: Mapping[Shape, tuple[float, ...]] = {
    Shape(1, (0, 1, 2, 3, 4, 5, 6)): (0.65, 0.0, 0.4, 0.1, 0.45, -0.4, 0.65),
    Shape(2, (0, 2, 4, 6)): (0.3, 0.55, 0.65, 0.2),
    Shape(2, (0, 2, 4)): (0.5, 0.8, 0.8),
    Shape(4, (0, 4)): (0.7, 0.4),
    Shape(4, (0,)): (-0.1,),
    Shape(8, (0,)): (1.25,),
}

_EXACT_DIGITS = 9  # sums of the same weights in another order are the same cost

_Weights = tuple[tuple[float, ...], ...]  # by shape, by how many places there are


def _weights(policy: SlicePolicy, shapes: Sequence[Shape], shares: Sequence[float]) -> _Weights:
    match policy:
        case SlicePolicy.PLACES:
            if all(shape in _SEVEN_SLICES for shape in shapes):
                return tuple(_SEVEN_SLICES[shape] for shape in shapes)
            return tuple((shape.size / len(shapes),) * len(shape.starts) for shape in shapes)
        case SlicePolicy.FRAGMENTATION:
            return tuple((shape.size / len(shapes),) * len(shape.starts) for shape in shapes)
        case SlicePolicy.EXPECTED_FRAGMENTATION:
            return tuple(
                (shape.size * share,) * len(shape.starts)
                for shape, share in zip(shapes, shares, strict=True)
            )
        case SlicePolicy.MOST_PLACEMENTS:
            return tuple((1.0,) * len(shape.starts) for shape in shapes)
        case SlicePolicy.FIRST_FIT | SlicePolicy.BEST_FIT | SlicePolicy.BEST_FIT_BEST_INDEX:
            return tuple((0.0,) * len(shape.starts) for shape in shapes)
        case _:
            assert_never(policy)


def _shares(
    shape_of: Mapping[str, int], mix: Mapping[str, float], shapes: int
) -> tuple[float, ...]:
    """Return how often each shape is asked for; without a mix all equally."""
    total = sum(mix.values())
    if not total:
        return (1 / shapes,) * shapes
    shares = [0.0] * shapes
    for profile, count in mix.items():
        shares[shape_of[profile]] += count / total
    return tuple(shares)


def _reachable(shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Return every mask that places add up to, in ascending order."""
    found = {0}
    todo = [0]
    while todo:
        mask = todo.pop()
        for shape in shapes:
            for start in shape.starts:
                taken = shape.mask(start)
                if mask | taken not in found:
                    found.add(mask | taken)
                    todo.append(mask | taken)
    return tuple(sorted(found))


def _places(mask: int, shapes: Sequence[Shape]) -> list[list[int]]:
    """Return the starts that each shape has left."""
    return [[start for start in each.starts if not mask & each.mask(start)] for each in shapes]


def _worth(mask: int, shapes: Sequence[Shape], weights: _Weights) -> float:
    left = _places(mask, shapes)
    worth = sum(sum(each[: len(starts)]) for each, starts in zip(weights, left, strict=True))
    return round(worth, _EXACT_DIGITS)


def _choose(
    policy: SlicePolicy,
    mask: int,
    shape: Shape,
    worth: Mapping[int, float],
    placements: Mapping[int, int],
) -> Choice:
    """Return the best start for the shape, which fits, and what to compare it by."""
    free = [start for start in shape.starts if not mask & shape.mask(start)]
    full = -mask.bit_count()
    match policy:
        case SlicePolicy.FIRST_FIT:
            return Choice(free[0], 0.0)
        case SlicePolicy.BEST_FIT:
            # Of equally full ones the one with the lowest start, then the lowest number.
            return Choice(free[0], full + free[0] / 1000)
        case SlicePolicy.BEST_FIT_BEST_INDEX:
            start = min(free, key=lambda start: -placements[mask | shape.mask(start)])
            # Of equally full ones the one that keeps most placements, as for the start.
            return Choice(start, full - placements[mask | shape.mask(start)] / 1000)
        case (
            SlicePolicy.MOST_PLACEMENTS
            | SlicePolicy.FRAGMENTATION
            | SlicePolicy.EXPECTED_FRAGMENTATION
            | SlicePolicy.PLACES
        ):
            costs = [worth[mask] - worth[mask | shape.mask(start)] for start in free]
            cost, start = min(zip(costs, free, strict=True))
            return Choice(start, round(cost, _EXACT_DIGITS))
        case _:
            assert_never(policy)
