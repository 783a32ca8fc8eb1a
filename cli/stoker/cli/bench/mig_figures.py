"""What `stoker bench mig` reports of its runs, and how it shows it; shares in per cent."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stoker.cli.bench.figures import Machine
from stoker.cli.bench.mig_playing import REPACK, Outcome, Run
from stoker.cli.bench.placement_figures import Mean
from stoker.cli.bench.placement_table import aligned

_HEAD = ("policy", "requests", "slices", "gap to repack", "with moves", "gap closed", "decisions/s")
_GAP_MIN = 0.01  # points: less is one request or none
_LEGEND = (
    "requests, slices: accepted, in per cent, mean and deviation over the seeds; repack: unlimited",
    "free migration, the reference; gap: of the slices, to repack; with moves: of the requests, so",
    "many had others moved; gap closed: by these moves; decisions/s: of one core's time, with what",
    "they and departures change.",
)


@dataclass(frozen=True, slots=True)
class MovesFigures:
    """What moves took, and what they gave."""

    requests_with_moves: Mean  # of the requests
    moves: Mean  # in a run
    slices_moved: Mean  # in a run
    # Of the slices, between no moves and repack; None: there is none to speak of.
    gap_closed: float | None


@dataclass(frozen=True, slots=True)
class MigFigures:
    """What a policy makes of one mix at one load."""

    requests_accepted: Mean
    slices_accepted: Mean
    requests_gap: Mean  # that repack accepts more, in points; by seed
    slices_gap: Mean
    moves: MovesFigures | None
    decisions_per_second: float  # the slowest of the seeds; of repack it says nothing


@dataclass(frozen=True, slots=True)
class Cell:
    """One mix at one load."""

    mix: str
    load: float
    policies: Mapping[str, MigFigures]


@dataclass(frozen=True, slots=True)
class MigReport:
    """What policies make of instances that come and go."""

    board: str
    gpus: int
    requests: int  # in a run, after the warm-up
    seeds: int  # from 0 on
    cells: tuple[Cell, ...]
    at: str  # when it began, UTC
    machine: Machine


def name_of(run: Run) -> str:
    """Return the policy for people and for programs."""
    return f"{run.policy}+moves" if run.moves else run.policy


def cells_of(outcomes: Sequence[Outcome]) -> tuple[Cell, ...]:
    """Return the figures by mix and load; runs of repack must be among them."""
    cells: dict[tuple[str, float], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        run = outcome.run
        by_policy = cells.setdefault((run.mix, run.load), {})
        by_policy.setdefault(name_of(run), []).append(outcome)
    return tuple(
        Cell(mix, load, {name: _figures(runs, by_policy) for name, runs in by_policy.items()})
        for (mix, load), by_policy in cells.items()
    )


def mig_lines(report: MigReport) -> Iterator[str]:
    """Yield the report for people."""
    seeds = f"{report.seeds} seed{'' if report.seeds == 1 else 's'}"
    yield f"{report.gpus} x {report.board}, {report.requests:,} requests a run, {seeds}"
    for cell in report.cells:
        yield ""
        yield f"{cell.mix} at load {cell.load:g}"
        yield from aligned([_HEAD, *(_row(name, each) for name, each in cell.policies.items())])
    yield ""
    yield from _LEGEND


def _figures(runs: Sequence[Outcome], by_policy: Mapping[str, Sequence[Outcome]]) -> MigFigures:
    best = {each.run.seed: each for each in by_policy[REPACK]}
    pairs = [(each, best[each.run.seed]) for each in runs]
    return MigFigures(
        requests_accepted=Mean.of([each.requests_accepted for each in runs]),
        slices_accepted=Mean.of([each.slices_accepted for each in runs]),
        requests_gap=Mean.of(
            [top.requests_accepted - each.requests_accepted for each, top in pairs]
        ),
        slices_gap=Mean.of([top.slices_accepted - each.slices_accepted for each, top in pairs]),
        moves=_moves(runs, by_policy) if runs[0].run.moves else None,
        decisions_per_second=min(each.decisions_per_second for each in runs),
    )


def _moves(runs: Sequence[Outcome], by_policy: Mapping[str, Sequence[Outcome]]) -> MovesFigures:
    without = Mean.of([each.slices_accepted for each in by_policy[runs[0].run.policy]]).mean
    top = Mean.of([each.slices_accepted for each in by_policy[REPACK]]).mean
    reached = Mean.of([each.slices_accepted for each in runs]).mean
    gap = top - without
    return MovesFigures(
        requests_with_moves=Mean.of([each.requests_with_moves for each in runs]),
        moves=Mean.of([float(each.moves) for each in runs]),
        slices_moved=Mean.of([float(each.slices_moved) for each in runs]),
        gap_closed=100 * (reached - without) / gap if gap >= _GAP_MIN else None,
    )


def _row(name: str, figures: MigFigures) -> Sequence[str]:
    moves = figures.moves
    closed = moves.gap_closed if moves is not None else None
    return (
        name,
        _mean(figures.requests_accepted),
        _mean(figures.slices_accepted),
        "-" if name == REPACK else f"{figures.slices_gap.mean:.2f}",
        "-" if moves is None else f"{moves.requests_with_moves.mean:.2f}",
        "-" if closed is None else f"{closed:.0f} %",
        "-" if name == REPACK else f"{figures.decisions_per_second:,.0f}",
    )


def _mean(value: Mean) -> str:
    return f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")
