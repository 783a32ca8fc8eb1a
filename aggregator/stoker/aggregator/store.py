"""The ledger's file: events and snapshots in SQLite, one writer thread, many appends per commit.

Theory of operation. `append` hands encoded events to the writer thread. Whatever was handed in
while the last commit ran goes into the next transaction as one; with WAL and synchronous=FULL its
COMMIT returns after an fsync, and only then do the futures resolve. Snapshots are written part by
part, each part riding in the next transaction, so that a large fleet never holds up a commit for
long; when the last part is in, what is older than the history to keep is deleted in slices, the
same way. Reading history has a connection and a thread of its own. A lock file keeps a second
process out of the folder.

Errors: InUse, StoreCorrupt, StoreTooNew, StoreFull, StoreError (see stoker.core.errors). A refused
append leaves nothing behind, and the next one is tried as if nothing had happened.
"""

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import assert_never

import sqlite_utils

from stoker.aggregator import codec
from stoker.aggregator.events import DurableEvent
from stoker.aggregator.fleet import Snapshot
from stoker.aggregator.folder_lock import lock_folder
from stoker.core.errors import StoreCorrupt, StoreError, StoreFull, StoreTooNew

FILE_NAME = "ledger.sqlite3"
# So many events stay readable for Watch; older ones go once a snapshot covers them.
EVENTS_KEPT = 50_000
# Deleted per transaction: a few milliseconds.
PRUNED_AT_ONCE = 500
# Appends per transaction; a group that is larger waits for the next one.
GROUP_MAX = 1_000
# Only the reader's connection and an operator's tool ever compete with the writer.
BUSY_SECONDS = 5.0

StoredEvent = tuple[int, DurableEvent]
OnCommit = Callable[
    [int, float], None
]  # events written, seconds it took; called on the writer thread
Outcome = tuple["_Write", "range | StoreError"]


class HistoryGone(Exception):
    """The events after the version that was asked for are no longer kept."""


@dataclass(frozen=True, slots=True)
class _Write:
    rows: Sequence[tuple[float, str, str]]  # at, kind, payload; empty: a probe
    future: "asyncio.Future[range]"


@dataclass(frozen=True, slots=True)
class _Keep:
    snapshot: Snapshot
    future: "asyncio.Future[range]"


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


@dataclass(slots=True)
class _Chore:
    """A snapshot on its way into the file; `steps` does a little at every `next`."""

    keep: _Keep
    steps: Iterator[None]


def _uncounted(events: int, seconds: float) -> None:
    pass


