"""The figures of `stoker bench placement` for people: a table, one line for every policy."""

from collections.abc import Iterator, Sequence

from stoker.cli.bench.placement_figures import (
    BoundFigures,
    Mean,
    PlacementReport,
    PublishedFigures,
    TimedFigures,
)

_PUBLISHED_HEAD = (
    *("policy", "at 100 %", "at 130 %", "first loss", "beats fgd", "decisions/s", "p99"),
)
_TIMED_HEAD = ("policy", "mean", "peak", "refused", "refused GPU time", "decisions/s", "p99")


def placement_lines(report: PlacementReport) -> Iterator[str]:
    """Yield the lines."""
    yield _scene(report)
    yield ""
    head = _TIMED_HEAD if report.protocol == "timed" else _PUBLISHED_HEAD
    rows = [head, *(_row(name, figures) for name, figures in report.policies.items())]
    if report.bound is not None:
        rows.append(_bound_row(report.bound))
    yield from aligned(rows)
    yield ""
    yield _legend(report)


def _scene(report: PlacementReport) -> str:
    tasks = "tasks made by seed" if report.tasks is None else f"{report.tasks} tasks"
    first, last = report.seeds[0], report.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    knows = "learn what tasks are like" if report.mix == "learned" else "know what tasks are like"
    offered = "" if report.offered is None else f"; {report.offered:.2f} % of the GPUs asked for"
    loops = "" if report.compiled else "; interpreted"
    fleet = f"{report.nodes} nodes, {report.gpus} GPUs, {tasks}"
    return f"{fleet}; {seeds}; policies {knows}{loops}{offered}"


def _row(name: str, figures: PublishedFigures | TimedFigures) -> Sequence[str]:
    speed = (
        f"{figures.decisions_per_second:,.0f}",
        f"{figures.decision_p99_seconds * 1e6:.0f} us",
    )
    match figures:
        case PublishedFigures():
            loss, wins = figures.first_loss_at, figures.better_than_fgd
            return (
                name,
                _mean(figures.allocated_at_100),
                _mean(figures.allocated_at_130),
                "-" if loss is None else f"{loss:.1f}",
                "-" if wins is None else f"{wins.at_130} of {wins.seeds}",
                *speed,
            )
        case TimedFigures():
            return (
                name,
                _mean(figures.allocated_mean),
                _mean(figures.allocated_peak),
                _mean(figures.refused),
                _mean(figures.refused_gpu_time),
                *speed,
            )


def _bound_row(bound: BoundFigures) -> Sequence[str]:
    at_100, at_130 = _mean(bound.allocated_at_100), _mean(bound.allocated_at_130)
    return ("bound", at_100, at_130, f"{bound.no_loss_at.mean:.1f}", "-", "-", "-")


def _mean(value: Mean) -> str:
    return f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a line for each row, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        figures = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([f"{name:<{widths[0]}}", *figures])


def _legend(report: PlacementReport) -> str:
    if report.protocol == "timed":
        return "mean and peak of what is allocated, and what was refused, in per cent"
    return "allocated GPUs in per cent of all, when so many per cent of them have been asked for"
