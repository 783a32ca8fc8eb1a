"""The driver's own sample buffers of a simulated GPU: the last moments, newer than asked for.

Spacing and length are those seen on a card with driver 610: 119 samples of power, one every 20 ms,
and 71 of utilization, one every 200 ms; no samples of clocks.
"""

# ruff: noqa: N802 (the names are the driver's own)

import math
import struct
from collections.abc import Callable
from typing import Any

from stoker.agent.simulated.card import Moment, SimulatedCard
from stoker.agent.simulated.gauges import fail_in_mig_mode
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import SimulatedSession, of_card

_MICROSECONDS = 1_000_000
_POWER_PERIOD, _POWER_COUNT = 20_000, 119  # periods in microseconds
_LOAD_PERIOD, _LOAD_COUNT = 200_000, 71
# How far single samples of power lie from the mean of a second, under load.
_RIPPLE = 0.06
_RIPPLES = 41.0  # radians per second: a few in every second

_Value = Callable[[SimulatedCard, float, float], float]


class SampleFunctions(SimulatedSession):
    """Questions about the last seconds."""

    @of_card
    def nvmlDeviceGetSamples(
        self, card: SimulatedCard, sampling_type: int, last_seen: int, /
    ) -> tuple[int, list[Any]]:
        if not 0 <= sampling_type < NVML.NVML_SAMPLINGTYPE_COUNT:
            raise error("INVALID_ARGUMENT")
        if sampling_type == NVML.NVML_TOTAL_POWER_SAMPLES:
            told = _power_samples(card, last_seen)
        elif sampling_type in _LOADS:
            fail_in_mig_mode(card)
            told = _load_samples(card, last_seen, _LOADS[sampling_type])
        else:
            raise error("NOT_SUPPORTED")
        if not told:
            raise error("NOT_FOUND")
        count = len(told) // 2
        # A sample is its time and the union of values, of which an integer is the low part.
        samples = (NVML.c_nvmlSample_t * count).from_buffer_copy(
            struct.pack(f"@{2 * count}Q", *told)
        )
        return NVML.NVML_VALUE_TYPE_UNSIGNED_INT, samples[0:count]


_LOADS: dict[int, _Value] = {
    NVML.NVML_GPU_UTILIZATION_SAMPLES: SimulatedCard.utilization_at,
    NVML.NVML_MEMORY_UTILIZATION_SAMPLES: SimulatedCard.memory_utilization_at,
    NVML.NVML_ENC_UTILIZATION_SAMPLES: lambda card, at, load: card.work.encoder,
    NVML.NVML_DEC_UTILIZATION_SAMPLES: lambda card, at, load: card.work.decoder,
    NVML.NVML_JPG_UTILIZATION_SAMPLES: lambda card, at, load: 0.0,
    NVML.NVML_OFA_UTILIZATION_SAMPLES: lambda card, at, load: 0.0,
}


def _load_samples(card: SimulatedCard, last_seen: int, value: _Value) -> list[int]:
    told: list[int] = []
    for times, _, after in _stretches(card, last_seen, _LOAD_PERIOD, _LOAD_COUNT):
        for at in times:
            told += (at, round(100 * value(card, at / _MICROSECONDS, after.load)))
    return told


def _power_samples(card: SimulatedCard, last_seen: int) -> list[int]:
    told: list[int] = []
    idle, sin = 1000 * card.model.power_idle_watts, math.sin
    for times, before, after in _stretches(card, last_seen, _POWER_PERIOD, _POWER_COUNT):
        rise = 1000 * (after.power_watts - before.power_watts) / (after.at - before.at)
        start = 1000 * before.power_watts - before.at * rise
        for at in times:
            seconds = at / _MICROSECONDS
            milliwatts = start + seconds * rise
            if milliwatts > idle:
                milliwatts += (milliwatts - idle) * _RIPPLE * sin(seconds * _RIPPLES)
            told += (at, int(milliwatts))
    return told


def _stretches(
    card: SimulatedCard, last_seen: int, period: int, count: int
) -> list[tuple[range, Moment, Moment]]:
    """Return the buffer's times later than `last_seen`, by the moments between which they lie."""
    moments = list(card.moments)
    newest = int(moments[-1].at * _MICROSECONDS) // period
    # The first one that is not seen, and no older than the buffer and the card's memory are.
    first = max(newest - count, last_seen // period) + 1
    found: list[tuple[range, Moment, Moment]] = []
    for place in range(len(moments) - 1, 0, -1):
        before, after = moments[place - 1], moments[place]
        begin = int(before.at * _MICROSECONDS) // period + 1
        end = int(after.at * _MICROSECONDS) // period + 1
        times = range(max(begin, first) * period, end * period, period)
        if times:
            found.append((times, before, after))
        if begin <= first:
            break
    found.reverse()
    return found
