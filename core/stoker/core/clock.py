"""Time as an argument: what an edge asks for the time, so that a test can own it."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A source of time and of waiting."""

    def now(self) -> float:
        """Return wall-clock time in Unix seconds (UTC)."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back; only differences have a meaning."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`; zero or less only yields to other tasks."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class SteadyClock:
    """The wall time of the start, carried on by the monotonic clock.

    For a process whose deadlines must not move when an administrator or NTP steps the host's clock:
    a step forward would end every lease at once, a step back would make old telemetry look fresh.
    What it dates follows a step only after a restart.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        """Take the clock to carry on; None: the machine's own."""
        self._clock = clock or SystemClock()
        self._ahead = self._clock.now() - self._clock.monotonic()

    def now(self) -> float:
        return self._ahead + self._clock.monotonic()

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
