"""Hardware counters: two samples make a metric, and nothing is left of other times or GPUs."""

from collections import Counter
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import Rig, failed

from stoker.agent.facts import Fact
from stoker.agent.nvml.gpm import METRICS
from stoker.agent.simulated.scenario import Fail, Lose, Missing, ScriptedMig, ScriptedProcess

NVML: Any = pynvml
COUNTED = {fact for _, fact, _ in METRICS}
GET, METRICS_GET, SUPPORT = "nvmlGpmSampleGet", "nvmlGpmMetricsGet", "nvmlGpmQueryDeviceSupport"
WORK = ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.8)


class Metrics:
    """Answers for the driver: every metric is what it is told to be, or stays as it was."""

    def __init__(self, rig: Rig) -> None:
        self.values: dict[int, tuple[int, float]] = {}
        rig.nvml.nvmlGpmMetricsGet = self  # type: ignore[method-assign]

    def __call__(self, asked: Any) -> Any:
        assert (asked.version, asked.numMetrics) == (1, len(METRICS))
        for place, (number, _, _) in enumerate(METRICS):
            metric = asked.metrics[place]
            assert metric.metricId == number
            if number in self.values:
                metric.nvmlReturn, metric.value = self.values[number]
        return asked


def rig_with(values: dict[int, tuple[int, float]]) -> tuple[Rig, Metrics]:
    rig = Rig(gpus=2)
    metrics = Metrics(rig)
    metrics.values = values
    rig.opened()
    rig.sample(profiling=True)
    return rig, metrics


def test_the_second_sample_tells_and_each_further_one() -> None:
    rig = Rig(processes=(WORK,)).opened()
    assert not rig.sample(profiling=True)[0].facts.keys() & COUNTED
    for _ in range(2):
        busy, idle, *_ = rig.sample(profiling=True)
        assert rig.count(0)[GET] == rig.count(0)[METRICS_GET] == 1
        assert busy.facts.keys() >= COUNTED
        assert busy.facts[Fact.SM_ACTIVE_RATIO] == pytest.approx(0.75, abs=0.2)
        assert idle.facts[Fact.SM_ACTIVE_RATIO] == 0.0
        assert busy.failures == ()


def test_units() -> None:
    rig, _ = rig_with({number: (0, 50.0) for number, _, _ in METRICS})
    facts = rig.sample(profiling=True)[0].facts
    rates = {fact for fact in COUNTED if fact.endswith("_bytes_per_second")}
    assert {facts[fact] for fact in COUNTED - rates} == {0.5}
    assert {facts[fact] for fact in rates} == {50 * 2**20}


@pytest.mark.parametrize(
    ("told", "is_told", "kind"),
    [
        ((0, 100.3), True, None),
        ((0, 170.0), False, "not_available"),
        ((0, float("nan")), False, "not_available"),
        ((0, -1.0), False, "not_available"),
        ((NVML.NVML_ERROR_NOT_SUPPORTED, 50.0), False, None),
        ((NVML.NVML_ERROR_INVALID_ARGUMENT, 50.0), False, None),
        ((NVML.NVML_ERROR_TIMEOUT, 50.0), False, "driver_timeout"),
        (None, False, "unknown"),  # the driver did not fill it in
    ],
)
def test_a_metric_may_be_missing_for_itself(
    told: tuple[int, float] | None, is_told: bool, kind: str | None
) -> None:
    values = {number: (0, 50.0) for number, _, _ in METRICS}
    rig, metrics = rig_with(dict(values))
    rig.sample(profiling=True)
    if told is None:
        del metrics.values[5]
    else:
        metrics.values[5] = told
    for reading in rig.sample(profiling=True):
        fact = Fact.TENSOR_ACTIVE_RATIO
        assert (fact in reading.facts) is is_told
        assert failed(reading) == ({} if kind is None else {fact: kind})
        assert reading.facts.keys() >= COUNTED - {fact}


def test_samples_that_are_too_close_are_not_taken() -> None:
    rig = Rig(gpus=1).opened()
    rig.sample(profiling=True)
    rig.now -= 0.95
    assert not rig.sample(profiling=True)[0].facts.keys() & COUNTED
    assert rig.count(0)[GET] == 0
    assert rig.sample(profiling=True)[0].facts.keys() >= COUNTED


def test_a_clock_that_went_back_tells_no_interval() -> None:
    rig = Rig(gpus=1).opened()
    rig.sample(profiling=True)
    rig.now -= 100
    reading = rig.sample(profiling=True)[0]
    assert (reading.facts.keys() & COUNTED, reading.failures) == (set(), ())
    assert rig.sample(profiling=True)[0].facts.keys() >= COUNTED


