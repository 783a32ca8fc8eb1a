"""The picture of a GPU: nothing in it is older than it may be, and nothing outlives a failure."""

import math
import pickle
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.facts import Fact, Rate
from stoker.agent.readings import (
    WHOLE_GPU,
    Extent,
    GpuReading,
    MigDeviceReading,
    ReadFailure,
    XidSeen,
)
from stoker.agent.telemetry import WINDOW_PARTS, XIDS_MAX, GpuTelemetry, Telemetry, XidCount

SLOW_SECONDS, WINDOW_SECONDS = 10.0, 60.0
BOTH = (Rate.FAST, Rate.SLOW)
LOST = ReadFailure(WHOLE_GPU, "gpu_lost", "it fell off the bus")


class Picture:
    """Telemetry of one GPU on a clock of its own."""

    def __init__(self) -> None:
        self.telemetry = Telemetry(slow_seconds=SLOW_SECONDS, window_seconds=WINDOW_SECONDS)
        self.now = 1000.0

    def read(
        self,
        facts: Mapping[Fact, float],
        *rates: Rate,
        after: float = 1.0,
        uuid: str = "GPU-a",
        by_label: Mapping[Fact, Mapping[str, float]] | None = None,
        extents: Mapping[Fact, Extent] | None = None,
        mig_devices: tuple[MigDeviceReading, ...] = (),
        failures: tuple[ReadFailure, ...] = (),
        xids: Sequence[int] = (),
    ) -> None:
        self.now += after
        reading = GpuReading(
            uuid=uuid,
            at=self.now,
            rates=rates or (Rate.FAST,),
            facts=facts,
            by_label=by_label or {},
            extents=extents or {},
            xids=tuple(XidSeen(self.now, each) for each in xids),
            mig_devices=mig_devices,
            failures=failures,
        )
        self.telemetry.take((reading,), self.now)

    @property
    def gpu(self) -> GpuTelemetry:
        (told,) = self.telemetry.gpus(self.now)
        return told


HOT = {Fact.TEMPERATURE_CELSIUS: 60.0}
WIDE = {Fact.TEMPERATURE_CELSIUS: 60.0, Fact.PCIE_LINK_WIDTH: 16.0}


def test_a_slow_fact_is_told_between_its_readings() -> None:
    picture = Picture()
    links = {Fact.NVLINK_UP: {"0": 1.0, "1": 0.0}}
    picture.read(WIDE, *BOTH, by_label=links)
    picture.read({Fact.TEMPERATURE_CELSIUS: 61.0})
    assert picture.gpu.facts == {Fact.TEMPERATURE_CELSIUS: 61.0, Fact.PCIE_LINK_WIDTH: 16.0}
    assert picture.gpu.by_label == links


def test_a_slow_fact_is_told_no_longer_than_three_of_its_intervals() -> None:
    picture = Picture()
    picture.read(WIDE, *BOTH)
    picture.read(HOT, after=3 * SLOW_SECONDS)
    assert Fact.PCIE_LINK_WIDTH in picture.gpu.facts
    picture.read(HOT, after=0.1)
    assert picture.gpu.facts == HOT


def test_a_slow_fact_that_its_next_reading_does_not_tell_is_gone_at_once() -> None:
    picture = Picture()
    picture.read(WIDE, *BOTH)
    picture.read(HOT, *BOTH)
    assert picture.gpu.facts == HOT


def test_a_fast_fact_that_is_not_told_is_gone_at_once() -> None:
    picture = Picture()
    picture.read({**WIDE, Fact.SM_CLOCK_HERTZ: 1e9}, *BOTH)
    picture.read(HOT)
    assert Fact.SM_CLOCK_HERTZ not in picture.gpu.facts


@pytest.mark.parametrize("how", ["it is lost", "nothing was told", "it is not among the readings"])
def test_a_gpu_that_was_not_read_has_nothing_left_not_even_slow_facts(how: str) -> None:
    picture = Picture()
    picture.read(WIDE, *BOTH, extents={Fact.POWER_WATTS: Extent(1.0, 9.0, 5.0, 4)})
    match how:
        case "it is lost":
            picture.read({}, failures=(LOST,))
        case "nothing was told":
            picture.read({})
        case _:
            picture.read(HOT, uuid="GPU-b")
    told = {each.uuid: each.facts for each in picture.telemetry.gpus(picture.now)}
    assert "GPU-a" not in told
    picture.read(HOT)
    assert (picture.gpu.facts, dict(picture.gpu.extents)) == (HOT, {})


