"""The health of the node's GPUs: what is seen goes in, verdicts and records come out.

    readings ── conditions ──┐
    events, log ── Xids ─────┼── memory of faults ── policy ── verdicts
    inventory ── expected ───┘         └── records, which give the same memory after a restart

No clock, no I/O. `at` is Unix seconds; `now` is seconds on a clock that never goes back.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from stoker.agent.health import checks
from stoker.agent.health.conditions import GpuWatch
from stoker.agent.health.echoes import APART_SECONDS_MAX, Echoes, Teller
from stoker.agent.health.expected import compare
from stoker.agent.health.history import Memory
from stoker.agent.health.judging import judge_fault, judge_gpu
from stoker.agent.health.kernel_log import (
    Happening,
    KernelLogReader,
    PciAddress,
    Told,
    parse_address,
    shown,
)
from stoker.agent.health.policy import Policy
from stoker.agent.health.xids import RECOVERY_ACTION_CHANGED, xid_name
from stoker.agent.model import NumberedInventory
from stoker.agent.readings import WHOLE_GPU, GpuFault, GpuReading, XidSeen
from stoker.agent.records import HealthRecord
from stoker.agent.telemetry import INTERVALS_FRESH, GpuTelemetry
from stoker.agent.verdicts import (
    Check,
    Ending,
    ExpectedGpu,
    GpuHealth,
    History,
    KernelLine,
    KernelLogPosition,
)
from stoker.core.gpu_models import MODELS

# Lines that wait for the first inventory to say whose they are; the oldest are given up.
WAITING_LINES_MAX = 256
GPU_MISSING = "gpu_missing"  # `GpuFault.error_kind`

_NVLINKS = {model.driver_name: model.nvlink_count for model in MODELS.values()}
# Not the driver's own words: they name whichever call came first.
_LOST_KINDS = {
    checks.GPU_LOST: "the driver has lost the GPU",
    checks.RESET_REQUIRED: "the driver can do nothing with the GPU",
}
_UNREAD_CHECKS = (Check.GPU_LOST, Check.STALE, Check.GPU_MISSING)
_STALE = (Check.STALE, "")
_MISSING = (Check.GPU_MISSING, "")


class Judge:
    """Everything that health knows; every call costs microseconds."""

    def __init__(self, policy: Policy, boot_id: str, history: History) -> None:
        self._policy, self._boot_id = policy, boot_id
        self._memory = Memory(policy, boot_id, history)
        self._watches: dict[str, GpuWatch] = {}
        self._unread_since: dict[str, float] = {}
        self._ticked: float | None = None  # when the newest tick was, and how long after the last
        self._gap = 0.0
        self._inventory: NumberedInventory | None = None
        self._addresses: dict[PciAddress, str] = {}
        self._absent: tuple[ExpectedGpu, ...] = ()
        self._reader, self._echoes = KernelLogReader(), Echoes()
        self._waiting: deque[tuple[float, Told]] = deque(maxlen=WAITING_LINES_MAX)
        position = history.kernel_log
        is_of_boot = position is not None and position.boot_id == boot_id
        self._taken = position.sequence if position is not None and is_of_boot else -1
        self.lines_dropped = 0  # of the kernel's log, about no GPU of the node
        self._known: tuple[str, ...] = ()
        self._healths: dict[str, GpuHealth] = {}
        self._told: tuple[GpuHealth, ...] = ()
        self._know()

    # --- what is seen

    def take_readings(
        self,
        at: float,
        now: float,
        readings: Sequence[GpuReading],
        gpus: Sequence[GpuTelemetry],
    ) -> None:
        """Take in an answered tick, also one in which no GPU could be read (`gpus` is empty)."""
        self._tick(at, now)
        read = {gpu.uuid for gpu in gpus}
        reasons: dict[str, str] = {}
        for reading in readings:
            uuid = reading.uuid
            watch = self._watches.get(uuid)
            if watch is None:
                watch = self._watch(uuid)
            if uuid in read:
                if watch.is_reset(reading):
                    self._reset(uuid, at)
                if reading.xids:
                    self._take_events(uuid, reading.xids)
                self._look(watch, reading, at, now)
            else:
                if reading.xids:
                    self._take_events(uuid, reading.xids)
                reasons[uuid] = self._take_failures(reading, at)
        if self._unread_since or not read.issuperset(self._known):
            self._take_unread(at, now, read, reasons, "it is not among the GPUs that are read")

    def take_silence(self, at: float, now: float, reason: str) -> None:
        """Take in a tick that told nothing: no answer, or the driver is failed or released."""
        self._tick(at, now)
        self._take_unread(at, now, set(), {}, reason)

    def take_inventory(self, at: float, inventory: NumberedInventory) -> None:
        """Take in which GPUs the driver counts."""
        before, self._inventory = self._inventory, inventory
        memory = self._memory
        found = compare(memory.expected, inventory)
        self._absent = found.absent
        for uuid in found.replaced:
            memory.forgive(uuid, at, Ending.REPLACED)
        memory.expect(found.expected)
        self._know()
        for gpu in inventory.gpus:
            watch = self._watch(gpu.identity.uuid)
            watch.links = _NVLINKS.get(gpu.identity.model, 0)
            memory.recover(gpu.identity.uuid, _MISSING, at)
        if before is not None and _is_another_driver(before, inventory):
            for uuid in self._known:
                self._reset(uuid, at)
        for uuid, fault in found.unread:
            memory.recover(uuid, _MISSING, at)
            self._take_lost(uuid, at, fault.error_kind)
        for each in found.absent:
            memory.condition(each.uuid, _MISSING, at, _absence(each))
        waiting, self._waiting = self._waiting, deque(maxlen=WAITING_LINES_MAX)
        for line_at, told in waiting:
            self._take_told(at, line_at, told)

    def take_kernel_log(self, at: float, lines: Sequence[KernelLine]) -> None:
        """Take in lines of the kernel's log; those that were taken before change nothing."""
        for line in lines:
            if line.sequence <= self._taken:
                continue
            self._taken = line.sequence
            told = self._reader.read(line.text)
            if told is not None:
                self._take_told(at, min(line.at, at), told)
        # What is not judged yet has to be read again after a restart.
        if self._taken >= 0 and not self._waiting and not self._reader.is_amid:
            self._memory.take_position(KernelLogPosition(self._boot_id, self._taken))

    def take_driver_loaded(self, at: float) -> None:
        """Take in that a new driver host opened the driver: it may have been loaded anew.

        The next readings tell: by the counter of energy at any time, by other counters only now,
        as people can set those back.
        """
        for watch in self._watches.values():
            watch.has_new_host = True

    def forgive(self, at: float, uuid: str) -> tuple[str, ...]:
        """Forget what lasts of a GPU because a person says so; return what that was."""
        memory = self._memory
        lasting = tuple(memory.lasting(uuid).values())
        is_gone = any(each.uuid == uuid for each in self._absent)
        faults = [judge_fault(record, self._policy) for record in lasting]
        memory.forgive(uuid, at, Ending.FORGIVEN)
        if uuid in self._watches:
            self._watches[uuid].begin_life()
        if is_gone:
            memory.expect(tuple(each for each in memory.expected if each.uuid != uuid))
            self._absent = tuple(each for each in self._absent if each.uuid != uuid)
            self._know()
        return tuple(fault.reason for fault in faults if fault is not None)

    # --- what is known

    def absent(self) -> tuple[GpuFault, ...]:
        """Return the GPUs that the node had, and that the driver does not count any more."""
        return tuple(
            GpuFault(each.index, each.uuid, GPU_MISSING, _absence(each)) for each in self._absent
        )

    def gpus(self) -> tuple[GpuHealth, ...]:
        """Return the verdicts; the same object as before while nothing changed."""
        if self._memory.changed:
            changed, self._memory.changed = self._memory.changed, set()
            for uuid in changed:
                records = self._memory.lasting(uuid).values()
                self._healths[uuid] = judge_gpu(uuid, records, self._policy)
            told = tuple(self._healths[uuid] for uuid in self._known)
            if told != self._told:
                self._told = told
        return self._told

    def take_records(self) -> tuple[HealthRecord, ...]:
        """Return what has to be remembered since the last call."""
        return self._memory.take_records()

    def take_loss(self, records: Sequence[HealthRecord]) -> None:
        """Take in that records could not be written: `take_records` returns them again, later."""
        self._memory.take_loss(records)

    def _know(self) -> None:
        """Find out which GPUs are known: those that there are, and those that should be."""
        memory, inventory = self._memory, self._inventory
        gpus: dict[str, str | None] = {each.uuid: each.pci_bus_id for each in memory.expected}
        if inventory is None:
            gpus.update((uuid, None) for uuid in memory.uuids() if uuid not in gpus)
        else:
            named = (fault.uuid for fault in inventory.missing if fault.uuid is not None)
            gpus.update((uuid, None) for uuid in named if uuid not in gpus)
            # Last, as they are where they are: another GPU may have been expected there.
            gpus.update((gpu.identity.uuid, gpu.identity.pci_bus_id) for gpu in inventory.gpus)
        self._known = tuple(gpus)
        self._addresses = {}
        for uuid, pci_bus_id in gpus.items():
            address = None if pci_bus_id is None else parse_address(pci_bus_id)
            if address is not None:
                self._addresses[address] = uuid
            self._memory.know(uuid)
        self._memory.changed.update(self._known)
        self._watches = {uuid: each for uuid, each in self._watches.items() if uuid in gpus}
        self._unread_since = {uuid: t for uuid, t in self._unread_since.items() if uuid in gpus}

    def _watch(self, uuid: str) -> GpuWatch:
        """Return what is kept of a GPU between readings; one that is read first is known then."""
        if uuid not in self._watches:
            self._memory.know(uuid)
            self._watches[uuid] = GpuWatch(energy=self._memory.energy(uuid))
        return self._watches[uuid]

    # --- readings

    def _look(self, watch: GpuWatch, reading: GpuReading, at: float, now: float) -> None:
        uuid, memory = reading.uuid, self._memory
        lasting = memory.lasting(uuid)
        for found in watch.look(reading, now, self._policy.limits, lasting):
            key = (found.check, found.code)
            if found.is_bad:
                memory.condition(
                    uuid, key, at, found.detail, follows=found.follows, energy=watch.energy
                )
            else:
                memory.recover(uuid, key, at)
        if lasting:
            for key in tuple(lasting):
                if key[0] in _UNREAD_CHECKS:
                    memory.recover(uuid, key, at)

    def _take_failures(self, reading: GpuReading, at: float) -> str:
        """Take in why a GPU told nothing; return it."""
        for failure in reading.failures:
            if failure.fact == WHOLE_GPU:
                self._take_lost(reading.uuid, at, failure.error_kind)
                return failure.message
        return reading.failures[0].message if reading.failures else "it told nothing"

    def _take_lost(self, uuid: str, at: float, kind: str) -> None:
        detail = _LOST_KINDS.get(kind)
        if detail is None:
            return
        memory = self._memory
        energy = self._watch(uuid).energy
        memory.condition(uuid, (Check.GPU_LOST, kind), at, detail, energy=energy)
        for code in _LOST_KINDS:
            if code != kind:
                memory.recover(uuid, (Check.GPU_LOST, code), at)

    def _tick(self, at: float, now: float) -> None:
        self._memory.tick(at, now)
        if self._ticked is not None:
            self._gap = now - self._ticked
        self._ticked = now

    def _take_unread(
        self, at: float, now: float, read: set[str], reasons: Mapping[str, str], reason: str
    ) -> None:
        since = self._unread_since
        seconds = max(self._policy.limits.stale_seconds, INTERVALS_FRESH * self._gap)
        for uuid in self._known:
            if uuid in read:
                since.pop(uuid, None)
                continue
            if uuid not in since:
                watch = self._watches.get(uuid)
                since[uuid] = now if watch is None or watch.read is None else watch.read
            if now - since[uuid] >= seconds:
                detail = f"not read: {shown(reasons.get(uuid, reason))}"
                self._memory.condition(uuid, _STALE, at, detail, follows=True)

    def _reset(self, uuid: str, at: float) -> None:
        if uuid in self._watches:
            self._watches[uuid].begin_life()
        self._memory.reset(uuid, at)

    # --- Xids

    def _take_events(self, uuid: str, xids: Sequence[XidSeen]) -> None:
        for seen in xids:
            detail = _plain(seen.xid)
            if seen.gpu_instance_id is not None:
                detail += f" on MIG instance {seen.gpu_instance_id}"
            if not self._echoes.is_echo(uuid, seen.xid, Teller.EVENT, seen.at):
                key = (Check.XID, str(seen.xid))
                self._memory.incident(uuid, key, seen.at, detail, energy=self._energy(uuid))

    def _take_told(self, at: float, line_at: float, told: Told) -> None:
        """Take in what the kernel's log told of a GPU, if it is one of the node's."""
        if told.happening is Happening.DRIVER_LOADED:
            for known in self._known:
                self._take_loaded(known, line_at)
            return
        if not self._known:
            if len(self._waiting) == WAITING_LINES_MAX:
                self.lines_dropped += 1
            self._waiting.append((line_at, told))
            return
        uuid = self._whose(told)
        if uuid is None:
            self.lines_dropped += 1
            return
        match told.happening:
            case Happening.XID:
                self._take_logged(uuid, at, line_at, told, Teller.LOG)
            case Happening.FALLEN_OFF:
                self._take_logged(uuid, at, line_at, told, Teller.WORDS)
            case Happening.INIT_FAILED:
                watch = self._watches.get(uuid)
                if watch is None or watch.read_at is None or watch.read_at < line_at:
                    key = (Check.GPU_LOST, checks.INIT_FAILED)
                    self._memory.incident(uuid, key, line_at, told.text, told_at=at)
            case Happening.PCIE_FATAL | Happening.PCIE_NONFATAL:
                is_fatal = told.happening is Happening.PCIE_FATAL
                key = (Check.PCIE_LINK, checks.PCIE_FATAL if is_fatal else checks.PCIE_NONFATAL)
                energy = self._energy(uuid)
                self._memory.incident(uuid, key, line_at, told.text, energy=energy, told_at=at)

    def _take_loaded(self, uuid: str, line_at: float) -> None:
        watch = self._watches.get(uuid)
        if watch is not None and watch.read_at is not None and watch.read_at >= line_at:
            self._memory.mend(uuid, line_at)  # told late: it was read since
            return
        self._reset(uuid, line_at)
        if watch is not None:
            watch.energy = None  # else the next reading tells of the same reset once more

    def _whose(self, told: Told) -> str | None:
        """Return the GPU that a line is about; None: it is none of the node's."""
        if told.uuid in self._known:
            return told.uuid
        return None if told.address is None else self._addresses.get(told.address)

    def _take_logged(
        self, uuid: str, at: float, line_at: float, told: Told, teller: Teller
    ) -> None:
        memory, number, key = self._memory, told.number, (Check.XID, told.code)
        plain, detail = _plain(number), _told_plainly(number, told.text)
        is_echo = self._echoes.is_echo(uuid, number, teller, line_at)
        if number == RECOVERY_ACTION_CHANGED:
            self._end_recovery_actions(uuid, at, told.code)
            if told.code.endswith(".NONE"):
                return
        bare = (Check.XID, str(number))
        if told.code != bare[1]:
            # The event told of it with less: it is this one.
            record = memory.lasting(uuid).get(bare)
            if record is not None and abs(record.last_at - line_at) <= APART_SECONDS_MAX:
                is_echo = is_echo and record.count > 1
                if not is_echo:
                    memory.drop(uuid, bare)
            is_echo = is_echo and key in memory.lasting(uuid)
        if is_echo:
            memory.enrich(uuid, key, plain, detail)
            return
        memory.incident(uuid, key, line_at, detail, energy=self._energy(uuid), told_at=at)

    def _end_recovery_actions(self, uuid: str, at: float, code: str) -> None:
        for key in tuple(self._memory.lasting(uuid)):
            is_other = key[1].startswith(f"{RECOVERY_ACTION_CHANGED}.") and key[1] != code
            if key[0] is Check.XID and is_other:
                self._memory.recover(uuid, key, at)

    def _energy(self, uuid: str) -> float | None:
        watch = self._watches.get(uuid)
        return None if watch is None else watch.energy


def _plain(number: int) -> str:
    return f"Xid {number} ({xid_name(number)})"


def _told_plainly(number: int, text: str) -> str:
    """Return what the log says of an Xid; its name is left out where the log has it too."""
    if not text:
        return _plain(number)
    if text.casefold().startswith(xid_name(number).casefold()):
        return f"Xid {number}: {text}"
    return f"{_plain(number)}: {text}"


def _absence(gpu: ExpectedGpu) -> str:
    where = f" at {gpu.pci_bus_id}" if gpu.pci_bus_id else ""
    return f"the node had this {gpu.model} as GPU {gpu.index}{where}, and it is not there any more"


def _is_another_driver(before: NumberedInventory, after: NumberedInventory) -> bool:
    versions = (before.driver_version, after.driver_version)
    return None not in versions and versions[0] != versions[1]
