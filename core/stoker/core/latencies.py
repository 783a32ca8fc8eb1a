"""How long operations take, as counts in fixed buckets: the bounds, and what they tell."""

from bisect import bisect_left
from collections.abc import Sequence

# In seconds; an operation counts in the first bucket whose bound it does not exceed, one beyond the
# last in a bucket of its own. Both sides of the wire, and Prometheus, go by them.
BOUNDS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
BUCKETS = len(BOUNDS) + 1
# A year: no operation takes longer, and sums of many stay numbers.
SECONDS_MAX = 31_536_000.0


def bucket_of(seconds: float) -> int:
    """Return the number of the bucket in which an operation of so many seconds counts."""
    return bisect_left(BOUNDS, seconds)


def quantile(counts: Sequence[float], ratio: float) -> float | None:
    """Return the seconds that `ratio` of the operations do not exceed; None: there are none.

    Within a bucket they are taken to lie evenly, as Prometheus does; beyond the last bound it is
    that bound.
    """
    total = sum(counts)
    if total <= 0:
        return None
    rank, below = ratio * total, 0.0
    for number, count in enumerate(counts[: len(BOUNDS)]):
        if count > 0 and below + count >= rank:
            low = BOUNDS[number - 1] if number else 0.0
            return low + (BOUNDS[number] - low) * max(0.0, rank - below) / count
        below += count
    return BOUNDS[-1]