def test_a_failed_tick_leaves_nothing() -> None:
    picture = Picture()
    picture.read(WIDE, *BOTH)
    picture.telemetry.forget()
    assert picture.telemetry.gpus(picture.now) == ()
    picture.read(HOT)
    assert picture.gpu.facts == HOT


def test_power_is_the_mean_that_the_energy_counter_tells() -> None:
    picture = Picture()
    picture.read({Fact.POWER_WATTS: 500.0, Fact.ENERGY_JOULES: 1000.0})
    assert picture.gpu.facts[Fact.POWER_WATTS] == 500.0
    picture.read({Fact.POWER_WATTS: 500.0, Fact.ENERGY_JOULES: 1300.0})
    assert picture.gpu.facts[Fact.POWER_WATTS] == 300.0


def test_the_extent_spans_the_driver_s_own_samples_over_the_window() -> None:
    picture = Picture()
    for least, most in ((0.2, 0.4), (0.0, 0.1), (0.5, 1.0)):
        mean = (least + most) / 2
        picture.read(
            {Fact.UTILIZATION_RATIO: most},
            extents={Fact.UTILIZATION_RATIO: Extent(least, most, mean, 6)},
        )
    extent = picture.gpu.extents[Fact.UTILIZATION_RATIO]
    assert (extent.least, extent.most, extent.samples) == (0.0, 1.0, 18)
    assert extent.mean == pytest.approx((0.3 + 0.05 + 0.75) / 3)


def test_the_extent_forgets_what_is_older_than_the_window() -> None:
    picture = Picture()
    picture.read({Fact.UTILIZATION_RATIO: 1.0})
    picture.read({Fact.UTILIZATION_RATIO: 0.25}, after=WINDOW_SECONDS - 1)
    assert picture.gpu.extents[Fact.UTILIZATION_RATIO].most == 1.0
    picture.read({Fact.UTILIZATION_RATIO: 0.5}, after=1.0)
    extent = picture.gpu.extents[Fact.UTILIZATION_RATIO]
    assert extent == Extent(0.25, 0.5, 0.375, 2)


