"""The loop that decides: together, durably, in order; and what it does when the store refuses."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from tests.unit.aggregator.builders import make_facts, make_health, make_samples, whole

from stoker.aggregator import events as e
from stoker.aggregator.control import (
    OBSERVE_SECONDS,
    STANDSTILL_SECONDS,
    STUCK_SECONDS,
    TICK_SECONDS,
    Control,
)
from stoker.aggregator.findings import Findings
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import AllocationState, Command, DriverState, Frame, HeldAllocation
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.store import Outcome, Store
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.wishes import (
    Allocate,
    Drain,
    Queued,
    Refused,
    Release,
    Settled,
)
from stoker.core.errors import StoreFull
from stoker.testing.clock import VirtualClock


class Line:
    """The stream of node n1: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.is_up = True

    def next_command_id(self, node: str) -> int | None:
        return len(self.sent) + 1 if self.is_up else None

    def has_inventory(self, node: str) -> bool:
        return True

    def send(self, node: str, commands: Sequence[Command]) -> None:
        assert node == "n1"
        self.sent.extend(commands)


class Moody(Store):
    """A store that refuses while it is told to, or does not answer at all."""

    refuses = False
    is_stuck = False

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        if self.is_stuck:
            return
        full = StoreFull(f"{self.path}: no room to write")
        super().deliver([(write, full) for write, _ in outcomes] if self.refuses else outcomes)


class Scene:
    """A control loop over a fleet of one node with 8 GPUs, on a clock that stands still."""

    def __init__(self, store: Moody, meters: Meters) -> None:
        self.clock = VirtualClock()
        self.store = store
        self.meters = meters
        self.ledger = Ledger(store, meters, self.clock.now())
        self.line = Line()
        self.findings = Findings()
        self.control = Control(self.ledger, self.line, meters, self.clock, findings=self.findings)

    async def connect(self, gpus: int = 8) -> None:
        facts = make_facts("n1", gpus)
        await self.ledger.record(e.NodeRegistered(self.clock.now(), facts))
        self.ledger.note(e.AgentConnected(self.clock.now(), "n1", 1, (), 0))
        self.report(
            driver=DriverState.READING,
            processes=ProcessTable(self.clock.now(), ()),
            samples=make_samples(facts.gpus),
        )

    _sequence = 0

    def report(self, **fields: object) -> None:
        self._sequence += 1
        now = self.clock.now()
        frame = Frame(self._sequence, now, 0.0, **fields)  # type: ignore[arg-type]
        self.ledger.note(e.FrameArrived(now, "n1", 1, frame, now))

    def obey(self) -> None:
        """Hold and drop as was told, and say so."""
        held = {c.allocation_id: c.hold for c in self.line.sent}
        holds = tuple(each for each in held.values() if isinstance(each, HeldAllocation))
        self.report(held=holds, commands_done=self.line.sent[-1].id)

    def rounds(self) -> float:
        return self.meters.registry.get_sample_value("stoker_control_rounds_total") or 0.0

    def state(self, id_: str) -> AllocationState:
        return self.ledger.fleet.allocations[id_].state


@asynccontextmanager
async def running(folder: Path) -> AsyncGenerator[Scene]:
    meters = Meters()
    store = Moody(folder, meters.committed)
    scene = Scene(store, meters)
    loop = asyncio.create_task(scene.control.run())
    try:
        await scene.control.turned()
        yield scene
    finally:
        loop.cancel()
        await asyncio.wait([loop])
        if not loop.cancelled():
            loop.result()
        await asyncio.to_thread(store.close)


async def until(scene: Scene, id_: str, state: AllocationState) -> None:
    async with asyncio.timeout(10):
        await scene.ledger.until(id_, lambda allocation: allocation.state is state)


async def test_grant_is_on_disk_before_it_is_answered_and_then_its_node_is_told(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole()))
        assert isinstance(reply, Settled)
        on_disk = [event for _, event in scene.store.load()[1]]
        assert [event.id for event in on_disk if isinstance(event, e.AllocationGranted)] == [
            reply.id
        ]
        (command,) = scene.line.sent
        assert (command.id, command.allocation_id, command.is_hold) == (1, reply.id, True)


