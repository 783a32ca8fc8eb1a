"""Requirements on how a holder learns that its GPU is wanted back: when, how often, by whom."""

import logging
from dataclasses import replace

import pytest
from tests.support.waiting import until_true

from stoker.client import (
    Allocation,
    AllocationEnded,
    AllocationState,
    KeptAlive,
    Lease,
    LeaveRequest,
    Request,
)
from stoker.client.moving_aio import Keeper as AsyncKeeper
from stoker.client.moving_sync import Keeper
from stoker.testing.clock import VirtualClock

ASKED = LeaveRequest("GPU 0 is to be partitioned anew (mixed)", 2_000_000_000.0, False)


def allocation(id_: str = "a1") -> Allocation:
    return Allocation(
        id=id_,
        state=AllocationState.GRANTED,
        node="n1",
        devices=(),
        env={},
        expires_at=None,
        request=Request(1, "me", 60.0),
        requested_at=1.0,
        granted_at=2.0,
        ended_at=None,
        ended_reason="",
        queue_position=None,
        resource_version=3,
        held_by_node=True,
    )


class Holder:
    """A lease, and what its holder was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, bool]] = []
        self.lease = Lease(allocation(), None, self._hear)

    def _hear(self, reason: str, leave_by: float, is_evicting: bool) -> None:
        self.told.append((reason, leave_by, is_evicting))

    def hears(self, *requests: LeaveRequest | None) -> None:
        for each in requests:
            self.lease.ask_to_leave(self.lease.id, each)


# what the keep-alives tell, one after the other -> which of them the holder is told
NEWS: dict[str, tuple[tuple[LeaveRequest | None, ...], tuple[int, ...]]] = {
    "nobody asks": ((None, None), ()),
    "once, however often it is said": ((None, ASKED, ASKED, ASKED), (1,)),
    "the moment is not told the same to the bit": (
        (ASKED, replace(ASKED, leave_by=ASKED.leave_by + 0.9)),
        (0,),
    ),
    "a moment that creeps is another one in the end": (
        tuple(replace(ASKED, leave_by=ASKED.leave_by + 0.4 * i) for i in range(4)),
        (0, 3),
    ),
    "another moment": ((ASKED, replace(ASKED, leave_by=ASKED.leave_by + 60)), (0, 1)),
    "an earlier one": ((ASKED, replace(ASKED, leave_by=ASKED.leave_by - 1)), (0, 1)),
    "it will be ended then, after all": ((ASKED, replace(ASKED, is_evicting=True)), (0, 1)),
    "another reason": ((ASKED, replace(ASKED, reason="GPU 0 is to be big")), (0, 1)),
    "asked again, after it was taken back": ((ASKED, None, ASKED), (0, 2)),
}


@pytest.mark.parametrize("name", NEWS)
def test_what_is_news(name: str) -> None:
    requests, told = NEWS[name]
    holder = Holder()
    holder.hears(*requests)
    expected = [each for i, each in enumerate(requests) if i in told and each is not None]
    assert holder.told == [(each.reason, each.leave_by, each.is_evicting) for each in expected]


def test_the_lease_tells_what_is_asked_now() -> None:
    holder = Holder()
    assert holder.lease.leave is None
    holder.hears(ASKED)
    assert holder.lease.leave == ASKED
    holder.hears(None)
    assert holder.lease.leave is None


def test_a_lease_that_has_moved_is_not_asked_for_its_old_gpus() -> None:
    holder = Holder()
    holder.hears(ASKED)
    holder.lease.move_to(allocation("a2"))
    assert holder.lease.leave is None
    holder.lease.ask_to_leave("a1", ASKED)
    assert holder.lease.leave is None
    holder.lease.ask_to_leave("a2", ASKED)
    assert len(holder.told) == 2


def test_a_lease_that_is_over_is_not_asked() -> None:
    holder = Holder()
    holder.lease.end(AllocationEnded("a1", AllocationState.ENDED, "evicted"))
    holder.hears(ASKED)
    assert holder.told == []


@pytest.mark.parametrize(
    ("is_evicting", "then"), [(True, "it is ended then"), (False, "it is not ended then")]
)
def test_without_a_callback_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture, is_evicting: bool, then: str
) -> None:
    lease = Lease(allocation())
    for _ in range(3):
        lease.ask_to_leave("a1", replace(ASKED, is_evicting=is_evicting))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "allocation a1 should be given back" in record.getMessage()
    assert f"{then}: {ASKED.reason}" in record.getMessage()


def test_a_callback_that_fails_does_not_end_the_keep_alives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_reason: str, _leave_by: float, _is_evicting: bool) -> None:
        raise ZeroDivisionError("the caller's")

    lease = Lease(allocation(), None, fail)
    lease.ask_to_leave("a1", ASKED)
    assert lease.leave == ASKED
    assert "on_leave of allocation a1 failed" in caplog.text


# --- the loops that keep a lease alive


class Aggregator:
    """Answers every keep-alive with the same request."""

    def keep_alive(self, allocation_id: str) -> KeptAlive:
        return KeptAlive(allocation_id, AllocationState.GRANTED, 1.0, "", leave=ASKED)

    def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        raise AssertionError(f"nobody offers a move: {offer_id}, {accept}")

    def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        raise AssertionError(f"nobody leaves: {allocation_id}, {reason}, {wait}")


class AsyncAggregator:
    """The same for the async keeper."""

    async def keep_alive(self, allocation_id: str) -> KeptAlive:
        return Aggregator().keep_alive(allocation_id)

    async def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        return Aggregator().answer_move(offer_id, accept=accept)

    async def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        return Aggregator().release(allocation_id, reason=reason, wait=wait)


async def test_the_thread_that_keeps_it_alive_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.client.keepalive.INTERVAL_SECONDS_MAX", 0.001)
    holder = Holder()
    keeper = Keeper(Aggregator(), holder.lease, None, lambda _: None)
    keeper.start()
    await until_true("the holder to be told", lambda: bool(holder.told))
    keeper.stop()
    assert holder.told == [(ASKED.reason, ASKED.leave_by, False)]


async def test_the_task_that_keeps_it_alive_tells() -> None:
    holder, clock = Holder(), VirtualClock()
    keeper = AsyncKeeper(AsyncAggregator(), holder.lease, clock, None, lambda _: None)
    keeper.start()
    await clock.advance(60.0)
    await keeper.stop()
    assert holder.told == [(ASKED.reason, ASKED.leave_by, False)]
