"""A clock that a test owns: time passes when the test says so, and sleepers wake in order."""

import asyncio
import heapq
import itertools


class VirtualClock:
    """A `stoker.core.clock.Clock` that stands still until `advance`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._wall = now
        self._monotonic = 0.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due = self._monotonic + seconds
        heapq.heappush(self._sleepers, (due, next(self._order), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass: wake every sleeper that is due, each at its own time, in order."""
        end = self._monotonic + seconds
        await _settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self._pass_until(max(due, self._monotonic))  # later, if everybody stood still
            if not future.done():
                future.set_result(None)
            await _settle()
        self._pass_until(end)

    def step_wall(self, seconds: float) -> None:
        """Move wall time alone, as NTP does; monotonic time and sleepers stay."""
        self._wall += seconds

    def stand_still(self, seconds: float) -> None:
        """Let time pass in which nobody runs, as under SIGSTOP; sleepers wake with `advance`."""
        self._pass_until(self._monotonic + seconds)

    def _pass_until(self, monotonic: float) -> None:
        self._wall += monotonic - self._monotonic
        self._monotonic = monotonic


async def _settle() -> None:
    """Let every task that can run do so, until it waits for something of its own."""
    for _ in range(20):
        await asyncio.sleep(0)
