"""What `stoker bench placement` reports of its runs; shares in per cent of the fleet's GPUs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stoker.cli.bench.figures import Machine
from stoker.testing.workloads.messages import Bound, PublishedRun, TimedRun
from stoker.testing.workloads.outcome import allocated_at

# The published policy that others are held against.
REFERENCE = "fgd"


@dataclass(frozen=True, slots=True)
class Mean:
    """A figure over the seeds."""

    mean: float
    std: float | None  # of the sample; None: one seed

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Return mean and deviation of these."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation)


@dataclass(frozen=True, slots=True)
class SeedFigures:
    """One run by the published protocol."""

    seed: int
    allocated_at_100: float
    allocated_at_130: float
    first_loss_at: float | None  # arrived then; None: nothing was lost
    arrivals: int
    lost: int


@dataclass(frozen=True, slots=True)
class Wins:
    """In how many of the seeds it allocates more than the reference with the same seed."""

    at_100: int
    at_130: int
    seeds: int


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """What a policy makes of the published protocol."""

    allocated_at_100: Mean
    allocated_at_130: Mean
    first_loss_at: float | None  # mean; None: a run lost nothing
    better_than_fgd: Wins | None  # None: it is the reference, or that was not run
    decisions_per_second: float  # of one core's time
    decision_p99_seconds: float  # the worst of the seeds
    by_seed: tuple[SeedFigures, ...]


@dataclass(frozen=True, slots=True)
class TimedSeedFigures:
    """One run by recorded times."""

    seed: int
    allocated_mean: float
    allocated_peak: float
    offered_mean: float
    refused: float
    refused_gpu_time: float
    arrivals: int


@dataclass(frozen=True, slots=True)
class TimedFigures:
    """What a policy makes of recorded arrivals and departures."""

    allocated_mean: Mean  # over time, from the first arrival to the last
    allocated_peak: Mean
    refused: Mean  # tasks, in per cent of them
    refused_gpu_time: Mean  # in per cent of what was asked for
    decisions_per_second: float
    decision_p99_seconds: float
    by_seed: tuple[TimedSeedFigures, ...]


@dataclass(frozen=True, slots=True)
class BoundFigures:
    """What no policy can exceed, by a linear program over what has arrived."""

    allocated_at_100: Mean
    allocated_at_130: Mean
    no_loss_at: Mean  # nobody can have the first loss later
    by_seed: tuple[Bound, ...]


@dataclass(frozen=True, slots=True)
class PlacementReport:
    """What policies make of a workload."""

    protocol: str
    nodes: int
    gpus: int
    tasks: int | None  # of the files; None: made by seed
    copies: int
    seeds: tuple[int, ...]
    mix: str  # "given": policies know what the tasks are like; "learned" from what arrives
    compiled: bool  # whether the placer's loops were, as they are in production on large fleets
    offered: float | None  # by recorded times: what the tasks would have, had all a place
    policies: Mapping[str, PublishedFigures | TimedFigures]
    bound: BoundFigures | None
    at: str  # when it began, UTC
    machine: Machine


def published_figures(
    runs: Sequence[PublishedRun], reference: Sequence[PublishedRun]
) -> PublishedFigures:
    """Return the figures of one policy; `reference` are the runs of the reference, if any."""
    by_seed = tuple(_of_seed(run) for run in runs)
    others = reference if runs[0].policy != REFERENCE else ()
    losses = [each.first_loss_at for each in by_seed if each.first_loss_at is not None]
    return PublishedFigures(
        allocated_at_100=Mean.of([each.allocated_at_100 for each in by_seed]),
        allocated_at_130=Mean.of([each.allocated_at_130 for each in by_seed]),
        first_loss_at=statistics.fmean(losses) if len(losses) == len(by_seed) else None,
        better_than_fgd=_wins(by_seed, [_of_seed(run) for run in others]),
        decisions_per_second=_per_second(runs),
        decision_p99_seconds=max(run.decision_p99_seconds for run in runs),
        by_seed=by_seed,
    )


def timed_figures(runs: Sequence[TimedRun]) -> TimedFigures:
    """Return the figures of one policy."""
    return TimedFigures(
        allocated_mean=Mean.of([run.allocated_mean for run in runs]),
        allocated_peak=Mean.of([run.allocated_peak for run in runs]),
        refused=Mean.of([run.refused for run in runs]),
        refused_gpu_time=Mean.of([run.refused_gpu_time for run in runs]),
        decisions_per_second=_per_second(runs),
        decision_p99_seconds=max(run.decision_p99_seconds for run in runs),
        by_seed=tuple(
            TimedSeedFigures(
                seed=run.seed,
                allocated_mean=run.allocated_mean,
                allocated_peak=run.allocated_peak,
                offered_mean=run.offered_mean,
                refused=run.refused,
                refused_gpu_time=run.refused_gpu_time,
                arrivals=run.arrivals,
            )
            for run in runs
        ),
    )


def bound_figures(bounds: Sequence[Bound]) -> BoundFigures | None:
    """Return the bounds over the seeds; None: none was looked for."""
    if not bounds:
        return None
    return BoundFigures(
        allocated_at_100=Mean.of([each.allocated_at_100 for each in bounds]),
        allocated_at_130=Mean.of([each.allocated_at_130 for each in bounds]),
        no_loss_at=Mean.of([each.no_loss_at for each in bounds]),
        by_seed=tuple(bounds),
    )


def _of_seed(run: PublishedRun) -> SeedFigures:
    return SeedFigures(
        seed=run.seed,
        allocated_at_100=allocated_at(run.allocated, 100),
        allocated_at_130=allocated_at(run.allocated, 130),
        first_loss_at=run.first_loss_at,
        arrivals=run.arrivals,
        lost=run.lost,
    )


def _wins(runs: Sequence[SeedFigures], reference: Sequence[SeedFigures]) -> Wins | None:
    if not reference:
        return None
    pairs = list(zip(runs, reference, strict=True))
    return Wins(
        at_100=sum(mine.allocated_at_100 > other.allocated_at_100 for mine, other in pairs),
        at_130=sum(mine.allocated_at_130 > other.allocated_at_130 for mine, other in pairs),
        seeds=len(pairs),
    )


def _per_second(runs: Sequence[PublishedRun] | Sequence[TimedRun]) -> float:
    return sum(run.arrivals for run in runs) / sum(run.decision_seconds for run in runs)
