"""Clients in a crowd: each asks, holds, gives back or dies, and notes what it was told."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from random import Random
from typing import TypeVar

from tests.chaos.record import KEY_LABEL, Broken, Record, Stage, Wish
from tests.support.waiting import until_true

from stoker.client import (
    Allocation,
    AllocationEnded,
    AsyncFleet,
    NotFound,
    Refused,
    StoreUnavailable,
    Unreachable,
)
from stoker.core.units import parse_bytes

T = TypeVar("T")

# Far beyond the length of a test: what is held does not expire.
HELD_TTL_SECONDS = 3600.0
# Of clients that are going to die: soon over, and never before they are.
SHORT_TTL_SECONDS = 2.0
WAIT_SECONDS = 5.0
SHARES = tuple(parse_bytes(size) for size in ("1GiB", "3GiB", "5GiB", "7GiB"))


class Crowd:
    """Clients that share a record and one connection; `run` them in a task."""

    def __init__(self, fleet: AsyncFleet, record: Record, *, size: int, seed: int) -> None:
        """`fleet` must be without patience: the crowd itself asks again."""
        self.record = record
        self._fleet = fleet
        self._size = size
        self._seed = seed
        self._gate = asyncio.Event()
        self._under_way = 0
        self._is_leaving = False

    @property
    def under_way(self) -> int:
        """How many calls wait for their answer."""
        return self._under_way

    def open(self) -> None:
        """Let the clients call."""
        self._gate.set()

    async def hush(self) -> None:
        """Let no client begin a call; return when none is under way and the record stands still."""
        self._gate.clear()
        await until_true("the calls under way to end", lambda: self._under_way == 0)

    def leave(self) -> None:
        """Have every client give back what it holds, and go; `run` then ends."""
        self._is_leaving = True
        self.open()

    async def run(self) -> None:
        """Be the crowd until told to leave; raises Broken in a group when a client was wronged."""
        async with asyncio.TaskGroup() as clients:
            for number in range(self._size):
                clients.create_task(self._be_client(number))

    async def _be_client(self, number: int) -> None:
        rng = Random(f"{self._seed}/{number}")
        count = 0
        while not self._is_leaving:
            count += 1
            await self._live(f"{number}-{count}", rng)

    async def _live(self, key: str, rng: Random) -> None:
        """One wish from beginning to end."""
        memory = rng.choice(SHARES) if rng.random() < 0.35 else None
        gpus = 1 if memory is not None or rng.random() < 0.6 else rng.choice((2, 2, 3, 4, 8))
        will_die = rng.random() < 0.03
        async with self._turn():
            wish = self.record.ask(key, gpus, memory)
        if will_die and rng.random() < 0.5:
            await self._die_asking(wish, rng)
            return
        if not await self._ask(wish, rng, SHORT_TTL_SECONDS if will_die else HELD_TTL_SECONDS):
            await asyncio.sleep(rng.uniform(0.05, 0.2))
            return
        if will_die:
            async with self._turn():
                self.record.abandoned(wish)
            return
        await asyncio.sleep(rng.choice((0.0, rng.uniform(0.0, 0.4))))
        if rng.random() < 0.2:
            await self._keep_alive(wish)
        await self._give_back(wish, rng)

    async def _ask(self, wish: Wish, rng: Random, ttl_seconds: float) -> bool:
        """Ask until there is an answer; return whether it was granted."""
        wait = WAIT_SECONDS if rng.random() < 0.4 else 0.0
        try:
            allocation = await self._insist(wish, lambda: self._call(wish, wait, ttl_seconds))
        except Refused:
            self.record.refused(wish)
            return False
        except AllocationEnded as error:
            # The answer that it waited in vain was lost, or a short TTL ran out meanwhile.
            if wait == 0 and ttl_seconds == HELD_TTL_SECONDS:
                raise Broken(f"never given back, and ended: {wish}: {error}") from error
            async with self._turn():
                self.record.abandoned(wish)
            return False
        self.record.granted(wish, allocation)
        return True

    async def _die_asking(self, wish: Wish, rng: Random) -> None:
        """Ask, and be gone before the answer can matter."""
        async with self._turn():
            call = asyncio.ensure_future(self._call(wish, 0.0, SHORT_TTL_SECONDS))
            await asyncio.wait([call], timeout=rng.uniform(0.0, 0.02))
            call.cancel()
            await asyncio.wait([call])
            if not call.cancelled():
                call.exception()  # whatever the answer was, nobody is there to hear it
            self.record.abandoned(wish)

    def _call(self, wish: Wish, wait: float, ttl_seconds: float) -> Awaitable[Allocation]:
        return self._fleet.request(
            gpus=wish.gpus,
            memory=wish.memory_bytes,
            holder="crowd",
            labels={KEY_LABEL: wish.key},
            ttl=ttl_seconds,
            wait=wait,
            idempotency_key=wish.key,
        )

    async def _keep_alive(self, wish: Wish) -> None:
        assert wish.allocation is not None
        id_ = wish.allocation.id
        try:
            await self._insist(wish, lambda: self._fleet.keep_alive(id_))
        except AllocationEnded as error:
            raise Broken(f"never given back, and ended: {wish}: {error}") from error

    async def _give_back(self, wish: Wish, rng: Random) -> None:
        assert wish.allocation is not None
        id_ = wish.allocation.id
        wait = rng.choice((0.0, 0.0, 2.0))
        async with self._turn():
            self.record.giving_back(wish)
        try:
            answer = await self._insist(wish, lambda: self._fleet.release(id_, wait=wait))
            if answer.ended_reason != "released":
                raise Broken(f"released by its client, and ended otherwise: {wish} is {answer}")
        except NotFound as error:
            # Released at the first call, whose answer was lost; ended and forgotten since.
            if wish.unanswered == 0:
                raise Broken(f"not known to the ledger: {wish}") from error
        self.record.given_back(wish)

    async def _insist(self, wish: Wish, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it is answered, and return the answer."""
        pause = 0.02
        wish.unanswered = 0
        while True:
            async with self._turn():
                try:
                    return await call()
                except (Unreachable, StoreUnavailable):
                    wish.unanswered += 1
                    self.record.counts["calls without an answer"] += 1
            await asyncio.sleep(pause)
            pause = min(0.5, 2 * pause)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        await self._gate.wait()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1


def is_settled(wish: Wish) -> bool:
    """Whether its client has nothing more to do about it."""
    return wish.stage in (Stage.REFUSED, Stage.GIVEN_BACK, Stage.ABANDONED)
