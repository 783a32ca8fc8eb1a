"""Pattern prices: what each size of share is worth when GPUs are cut into shares as well as can be.

A GPU is a stick of 1000 thousandths, the shares are the pieces that are cut from it. Of all ways to
cut it (patterns) some leave nothing: 810 + 190. The linear program

    maximise  sum over sizes s of q_s * P_s     subject to, for every pattern:  sum of its P_s <= 1

is the dual of the cutting-stock problem (Gilmore and Gomory, 1961) for the mix with q_s pieces of
each size; P_s, in GPUs, is what a piece costs when all GPUs are cut well. V[w], the most that can
be had out of w thousandths, tells good rests from bad ones: putting s where w is left wastes
V[w] - V[w - s] - P_s of a GPU, nothing where the two belong to one good pattern.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from stoker.aggregator.placing.kernels import IDLE, Floats

# Sizes are rounded up to so many thousandths, which is finer than anybody plans with.
UNIT = 10
UNITS = IDLE // UNIT
# Sizes that are priced, the most wanted ones: the program stays one of milliseconds.
SIZES_MAX = 64
_PATTERNS_MAX = 1_000
_NOTHING = 1e-9
_TIGHT = 1e-6

Pattern = Mapping[int, int]  # size in units -> how many


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What pieces and rests of a GPU are worth, in GPUs."""

    pieces: Mapping[int, float]  # by size in thousandths
    rests: Floats  # of 0..1000 thousandths
    patterns: tuple[Pattern, ...] = ()  # the good ones

    def price_of(self, size: int) -> float:
        """Return what a piece of any size is worth; of one that nobody asked for, cut from a whole
        GPU.
        """
        known = self.pieces.get(-(-size // UNIT) * UNIT)
        return float(self.rests[IDLE] - self.rests[IDLE - size]) if known is None else known

    def least_of(self, size: int) -> float:
        """Return what a piece of any size takes where it takes least."""
        return float((self.rests[size:] - self.rests[: IDLE + 1 - size]).min())


# Where nobody asks for shares: a rest is worth nothing.
NOTHING_CUT = Prices({}, np.array([0.0] * IDLE + [1.0]))


def cut(wanted: Mapping[int, float], known: Sequence[Pattern] = ()) -> Prices:
    """Return the prices for a mix with so many pieces of each size (thousandths, 1..999).

    `known`: patterns that were good for a mix like this; they only save time.
    """
    counts: dict[int, float] = {}
    for size, count in wanted.items():
        counts[-(-size // UNIT)] = counts.get(-(-size // UNIT), 0.0) + count
    most = sorted(counts, key=lambda size: (-counts[size], size))[:SIZES_MAX]
    sizes = sorted((size for size in most if counts[size] > 0), reverse=True)
    if not sizes:
        return NOTHING_CUT
    total = sum(counts[size] for size in sizes)
    program = _Program([counts[size] / total for size in sizes])
    for place, size in enumerate(sizes):
        program.add([UNITS // size if each == place else 0 for each in range(len(sizes))])
    for known_pattern in known:
        program.add([known_pattern.get(size, 0) for size in sizes])
    patterns = list(known)
    for _ in range(_PATTERNS_MAX):
        prices = program.solve()
        values, pattern = _dearest(sizes, prices)
        if values[-1] <= 1.0 + _NOTHING:
            break
        program.add(pattern)
        patterns.append(dict(zip(sizes, pattern, strict=True)))
    else:
        raise AssertionError(f"no end of patterns for {dict(wanted)}")
    pieces = {size * UNIT: price for size, price in zip(sizes, prices, strict=True)}
    rests = np.minimum(1.0, np.repeat(np.array(values), UNIT)[: IDLE + 1])
    rests[IDLE] = 1.0
    worths = dict(zip(sizes, prices, strict=True))
    tight = [
        each
        for each in patterns
        if sum(count * worths.get(size, 0.0) for size, count in each.items()) > 1.0 - _TIGHT
    ]
    return Prices(pieces, rests, tuple(tight))


class _Program:
    """The linear program over the patterns found so far."""

    def __init__(self, gains: list[float]) -> None:
        self._size = len(gains)
        self._solver = highspy.Highs()  # type: ignore[no-untyped-call]
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("threads", 1)
        for column, gain in enumerate(gains):
            self._solver.addVar(0.0, 1.0)
            self._solver.changeColCost(column, gain)
        self._solver.changeObjectiveSense(highspy.ObjSense.kMaximize)

    def add(self, pattern: list[int]) -> None:
        """Let the pattern be worth a GPU at most."""
        places = [place for place in range(self._size) if pattern[place]]
        counts = [float(pattern[place]) for place in places]
        self._solver.addRow(
            -highspy.kHighsInf,
            1.0,
            len(places),
            np.array(places, np.int32),
            np.array(counts, np.float64),
        )

    def solve(self) -> list[float]:
        """Return the price of each size."""
        self._solver.run()
        return [float(price) for price in self._solver.getSolution().col_value]


def _dearest(sizes: list[int], prices: list[float]) -> tuple[list[float], list[int]]:
    """Return the most that can be had out of each rest, and the pattern of a whole GPU for it.

    Sizes and rests are in units.
    """
    values = np.zeros(UNITS + 1)
    cuts = [-1] * (UNITS + 1)
    widths, gains = np.array(sizes), np.array(prices)
    for rest in range(1, UNITS + 1):
        values[rest] = values[rest - 1]
        fitting = widths <= rest
        if fitting.any():
            offers = np.where(fitting, values[rest - widths] + gains, -1.0)
            best = int(offers.argmax())
            if offers[best] > values[rest] + _NOTHING / 1000:
                values[rest] = offers[best]
                cuts[rest] = best
    pattern = [0] * len(sizes)
    rest = UNITS
    while rest > 0:
        if cuts[rest] < 0:
            rest -= 1
        else:
            pattern[cuts[rest]] += 1
            rest -= sizes[cuts[rest]]
    return [float(value) for value in values], pattern
