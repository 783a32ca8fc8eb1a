"""Two readings of a GPU become a sample: what it is now, and what it did in between."""

from stoker.agent.facts import Fact
from stoker.agent.readings import GpuReading, GpuSample

# The energy counter moves in steps of up to 0.1 s: over a shorter time a mean is mostly noise.
MEAN_SECONDS_MIN = 0.5
# Over a longer time a mean says little about the moment that the sample is of.
MEAN_SECONDS_MAX = 10.0
# No board draws more: the counter was reset and overtook its old value, or jumped.
_WATTS_MAX = 10_000.0


def sample(previous: GpuReading | None, current: GpuReading) -> GpuSample:
    """Return the sample at the time of `current`; `previous` is the reading of the same GPU before.

    Power is the mean that the energy counter tells, because the power sensor of some boards looks
    only a quarter of the time; without it, it is what the sensor says.
    """
    assert previous is None or previous.uuid == current.uuid
    told = current.facts.get
    mean_watts = mean_power(previous, current) if previous else None
    return GpuSample(
        uuid=current.uuid,
        at=current.at,
        memory_total_bytes=_whole(told(Fact.MEMORY_TOTAL_BYTES)),
        memory_used_bytes=_whole(told(Fact.MEMORY_USED_BYTES)),
        memory_reserved_bytes=_whole(told(Fact.MEMORY_RESERVED_BYTES)),
        memory_free_bytes=_whole(told(Fact.MEMORY_FREE_BYTES)),
        utilization_ratio=told(Fact.UTILIZATION_RATIO),
        memory_utilization_ratio=told(Fact.MEMORY_UTILIZATION_RATIO),
        temperature_celsius=told(Fact.TEMPERATURE_CELSIUS),
        power_watts=told(Fact.POWER_WATTS) if mean_watts is None else mean_watts,
        energy_joules_total=told(Fact.ENERGY_JOULES),
        sm_clock_hertz=told(Fact.SM_CLOCK_HERTZ),
        memory_clock_hertz=told(Fact.MEMORY_CLOCK_HERTZ),
    )


def mean_power(previous: GpuReading, current: GpuReading) -> float | None:
    """Return the mean power in watts between two readings, where the energy counter can tell it."""
    seconds = current.at - previous.at
    if not MEAN_SECONDS_MIN <= seconds <= MEAN_SECONDS_MAX:
        return None
    before, after = (each.facts.get(Fact.ENERGY_JOULES) for each in (previous, current))
    watts = rate(before, after, seconds)
    return watts if watts is not None and watts <= _WATTS_MAX else None


def rate(before: float | None, after: float | None, seconds: float) -> float | None:
    """Return the growth of a counter per second; None when it is absent or went backwards.

    A counter goes backwards when the driver is loaded anew: what it counted before is lost.
    """
    if before is None or after is None or after < before or seconds <= 0:
        return None
    return (after - before) / seconds


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
