"""Acknowledged means fsynced: the syscalls of a real aggregator against its clients' notes."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from tests.support.daemons import Stage, free_nodes
from tests.support.tracing import Sync, parse_syncs, traced
from tests.support.waiting import until

from stoker.client import AsyncFleet

T = TypeVar("T")

pytestmark = pytest.mark.strace

ONE_BY_ONE = 20
AT_ONCE = 50
ROUNDS = 4
# strace gives microseconds, cut off.
CLOCK_SECONDS = 2e-6


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A grant or a release, from when it was asked for to when the client had the answer."""

    what: str
    asked_at: float
    told_at: float

    def is_covered(self, sync: Sync) -> bool:
        """Whether the sync began after the question and was done before the answer."""
        return (
            self.asked_at - CLOCK_SECONDS <= sync.began_at
            and sync.done_at <= self.told_at + CLOCK_SECONDS
        )


class Notary:
    """Clients of one fleet, with a note of each answer."""

    def __init__(self, fleet: AsyncFleet) -> None:
        self.acknowledged: list[Acknowledged] = []
        self._fleet = fleet

    async def grant_and_release(self, key: str) -> None:
        """Take one GPU and give it back, without waiting for its node."""
        allocation = await self._noted(
            f"grant {key}", lambda: self._fleet.request(holder="notary", idempotency_key=key)
        )
        await self._noted(f"release {key}", lambda: self._fleet.release(allocation.id, wait=0))

    async def crowd(self, turn: int) -> None:
        """Do so many times at once; return when the nodes have let go of it all."""
        keys = (f"many-{turn}-{number}" for number in range(AT_ONCE))
        await asyncio.gather(*(self.grant_and_release(key) for key in keys))

        async def is_over() -> bool:
            return not (await self._fleet.allocations()).allocations

        await until("the nodes to let go", is_over)

    async def _noted(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        asked_at = time.time()
        answer = await call()
        self.acknowledged.append(Acknowledged(what, asked_at, time.time()))
        return answer


@asynccontextmanager
async def traced_fleet(folder: Path, trace: Path) -> AsyncGenerator[AsyncFleet]:
    """A fleet of 64 GPUs whose aggregator runs under strace."""
    async with Stage(folder) as stage:
        aggregator = stage.aggregator(prefix=traced((), trace))
        await aggregator.start()
        await stage.agent("node-a", "64xT4", "--log-level", "warning").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            yield fleet


def commits(trace: Path) -> list[Sync]:
    """A commit is in the write-ahead log; what is synced elsewhere was acknowledged long before."""
    found = parse_syncs(trace.read_text(encoding="utf-8", errors="replace"))
    return [sync for sync in found if sync.path.endswith("ledger.sqlite3-wal")]


async def test_every_answer_comes_after_an_fsync_of_its_own_time(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    async with traced_fleet(tmp_path, trace) as fleet:
        notary = Notary(fleet)
        for number in range(ONE_BY_ONE):
            await notary.grant_and_release(f"one-{number}")
        for turn in range(ROUNDS):
            await notary.crowd(turn)
    syncs = commits(trace)
    assert len(notary.acknowledged) == 2 * (ONE_BY_ONE + ROUNDS * AT_ONCE)
    bare = [each for each in notary.acknowledged if not any(map(each.is_covered, syncs))]
    assert bare == []


async def test_many_at_once_share_an_fsync(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    async with traced_fleet(tmp_path, trace) as fleet:
        notary = Notary(fleet)
        began_at = time.time()
        for turn in range(ROUNDS):
            await notary.crowd(turn)
        ended_at = time.time()
    syncs = [s for s in commits(trace) if began_at <= s.began_at <= ended_at]
    # The nodes' confirmations are written too, so the syncs are for more than what is counted here.
    assert 0 < len(syncs) < len(notary.acknowledged) / 2
