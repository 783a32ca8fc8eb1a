"""How one simulated GPU behaves over time: power follows load, heat follows power, energy adds up.

Values move believably and can be had again: all chance comes from a seed, and what wanders is a
sum of slow waves of the clock, so two readings close in time are close in value.
"""

import math
from random import Random

from stoker.core.gpu_models import MHZ, GpuModel

_POWER_LAG_SECONDS = 1.0  # the sensor averages over about a second
_HEAT_LAG_SECONDS = 25.0  # a heat sink takes its time
_STEP_SECONDS = 0.25
# A long pause is taken in so many steps at most: it loses detail, not energy.
_STEPS_MAX = 400
_CLOCK_STEP_HERTZ = 15 * MHZ
_WAVE_SECONDS = (5.3, 17.9, 71.0)


class _Wander:
    """A smooth value in [-1, 1]."""

    def __init__(self, rng: Random) -> None:
        self._waves = tuple(
            (math.tau / (length * rng.uniform(0.8, 1.25)), rng.uniform(0, math.tau))
            for length in _WAVE_SECONDS
        )

    def at(self, now: float) -> float:
        return sum(math.sin(now * rate + phase) for rate, phase in self._waves) / len(self._waves)


class SimulatedCard:
    """One GPU of a simulated node. `advance` moves it in time, `carry` gives it work."""

    def __init__(self, model: GpuModel, *, node: str, index: int, seed: int, now: float) -> None:
        """Make the card that `node` always has at `index`, idle since long."""
        rng = Random(f"{seed}/{node}/{index}")
        self.model = model
        self.index = index
        self.uuid = _uuid(rng)
        self.serial = f"{rng.randrange(10**12, 10**13)}"
        self.pci_bus_number = 0x18 + index * 0x0D if index < 16 else 0x18 + index
        self._busy, self._warm, self._strained = _Wander(rng), _Wander(rng), _Wander(rng)
        self._load = 0.0
        self._now = now
        self.memory_used_bytes = 0
        self.power_watts = model.power_idle_watts
        self.energy_joules = 0.0  # since the driver was loaded, as on a real card
        self._celsius = model.temperature_idle_celsius

    @property
    def pci_bus_id(self) -> str:
        """As the driver writes it: "00000000:18:00.0"."""
        return f"00000000:{self.pci_bus_number:02X}:00.0"

    def carry(self, *, memory_bytes: int, utilization: float) -> None:
        """Let the processes on it hold so many bytes and keep it busy for this share of time."""
        room = self.model.memory_total_bytes - self.model.memory_reserved_bytes
        self.memory_used_bytes = min(memory_bytes, room)
        self._load = min(1.0, max(0.0, utilization))

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
        for number in range(1, steps + 1):
            at = self._now + number * step
            before = self.power_watts
            self.power_watts += (self._power_wanted(at) - before) * power_share
            self.energy_joules += (before + self.power_watts) / 2 * step
            self._celsius += (self._heat_wanted() - self._celsius) * heat_share
        self._now = now

    @property
    def utilization(self) -> float:
        """The share of time in which a kernel runs; zero without work."""
        if self._load == 0:
            return 0.0
        return min(1.0, max(0.01, self._load + 0.05 * self._busy.at(self._now)))

    @property
    def memory_utilization(self) -> float:
        """The share of time in which memory is accessed."""
        return self.utilization * (0.45 + 0.1 * self._strained.at(self._now))

    @property
    def celsius(self) -> float:
        """The chip's temperature, with what the room's air adds."""
        return self._celsius + 1.2 * self._warm.at(self._now)

    @property
    def sm_clock_hertz(self) -> float:
        """The clock of the multiprocessors, which gives way a little under load."""
        if self._load == 0:
            return self.model.sm_clock_idle_hertz
        strain = 0.03 * self._load * (1 + self._strained.at(self._now)) / 2
        steps = self.model.sm_clock_busy_hertz * (1 - strain) // _CLOCK_STEP_HERTZ
        return steps * _CLOCK_STEP_HERTZ

    @property
    def memory_clock_hertz(self) -> float:
        """The clock of the memory."""
        model = self.model
        return model.memory_clock_busy_hertz if self._load else model.memory_clock_idle_hertz

    def _power_wanted(self, at: float) -> float:
        model, strain = self.model, self._strained.at(at)
        span = model.power_limit_watts - model.power_idle_watts
        wanted = model.power_idle_watts * (1 + 0.015 * strain) + 0.92 * span * self._load
        return min(model.power_limit_watts, wanted + 0.04 * span * self._load * strain)

    def _heat_wanted(self) -> float:
        model = self.model
        span = model.power_limit_watts - model.power_idle_watts
        share = max(0.0, (self.power_watts - model.power_idle_watts) / span)
        rise = model.temperature_busy_celsius - model.temperature_idle_celsius
        return model.temperature_idle_celsius + rise * share


def _uuid(rng: Random) -> str:
    """Return "GPU-" and a random UUID (RFC 9562, version 4), as real cards have them."""
    bits = rng.getrandbits(128)
    bits = bits & ~(0xF << 76) | 4 << 76
    bits = bits & ~(0b11 << 62) | 0b10 << 62
    text = f"{bits:032x}"
    return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
