"""What no policy can exceed: a linear program over everything that has arrived, clairvoyant and
free to choose.

It relaxes the fleet: nodes of one kind pool their CPU and memory, and tasks may be split over
kinds of nodes. A GPU stays a bin of 1000 that holds shares of their real sizes, and whole GPUs
come from nodes that have enough of them. Which shares lie together on a GPU is a pattern; patterns
are made as the prices of the last solution call for them (column generation), until no further one
would help. What further ones could still add is part of the bound.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import highspy
import numpy as np

from stoker.aggregator.model import COMPUTE_MILLI
from stoker.testing.workloads.tasks import Host, Task

# The bound is at most so much above what the relaxation allows: in GPUs, or in tasks.
_GAP = 1e-4
_GIB = 2**30
_NOWHERE = np.array([], dtype=np.int32)
_NOTHING = np.array([], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Pool:
    """The nodes of one kind together."""

    model: str
    gpus_each: int
    nodes: int
    cpu_milli_each: int
    memory_bytes_each: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_each


@dataclass(frozen=True, slots=True)
class _Kind:
    """Tasks that ask for the same."""

    cpu_milli: int
    memory_bytes: int
    gpus: int
    gpu_milli: int
    models: tuple[str, ...]
    nodes: int

    @property
    def is_share(self) -> bool:
        return self.gpus == 1 and self.gpu_milli < COMPUTE_MILLI

    def fits(self, pool: _Pool) -> bool:
        """Whether such a task may run on nodes of the pool."""
        has_model = self.gpus == 0 or not self.models or pool.model in self.models
        return has_model and self.gpus <= pool.gpus_each


def allocated_max(hosts: Sequence[Host], tasks: Sequence[Task]) -> float:
    """Return how much GPU can be allocated at most to some of the tasks, in thousandths of one."""
    program = _Program(hosts, _counted([task for task in tasks if task.gpus]))
    program.value(lambda kind: kind.nodes * kind.gpus * kind.gpu_milli / COMPUTE_MILLI)
    return program.solve() * COMPUTE_MILLI


def no_loss_max(hosts: Sequence[Host], tasks: Sequence[Task]) -> int:
    """Return how many of the tasks, in their order, can be placed all together at most."""
    program = _Program(hosts, _counted(tasks))
    program.value(lambda _: 1.0)
    low, high = 0, len(tasks)
    while low < high:
        middle = (low + high + 1) // 2
        program.limit(_counted(tasks[:middle]))
        if program.solve(enough=middle - 2 * _GAP) >= middle - 2 * _GAP:
            low = middle
        else:
            high = middle - 1
    return low


class _Program:
    """The linear program, whose patterns grow as it is solved.

    A variable for every kind of tasks on every pool that it fits, and one for every pattern on
    every pool: how many. Rows: GPUs, CPU and memory of each pool; the shares of each size on each
    pool, not more than its patterns have; the tasks of each kind.
    """

    def __init__(self, hosts: Sequence[Host], counts: Mapping[_Kind, int]) -> None:
        self._pools = _pools_of(hosts)
        self._kinds = list(counts)
        self._sizes = sorted({kind.gpu_milli for kind in self._kinds if kind.is_share})
        self._unit = reduce(math.gcd, self._sizes, COMPUTE_MILLI)
        self._highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self._highs.setOptionValue("output_flag", False)
        self._highs.changeObjectiveSense(highspy.ObjSense.kMaximize)
        self._columns = 0
        self._placed: list[tuple[int, _Kind]] = []  # column, kind
        self._add_rows(counts)
        for place, pool in enumerate(self._pools):
            for kind in self._kinds:
                if kind.fits(pool):
                    self._placed.append((self._columns, kind))
                    self._add_kind(place, kind)
            for size in self._sizes:
                self._add_pattern(place, {size: COMPUTE_MILLI // size})

    def value(self, worth: Callable[[_Kind], float]) -> None:
        """Say what a task of each kind is worth."""
        for column, kind in self._placed:
            self._highs.changeColCost(column, worth(kind))

    def limit(self, counts: Mapping[_Kind, int]) -> None:
        """Say how many tasks of each kind there are."""
        for number, kind in enumerate(self._kinds):
            row = self._kind_row(number)
            self._highs.changeRowBounds(row, -highspy.kHighsInf, counts.get(kind, 0))

    def solve(self, enough: float | None = None) -> float:
        """Return what can be placed at most; with `enough` a part of it that is as much, or a bound
        on it that is less.
        """
        while True:
            self._highs.run()
            status = self._highs.getModelStatus()
            assert status == highspy.HighsModelStatus.kOptimal, status
            value = self._highs.getInfo().objective_function_value
            if enough is not None and value >= enough:
                return value
            gain_max = self._add_patterns(self._highs.getSolution().row_dual)
            at_most = value + gain_max
            if gain_max < _GAP or (enough is not None and at_most < enough):
                return at_most

    def _add_patterns(self, prices: Sequence[float]) -> float:
        """Add to each pool the pattern that helps most, and return how much they can help."""
        gain_max = 0.0
        for place, pool in enumerate(self._pools):
            shares = {size: prices[self._share_row(place, n)] for n, size in enumerate(self._sizes)}
            worth, pattern = best_pattern(shares, self._unit)
            gain = worth - prices[self._gpu_row(place)]
            if gain > 0:
                gain_max += gain * pool.gpus
                self._add_pattern(place, pattern)
        return gain_max

    # --- rows, in their order

    def _gpu_row(self, place: int) -> int:
        return place * (3 + len(self._sizes))

    def _share_row(self, place: int, size: int) -> int:
        return self._gpu_row(place) + 3 + size

    def _kind_row(self, number: int) -> int:
        return self._gpu_row(len(self._pools)) + number

    def _add_rows(self, counts: Mapping[_Kind, int]) -> None:
        for pool in self._pools:
            self._add_row(pool.gpus)
            self._add_row(pool.nodes * pool.cpu_milli_each / 1000)
            self._add_row(pool.nodes * pool.memory_bytes_each / _GIB)
            for _ in self._sizes:
                self._add_row(0)
        for kind in self._kinds:
            self._add_row(counts[kind])

    def _add_row(self, most: float) -> None:
        self._highs.addRow(-highspy.kHighsInf, most, 0, _NOWHERE, _NOTHING)

    # --- columns

    def _add_kind(self, place: int, kind: _Kind) -> None:
        gpu_row = self._gpu_row(place)
        entries = {
            gpu_row + 1: kind.nodes * kind.cpu_milli / 1000,
            gpu_row + 2: kind.nodes * kind.memory_bytes / _GIB,
            self._kind_row(self._kinds.index(kind)): 1.0,
        }
        if kind.is_share:
            entries[self._share_row(place, self._sizes.index(kind.gpu_milli))] = 1.0
        else:
            entries[gpu_row] = float(kind.nodes * kind.gpus)
        self._add_column(entries)

    def _add_pattern(self, place: int, pattern: Mapping[int, int]) -> None:
        entries = {self._gpu_row(place): 1.0}
        for size, count in pattern.items():
            entries[self._share_row(place, self._sizes.index(size))] = -float(count)
        self._add_column(entries)

    def _add_column(self, entries: Mapping[int, float]) -> None:
        told = {row: value for row, value in sorted(entries.items()) if value}
        rows = np.array(list(told), dtype=np.int32)
        values = np.array(list(told.values()), dtype=np.float64)
        self._highs.addCol(0.0, 0.0, highspy.kHighsInf, len(told), rows, values)
        self._columns += 1


def best_pattern(worths: Mapping[int, float], unit: int) -> tuple[float, Mapping[int, int]]:
    """Return what shares of these sizes are worth at most together on one GPU, and which they are.

    `unit` divides every size. (A knapsack without limits on how often an item is taken.)
    """
    room = COMPUTE_MILLI // unit
    best = [0.0] * (room + 1)
    taken = [0] * (room + 1)  # the size that was put in last; 0: none
    items = [(size, size // unit, worth) for size, worth in worths.items() if worth > 0]
    for left in range(1, room + 1):
        best[left] = best[left - 1]
        for size, width, worth in items:
            if width <= left and best[left - width] + worth > best[left]:
                best[left], taken[left] = best[left - width] + worth, size
    pattern: Counter[int] = Counter()
    left = room
    while left > 0:
        pattern[taken[left]] += 1
        left -= taken[left] // unit or 1
    del pattern[0]
    return best[room], pattern


def _counted(tasks: Sequence[Task]) -> Mapping[_Kind, int]:
    return Counter(
        _Kind(task.cpu_milli, task.memory_bytes, task.gpus, task.gpu_milli, task.models, task.nodes)
        for task in tasks
    )


def _pools_of(hosts: Sequence[Host]) -> list[_Pool]:
    alike = Counter((h.model, h.gpus, h.cpu_milli, h.memory_bytes) for h in hosts)
    return [
        _Pool(model, gpus, nodes, cpu_milli, memory_bytes)
        for (model, gpus, cpu_milli, memory_bytes), nodes in alike.items()
    ]
