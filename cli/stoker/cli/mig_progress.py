"""How far an operation on partitions is, on standard error: bars in a terminal, lines elsewhere."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from stoker.cli import screen
from stoker.cli.mig_asking import Tell
from stoker.cli.render_mig import progress
from stoker.cli.text import one_line
from stoker.core.mig.reports import GpuMigFacts


@contextmanager
def telling(*, is_silent: bool) -> Generator[Tell]:
    """Give who is to hear of each look at the GPUs."""
    if is_silent:
        yield lambda _gpus: None
    elif sys.stderr.isatty():
        # What is left on the screen is the outcome, which is printed after it.
        with Progress(*_columns(), console=screen.console(sys.stderr), transient=True) as bars:
            yield _Bars(bars).tell
    else:
        yield _Lines().tell


def _columns() -> tuple[TextColumn | BarColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )


class _Bars:
    """A bar for each GPU."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def tell(self, gpus: Sequence[GpuMigFacts]) -> None:
        for gpu in gpus:
            if gpu.uuid not in self._tasks:
                self._tasks[gpu.uuid] = self._bars.add_task(f"GPU {gpu.index}", state="")
            self._bars.update(
                self._tasks[gpu.uuid],
                total=gpu.steps_total or None,
                completed=gpu.steps_done,
                state=sentence(gpu),
            )


class _Lines:
    """A line for each change."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def tell(self, gpus: Sequence[GpuMigFacts]) -> None:
        for gpu in gpus:
            told = sentence(gpu)
            if self._told.get(gpu.uuid) != told:
                self._told[gpu.uuid] = told
                print(f"stoker: GPU {gpu.index}: {told}", file=sys.stderr, flush=True)


def sentence(gpu: GpuMigFacts) -> str:
    """Return how far a GPU is, and why, on one line."""
    return one_line(f"{progress(gpu)}: {gpu.reason}" if gpu.reason else progress(gpu))
