"""The one door to the fleet's state: what happens is stored, then applied, then told to readers."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import assert_never

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Fleet, Snapshot
from stoker.aggregator.lives import InvalidTransition
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import Allocation, Node
from stoker.aggregator.store import HistoryGone, Store
from stoker.core.errors import StoreCorrupt

# A snapshot is taken after so many events, or after as many as the last one had rows if those are
# more: its cost per event is thereby the same for a fleet of any size.
SNAPSHOT_EVERY_EVENTS = 10_000
# The newest changes stay in memory for Watch. A reader that falls further behind is cut off; when
# it comes back, it is served from the store.
RECENT_CHANGES_MAX = 10_000
# Read from the store at a time, so that a reader of history does not hold up the loop.
HISTORY_PER_READ = 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """A durable event and the object it changed, as it was just after."""

    version: int
    event: e.DurableEvent
    after: Allocation | Node | None  # None: it is about objects that are gone


class WatchTooOld(Exception):
    """The changes after that version are no longer kept; the text says from when on they are."""


class WatchTooSlow(Exception):
    """The reader was left behind by more than what is kept for it; the text says how to go on."""


class Ledger:
    """The fleet and its store. For the event loop's thread only."""

    def __init__(self, store: Store, meters: Meters, now: float) -> None:
        """Take over what `store` holds; every lease gets at least its full TTL from `now`.

        Raises StoreCorrupt when it cannot be, StoreError when nothing can be added to it.
        """
        self._store = store
        self._meters = meters
        self._recent: deque[Change] = deque(maxlen=RECENT_CHANGES_MAX)
        self._news = asyncio.Event()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}  # by allocation id
        self._listeners: list[Callable[[], None]] = []
        snapshot, events = store.load()
        self.fleet = Fleet.restored(snapshot or Snapshot(0, (), ()))
        self._snapshot_version = self.fleet.version
        self._snapshot_rows = _rows(self.fleet)
        self._is_keeping = False
        self._reconciling: set[str] = set()
        for id_, event in events:
            try:
                self._apply(event, id_)
            except InvalidTransition as error:
                raise StoreCorrupt(f"{store.path}: event {id_} cannot be: {error}") from error
        self.fleet.note(e.Recovered(now))
        store.check_writable()

    # --- writing

    async def record(self, *events: e.DurableEvent) -> None:
        """Return when the events are on disk and applied.

        Raises StoreError, and then nothing has happened. Calls take effect in the order in which
        they were made, also when their caller is cancelled meanwhile.
        """
        applied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._store.append(events).add_done_callback(partial(self._take, events, applied))
        await asyncio.shield(applied)

    def note(self, *events: e.VolatileEvent) -> None:
        """Apply what needs no disk, at once."""
        for event in events:
            self.fleet.note(event)
        for listener in self._listeners:
            listener()

    @contextmanager
    def reconciling(self) -> Generator[set[str]]:
        """Hand out the nodes that reported of allocations; if the round fails, they go back."""
        nodes, self.fleet.unreconciled = self.fleet.unreconciled, set()
        self._reconciling = nodes
        try:
            yield nodes
        except BaseException:
            self.fleet.unreconciled |= nodes
            raise
        finally:
            self._reconciling = set()

    async def probe(self) -> None:
        """Return when the store took a write; raises StoreError."""
        await self._store.probe()

    async def keep_snapshot(self) -> None:
        """Store the state whole: the next start has nothing to replay. Raises StoreError."""
        await self._store.keep(self.fleet.snapshot())

    # --- reading

    def is_settled(self, node: str) -> bool:
        """Whether what the node's reports change durably is on disk."""
        return node not in self.fleet.unreconciled and node not in self._reconciling

    def on_news(self, listener: Callable[[], None]) -> None:
        """Call `listener` after whatever is recorded or noted; it must be quick."""
        self._listeners.append(listener)

    async def until(
        self, allocation_id: str, is_done: Callable[[Allocation], bool]
    ) -> Allocation | None:
        """Return the allocation once `is_done` says so, or None when it is not known (any more)."""
        while True:
            allocation = self.fleet.allocations.get(allocation_id)
            if allocation is None or is_done(allocation):
                return allocation
            waiters = self._waiters.setdefault(allocation_id, set())
            change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiters.add(change)
            try:
                await change
            finally:
                waiters.discard(change)
                if not waiters and self._waiters.get(allocation_id) is waiters:
                    del self._waiters[allocation_id]

    async def watch(self, after: int) -> AsyncGenerator[Change]:
        """Yield every change that follows version `after`, in order, for ever.

        Raises WatchTooOld when those are no longer kept, WatchTooSlow when the reader was left
        behind, StoreError when they cannot be read.
        """
        if after > self.fleet.version:
            newest = self.fleet.version
            raise WatchTooOld(f"version {after} is not reached yet, the newest is {newest}")
        if not self._has_all_after(after):
            async with aclosing(self._history(after)) as history:
                async for change in history:
                    yield change
                    after = change.version
        while self._has_all_after(after):
            for change in self._newer_than(after):
                yield change
                after = change.version
            if after == self.fleet.version:
                await self._news.wait()
        raise WatchTooSlow(
            f"left behind by more than {RECENT_CHANGES_MAX} changes; "
            f"go on with a watch from version {after}"
        )

    # --- helpers

    def _take(
        self,
        events: Sequence[e.DurableEvent],
        applied: "asyncio.Future[None]",
        stored: "asyncio.Future[range]",
    ) -> None:
        """Apply what was stored. Callbacks of futures run in the order in which these resolved."""
        error = stored.exception()
        if error is not None:
            self._meters.store_failures.inc()
            applied.set_exception(error)
            applied.exception()  # has been looked at: a caller that was cancelled will not do it
            return
        try:
            for event, id_ in zip(events, stored.result(), strict=True):
                self._apply(event, id_)
                if isinstance(event, e.AllocationGranted):
                    self._meters.wait_seconds.observe(event.at - event.requested_at)
        except InvalidTransition as bug:
            applied.set_exception(bug)  # ends the daemon, with the whole story
            return
        applied.set_result(None)
        self._news.set()
        self._news.clear()
        for listener in self._listeners:
            listener()
        self._snapshot_when_due()

    def _apply(self, event: e.DurableEvent, version: int) -> None:
        self.fleet.apply(event, version)
        change = Change(version, event, _after(self.fleet, event))
        self._recent.append(change)
        if isinstance(change.after, Allocation):
            for waiter in self._waiters.pop(change.after.id, ()):
                if not waiter.done():  # its reader may have been cancelled just now
                    waiter.set_result(None)

    def _snapshot_when_due(self) -> None:
        fleet = self.fleet
        due = max(SNAPSHOT_EVERY_EVENTS, self._snapshot_rows)
        if self._is_keeping or fleet.version - self._snapshot_version < due:
            return
        self._is_keeping = True
        self._snapshot_version = fleet.version
        self._snapshot_rows = _rows(fleet)
        self._store.keep(fleet.snapshot()).add_done_callback(self._kept)

    def _kept(self, kept: "asyncio.Future[range]") -> None:
        self._is_keeping = False
        error = kept.exception()
        if error is not None:
            # Nothing is lost by it: the events are there. The next one is tried in its turn.
            _log.warning("no snapshot: %s", error)

    def _has_all_after(self, version: int) -> bool:
        """Whether every change that follows `version` is in memory."""
        if version >= self.fleet.version:
            return True
        return bool(self._recent) and self._recent[0].version <= version + 1

    def _newer_than(self, version: int) -> list[Change]:
        newer = list(takewhile(lambda change: change.version > version, reversed(self._recent)))
        return newer[::-1]

    async def _history(self, after: int) -> AsyncGenerator[Change]:
        """Yield changes from the store until the rest is in memory."""
        try:
            fleet = Fleet.restored(await self._store.base(after))
            while not (fleet.version >= after and self._has_all_after(fleet.version)):
                for id_, event in await self._store.read(fleet.version, HISTORY_PER_READ):
                    if id_ > self.fleet.version:
                        return  # stored, not applied yet: memory will have it
                    fleet.apply(event, id_)
                    if id_ > after:
                        yield Change(id_, event, _after(fleet, event))
        except HistoryGone as error:
            raise WatchTooOld(f"version {after} is too old: {error}") from error


def _rows(fleet: Fleet) -> int:
    return len(fleet.allocations) + len(fleet.nodes) + len(fleet.conditions.table)


def _after(fleet: Fleet, event: e.DurableEvent) -> Allocation | Node | None:
    match event:
        case e.NodeRegistered(_, facts):
            return fleet.nodes[facts.name]
        case (
            e.NodeCordoned()
            | e.NodeUncordoned()
            | e.GpuHealthChanged()
            | e.GpuForgotten()
            | e.GpuCordoned()
            | e.GpuUncordoned()
        ):
            return fleet.nodes[event.node]
        case (
            e.AllocationRequested()
            | e.AllocationGranted()
            | e.AllocationAdopted()
            | e.AllocationReleasing()
            | e.AllocationEnded()
        ):
            return fleet.allocations[event.id]
        case e.AllocationsForgotten():
            return None
        case _:
            assert_never(event)
