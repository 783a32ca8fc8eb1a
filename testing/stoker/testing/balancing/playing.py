"""A run: replicas come and go on shared GPUs under one policy, and how even the load was."""

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stoker.aggregator.placing.balanced import Balancer
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.policies import Policies
from stoker.testing.balancing.arrivals import make_replicas
from stoker.testing.balancing.shared_fleet import GPU_MEMORY_BYTES, SharedFleet

# What `balanced` would be if it believed each sample, and forgot what it has granted since.
LIVE = "live"

_REPORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Course:
    """How long a run is, and on what; seconds are of virtual time."""

    nodes: int = 8
    gpus_each: int = 8
    warm_up_seconds: float = 600.0
    seconds: float = 1200.0  # after that, in which is measured


@dataclass(frozen=True, slots=True)
class Evenness:
    """How even the load of the GPUs was; ratios of peaks to means are means over the seconds."""

    policy: str
    seed: int
    memory_peak_to_mean: float
    utilization_peak_to_mean: float
    memory_mean: float  # of all GPUs, as a part of them
    utilization_mean: float
    waiting_work: float  # of the compute that was asked for, what its GPU could not give
    refused: float  # of the replicas
    replicas: int
    decisions_per_second: float


def play(policy: str, seed: int, course: Course) -> Evenness:
    """Return how even the load was under a policy by name, or LIVE."""
    until = course.warm_up_seconds + course.seconds
    gpus = course.nodes * course.gpus_each
    replicas = make_replicas(seed, until, gpus, GPU_MEMORY_BYTES)
    fleet = SharedFleet(course.nodes, course.gpus_each, _placer(policy))
    tally = _Tally()
    # What happens when: a node's report by its number, or the end of an allocation by its id.
    agenda: list[tuple[float, int, str]] = []
    for number in range(course.nodes):
        fleet.report(number)
        # Nodes report in turn, as they do when they were not all started at once.
        heapq.heappush(agenda, ((number + 1) / course.nodes, number, ""))
    waiting = list(reversed(replicas))
    second = 0
    while second < until:
        at, number, id_ = agenda[0]
        if second <= at and (not waiting or second <= waiting[-1].at):
            fleet.now = float(second)
            fleet.live()
            if second >= course.warm_up_seconds:
                tally.add(fleet.memory_ratios(), fleet.demands())
            second += 1
        elif waiting and waiting[-1].at < at:
            replica = waiting.pop()
            fleet.now = replica.at
            granted = fleet.ask(replica)
            if granted is not None:
                ends_at = replica.at + replica.run_seconds
                heapq.heappush(agenda, (ends_at, course.nodes + replica.number, granted))
        elif id_:
            heapq.heappop(agenda)
            fleet.now = at
            fleet.end(id_)
        else:
            heapq.heapreplace(agenda, (at + _REPORT_SECONDS, number, ""))
            fleet.now = at
            fleet.report(number)
    return Evenness(
        policy=policy,
        seed=seed,
        memory_peak_to_mean=statistics.fmean(tally.memory_peaks),
        utilization_peak_to_mean=statistics.fmean(tally.utilization_peaks),
        memory_mean=statistics.fmean(tally.memory_means),
        utilization_mean=statistics.fmean(tally.utilization_means),
        waiting_work=tally.waiting / tally.demanded if tally.demanded else 0.0,
        refused=fleet.refused / max(1, len(replicas)),
        replicas=len(replicas),
        decisions_per_second=fleet.decisions / fleet.decision_seconds if fleet.decisions else 0.0,
    )


class _Tally:
    """What was seen, second by second."""

    def __init__(self) -> None:
        self.memory_peaks: list[float] = []  # over the mean
        self.memory_means: list[float] = []
        self.utilization_peaks: list[float] = []  # over the mean
        self.utilization_means: list[float] = []
        self.demanded = 0.0
        self.waiting = 0.0

    def add(self, memory: Sequence[float], demands: Sequence[float]) -> None:
        """Count one second; GPUs that all do nothing are even."""
        utilization = [min(1.0, demand) for demand in demands]
        self.demanded += sum(demands)
        self.waiting += sum(demands) - sum(utilization)
        for ratios, peaks, means in (
            (memory, self.memory_peaks, self.memory_means),
            (utilization, self.utilization_peaks, self.utilization_means),
        ):
            mean = statistics.fmean(ratios)
            means.append(mean)
            peaks.append(max(ratios) / mean if mean > 0 else 1.0)


def _placer(policy: str) -> Placer:
    if policy == LIVE:
        believing = Balancer(settle_seconds=0.0, hysteresis=0.0)
        return Placer(Policies.named("balanced"), balancer=believing)
    return Placer(Policies.named(policy))
