"""Holders that are asked to move: a real aggregator, both clients, nodes of few words."""

import asyncio
import json
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from tests.integration.aggregator_stage import Stage, serving
from tests.support.waiting import until, until_true

from stoker.aggregator.hotspots import SETTLING_SECONDS
from stoker.aggregator.moves import MovePolicy, RebalanceOptions
from stoker.aggregator.offers import LEFT_ALONE_SECONDS
from stoker.cli import __main__ as entry
from stoker.client import (
    Allocation,
    AllocationState,
    AsyncFleet,
    Fleet,
    InvalidRequest,
    Lease,
    Move,
    MoveOffer,
    NotFound,
    Refused,
)
from stoker.core.errors import ExitCode
from stoker.v1 import types_pb2

HOLDERS = ("async", "sync")


@pytest.fixture(autouse=True)
def quick_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.client.keepalive.INTERVAL_SECONDS_MAX", 0.05)


@asynccontextmanager
async def fragmented(
    folder: Path, rebalance: RebalanceOptions | None = None
) -> AsyncGenerator[Stage]:
    """Two nodes with four GPUs each."""
    async with (
        serving(folder, rebalance=rebalance) as stage,
        stage.agent("n1", 4),
        stage.agent("n2", 4),
    ):
        yield stage


async def fill(stage: Stage) -> list[str]:
    """Take three GPUs of each node; returns what to release."""
    return [(await stage.allocate(gpus=3)).id for _ in range(2)]


async def clear(stage: Stage, fillers: list[str]) -> None:
    for id_ in fillers:
        await stage.release(id_, wait=10.0)


@asynccontextmanager
async def holding(
    kind: str, stage: Stage, on_move: Callable[..., Any] | None, **wish: Any
) -> AsyncGenerator[Lease]:
    """A lease of either client, whose calls do not hold up the aggregator in this loop."""
    wish = {"movable": True, "ttl": 60.0, "set_environment": False, **wish}
    if kind == "async":
        async with (
            AsyncFleet(stage.address) as fleet,
            fleet.allocate(on_move=on_move, **wish) as lease,
        ):
            yield lease
        return
    with Fleet(stage.address) as blocking:
        context = blocking.allocate(on_move=on_move, **wish)
        lease = await asyncio.to_thread(context.__enter__)
        try:
            yield lease
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)


class Holder:
    """A callback that says what it was told to say, and notes what it was asked."""

    def __init__(self, *, agrees: bool, arrives: bool = True) -> None:
        self.agrees = agrees
        self.arrives = arrives
        self.asked: list[MoveOffer] = []
        self.got: list[Allocation] = []

    def __call__(self, offer: MoveOffer, new: Allocation | None) -> bool:
        if new is None:
            self.asked.append(offer)
            return self.agrees
        self.got.append(new)
        return self.arrives


async def test_one_holder_declines_another_accepts_and_what_waited_is_granted(
    tmp_path: Path,
) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as operator:
        fillers = await fill(stage)
        first, second = Holder(agrees=False), Holder(agrees=False)
        async with (
            holding("async", stage, first) as one,
            holding("sync", stage, second) as other,
        ):
            await clear(stage, fillers)
            assert {one.node, other.node} == {"n1", "n2"}
            waiting = await stage.queue(gpus=4)
            proposed = await operator.rebalance()
            assert [each.offer_id for each in proposed.moves] == [""]  # so nobody was asked
            plan = await operator.rebalance(apply=True)
            assert plan.summary == (
                "1 move: 4 GPUs' worth become usable, for 1 GPUs' worth carried over; "
                "then there is room for 4 x GPU"
            )
            (move,) = plan.moves
            asked, left = (first, second) if move.allocation_id == one.id else (second, first)
            await until_true("the holder to be asked", lambda: bool(asked.asked))
            assert asked.asked[0].id == move.offer_id
            assert asked.asked[0].reason == move.reason

            left.agrees = True

            async def offers_another() -> bool:  # once the answer has come
                again = await operator.rebalance(apply=True)
                return any(each.offer_id for each in again.moves)

            await until("the other holder to be asked", offers_another)
            stays, goes = (one, other) if asked is first else (other, one)
            before = goes.id
            granted = await waiting.answer()
            assert len(granted.devices) == 4
            assert goes.id == left.got[0].id != before
            assert goes.node == stays.node != granted.node
            assert goes.allocation.state is AllocationState.GRANTED
            assert len(asked.asked) == 1
            assert goes.ended is None
            ended = (await stage.allocations())[before]
            assert ended.ended_reason == f"moved to {goes.id}"
            known = {goes.id, stays.id}
        await until("the leases to be given back", lambda: all_ended(stage, known))


