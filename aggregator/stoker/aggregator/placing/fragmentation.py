"""What free GPUs are worth to the requests that are usual: FGD's fragmentation in closed form.

Fragmentation Gradient Descent (Weng et al., "Beware of Fragmentation", USENIX ATC 2023) counts, for
a node n and the usual tasks m with their frequencies p_m, the GPUs that are idle and no use to m:

    F(n) = sum over m of p_m * ( all idle GPU, if m cannot run on n, or wants no GPU
                                 the idle GPU on devices that have less left than m wants, else )

and a request goes where it lets F grow least. What m can run on depends on the card, on how much
CPU is left and, if it wants k GPUs, on the number of free ones. So what is *not* fragmented is

    idle - F(n) = sum over devices g of left_g * W1[card, level, left_g]
                  + free * W2[card, level, free]

with W1 the frequency of the single-GPU tasks that fit into what is left on a device, W2 that of the
tasks that want k > 1 whole GPUs for k <= free, and the level how many of the usual demands for CPU
still fit. Two small tables thus take the place of the sum over all usual tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from stoker.aggregator.placing.kernels import IDLE, MILLION, Ints
from stoker.aggregator.placing.tasks import Task

# Of the mix, the most frequent tasks that make up so much of it are usual; as published.
COVERED = 0.95
# How many levels of CPU are told apart; the demands of the most frequent tasks.
LEVELS_MAX = 30


@dataclass(frozen=True, slots=True)
class Worths:
    """The tables, in millionths of a GPU."""

    levels: Ints  # demands for CPU, rising; level: how many of them are met
    left: Ints  # [card, level, thousandths left of a device]
    free: Ints  # [card, level, free devices]


def usual(tasks: Sequence[Task], covered: float = COVERED) -> list[Task]:
    """Return the most frequent tasks that make up `covered` of the weight, weighing 1 together.

    Tasks that differ in host memory alone are one; where a task may not run it has no size.
    """
    weights: dict[tuple[int, int, tuple[int, ...]], float] = {}
    for task in tasks:
        sizes = tuple(
            milli if fits else 0 for milli, fits in zip(task.milli, task.fits, strict=True)
        )
        key = (task.cpu_milli, task.gpus, sizes)
        weights[key] = weights.get(key, 0.0) + task.weight
    total = sum(weights.values())
    kept: list[tuple[tuple[int, int, tuple[int, ...]], float]] = []
    so_far = 0.0
    for key, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
        if so_far >= covered * total:
            break
        kept.append((key, weight))
        so_far += weight
    return [
        Task(
            cpu_milli=cpu,
            memory_bytes=0,
            gpus=gpus,
            is_share=gpus == 1 and any(0 < milli < IDLE for milli in sizes),
            milli=sizes,
            fits=tuple(milli > 0 for milli in sizes),
            weight=weight / so_far,
        )
        for (cpu, gpus, sizes), weight in kept
    ]


def worths(tasks: Sequence[Task], cards: int, gpus_max: int) -> Worths:
    """Return the tables for `cards` cards and nodes with up to `gpus_max` GPUs."""
    levels = cpu_levels(tasks)
    left = np.zeros((cards, len(levels) + 1, IDLE + 1))
    free = np.zeros((cards, len(levels) + 1, gpus_max + 1))
    for task in tasks:
        if task.gpus == 0:
            continue
        level = level_of(levels, task.cpu_milli)
        for card in range(cards):
            if task.milli[card] == 0:
                continue
            if task.gpus == 1:
                left[card, level:, task.milli[card] :] += task.weight
            else:
                free[card, level:, task.gpus :] += task.weight
    left *= np.arange(IDLE + 1) / IDLE
    free *= np.arange(gpus_max + 1)
    return Worths(
        np.array(levels, np.int64),
        np.rint(left * MILLION).astype(np.int64),
        np.rint(free * MILLION).astype(np.int64),
    )


def cpu_levels(tasks: Sequence[Task]) -> list[int]:
    """Return the demands for CPU that are told apart, rising."""
    demands: dict[int, float] = {}
    for task in tasks:
        if task.cpu_milli > 0:
            demands[task.cpu_milli] = demands.get(task.cpu_milli, 0.0) + task.weight
    most = sorted(demands, key=lambda cpu: (-demands[cpu], cpu))[:LEVELS_MAX]
    return sorted(most)


def level_of(levels: Sequence[int], cpu_milli: int) -> int:
    """Return the lowest level at which so much CPU is there."""
    level = sum(1 for each in levels if each <= cpu_milli)
    # Between two levels: it takes the higher one, which promises no less than is there.
    is_between = cpu_milli > 0 and cpu_milli not in levels
    return min(level + 1, len(levels)) if is_between else level


def points() -> Ints:
    """Return how much less fragmentation, in millionths of a GPU, is worth 1, 2, ... 99 points.

    As published: of 100 points the whole ones of a logistic curve over the change in GPUs.
    """
    return np.array([round(log(each / (100 - each)) * MILLION) for each in range(1, 100)], np.int64)
