"""What becomes of a lease that moves, whatever ends underneath meanwhile; and the keeper's loop."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.support.waiting import until_true

from stoker.client import (
    Allocation,
    AllocationEnded,
    AllocationState,
    KeptAlive,
    Lease,
    MoveOffer,
    NotFound,
    Refused,
    Request,
    Unreachable,
)
from stoker.client.model import Refusals
from stoker.client.moving import Moving
from stoker.client.moving_aio import Keeper as AsyncKeeper
from stoker.client.moving_sync import Keeper
from stoker.testing.clock import VirtualClock

NOWHERE = Refusals("the place is gone", (), 0, 0)
OFFER = MoveOffer("o-1", "old", (), "it is hot there", 2_000_000_000.0)


def allocation(id_: str = "old", state: AllocationState = AllocationState.GRANTED) -> Allocation:
    return Allocation(
        id=id_,
        state=state,
        node="n1",
        devices=(),
        env={"STOKER_ALLOCATION_ID": id_},
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


def over(id_: str) -> AllocationEnded:
    return AllocationEnded(id_, AllocationState.ENDED, "drained")


def under_way() -> tuple[Lease, Moving]:
    """A lease of `old` whose holder is carrying its work over to `new`."""
    lease = Lease(allocation())
    moving = Moving(lease)
    assert moving.begin(OFFER)
    moving.answered(OFFER)
    assert moving.granted(allocation("new"))
    return lease, moving


# what ended meanwhile, whether the work is there -> the lease's, whether it is over, given back
OUTCOMES: dict[str, tuple[tuple[str, ...], bool, str, bool, str | None]] = {
    "all well": ((), True, "new", False, "old"),
    "the holder stays": ((), False, "old", False, "new"),
    "the old place ended, the work is gone from it": (("old",), True, "new", False, None),
    "the old place ended, and the work was there": (("old",), False, "old", True, "new"),
    "the new place ended, and the work was there": (("new",), True, "new", True, "old"),
    "the new place ended, the work never came": (("new",), False, "old", False, None),
    "both ended": (("old", "new"), True, "new", True, None),
    "both ended, nothing moved": (("old", "new"), False, "old", True, None),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_how_a_move_ends(name: str) -> None:
    ended, is_moved, whose, is_over, back = OUTCOMES[name]
    lease, moving = under_way()
    assert moving.to_keep() == ("old", "new")
    for id_ in ended:
        moving.ended(id_, over(id_))
    assert set(moving.to_keep()) == {"old", "new"} - set(ended)
    assert lease.ended is None  # what it means is not known yet
    found = moving.finish(is_moved=is_moved)
    assert (lease.id, lease.ended is not None) == (whose, is_over)
    assert (None if found is None else found[0]) == back
    assert moving.to_keep() == (whose,)


def test_reasons_that_are_given() -> None:
    assert under_way()[1].finish(is_moved=True) == ("old", "moved to new")
    assert under_way()[1].finish(is_moved=False) == ("new", "its holder stayed where it was")


def test_who_is_asked_and_when() -> None:
    lease = Lease(allocation())
    moving = Moving(lease)
    assert not moving.begin(replace(OFFER, allocation_id="another"))
    assert moving.begin(OFFER)
    assert not moving.begin(OFFER)  # it is being asked
    moving.end()
    assert moving.begin(OFFER)  # the answer did not arrive
    moving.answered(OFFER)
    moving.end()
    assert not moving.begin(OFFER)
    assert moving.begin(replace(OFFER, id="o-2"))
    moving.end()
    moving.close()
    assert not moving.begin(replace(OFFER, id="o-3"))


def test_a_lease_that_is_over_does_not_move() -> None:
    lease = Lease(allocation())
    moving = Moving(lease)
    moving.begin(OFFER)
    moving.ended("old", over("old"))  # while the answer is on its way
    assert lease.ended is not None
    assert not moving.granted(allocation("new"))
    moving.end()
    assert not moving.begin(replace(OFFER, id="o-2"))


def test_the_end_of_what_was_left_is_no_news() -> None:
    lease, moving = under_way()
    moving.finish(is_moved=True)
    moving.ended("old", over("old"))  # the answer to a keep-alive that crossed the release
    assert lease.ended is None


# --- the loop that keeps it alive, in both clients


class Aggregator:
    """Answers the calls of a keeper, and notes them."""

    def __init__(self) -> None:
        self.offer: MoveOffer | None = OFFER
        self.calls: list[tuple[str, ...]] = []
        self.failing: dict[str, list[Exception]] = {}
        self.on_call: Callable[[], None] = lambda: None

    def keep_alive(self, allocation_id: str) -> KeptAlive:
        self._called("keep_alive", allocation_id)
        move = self.offer if allocation_id == "old" else None
        return KeptAlive(allocation_id, AllocationState.GRANTED, 1.0, "", move)

    def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        self._called("answer", offer_id, "yes" if accept else "no")
        self.offer = None
        return allocation("new") if accept else None

    def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        self._called("release", allocation_id, reason)
        return allocation(allocation_id, AllocationState.RELEASING)

    def of(self, kind: str) -> list[tuple[str, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]

    def _called(self, *call: str) -> None:
        self.calls.append(call)
        self.on_call()
        if self.failing.get(call[0]):
            raise self.failing[call[0]].pop(0)


class AsyncAggregator:
    """The same for the async keeper."""

    def __init__(self, served: Aggregator) -> None:
        self._served = served

    async def keep_alive(self, allocation_id: str) -> KeptAlive:
        return self._served.keep_alive(allocation_id)

    async def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        return self._served.answer_move(offer_id, accept=accept)

    async def release(self, allocation_id: str, *, reason: str, wait: float) -> Allocation:
        return self._served.release(allocation_id, reason=reason, wait=wait)


@pytest.fixture(autouse=True)
def quick_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.client.keepalive.INTERVAL_SECONDS_MAX", 0.001)


class Story:
    """One keeper at work until a test has seen enough."""

    def __init__(self, kind: str, on_move: Any) -> None:
        self.kind = kind
        self.on_move = on_move
        self.served = Aggregator()
        self.lease = Lease(allocation())
        self.variables: list[str] = []

    async def until(self, what: str, is_enough: Callable[[], bool]) -> None:
        """Run until then, and stop the keeper."""
        if self.kind == "sync":
            keeper = Keeper(self.served, self.lease, self.on_move, self._moved)
            keeper.start()
            await until_true(what, is_enough)
            await asyncio.to_thread(keeper.settle)
            await asyncio.to_thread(keeper.stop)
            return
        clock = VirtualClock()
        calls = AsyncAggregator(self.served)
        async_keeper = AsyncKeeper(calls, self.lease, clock, self.on_move, self._moved)
        async_keeper.start()
        while not is_enough():
            await clock.advance(0.01)
        await async_keeper.settle()
        await async_keeper.stop()

    def _moved(self, env: Mapping[str, str]) -> None:
        self.variables.append(env["STOKER_ALLOCATION_ID"])


def agrees(_offer: MoveOffer, _new: Allocation | None) -> bool:
    return True


@pytest.mark.parametrize("kind", ["sync", "async"])
class TestKeeper:
    async def test_moves_and_keeps_alive_what_it_moved_to(self, kind: str) -> None:
        story = Story(kind, agrees)
        await story.until(
            "the new one to be kept alive", lambda: ("new",) in story.served.of("keep_alive")
        )
        assert story.lease.id == "new"
        assert story.variables == ["new"]
        assert story.served.of("answer") == [("o-1", "yes")]
        assert story.served.of("release") == [("old", "moved to new")]

    async def test_keeps_both_alive_while_the_work_is_carried_over(self, kind: str) -> None:
        seen, seen_in_loop = threading.Event(), asyncio.Event()

        def carry(_offer: MoveOffer, new: Allocation | None) -> bool:
            return new is None or seen.wait(30.0)

        story = Story("sync", carry)  # a thread may wait
        if kind == "async":

            async def carry_on(_offer: MoveOffer, new: Allocation | None) -> bool:
                return new is None or await seen_in_loop.wait()

            story = Story("async", carry_on)

        def look() -> None:
            kept = story.served.of("keep_alive")
            if ("new",) in kept and kept[-1] == ("old",):
                seen.set()
                if kind == "async":  # from its own loop
                    seen_in_loop.set()

        story.served.on_call = look
        await story.until("the move", lambda: story.lease.id == "new")
        assert seen.is_set()

    async def test_declines_where_nobody_can_be_asked(self, kind: str) -> None:
        story = Story(kind, None)
        await story.until("the answer", lambda: bool(story.served.of("answer")))
        assert story.served.of("answer") == [("o-1", "no")]
        assert story.lease.id == "old"
        assert story.served.of("release") == []

    async def test_asks_again_when_the_answer_was_lost(self, kind: str) -> None:
        story = Story(kind, agrees)
        story.served.failing["answer"] = [Unreachable("nobody there"), Refused(NOWHERE)]
        await story.until("the move", lambda: bool(story.served.of("release")))
        assert story.served.of("answer") == [("o-1", "yes")] * 3
        assert story.lease.id == "new"

    async def test_a_release_that_fails_is_left_to_the_ttl(self, kind: str) -> None:
        story = Story(kind, agrees)
        story.served.failing["release"] = [Unreachable("nobody there")]
        await story.until(
            "the new one to be kept alive", lambda: ("new",) in story.served.of("keep_alive")
        )
        assert (story.lease.id, story.lease.ended) == ("new", None)
        assert story.served.of("keep_alive")[-1] == ("new",)

    async def test_goes_on_after_a_loss_and_ends_with_its_lease(self, kind: str) -> None:
        story = Story(kind, None)
        story.served.offer = None
        story.served.failing["keep_alive"] = [Unreachable("nobody there"), NotFound("no such")]
        await story.until("the end", lambda: story.lease.ended is not None)
        assert story.lease.ended is not None
        assert story.lease.ended.reason == "no such"
        assert len(story.served.of("keep_alive")) == 2


async def test_what_is_granted_as_the_context_ends_is_given_back() -> None:
    story = Story("async", agrees)
    clock, asked, may_answer = VirtualClock(), asyncio.Event(), asyncio.Event()

    class Slow(AsyncAggregator):
        async def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
            asked.set()
            await may_answer.wait()
            return await super().answer_move(offer_id, accept=accept)

    keeper = AsyncKeeper(Slow(story.served), story.lease, clock, agrees, lambda _: None)
    keeper.start()
    await clock.advance(0.01)
    assert asked.is_set()
    ending = asyncio.create_task(keeper.settle())
    await clock.advance(0.01)
    may_answer.set()
    await ending
    await keeper.stop()
    assert story.served.of("release") == [("new", "its holder stayed where it was")]
    assert story.lease.id == "old"