async def test_wishes_that_come_together_are_decided_together(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        before = scene.rounds()
        replies = await asyncio.gather(*(scene.control.wish(Allocate(whole())) for _ in range(9)))
        assert [type(reply) for reply in replies] == [Settled] * 8 + [Refused]
        assert len({reply.id for reply in replies if isinstance(reply, Settled)}) == 8
        assert scene.rounds() == before + 1


async def test_caller_that_left_before_its_turn_gets_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        leaving = asyncio.ensure_future(scene.control.wish(Allocate(whole())))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await scene.control.wish(Allocate(whole()))
        assert len(scene.ledger.fleet.allocations) == 1


async def test_release_ends_when_the_node_has_let_go(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect(gpus=1)
        reply = await scene.control.wish(Allocate(whole()))
        assert isinstance(reply, Settled)
        scene.obey()
        await scene.control.wish(Release(reply.id))
        assert scene.state(reply.id) is AllocationState.RELEASING
        assert [command.is_hold for command in scene.line.sent] == [True, False]
        scene.obey()
        await until(scene, reply.id, AllocationState.ENDED)


async def test_lease_ends_at_its_ttl_and_not_before(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole(ttl_seconds=60.0)))
        assert isinstance(reply, Settled)
        await scene.clock.advance(59.8)
        assert scene.state(reply.id) is AllocationState.GRANTED
        await scene.clock.advance(0.4)
        await until(scene, reply.id, AllocationState.RELEASING)


@pytest.mark.parametrize("ttl_seconds", [1.0, 60.0])
async def test_lease_that_is_kept_alive_outlives_a_standstill(
    tmp_path: Path, ttl_seconds: float
) -> None:
    """Under SIGSTOP, or in a VM that is paused, keep-alives wait in the sockets."""
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole(ttl_seconds=ttl_seconds)))
        assert isinstance(reply, Settled)
        scene.clock.stand_still(10 * ttl_seconds)
        await scene.clock.advance(ttl_seconds - 0.2)
        assert scene.state(reply.id) is AllocationState.GRANTED
        await scene.clock.advance(0.4)
        await until(scene, reply.id, AllocationState.RELEASING)


async def test_clock_that_is_set_forward_ends_no_lease(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole(ttl_seconds=60.0)))
        assert isinstance(reply, Settled)
        scene.clock.step_wall(3600.0)
        await scene.clock.advance(59.8)
        assert scene.state(reply.id) is AllocationState.GRANTED


async def test_loop_that_is_late_under_load_prolongs_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole(ttl_seconds=60.0)))
        assert isinstance(reply, Settled)
        for _ in range(200):
            scene.clock.stand_still(STANDSTILL_SECONDS - 0.15)
            await scene.clock.advance(0.0)
        await until(scene, reply.id, AllocationState.RELEASING)


