"""How far a bench is, on standard error: a live line in a terminal, plain lines elsewhere."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

TICK_SECONDS = 1.0


class Progress:
    """What is being done, told to whoever watches."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_live = console.is_terminal
        self._console = console
        self._bar = Bar(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("starting")

    @property
    def is_live(self) -> bool:
        """Whether somebody watches a terminal, so that small steps are worth telling."""
        return self._is_live

    @contextmanager
    def shown(self) -> Generator[None]:
        """Show it meanwhile."""
        if not self._is_live:
            yield
            return
        with self._bar:
            yield

    def tell(self, what: str) -> None:
        """Say what is being done now."""
        if self._is_live:
            self._bar.update(self._task, description=what)
        else:
            self._console.print(what, highlight=False, markup=False)

    async def wait_until(self, at: float, what: str) -> None:
        """Wait until `at` (monotonic), showing how much of it is over."""
        began = time.monotonic()
        self.tell(f"{what} for {at - began:.0f} s")
        while (left := at - time.monotonic()) > 0:
            await asyncio.sleep(min(left, TICK_SECONDS))
            if self._is_live:
                self.tell(f"{what}: {min(at, time.monotonic()) - began:.0f} of {at - began:.0f} s")
