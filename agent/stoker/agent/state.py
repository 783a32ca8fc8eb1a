"""The node's state and its one door: an event in, the actions it calls for out.

What is durable (`Durable`: the held allocations, numbers) changes only when the journal has said
that the record is on disk; only then is it reported. The rest is forgotten with the process.

    Hold       refused, or journaled -> held, reported at once
    Drop       ending -> processes read since -> journaled -> gone, reported with that reading
               not held -> processes read since -> reported with that reading
    Release    begun at once, and journaled: it lasts over restarts; nothing is read meanwhile, so
               what is ending waits for the reading after `Resume`

The aggregator takes an allocation for gone when it told the node on this stream to let go, that is
done, and the node does not list it. So a hello, and the frames that follow it, list everything that
might still be there, what is being journaled too; and the frame that stops listing it carries the
processes that were found on the GPUs afterwards, also for an allocation that was never held:
whoever was promised it may have used its GPUs.

The state is deterministic: no clock, no chance, no I/O. Two states that were given the same events
at the same times returned the same actions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import assert_never

from stoker.agent import actions as a
from stoker.agent import events as e
from stoker.agent import records as r
from stoker.agent.actions import Action
from stoker.agent.framing import LinkStatus, Part, Report, Reporter
from stoker.agent.health.judge import Judge
from stoker.agent.health.policy import Policy
from stoker.agent.holding import find_obstacle, mark_leaving, table_of, verify_left
from stoker.agent.model import (
    DriverState,
    DriverStatus,
    Drop,
    HeldAllocation,
    Hello,
    Hold,
    NodeIdentity,
    NodeView,
    NumberedInventory,
    NumberedSample,
    ProcessTable,
    Release,
)
from stoker.agent.numbering import is_outdated, number_gpus, number_samples
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.picture import Picture
from stoker.agent.readings import GpuReading, Inventory
from stoker.agent.records import Durable, HealthRecord, Record
from stoker.agent.saving import Saving, reserved_until
from stoker.agent.telemetry import Telemetry
from stoker.agent.wellbeing import Wellbeing

# How often processes are told though they are the same.
PROCESSES_RESEND_SECONDS = 30.0
# Holds that wait for the driver to tell which GPUs there are; more are refused.
WAITING_MAX = 1024


class NodeState:
    """The state of one node. Only `handle` changes it; `view` shows it."""

    def __init__(
        self,
        records: Iterable[Record],
        identity: NodeIdentity,
        telemetry: Telemetry | None = None,
        policy: Policy | None = None,
        *,
        awaits_mig: bool = False,
    ) -> None:
        """Take what the journal has kept; `awaits_mig`: nothing is held before MIG is told of."""
        durable = Durable().after(records)
        self._identity = identity
        self._durable = durable
        self._incarnation = durable.incarnation or identity.process_id
        self._now = 0.0  # monotonic; when the event under way happened
        self._saving = Saving()

        self._reporter = Reporter(next_sequence=durable.reserved_below)

        self._inventory: NumberedInventory | None = None
        self._driver = DriverStatus(DriverState.STARTING)
        self._release = durable.release
        self._release_failure = ""
        self._picture = Picture(telemetry or Telemetry())
        self._health = Wellbeing(Judge(policy or Policy(), identity.boot_id, durable.history))
        self._mig: tuple[GpuMigStatus, ...] | None = None if awaits_mig else ()

        self._waiting: dict[str, HeldAllocation] = {}  # holds that came before the inventory
        self._ending: set[str] = set()  # to let go of, by id
        self._absent: set[str] = set()  # to let go of and not held: counts once processes were read
        # To let go of while it was being journaled, which failed: told as held until they were.
        self._failed: dict[str, HeldAllocation] = {}
        # Being journaled since before this stream: told as held, as its hello did.
        self._carried: set[str] = set()
        # Of the three kinds to let go of, those that the reading under way is late enough for.
        self._covered: frozenset[str] = frozenset()
        self._processes: ProcessTable | None = None
        self._processes_monotonic: float | None = None

    def handle(self, event: e.Event, monotonic: float) -> tuple[Action, ...]:
        """Take in what happened and return what is to be done about it, in order.

        `monotonic` is the time of the event in seconds on a clock that never goes back.
        """
        self._now = monotonic
        return tuple(self._handle(event))

    def view(self) -> NodeView:
        """Return what there is to see now."""
        return NodeView(
            identity=self._identity,
            incarnation=self._incarnation,
            inventory=self._inventory,
            samples=self._picture.samples,
            telemetry=self._picture.gpus,
            xids=self._picture.telemetry.xids,
            read_failures=self._picture.telemetry.failures,
            processes=self._processes,
            processes_monotonic_seconds=self._processes_monotonic,
            held=self._held,
            ending=frozenset(self._ending),
            driver=self._driver,
            connected=self._reporter.link is LinkStatus.WELCOMED,
            outbox_frames=self._reporter.outbox_frames,
            frames_dropped=self._reporter.frames_dropped,
            samples_total=self._picture.ticks,
            sample_failures=self._picture.failures,
            last_success_at=self._picture.last_success_at,
            last_success_monotonic_seconds=self._picture.last_success,
            unread=self._picture.unread,
            release=self._release,
            release_unsaved=self._release_failure if self._release != self._durable.release else "",
            health=self._health.gpus,
            health_unsaved=self._health.unsaved,
            kernel_log=self._health.kernel_log,
            kernel_log_position=self._durable.history.kernel_log,
            memory_unattributed_bytes=self._health.memory_unattributed_bytes,
            mig=self._mig or (),
        )

    def _handle(self, event: e.Event) -> Iterator[Action]:
        match event:
            case e.Started(at):
                yield from self._start(at)
            case e.InventoryRead(at, inventory):
                yield from self._take_inventory(at, inventory)
            case e.SampleTaken(at, readings):
                yield from self._take_readings(at, readings)
            case e.SamplingFailed(at, kind, reason):
                self._picture.fail(kind)
                self._health.take_silence(at, self._now, reason)
                yield from self._flush(at)
            case e.ProcessReadingBegun():
                self._covered = frozenset({*self._ending, *self._absent, *self._failed})
                self._health.begin_processes(self._picture.samples)
            case e.ProcessesTaken(at) if self._release is not None:
                yield from self._lose_processes(at)  # taken while the driver was being let go of
            case e.ProcessesTaken():
                yield from self._take_processes(event)
            case e.ProcessReadingFailed(at):
                yield from self._lose_processes(at)
            case e.KernelLogRead(at, lines):
                self._health.take_kernel_log(at, lines)
                yield from self._flush(at)
            case e.KernelLogChanged(_, status):
                self._health.kernel_log = status
            case e.FaultsForgiven(at, uuid, _):
                yield from self._forgive(at, uuid)
            case e.DriverChanged(at, status):
                yield from self._change_driver(at, status)
            case e.ReleaseAsked(at, until, by):
                yield from self._release_driver(at, Release(at, until, by))
            case e.ResumeAsked():
                yield from self._resume_driver()
            case e.ReleaseTimePassed(at):
                if self._release is not None and self._release.is_over(at):
                    yield from self._resume_driver()
                elif self._release is not None:
                    self._health.take_release(at, self._now, self._release)
                    yield from self._flush(at)
            case e.MigChanged(at, gpus):
                yield from self._take_mig(at, gpus)
            case e.CommandReceived():
                yield from self._obey(event)
            case e.LinkUp():
                yield from self._greet()
            case e.Welcomed(at, acked_sequence):
                self._reporter.resume(acked_sequence)
                yield from self._flush(at)
            case e.LinkDown():
                self._reporter.hang_up()
                self._waiting.clear()  # the aggregator says again what it still wants
                self._absent.clear()
                self._carried = set(self._claims()) - set(self._durable.held)
            case e.FrameAcked(_, sequence):
                self._reporter.acknowledge(sequence)
                yield from self._send_due()
            case e.JournalSaved(at, ticket):
                yield from self._keep(at, self._saving.end(ticket))
            case e.JournalFailed(at, ticket, reason):
                yield from self._do_without(at, self._saving.end(ticket), reason)
            case _:
                assert_never(event)

    # --- the journal

    @property
    def _held(self) -> tuple[HeldAllocation, ...]:
        return tuple(self._durable.held.values())

    def _start(self, at: float) -> Iterator[Action]:
        records: list[Record] = []
        if self._release is not None and self._release.is_over(at):
            self._release = None
            records.append(r.DriverResumed())
        elif self._release is not None:
            yield a.ReleaseDriver()
        if not self._durable.incarnation:
            records.append(r.IncarnationBegun(self._incarnation))
        records.append(r.SequencesReserved(reserved_until(self._reporter.next_sequence)))
        yield self._saving.begin(*records)

    def _keep(self, at: float, records: tuple[Record, ...]) -> Iterator[Action]:
        before, self._durable = self._durable, self._durable.after(records)
        for record in records:
            if isinstance(record, HealthRecord):
                self._health.unsaved = ""
                continue
            match record:
                case r.AllocationHeld(allocation):
                    self._carried.discard(allocation.id)
                    self._reporter.settle(allocation.id)
                    self._reporter.owe(Part.HELD)
                    if allocation.id in self._ending:  # dropped while it was being journaled
                        yield a.ReadProcesses()
                case r.AllocationDropped(allocation_id):
                    self._ending.discard(allocation_id)
                    self._reporter.part_with(before.held[allocation_id])
                case r.IncarnationBegun() | r.SequencesReserved() | r.GpuNumbered():
                    pass
                case r.DriverReleased() | r.DriverResumed():
                    pass
                case _:
                    assert_never(record)
        yield from self._flush(at)

    def _do_without(self, at: float, records: tuple[Record, ...], reason: str) -> Iterator[Action]:
        for record in records:
            if isinstance(record, HealthRecord):
                self._health.take_loss(record, reason)
                continue
            match record:
                case r.AllocationHeld(allocation):
                    self._carried.discard(allocation.id)
                    if allocation.id in self._ending:
                        self._ending.discard(allocation.id)
                        self._failed[allocation.id] = allocation
                        yield a.ReadProcesses()
                    why = f"the node cannot note it down: {reason}"
                    self._reporter.refuse(allocation.id, why)
                    self._reporter.owe(Part.HELD)
                case r.SequencesReserved():
                    # Numbering goes on without: should the process die now and use numbers again,
                    # the next welcome tells how far the aggregator has counted.
                    self._saving.put_off_reservation(self._now)
                case r.DriverReleased() | r.DriverResumed():
                    # It is done all the same, and whoever asked is told that a restart undoes it.
                    self._release_failure = reason
                case r.AllocationDropped() | r.GpuNumbered() | r.IncarnationBegun():
                    # It stays held and ending, and the next reading of processes tries again.
                    # A GPU's number holds while the process lives, and a hello tells it anew.
                    pass
                case _:
                    assert_never(record)
        yield from self._flush(at)

    # --- the cards

    def _take_inventory(self, at: float, inventory: Inventory) -> Iterator[Action]:
        numbered, new = number_gpus(inventory, self._durable, self._inventory, self._identity.host)
        numbered = self._health.complete(at, numbered)
        if new:
            yield self._saving.begin(*new)
        if numbered != self._inventory:
            before, self._inventory = self._inventory, numbered
            self._picture.telemetry.forget_slow()
            self._reporter.owe(Part.INVENTORY)
            yield from self._doubt_processes(numbered.uuids - (before.uuids if before else set()))
        yield from self._hold_waiting(at)
        yield from self._flush(at)

    def _take_mig(self, at: float, gpus: tuple[GpuMigStatus, ...]) -> Iterator[Action]:
        if gpus != self._mig:
            self._mig = gpus
            self._reporter.owe(Part.MIG)
        yield from self._hold_waiting(at)
        yield from self._flush(at)

    def _doubt_processes(self, doubted: set[str]) -> Iterator[Action]:
        """Of a GPU that came (back) the last process table knows nothing: say so, and look."""
        if self._processes is not None and doubted:
            unread = self._processes.unread_with(doubted)
            self._processes = replace(self._processes, unread_gpu_uuids=unread)
            self._reporter.owe(Part.PROCESSES)
            yield a.ReadProcesses()

    def _take_readings(self, at: float, readings: tuple[GpuReading, ...]) -> Iterator[Action]:
        if self._release is not None:
            return  # read just before the driver was let go of
        is_told = self._picture.take(at, self._now, readings)
        self._health.take_readings(at, self._now, readings, self._picture)
        if not is_told:
            yield from self._flush(at)
            return
        samples = number_samples(self._picture.samples, self._inventory)
        yield from self._report(at, samples)
        if is_outdated(self._inventory, readings):
            yield a.ReadInventory()

    def _change_driver(self, at: float, status: DriverStatus) -> Iterator[Action]:
        if status == self._driver:
            return
        before, self._driver = self._driver, status
        self._reporter.owe(Part.DRIVER)
        if status.state is not DriverState.READING:
            self._picture.forget()
            self._health.take_silence(at, self._now, status.reason or f"driver {status.state}")
            yield from self._lose_processes(at)
        elif before.state is not DriverState.READING:
            self._health.take_driver_opened(at)
            yield a.ReadProcesses()
        yield from self._flush(at)

    # --- letting go of the driver

    def _release_driver(self, at: float, release: Release) -> Iterator[Action]:
        self._release, self._release_failure = release, "it is being noted down"
        self._picture.forget()
        self._health.take_release(at, self._now, release)
        yield a.ReleaseDriver()
        yield self._saving.begin(r.DriverReleased(release))
        yield from self._lose_processes(at)

    def _resume_driver(self) -> Iterator[Action]:
        if self._release is None and self._durable.release is None:
            return
        self._release, self._release_failure = None, "it is being noted down"
        yield a.ResumeDriver()
        yield self._saving.begin(r.DriverResumed())

    def _forgive(self, at: float, uuid: str) -> Iterator[Action]:
        self._health.forgive(at, uuid)
        if self._inventory is not None:
            self._inventory = self._health.complete(at, self._inventory)
            self._reporter.owe(Part.INVENTORY)
        yield from self._flush(at)

    # --- processes, and letting go

    def _take_processes(self, event: e.ProcessesTaken) -> Iterator[Action]:
        readable = None if self._inventory is None else self._inventory.uuids
        asked = self._covered - self._saving.drops
        verified = verify_left(event, self._held, asked, readable)
        seen, self._covered = self._covered, frozenset()
        tenants = [each for each in self._held if each.id not in self._saving.drops | verified]
        table = table_of(event, tenants, self._inventory)
        is_due = self._now - self._reporter.processes_told_at >= PROCESSES_RESEND_SECONDS
        if is_due or not table.says_the_same_as(self._processes):
            self._reporter.owe(Part.PROCESSES)
        is_first = self._processes is None
        self._processes, self._processes_monotonic = table, self._now
        partitioned = self._inventory.partitioned if self._inventory else ()
        self._health.take_processes(event.processes, event.unread_gpu_uuids, partitioned)
        if verified:
            yield self._saving.begin(*(r.AllocationDropped(id_) for id_ in sorted(verified)))
        if is_first:  # nothing is granted here before the aggregator has seen it
            yield from self._flush(event.at)
        yield from self._confirm(event.at, seen)

    def _lose_processes(self, at: float) -> Iterator[Action]:
        """Say of every GPU that nobody knows who uses it: what the last table told is old now."""
        self._covered = frozenset()
        if self._processes is None or self._inventory is None:
            return
        self._processes_monotonic = None
        table = ProcessTable(at, (), self._processes.unread_with(self._inventory.uuids))
        if not table.says_the_same_as(self._processes):
            self._processes = table
            self._reporter.owe(Part.PROCESSES)
            yield from self._flush(at)

    def _confirm(self, at: float, seen: frozenset[str]) -> Iterator[Action]:
        """Say of what was not held, or not durably, that it is gone: processes were read."""
        gone = [id_ for id_ in seen if id_ in self._absent or id_ in self._failed]
        for id_ in gone:
            self._absent.discard(id_)
            self._failed.pop(id_, None)
            self._reporter.settle(id_)
            self._reporter.owe(Part.HELD, Part.PROCESSES)
        if gone:
            yield from self._flush(at)

    def _obey(self, event: e.CommandReceived) -> Iterator[Action]:
        match event.command:
            case Hold(allocation):
                self._reporter.receive(event.id, unsettled=allocation.id)
                yield from self._hold(event.at, allocation)
            case Drop(allocation_id):
                yield from self._drop(event.id, allocation_id)
            case _:
                assert_never(event.command)

    def _hold(self, at: float, wanted: HeldAllocation) -> Iterator[Action]:
        claims = self._claims()
        known = claims.get(wanted.id)
        self._absent.discard(wanted.id)
        if wanted.id in self._ending or wanted.id in self._failed:
            self._reporter.refuse(wanted.id, "the node is letting go of it")
        elif known is not None and not known.is_same_as(wanted):
            self._reporter.refuse(wanted.id, "the node holds it with other devices")
        elif known is not None and wanted.id not in self._durable.held:
            return  # it is being journaled, and reported then
        elif known is not None:
            self._reporter.settle(wanted.id)
            self._reporter.owe(Part.HELD)  # says it again
        elif self._inventory is None or self._mig is None:
            if len(self._waiting) < WAITING_MAX:
                self._waiting[wanted.id] = wanted
                return
            self._reporter.refuse(wanted.id, "too many wait for the driver to tell of its GPUs")
        else:
            obstacle = find_obstacle(wanted, claims.values(), self._inventory, self._mig)
            if obstacle is None:
                yield self._saving.begin(r.AllocationHeld(replace(wanted, held_since=at)))
                return
            self._reporter.refuse(wanted.id, obstacle)
        yield from self._flush(at)

    def _hold_waiting(self, at: float) -> Iterator[Action]:
        waiting, self._waiting = self._waiting, {}
        for allocation in waiting.values():
            yield from self._hold(at, allocation)

    def _drop(self, command: int, allocation_id: str) -> Iterator[Action]:
        self._waiting.pop(allocation_id, None)
        if allocation_id in self._claims():
            self._reporter.receive(command, unsettled=None)
            self._ending.add(allocation_id)
        else:
            self._reporter.receive(command, unsettled=allocation_id)
            self._absent.add(allocation_id)
        yield a.ReadProcesses()

    def _claims(self) -> dict[str, HeldAllocation]:
        """Return what is held and what is about to be, by id."""
        return {**self._durable.held, **self._saving.holds}

    # --- frames and the link

    def _greet(self) -> Iterator[Action]:
        self._reporter.greet()
        parting, first_sequence = self._reporter.parting, self._reporter.first_sequence
        leaving = {*parting, *self._failed, *self._ending}
        held = mark_leaving({**parting, **self._failed, **self._claims()}, leaving)
        who = (self._identity, self._incarnation)
        yield a.SendHello(Hello(*who, self._now, first_sequence, self._inventory, held))

    def _flush(self, at: float) -> Iterator[Action]:
        """Report at once what is owed, if anything is."""
        yield from self._note_health()
        if self._reporter.is_due:
            yield from self._report(at, ())

    def _note_health(self) -> Iterator[Action]:
        """Have remembered what is new about health, and owe it."""
        records, is_changed = self._health.news(is_saving=self._saving.is_saving_health)
        if records:
            yield self._saving.begin(*records)
        if is_changed:
            self._reporter.owe(Part.HEALTH)

    def _report(self, at: float, samples: tuple[NumberedSample, ...]) -> Iterator[Action]:
        yield from self._note_health()
        next_sequence, reserved_below = self._reporter.next_sequence, self._durable.reserved_below
        if self._saving.is_reservation_due(next_sequence, reserved_below, self._now):
            yield self._saving.begin(r.SequencesReserved(reserved_until(next_sequence)))
        carried = {id_: each for id_, each in self._claims().items() if id_ in self._carried}
        leaving = {*self._failed, *self._ending}
        held = mark_leaving({**self._failed, **carried, **self._durable.held}, leaving)
        known = (self._inventory, held, self._driver, self._processes, self._health.gpus, self._mig)
        self._reporter.add_frame(at, self._now, samples, Report(*known))
        yield from self._send_due()

    def _send_due(self) -> Iterator[Action]:
        yield from map(a.SendFrame, self._reporter.take_due())
