"""GPUs for load generators: seeded, cheap, and with figures that move as a busy card's do."""

from random import Random
from uuid import UUID

from stoker.agent.facts import Fact
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory
from stoker.core.gpu_models import MODELS

_MODEL = MODELS["H100-80GB"]


class MovingGpus:
    """The GPUs of one node; every call of `readings` moves them on."""

    def __init__(self, gpus: int, interval_seconds: float, rng: Random) -> None:
        self._rng = rng
        self._interval_seconds = interval_seconds
        self._uuids = [f"GPU-{UUID(int=rng.getrandbits(128), version=4)}" for _ in range(gpus)]
        self._utilization = [rng.random() for _ in range(gpus)]
        self._energy_joules = [rng.uniform(1e6, 1e9) for _ in range(gpus)]

    def inventory(self, at: float) -> Inventory:
        """Return the GPUs."""
        return Inventory(
            at=at,
            driver_version="580.95.05",
            nvml_version="13.580.95",
            cuda_driver_version="13.0",
            simulated=True,
            gpus=tuple(
                GpuIdentity(
                    index=index,
                    uuid=uuid,
                    model=_MODEL.driver_name,
                    memory_total_bytes=_MODEL.memory_total_bytes,
                    pci_bus_id=f"00000000:{0x10 + index:02X}:00.0",
                    serial=f"16{index:011d}",
                    vbios_version=_MODEL.vbios_version,
                    minor_number=index,
                    compute_capability="9.0",
                    power_limit_watts=_MODEL.power_limit_watts,
                    mig_enabled=False,
                )
                for index, uuid in enumerate(self._uuids)
            ),
        )

    def readings(self, at: float) -> tuple[GpuReading, ...]:
        """Return a reading of every GPU."""
        return tuple(self._read(index, at) for index in range(len(self._uuids)))

    def _read(self, index: int, at: float) -> GpuReading:
        rng = self._rng
        # A walk that stays within bounds: every figure below follows it.
        busy = min(1.0, max(0.0, self._utilization[index] + rng.uniform(-0.1, 0.1)))
        self._utilization[index] = busy
        power_watts = _between(_MODEL.power_idle_watts, _MODEL.power_limit_watts, busy)
        self._energy_joules[index] += power_watts * self._interval_seconds
        room_bytes = _MODEL.memory_total_bytes - _MODEL.memory_reserved_bytes
        used_bytes = int(busy * room_bytes)
        celsius = _between(_MODEL.temperature_idle_celsius, _MODEL.temperature_busy_celsius, busy)
        facts = {
            Fact.MEMORY_TOTAL_BYTES: float(_MODEL.memory_total_bytes),
            Fact.MEMORY_USED_BYTES: float(used_bytes),
            Fact.MEMORY_RESERVED_BYTES: float(_MODEL.memory_reserved_bytes),
            Fact.MEMORY_FREE_BYTES: float(room_bytes - used_bytes),
            Fact.UTILIZATION_RATIO: busy,
            Fact.MEMORY_UTILIZATION_RATIO: busy / 2,
            Fact.TEMPERATURE_CELSIUS: float(round(celsius)),
            Fact.POWER_WATTS: power_watts,
            Fact.ENERGY_JOULES: self._energy_joules[index],
            Fact.SM_CLOCK_HERTZ: _MODEL.sm_clock_busy_hertz,
            Fact.MEMORY_CLOCK_HERTZ: _MODEL.memory_clock_busy_hertz,
        }
        return GpuReading(uuid=self._uuids[index], at=at, facts=facts)


def _between(low: float, high: float, ratio: float) -> float:
    return low + (high - low) * ratio
