"""The driver's sample rings become what happened between two readings."""

from collections.abc import Sequence
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import Rig, failed

from stoker.agent.facts import Fact
from stoker.agent.readings import Extent
from stoker.agent.simulated.scenario import Fail, Missing, ScriptedMig, ScriptedProcess

NVML: Any = pynvml
UINT = NVML.NVML_VALUE_TYPE_UNSIGNED_INT
SAMPLES = "nvmlDeviceGetSamples"
GPU = NVML.NVML_GPU_UTILIZATION_SAMPLES
MEMORY = NVML.NVML_MEMORY_UTILIZATION_SAMPLES
POWER = NVML.NVML_TOTAL_POWER_SAMPLES


class Ring:
    """A ring of the driver that answers what it is filled with, and remembers who asked."""

    def __init__(self) -> None:
        self.samples: dict[int, list[tuple[int, int]]] = {}
        self.since: dict[int, list[int]] = {}

    def __call__(self, handle: Any, samples_type: int, last_seen: int) -> tuple[int, list[Any]]:
        self.since.setdefault(samples_type, []).append(last_seen)
        filled = self.samples.get(samples_type, [])
        if not filled:
            raise NVML.NVMLError(NVML.NVML_ERROR_NOT_FOUND)
        array = (NVML.c_nvmlSample_t * len(filled))()
        for made, (timestamp, value) in zip(array, filled, strict=True):
            made.timeStamp = timestamp
            made.sampleValue.ullVal = value | 0xAB << 32  # beyond the number of 32 bits: nothing
        return UINT, array[0 : len(filled)]


def rig_with(ring: Ring) -> Rig:
    rig = Rig(gpus=1)
    rig.nvml.nvmlDeviceGetSamples = ring  # type: ignore[method-assign]
    return rig.opened()


@pytest.mark.parametrize(
    ("samples_type", "filled", "fact", "extent"),
    [
        (GPU, [(11, 20), (12, 80), (13, 50)], Fact.UTILIZATION_RATIO, Extent(0.2, 0.8, 0.5, 3)),
        (MEMORY, [(11, 10)], Fact.MEMORY_UTILIZATION_RATIO, Extent(0.1, 0.1, 0.1, 1)),
        (POWER, [(11, 1500), (12, 2500)], Fact.POWER_WATTS, Extent(1.5, 2.5, 2.0, 2)),
        # Seen before, and empty places of the ring.
        (POWER, [(0, 9), (10, 9), (11, 3000)], Fact.POWER_WATTS, Extent(3.0, 3.0, 3.0, 1)),
        # No utilization: 101 %, all ones.
        (
            GPU,
            [(11, 101), (12, 2**32 - 1), (13, 50)],
            Fact.UTILIZATION_RATIO,
            Extent(0.5, 0.5, 0.5, 1),
        ),
        (GPU, [(11, 101)], Fact.UTILIZATION_RATIO, None),
        (GPU, [], Fact.UTILIZATION_RATIO, None),
    ],
)
def test_extents(
    samples_type: int, filled: Sequence[tuple[int, int]], fact: Fact, extent: Extent | None
) -> None:
    ring = Ring()
    rig = rig_with(ring)
    ring.samples = {samples_type: [(10, 1)]}
    first = rig.sample()[0]
    assert first.extents == {}  # the ring holds what was before anybody asked
    ring.samples = {samples_type: list(filled)}
    second = rig.sample()[0]
    assert second.extents == ({} if extent is None else {fact: extent})
    assert (first.failures, second.failures) == ((), ())
    assert ring.since[samples_type] == [0, 10]
    rig.sample()
    assert ring.since[samples_type][-1] == max([10, *(at for at, _ in filled)])


def test_extents_lie_around_the_value() -> None:
    rig = Rig(processes=(ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.8),)).opened()
    for _ in range(4):
        rig.sample()
    reading = rig.sample()[0]
    for fact in (Fact.UTILIZATION_RATIO, Fact.MEMORY_UTILIZATION_RATIO, Fact.POWER_WATTS):
        extent = reading.extents[fact]
        assert extent.least <= extent.mean <= extent.most
        assert extent.least * 0.8 <= reading.facts[fact] <= extent.most * 1.2
    assert reading.extents[Fact.POWER_WATTS].samples == 50


def test_a_gpu_in_mig_mode_has_power_only() -> None:
    rig = Rig(mig=(ScriptedMig(gpu=0, devices=("1g.10gb",)),)).opened()
    rig.sample()
    assert rig.count(0)[SAMPLES] == 1
    partitioned, whole, *_ = rig.sample()
    assert partitioned.extents.keys() == {Fact.POWER_WATTS}
    assert len(whole.extents) == 3


@pytest.mark.parametrize(
    "fault", [Missing(function=SAMPLES), Fail(function=SAMPLES, error="NOT_SUPPORTED")]
)
def test_a_driver_without_samples_is_asked_once(fault: Any) -> None:
    rig = Rig(fault).opened()
    rig.sample()
    reading = rig.sample()[0]
    assert (reading.extents, reading.failures) == ({}, ())
    assert rig.count(0)[SAMPLES] == 0


def test_samples_that_fail_are_counted_and_leave_the_value() -> None:
    rig = Rig(Fail(gpu=0, function=SAMPLES, error="TIMEOUT")).opened()
    rig.sample()
    reading = rig.sample()[0]
    assert set(failed(reading).values()) == {"driver_timeout"}
    assert Fact.POWER_WATTS in reading.facts
    rig.play()
    rig.sample()
    assert rig.sample()[0].extents
