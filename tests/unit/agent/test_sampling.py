"""Two readings make a sample: what counters tell over the time between, what gauges tell now."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.facts import Fact
from stoker.agent.readings import GpuReading, GpuSample
from stoker.agent.sampling import MEAN_SECONDS_MAX, MEAN_SECONDS_MIN, rate, sample

FULL = GpuReading(
    uuid="GPU-a",
    at=100.0,
    facts={
        Fact.MEMORY_TOTAL_BYTES: 80,
        Fact.MEMORY_USED_BYTES: 20,
        Fact.MEMORY_RESERVED_BYTES: 5,
        Fact.MEMORY_FREE_BYTES: 55,
        Fact.UTILIZATION_RATIO: 0.9,
        Fact.MEMORY_UTILIZATION_RATIO: 0.4,
        Fact.TEMPERATURE_CELSIUS: 61.0,
        Fact.POWER_WATTS: 500.0,
        Fact.ENERGY_JOULES: 10_000.0,
        Fact.SM_CLOCK_HERTZ: 1.98e9,
        Fact.MEMORY_CLOCK_HERTZ: 2.619e9,
    },
)
NOTHING = GpuReading("GPU-a", 101.0)


def without(fact: Fact) -> GpuReading:
    return replace(FULL, facts={name: FULL.facts[name] for name in FULL.facts if name != fact})


def after(seconds: float, joules: float | None) -> GpuReading:
    told = without(Fact.ENERGY_JOULES)
    facts = told.facts if joules is None else {**told.facts, Fact.ENERGY_JOULES: joules}
    return replace(told, at=FULL.at + seconds, facts=facts)


@pytest.mark.parametrize(
    ("name", "previous", "current", "watts"),
    [
        ("the first reading has only the sensor", None, FULL, 500.0),
        ("the mean over the interval beats the sensor", FULL, after(2, 11_400.0), 700.0),
        ("an idle card used what it used", FULL, after(1, 10_068.6), pytest.approx(68.6)),
        ("no counter before", without(Fact.ENERGY_JOULES), after(1, 10_600.0), 500.0),
        ("no counter now", FULL, after(1, None), 500.0),
        ("the counter went backwards: the driver was reloaded", FULL, after(1, 12.0), 500.0),
        ("the counter stood still: no board draws nothing, but it says so", FULL, after(1, 1e4), 0),
        ("the counter jumped beyond any board", FULL, after(1, 1e9), 500.0),
        ("too short for the counter's steps", FULL, after(MEAN_SECONDS_MIN / 2, 10_300.0), 500.0),
        ("too long to be about now", FULL, after(MEAN_SECONDS_MAX * 2, 24_000.0), 500.0),
        ("the clock was set back", FULL, after(-5, 10_600.0), 500.0),
        ("the same reading twice", FULL, FULL, 500.0),
        ("neither counter nor sensor", NOTHING, NOTHING, None),
    ],
)
def test_power(
    name: str, previous: GpuReading | None, current: GpuReading, watts: float | None
) -> None:
    assert sample(previous, current).power_watts == watts, name


def test_gauges_are_those_of_the_later_reading() -> None:
    told = sample(NOTHING, FULL)
    assert told == GpuSample(
        uuid="GPU-a",
        at=100.0,
        memory_total_bytes=80,
        memory_used_bytes=20,
        memory_reserved_bytes=5,
        memory_free_bytes=55,
        utilization_ratio=0.9,
        memory_utilization_ratio=0.4,
        temperature_celsius=61.0,
        power_watts=500.0,
        energy_joules_total=10_000.0,
        sm_clock_hertz=1.98e9,
        memory_clock_hertz=2.619e9,
    )


def test_what_was_not_read_is_absent_and_never_what_it_was_before() -> None:
    told = sample(FULL, NOTHING)
    assert told == GpuSample(uuid="GPU-a", at=101.0)
    assert told.is_empty


@pytest.mark.parametrize("fact", FULL.facts)
def test_one_absent_fact_leaves_the_others(fact: Fact) -> None:
    told = sample(None, without(fact))
    absent = [f.name for f in fields(told) if getattr(told, f.name) is None]
    assert absent == [{"energy_joules": "energy_joules_total"}.get(fact, fact)]


def test_readings_of_two_gpus_are_never_mixed() -> None:
    with pytest.raises(AssertionError):
        sample(replace(FULL, uuid="GPU-b"), FULL)


@given(
    before=st.floats(0, 1e15),
    after=st.floats(0, 1e15),
    seconds=st.integers(-10_000, 10**9).map(lambda milliseconds: milliseconds / 1000),
)
def test_a_rate_is_never_negative_and_gives_the_growth_back(
    before: float, after: float, seconds: float
) -> None:
    told = rate(before, after, seconds)
    if after < before or seconds <= 0:
        assert told is None
    else:
        assert told is not None
        assert told >= 0
        assert told * seconds == pytest.approx(after - before, rel=1e-9)
