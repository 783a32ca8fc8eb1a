"""The aggregator's store in a simulated world: the real codec and group commit, on a simulated
disk.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.aggregator.codec import decode_event, decode_snapshot, encode_event, encode_snapshot
from stoker.aggregator.events import DurableEvent
from stoker.aggregator.fleet import Fleet, Snapshot
from stoker.aggregator.store import Store, StoredEvent
from stoker.core.errors import StoreFull
from stoker.testing.disk import FULL, Disk
from stoker.testing.process import Process

_Future = asyncio.Future[range]


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """What one call asks the store to keep; its events get their ids when they are durable."""

    events: tuple[tuple[str, str], ...] = ()  # kind, JSON
    snapshot_version: int = 0  # 0: no snapshot
    snapshot_parts: tuple[str, ...] = ()


# What is stored in one transaction.
Group = tuple[Write, ...]


class LedgerFile:
    """What is on the disk; it outlives the process. Event ids count from 1 without gaps."""

    def __init__(self, disk: Disk[Group]) -> None:
        self.disk = disk
        self._events: list[DurableEvent] = []
        self._ids: dict[Write, range] = {}
        self._snapshot: Write | None = None
        self._groups_seen = 0

    @property
    def events(self) -> Sequence[DurableEvent]:
        """All durable events, decoded once each; the first has id 1."""
        self._look()
        return self._events

    def ids(self, write: Write) -> range:
        """Return the ids of the events of a durable write."""
        self._look()
        return self._ids[write]

    def load(self) -> tuple[Snapshot | None, list[StoredEvent]]:
        """Return the newest snapshot and the events after it."""
        numbered = list(enumerate(self.events, 1))
        if self._snapshot is None:
            return None, numbered
        version = self._snapshot.snapshot_version
        return decode_snapshot(version, self._snapshot.snapshot_parts), numbered[version:]

    def cut_back(self, groups: int) -> None:
        """Keep the first so many transactions only, as a backup of that age does."""
        del self.disk.durable[groups:]
        self._events, self._ids, self._snapshot, self._groups_seen = [], {}, None, 0

    def replayed(self) -> Fleet:
        """Return the fleet that all events give, without a snapshot."""
        fleet = Fleet.restored(Snapshot(0, (), ()))
        for number, event in enumerate(self.events, 1):
            fleet.apply(event, number)
        return fleet

    def _look(self) -> None:
        for group in self.disk.durable[self._groups_seen :]:
            for write in group:
                first = len(self._events) + 1
                self._ids[write] = range(first, first + len(write.events))
                self._events.extend(decode_event(*stored) for stored in write.events)
                if write.snapshot_version:
                    self._snapshot = write
        self._groups_seen = len(self.disk.durable)


class SimulatedStore(Store):
    """The store of one life of the process: the same methods, no file and no threads."""

    def __init__(self, file: LedgerFile, process: Process) -> None:
        # The real one's is left out on purpose: it opens SQLite.
        self.path = Path("ledger")
        self._file = file
        self._process = process
        self._waiting: deque[tuple[Write, _Future]] = deque()
        self._is_writing = False

    def load(self) -> tuple[Snapshot | None, list[StoredEvent]]:
        return self._file.load()

    def check_writable(self) -> None:
        if self._file.disk.is_full:
            raise StoreFull(f"{self.path}: {FULL}")

    def append(self, events: Sequence[DurableEvent]) -> _Future:
        return self._hand_in(Write(tuple(encode_event(event) for event in events)))

    def probe(self) -> _Future:
        return self._hand_in(Write())

    def keep(self, snapshot: Snapshot) -> _Future:
        return self._hand_in(Write((), snapshot.version, tuple(encode_snapshot(snapshot))))

    def close(self) -> None:
        pass

    def _hand_in(self, write: Write) -> _Future:
        future: _Future = asyncio.get_running_loop().create_future()
        self._waiting.append((write, future))
        if not self._is_writing and self._process.is_up:  # a dead process's tasks write nothing
            self._write_all()
        return future

    def _write_all(self) -> None:
        self._is_writing = True
        group, self._waiting = list(self._waiting), deque()

        def answered(reason: str) -> None:
            self._process.pass_point("stored, not applied")
            self._is_writing = False
            for write, future in group:
                if future.done():
                    continue  # cancelled; what it wrote is there all the same
                if reason:
                    future.set_exception(StoreFull(f"{self.path}: {reason}"))
                else:
                    future.set_result(self._file.ids(write))
            if self._waiting:
                self._write_all()

        self._file.disk.write(tuple(write for write, _ in group), self._process.guarded(answered))
