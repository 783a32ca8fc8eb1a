"""The running agent: loops that wait, tell the state what happened, and do what it asks for.

Every task lives in one group. `sampler` and `tenants` ask the driver host; the journal has a
thread; the link dials the aggregator; `desk` answers the people of this machine.

Stopping begins with the driver host, so that the devices are free when the agent is gone.
"""

import asyncio
import concurrent.futures
import logging
import os
from random import Random
from typing import assert_never

from stoker.agent.actions import (
    Action,
    ReadInventory,
    ReadProcesses,
    ReleaseDriver,
    ResumeDriver,
    SaveJournal,
    SendFrame,
    SendHello,
)
from stoker.agent.attribution.resolver import Attribution
from stoker.agent.config import Settings
from stoker.agent.desk import LocalDesk
from stoker.agent.driver import DriverError, HostUnavailable
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Unreaped
from stoker.agent.events import (
    CommandReceived,
    DriverChanged,
    Event,
    FaultsForgiven,
    JournalFailed,
    JournalSaved,
    KernelLogChanged,
    ReleaseAsked,
    ResumeAsked,
    Started,
)
from stoker.agent.journal import Journal
from stoker.agent.kernel_log import KernelLogFollower
from stoker.agent.link import Link
from stoker.agent.local import LocalDoor
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.mig.journal import MigJournal
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.looking import UserLook
from stoker.agent.mig.operations import Book
from stoker.agent.mig.stepping import Stepper
from stoker.agent.mig.worker import MigWorker
from stoker.agent.model import DriverState, Drop, Hold, NodeIdentity
from stoker.agent.owners import DeviceHolder
from stoker.agent.privileged import Helper
from stoker.agent.proctable import ProcTable
from stoker.agent.sampler import Sampler, host_pid
from stoker.agent.state import NodeState
from stoker.agent.telemetry import Telemetry
from stoker.agent.tenants import HolderReader, TenantReader
from stoker.agent.verdicts import KernelLogStatus
from stoker.core.clock import Clock
from stoker.core.errors import ExitCode, Missing, StokerError, StoreError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.core.sdnotify import Notifier

_log = logging.getLogger(__name__)


