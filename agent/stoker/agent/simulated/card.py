"""How one simulated GPU behaves over time: power follows load, heat follows power, energy adds up.

Values move believably and can be had again: all chance comes from a seed, and what wanders is a
sum of slow waves of the clock, so two readings close in time are close in value. What counts up
(energy, busy time, traffic, time spent throttled) starts anew with the driver, by `reload`.
"""

import math
from collections import deque
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from stoker.agent.facts import CLOCK_EVENT_BITS, Fact
from stoker.agent.simulated.instances import IDLE, MigDevice, Work, random_uuid
from stoker.core.gpu_models import MHZ, GpuModel

_POWER_LAG_SECONDS = 1.0  # the sensor averages over about a second
_HEAT_LAG_SECONDS = 25.0  # a heat sink takes its time
_STEP_SECONDS = 0.25
# A long pause is taken in so many steps at most: it loses detail, not energy.
_STEPS_MAX = 400
_CLOCK_STEP_HERTZ = 15 * MHZ
_WAVE_SECONDS = (5.3, 17.9, 71.0)
# Above this share of the way from idle to the limit the driver holds the clocks down.
_CAPPED_FROM_SHARE = 0.93
# What a busy GPU moves, as a share of what its links can carry.
_PCIE_SENT_SHARE, _PCIE_RECEIVED_SHARE = 0.03, 0.05
_NVLINK_SENT_SHARE, _NVLINK_RECEIVED_SHARE = 0.20, 0.19
# Of one lane in one direction, by PCIe generation, after line coding.
_LANE_BYTES_PER_SECOND = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
_MEMORY_WARMER_CELSIUS = 7.0  # stacked memory beside an idle chip: 1 to 8 degrees were seen
# The driver's own samples are made of these; it keeps no more than 14 s of them.
_MOMENTS_MAX = 400
_GPU_IDLE, _SW_POWER_CAP = 0x1, 0x4
_REASON_BITS = {name: bit for bit, name in CLOCK_EVENT_BITS.items()}


class _Wander:
    """A smooth value in [-1, 1]."""

    def __init__(self, rng: Random) -> None:
        self._waves = tuple(
            (math.tau / (length * rng.uniform(0.8, 1.25)), rng.uniform(0, math.tau))
            for length in _WAVE_SECONDS
        )

    def at(self, now: float) -> float:
        sin = math.sin
        (rate1, phase1), (rate2, phase2), (rate3, phase3) = self._waves
        first, second = sin(now * rate1 + phase1), sin(now * rate2 + phase2)
        return (first + second + sin(now * rate3 + phase3)) / 3


class Moment(NamedTuple):
    """How the card was at one time; between two of them power changed evenly."""

    at: float
    load: float
    power_watts: float


# Unix seconds.
_LOADED_AT = 1_700_000_000.0


