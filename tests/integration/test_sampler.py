"""The sampling loop on a real driver host: what is asked for when, and what the manager hears.

The loop's time is the test's: a turn ends when the service manager was told of it, and the next one
begins when the clock moves on.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.driver_hosts import HASTY, PATIENCE, Scene, hang
from tests.support.node import Node
from tests.support.waiting import until_true

from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Patience
from stoker.agent.events import Event
from stoker.agent.facts import Fact, Rate
from stoker.agent.model import CollectorStatus, DriverState
from stoker.agent.readings import GpuReading
from stoker.agent.sampler import Sampler
from stoker.testing.clock import VirtualClock

INTERVAL = 1.0
SLOW_INTERVAL = 10.0
FAST, BOTH = (Rate.FAST,), (Rate.FAST, Rate.SLOW)


class Host(DriverHost):
    """A driver host that remembers what it was asked for, and waits while it is held up."""

    def __init__(self, scene: Scene, patience: Patience) -> None:
        super().__init__(scene.source, patience=patience)
        self.asked: list[tuple[tuple[Rate, ...], bool]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def sample(
        self, rates: tuple[Rate, ...] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        self.asked.append((rates, profiling))
        await self.may_answer.wait()
        return await super().sample(rates, profiling=profiling)

    @property
    def rates(self) -> list[tuple[Rate, ...]]:
        return [rates for rates, _ in self.asked]


@dataclass
class Loop:
    """A sampler, the state that it tells, and what the service manager has heard."""

    scene: Scene
    host: Host
    sampler: Sampler
    node: Node
    clock: VirtualClock
    heard: list[dict[str, str]]

    async def turns(self, count: int) -> None:
        """Let time pass until so many more turns have ended."""
        for _ in range(count):
            before = len(self.heard)
            await self.clock.advance(INTERVAL)
            await until_true("a turn of the loop", lambda: len(self.heard) > before)  # noqa: B023

    def driver_is(self, state: DriverState) -> bool:
        return self.node.view.driver.state is state

    @property
    def watchdogs(self) -> int:
        return sum(message.get("WATCHDOG") == "1" for message in self.heard)

    @property
    def readies(self) -> list[int]:
        return [number for number, message in enumerate(self.heard) if "READY" in message]


@contextlib.asynccontextmanager
async def looping(tmp_path: Path, patience: Patience = PATIENCE) -> AsyncGenerator[Loop]:
    """A loop whose first turn has ended."""
    scene = Scene(tmp_path / "scenario.json")
    async with contextlib.AsyncExitStack() as stack:
        loop = await stack.enter_async_context(held_up(scene, patience))
        loop.host.may_answer.set()
        await until_true("the first turn", lambda: bool(loop.heard))
        yield loop


@contextlib.asynccontextmanager
async def held_up(scene: Scene, patience: Patience = PATIENCE) -> AsyncGenerator[Loop]:
    """A loop whose first question is not answered before the test allows it."""
    host, clock, node = Host(scene, patience), VirtualClock(), Node(now=1_700_000_000.0)
    host.may_answer.clear()
    heard: list[dict[str, str]] = []

    def happen(event: Event) -> None:
        node.now = clock.now()
        node.happen(event)

    def tell(**state: str) -> None:
        heard.append(state)

    sampler = Sampler(
        host,
        interval_seconds=INTERVAL,
        slow_interval_seconds=SLOW_INTERVAL,
        view=lambda: node.view,
        happen=happen,
        tell=tell,
        clock=clock,
    )
    tasks = [asyncio.create_task(host.run()), asyncio.create_task(sampler.run())]
    try:
        yield Loop(scene, host, sampler, node, clock, heard)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_fast_facts_come_with_every_turn_and_slow_ones_with_the_first_and_each_tenth(
    tmp_path: Path,
) -> None:
    async with looping(tmp_path) as loop:
        await loop.turns(21)
        assert loop.host.rates == [BOTH, *[FAST] * 9, BOTH, *[FAST] * 9, BOTH, FAST]
        told = loop.node.view.telemetry[0].facts
        assert {Fact.TEMPERATURE_CELSIUS, Fact.POWER_LIMIT_WATTS} <= told.keys()
        assert loop.sampler.statuses["fast"].succeeded
        assert loop.sampler.statuses["slow"].succeeded
        assert loop.sampler.statuses["inventory"].succeeded
        last = loop.sampler.statuses["slow"].last_success_at
        assert last == loop.clock.now() - 1, "it is of the last but one turn"


async def test_after_a_failure_fast_facts_come_first_and_slow_ones_right_after(
    tmp_path: Path,
) -> None:
    async with looping(tmp_path, HASTY) as loop:
        await loop.turns(2)
        loop.scene.faults(hang(1))
        await until_failed(loop)
        failed = len(loop.host.asked)
        loop.scene.mend()
        while loop.node.view.samples == ():
            await loop.turns(1)
        await loop.turns(2)
        after = loop.host.rates[failed:]
        assert BOTH in after
        assert set(after[: after.index(BOTH)]) == {FAST}
        assert loop.node.view.telemetry[0].facts[Fact.POWER_LIMIT_WATTS] > 0


async def until_failed(loop: Loop) -> None:
    """Let turns pass until one has failed."""
    while not loop.node.view.sample_failures:
        await loop.turns(1)


async def test_the_watchdog_is_fed_by_every_turn_though_the_driver_hangs(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scenario.json")
    scene.faults(hang(None, "nvmlInit"))
    async with held_up(scene, HASTY) as loop:
        loop.host.may_answer.set()
        await until_true("the first turn", lambda: bool(loop.heard))
        await loop.turns(2)
        assert loop.watchdogs == len(loop.heard) == 3
        assert loop.readies == [0], "that it is bad is known with the first turn"
        assert loop.driver_is(DriverState.BLOCKED)
        status = loop.heard[0]["STATUS"]
        assert status.startswith("no GPU is read: driver blocked: ")
        assert "nvmlInit" in loop.node.view.driver.reason
        assert loop.sampler.statuses["fast"].succeeded is False
        assert loop.sampler.statuses["fast"].last_success_at is None


async def test_a_loop_that_does_not_turn_feeds_nothing(tmp_path: Path) -> None:
    async with held_up(Scene(tmp_path / "scenario.json")) as loop:
        await until_true("the first question", lambda: bool(loop.host.asked))
        await loop.clock.advance(600.0)
        assert loop.heard == []
        loop.host.may_answer.set()
        await until_true("the first turn", lambda: bool(loop.heard))
        (message,) = loop.heard
        assert message["READY"] == message["WATCHDOG"] == "1"
        assert message["STATUS"].startswith("4 GPUs read; ")


async def test_ready_is_said_once(tmp_path: Path) -> None:
    async with looping(tmp_path) as loop:
        await loop.turns(3)
        assert loop.readies == [0]
        assert loop.watchdogs == 4


async def test_while_released_nobody_is_asked_and_the_watchdog_is_fed(tmp_path: Path) -> None:
    async with looping(tmp_path) as loop:
        loop.node.release(5.0)
        await loop.host.release()
        asked, failures = len(loop.host.asked), loop.host.counters.failures_total
        await loop.turns(4)
        assert len(loop.host.asked) == asked
        assert loop.host.counters.failures_total == failures
        assert loop.node.view.sample_failures == {}
        assert loop.driver_is(DriverState.RELEASED)
        assert loop.heard[-1]["STATUS"].startswith("no GPU is read: released by root at ")
        assert loop.watchdogs == len(loop.heard)
        for status in loop.sampler.statuses.values():
            assert status == CollectorStatus(last_success_at=status.last_success_at)
            assert status.last_success_at is not None

        # Its time is over with the fifth second.
        loop.host.resume()
        await loop.turns(1)
        assert loop.node.view.release is None
        assert loop.host.rates[asked:] == [BOTH]
        assert loop.driver_is(DriverState.READING)
        assert len(loop.node.view.samples) == 4


async def test_what_is_under_way_when_it_is_released_counts_as_no_failure(tmp_path: Path) -> None:
    async with looping(tmp_path) as loop:
        loop.host.may_answer.clear()
        asked = len(loop.host.asked)
        advancing = asyncio.create_task(loop.clock.advance(INTERVAL))
        await until_true("the question", lambda: len(loop.host.asked) > asked)
        await advancing
        loop.node.release()
        await loop.host.release()
        loop.host.may_answer.set()
        turns = len(loop.heard)
        await until_true("the turn to end", lambda: len(loop.heard) > turns)
        assert loop.node.view.sample_failures == {}
        assert loop.sampler.statuses["fast"].succeeded


@pytest.mark.parametrize("seconds", [None, 3.0])
async def test_hardware_counters_are_left_alone_for_as_long_as_asked(
    tmp_path: Path, seconds: float | None
) -> None:
    async with looping(tmp_path) as loop:
        loop.sampler.pause_profiling(seconds)
        await loop.turns(5)
        expected = [False] * 5 if seconds is None else [False, False, True, True, True]
        assert [profiling for _, profiling in loop.host.asked[1:]] == expected
        loop.sampler.resume_profiling()
        await loop.turns(1)
        assert loop.host.asked[-1][1]
