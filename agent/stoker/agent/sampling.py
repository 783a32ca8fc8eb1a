"""Two readings of a GPU become a sample: what it is now, and what it did in between."""

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
    mean_watts = mean_power(previous, current) if previous else None
    return GpuSample(
        uuid=current.uuid,
        at=current.at,
        memory_total_bytes=current.memory_total_bytes,
        memory_used_bytes=current.memory_used_bytes,
        memory_reserved_bytes=current.memory_reserved_bytes,
        memory_free_bytes=current.memory_free_bytes,
        utilization_ratio=current.utilization_ratio,
        memory_utilization_ratio=current.memory_utilization_ratio,
        temperature_celsius=current.temperature_celsius,
        power_watts=current.power_watts if mean_watts is None else mean_watts,
        energy_joules_total=current.energy_joules,
        sm_clock_hertz=current.sm_clock_hertz,
        memory_clock_hertz=current.memory_clock_hertz,
    )


def mean_power(previous: GpuReading, current: GpuReading) -> float | None:
    """Return the mean power in watts between two readings, where the energy counter can tell it."""
    seconds = current.at - previous.at
    if not MEAN_SECONDS_MIN <= seconds <= MEAN_SECONDS_MAX:
        return None
    watts = rate(previous.energy_joules, current.energy_joules, seconds)
    return watts if watts is not None and watts <= _WATTS_MAX else None


def rate(before: float | None, after: float | None, seconds: float) -> float | None:
    """Return the growth of a counter per second; None when it is absent or went backwards.

    A counter goes backwards when the driver is loaded anew: what it counted before is lost.
    """
    if before is None or after is None or after < before or seconds <= 0:
        return None
    return (after - before) / seconds