class SimulatedCard:
    """One GPU of a simulated node. `advance` moves it in time, `carry` gives it work."""

    def __init__(self, model: GpuModel, *, node: str, index: int, seed: int, now: float) -> None:
        """Make the card that `node` always has at `index`, idle since long."""
        rng = Random(f"{seed}/{node}/{index}")
        self.model = model
        self.index = index
        self.uuid = random_uuid("GPU", rng)
        self.serial = f"{rng.randrange(10**12, 10**13)}"
        self.pci_bus_number = 0x18 + index * 0x0D if index < 16 else 0x18 + index
        self._busy, self._warm, self._strained = _Wander(rng), _Wander(rng), _Wander(rng)
        self._now = now
        self._celsius = model.temperature_idle_celsius
        self.work = IDLE
        self.power_watts = model.power_idle_watts
        # What a scenario says instead of what would be, by fact and label.
        self.told: Mapping[tuple[Fact, str], float] = {}
        # MIG: the devices are complete when the mode is on.
        self.mig_enabled = False
        self.mig_devices: tuple[MigDevice, ...] = ()
        self.reload()
        # The driver has been loaded for long, and another process that opens it does not load it
        # anew: what this card has used by now is more than any process before can have told.
        self.energy_joules = model.power_limit_watts * max(0.0, now - _LOADED_AT)

    def reload(self) -> None:
        """Begin all counters anew, as a driver does that is loaded."""
        self.energy_joules = 0.0
        self.busy_seconds = 0.0
        self.throttled_seconds = dict.fromkeys(CLOCK_EVENT_BITS, 0.0)
        self.moments = deque((Moment(self._now, 0.0, self.power_watts),), _MOMENTS_MAX)
        for device in self.mig_devices:
            device.busy_seconds = 0.0

    @property
    def pci_bus_id(self) -> str:
        """As the driver writes it: "00000000:18:00.0"."""
        return f"00000000:{self.pci_bus_number:02X}:00.0"

    @property
    def now(self) -> float:
        """The time that it was brought to."""
        return self._now

    def carry(self, work: Work) -> None:
        """Let the processes on it do this work from now on."""
        room = self.model.memory_total_bytes - self.model.memory_reserved_bytes
        self.work = work.within(room)

    def advance(self, now: float) -> None:
        """Let time pass until `now`; a clock that went back moves nothing."""
        passed = now - self._now
        if passed <= 0:
            self._now = min(self._now, now)
            return
        steps = min(_STEPS_MAX, math.ceil(passed / _STEP_SECONDS))
        step = passed / steps
        power_share = -math.expm1(-step / _POWER_LAG_SECONDS)
        heat_share = -math.expm1(-step / _HEAT_LAG_SECONDS)
        load, throttled = self.work.utilization, self.throttled_seconds
        forced = self._forced_reasons()
        for number in range(1, steps + 1):
            at = self._now + number * step
            before = self.power_watts
            self.power_watts += (self._power_wanted(self._strained.at(at)) - before) * power_share
            self.energy_joules += (before + self.power_watts) / 2 * step
            self._celsius += (self._heat_wanted() - self._celsius) * heat_share
            if load:
                self.busy_seconds += self.utilization_at(at, load) * step
            if forced or load:
                for bit in self._reasons(forced):
                    throttled[bit] += step
            self.moments.append(Moment(at, load, self.power_watts))
        for device in self.mig_devices:
            device.busy_seconds += device.work.utilization * passed
        self._now = now

    def utilization_at(self, at: float, load: float) -> float:
        """The share of time around `at` in which a kernel runs; zero without work."""
        return min(1.0, max(0.01, load + 0.05 * self._busy.at(at))) if load else 0.0

    def memory_utilization_at(self, at: float, load: float) -> float:
        """The share of time around `at` in which memory is accessed."""
        return self.utilization_at(at, load) * (0.45 + 0.1 * self._strained.at(at))

    @property
    def memory_used_bytes(self) -> int:
        """What the processes hold."""
        return self.work.memory_bytes

    @property
    def utilization(self) -> float:
        """The share of time in which a kernel runs now."""
        return self.utilization_at(self._now, self.work.utilization)

    @property
    def memory_utilization(self) -> float:
        """The share of time in which memory is accessed now."""
        return self.memory_utilization_at(self._now, self.work.utilization)

    @property
    def celsius(self) -> float:
        """The chip's temperature, with what the room's air adds."""
        return self._celsius + 1.2 * self._warm.at(self._now)

    @property
    def memory_celsius(self) -> float | None:
        """The memory's temperature; None on boards that do not show it."""
        has_sensor = self.model.memory_temperature_max_celsius is not None
        return self.celsius + _MEMORY_WARMER_CELSIUS if has_sensor else None

    @property
    def sm_clock_hertz(self) -> float:
        """The clock of the multiprocessors, which gives way a little under load."""
        load = self.work.utilization
        if load == 0:
            return self.model.sm_clock_idle_hertz
        strain = 0.03 * load * (1 + self._strained.at(self._now)) / 2
        steps = self.model.sm_clock_busy_hertz * (1 - strain) // _CLOCK_STEP_HERTZ
        return steps * _CLOCK_STEP_HERTZ

    @property
    def memory_clock_hertz(self) -> float:
        """The clock of the memory."""
        model, busy = self.model, self.work.utilization
        return model.memory_clock_busy_hertz if busy else model.memory_clock_idle_hertz

    @property
    def video_clock_hertz(self) -> float:
        """The clock of the video engines."""
        model, busy = self.model, self.work.utilization
        return model.video_clock_busy_hertz if busy else model.video_clock_idle_hertz

    @property
    def clock_event_reasons(self) -> int:
        """The bits of what holds the clocks down, or lets them idle."""
        bits = sum(self._reasons(self._forced_reasons()))
        return bits | (0 if self.work.utilization else _GPU_IDLE)

    @property
    def pcie_bytes_per_second(self) -> float:
        """What the PCIe link can carry in one direction."""
        return self.model.pcie_lanes * _LANE_BYTES_PER_SECOND[self.model.pcie_generation]

    @property
    def pcie_bytes(self) -> tuple[float, float]:
        """What was sent and received over PCIe since the driver was loaded."""
        carried = self.busy_seconds * self.pcie_bytes_per_second
        return carried * _PCIE_SENT_SHARE, carried * _PCIE_RECEIVED_SHARE

    @property
    def nvlink_bytes(self) -> tuple[float, float]:
        """What was sent and received over each NVLink since the driver was loaded."""
        carried = self.busy_seconds * self.model.nvlink_bytes_per_second
        return carried * _NVLINK_SENT_SHARE, carried * _NVLINK_RECEIVED_SHARE

    def fact(self, fact: Fact, otherwise: float, label: str = "") -> float:
        """Return what the scenario tells of this fact, or else what would be."""
        return self.told.get((fact, label), otherwise)

    def _forced_reasons(self) -> tuple[int, ...]:
        if not self.told:
            return ()
        return tuple(
            bit
            for name, bit in _REASON_BITS.items()
            if self.told.get((Fact.CLOCK_EVENT_ACTIVE, name))
        )

    def _reasons(self, forced: tuple[int, ...]) -> tuple[int, ...]:
        capped = self._power_share() > _CAPPED_FROM_SHARE and _SW_POWER_CAP not in forced
        return (*forced, _SW_POWER_CAP) if capped else forced

    def _power_wanted(self, strain: float) -> float:
        model, load = self.model, self.work.utilization
        span = model.power_limit_watts - model.power_idle_watts
        wanted = model.power_idle_watts * (1 + 0.015 * strain) + 0.92 * span * load
        return min(model.power_limit_watts, wanted + 0.04 * span * load * strain)

    def _power_share(self) -> float:
        model = self.model
        span = model.power_limit_watts - model.power_idle_watts
        return max(0.0, (self.power_watts - model.power_idle_watts) / span)

    def _heat_wanted(self) -> float:
        model = self.model
        rise = model.temperature_busy_celsius - model.temperature_idle_celsius
        return model.temperature_idle_celsius + rise * self._power_share()
