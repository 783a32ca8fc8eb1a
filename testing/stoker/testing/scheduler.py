"""Virtual time for a world without tasks: what is due is done, in order."""

import heapq
import itertools
from collections.abc import Callable


class Scheduler:
    """Runs callables at virtual times (seconds from 0); equal times run in the order they were
    asked for.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events_run = 0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Run `what` at `when`, or now if that is past."""
        heapq.heappush(self._due, (max(when, self.now), next(self._order), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Run `what` in `seconds`."""
        self.at(self.now + seconds, what)

    def run_until(self, end: float, after_each: Callable[[], None]) -> None:
        """Run everything due up to `end`; `after_each` is called after every single one."""
        while self._due and self._due[0][0] <= end:
            self.now, _, what = heapq.heappop(self._due)
            what()
            self.events_run += 1
            after_each()
        self.now = end