@given(
    st.lists(st.tuples(st.floats(0.01, 30.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1)
)
def test_the_extent_is_that_of_the_readings_in_the_window(
    ticks: list[tuple[float, float, float]],
) -> None:
    """Readings closer than a part of the window go with the first of that part."""
    picture = Picture()
    read: list[tuple[float, Extent]] = []
    for seconds, one, other in ticks:
        extent = Extent(min(one, other), max(one, other), (one + other) / 2, 2)
        picture.read(HOT, after=seconds, extents={Fact.UTILIZATION_RATIO: extent})
        read.append((picture.now, extent))
        begin = picture.now - WINDOW_SECONDS
        within = [each for at, each in read if at > begin]
        surely = [each for at, each in read if at > begin + WINDOW_SECONDS / WINDOW_PARTS]
        told = picture.gpu.extents[Fact.UTILIZATION_RATIO]
        assert min(e.least for e in within) <= told.least <= min(e.least for e in surely)
        assert max(e.most for e in surely) <= told.most <= max(e.most for e in within)
        assert told.least <= told.mean <= told.most
        assert 2 * len(surely) <= told.samples <= 2 * len(within)
        if len(surely) == len(within):
            assert told.mean == pytest.approx(sum(e.mean for e in within) / len(within))


def test_a_window_does_not_grow_with_the_number_of_readings() -> None:
    def size(readings_in_a_part: int) -> int:
        picture = Picture()
        seconds = WINDOW_SECONDS / WINDOW_PARTS / readings_in_a_part
        for number in range(2 * WINDOW_PARTS * readings_in_a_part):
            value = 0.5 + 0.4 * math.sin(number)
            picture.read({Fact.UTILIZATION_RATIO: value}, after=seconds)
        return len(pickle.dumps(picture.telemetry))

    assert size(32) < 1.1 * size(8)


def test_a_fact_that_is_not_told_has_no_extent_any_more() -> None:
    picture = Picture()
    picture.read({Fact.UTILIZATION_RATIO: 1.0})
    picture.read(HOT)
    assert picture.gpu.extents == {}


def test_a_mig_device_keeps_its_slow_facts_and_loses_them_with_its_uuid() -> None:
    def device(uuid: str, **facts: float) -> MigDeviceReading:
        return MigDeviceReading(uuid, 1, 0, "3g.40gb", {Fact(k): v for k, v in facts.items()})

    picture = Picture()
    picture.read(
        HOT,
        *BOTH,
        mig_devices=(device("MIG-a", memory_used_bytes=5.0, ecc_corrected_volatile_errors=2.0),),
    )
    picture.read(HOT, mig_devices=(device("MIG-a", memory_used_bytes=6.0),))
    (told,) = picture.gpu.mig_devices
    assert told.facts == {
        Fact.MEMORY_USED_BYTES: 6.0,
        Fact.ECC_CORRECTED_VOLATILE_ERRORS: 2.0,
    }
    picture.read(HOT, mig_devices=(device("MIG-b", memory_used_bytes=7.0),))
    assert [(each.uuid, each.facts) for each in picture.gpu.mig_devices] == [
        ("MIG-b", {Fact.MEMORY_USED_BYTES: 7.0})
    ]


def test_xids_are_counted_and_outlive_the_gpu_that_they_killed() -> None:
    picture = Picture()
    picture.read(HOT, xids=(31, 31))
    picture.read({}, failures=(LOST,), xids=(79,))
    picture.telemetry.forget()
    assert picture.telemetry.xids == {
        "GPU-a": {31: XidCount(2, 1001.0), 79: XidCount(1, 1002.0)},
    }


def test_a_driver_that_makes_numbers_up_cannot_fill_the_page() -> None:
    picture = Picture()
    picture.read(HOT, xids=range(10 * XIDS_MAX))
    picture.read(HOT, xids=(0, XIDS_MAX))
    counts = picture.telemetry.xids["GPU-a"]
    assert len(counts) == XIDS_MAX
    assert counts[0].total == 2


def test_failures_are_counted_by_fact_and_kind() -> None:
    picture = Picture()
    strange = ReadFailure(Fact.POWER_WATTS, "not_available", "x")
    picture.read(HOT, failures=(strange,))
    picture.read(HOT, failures=(strange, LOST))
    assert picture.telemetry.failures == {
        ("power_watts", "not_available"): 2,
        (WHOLE_GPU, "gpu_lost"): 1,
    }


@given(
    st.lists(
        st.tuples(
            st.floats(0.1, 40.0),  # seconds since the tick before
            st.booleans(),  # whether slow facts have their turn
            st.sampled_from(["told", "half", "lost", "failed"]),
        ),
        max_size=30,
    )
)
def test_nothing_is_told_that_is_older_than_its_rate_allows(
    ticks: list[tuple[float, bool, str]],
) -> None:
    """Every value is the time at which it was read, so the picture tells its own age."""
    picture = Picture()
    for seconds, is_slow_turn, outcome in ticks:
        if outcome == "failed":
            picture.now += seconds
            picture.telemetry.forget()
            assert picture.telemetry.gpus(picture.now) == ()
            continue
        at = picture.now + seconds
        facts = {Fact.TEMPERATURE_CELSIUS: at}
        if is_slow_turn and outcome == "told":
            facts[Fact.PCIE_REPLAYS] = at
        is_lost = outcome == "lost"
        picture.read(
            {} if is_lost else facts,
            *(BOTH if is_slow_turn else ()),
            after=seconds,
            failures=(LOST,) if is_lost else (),
        )
        for told in picture.telemetry.gpus(picture.now):
            assert told.facts[Fact.TEMPERATURE_CELSIUS] == picture.now
            replays_at = told.facts.get(Fact.PCIE_REPLAYS, picture.now)
            assert picture.now - replays_at <= 3 * SLOW_SECONDS
        assert bool(picture.telemetry.gpus(picture.now)) is not is_lost
