"""One run over a workload: every arrival is asked for, once, and what became of it is told."""

import bisect
import itertools
from collections.abc import Sequence

from stoker.aggregator.placing.kernels import INTERPRETED, Kernels
from stoker.testing.load import percentile
from stoker.testing.workloads.arrivals import Arrival, Departures, arranged, arrivals, recorded
from stoker.testing.workloads.bound import allocated_max, no_loss_max
from stoker.testing.workloads.contenders import make_placer
from stoker.testing.workloads.messages import Bound, Play, PublishedRun, TimedRun
from stoker.testing.workloads.outcome import Occupation, Step, curve_of
from stoker.testing.workloads.stage import Stage
from stoker.testing.workloads.tasks import Task, Workload


def play(
    workload: Workload, what: Play, *, is_learning: bool, kernels: Kernels = INTERPRETED
) -> PublishedRun | TimedRun:
    """Play the workload once."""
    order, rng = arranged(workload, what.seed)
    mix = None if is_learning else workload.tasks
    stage = Stage(workload.hosts, make_placer(what.policy, mix, order, what.seed, kernels))
    if what.is_timed:
        return _play_timed(what, workload, stage, recorded(workload, rng))
    return _play_published(what, workload, stage, arrivals(workload, rng))


def find_bound(workload: Workload, seed: int) -> Bound:
    """Return what no policy can exceed on the arrivals of that seed, by the published protocol."""
    _, rng = arranged(workload, seed)
    tasks = arrivals(workload, rng)
    capacity = workload.capacity_milli
    arrived = list(itertools.accumulate(task.gpu_milli_total for task in tasks))
    until_full = bisect.bisect_right(arrived, capacity)
    kept = no_loss_max(workload.hosts, tasks)
    return Bound(
        seed=seed,
        allocated_at_100=100 * allocated_max(workload.hosts, tasks[:until_full]) / capacity,
        allocated_at_130=100 * allocated_max(workload.hosts, tasks) / capacity,
        no_loss_at=100 * arrived[kept - 1] / capacity if kept else 0.0,
    )


def _play_published(
    what: Play, workload: Workload, stage: Stage, tasks: Sequence[Task]
) -> PublishedRun:
    arrived = allocated = lost = 0
    first_lost: int | None = None
    steps: list[Step] = []
    for number, task in enumerate(tasks):
        arrived += task.gpu_milli_total
        if stage.ask(task, str(number)) is not None:
            allocated += task.gpu_milli_total
        else:
            lost += 1
            first_lost = number if first_lost is None else first_lost
        steps.append(Step(arrived, allocated))
    curve = curve_of(steps, workload.capacity_milli, first_lost)
    return PublishedRun(
        policy=what.policy,
        seed=what.seed,
        allocated=curve.allocated,
        first_loss_at=curve.first_loss_at,
        arrivals=len(tasks),
        lost=lost,
        decision_seconds=sum(stage.decision_seconds),
        decision_p99_seconds=percentile(sorted(stage.decision_seconds), 0.99) or 0.0,
    )


def _play_timed(
    what: Play, workload: Workload, stage: Stage, coming: Sequence[Arrival]
) -> TimedRun:
    assert coming, "a workload without times"
    begins_at, ends_at = coming[0].at, coming[-1].at
    occupation, departures = Occupation(begins_at), Departures()
    held: dict[str, int] = {}
    offered = asked = refused_asked = 0.0
    for number, arrival in enumerate(coming):
        for at, id_ in departures.until(arrival.at):
            stage.end(id_)
            occupation.change(at, -held.pop(id_))
        milli = arrival.task.gpu_milli_total
        asked += milli * arrival.runs_seconds
        offered += milli * min(arrival.runs_seconds, ends_at - arrival.at)
        id_ = str(number)
        if stage.ask(arrival.task, id_) is None:
            refused_asked += milli * arrival.runs_seconds
            continue
        held[id_] = milli
        occupation.change(arrival.at, milli)
        departures.add(arrival.at + arrival.runs_seconds, id_)
    per_cent = 100 / workload.capacity_milli
    return TimedRun(
        policy=what.policy,
        seed=what.seed,
        allocated_mean=occupation.mean_milli(ends_at) * per_cent,
        allocated_peak=occupation.peak_milli * per_cent,
        offered_mean=_ratio(offered, ends_at - begins_at) * per_cent,
        refused=100 * stage.refused / len(coming),
        refused_gpu_time=100 * _ratio(refused_asked, asked),
        arrivals=len(coming),
        decision_seconds=sum(stage.decision_seconds),
        decision_p99_seconds=percentile(sorted(stage.decision_seconds), 0.99) or 0.0,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