async def all_ended(stage: Stage, ids: set[str]) -> bool:
    return ids.isdisjoint(await stage.allocations(ended=False))


@asynccontextmanager
async def in_the_way(
    stage: Stage, kind: str, holder: Callable[..., Any] | None, **wish: Any
) -> AsyncGenerator[Lease]:
    """A holder on a node that is free but for it, and is waited for; another node has room."""
    fillers = await fill(stage)
    async with holding(kind, stage, holder, **wish) as lease:
        await stage.allocate(ttl_seconds=600.0)  # the other node's last
        await clear(stage, fillers)
        waiting = await stage.queue(gpus=4)
        yield lease
        waiting.hang_up()


async def offered(stage: Stage, lease: Lease, answer_seconds: float = 60.0) -> Move:
    """Have the fleet ask the lease's holder to leave its node; returns the move."""
    async with AsyncFleet(stage.address) as operator:
        plan = await operator.rebalance(apply=True, answer=answer_seconds)
    (move,) = plan.moves
    assert move.allocation_id == lease.id
    return move


async def movable(stage: Stage) -> set[str]:
    """What is held and could move."""
    living = await stage.allocations(ended=False)
    return {id_ for id_, each in living.items() if each.request.movable}


@pytest.mark.parametrize("kind", HOLDERS)
async def test_a_holder_that_cannot_move_after_all_keeps_what_it_had(
    kind: str, tmp_path: Path
) -> None:
    holder = Holder(agrees=True, arrives=False)
    async with fragmented(tmp_path) as stage, in_the_way(stage, kind, holder) as lease:
        before = lease.allocation
        await offered(stage, lease)
        await until_true("the new place to be had", lambda: bool(holder.got))
        new = holder.got[0].id
        await stage.becomes(new, types_pb2.ALLOCATION_STATE_ENDED)
        assert (await stage.allocations())[new].ended_reason == "its holder stayed where it was"
        assert lease.allocation == before
        assert lease.ended is None
        assert await movable(stage) == {before.id}


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("phase", ["asked", "moving"])
async def test_a_callback_that_fails_moves_nothing(
    kind: str, phase: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_offer: MoveOffer, new: Allocation | None) -> bool:
        if (phase == "moving") == (new is not None):
            raise OSError("the disk is full")
        return True

    async with fragmented(tmp_path) as stage, in_the_way(stage, kind, fail) as lease:
        before = lease.allocation
        await offered(stage, lease)
        await until_true("the failure to be told", lambda: "the disk is full" in caplog.text)

        async def holds_one() -> bool:
            return await movable(stage) == {before.id}

        await until("nothing but the old place to be held", holds_one)
        assert lease.allocation == before
        assert f"on_move of allocation {before.id} failed" in caplog.text


