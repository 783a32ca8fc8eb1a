"""What became of a run: how much of the fleet is allocated as tasks arrive, and what was lost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """The fleet right after one arrival; all in thousandths of a GPU."""

    arrived_milli: int  # asked for so far, lost ones included
    allocated_milli: int


@dataclass(frozen=True, slots=True)
class Curve:
    """How much is allocated, by how much has arrived; both in per cent of the fleet's GPUs."""

    allocated: dict[int, float]  # mean over the arrivals with that (rounded) per cent
    first_loss_at: float | None  # arrived when the first task was lost; None: none was


def curve_of(steps: Iterable[Step], capacity_milli: int, first_lost: int | None) -> Curve:
    """Return the curve; `first_lost` is the number of the first step that lost its task."""
    sums: dict[int, tuple[float, int]] = {}
    first_loss_at: float | None = None
    for number, step in enumerate(steps):
        arrived = 100 * step.arrived_milli / capacity_milli
        at = round(arrived)
        total, count = sums.get(at, (0.0, 0))
        sums[at] = (total + 100 * step.allocated_milli / capacity_milli, count + 1)
        if number == first_lost:
            first_loss_at = arrived
    return Curve({at: total / count for at, (total, count) in sums.items()}, first_loss_at)


def allocated_at(allocated: Mapping[int, float], percent: int) -> float:
    """Return how much was allocated when so many per cent had arrived.

    On a small fleet one task may be several per cent: where no arrival falls on the very one, the
    last before it counts.
    """
    return allocated[max(at for at in allocated if at <= percent)]


class Occupation:
    """How much is allocated over time, for its mean and its peak."""

    def __init__(self, at: float) -> None:
        self._at = at
        self._milli = 0
        self._milli_seconds = 0.0
        self._seconds = 0.0
        self.peak_milli = 0

    def change(self, at: float, milli: int) -> None:
        """Take in that from then on so much more is allocated."""
        self._milli_seconds += self._milli * (at - self._at)
        self._seconds += at - self._at
        self._at = at
        self._milli += milli
        self.peak_milli = max(self.peak_milli, self._milli)

    def mean_milli(self, until: float) -> float:
        """Return the mean from the beginning until then."""
        self.change(until, 0)
        return self._milli_seconds / self._seconds if self._seconds else float(self._milli)
