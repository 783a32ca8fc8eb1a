"""The driver's own samples: what happened between two readings, not only at the last one.

The driver keeps a ring of samples for utilization (some per second) and power (some tens per
second). What is newer than the last one seen becomes an extent.
"""

from dataclasses import dataclass

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    FactUnavailable,
    FunctionMissing,
    GpuUnavailable,
)
from stoker.agent.facts import Fact
from stoker.agent.nvml.facts import Told
from stoker.agent.nvml.fields import value_of
from stoker.agent.nvml.session import Device, Session
from stoker.agent.nvml.table import SAMPLE, Code, SamplesType
from stoker.agent.nvml.units import Meaning, ratio, watts
from stoker.agent.readings import Extent

SAMPLES = "nvmlDeviceGetSamples"
# A ring that was never read: everything in it is newer.
_NEVER = 0


@dataclass(slots=True)
class _Ring:
    """One ring of one device."""

    samples_type: SamplesType
    fact: Fact
    meaning: Meaning
    last_seen_us: int = _NEVER


class SampleRings:
    """The rings of one device that are there, and how far each was read."""

    def __init__(self, session: Session, device: Device, *, mig_enabled: bool) -> None:
        """Take the device; of a GPU in MIG mode the driver keeps power only."""
        self._session, self._device = session, device
        self._rings = [_Ring(SamplesType.TOTAL_POWER, Fact.POWER_WATTS, watts)]
        if not mig_enabled:
            self._rings += [
                _Ring(SamplesType.GPU_UTILIZATION, Fact.UTILIZATION_RATIO, ratio),
                _Ring(SamplesType.MEMORY_UTILIZATION, Fact.MEMORY_UTILIZATION_RATIO, ratio),
            ]
        try:
            self._function = session.find(SAMPLES)
        except FunctionMissing:
            self._rings = []

    def read(self, told: Told) -> None:
        """Take in the extents; raises DriverUnavailable and GpuUnavailable."""
        for ring in tuple(self._rings):
            try:
                self._read(ring, told)
            except FactUnavailable:
                self._rings.remove(ring)
            except (DriverUnavailable, GpuUnavailable):
                raise
            except DriverError as error:
                told.fail(ring.fact, error)

    def _read(self, ring: _Ring, told: Told) -> None:
        device, since = self._device, ring.last_seen_us
        answer = self._session.call_unless(
            *(Code.NOT_FOUND, device, SAMPLES, self._function),
            *(device.handle, int(ring.samples_type), since),
        )
        if answer is None:
            return  # nothing new
        value_type, samples = answer
        values: list[float] = []
        for sample in samples:
            timestamp, raw = SAMPLE.unpack_from(sample)
            if timestamp <= since:
                continue  # an empty place in the ring, or one seen before
            ring.last_seen_us = max(ring.last_seen_us, timestamp)
            value = value_of(value_type, raw)
            meant = None if value is None else ring.meaning(value)
            if meant is not None:
                values.append(meant)
        # The first time the ring holds what was before anybody asked.
        if values and since != _NEVER:
            mean = sum(values) / len(values)
            told.extents[ring.fact] = Extent(min(values), max(values), mean, len(values))
