"""Waiting for what other processes do: look, pause for a moment, look again, up to a bound."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.02


async def until(
    what: str, look: Callable[[], Awaitable[T | None]], seconds: float = PATIENCE_SECONDS
) -> T:
    """Return the first answer of `look` that is neither None nor False.

    Raises AssertionError, saying what was waited for, when there is none within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = await look()
        if answer is not None and answer is not False:
            return answer
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        await asyncio.sleep(PAUSE_SECONDS)


async def until_true(
    what: str, look: Callable[[], bool], seconds: float = PATIENCE_SECONDS
) -> None:
    """Return once `look` says True; raises AssertionError as `until` does."""

    async def ask() -> bool:
        return look()

    await until(what, ask, seconds)
