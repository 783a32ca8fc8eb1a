"""An allocation in use by a context, and what the contexts of both clients share."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from stoker.client.environment import host_boot_id
from stoker.client.errors import AllocationEnded, ClientError
from stoker.client.leaving import LeaveCallback, LeaveRequest
from stoker.client.model import Allocation, AllocationState, Device, Request

_log = logging.getLogger(__name__)

# The reason that a context gives; another one in the answer means that the release came too late.
RELEASED = "released"

EndedCallback = Callable[[AllocationEnded], None]


class Lease:
    """An allocation that its context keeps alive and gives back. Safe to use from any thread."""

    def __init__(
        self,
        allocation: Allocation,
        on_ended: EndedCallback | None = None,
        on_leave: LeaveCallback | None = None,
    ) -> None:
        self.allocation = allocation  # as it was granted; another one after a move
        self._on_ended = on_ended
        self._on_leave = on_leave
        self._lock = threading.Lock()
        self._ended: AllocationEnded | None = None
        self._leave: LeaveRequest | None = None
        self._leave_told: LeaveRequest | None = None  # the one that the holder knows of

    @property
    def id(self) -> str:
        return self.allocation.id

    @property
    def node(self) -> str:
        return self.allocation.node

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.allocation.devices

    @property
    def uuids(self) -> tuple[str, ...]:
        """The UUIDs of its GPUs."""
        return self.allocation.uuids

    @property
    def env(self) -> Mapping[str, str]:
        """The variables that make a CUDA process see exactly these GPUs."""
        return self.allocation.env

    @property
    def ended(self) -> AllocationEnded | None:
        """Why the allocation is no longer ours, as the newest keep-alive learnt; None: it is."""
        return self._ended

    @property
    def leave(self) -> LeaveRequest | None:
        """The request to give it back, as the newest keep-alive told; None: nobody asks."""
        return self._leave

    def move_to(self, allocation: Allocation) -> Allocation:
        """Be the lease of another allocation; returns the one before."""
        with self._lock:
            before, self.allocation = self.allocation, allocation
            self._leave = self._leave_told = None  # it was about the GPUs of the one before
        return before

    def ask_to_leave(self, allocation_id: str, request: LeaveRequest | None) -> None:
        """Note what a keep-alive told of leaving, and tell whoever wants to know what is new.

        Without `on_leave` it is a warning in the log. None: nobody asks, or not any more.
        """
        with self._lock:
            if allocation_id != self.id or self._ended is not None:
                return
            self._leave = request
            is_known = request is not None and not request.is_news_after(self._leave_told)
            if not is_known:
                self._leave_told = request
        if request is None or is_known:
            return
        if self._on_leave is None:
            seconds = max(0.0, request.leave_by - time.time())
            then = "it is ended then" if request.is_evicting else "it is not ended then"
            _log.warning(
                "allocation %s should be given back within %.0f s, %s: %s",
                *(allocation_id, seconds, then, request.reason),
            )
            return
        try:
            self._on_leave(request.reason, request.leave_by, request.is_evicting)
        except Exception:  # noqa: BLE001 (the caller's code, run by the keep-alive, which must go on)
            _log.exception("on_leave of allocation %s failed", allocation_id)

    def end(self, error: AllocationEnded) -> None:
        """Note that the allocation has ended, once, and tell whoever wanted to know."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = error
        if self._on_ended is None:
            return
        try:
            self._on_ended(error)
        except Exception:  # noqa: BLE001 (the caller's code, run by the keep-alive, which must go on)
            _log.exception("on_ended of allocation %s failed", self.id)

    def released(self, answer: Allocation) -> None:
        """Compare the answer to the release with what was asked: it may have ended before."""
        if answer.ended_reason != RELEASED:
            self.end(AllocationEnded(self.id, answer.state, answer.ended_reason))

    def __repr__(self) -> str:
        state = f"ended: {self._ended.reason}" if self._ended else "granted"
        return f"<Lease {self.id} on {self.node}: {', '.join(self.uuids)}, {state}>"


def granted(allocation: Allocation) -> Allocation:
    """Return the answer to a request; raises AllocationEnded when a late retry finds it over."""
    if allocation.state in (AllocationState.GRANTED, AllocationState.UNKNOWN):
        return allocation
    raise AllocationEnded(allocation.id, allocation.state, allocation.ended_reason)


def on_this_host(request: Request) -> Request:
    """Return the request restricted to the caller's host, unless it names a host."""
    return replace(request, host_boot_id=request.host_boot_id or host_boot_id())


def settle(lease: Lease, failed: BaseException | None, release_error: ClientError | None) -> None:
    """Raise what the end of a context has to say; an error of the body gets it as a note."""
    errors = [each for each in (lease.ended, release_error) if each is not None]
    if failed is not None:
        for each in errors:
            failed.add_note(f"stoker: {each}")
    elif errors:
        raise errors[0]
