"""`stoker bench placement`: what policies make of a fleet, by the published protocol or by time."""

import asyncio
import re
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.aggregator import compiled
from stoker.aggregator.placing.policies import POLICIES
from stoker.cli.bench.children import Child, Children
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.placement_figures import (
    REFERENCE,
    PlacementReport,
    bound_figures,
    published_figures,
    timed_figures,
)
from stoker.cli.bench.progress import Progress
from stoker.core.errors import BadInput
from stoker.testing.load import Connected
from stoker.testing.workloads.messages import (
    Bound,
    FindBound,
    Generated,
    Instruction,
    PlacementPlan,
    Play,
    PublishedRun,
    Recorded,
    TimedRun,
)
from stoker.testing.workloads.outcome import allocated_at
from stoker.testing.workloads.sources import Source

# As in the published comparison.
PUBLISHED_SEEDS = "42-51"
# The published policies, and ours.
CONTENDERS = (
    "random", "dotprod", "clustering", "packing", "bestfit", "fgd", "fragmentation",
)  # fmt: skip
ALL = "all"
SEEDS_MAX = 1000
# Compiling the placer's loops takes seconds: on smaller fleets they are done sooner without.
COMPILED_GPUS_MIN = 1000
# How often the tasks that are made would fill the fleet: once where none departs.
_TURNS_TIMED = 8.0


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What to play."""

    nodes: Path | None  # None with `tasks`: made by seed
    tasks: Path | None
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    is_timed: bool
    copies: int
    is_learning: bool
    bound: bool
    jobs: int

    def plan(self) -> PlacementPlan:
        """Return what its processes play."""
        workload: Recorded | Generated = Generated()
        if self.nodes is not None and self.tasks is not None:
            workload = Recorded(str(self.nodes), str(self.tasks))
        turns = _TURNS_TIMED if self.is_timed else 1.0
        return PlacementPlan(workload, self.copies, turns, self.is_learning)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `42-51`, or of `42`; raises BadInput."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < first + SEEDS_MAX:
        raise BadInput(
            f"--seeds: wanted a seed or two as in {PUBLISHED_SEEDS}, the lower one first and at "
            f"most {SEEDS_MAX} in all, found {text!r}"
        )
    return tuple(range(first, last + 1))


def check_policies(names: Sequence[str]) -> tuple[str, ...]:
    """Return the policies to play; raises BadInput for unknown ones.

    All contenders for none, and for ALL; the published ones are written in many ways, so that
    capital letters do not count.
    """
    found: dict[str, None] = {}
    for name in map(str.lower, names or (ALL,)):
        if name != ALL and name not in POLICIES:
            raise BadInput(
                f"--policy: wanted {ALL} or one of {', '.join(POLICIES)}, found {name!r}"
            )
        found.update(dict.fromkeys(CONTENDERS if name == ALL else (name,)))
    return tuple(found)


async def measure_placement(
    options: PlacementOptions, folder: Path, progress: Progress
) -> PlacementReport:
    """Play everything and report; raises BadInput for what is in the files, ChildFailed."""
    began_at = time.time()
    plan = options.plan()
    loops = folder / "loops"
    progress.tell("reading the workload")
    workload = await asyncio.to_thread(lambda: Source(plan).workload(options.seeds[0]))
    if options.is_timed and all(task.runs_seconds is None for task in workload.tasks):
        raise BadInput(
            f"{options.tasks}: --protocol timed: wanted columns creation_time and deletion_time, "
            "found no task with both"
        )
    gpus = sum(host.gpus for host in workload.hosts)
    if gpus >= COMPILED_GPUS_MIN and compiled.is_available():
        loops.mkdir()
        plan = msgspec.structs.replace(plan, compiled=str(loops))
    # Bounds first: they take longest, and what is left to do last should be short.
    what: list[Instruction] = [FindBound(seed) for seed in options.seeds] if options.bound else []
    what += [
        Play(policy, seed, options.is_timed)
        for policy in options.policies
        for seed in options.seeds
    ]
    said = await _do_all(what, plan, options.jobs, folder, progress)
    published = [each for each in said if isinstance(each, PublishedRun)]
    timed = [each for each in said if isinstance(each, TimedRun)]
    reference = [run for run in published if run.policy == REFERENCE]
    return PlacementReport(
        protocol="timed" if options.is_timed else "fgd",
        nodes=len(workload.hosts),
        gpus=gpus,
        tasks=len(workload.tasks) if isinstance(plan.workload, Recorded) else None,
        copies=options.copies,
        seeds=options.seeds,
        mix="learned" if options.is_learning else "given",
        compiled=plan.compiled is not None,
        offered=statistics.fmean(run.offered_mean for run in timed) if timed else None,
        policies={
            policy: timed_figures([run for run in timed if run.policy == policy])
            if options.is_timed
            else published_figures([run for run in published if run.policy == policy], reference)
            for policy in options.policies
        },
        bound=bound_figures([each for each in said if isinstance(each, Bound)]),
        at=utc_text(began_at),
        machine=describe_machine(folder),
    )


Result = PublishedRun | TimedRun | Bound


async def _do_all(
    what: Sequence[Instruction],
    plan: PlacementPlan,
    jobs: int,
    folder: Path,
    progress: Progress,
) -> list[Result]:
    """Return what came of each, in order; `jobs` processes share the work."""
    results: dict[int, Result] = {}
    todo = deque(enumerate(what))

    async def work(child: Child) -> None:
        while todo:
            number, instruction = todo.popleft()
            child.tell(instruction)
            said = await child.hear()
            assert isinstance(said, PublishedRun | TimedRun | Bound), said
            results[number] = said
            progress.tell(f"{described(said)} ({len(results)} of {len(what)})")

    async with Children(folder) as children:
        progress.tell("starting the players")
        argument = msgspec.json.encode(plan).decode()

        async def start(number: int) -> Child:
            name = f"player {number + 1}"
            child = await children.start(name, "stoker.testing.workloads.player", [argument])
            said = await child.hear()
            assert isinstance(said, Connected), said
            return child

        # What the first one compiles the others load.
        first = await start(0)
        others = await asyncio.gather(*map(start, range(1, min(jobs, len(what)))))
        try:
            async with asyncio.TaskGroup() as group:
                for child in (first, *others):
                    group.create_task(work(child))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return [results[number] for number in range(len(what))]


def described(result: Result) -> str:
    """Return what came of one run in a few words."""
    match result:
        case PublishedRun():
            value = f"{allocated_at(result.allocated, 130):.2f} % allocated in the end"
            return f"{result.policy}, seed {result.seed}: {value}"
        case TimedRun():
            value = f"{result.allocated_mean:.2f} % allocated on the mean"
            return f"{result.policy}, seed {result.seed}: {value}"
        case Bound():
            return f"bound, seed {result.seed}: {result.allocated_at_100:.2f} % at 100 %"