@pytest.mark.parametrize("kind", HOLDERS)
async def test_variables_are_those_of_the_new_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "ours")
    monkeypatch.setattr("stoker.client.lease.host_boot_id", lambda: "")  # any host will do
    holder = Holder(agrees=True)
    async with (
        fragmented(tmp_path) as stage,
        in_the_way(stage, kind, holder, set_environment=True) as lease,
    ):
        before = lease.env["CUDA_VISIBLE_DEVICES"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == before
        await offered(stage, lease)
        await until_true("the move", lambda: lease.env["CUDA_VISIBLE_DEVICES"] != before)
        after = lease.env["CUDA_VISIBLE_DEVICES"]
        await until_true("the switch", lambda: os.environ["CUDA_VISIBLE_DEVICES"] == after)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "ours"


async def test_a_context_that_ends_in_the_middle_of_a_move_holds_nothing(tmp_path: Path) -> None:
    is_moving = asyncio.Event()

    async def carry(_offer: MoveOffer, new: Allocation | None) -> bool:
        if new is not None:
            is_moving.set()
            await asyncio.Event().wait()  # so long that it is cancelled
        return True

    async with fragmented(tmp_path) as stage:
        async with in_the_way(stage, "async", carry) as lease:
            await offered(stage, lease)
            await is_moving.wait()
            held = await movable(stage)
            assert lease.id in held
            assert len(held) == 2  # the old place and the new one
        await until("both to be given back", lambda: all_ended(stage, held))


async def test_a_thread_that_carries_over_is_waited_for(tmp_path: Path) -> None:
    is_moving, may_go_on = threading.Event(), threading.Event()

    def carry(_offer: MoveOffer, new: Allocation | None) -> bool:
        if new is not None:
            is_moving.set()
            assert may_go_on.wait(30.0)
        return True

    async with fragmented(tmp_path) as stage:
        async with in_the_way(stage, "sync", carry) as lease:
            before = lease.id
            await offered(stage, lease)
            await until_true("the move", is_moving.is_set)
            asyncio.get_running_loop().call_later(0.1, may_go_on.set)
        assert lease.id != before
        assert lease.ended is None
        await until("both to be given back", lambda: all_ended(stage, {before, lease.id}))


async def test_an_offer_is_granted_once(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
        granted = await fleet.answer_move(move.offer_id, accept=True)
        assert granted is not None
        assert granted.request.movable
        again = await fleet.answer_move(move.offer_id, accept=True)
        assert again is not None
        assert again.id == granted.id
        assert await movable(stage) == {move.allocation_id, granted.id}
        with pytest.raises(Refused, match=f"offer {move.offer_id} was accepted before"):
            await fleet.answer_move(move.offer_id, accept=False)
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        after_restart = await fleet.answer_move(move.offer_id, accept=True)
        assert after_restart is not None
        assert after_restart.id == granted.id


async def test_an_offer_of_before_a_restart_is_gone(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        with pytest.raises(NotFound, match=f"offer {move.offer_id} is not known: it has expired"):
            await fleet.answer_move(move.offer_id, accept=True)
        assert await movable(stage) == {move.allocation_id}
        assert (await fleet.keep_alive(move.allocation_id)).move is None


async def test_an_offer_expires(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
        kept = await fleet.keep_alive(move.allocation_id)
        assert kept.move is not None
        assert (kept.move.id, kept.move.reason) == (move.offer_id, move.reason)
        assert kept.move.placements == move.to_placements
        stage.clock.jump(61.0)
        assert (await fleet.keep_alive(move.allocation_id)).move is None
        with pytest.raises(NotFound):
            await fleet.answer_move(move.offer_id, accept=True)


async def test_a_declined_move_is_not_offered_again_for_a_while(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
        assert await fleet.answer_move(move.offer_id, accept=False) is None
        with pytest.raises(Refused, match=f"offer {move.offer_id} was declined before"):
            await fleet.answer_move(move.offer_id, accept=True)
        assert (await fleet.rebalance()).moves == ()
        stage.clock.jump(601.0)
        (again,) = (await fleet.rebalance()).moves
        assert again.allocation_id == move.allocation_id


async def test_a_place_that_was_taken_is_replaced_by_another(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
        (to,) = move.to_placements
        await stage.allocate(preferred_gpu_uuid=to.devices[0].uuid, node=to.node, priority=1)
        granted = await fleet.answer_move(move.offer_id, accept=True)
        assert granted is not None
        assert granted.node == to.node
        assert granted.devices != to.devices


async def test_an_offer_whose_place_is_taken_for_good_is_withdrawn(tmp_path: Path) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        move = await offer_to_nobody(stage, fleet)
        (to,) = move.to_placements
        await stage.allocate(gpus=3, node=to.node, priority=1)
        with pytest.raises(Refused, match="is taken, and no other is worth a move"):
            await fleet.answer_move(move.offer_id, accept=True)
        assert (await fleet.keep_alive(move.allocation_id)).move is None
        assert await movable(stage) == {move.allocation_id}


async def test_bounds_of_a_rebalance(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        assert (await fleet.rebalance()).summary.startswith("nothing to move: 0 movable")
        with pytest.raises(InvalidRequest, match="moves: wanted at least 1, found 0"):
            await fleet.rebalance(moves=0)
        with pytest.raises(InvalidRequest, match="moves_max: must be from 0 to 1,000"):
            await fleet.rebalance(moves=1001)
        with pytest.raises(InvalidRequest, match="answer_seconds: must be from 1 to 86,400"):
            await fleet.rebalance(answer=86_401)
        with pytest.raises(InvalidRequest, match="offer_id: must not be empty"):
            await fleet.answer_move("", accept=False)


async def test_the_fleet_rebalances_by_itself_when_told_to(tmp_path: Path) -> None:
    by_itself = RebalanceOptions(every_seconds=300.0)
    async with fragmented(tmp_path, by_itself) as stage, AsyncFleet(stage.address) as fleet:
        id_ = await in_need_of_a_move(stage)
        assert (await fleet.keep_alive(id_)).move is None
        stage.clock.jump(300.0)

        async def is_asked() -> bool:
            return (await fleet.keep_alive(id_)).move is not None

        await until("the holder to be asked", is_asked)


async def test_the_command_shows_a_plan_and_applies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fragmented(tmp_path) as stage, AsyncFleet(stage.address) as fleet:
        id_ = await in_need_of_a_move(stage)
        verb = ["--address", stage.address, "rebalance"]
        assert await asyncio.to_thread(entry.run, [*verb, "--json", "--moves", "1"]) == ExitCode.OK
        proposed = json.loads(capsys.readouterr().out)
        (move,) = proposed["moves"]
        assert (move["allocation_id"], move["kind"], move["offer_id"]) == (id_, "defragment", "")
        assert (move["cost_milli"], len(move["to_placements"])) == (1000, 1)
        assert (await fleet.keep_alive(id_)).move is None  # nobody was asked
        assert await asyncio.to_thread(entry.run, [*verb, "--pool", "p", "--apply"]) == ExitCode.OK
        assert "nothing to move: 0 movable allocations" in capsys.readouterr().out
        applied = [*verb, "--apply", "--answer", "2m"]
        assert await asyncio.to_thread(entry.run, applied) == ExitCode.OK
        shown = capsys.readouterr().out
        assert proposed["summary"] in " ".join(shown.split())
        assert "1 holder asked" in shown
        offer = (await fleet.keep_alive(id_)).move
        assert offer is not None
        assert offer.expires_at - stage.clock.now() == pytest.approx(120.0, abs=60.0)


async def in_need_of_a_move(stage: Stage) -> str:
    """One GPU of a node is held by somebody who could go; the fleet is asked for whole nodes."""
    fillers = await fill(stage)
    kept = await stage.allocate(movable=True, ttl_seconds=3600.0)
    await stage.allocate(ttl_seconds=3600.0)
    await clear(stage, fillers)
    for _ in range(8):
        with pytest.raises(aio.AioRpcError):
            await stage.allocate(gpus=4)
    waiting = await stage.queue(gpus=4)
    waiting.hang_up()
    return kept.id


async def offer_to_nobody(stage: Stage, fleet: AsyncFleet) -> Move:
    """An offer to the holder of a plain allocation, which nothing answers by itself."""
    id_ = await in_need_of_a_move(stage)
    (move,) = (await fleet.rebalance(apply=True)).moves
    assert move.allocation_id == id_
    return move


async def test_the_page_shows_a_holder_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "rebalancing.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    started: list[str] = []
    has_begun, may_end = threading.Event(), threading.Event()
    ids: list[str] = []

    def work(lease: Lease) -> None:
        ids.append(lease.id)
        has_begun.set()
        assert may_end.wait(30.0)
        ids.append(lease.id)

    def start_elsewhere(env: Mapping[str, str]) -> None:
        started.append(env["STOKER_ALLOCATION_ID"])

    names: dict[str, Any] = {
        "is_convenient": lambda: True,
        "start_elsewhere": start_elsewhere,
        "work": work,
    }
    async with fragmented(tmp_path) as stage:
        monkeypatch.setenv("STOKER_ADDRESS", stage.address)
        fillers = await fill(stage)
        holder = asyncio.create_task(asyncio.to_thread(exec, code, names))
        await until_true("the page's holder", has_begun.is_set)
        await stage.allocate(ttl_seconds=600.0)
        await clear(stage, fillers)
        waiting = await stage.queue(gpus=4)
        async with AsyncFleet(stage.address) as operator:
            await operator.rebalance(apply=True)
        assert len((await waiting.answer()).devices) == 4
        may_end.set()
        await holder
        assert started == ids[1:] != ids[:1]
        await until("the lease to be given back", lambda: all_ended(stage, set(ids)))


def test_the_page_has_the_numbers_that_are_gone_by() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rebalancing.md").read_text()
    text = " ".join(page.split())
    policy = MovePolicy()
    for said in (
        f"at least {policy.hot_milli / 10:g} % busy, or has {policy.hot_milli / 10:g} %",
        f"stays below {policy.cool_milli / 10:g} % with it",
        f"at least {policy.imbalance_min_milli / 10:g} % less hot",
        f"granted in the last {SETTLING_SECONDS:g} s",
        f"at least {policy.defragment_gain_min:g} times what they cost",
        f"relief at least {policy.relieve_gain_min:g} times",
    ):
        assert said in text
    assert LEFT_ALONE_SECONDS == 600.0  # "ten minutes"
