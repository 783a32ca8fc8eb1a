"""A node of GPUs whose health is judged, on a clock of its own: stories of faults and repairs.

It behaves as a node does: counters begin anew with a reset, the kernel's log numbers its lines
anew with a boot, and a restart of the agent knows what was written down and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker.agent.facts import CLOCK_EVENT_BITS, CORRECTABLE, UNCORRECTABLE, Fact, Rate
from stoker.agent.health.judge import Judge
from stoker.agent.health.policy import Policy
from stoker.agent.model import NumberedGpu, NumberedInventory
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuFault,
    GpuIdentity,
    GpuReading,
    ReadFailure,
    XidSeen,
)
from stoker.agent.records import Durable, Record
from stoker.agent.telemetry import GpuTelemetry
from stoker.agent.verdicts import Check, Fault, GpuHealth, History, KernelLine
from stoker.core.gpu_models import MODELS, GpuModel

H100 = MODELS["H100-80GB"]
# How often slow facts are read, in seconds.
SLOW_SECONDS = 10.0
_LINK_FACTS = (
    Fact.NVLINK_RECOVERY_ERRORS,
    Fact.NVLINK_REPLAY_ERRORS,
    Fact.NVLINK_CRC_FLIT_ERRORS,
    Fact.NVLINK_CRC_DATA_ERRORS,
)
_NO_REASONS = dict.fromkeys(CLOCK_EVENT_BITS.values(), 0.0)


def uuid_of(number: int) -> str:
    """Return the UUID of a card of that number."""
    return f"GPU-{number:08x}-0000-4000-8000-000000000000"


@dataclass(slots=True)
class Card:
    """One GPU: what it tells, and what it has been set to tell."""

    number: int
    slot: int
    model: GpuModel = H100
    facts: dict[Fact, float] = field(default_factory=dict[Fact, float])
    by_label: dict[Fact, dict[str, float]] = field(default_factory=dict[Fact, dict[str, float]])
    reasons: dict[str, float] = field(default_factory=dict[str, float])
    energy_joules: float = 5e6
    failure: tuple[str, str] | None = None  # kind of error and message, of the whole GPU
    is_gone: bool = False  # not counted by the driver
    has_energy: bool = True
    driver_name: str = ""  # another name for its model than the driver's

    @property
    def uuid(self) -> str:
        """Its UUID."""
        return uuid_of(self.number)

    @property
    def pci_bus_id(self) -> str:
        """Where it is, as NVML writes it."""
        return f"00000000:{0x10 + self.slot:02X}:00.0"

    @property
    def kernel_address(self) -> str:
        """Where it is, as the kernel's log writes it."""
        return f"PCI:0000:{0x10 + self.slot:02x}:00"

    def read(self, at: float, *, slow: bool, xids: tuple[XidSeen, ...]) -> GpuReading:
        """Return what it tells."""
        rates = (Rate.FAST, Rate.SLOW) if slow else (Rate.FAST,)
        if self.failure is not None:
            kind, message = self.failure
            failures = (ReadFailure(WHOLE_GPU, kind, message),)
            return GpuReading(self.uuid, at, rates, xids=xids, failures=failures)
        facts = {
            Fact.MEMORY_USED_BYTES: 2.0**30,
            Fact.UTILIZATION_RATIO: 0.9,
            Fact.TEMPERATURE_CELSIUS: 60.0,
            Fact.MEMORY_TEMPERATURE_CELSIUS: 70.0,
            Fact.POWER_WATTS: 500.0,
        }
        if self.has_energy:
            facts[Fact.ENERGY_JOULES] = self.energy_joules
        by_label: dict[Fact, Mapping[str, float]] = {
            Fact.CLOCK_EVENT_ACTIVE: {**_NO_REASONS, **self.reasons}
        }
        if slow:
            facts.update(self._slow_facts())
            by_label.update(self._links())
            if self.model.row_remap_banks is None:
                by_label[Fact.RETIRED_PAGES] = {CORRECTABLE: 0.0, UNCORRECTABLE: 0.0}
            for fact, values in self.by_label.items():
                by_label[fact] = {**by_label.get(fact, {}), **values}
        facts.update((fact, value) for fact, value in self.facts.items() if slow or fact in facts)
        return GpuReading(self.uuid, at, rates, facts, by_label, xids=xids)

    def _slow_facts(self) -> dict[Fact, float]:
        generation = float(self.model.pcie_generation)
        facts = {
            Fact.TEMPERATURE_SLOWDOWN_CELSIUS: self.model.temperature_slowdown_celsius,
            Fact.ECC_CORRECTED_VOLATILE_ERRORS: 0.0,
            Fact.ECC_UNCORRECTED_VOLATILE_ERRORS: 0.0,
            Fact.RECOVERY_ACTION: 0.0,
            Fact.PERSISTENCE_MODE: 1.0,
            Fact.PCIE_LINK_GENERATION: generation,
            Fact.PCIE_LINK_GENERATION_MAX: generation,
            Fact.PCIE_LINK_WIDTH: 16.0,
            Fact.PCIE_LINK_WIDTH_MAX: 16.0,
            Fact.PCIE_REPLAYS: 0.0,
        }
        if self.model.memory_temperature_max_celsius is not None:
            facts[Fact.MEMORY_TEMPERATURE_MAX_CELSIUS] = self.model.memory_temperature_max_celsius
        if self.model.row_remap_banks is None:
            facts[Fact.RETIRED_PAGES_PENDING] = 0.0
        else:
            facts[Fact.REMAPPED_ROWS_PENDING] = facts[Fact.REMAPPED_ROWS_FAILED] = 0.0
        return facts

    def _links(self) -> dict[Fact, dict[str, float]]:
        links = [str(link) for link in range(self.model.nvlink_count)]
        if not links:
            return {}
        up = {Fact.NVLINK_UP: dict.fromkeys(links, 1.0)}
        return {**up, **{fact: dict.fromkeys(links, 0.0) for fact in _LINK_FACTS}}


