"""The node's state and its one door: an event in, the actions it calls for out.

What is durable (`Durable`: the held allocations, numbers) changes only when the journal has said
that the record is on disk; only then is it reported. The rest is forgotten with the process.

    Hold       refused, or journaled -> held, reported at once
    Drop       ending -> processes read since -> journaled -> gone, reported with that reading
               not held -> processes read since -> reported with that reading

The aggregator takes an allocation for gone when it told the node on this stream to let go, that is
done, and the node does not list it. So a hello, and the frames that follow it, list everything that
might still be there, what is being journaled too; and the frame that stops listing it carries the
processes that were found on the GPUs afterwards, also for an allocation that was never held:
whoever was promised it may have used its GPUs.

The state is deterministic: no clock, no chance, no I/O. Two states that were given the same events
at the same times returned the same actions.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import assert_never

from stoker.agent.actions import (
    Action,
    ReadInventory,
    ReadProcesses,
    SaveJournal,
    SendFrame,
    SendHello,
)
from stoker.agent.events import (
    CommandReceived,
    DriverChanged,
    Event,
    FrameAcked,
    InventoryRead,
    JournalFailed,
    JournalSaved,
    LinkDown,
    LinkUp,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
    SampleTaken,
    SamplingFailed,
    Started,
    Welcomed,
)
from stoker.agent.framing import LinkStatus, Part, Report, Reporter
from stoker.agent.holding import attribute, find_obstacle
from stoker.agent.model import (
    AttributedProcess,
    DriverState,
    DriverStatus,
    Drop,
    HeldAllocation,
    Hello,
    Hold,
    NodeIdentity,
    NodeView,
    NumberedGpu,
    NumberedInventory,
    NumberedSample,
    ProcessTable,
)
from stoker.agent.readings import GpuSample, Inventory
from stoker.agent.records import (
    AllocationDropped,
    AllocationHeld,
    Durable,
    GpuNumbered,
    IncarnationBegun,
    Record,
    SequencesReserved,
)

# Sequence numbers that one record in the journal reserves: one write in half an hour at one per
# second. The rest of a block is skipped at a restart.
SEQUENCES_RESERVED_AT_ONCE = 4000
# How long a full journal is left alone before numbers are reserved again.
RESERVATION_RETRY_SECONDS = 60.0
# How often processes are told though they are the same.
PROCESSES_RESEND_SECONDS = 30.0
# Holds that wait for the driver to tell which GPUs there are; more are refused.
WAITING_MAX = 1024


class NodeState:
    """The state of one node. Only `handle` changes it; `view` shows it."""

    def __init__(self, identity: NodeIdentity, durable: Durable) -> None:
        self._identity = identity
        self._durable = durable
        self._incarnation = durable.incarnation or identity.process_id
        self._now = 0.0  # monotonic; when the event under way happened
        self._saving: dict[int, tuple[Record, ...]] = {}  # by ticket
        self._next_ticket = 1

        self._reporter = Reporter(next_sequence=durable.reserved_below)
        self._reservation_not_before = 0.0

        self._inventory: NumberedInventory | None = None
        self._driver = DriverStatus(DriverState.STARTING)
        self._samples: tuple[GpuSample, ...] = ()
        self._samples_total = 0
        self._sample_failures: dict[str, int] = {}
        self._last_success_at: float | None = None
        self._last_success_monotonic: float | None = None

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

    @classmethod
    def restore(cls, records: tuple[Record, ...], identity: NodeIdentity) -> "NodeState":
        """Return the state after a (re)start, from everything that the journal has kept."""
        return cls(identity, Durable().after(records))

    def handle(self, event: Event, monotonic: float) -> tuple[Action, ...]:
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
            samples=self._samples,
            processes=self._processes,
            processes_monotonic_seconds=self._processes_monotonic,
            held=self._held,
            ending=frozenset(self._ending),
            driver=self._driver,
            connected=self._reporter.link is LinkStatus.WELCOMED,
            outbox_frames=self._reporter.outbox_frames,
            frames_dropped=self._reporter.frames_dropped,
            samples_total=self._samples_total,
            sample_failures=dict(self._sample_failures),
            last_success_at=self._last_success_at,
            last_success_monotonic_seconds=self._last_success_monotonic,
        )

    def _handle(self, event: Event) -> Iterator[Action]:
        match event:
            case Started():
                yield from self._start()
            case InventoryRead(at, inventory):
                yield from self._take_inventory(at, inventory)
            case SampleTaken(at, samples):
                yield from self._take_samples(at, samples)
            case SamplingFailed(at, kind, _):
                self._count_failure(kind)
                yield from self._flush(at)
            case ProcessReadingBegun():
                self._covered = frozenset({*self._ending, *self._absent, *self._failed})
            case ProcessesTaken():
                yield from self._take_processes(event)
            case ProcessReadingFailed():
                self._covered = frozenset()
            case DriverChanged(at, status):
                yield from self._change_driver(at, status)
            case CommandReceived():
                yield from self._obey(event)
            case LinkUp():
                yield from self._greet()
            case Welcomed(at, acked_sequence):
                self._reporter.resume(acked_sequence)
                yield from self._flush(at)
            case LinkDown():
                self._reporter.hang_up()
                self._waiting.clear()  # the aggregator says again what it still wants
                self._absent.clear()
                self._carried = set(self._claims()) - set(self._durable.held)
            case FrameAcked(_, sequence):
                self._reporter.acknowledge(sequence)
                yield from self._send_due()
            case JournalSaved(at, ticket):
                yield from self._keep(at, self._saving.pop(ticket))
            case JournalFailed(at, ticket, reason):
                yield from self._do_without(at, self._saving.pop(ticket), reason)
            case _:
                assert_never(event)

    # --- the journal

    @property
    def _held(self) -> tuple[HeldAllocation, ...]:
        return tuple(self._durable.held.values())

    def _save(self, *records: Record) -> Iterator[Action]:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._saving[ticket] = records
        yield SaveJournal(ticket, records)

    def _start(self) -> Iterator[Action]:
        records: list[Record] = []
        if not self._durable.incarnation:
            records.append(IncarnationBegun(self._incarnation))
        below = self._reporter.next_sequence + SEQUENCES_RESERVED_AT_ONCE
        yield from self._save(*records, SequencesReserved(below))

    def _keep(self, at: float, records: tuple[Record, ...]) -> Iterator[Action]:
        before, self._durable = self._durable, self._durable.after(records)
        for record in records:
            match record:
                case AllocationHeld(allocation):
                    self._carried.discard(allocation.id)
                    self._reporter.settle(allocation.id)
                    self._reporter.owe(Part.HELD)
                    if allocation.id in self._ending:  # dropped while it was being journaled
                        yield ReadProcesses()
                case AllocationDropped(allocation_id):
                    self._ending.discard(allocation_id)
                    self._reporter.part_with(before.held[allocation_id])
                case IncarnationBegun() | SequencesReserved() | GpuNumbered():
                    pass
                case _:
                    assert_never(record)
        yield from self._flush(at)

    def _do_without(self, at: float, records: tuple[Record, ...], reason: str) -> Iterator[Action]:
        for record in records:
            match record:
                case AllocationHeld(allocation):
                    self._carried.discard(allocation.id)
                    if allocation.id in self._ending:
                        self._ending.discard(allocation.id)
                        self._failed[allocation.id] = allocation
                        yield ReadProcesses()
                    why = f"the node cannot note it down: {reason}"
                    self._reporter.refuse(allocation.id, why)
                    self._reporter.owe(Part.HELD)
                case SequencesReserved():
                    # Numbering goes on without: should the process die now and use numbers again,
                    # the next welcome tells how far the aggregator has counted.
                    self._reservation_not_before = self._now + RESERVATION_RETRY_SECONDS
                case AllocationDropped() | GpuNumbered() | IncarnationBegun():
                    # It stays held and ending, and the next reading of processes tries again.
                    # A GPU's number holds while the process lives, and a hello tells it anew.
                    pass
                case _:
                    assert_never(record)
        yield from self._flush(at)

    def _reserve_if_low(self) -> Iterator[Action]:
        below = self._reporter.next_sequence + SEQUENCES_RESERVED_AT_ONCE
        is_low = below - self._durable.reserved_below > SEQUENCES_RESERVED_AT_ONCE // 2
        pending = any(isinstance(r, SequencesReserved) for rs in self._saving.values() for r in rs)
        if is_low and not pending and self._now >= self._reservation_not_before:
            yield from self._save(SequencesReserved(below))

    # --- the cards

    def _take_inventory(self, at: float, inventory: Inventory) -> Iterator[Action]:
        numbers = dict(self._durable.numbers)
        if self._inventory is not None:
            # Those of the last inventory hold even if the journal could not take them.
            numbers.update((gpu.identity.uuid, gpu.number) for gpu in self._inventory.gpus)
        fresh: list[Record] = []
        for gpu in inventory.gpus:
            if gpu.uuid not in numbers:
                numbers[gpu.uuid] = max(numbers.values(), default=0) + 1
                fresh.append(GpuNumbered(gpu.uuid, numbers[gpu.uuid]))
        if fresh:
            yield from self._save(*fresh)
        gpus = tuple(NumberedGpu(numbers[gpu.uuid], gpu) for gpu in inventory.gpus)
        numbered = NumberedInventory(inventory.driver_version, inventory.cuda_driver_version, gpus)
        if numbered != self._inventory:
            self._inventory = numbered
            self._reporter.owe(Part.INVENTORY)
        waiting, self._waiting = self._waiting, {}
        for allocation in waiting.values():
            yield from self._hold(at, allocation)
        yield from self._flush(at)

    def _take_samples(self, at: float, samples: tuple[GpuSample, ...]) -> Iterator[Action]:
        read = tuple(sample for sample in samples if not sample.is_empty)
        if samples and not read:
            self._count_failure("no_gpu_read")
            yield from self._flush(at)
            return
        self._samples = read
        self._samples_total += 1
        self._last_success_at, self._last_success_monotonic = at, self._now
        gpus = () if self._inventory is None else self._inventory.gpus
        numbers = {gpu.identity.uuid: gpu.number for gpu in gpus}
        yield from self._report(
            at,
            tuple(NumberedSample(numbers[s.uuid], s) for s in read if s.uuid in numbers),
        )
        if any(sample.uuid not in numbers for sample in read):
            yield ReadInventory()

    def _count_failure(self, kind: str) -> None:
        self._samples = ()
        self._sample_failures[kind] = self._sample_failures.get(kind, 0) + 1

    def _change_driver(self, at: float, status: DriverStatus) -> Iterator[Action]:
        if status != self._driver:
            self._driver = status
            if status.state is not DriverState.READING:
                self._samples = ()
            self._reporter.owe(Part.DRIVER)
            yield from self._flush(at)

    # --- processes, and letting go

    def _take_processes(self, event: ProcessesTaken) -> Iterator[Action]:
        unread = set(event.unread_gpu_uuids)
        if event.has_unnamed_unread and self._inventory is not None:
            # It may be any GPU that is not among those that can be read.
            known = {gpu.identity.uuid for gpu in self._inventory.gpus}
            unread |= {uuid for each in self._held for uuid in each.gpu_uuids} - known
        dropping = {
            record.allocation_id
            for records in self._saving.values()
            for record in records
            if isinstance(record, AllocationDropped)
        }
        verified = [
            each.id
            for each in self._held
            if each.id in self._covered - dropping and not unread & set(each.gpu_uuids)
        ]
        seen, self._covered = self._covered, frozenset()
        tenants = [each for each in self._held if each.id not in dropping | set(verified)]
        table = ProcessTable(
            event.started_at,
            tuple(AttributedProcess(each, attribute(each, tenants)) for each in event.processes),
            event.unread_gpu_uuids,
        )
        is_due = self._now - self._reporter.processes_told_at >= PROCESSES_RESEND_SECONDS
        if is_due or not table.says_the_same_as(self._processes):
            self._reporter.owe(Part.PROCESSES)
        is_first = self._processes is None
        self._processes, self._processes_monotonic = table, self._now
        if verified:
            yield from self._save(*(AllocationDropped(id_) for id_ in verified))
        if is_first:  # nothing is granted here before the aggregator has seen it
            yield from self._flush(event.at)
        yield from self._confirm(event.at, seen)

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

    def _obey(self, event: CommandReceived) -> Iterator[Action]:
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
        elif self._inventory is None:
            if len(self._waiting) < WAITING_MAX:
                self._waiting[wanted.id] = wanted
                return
            self._reporter.refuse(wanted.id, "too many wait for the driver to tell of its GPUs")
        else:
            obstacle = find_obstacle(wanted, tuple(claims.values()), self._inventory)
            if obstacle is None:
                yield from self._save(AllocationHeld(replace(wanted, held_since=at)))
                return
            self._reporter.refuse(wanted.id, obstacle)
        yield from self._flush(at)

    def _drop(self, command: int, allocation_id: str) -> Iterator[Action]:
        self._waiting.pop(allocation_id, None)
        if allocation_id in self._claims():
            self._reporter.receive(command, unsettled=None)
            self._ending.add(allocation_id)
        else:
            self._reporter.receive(command, unsettled=allocation_id)
            self._absent.add(allocation_id)
        yield ReadProcesses()

    def _claims(self) -> dict[str, HeldAllocation]:
        """Return what is held and what is about to be, by id."""
        claims = dict(self._durable.held)
        for records in self._saving.values():
            for record in records:
                if isinstance(record, AllocationHeld):
                    claims[record.allocation.id] = record.allocation
        return claims

    # --- frames and the link

    def _greet(self) -> Iterator[Action]:
        self._reporter.greet()
        yield SendHello(
            Hello(
                identity=self._identity,
                incarnation=self._incarnation,
                monotonic_seconds=self._now,
                first_sequence=self._reporter.first_sequence,
                inventory=self._inventory,
                held=self._told(
                    {**self._reporter.parting, **self._failed, **self._claims()},
                    leaving={*self._reporter.parting, *self._failed, *self._ending},
                ),
            )
        )

    @staticmethod
    def _told(
        held: Mapping[str, HeldAllocation], leaving: Collection[str]
    ) -> tuple[HeldAllocation, ...]:
        """Return what is reported as held, with what the node was told to let go of marked."""
        return tuple(
            replace(each, is_leaving=True) if id_ in leaving else each for id_, each in held.items()
        )

    def _flush(self, at: float) -> Iterator[Action]:
        """Report at once what is owed, if anything is."""
        if self._reporter.is_due:
            yield from self._report(at, ())

    def _report(self, at: float, samples: tuple[NumberedSample, ...]) -> Iterator[Action]:
        yield from self._reserve_if_low()
        claims = self._claims()
        carried = {id_: claims[id_] for id_ in claims if id_ in self._carried}
        held = self._told(
            {**self._failed, **carried, **self._durable.held},
            leaving={*self._failed, *self._ending},
        )
        report = Report(self._inventory, held, self._driver, self._processes)
        self._reporter.add_frame(at, self._now, samples, report)
        yield from self._send_due()

    def _send_due(self) -> Iterator[Action]:
        yield from map(SendFrame, self._reporter.take_due())
