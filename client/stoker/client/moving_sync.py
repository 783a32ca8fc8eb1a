"""Keeps a lease alive in a thread of its own, and moves it in another when the fleet asks."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from stoker.client.errors import AllocationEnded, ClientError, NotFound
from stoker.client.keepalive import pause_seconds
from stoker.client.lease import Lease, granted
from stoker.client.model import Allocation, AllocationState, KeptAlive, MoveOffer
from stoker.client.moving import STAYED, MoveCallback, Moving

_log = logging.getLogger(__name__)


class Calls(Protocol):
    """The calls of the client that a kept lease needs."""

    def keep_alive(self, allocation_id: str) -> KeptAlive:
        """Extend an allocation."""
        ...

    def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        """Answer an offer."""
        ...

    def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        """Give an allocation back."""
        ...


class Keeper:
    """Keeps a lease alive until `stop`, and asks its holder about moves until `settle`."""

    def __init__(
        self,
        calls: Calls,
        lease: Lease,
        on_move: MoveCallback | None,
        moved: Callable[[Mapping[str, str]], None],
    ) -> None:
        """`moved` is told the variables of the new place once the lease has moved there."""
        self._calls = calls
        self._lease = lease
        self._on_move = on_move
        self._moved = moved
        self._moving = Moving(lease)
        self._stop = threading.Event()
        self._mover: threading.Thread | None = None
        self._beginning = threading.Lock()
        name = f"stoker keep-alive {lease.id}"
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)

    def start(self) -> None:
        """Begin to keep it alive."""
        self._thread.start()

    def settle(self) -> None:
        """Ask about no more moves, and wait until that which is under way is over."""
        with self._beginning:
            self._moving.close()
            mover = self._mover
        if mover is not None:
            mover.join()

    def stop(self) -> None:
        """End the keep-alives."""
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        ttl_seconds = self._lease.allocation.request.ttl_seconds
        pause = pause_seconds(ttl_seconds, arrived=True)
        while self._lease.ended is None and not self._stop.wait(pause):
            arrived = [self._keep_one(id_) for id_ in self._moving.to_keep()]
            pause = pause_seconds(ttl_seconds, arrived=all(arrived))

    def _keep_one(self, id_: str) -> bool:
        try:
            kept = self._calls.keep_alive(id_)
        except AllocationEnded as ended:
            self._moving.ended(id_, ended)
        except NotFound as error:
            self._moving.ended(id_, AllocationEnded(id_, AllocationState.ENDED, str(error)))
        except ClientError as error:
            _log.warning("allocation %s was not kept alive, trying again: %s", id_, error)
            return False
        else:
            self._lease.ask_to_leave(id_, kept.leave)
            if kept.move is not None:
                self._begin(kept.move)
        return True

    def _begin(self, offer: MoveOffer) -> None:
        with self._beginning:  # or `settle` could miss the thread
            if self._moving.begin(offer):
                name = f"stoker move {offer.allocation_id}"
                self._mover = threading.Thread(
                    target=self._move, args=(offer,), name=name, daemon=True
                )
                self._mover.start()

    def _move(self, offer: MoveOffer) -> None:
        try:
            self._try_to_move(offer)
        except ClientError as error:
            _log.warning("allocation %s does not move: %s", offer.allocation_id, error)
        finally:
            self._moving.end()

    def _try_to_move(self, offer: MoveOffer) -> None:
        accept = self._ask(offer, None)
        answer = self._calls.answer_move(offer.id, accept=accept)
        self._moving.answered(offer)
        if answer is None:
            return
        new = granted(answer)
        if not self._moving.granted(new):
            self._calls.release(new.id, reason=STAYED, wait=0.0)
            return
        is_moved = self._ask(offer, new)
        left = self._moving.finish(is_moved=is_moved)
        if is_moved:
            self._moved(new.env)
        if left is not None:
            self._calls.release(left[0], reason=left[1], wait=0.0)

    def _ask(self, offer: MoveOffer, new: Allocation | None) -> bool:
        if self._on_move is None:
            return False
        try:
            return self._on_move(offer, new)
        except Exception:  # noqa: BLE001 (the caller's code; it failed, so nothing moves)
            _log.exception("on_move of allocation %s failed", offer.allocation_id)
            return False
