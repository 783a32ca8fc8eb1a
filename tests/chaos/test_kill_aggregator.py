"""kill -9 of the aggregator under load: nothing acknowledged is lost, nothing is granted twice."""

import asyncio
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
from tests.chaos.crowd import Crowd, is_settled
from tests.chaos.record import Record
from tests.support.daemons import Stage, free_nodes, python_module, ready_nodes
from tests.support.pages import fetch_metrics, read_page, total
from tests.support.waiting import until, until_true

from stoker.client import Allocations, AsyncFleet, Unreachable
from stoker.testing.crashing import Point

AGENTS = 4
GPUS_PER_AGENT = 64
CLIENTS = 200
# How often a point is passed before the process ends there: among the first events of a life, and
# well into the load.
PASSES_MAX = 40
# How many answers the crowd hears before a kill from outside.
ANSWERS_MAX = 150


@dataclass(frozen=True, slots=True)
class Inside:
    """The process ends itself when it passes a point for the n-th time."""

    point: Point
    passes: int


@dataclass(frozen=True, slots=True)
class Outside:
    """SIGKILL so long after the crowd has heard so many answers."""

    answers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Starting:
    """SIGKILL so long after the start, perhaps before the aggregator listens."""

    seconds: float


End = Inside | Outside | Starting


def draw_ends(rng: Random, count: int) -> list[End]:
    """Half of the ends inside, every point in its turn; half outside, some of them at the start."""
    points = list(Point)
    ends: list[End] = []
    for number in range(count // 2):
        ends.append(Inside(points[number % len(points)], rng.randint(1, PASSES_MAX)))
    while len(ends) < count:
        if rng.random() < 0.15:
            ends.append(Starting(rng.uniform(0.0, 1.5)))
        else:
            ends.append(Outside(rng.randint(0, ANSWERS_MAX), rng.uniform(0.0, 0.1)))
    rng.shuffle(ends)
    return ends


class Ordeal:
    """An aggregator that is killed again and again, four agents, and two hundred clients."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.record = Record()
        self.kills: Counter[str] = Counter()
        self.cut_off = 0  # calls that were under way when the aggregator was killed
        self._stage = stage
        self._seed = seed
        self._aggregator = stage.aggregator("--log-level", "warning")
        self._agents = [
            stage.agent(f"node-{number}", f"{GPUS_PER_AGENT}xT4", "--log-level", "error")
            for number in range(AGENTS)
        ]
        self._total_bytes: dict[str, int] = {}

    async def run(self, ends: list[End]) -> None:
        """Go through all of it; raises AssertionError where the aggregator did wrong."""
        await self._aggregator.start()
        pages = [(await agent.start())["metrics"] for agent in self._agents]
        async with self._stage.fleet(patience=0) as fleet:
            nodes = await free_nodes(fleet, AGENTS)
            gpus = [gpu for node in nodes.values() for gpu in node.gpus]
            self._total_bytes = {gpu.uuid: gpu.memory_total_bytes for gpu in gpus}
            assert len(self._total_bytes) == AGENTS * GPUS_PER_AGENT
            self._aggregator.kill()
            crowd = Crowd(fleet, self.record, size=CLIENTS, seed=self._seed)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(crowd.run())
                for end in ends:
                    await self._live_and_die(end, crowd, fleet)
                await self._aggregator.start()
                await self._check(fleet)
                crowd.leave()
            await self._check_settled(fleet, pages)

    async def _live_and_die(self, end: End, crowd: Crowd, fleet: AsyncFleet) -> None:
        """Start the aggregator, check what it knows, let the crowd at it, and kill it."""
        match end:
            case Starting(seconds):
                self._aggregator.spawn()
                await asyncio.sleep(seconds)
                self._aggregator.kill()
                self.kills["starting"] += 1
                return
            case Inside(point, passes):
                options = self._stage.aggregator_options("--log-level", "warning")
                crashing = python_module("stoker.testing.crashing")
                await self._aggregator.start([*crashing, point, str(passes), *options])
                await self._check(fleet)
                await ready_nodes(fleet, AGENTS)
                self._aggregator.process.send_signal(signal.SIGUSR1)
                crowd.open()
                await until_true(f"{end}", lambda: not self._aggregator.is_running, 60)
                self.kills[point] += 1
            case Outside(answers, seconds):
                await self._aggregator.start()
                await self._check(fleet)
                await ready_nodes(fleet, AGENTS)
                enough = self.record.answers + answers
                crowd.open()
                await until_true("answers", lambda: self.record.answers >= enough)
                await asyncio.sleep(seconds)
                self.cut_off += crowd.under_way
                self._aggregator.kill()
                self.kills["outside"] += 1
        assert self._aggregator.process.returncode == -signal.SIGKILL, self._aggregator.log_end()
        await crowd.hush()

    async def _check(self, fleet: AsyncFleet) -> None:
        """Hold what the aggregator knows after its restart against what the clients know."""

        async def listed() -> Allocations | None:
            try:
                return await fleet.allocations(include_ended=True)
            except Unreachable:  # the connection has not found the new process yet
                return None

        found = await until("the aggregator to answer", listed)
        self.record.compare(found.allocations, self._total_bytes)

    async def _check_settled(self, fleet: AsyncFleet, pages: list[str]) -> None:
        """When every client has left, nothing is left: in the ledger, on the nodes, anywhere."""
        assert all(is_settled(wish) for wish in self.record.wishes.values())

        async def is_empty() -> bool:
            return not (await fleet.allocations()).allocations

        await until("the last TTL to run out", is_empty)
        nodes = (await fleet.nodes()).nodes
        assert [gpu.uuid for node in nodes for gpu in node.gpus if gpu.allocation_ids] == []

        async def is_let_go() -> bool:
            texts = [await fetch_metrics(page) for page in pages]
            return all(total(read_page(t), "stoker_gpu_allocations") == 0 for t in texts)

        await until("the nodes to hold nothing", is_let_go)

    def told(self) -> str:
        """Return what happened, in one line."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.record.counts.items()))
        kills = ", ".join(f"{count} {name}" for name, count in sorted(self.kills.items()))
        return (
            f"seed {self._seed}: {self.kills.total()} kills ({kills}), "
            f"{self.cut_off} calls cut off; clients were told of {counts}"
        )


async def go_through(
    folder: Path, kills: int, seed: int, show: pytest.CaptureFixture[str]
) -> Ordeal:
    async with Stage(folder) as stage:
        ordeal = Ordeal(stage, seed)
        try:
            await ordeal.run(draw_ends(Random(seed), kills))
        finally:
            with show.disabled():
                sys.stdout.write(f"\n{ordeal.told()}\n")
    return ordeal


def check_was_hard(ordeal: Ordeal, kills: int) -> None:
    """A crowd that was never cut off, or that did only one thing, proves nothing."""
    assert ordeal.kills.total() == kills
    assert ordeal.cut_off > 0
    for kind in ("grants", "releases", "gangs", "shares", "abandoned"):
        assert ordeal.record.counts[kind] > 0, kind


async def test_five_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ordeal = await go_through(tmp_path, kills=5, seed=1, show=capsys)
    check_was_hard(ordeal, kills=5)


@pytest.mark.slow
async def test_a_hundred_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Another seed every day, as in the simulation; a failure prints it.
    seed = int(os.environ.get("STOKER_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
    ordeal = await go_through(tmp_path, kills=100, seed=seed, show=capsys)
    check_was_hard(ordeal, kills=100)
    assert {*Point, "outside", "starting"} <= ordeal.kills.keys()