def test_while_another_profiles_nothing_is_sampled_and_nothing_kept() -> None:
    rig = Rig(gpus=1).opened()
    for _ in range(2):
        rig.sample(profiling=True)
    reading = rig.sample(profiling=False)[0]
    assert not reading.facts.keys() & COUNTED
    assert not [function for function in rig.asked(0) if function.startswith("nvmlGpm")]
    resumed = rig.sample(profiling=True)[0]  # the interval would reach into the other's time
    assert not resumed.facts.keys() & COUNTED
    assert rig.sample(profiling=True)[0].facts.keys() >= COUNTED


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        ("A100-40GB", ()),
        ("H100-80GB", (Missing(function=SUPPORT),)),
        ("H100-80GB", (Fail(function=SUPPORT, error="UNKNOWN"),)),
        ("H100-80GB", (Fail(function=GET, error="NOT_SUPPORTED"),)),
        ("H100-80GB", (Missing(function="nvmlGpmSampleAlloc"),)),
    ],
)
def test_a_card_or_driver_without_counters_is_asked_once(
    model: str, faults: tuple[Any, ...]
) -> None:
    rig = Rig(*faults, model=model).opened()
    rig.sample(profiling=True)
    reading = rig.sample(profiling=True)[0]
    assert (reading.facts.keys() & COUNTED, reading.failures) == (set(), ())
    assert not [function for function in rig.asked(0) if function.startswith("nvmlGpm")]


def test_a_sample_that_fails_is_counted_and_begins_a_new_interval() -> None:
    rig = Rig(gpus=1).opened()
    rig.sample(profiling=True)
    rig.play(Fail(function=GET, error="TIMEOUT"))
    reading = rig.sample(profiling=True)[0]
    assert failed(reading) == dict.fromkeys(COUNTED, "driver_timeout")
    assert Fact.POWER_WATTS in reading.facts
    rig.play()
    assert not rig.sample(profiling=True)[0].facts.keys() & COUNTED
    assert rig.sample(profiling=True)[0].facts.keys() >= COUNTED


def test_a_gpu_that_is_lost_while_it_is_sampled() -> None:
    rig = Rig().opened()
    rig.play(Lose(gpu=1, function=GET))
    readings = rig.sample(profiling=True)
    assert [failed(reading) for reading in readings] == [{}, {"gpu": "gpu_lost"}, {}, {}]


def test_instances_have_metrics_of_their_own() -> None:
    mig = ScriptedMig(gpu=0, devices=("3g.40gb", "1g.10gb"))
    rig = Rig(processes=(WORK,), mig=(mig,), gpus=1).opened()
    for _ in range(2):
        rig.sample(profiling=True)
    reading = rig.sample(profiling=True)[0]
    large, small = reading.mig_devices
    assert large.facts[Fact.SM_ACTIVE_RATIO] > 0.3
    assert small.facts[Fact.SM_ACTIVE_RATIO] == 0.0
    assert rig.count(0)["nvmlGpmMigSampleGet"] == 2


def test_two_parts_of_an_instance_share_its_samples() -> None:
    mig = ScriptedMig(gpu=0, devices=("1c.2g.20gb", "1c.2g.20gb"))
    rig = Rig(processes=(WORK,), mig=(mig,), gpus=1).opened()
    for _ in range(2):
        rig.sample(profiling=True)
    reading = rig.sample(profiling=True)[0]
    one, other = reading.mig_devices
    assert one.gpu_instance_id == other.gpu_instance_id
    assert one.facts.keys() >= {Fact.SM_ACTIVE_RATIO, Fact.MEMORY_USED_BYTES}
    assert one.facts == other.facts
    assert rig.count(0)["nvmlGpmMigSampleGet"] == 1


def test_buffers_are_given_back() -> None:
    mig = ScriptedMig(gpu=0, devices=("3g.40gb", "1g.10gb"))
    rig = Rig(mig=(mig,), gpus=2)
    held: Counter[str] = Counter()
    alloc, free = rig.nvml.nvmlGpmSampleAlloc, rig.nvml.nvmlGpmSampleFree

    def count_alloc() -> Any:
        held["samples"] += 1
        return alloc()

    def count_free(sample: Any) -> None:
        held["samples"] -= 1
        free(sample)

    rig.nvml.nvmlGpmSampleAlloc = count_alloc  # type: ignore[method-assign]
    rig.nvml.nvmlGpmSampleFree = count_free  # type: ignore[method-assign]
    rig.opened()
    for _ in range(3):
        rig.sample(profiling=True)
        rig.driver.inventory()
    assert held["samples"] == 0
    rig.sample(profiling=True)
    assert held["samples"] > 0
    rig.driver.close()
    assert held["samples"] == 0
