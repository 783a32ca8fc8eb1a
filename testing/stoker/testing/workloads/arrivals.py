"""In which order tasks arrive, and how many: the published protocol, and the recorded times."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from stoker.testing.workloads.tasks import Task, Workload

# The published protocol goes on until so much of the fleet's GPUs has been asked for.
ARRIVED_RATIO = 1.3


def arrivals(workload: Workload, rng: Random) -> list[Task]:
    """Return the tasks that arrive, in their order, by the protocol of the published comparison.

    Every task once, in random order; then tasks drawn at random, with replacement, until the next
    one would pass ARRIVED_RATIO of the fleet's GPUs. Where the tasks ask for more than that at
    once, tasks drawn at random are taken away until they do not.
    """
    limit = workload.capacity_milli * ARRIVED_RATIO
    tasks = list(workload.tasks)
    rng.shuffle(tasks)
    arrived = sum(task.gpu_milli_total for task in tasks)
    while arrived > limit:
        arrived -= tasks.pop(rng.randrange(len(tasks))).gpu_milli_total
    if len(tasks) < len(workload.tasks):
        return tasks
    while True:
        task = workload.tasks[rng.randrange(len(workload.tasks))]
        arrived += task.gpu_milli_total
        if arrived > limit:
            return tasks
        tasks.append(task)


def arranged(workload: Workload, seed: int) -> tuple[tuple[str, ...], Random]:
    """Return the order in which ties between nodes are resolved in the run of a seed, and what is
    to decide the order of its arrivals: both the same for every policy.
    """
    rng = Random(seed)
    names = [host.name for host in workload.hosts]
    rng.shuffle(names)
    return tuple(names), rng


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task comes, and runs for so long if it gets a place."""

    at: float
    task: Task
    runs_seconds: float


def recorded(workload: Workload, rng: Random) -> list[Arrival]:
    """Return the tasks that have times, as they came; those of one instant in random order."""
    timed = [
        Arrival(task.arrives_at, task, task.runs_seconds)
        for task in workload.tasks
        if task.arrives_at is not None and task.runs_seconds is not None
    ]
    rng.shuffle(timed)
    timed.sort(key=lambda arrival: arrival.at)
    return timed


class Departures:
    """What will end, soonest first; of one instant in the order of arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []
        self._count = 0

    def add(self, at: float, id_: str) -> None:
        """Note that it ends then."""
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, id_))

    def until(self, at: float) -> Iterator[tuple[float, str]]:
        """Yield when and what ends by then, and forget it."""
        while self._heap and self._heap[0][0] <= at:
            ends_at, _, id_ = heapq.heappop(self._heap)
            yield ends_at, id_
