"""What it costs to take from those who can use nothing else: models that are asked for by name, and
places for jobs of several GPUs on one node.

Littlewood's rule (K. Littlewood, "Forecasting and control of passenger bookings", 1972): the last
seat is worth what a dearer passenger pays, times the chance that so many of them will still come.
Here the dearer passengers are requests that can go nowhere else. How many will come is how many the
mix has until the fleet is full: `HORIZON` times what is left, in requests of the mix. Their number
varies as that of independent arrivals does, and SPREADS times as much for safety, since a few large
jobs are a small sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np

from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.columns import Columns
from stoker.aggregator.placing.kernels import Floats, Ints
from stoker.aggregator.placing.losses import Losses
from stoker.aggregator.placing.tasks import Task

HORIZON = 1.1
SPREADS = 2.0
# Prices are rounded to so many a GPU, so that scores stay as they are until it matters.
GRID = 20
# Of a model's scarcity so much counts, as it is the loss of somebody who has not come yet.
SCARCITY = 0.5
JOBS_MAX = 24  # for which places are kept, those that take most
_SETS_MAX = 127  # of models that somebody cannot go beyond


@dataclass(frozen=True, slots=True)
class Demand:
    """What the mix asks of single cards and of whole nodes; all amounts are those of one mix."""

    gpus: float  # of all requests
    members: Floats  # [set, card]: 1 where the card is in the set
    set_gpus: Floats  # for those who cannot go beyond the set, and squared
    set_squares: Floats
    jobs: Ints  # [job, kernels.JOB_...]
    job_cards: Floats  # [job, card]: 1 where it may run
    job_counts: Floats
    job_squares: Floats


@dataclass(frozen=True, slots=True)
class Prices:
    """What is to be paid beyond the GPUs themselves."""

    scarcity: Floats  # by card: of each GPU of it
    jobs: Floats  # [job, card]: of the place for one


def demand(tasks: Sequence[Task], losses: Losses, cards: int) -> Demand:
    """Return what the tasks of a mix ask for."""
    on_gpus = [task for task in tasks if task.gpus > 0 and any(task.fits)]
    values = [_mean_value(task, losses) for task in on_gpus]
    masks = [_mask(task) for task in on_gpus]
    everything = (1 << cards) - 1
    asked = sorted({mask for mask in masks if mask != everything})
    sets = set(asked)
    for _ in range(2):
        if len(sets) <= _SETS_MAX:
            sets |= {one | other for one in sets for other in asked} - {everything}
    chosen = sorted(sets)[:_SETS_MAX] if len(sets) <= _SETS_MAX else asked[:_SETS_MAX]
    within = [[mask & ~each == 0 for mask in masks] for each in chosen]
    weighed = [task.weight * value for task, value in zip(on_gpus, values, strict=True)]
    squares = [task.weight * value**2 for task, value in zip(on_gpus, values, strict=True)]
    several = sorted(
        (task for task in on_gpus if task.gpus > 1),
        key=lambda task: (-task.weight * task.gpus, task.gpus, task.cpu_milli, task.memory_bytes),
    )[:JOBS_MAX]
    counts = [
        [other.weight * (other.gpus // job.gpus) for other in several if _is_as_large(other, job)]
        for job in several
    ]
    count_squares = [
        [
            other.weight * (other.gpus // job.gpus) ** 2
            for other in several
            if _is_as_large(other, job)
        ]
        for job in several
    ]
    return Demand(
        gpus=sum(weighed),
        set_gpus=_sums(weighed, within),
        set_squares=_sums(squares, within),
        members=np.array(
            [[each >> card & 1 for card in range(cards)] for each in chosen], np.float64
        ).reshape(len(chosen), cards),
        jobs=np.array(
            [(job.gpus, job.cpu_milli, job.memory_bytes) for job in several],
            np.int64,
        ).reshape(len(several), 3),
        job_cards=np.array([job.fits for job in several], np.float64).reshape(len(several), cards),
        job_counts=np.array([sum(each) for each in counts]),
        job_squares=np.array([sum(each) for each in count_squares]),
    )


def prices(wanted: Demand, losses: Losses, columns: Columns) -> Prices:
    """Return the prices on the fleet as it is."""
    cards = len(columns.cards)
    rows = columns.rows[: columns.count]
    slots = columns.slots[: columns.count]
    used = (rows[:, k.ROW_OPEN] == 1) & (rows[:, k.ROW_SLOTS] > 0)
    rows, slots = rows[used], slots[used]
    row_cards = rows[:, k.ROW_CARD]
    usable = losses.rests[row_cards[:, None], slots[:, :, k.SLOT_LEFT]].sum(axis=1)
    left = np.bincount(row_cards, usable, minlength=cards)
    mixes = HORIZON * float(left.sum()) / max(wanted.gpus, k.NOTHING)
    scarcity = np.zeros(cards)
    for place in range(len(wanted.members)):
        chance = _chance(
            mixes * wanted.set_gpus[place] - float(wanted.members[place] @ left),
            mixes * wanted.set_squares[place],
        )
        scarcity = np.maximum(scarcity, wanted.members[place] * _rounded(chance))
    job_prices = np.zeros((len(wanted.jobs), cards))
    rows = rows[rows[:, k.ROW_FREE] > 1]
    row_cards = rows[:, k.ROW_CARD]
    for place, (gpus, cpu, memory) in enumerate(wanted.jobs):
        able = wanted.job_cards[place]
        fitting = rows[:, k.ROW_FREE] // gpus
        if cpu > 0:
            fitting = np.minimum(fitting, rows[:, k.ROW_CPU] // cpu)
        if memory > 0:
            fitting = np.minimum(fitting, rows[:, k.ROW_MEMORY] // memory)
        places = float((fitting * able[row_cards]).sum())
        chance = _chance(
            mixes * wanted.job_counts[place] - places, mixes * wanted.job_squares[place]
        )
        job_prices[place] = able * (_rounded(chance) * gpus)
    return Prices(SCARCITY * scarcity, job_prices)


def _mean_value(task: Task, losses: Losses) -> float:
    values = [losses.value_of(task, card) for card, fits in enumerate(task.fits) if fits]
    return sum(values) / len(values)


def _mask(task: Task) -> int:
    return sum(1 << card for card, fits in enumerate(task.fits) if fits)


def _is_as_large(one: Task, other: Task) -> bool:
    """Whether a place for `one` is always a place for `other`."""
    return (
        one.gpus >= other.gpus
        and one.cpu_milli >= other.cpu_milli
        and one.memory_bytes >= other.memory_bytes
        and _mask(one) & ~_mask(other) == 0
    )


def _sums(amounts: Sequence[float], chosen: Sequence[Sequence[bool]]) -> Floats:
    return np.array(
        [
            sum(amount for amount, is_in in zip(amounts, each, strict=True) if is_in)
            for each in chosen
        ]
    )


def _chance(surplus: float, variance: float) -> float:
    """Return how likely more come than there is room for, if `surplus` more are expected."""
    return 0.5 * (1.0 + erf(surplus / (SPREADS * sqrt(variance) + k.NOTHING) / sqrt(2.0)))


def _rounded(chance: float) -> float:
    return round(chance * GRID) / GRID