class Agent:
    """One agent. `run` returns when `stop` was called."""

    def __init__(
        self,
        settings: Settings,
        identity: NodeIdentity,
        *,
        journal: Journal,
        mig_journal: MigJournal,
        stepper: Stepper,
        host: DriverHost,
        door: LocalDoor,
        user: str,
        proctable: ProcTable,
        helper: Helper,
        attribution: Attribution | None,
        notifier: Notifier,
        clock: Clock,
        rng: Random,
    ) -> None:
        """Take the parts, opened but not started, and the name of the user who runs this.

        `attribution`: whose processes are, beyond their users; None: nobody looks. Raises
        StoreError when what was noted about partitions cannot be read.
        """
        self._settings = settings
        self._clock = clock
        self._host = host
        self._journal = journal
        self._mig_journal = mig_journal
        self._door = door
        self._notifier = notifier
        telemetry = Telemetry(
            slow_seconds=settings.slow_interval_seconds,
            window_seconds=settings.metrics.window_seconds,
        )
        book = mig_journal.load()
        self._state = NodeState(
            journal.records,
            identity,
            telemetry,
            settings.policy,
            awaits_mig=bool(book.gpus) or not settings.mig.is_empty,
        )
        self._view = self._state.view()
        aggregators = [str(each) for each in settings.aggregators]
        self._link = Link(aggregators, self.happen, ask_mig=self._ask_mig, clock=clock, rng=rng)
        self._sampler = Sampler(
            host,
            interval_seconds=settings.interval_seconds,
            slow_interval_seconds=settings.slow_interval_seconds,
            view=lambda: self._view,
            happen=self.happen,
            tell=self._tell,
            clock=clock,
        )
        self._tenants = TenantReader(
            host,
            proctable,
            settings.processes_interval_seconds,
            view=lambda: self._view,
            happen=self.happen,
            clock=clock,
            attribution=attribution,
        )
        self._kernel_log = KernelLogFollower(
            helper,
            identity.boot_id,
            position=lambda: self._view.kernel_log_position,
            happen=self.happen,
            clock=clock,
            script=settings.kernel_log,
        )
        # What the state may want at once is bounded by what it may hold (`holding.HELD_MAX`).
        self._saves: asyncio.Queue[SaveJournal] = asyncio.Queue()
        self._journal_thread = concurrent.futures.ThreadPoolExecutor(
            1, thread_name_prefix="journal"
        )
        self._stopping = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._releasing: asyncio.Task[DriverError | None] | None = None
        self._holders = HolderReader(helper, proctable)
        self._mig = MigWorker(
            Keeper(identity.process_id),
            book,
            settings.mig,
            stepper=stepper,
            host=host,
            users=UserLook(
                proctable,
                own_pids=lambda: (os.getpid(), host_pid(host.state)),
                view=lambda: self._view,
                saved=self._saves.join,
                holders=self._others_with_files,
                want_processes=self._tenants.want,
            ),
            view=lambda: self._view,
            happen=self.happen,
            save=self._save_book,
            want_inventory=self._sampler.want_inventory,
            clock=clock,
        )
        self._desk = LocalDesk(
            host,
            self._sampler,
            aggregators=aggregators,
            user=user,
            view=lambda: self._view,
            happen=self.happen,
            let_go=self._let_go,
            saved=self._saves.join,
            holders=self._holders.read,
            ask_mig=self._ask_mig,
            clock=clock,
        )

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()

    def snapshot(self) -> Snapshot:
        """Return what the exporter shows; from any thread."""
        state, now = self._host.state, self._clock.monotonic()
        held_since = state.since if isinstance(state, Unreaped) else None
        return Snapshot(
            view=self._view,
            monotonic_seconds=now,
            host=self._host.counters,
            sample_durations=self._sampler.durations,
            processes_interval_seconds=self._settings.processes_interval_seconds,
            collectors={**self._sampler.statuses, "processes": self._tenants.status},
            host_pid=host_pid(state),
            host_unreaped_since=held_since and now - (self._clock.now() - held_since),
        )

    def happen(self, event: Event) -> None:
        """Tell the state, and begin what it asks for."""
        actions = self._state.handle(event, self._clock.monotonic())
        self._view = self._state.view()
        self._mig.notice(event)
        _log_event(event)
        for action in actions:
            self._do(action)

    async def run(self) -> None:
        """Run until stopped.

        Raises StoreError when the journal cannot be written at the start, and Missing when there
        is no driver.
        """
        failure: StokerError | None = None
        async with self._tasks as tasks:
            driver: asyncio.Task[None] | None = None
            loops: list[asyncio.Task[None]] = []
            try:
                await self._begin()
                driver = tasks.create_task(self._host.run(), name="driver host")
                loops += [
                    tasks.create_task(self._save_forever(), name="journal"),
                    tasks.create_task(
                        self._door.serve(self._desk.answer, clock=self._clock), name="local door"
                    ),
                ]
                failure = await self._await_driver()
                if failure is None:
                    loops += [
                        tasks.create_task(self._sampler.run(), name="sampling"),
                        tasks.create_task(self._tenants.run(), name="processes"),
                        tasks.create_task(self._follow_kernel_log(), name="kernel log"),
                        tasks.create_task(self._mig.run(), name="partitions"),
                        tasks.create_task(self._link.run(), name="link"),
                    ]
                    await self._stopping.wait()
            except StoreError as error:
                failure = error
            finally:
                self._tell(STOPPING="1")
                if driver is not None:
                    driver.cancel()
                    await asyncio.wait([driver])
                for each in (*loops, self._releasing):
                    if each is not None:
                        each.cancel()
        self._journal_thread.shutdown()
        if failure is not None:
            raise failure

    async def _begin(self) -> None:
        """Have the first record on disk before anything is said to anybody."""
        self.happen(Started(self._clock.now()))
        await self._save([self._saves.get_nowait()])
        self._saves.task_done()

    async def _await_driver(self) -> Missing | None:
        """Return what this machine lacks, once the driver has said so; None to go on."""
        if self._view.release is not None:
            self._sampler.note_driver()
            return None
        first_word = asyncio.create_task(self._sampler.first_word())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([first_word, stopping], return_when=asyncio.FIRST_COMPLETED)
            error = first_word.result() if first_word.done() else None
        finally:
            first_word.cancel()
            stopping.cancel()
        is_missing = error is not None and error.exit_code is ExitCode.MISSING
        return Missing(str(error)) if is_missing else None

    def _do(self, action: Action) -> None:
        match action:
            case SendHello(hello):
                self._link.send_hello(hello)
            case SendFrame(frame):
                self._link.send_frame(frame)
            case SaveJournal():
                self._saves.put_nowait(action)
            case ReadProcesses():
                self._tenants.want()
            case ReadInventory():
                self._sampler.want_inventory()
            case ReleaseDriver():
                # Its first step marks the host as not wanted: at the start, before that one runs.
                self._releasing = self._tasks.create_task(self._release(), name="release")
            case ResumeDriver():
                if not self._mig.has_let_go:  # else it takes it, when the mode is changed
                    self._host.resume()
            case _:
                assert_never(action)

    # --- the driver

    async def _release(self) -> DriverError | None:
        """Release the driver; the error as a value, for whoever asked and may be gone meanwhile."""
        if self._view.release is None:  # resumed before this task had its first turn
            return HostUnavailable("it was resumed before it had let go")
        try:
            await self._host.release()
        except DriverError as error:
            _log.warning("the driver is not released yet: %s", error)
            return error
        finally:
            self._sampler.note_driver()
        return None

    async def _let_go(self) -> DriverError | None:
        """Wait until the driver is released; return why it is not."""
        assert self._releasing is not None, "nobody asked for it"
        return await asyncio.shield(self._releasing)

    async def _follow_kernel_log(self) -> None:
        if self._settings.simulate and self._settings.kernel_log is None:
            status = KernelLogStatus(reason="the GPUs are simulated, and kernel_log is not given")
            self.happen(KernelLogChanged(self._clock.now(), status))
        else:
            await self._kernel_log.run()

    # --- partitions

    async def _ask_mig(self, ask: MigAsk) -> MigReport:
        return await self._mig.answer(ask)

    async def _save_book(self, book: Book) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._journal_thread, self._mig_journal.save, book)

    async def _others_with_files(self) -> tuple[DeviceHolder, ...]:
        """Return who has device files open; of simulated GPUs there are none."""
        return () if self._settings.simulate else await self._holders.read()

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
            for _ in saves:
                self._saves.task_done()

    async def _save(self, saves: list[SaveJournal]) -> None:
        batches = [each.records for each in saves]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._journal_thread, self._journal.append, batches)
        now = self._clock.now()
        for each in saves:
            self.happen(JournalSaved(now, each.ticket))

    # --- the service manager

    def _tell(self, **state: str) -> None:
        try:
            self._notifier.tell(**state)
        except OSError as error:
            _log.warning("the service manager cannot be told %s: %s", state, error)


def _log_event(event: Event) -> None:
    match event:
        case CommandReceived(_, _, Hold(allocation)):
            _log.info("told to hold %s for %r", allocation.id, allocation.holder)
        case CommandReceived(_, _, Drop(allocation_id, reason)):
            _log.info("told to let go of %s: %s", allocation_id, reason)
        case ReleaseAsked(_, until, by):
            _log.warning("told by %s to let go of the driver%s", by, " for a while" * bool(until))
        case ResumeAsked(_, by):
            _log.info("told by %s to take the driver again", by)
        case FaultsForgiven(_, uuid, by):
            _log.warning("told by %s that %s is well: its faults are forgotten", by, uuid)
        case DriverChanged(_, status):
            level = logging.INFO if status.state is DriverState.READING else logging.WARNING
            _log.log(
                level, "driver: %s%s", status.state, f": {status.reason}" * bool(status.reason)
            )
        case _:
            pass
