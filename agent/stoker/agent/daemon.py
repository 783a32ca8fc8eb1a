"""The running agent: loops that wait, tell the state what happened, and do what it asks for.

Every task lives in one group. Sampling and reading processes ask the driver host; the journal has a
thread; looking into /proc has another for each reading, because a process that hangs in the kernel
can hold up whoever looks at it. The link dials the aggregator.

Stopping begins with the driver host, so that the devices are free when the agent is gone.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar, assert_never

from stoker.agent import sampling
from stoker.agent.actions import (
    Action,
    ReadInventory,
    ReadProcesses,
    SaveJournal,
    SendFrame,
    SendHello,
)
from stoker.agent.config import Settings
from stoker.agent.driver import DriverError, DriverTimeout
from stoker.agent.driver_link import (
    DriverHost,
    Failed,
    HostState,
    Released,
    Running,
    Starting,
    Stopping,
    Unreaped,
)
from stoker.agent.events import (
    CommandReceived,
    DriverChanged,
    Event,
    InventoryRead,
    JournalFailed,
    JournalSaved,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
    SampleTaken,
    SamplingFailed,
    Started,
)
from stoker.agent.exporter import Durations, Snapshot
from stoker.agent.journal import Journal
from stoker.agent.link import Link
from stoker.agent.model import DriverState, DriverStatus, Drop, Hold, NodeIdentity, ProcessSeen
from stoker.agent.proctable import ProcessFacts, ProcTable
from stoker.agent.readings import GpuReading, Inventory, ProcessReading
from stoker.agent.state import NodeState
from stoker.core.clock import Clock
from stoker.core.errors import ExitCode, Missing, StoreError
from stoker.core.sdnotify import Notifier

# How long the link waits at the start for the driver's first word: a library that is missing is
# found out at once, and then no aggregator need hear of this node.
FIRST_WORD_SECONDS = 3.0
# How long looking up the processes on the GPUs may take.
LOOK_UP_SECONDS = 5.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Agent:
    """One agent. `run` returns when `stop` was called."""

    def __init__(
        self,
        settings: Settings,
        identity: NodeIdentity,
        *,
        journal: Journal,
        host: DriverHost,
        proctable: ProcTable,
        notifier: Notifier,
        clock: Clock,
        rng: Random,
    ) -> None:
        """Take the parts, opened but not started."""
        self._settings = settings
        self._clock = clock
        self._host = host
        self._journal = journal
        self._proctable = proctable
        self._notifier = notifier
        self._state = NodeState.restore(journal.records, identity)
        self._view = self._state.view()
        self._link = Link(
            [str(each) for each in settings.aggregators], self.happen, clock=clock, rng=rng
        )
        # What the state may want at once is bounded by what it may hold (`holding.HELD_MAX`).
        self._saves: asyncio.Queue[SaveJournal] = asyncio.Queue()
        self._journal_thread = concurrent.futures.ThreadPoolExecutor(
            1, thread_name_prefix="journal"
        )
        self._stopping = asyncio.Event()
        self._processes_wanted = asyncio.Event()
        self._inventory_wanted = False
        self._inventory: Inventory | None = None
        self._readings: dict[str, GpuReading] = {}
        self._driver_error: DriverError | None = None
        self._durations = Durations()
        self._looking: asyncio.Future[tuple[ProcessSeen, ...]] | None = None

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()

    def snapshot(self) -> Snapshot:
        """Return what the exporter shows; from any thread."""
        return Snapshot(
            view=self._view,
            monotonic_seconds=self._clock.monotonic(),
            host=self._host.counters,
            sample_durations=self._durations,
            processes_interval_seconds=self._settings.processes_interval_seconds,
        )

    def happen(self, event: Event) -> None:
        """Tell the state, and begin what it asks for."""
        actions = self._state.handle(event, self._clock.monotonic())
        self._view = self._state.view()
        _log_event(event)
        for action in actions:
            self._do(action)

    async def run(self) -> None:
        """Run until stopped.

        Raises StoreError when the journal cannot be written at the start, and Missing when there
        is no driver.
        """
        await self._begin()
        missing: Missing | None = None
        async with asyncio.TaskGroup() as tasks:
            driver = tasks.create_task(self._host.run(), name="driver host")
            loops: list[asyncio.Task[None]] = []
            try:
                missing = await self._await_driver()
                if missing is None:
                    loops += [
                        tasks.create_task(self._sample_forever(), name="sampling"),
                        tasks.create_task(self._read_processes_forever(), name="processes"),
                        tasks.create_task(self._save_forever(), name="journal"),
                        tasks.create_task(self._link.run(), name="link"),
                    ]
                    await self._stopping.wait()
            finally:
                self._tell(STOPPING="1")
                driver.cancel()
                await asyncio.wait([driver])
                for each in loops:
                    each.cancel()
        self._journal_thread.shutdown()
        if missing is not None:
            raise missing

    async def _begin(self) -> None:
        """Have the first record on disk before anything is said to anybody."""
        self.happen(Started(self._clock.now()))
        await self._save([self._saves.get_nowait()])

    async def _await_driver(self) -> Missing | None:
        """Return what this machine lacks, once the driver has said so; None to go on."""
        ready = asyncio.create_task(self._host.ready())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                [ready, stopping],
                timeout=FIRST_WORD_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if ready.done():
                _log.info("the driver answers: %d GPUs", len(ready.result().gpus))
                self._learn(ready.result())  # so that the first hello tells it
            elif not stopping.done():
                _log.warning("the driver has not answered within %g s", FIRST_WORD_SECONDS)
        except DriverError as error:
            if error.exit_code is ExitCode.MISSING:
                return Missing(str(error))
            _log.warning("the driver cannot be read: %s", error)
        finally:
            ready.cancel()
            stopping.cancel()
        return None

    def _do(self, action: Action) -> None:
        match action:
            case SendHello(hello):
                self._link.send_hello(hello)
            case SendFrame(frame):
                self._link.send_frame(frame)
            case SaveJournal():
                self._saves.put_nowait(action)
            case ReadProcesses():
                self._processes_wanted.set()
            case ReadInventory():
                self._inventory_wanted = True
            case _:
                assert_never(action)

    # --- the journal

    async def _save_forever(self) -> None:
        while True:
            saves = [await self._saves.get()]
            while not self._saves.empty():  # what came meanwhile shares one fsync
                saves.append(self._saves.get_nowait())
            try:
                await self._save(saves)
            except StoreError as error:
                _log.error("%s", error)
                now = self._clock.now()
                for each in saves:
                    self.happen(JournalFailed(now, each.ticket, str(error)))

    async def _save(self, saves: list[SaveJournal]) -> None:
        batches = [each.records for each in saves]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._journal_thread, self._journal.append, batches)
        now = self._clock.now()
        for each in saves:
            self.happen(JournalSaved(now, each.ticket))

    # --- sampling

    async def _sample_forever(self) -> None:
        due = self._clock.monotonic()
        while True:
            await self._sample()
            due = next_tick(due, self._clock.monotonic(), self._settings.interval_seconds)
            await self._clock.sleep(due - self._clock.monotonic())

    async def _sample(self) -> None:
        began = self._clock.monotonic()
        try:
            readings = await self._host.sample()
            await self._note_inventory()
        except DriverError as error:
            self._fail(error)
            return
        self._durations = self._durations.with_one(self._clock.monotonic() - began)
        self._driver_error = None
        self._note_driver()
        samples = tuple(sampling.sample(self._readings.get(each.uuid), each) for each in readings)
        self._readings = {each.uuid: each for each in readings}
        before = self._view.samples_total
        self.happen(SampleTaken(self._clock.now(), samples))
        if self._view.samples_total > before:
            self._tell_well(is_first=before == 0)

    def _fail(self, error: DriverError) -> None:
        last, self._driver_error = self._driver_error, error
        if last is None or last.kind != error.kind:
            _log.warning("sampling failed: %s", error)
        self._note_driver()
        self.happen(SamplingFailed(self._clock.now(), error.kind, str(error)))

    async def _note_inventory(self) -> None:
        """Tell the state which GPUs there are, when the driver host has learnt it anew."""
        if self._inventory_wanted:
            self._inventory_wanted = False
            inventory = await self._host.inventory()
        elif isinstance(self._host.state, Running):
            inventory = await self._host.ready()
        else:
            return
        self._learn(inventory)

    def _learn(self, inventory: Inventory) -> None:
        if inventory is not self._inventory:
            self._inventory = inventory
            for fault in inventory.missing:
                _log.warning("GPU %d cannot be read: %s", fault.index, fault.message)
            self.happen(InventoryRead(self._clock.now(), inventory))

    def _note_driver(self) -> None:
        restarts = self._host.counters.restarts_total
        status = describe_driver(self._host.state, self._driver_error, restarts)
        if status != self._view.driver:
            self.happen(DriverChanged(self._clock.now(), status))

    # --- processes

    async def _read_processes_forever(self) -> None:
        while True:
            self._processes_wanted.clear()
            await self._read_processes()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.processes_interval_seconds):
                    await self._processes_wanted.wait()

    async def _read_processes(self) -> None:
        self.happen(ProcessReadingBegun(self._clock.now()))
        try:
            reading = await self._host.processes()
            async with asyncio.timeout(LOOK_UP_SECONDS):
                seen = await self._look_up(reading.processes)
        except DriverError as error:
            self.happen(ProcessReadingFailed(self._clock.now(), str(error)))
        except TimeoutError:
            reason = f"/proc has not told about the processes within {LOOK_UP_SECONDS:g} s"
            _log.warning("%s", reason)
            self.happen(ProcessReadingFailed(self._clock.now(), reason))
        else:
            faults = reading.failed_gpus
            self.happen(
                ProcessesTaken(
                    at=self._clock.now(),
                    started_at=reading.started_at,
                    processes=seen,
                    unread_gpu_uuids=tuple(each.uuid for each in faults if each.uuid is not None),
                    has_unnamed_unread=any(each.uuid is None for each in faults),
                )
            )

    async def _look_up(self, processes: Sequence[ProcessReading]) -> tuple[ProcessSeen, ...]:
        """Ask /proc about the processes; at most one such look is under way."""
        if self._looking is None or self._looking.done():
            describe = self._proctable.describe
            self._looking = in_thread(
                lambda: tuple(see(each, describe(each)) for each in processes)
            )
            return await asyncio.shield(self._looking)
        await asyncio.wait([self._looking])  # of an earlier reading: it tells about then
        return await self._look_up(processes)

    # --- the service manager

    def _tell_well(self, *, is_first: bool) -> None:
        view = self._view
        gpus = 0 if view.inventory is None else len(view.inventory.gpus)
        link = "connected" if view.connected else "not connected"
        status = f"{gpus} GPUs, {len(view.held)} allocations held, aggregator {link}"
        self._tell(**({"READY": "1"} if is_first else {}), WATCHDOG="1", STATUS=status)

    def _tell(self, **state: str) -> None:
        try:
            self._notifier.tell(**state)
        except OSError as error:
            _log.warning("the service manager cannot be told %s: %s", state, error)


def next_tick(due: float, now: float, interval: float) -> float:
    """Return when the next tick is due after the one at `due`; missed ones are not made up for."""
    missed = max(0, math.floor((now - due) / interval))
    return due + (missed + 1) * interval


def describe_driver(state: HostState, error: DriverError | None, restarts: int) -> DriverStatus:
    """Return what is told about the driver; `error`: why the last sampling tick failed, if so."""
    match state:
        case Running():
            return DriverStatus(DriverState.READING, "", restarts)
        case Failed(error=cause):
            return DriverStatus(_failing(cause), str(cause), restarts)
        case Starting() | Stopping():
            if error is None:
                return DriverStatus(DriverState.STARTING, "", restarts)
            return DriverStatus(_failing(error), str(error), restarts)
        case Unreaped(pid=pid):
            reason = f"driver host {pid} was killed, and the kernel does not let go of it"
            return DriverStatus(DriverState.BLOCKED, reason, restarts)
        case Released():
            return DriverStatus(DriverState.FAILED, "released on request", restarts)
        case _:
            assert_never(state)


def _failing(error: DriverError) -> DriverState:
    return DriverState.BLOCKED if isinstance(error, DriverTimeout) else DriverState.FAILED


def see(process: ProcessReading, facts: ProcessFacts) -> ProcessSeen:
    """Return what the driver and /proc together tell about a process."""
    return ProcessSeen(
        gpu_uuid=process.uuid,
        pid=process.pid,
        user=facts.user or "",
        command=facts.command,
        memory_used_bytes=process.memory_used_bytes,
        started_at=facts.started_at,
        claimed_allocation_id=facts.allocation_id,
    )


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run a function that may never return in a thread that keeps nothing from ending."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function())
        except Exception as error:  # noqa: BLE001 (it is raised where the future is awaited)
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="proc reader").start()
    return asyncio.wrap_future(result)


def _log_event(event: Event) -> None:
    match event:
        case CommandReceived(_, _, Hold(allocation)):
            _log.info("told to hold %s for %r", allocation.id, allocation.holder)
        case CommandReceived(_, _, Drop(allocation_id, reason)):
            _log.info("told to let go of %s: %s", allocation_id, reason)
        case DriverChanged(_, status):
            level = logging.INFO if status.state is DriverState.READING else logging.WARNING
            _log.log(
                level, "driver: %s%s", status.state, f": {status.reason}" * bool(status.reason)
            )
        case _:
            pass
