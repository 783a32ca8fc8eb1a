"""The clock of a test: it stands still until the test says so."""

import asyncio

from stoker.testing.clock import VirtualClock


async def sleeper(clock: VirtualClock, seconds: float, woken: list[tuple[float, float]]) -> None:
    await clock.sleep(seconds)
    woken.append((seconds, clock.monotonic()))


async def test_sleepers_wake_each_at_its_time_and_in_order() -> None:
    clock = VirtualClock(now=1000.0)
    woken: list[tuple[float, float]] = []
    async with asyncio.TaskGroup() as tasks:
        for seconds in (3.0, 1.0, 2.0):
            tasks.create_task(sleeper(clock, seconds, woken))
        await clock.advance(2.5)
        assert woken == [(1.0, 1.0), (2.0, 2.0)]
        assert (clock.now(), clock.monotonic()) == (1002.5, 2.5)
        await clock.advance(0.5)
    assert woken[-1] == (3.0, 3.0)


async def test_a_sleeper_that_sleeps_again_wakes_within_the_same_advance() -> None:
    clock = VirtualClock()
    ticks: list[float] = []

    async def tick() -> None:
        while len(ticks) < 3:
            await clock.sleep(1.0)
            ticks.append(clock.monotonic())

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tick())
        await clock.advance(10.0)
    assert ticks == [1.0, 2.0, 3.0]


async def test_a_step_of_the_wall_clock_wakes_nobody() -> None:
    clock = VirtualClock(now=1000.0)
    woken: list[tuple[float, float]] = []
    task = asyncio.create_task(sleeper(clock, 5.0, woken))
    await clock.advance(1.0)
    clock.step_wall(3600.0)
    await clock.advance(1.0)
    assert woken == []
    assert (clock.now(), clock.monotonic()) == (4602.0, 2.0)
    await clock.advance(3.0)
    await task
