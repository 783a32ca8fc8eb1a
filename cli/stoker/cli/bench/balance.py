"""`stoker bench balance`: how even the load of shared GPUs is, by policy, when requests burst."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.cli.bench.figures import Machine
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.placement_figures import Mean
from stoker.cli.bench.placement_table import aligned
from stoker.cli.bench.progress import Progress
from stoker.testing.balancing.playing import LIVE, Course, Evenness, play

POLICIES = ("balanced", LIVE, "spread", "binpack")

_HEAD = (
    *("policy", "memory peak/mean", "utilization peak/mean", "waiting work", "refused"),
    "decisions/s",
)
_LEGEND = (
    "peak/mean: of all GPUs in one second, the mean over the seconds; waiting work: what of the",
    "compute that replicas asked for their GPU could not give; refused: of the replicas.",
    f"{LIVE}: the least loaded by the last sample alone, grants since then not counted.",
)


@dataclass(frozen=True, slots=True)
class BalanceFigures:
    """What became of the load under one policy; mean and deviation over the seeds."""

    memory_peak_to_mean: Mean
    utilization_peak_to_mean: Mean
    memory_mean: Mean  # of all GPUs, as a part of them
    utilization_mean: Mean
    waiting_work: Mean  # of the compute that was asked for, what its GPU could not give
    refused: Mean  # of the replicas
    decisions_per_second: float  # of one core's time
    by_seed: tuple[Evenness, ...]


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """What policies make of bursts of replicas on shared GPUs."""

    nodes: int
    gpus: int
    warm_up_seconds: float  # of virtual time; so are the next
    seconds: float
    seeds: tuple[int, ...]
    replicas: float  # on the mean
    policies: Mapping[str, BalanceFigures]
    at: str  # when it began, UTC
    machine: Machine


async def measure_balance(
    course: Course, seeds: Sequence[int], folder: Path, progress: Progress
) -> BalanceReport:
    """Play every policy with every seed and report."""
    began_at = time.time()
    runs: list[Evenness] = []
    count = len(POLICIES) * len(seeds)
    for policy in POLICIES:
        for seed in seeds:
            progress.tell(f"{policy}, seed {seed} ({len(runs) + 1} of {count})")
            runs.append(await asyncio.to_thread(play, policy, seed, course))
    return BalanceReport(
        nodes=course.nodes,
        gpus=course.nodes * course.gpus_each,
        warm_up_seconds=course.warm_up_seconds,
        seconds=course.seconds,
        seeds=tuple(seeds),
        replicas=statistics.fmean(run.replicas for run in runs),
        policies={
            policy: _figures([run for run in runs if run.policy == policy]) for policy in POLICIES
        },
        at=utc_text(began_at),
        machine=describe_machine(folder),
    )


def balance_lines(report: BalanceReport) -> Iterator[str]:
    """Yield the report for people."""
    first, last = report.seeds[0], report.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    yield (
        f"{report.gpus} shared GPUs on {report.nodes} nodes, {report.replicas:,.0f} replicas in "
        f"{report.warm_up_seconds + report.seconds:,.0f} s of virtual time; {seeds}"
    )
    yield ""
    yield from aligned([_HEAD, *(_row(name, each) for name, each in report.policies.items())])
    yield ""
    yield from _LEGEND


def _figures(runs: Sequence[Evenness]) -> BalanceFigures:
    return BalanceFigures(
        memory_peak_to_mean=Mean.of([run.memory_peak_to_mean for run in runs]),
        utilization_peak_to_mean=Mean.of([run.utilization_peak_to_mean for run in runs]),
        memory_mean=Mean.of([run.memory_mean for run in runs]),
        utilization_mean=Mean.of([run.utilization_mean for run in runs]),
        waiting_work=Mean.of([run.waiting_work for run in runs]),
        refused=Mean.of([run.refused for run in runs]),
        decisions_per_second=statistics.harmonic_mean([run.decisions_per_second for run in runs]),
        by_seed=tuple(runs),
    )


def _row(name: str, figures: BalanceFigures) -> Sequence[str]:
    return (
        name,
        _ratio(figures.memory_peak_to_mean),
        _ratio(figures.utilization_peak_to_mean),
        _percent(figures.waiting_work),
        _percent(figures.refused),
        f"{figures.decisions_per_second:,.0f}",
    )


def _ratio(value: Mean) -> str:
    return f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")


def _percent(value: Mean) -> str:
    return f"{100 * value.mean:.2f} %"