async def test_those_who_wait_are_served_when_there_is_room(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect(gpus=1)
        first = await scene.control.wish(Allocate(whole()))
        second = await scene.control.wish(Allocate(whole(), wait_seconds=60.0))
        assert isinstance(first, Settled)
        assert isinstance(second, Queued)
        scene.ledger.note(e.WaiterAttached(scene.clock.now(), second.id))
        scene.obey()
        await scene.control.wish(Release(first.id))
        scene.obey()
        await until(scene, first.id, AllocationState.ENDED)
        await scene.clock.advance(0.2)
        await until(scene, second.id, AllocationState.GRANTED)


async def test_node_without_a_stream_is_told_when_it_has_one(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        scene.line.is_up = False
        reply = await scene.control.wish(Allocate(whole()))
        assert isinstance(reply, Settled)
        assert scene.line.sent == []
        scene.line.is_up = True
        scene.ledger.note(e.AgentConnected(scene.clock.now(), "n1", 2, (), 1))
        async with asyncio.timeout(10):
            while not scene.line.sent:
                await scene.control.turned()
        assert scene.line.sent[0].allocation_id == reply.id


async def test_refused_store_fails_the_wishes_of_that_round_and_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        assert scene.control.trouble() == ""
        scene.store.refuses = True
        results = await asyncio.gather(
            *(scene.control.wish(Allocate(whole())) for _ in range(3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreFull] * 3
        assert scene.ledger.fleet.allocations == {}
        assert "no room to write" in scene.control.trouble()
        with pytest.raises(StoreFull):
            await scene.control.wish(Allocate(whole()))
        # It probes by itself, so that it mends without a client's risk.
        scene.store.refuses = False
        async with asyncio.timeout(10):
            while scene.control.trouble():
                await scene.clock.advance(0.5)
                await scene.ledger.probe()
        assert isinstance(await scene.control.wish(Allocate(whole())), Settled)


async def test_loop_whose_disk_does_not_answer_is_in_trouble(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        scene.store.is_stuck = True
        asking = asyncio.ensure_future(scene.control.wish(Allocate(whole())))
        await scene.clock.advance(STUCK_SECONDS)
        assert scene.control.trouble() == ""
        await scene.clock.advance(1.0)
        assert "has not come round for 4.0 s" in scene.control.trouble()
        asking.cancel()


async def test_keep_alive_waits_for_the_commit_that_ends_its_lease(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        reply = await scene.control.wish(Allocate(whole(ttl_seconds=60.0)))
        assert isinstance(reply, Settled)
        await scene.control.settled(reply.id)
        scene.store.is_stuck = True
        await scene.clock.advance(61.0)
        settled = asyncio.ensure_future(scene.control.settled(reply.id))
        await scene.clock.advance(1.0)
        assert not settled.done()
        settled.cancel()


async def test_nothing_to_do_is_no_round(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        await scene.control.wish(Release("nobody"))
        before = scene.rounds()
        await scene.clock.advance(10.0)
        assert scene.rounds() == before
        assert scene.control.trouble() == ""


async def comes(scene: Scene, is_there: Callable[[], bool]) -> float:
    """Return when it is so, a tick late at most and what the disk took; time passes meanwhile."""
    async with asyncio.timeout(10):
        while not is_there():
            await scene.clock.advance(TICK_SECONDS)
            await asyncio.sleep(0.001)
    return scene.clock.now()


async def test_verdict_of_a_node_is_acted_on_when_it_comes_and_when_time_has_passed(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as scene:
        await scene.connect(gpus=1)
        cordon_of = scene.ledger.fleet.conditions.cordon_of
        scene.report(health=(make_health("n1-0"),))
        await comes(scene, lambda: cordon_of("n1-0") is not None)
        well_at = scene.clock.now()
        scene.report(health=(make_health("n1-0", Verdict.HEALTHY),))
        assert await comes(scene, lambda: cordon_of("n1-0") is None) >= well_at + 60.0
        await scene.clock.advance(1.0)
        before = scene.rounds()
        await scene.clock.advance(10.0)
        assert scene.rounds() == before, "there is nothing to do any more"


async def test_drain_ends_what_is_held_without_anybody_asking(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        mine = await scene.control.wish(Allocate(whole(ttl_seconds=1e6)))
        assert isinstance(mine, Settled)
        asked_at = scene.clock.now()
        await scene.control.wish(Drain("n1", "fans", grace_seconds=60.0))
        ended_at = await comes(scene, lambda: scene.state(mine.id) is AllocationState.RELEASING)
        assert ended_at >= asked_at + 60.0


async def test_gangs_are_compared_every_ten_seconds(tmp_path: Path) -> None:
    async with running(tmp_path) as scene:
        await scene.connect()
        observed: list[float] = []
        scene.findings.observe = lambda fleet, now: observed.append(now)  # type: ignore[method-assign]
        await scene.clock.advance(60.0)
        assert 5 <= len(observed) <= 6
        gaps = [later - earlier for earlier, later in pairwise(observed)]
        assert all(gap > OBSERVE_SECONDS - TICK_SECONDS for gap in gaps)
