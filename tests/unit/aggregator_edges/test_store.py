"""The ledger's file: in order, together, whole or not at all, and never anybody else's."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Snapshot
from stoker.aggregator.model import Node, NodeFacts
from stoker.aggregator.store import FILE_NAME, HistoryGone, OnCommit, Store
from stoker.core.errors import InUse, StoreCorrupt, StoreError, StoreFull, StoreTooNew


def event(number: int, size: int = 0) -> e.DurableEvent:
    return e.NodeCordoned(float(number), "n1", f"reason {number}" + "x" * size)


def events(*numbers: int) -> list[e.DurableEvent]:
    return [event(number) for number in numbers]


def make_snapshot(version: int, nodes: int = 1) -> Snapshot:
    facts = [NodeFacts(f"n{i}", "i", "b", "1", simulated=True) for i in range(nodes)]
    return Snapshot(version, tuple(Node(f, registered_at=1.0, version=1) for f in facts), ())


class Gate(Store):
    """A store whose commits wait until they are let through, and may be refused by the disk."""

    def __init__(self, folder: Path, on_commit: OnCommit = lambda count, seconds: None) -> None:
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.refused: set[int] = set()  # commits by number
        self.commits = 0
        super().__init__(folder, on_commit)

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        """Run a statement beside the writer, which must be idle, and return the rows."""
        return self._connection.execute(statement).fetchall()

    def commit(self, connection: sqlite3.Connection) -> None:
        self.waiting.set()
        assert self.open.wait(10)
        self.commits += 1
        if self.commits in self.refused:
            # What a full disk says; and as with it, the transaction is still to be rolled back.
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
            try:
                connection.execute("CREATE TABLE beyond (filler BLOB)")
            finally:
                connection.execute(f"PRAGMA max_page_count = {1 << 30}")
        super().commit(connection)


@asynccontextmanager
async def opened(
    folder: Path, kind: Callable[[Path, OnCommit], Store] = Store, on_commit: OnCommit | None = None
) -> AsyncGenerator[Store]:
    store = kind(folder, on_commit or (lambda count, seconds: None))
    try:
        yield store
    finally:
        await asyncio.to_thread(store.close)


@asynccontextmanager
async def gated(folder: Path, on_commit: OnCommit | None = None) -> AsyncGenerator[Gate]:
    async with opened(folder, Gate, on_commit) as store:
        assert isinstance(store, Gate)
        yield store


# --- appending


async def test_what_was_appended_is_there_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert store.load() == (None, [])
        assert list(await store.append(events(1, 2))) == [1, 2]
        assert list(await store.append(events(3))) == [3]
    async with opened(tmp_path) as store:
        assert store.load() == (None, list(enumerate(events(1, 2, 3), 1)))
        assert list(await store.append(events(4))) == [4]


async def test_every_commit_is_synced(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        settings = {
            name: store.ask(f"PRAGMA {name}")[0][0]
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


async def test_what_comes_while_a_commit_runs_shares_the_next(tmp_path: Path) -> None:
    counted: list[int] = []
    async with gated(tmp_path, lambda count, seconds: counted.append(count)) as store:
        store.open.clear()
        first = store.append(events(0))
        await asyncio.to_thread(store.waiting.wait)
        others = [store.append(events(number, number)) for number in range(1, 11)]
        store.open.set()
        assert [list(await each) for each in (first, *others)] == [
            [1], *([2 * n, 2 * n + 1] for n in range(1, 11)),
        ]  # fmt: skip
    assert counted == [1, 20]


async def test_futures_resolve_in_the_order_of_the_calls(tmp_path: Path) -> None:
    order: list[int] = []
    async with opened(tmp_path) as store:
        futures = [store.append(events(number)) for number in range(50)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        await asyncio.gather(*futures)
    assert order == list(range(50))


async def test_caller_that_left_does_not_unmake_what_is_on_disk(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        store.open.clear()
        store.append(events(1)).cancel()
        store.open.set()
        assert list(await store.append(events(2))) == [2]


# --- refusals of the disk


async def test_refused_append_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        await store.append(events(1))
        store.refused = {store.commits + 1, store.commits + 2}  # with the chore, and alone
        with pytest.raises(StoreFull, match=rf"{FILE_NAME}: no room to write"):
            await store.append(events(2))
        assert list(await store.append(events(3))) == [2]
    async with opened(tmp_path) as store:
        assert store.load()[1] == [(1, event(1)), (2, event(3))]


async def test_one_too_large_for_the_disk_is_refused_alone(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        await store.append(events(1))
        ((pages,),) = store.ask("PRAGMA page_count")
        assert isinstance(pages, int)
        store.ask(f"PRAGMA max_page_count = {pages + 2}")
        store.open.clear()
        store.waiting.clear()
        held = store.append(events(2))
        await asyncio.to_thread(store.waiting.wait)
        small = store.append(events(3))
        large = store.append([event(4, size=100_000)])
        also = store.append(events(5))
        store.open.set()
        with pytest.raises(StoreFull):
            await large
        assert [list(await each) for each in (held, small, also)] == [[2], [3], [4]]
    async with opened(tmp_path) as store:
        assert [each for _, each in store.load()[1]] == events(1, 2, 3, 5)


async def test_probe_tells_whether_the_disk_takes_writes_and_changes_no_history(
    tmp_path: Path,
) -> None:
    async with gated(tmp_path) as store:
        await store.append(events(1))
        store.refused = {store.commits + 1, store.commits + 2}
        with pytest.raises(StoreFull):
            await store.probe()
        assert list(await store.probe()) == []
        assert list(await store.append(events(2))) == [2]


async def test_closed_store_takes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        pass
    with pytest.raises(StoreError, match="is closed"):
        await store.append(events(1))


async def test_what_was_handed_in_before_the_end_is_kept(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        store.open.clear()
        futures = [store.append(events(number)) for number in (1, 2, 3)]
        store.open.set()
    assert [list(await future) for future in futures] == [[1], [2], [3]]


# --- snapshots and history


async def test_start_reads_the_snapshot_and_what_came_after(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.append(events(1, 2))
        await store.keep(make_snapshot(2, nodes=3))
        await store.append(events(3))
    async with opened(tmp_path) as store:
        assert store.load() == (make_snapshot(2, nodes=3), [(3, event(3))])


async def test_appends_go_on_between_the_parts_of_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.codec.OBJECTS_PER_PART", 1)
    async with gated(tmp_path) as store:
        await store.append(events(1))
        store.open.clear()
        kept = store.keep(make_snapshot(1, nodes=20))
        appended = store.append(events(2))
        store.open.set()
        await appended
        assert not kept.done()
        await kept
    async with opened(tmp_path) as store:
        assert store.load() == (make_snapshot(1, nodes=20), [(2, event(2))])


async def test_snapshot_that_was_cut_short_is_as_if_it_had_not_been_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.codec.OBJECTS_PER_PART", 1)
    async with gated(tmp_path) as store:
        await store.append(events(1))
        await store.keep(make_snapshot(1, nodes=1))
        await store.append(events(2))
        store.refused = {store.commits + 3}
        with pytest.raises(StoreFull):
            await store.keep(make_snapshot(2, nodes=5))
        assert list(await store.append(events(3))) == [3]
    async with gated(tmp_path) as store:
        assert store.load() == (make_snapshot(1, nodes=1), [(2, event(2)), (3, event(3))])
        await store.keep(make_snapshot(3, nodes=5))
        rows = store.ask("SELECT DISTINCT version FROM snapshots ORDER BY 1")
        assert rows == [(1,), (3,)], "the leftovers are gone"


async def test_append_is_not_refused_for_the_snapshot_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.codec.OBJECTS_PER_PART", 1)
    async with gated(tmp_path) as store:
        await store.append(events(1))
        store.open.clear()
        kept = store.keep(make_snapshot(1, nodes=5))
        appended = store.append(events(2))
        store.refused = {store.commits + 1}
        store.open.set()
        assert list(await appended) == [2]
        with pytest.raises(StoreFull):
            await kept


async def test_old_history_goes_when_a_snapshot_covers_it_and_ids_are_never_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.store.EVENTS_KEPT", 3)
    monkeypatch.setattr("stoker.aggregator.store.PRUNED_AT_ONCE", 2)
    async with opened(tmp_path) as store:
        await store.append(events(*range(1, 6)))
        await store.keep(make_snapshot(5))
        assert await store.read(0, 100) == list(enumerate(events(*range(1, 6)), 1))
        assert await store.base(3) == Snapshot(0, (), ())
        await store.append(events(6, 7, 8))
        await store.keep(make_snapshot(8))
        with pytest.raises(HistoryGone, match="kept from version 5 on"):
            await store.read(0, 100)
        with pytest.raises(HistoryGone, match="kept from version 5 on"):
            await store.base(4)
        assert await store.base(5) == await store.base(7) == make_snapshot(5)
        assert await store.base(8) == make_snapshot(8)
        assert await store.read(5, 2) == [(6, event(6)), (7, event(7))]
        await store.append(events(9, 10, 11))
        await store.keep(make_snapshot(11))
        assert await store.read(11, 100) == []
    async with opened(tmp_path) as store:
        assert store.load() == (make_snapshot(11), [])
        assert list(await store.append(events(12))) == [12]


async def test_snapshot_of_what_is_kept_already_costs_nothing(tmp_path: Path) -> None:
    async with gated(tmp_path) as store:
        await store.append(events(1))
        await store.keep(make_snapshot(1))
        await store.keep(make_snapshot(1))
        assert store.ask("SELECT COUNT(*) FROM snapshots") == [(1,)]


# --- folders and files that are not right


async def test_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path / "deep" / "down") as store:
        await store.append(events(1))
        with pytest.raises(InUse, match=rf"another aggregator \(PID {os.getpid()}\) uses it"):
            Store(tmp_path / "deep" / "down")
    async with opened(tmp_path / "deep" / "down") as store:
        assert store.load()[1] == [(1, event(1))]


async def damage(folder: Path, harm: Callable[[Path], object]) -> None:
    async with opened(folder) as store:
        await store.append(events(*range(200)))
        await store.keep(make_snapshot(200, nodes=50))
    harm(folder / FILE_NAME)


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def execute(file: Path, statement: str) -> None:
    connection = sqlite3.connect(file)
    with connection:
        connection.executescript(statement)
    connection.close()


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda file: file.write_bytes(b"hello" * 5000), "not a healthy ledger"),
    "cut short": (lambda file: os.truncate(file, 5000), "not a healthy ledger"),
    "garbled": (lambda file: overwrite(file, 8192, b"\xa5" * 4096), "not a healthy ledger"),
    "another program's": (
        lambda file: execute(file, "DROP TABLE events; CREATE TABLE bookmarks (url TEXT)"),
        "it holds other tables:",
    ),
    "snapshot that is none": (
        lambda file: execute(file, "UPDATE snapshots SET payload = '[]'"),
        "snapshot 200: ",
    ),
}


@pytest.mark.parametrize("name", HARMS)
async def test_damaged_file_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    harm, word = HARMS[name]
    await damage(tmp_path, harm)
    with pytest.raises(StoreCorrupt) as caught:
        async with opened(tmp_path) as store:
            store.load()
    assert str(tmp_path / FILE_NAME) in str(caught.value)
    assert word in str(caught.value)
    assert "restore a backup" in str(caught.value)
    # The lock is not kept by what could not be opened.
    (tmp_path / FILE_NAME).unlink()
    async with opened(tmp_path):
        pass


async def test_event_that_is_none_is_named_by_its_number(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.append(events(1, 2, 3))
    execute(tmp_path / FILE_NAME, "UPDATE events SET kind = 'GpuMelted' WHERE id = 3")
    with pytest.raises(StoreCorrupt, match="the event after 2: 'GpuMelted' is no kind of event"):
        async with opened(tmp_path) as store:
            store.load()


async def test_newer_schema_is_refused_by_name_and_nothing_is_changed(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    execute(
        tmp_path / FILE_NAME,
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
        " VALUES ('stoker', '0099_quotas', '2099-01-01')",
    )
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(StoreTooNew, match=rf"{FILE_NAME}: its schema is 0099_quotas.*0001_ledger"):
        Store(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


async def test_migrations_are_applied_once_and_recorded(tmp_path: Path) -> None:
    for _ in range(2):
        async with gated(tmp_path) as store:
            assert store.ask("SELECT name FROM _sqlite_migrations") == [("0001_ledger",)]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=f"data folder {folder}"):
            Store(folder)


def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StoreError, match=FILE_NAME):
        Store(tmp_path)