class JudgedNode:
    """Cards, a judge, and what is written down of what it remembers."""

    def __init__(
        self, cards: int = 2, model: GpuModel = H100, policy: Policy | None = None
    ) -> None:
        self.policy = policy or Policy()
        self.cards = [Card(number, number, model) for number in range(cards)]
        self.at, self.now = 1_750_000_000.0, 1000.0
        self.boot, self.sequence = 1, 0
        self.driver_version = "570.86.15"
        self.durable = Durable()
        self.written: list[Record] = []
        self.log_lines: list[KernelLine] = []  # of this boot
        self.disk_is_full = False
        self._since_slow = SLOW_SECONDS
        self.judge = self._begin()

    @property
    def history(self) -> History:
        """What is written down."""
        return self.durable.history

    # --- what is judged

    def gpu(self, card: int = 0) -> GpuHealth:
        """Return the verdict on one card."""
        return next(each for each in self.judge.gpus() if each.uuid == self.cards[card].uuid)

    def fault(self, check: Check, card: int = 0, code: str | None = None) -> Fault | None:
        """Return a fault that lasts, if there is one."""
        faults = self.gpu(card).faults
        return next(
            (each for each in faults if each.check is check and code in (None, each.code)), None
        )

    # --- what happens

    def tick(
        self,
        seconds: float = 1.0,
        *,
        slow: bool | None = None,
        xids: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Let a sampling tick pass; `xids` are events, by card."""
        self._pass(seconds)
        self._since_slow += seconds
        is_slow = self._since_slow >= SLOW_SECONDS if slow is None else slow
        if is_slow:
            self._since_slow = 0.0
        events = xids or {}
        readings = [
            card.read(
                self.at,
                slow=is_slow,
                xids=tuple(XidSeen(self.at, xid) for xid in events.get(index, ())),
            )
            for index, card in enumerate(self.cards)
            if not card.is_gone
        ]
        read = [reading for reading in readings if not reading.is_lost]
        gpus = [GpuTelemetry(each.uuid, self.at, {}, {}, (), {}) for each in read]
        self.judge.take_readings(self.at, self.now, readings, gpus)
        self._write()

    def run(self, seconds: float, step: float = 10.0) -> None:
        """Let time pass, with a tick every so many seconds."""
        for _ in range(round(seconds / step)):
            self.tick(step)

    def silence(self, seconds: float, reason: str = "the driver does not answer") -> None:
        """Let time pass in which nothing is read."""
        for _ in range(round(seconds)):
            self._pass(1.0)
            self.judge.take_silence(self.at, self.now, reason)
        self._write()

    def log(self, *texts: str, after: float = 0.0) -> None:
        """Let the kernel say something, and read it; `{}` is the first card's address."""
        self._pass(after)
        for text in texts:
            self.sequence += 1
            line = KernelLine(self.sequence, self.at, text.replace("{}", self._kernel_address))
            self.log_lines.append(line)
        self.judge.take_kernel_log(self.at, self.log_lines[-len(texts) :])
        self._write()

    def log_again(self) -> None:
        """Read the kernel's log of this boot from its start."""
        self.judge.take_kernel_log(self.at, self.log_lines)
        self._write()

    def look(self) -> None:
        """Let the driver count its GPUs."""
        self.judge.take_inventory(self.at, self.inventory())
        self._write()

    def inventory(self) -> NumberedInventory:
        """Return what the driver counts."""
        counted = [card for card in self.cards if not card.is_gone]
        gpus: list[NumberedGpu] = []
        missing: list[GpuFault] = []
        for index, card in enumerate(counted):
            if card.failure is not None:
                missing.append(GpuFault(index, card.uuid, *card.failure))
                continue
            identity = GpuIdentity(
                index,
                card.uuid,
                card.driver_name or card.model.driver_name,
                card.model.memory_total_bytes,
                card.pci_bus_id,
            )
            gpus.append(NumberedGpu(card.number + 1, identity))
        return NumberedInventory(self.driver_version, "12.8", tuple(gpus), tuple(missing))

    def reset(self, card: int = 0) -> None:
        """Reset a GPU after a while: its counters begin anew, and what is lost is found again."""
        self.run(30.0)
        self.cards[card].energy_joules = 0.0
        self.cards[card].facts.clear()
        self.cards[card].by_label.clear()
        self.cards[card].reasons.clear()
        self.cards[card].failure = None
        self.judge.take_driver_loaded(self.at)
        self.look()
        self.tick(slow=True)

    def restart(self) -> None:
        """Let the agent be killed, and start again on what is written down."""
        self.judge = self._begin()
        position = self.history.kernel_log
        is_of_boot = position is not None and position.boot_id == f"boot-{self.boot}"
        taken = position.sequence if position is not None and is_of_boot else 0
        self.judge.take_kernel_log(
            self.at, [line for line in self.log_lines if line.sequence > taken]
        )
        self._write()

    def reboot(self, *, seconds: float = 120.0, keeps: bool = False) -> None:
        """Let the host boot; `keeps`: what the cards tell stays as it is."""
        self.boot += 1
        self.at += seconds
        self.now, self.sequence, self.log_lines = 10.0, 0, []
        for card in self.cards:
            card.energy_joules = 0.0
            if not keeps:
                card.facts.clear()
                card.by_label.clear()
                card.reasons.clear()
                card.failure, card.is_gone = None, False
        self.judge = self._begin()
        self.tick(slow=True)

    def forgive(self, card: int = 0) -> tuple[str, ...]:
        """Let a person say that a card is mended."""
        forgiven = self.judge.forgive(self.at, self.cards[card].uuid)
        self._write()
        return forgiven

    @property
    def _kernel_address(self) -> str:
        return self.cards[0].kernel_address

    def _pass(self, seconds: float) -> None:
        self.at += seconds
        self.now += seconds
        for card in self.cards:
            card.energy_joules += 500.0 * seconds

    def _begin(self) -> Judge:
        self.judge = Judge(self.policy, f"boot-{self.boot}", self.history)
        self._write()
        self.look()
        return self.judge

    def _write(self) -> None:
        records = self.judge.take_records()
        if self.disk_is_full:
            self.judge.take_loss(records)
            return
        self.written += records
        self.durable = self.durable.after(records)
        assert self.durable.after(records) == self.durable  # applied twice equals once
