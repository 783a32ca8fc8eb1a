"""The one door: stored, applied, told, in this order and in the order of the calls."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.unit.aggregator.builders import make_facts, whole

from stoker.aggregator import events as e
from stoker.aggregator.ledger import Change, Ledger, WatchTooOld, WatchTooSlow
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import AllocationState, Device, Placement
from stoker.aggregator.store import Store

NOW = 1_000.0


class OpenLedger(Ledger):
    """A ledger that tells whether it leaks."""

    def forgets_waiters(self) -> bool:
        return self._waiters == {}


@asynccontextmanager
async def opened(folder: Path, now: float = NOW) -> AsyncGenerator[OpenLedger]:
    meters = Meters()
    store = Store(folder, meters.committed)
    try:
        yield OpenLedger(store, meters, now)
    finally:
        await asyncio.to_thread(store.close)


def registered(name: str = "n1") -> e.NodeRegistered:
    return e.NodeRegistered(NOW, make_facts(name))


def requested(id_: str = "a1") -> e.AllocationRequested:
    return e.AllocationRequested(NOW, id_, whole(), "", NOW + 60)


def granted(id_: str = "a1") -> e.AllocationGranted:
    device = Device("n1-0", "H100", 0, 1, exclusive=True)
    return e.AllocationGranted(NOW, id_, whole(), "", NOW, (Placement("n1", (device,)),))


def ended(id_: str = "a1") -> e.AllocationEnded:
    return e.AllocationEnded(NOW, id_, "cancelled: enough")


async def take(ledger: Ledger, after: int, count: int) -> list[Change]:
    found: list[Change] = []
    async for change in ledger.watch(after):
        found.append(change)
        if len(found) == count:
            return found
    raise AssertionError("a watch never ends")


async def test_what_was_recorded_is_there_in_the_next_life(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record(registered())
        await ledger.record(granted())
        assert ledger.fleet.version == 2
    async with opened(tmp_path, now=5_000.0) as ledger:
        assert ledger.fleet.version == 2
        assert ledger.fleet.allocations["a1"].state is AllocationState.GRANTED
        assert ledger.fleet.expires_at("a1") == 5_000.0 + whole().ttl_seconds


async def test_records_take_effect_in_the_order_of_the_calls(tmp_path: Path) -> None:
    """Each of them is possible only after the one before it."""
    async with opened(tmp_path) as ledger:
        await asyncio.gather(
            ledger.record(registered()),
            ledger.record(requested(), granted()),
            ledger.record(e.AllocationReleasing(NOW, "a1", "released")),
            ledger.record(ended()),
        )
        assert ledger.fleet.allocations["a1"].state is AllocationState.ENDED


async def test_caller_that_is_cancelled_leaves_no_gap(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        recording = asyncio.ensure_future(ledger.record(registered()))
        await asyncio.sleep(0)  # it has handed its event to the store
        recording.cancel()
        await ledger.record(requested())
        assert ledger.fleet.version == 2
        assert "n1" in ledger.fleet.nodes


async def test_listeners_hear_after_it_has_happened(tmp_path: Path) -> None:
    heard: list[int] = []
    async with opened(tmp_path) as ledger:
        ledger.on_news(lambda: heard.append(ledger.fleet.version))
        await ledger.record(registered())
        ledger.note(e.AgentConnected(NOW, "n1", 1, (), 0))
    assert heard == [1, 1]


async def test_until_waits_for_the_allocation_that_it_is_about(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record(registered(), requested("a1"), requested("a2"))
        is_over = {
            id_: asyncio.ensure_future(
                ledger.until(id_, lambda a: a.state is not AllocationState.WAITING)
            )
            for id_ in ("a1", "a2")
        }
        await ledger.record(ended("a2"))
        found = await is_over["a2"]
        assert found is not None
        assert found.reason == "cancelled: enough"
        assert not is_over["a1"].done()
        is_over["a1"].cancel()
        await asyncio.wait([is_over["a1"]])
        await ledger.record(ended("a1"))
        assert await ledger.until("nobody", lambda a: False) is None
        assert ledger.forgets_waiters()


async def test_reports_that_a_round_could_not_settle_go_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record(registered())
        assert not ledger.is_settled("n1")
        with pytest.raises(RuntimeError):
            fail_a_round(ledger)
        assert not ledger.is_settled("n1")
        with ledger.reconciling() as nodes:
            assert nodes == {"n1"}
        assert ledger.is_settled("n1")


def fail_a_round(ledger: Ledger) -> None:
    with ledger.reconciling() as nodes:
        assert nodes == {"n1"}
        assert not ledger.is_settled("n1"), "a round is still deciding on it"
        raise RuntimeError


async def test_watch_tells_each_change_with_its_object_as_it_was(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.record(registered(), requested(), granted())
        await ledger.record(e.AllocationReleasing(NOW, "a1", "released"), ended())
        await ledger.record(e.AllocationsForgotten(NOW, ("a1",)))
        states = [getattr(change.after, "state", None) for change in await take(ledger, 0, 6)]
    assert states == [None, "waiting", "granted", "releasing", "ended", None]


async def test_watch_goes_from_the_store_to_memory_without_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.ledger.RECENT_CHANGES_MAX", 4)
    monkeypatch.setattr("stoker.aggregator.ledger.HISTORY_PER_READ", 3)
    async with opened(tmp_path) as ledger:
        await ledger.record(registered())
        for number in range(20):
            await ledger.record(requested(f"a{number}"))
        taking = asyncio.ensure_future(take(ledger, 3, 28))
        for number in range(20, 30):
            await ledger.record(requested(f"a{number}"))
        changes = await taking
    assert [change.version for change in changes] == list(range(4, 32))
    assert [getattr(change.after, "id", "") for change in changes] == [
        f"a{number}" for number in range(2, 30)
    ]


async def test_reader_left_behind_is_cut_off_and_told_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.ledger.RECENT_CHANGES_MAX", 4)
    async with opened(tmp_path) as ledger:
        await ledger.record(registered())
        watch = ledger.watch(0)
        assert (await anext(watch)).version == 1
        for number in range(10):
            await ledger.record(requested(f"a{number}"))
        with pytest.raises(WatchTooSlow, match="go on with a watch from version 1"):
            await anext(watch)
        assert [change.version for change in await take(ledger, 1, 10)] == list(range(2, 12))


async def test_version_that_is_not_reached_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        with pytest.raises(WatchTooOld, match="version 1 is not reached yet, the newest is 0"):
            await anext(ledger.watch(1))


async def test_snapshots_are_taken_as_it_goes_so_that_little_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.ledger.SNAPSHOT_EVERY_EVENTS", 5)
    async with opened(tmp_path) as ledger:
        await ledger.record(registered())
        for number in range(40):
            await ledger.record(requested(f"a{number}"))
    store = Store(tmp_path)
    snapshot, events = store.load()
    await asyncio.to_thread(store.close)
    assert snapshot is not None
    # A fleet of so many allocations takes its snapshots as seldom as that.
    assert len(events) <= 25
    assert snapshot.version + len(events) == 41
    async with opened(tmp_path) as ledger:
        assert len(ledger.fleet.waiting) == 40
