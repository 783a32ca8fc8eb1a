"""`stoker bench mig`: how many GPU instances a policy finds places for, as they come and go."""

import asyncio
import math
import multiprocessing
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stoker.aggregator.placing.mig_slices import SlicePolicy
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.mig_figures import MigReport, cells_of, name_of
from stoker.cli.bench.mig_playing import BOARD, MIXES, REPACK, Outcome, Run, play
from stoker.cli.bench.progress import Progress
from stoker.core.errors import BadInput, shown

LOADS = "0.7,0.85,1.0,1.3"
LOAD_MAX = 10.0


@dataclass(frozen=True, slots=True)
class MigOptions:
    """What to play."""

    loads: tuple[float, ...]
    mixes: tuple[str, ...]
    seeds: int  # from 0 on
    policies: tuple[SlicePolicy, ...]
    moves: bool  # ours with moves as well
    gpus: int
    requests: int
    jobs: int

    def runs(self) -> list[Run]:
        """Return all of them, cell by cell; free repacking is played always, to compare with."""
        policies = [(str(policy), False) for policy in self.policies]
        if self.moves:
            policies.append((SlicePolicy.PLACES, True))
        return [
            Run(policy, mix, load, seed, self.gpus, self.requests, moves)
            for mix in self.mixes
            for load in self.loads
            for policy, moves in (*policies, (REPACK, False))
            for seed in range(self.seeds)
        ]


def mig_options(
    load: str,
    mix: str,
    seeds: int,
    policies: Sequence[str],
    gpus: int,
    requests: int,
    jobs: int,
    *,
    moves: bool,
) -> MigOptions:
    """Return what to play, from what was typed; raises BadInput."""
    return MigOptions(
        loads=parse_loads(load),
        mixes=parse_mixes(mix),
        seeds=seeds,
        policies=parse_policies(policies, moves=moves),
        moves=moves,
        gpus=gpus,
        requests=requests,
        jobs=jobs,
    )


def parse_loads(text: str) -> tuple[float, ...]:
    """Return the loads of `0.7,1.0`; raises BadInput."""
    loads: dict[float, None] = {}
    for each in text.split(","):
        try:
            load = float(each)
        except ValueError:
            load = math.nan
        if not 0 < load <= LOAD_MAX:  # NaN neither
            raise BadInput(
                f"--load: wanted numbers above 0 and at most {LOAD_MAX:g}, as in {LOADS}, "
                f"found {shown(each)}"
            )
        loads[load] = None
    return tuple(loads)


def parse_mixes(text: str) -> tuple[str, ...]:
    """Return the mixes of `uniform,bimodal`; raises BadInput."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in MIXES:
            raise BadInput(f"--mix: wanted some of {','.join(MIXES)}, found {shown(name)}")
    return names


def parse_policies(names: Sequence[str], *, moves: bool) -> tuple[SlicePolicy, ...]:
    """Return the policies to play, all for none; with moves ours among them. Raises BadInput."""
    known = {str(policy): policy for policy in SlicePolicy}
    chosen = [name for text in names for name in text.split(",")] or list(known)
    for name in chosen:
        if name not in known:
            raise BadInput(f"--policy: wanted some of {', '.join(known)}, found {shown(name)}")
    if moves:
        chosen.append(SlicePolicy.PLACES)
    return tuple(dict.fromkeys(known[name] for name in chosen))


async def measure_mig(options: MigOptions, folder: Path, progress: Progress) -> MigReport:
    """Play everything and report."""
    began_at = time.time()
    outcomes = await _play_all(options.runs(), options.jobs, progress)
    return MigReport(
        board=BOARD.name,
        gpus=options.gpus,
        requests=options.requests,
        seeds=options.seeds,
        cells=cells_of(outcomes),
        at=utc_text(began_at),
        machine=describe_machine(folder),
    )


async def _play_all(runs: Sequence[Run], jobs: int, progress: Progress) -> list[Outcome]:
    """Return what came of each, in order; `jobs` processes share the work."""
    outcomes: dict[Run, Outcome] = {}
    left = Counter((run.policy, run.moves, run.mix, run.load) for run in runs)
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(
        min(jobs, len(runs)), multiprocessing.get_context("spawn"), _let_parent_decide
    ) as players:
        progress.tell(f"playing {len(runs)} runs")
        try:
            for done in asyncio.as_completed(
                [loop.run_in_executor(players, play, run) for run in runs]
            ):
                outcome = await done
                run = outcome.run
                outcomes[run] = outcome
                cell = run.policy, run.moves, run.mix, run.load
                left[cell] -= 1
                if progress.is_live or not left[cell]:
                    of_cell = [
                        each.slices_accepted
                        for each in outcomes.values()
                        if (each.run.policy, each.run.moves, each.run.mix, each.run.load) == cell
                    ]
                    progress.tell(
                        f"{name_of(run)}, {run.mix} at load {run.load:g}: "
                        f"{statistics.fmean(of_cell):.2f} % of the slices "
                        f"({len(outcomes)} of {len(runs)})"
                    )
        except BaseException:
            # What is being played takes a second or so more; nothing else is begun.
            players.shutdown(wait=False, cancel_futures=True)
            raise
    return [outcomes[run] for run in runs]


def _let_parent_decide() -> None:
    """Leave Ctrl-C, which a terminal sends to all, to the process that gives out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
