"""Keeps a lease alive in a task of its own, and moves it in another when the fleet asks."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from stoker.client.errors import AllocationEnded, ClientError, NotFound
from stoker.client.keepalive import pause_seconds
from stoker.client.lease import Lease, granted
from stoker.client.model import Allocation, AllocationState, KeptAlive, MoveOffer
from stoker.client.moving import STAYED, Moving
from stoker.core.clock import Clock

# As MoveCallback; what takes its time is awaited, so that the keep-alives go on.
AsyncMoveCallback = Callable[[MoveOffer, Allocation | None], bool | Awaitable[bool]]

_log = logging.getLogger(__name__)


class Calls(Protocol):
    """The calls of the client that a kept lease needs."""

    async def keep_alive(self, allocation_id: str) -> KeptAlive:
        """Extend an allocation."""
        ...

    async def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        """Answer an offer."""
        ...

    async def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        """Give an allocation back."""
        ...


class Keeper:
    """Keeps a lease alive until `stop`, and asks its holder about moves until `settle`."""

    def __init__(
        self,
        calls: Calls,
        lease: Lease,
        clock: Clock,
        on_move: AsyncMoveCallback | None,
        moved: Callable[[Mapping[str, str]], None],
    ) -> None:
        """`moved` is told the variables of the new place once the lease has moved there."""
        self._calls = calls
        self._lease = lease
        self._clock = clock
        self._on_move = on_move
        self._moved = moved
        self._moving = Moving(lease)
        self._keeper: asyncio.Task[None] | None = None
        self._mover: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to keep it alive."""
        self._keeper = asyncio.create_task(self._keep())

    async def settle(self) -> None:
        """Ask about no more moves; that which is under way is broken off and undone."""
        self._moving.close()
        await _end(self._mover)

    async def stop(self) -> None:
        """End the keep-alives."""
        await _end(self._keeper)

    async def _keep(self) -> None:
        ttl_seconds = self._lease.allocation.request.ttl_seconds
        pause = pause_seconds(ttl_seconds, arrived=True)
        while self._lease.ended is None:
            await self._clock.sleep(pause)
            arrived = [await self._keep_one(id_) for id_ in self._moving.to_keep()]
            pause = pause_seconds(ttl_seconds, arrived=all(arrived))

    async def _keep_one(self, id_: str) -> bool:
        try:
            kept = await self._calls.keep_alive(id_)
        except AllocationEnded as ended:
            self._moving.ended(id_, ended)
        except NotFound as error:
            self._moving.ended(id_, AllocationEnded(id_, AllocationState.ENDED, str(error)))
        except ClientError as error:
            _log.warning("allocation %s was not kept alive, trying again: %s", id_, error)
            return False
        else:
            self._lease.ask_to_leave(id_, kept.leave)
            if kept.move is not None and self._moving.begin(kept.move):
                self._mover = asyncio.create_task(self._move(kept.move))
        return True

    async def _move(self, offer: MoveOffer) -> None:
        try:
            await self._try_to_move(offer)
        except ClientError as error:
            _log.warning("allocation %s does not move: %s", offer.allocation_id, error)
        finally:
            self._moving.end()

    async def _try_to_move(self, offer: MoveOffer) -> None:
        answer = await self._answer(offer, accept=await self._ask(offer, None))
        self._moving.answered(offer)
        if answer is None:
            return
        new = granted(answer)
        if not self._moving.granted(new):
            await self._calls.release(new.id, reason=STAYED, wait=0.0)
            return
        is_moved = False
        try:
            is_moved = await self._ask(offer, new)
        finally:  # also when the context ends meanwhile
            left = self._moving.finish(is_moved=is_moved)
            if is_moved:
                self._moved(new.env)
            if left is not None:
                await self._calls.release(left[0], reason=left[1], wait=0.0)

    async def _answer(self, offer: MoveOffer, *, accept: bool) -> Allocation | None:
        answering = asyncio.create_task(self._calls.answer_move(offer.id, accept=accept))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            # The context ends; what is being granted now would be held until its TTL.
            answer = await answering
            if answer is not None:
                await self._calls.release(answer.id, reason=STAYED, wait=0.0)
            raise

    async def _ask(self, offer: MoveOffer, new: Allocation | None) -> bool:
        if self._on_move is None:
            return False
        try:
            said = self._on_move(offer, new)
            return await said if inspect.isawaitable(said) else said
        except Exception:  # noqa: BLE001 (the caller's code; it failed, so nothing moves)
            _log.exception("on_move of allocation %s failed", offer.allocation_id)
            return False


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