class Store:
    """The open file. `load`, `check_writable`, `close` block; the rest is for the loop's thread."""

    def __init__(self, folder: Path, on_commit: OnCommit = _uncounted) -> None:
        """Open the ledger in `folder`, making both if need be; raises StoreError or InUse."""
        self.path = folder / FILE_NAME
        self._on_commit = on_commit
        self._lock = lock_folder(folder)
        try:
            self._connection = self._open()
        except BaseException:
            self._lock.close()
            raise
        self._last_id = self._newest_id()
        self._newest_snapshot = self._snapshot_version_max()
        self._queue: queue.SimpleQueue[_Write | _Keep | _Stop] = queue.SimpleQueue()
        self._chores: deque[_Chore] = deque()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._reading: sqlite3.Connection | None = None
        self._is_closed = False
        self._writer = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._writer.start()

    def load(self) -> tuple[Snapshot | None, list[StoredEvent]]:
        """Return the newest snapshot and the events after it; raises StoreCorrupt."""
        snapshot = None
        if self._newest_snapshot is not None:
            snapshot = self._snapshot(self._connection, self._newest_snapshot)
        after = snapshot.version if snapshot else 0
        return snapshot, self._events(self._connection, after, limit=-1)

    def check_writable(self) -> None:
        """Find out now, not at the first grant, that the disk is full or read-only."""
        try:
            self._connection.execute(_PROBE)
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error

    def append(self, events: Sequence[DurableEvent]) -> "asyncio.Future[range]":
        """Return a future of the events' ids, which resolves, in order, once they are on disk.

        It fails with StoreFull or another StoreError, and then nothing of these events was kept.
        """
        assert events, "nothing to append"
        rows = [(event.at, *codec.encode_event(event)) for event in events]
        return self._put(_Write(rows, asyncio.get_running_loop().create_future()))

    def probe(self) -> "asyncio.Future[range]":
        """Return a future that resolves when the disk took a write, and fails when it did not."""
        return self._put(_Write((), asyncio.get_running_loop().create_future()))

    def keep(self, snapshot: Snapshot) -> "asyncio.Future[range]":
        """Return a future that resolves when `snapshot` is on disk, and older history is pruned."""
        return self._put(_Keep(snapshot, asyncio.get_running_loop().create_future()))

    async def base(self, version: int) -> Snapshot:
        """Return a snapshot of `version` or before it from which events can be replayed.

        Raises HistoryGone when the events after `version` are no longer kept whole.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, self._base, version)

    async def read(self, after: int, limit: int) -> list[StoredEvent]:
        """Return at most `limit` events that follow id `after`; raises HistoryGone when pruned."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, self._read, after, limit)

    def close(self) -> None:
        """Finish what was handed in, and let go of the folder. Blocks while the loop must turn."""
        if self._is_closed:
            return
        self._is_closed = True
        self._queue.put(_Stop())
        self._writer.join()
        self._reader.submit(self._close_reader).result()
        self._reader.shutdown()
        self._connection.close()
        self._lock.close()

    # --- what a test overrides to end the process at an exact point

    def commit(self, connection: sqlite3.Connection) -> None:
        """Make the open transaction durable: when this returns, it was fsynced."""
        connection.execute("COMMIT")

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Resolve the futures of one group on the event loop, in order."""
        if outcomes:
            outcomes[0][0].future.get_loop().call_soon_threadsafe(_resolve, outcomes)

    # --- opening

    def _open(self) -> sqlite3.Connection:
        connection = None
        try:
            connection = sqlite3.connect(
                self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            _check(connection, self.path)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")
            _migrate(connection, self.path)
            return connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise _explained(error, self.path) from error
            raise

    def _newest_id(self) -> int:
        # AUTOINCREMENT remembers the highest id even when every event was pruned.
        row = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'events'"
        ).fetchone()
        return row[0] if row else 0

    def _snapshot_version_max(self) -> int | None:
        complete = _complete_snapshots(self._connection)
        return complete[-1] if complete else None

    # --- the writer thread

    def _put(self, job: _Write | _Keep) -> "asyncio.Future[range]":
        if self._is_closed:
            job.future.set_exception(StoreError(f"{self.path} is closed"))
        else:
            self._queue.put(job)
        return job.future

    def _run(self) -> None:
        stopping = False
        while not stopping or self._chores:
            group: list[_Write] = []
            for job in self._take(wait=not self._chores):
                match job:
                    case _Write():
                        group.append(job)
                    case _Keep():
                        self._chores.append(_Chore(job, self._keep_steps(job.snapshot)))
                    case _Stop():
                        stopping = True
                    case _:
                        assert_never(job)
            if group or self._chores:
                self._write(group)

    def _take(self, *, wait: bool) -> list[_Write | _Keep | _Stop]:
        """Return everything that was handed in; with `wait` at least one."""
        jobs: list[_Write | _Keep | _Stop] = []
        try:
            jobs.append(self._queue.get(block=wait))
            while len(jobs) < GROUP_MAX:
                jobs.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return jobs

    def _write(self, group: Sequence[_Write]) -> None:
        """Write the group in one transaction; if refused, each by itself, without the chore."""
        try:
            finished, ids = self._transact(group, self._chores[0] if self._chores else None)
        except sqlite3.Error as error:
            if self._chores:
                given_up = self._chores.popleft()
                self._fail(given_up.keep.future, _explained(error, self.path))
            self.deliver([(write, self._alone(write)) for write in group])
        else:
            self.deliver(list(zip(group, ids, strict=True)))
            if finished:
                kept = self._chores.popleft().keep
                kept.future.get_loop().call_soon_threadsafe(_settle, kept.future, range(0))

    def _alone(self, write: _Write) -> "range | StoreError":
        try:
            return self._transact([write], None)[1][0]
        except sqlite3.Error as error:
            return _explained(error, self.path)

    def _transact(self, group: Sequence[_Write], chore: _Chore | None) -> tuple[bool, list[range]]:
        """Return whether the chore is finished, and the ids of each write; raises sqlite3.Error."""
        started = time.perf_counter()
        connection = self._connection
        next_id = self._last_id + 1
        ids: list[range] = []
        finished = False
        try:
            connection.execute("BEGIN IMMEDIATE")
            for write in group:
                ids.append(range(next_id, next_id + len(write.rows)))
                if write.rows:
                    numbered = zip(ids[-1], write.rows, strict=True)
                    connection.executemany(_INSERT, [(id_, *row) for id_, row in numbered])
                    next_id = ids[-1].stop
                else:
                    connection.execute(_PROBE)
            if chore is not None:
                finished = next(chore.steps, _END) is _END
            self.commit(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._on_commit(next_id - 1 - self._last_id, time.perf_counter() - started)
        self._last_id = next_id - 1
        return finished, ids

    def _fail(self, future: "asyncio.Future[range]", error: StoreError) -> None:
        future.get_loop().call_soon_threadsafe(_settle, future, error)

    def _keep_steps(self, snapshot: Snapshot) -> Iterator[None]:
        """Write the snapshot, then delete what is older than the history to keep."""
        connection = self._connection
        if snapshot.version != self._newest_snapshot:
            # Leftovers of one that was cut short, perhaps of this version.
            connection.execute(f"DELETE FROM snapshots WHERE version NOT IN ({_COMPLETE})")
            parts = codec.count_parts(snapshot)
            for number, payload in enumerate(codec.encode_snapshot(snapshot)):
                connection.execute(
                    "INSERT INTO snapshots (version, part, parts, payload) VALUES (?, ?, ?, ?)",
                    (snapshot.version, number, parts, payload),
                )
                yield
            self._newest_snapshot = snapshot.version
        horizon = snapshot.version - EVENTS_KEPT
        covering = [v for v in _complete_snapshots(connection) if v <= horizon]
        if not covering:
            return
        # Watch replays from the oldest snapshot, so events stay from there on.
        base = covering[-1]
        connection.execute("DELETE FROM snapshots WHERE version < ?", (base,))
        while True:
            yield
            pruned = connection.execute(
                "DELETE FROM events WHERE id IN"
                " (SELECT id FROM events WHERE id <= ? ORDER BY id LIMIT ?)",
                (base, PRUNED_AT_ONCE),
            ).rowcount
            if pruned < PRUNED_AT_ONCE:
                return

    # --- reading

    def _snapshot(self, connection: sqlite3.Connection, version: int) -> Snapshot:
        rows = connection.execute(
            "SELECT payload FROM snapshots WHERE version = ? ORDER BY part", (version,)
        )
        try:
            return codec.decode_snapshot(version, [payload for (payload,) in rows])
        except (codec.Undecodable, sqlite3.Error) as error:
            raise _corrupt(self.path, f"snapshot {version}: {error}") from error

    def _events(self, connection: sqlite3.Connection, after: int, limit: int) -> list[StoredEvent]:
        events: list[StoredEvent] = []
        try:
            for id_, kind, payload in connection.execute(_SELECT, (after, limit)):
                events.append((id_, codec.decode_event(kind, payload)))
        except codec.Undecodable as error:
            place = events[-1][0] if events else after
            raise _corrupt(self.path, f"the event after {place}: {error}") from error
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error
        return events

    def _reader_connection(self) -> sqlite3.Connection:
        if self._reading is None:
            uri = f"{self.path.absolute().as_uri()}?mode=ro"
            self._reading = sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, uri=True)
        return self._reading

    def _close_reader(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def _base(self, version: int) -> Snapshot:
        connection = self._reader_connection()
        complete = _complete_snapshots(connection)
        earlier = [v for v in complete if v <= version]
        if earlier:
            return self._snapshot(connection, earlier[-1])
        (oldest,) = connection.execute("SELECT MIN(id) FROM events").fetchone()
        if complete and oldest != 1:
            raise HistoryGone(f"events are kept from version {complete[0]} on")
        return Snapshot(0, (), ())

    def _read(self, after: int, limit: int) -> list[StoredEvent]:
        events = self._events(self._reader_connection(), after, limit)
        if events and events[0][0] != after + 1:
            raise HistoryGone(f"events are kept from version {events[0][0] - 1} on")
        return events


_END = object()
_INSERT = "INSERT INTO events (id, at, kind, payload) VALUES (?, ?, ?, ?)"
_SELECT = "SELECT id, kind, payload FROM events WHERE id > ? ORDER BY id LIMIT ?"
_PROBE = (
    "INSERT INTO probes (id, count) VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1"
)
_COMPLETE = "SELECT version FROM snapshots GROUP BY version HAVING COUNT(*) = MAX(parts)"


def _resolve(outcomes: Sequence[Outcome]) -> None:
    for write, result in outcomes:
        _settle(write.future, result)


def _settle(future: "asyncio.Future[range]", result: "range | StoreError") -> None:
    if future.done():
        return  # its reader was cancelled; what is on disk stays
    if isinstance(result, StoreError):
        future.set_exception(result)
    else:
        future.set_result(result)


def _complete_snapshots(connection: sqlite3.Connection) -> list[int]:
    return sorted(version for (version,) in connection.execute(_COMPLETE))


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StoreCorrupt when the file is damaged or is the database of something else."""
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _corrupt(path, " ".join(verdict.split()))  # SQLite tells it in several lines
    database = sqlite_utils.Database(connection, execute_plugins=False)
    tables = database.table_names()
    if tables and "events" not in tables:
        raise _corrupt(path, f"it holds other tables: {', '.join(sorted(tables)[:5])}")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the numbered files that this database lacks, one transaction each; or StoreTooNew."""
    migrations = sqlite_utils.Migrations("stoker")
    scripts = _migration_scripts()
    for name, script in scripts.items():
        migrations(name=name)(_Script(name, script))
    database = sqlite_utils.Database(connection, execute_plugins=False)
    newer = sorted({done.name for done in migrations.applied(database)} - scripts.keys())
    if newer:
        raise StoreTooNew(
            f"{path}: its schema is {newer[-1]}, this stoker knows up to {list(scripts)[-1]}; "
            "start the newer stoker that wrote it, or restore a backup"
        )
    migrations.apply(database)


class _Script:
    """A migration as sqlite-utils calls it."""

    def __init__(self, name: str, script: str) -> None:
        self.__name__ = name
        self._script = script

    def __call__(self, db: sqlite_utils.Database) -> None:
        db.executescript(self._script)


def _migration_scripts() -> dict[str, str]:
    folder = resources.files("stoker.aggregator") / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return {f.name.removesuffix(".sql"): f.read_text(encoding="utf-8") for f in files}


def _explained(error: sqlite3.Error, path: Path) -> StoreError:
    """Return the error that a person can act on."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    match primary:
        case sqlite3.SQLITE_FULL:
            return _full(path)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return _corrupt(path, str(error))
        case sqlite3.SQLITE_IOERR if _has_no_room(path):
            return _full(path)  # the index of the WAL could not grow
        case _:
            return StoreError(f"{path}: {error}")


def _full(path: Path) -> StoreFull:
    return StoreFull(f"{path}: no room to write; nothing of this was kept: make room on its disk")


def _corrupt(path: Path, found: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{path}: not a healthy ledger: {found}; move it away and restore a backup, or start with "
        "an empty folder: agents then report what they hold"
    )


def _has_no_room(path: Path) -> bool:
    room = os.statvfs(path.parent)
    return room.f_bavail * room.f_frsize < 1 << 20
