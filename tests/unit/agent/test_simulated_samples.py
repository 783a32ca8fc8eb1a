"""The driver's own sample buffers: what is newer than asked for, once."""

from itertools import pairwise
from statistics import fmean

import pytest
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Scenario, ScriptedMig, ScriptedProcess

POWER, LOAD, MEMORY = 0, 1, 2


def ask(nvml: SimulatedNvml, kind: int, last_seen: int = 0) -> list[tuple[int, int]]:
    """Return times in microseconds and values."""
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    value_type, samples = nvml.nvmlDeviceGetSamples(gpu, kind, last_seen)
    assert value_type == NVML.NVML_VALUE_TYPE_UNSIGNED_INT
    return [(sample.timeStamp, sample.sampleValue.uiVal) for sample in samples]


@pytest.mark.parametrize(("kind", "count", "spacing"), [(POWER, 119, 20_000), (LOAD, 71, 200_000)])
def test_the_buffer_holds_the_last_seconds(kind: int, count: int, spacing: int) -> None:
    world = World()
    nvml = node(world, 1)
    for _ in range(60):
        world.now += 0.5
        nvml.nvmlDeviceGetCount()
    times = [at for at, _ in ask(nvml, kind)]
    assert len(times) == count
    assert {late - early for early, late in pairwise(times)} == {spacing}
    assert 0 <= world.now * 1e6 - times[-1] < spacing


@pytest.mark.parametrize("kind", [POWER, LOAD])
@pytest.mark.parametrize("pace", [0.06, 0.31, 1.0, 2.0])
def test_every_sample_is_told_once_to_a_reader_that_keeps_up(kind: int, pace: float) -> None:
    world = World()
    nvml = node(world, 1)
    world.now += 1
    seen = [at for at, _ in ask(nvml, kind)]
    for _ in range(40):
        world.now += pace
        new = outcome(ask, nvml, kind, seen[-1])
        seen += [] if new == "NOT_FOUND" else [at for at, _ in new]
    gaps = {late - early for early, late in pairwise(seen)}
    assert gaps == {20_000 if kind == POWER else 200_000}


def test_nothing_new_is_not_found() -> None:
    world = World()
    nvml = node(world, 1)
    world.now += 5
    last, _ = ask(nvml, LOAD)[-1]
    with refused("NOT_FOUND"):
        ask(nvml, LOAD, last)
    world.now += 0.21
    assert len(ask(nvml, LOAD, last)) == 1


def test_samples_tell_what_happened_in_between() -> None:
    world = World()
    burst = ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.9, from_seconds=4, until_seconds=6)
    nvml = node(world, 1, scenario=Scenario(processes=(burst,)))
    for _ in range(20):
        world.now += 0.5
        nvml.nvmlDeviceGetCount()
    loads = [percent for _, percent in ask(nvml, LOAD)]
    assert nvml.nvmlDeviceGetUtilizationRates(nvml.nvmlDeviceGetHandleByIndex(0)).gpu == 0
    assert min(loads) == 0
    assert max(loads) == pytest.approx(90, abs=6)
    assert fmean(loads) == pytest.approx(90 * 2 / 10, abs=4)
    assert 0 < max(percent for _, percent in ask(nvml, MEMORY)) < max(loads)


def test_power_samples_lie_around_the_mean_that_energy_tells() -> None:
    world = World()
    work = ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.7)
    nvml = node(world, 1, scenario=Scenario(processes=(work,)))
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    world.now += 30
    before, last = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu), ask(nvml, POWER)[-1][0]
    world.now += 2
    mean = (nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - before) / 2
    watts = [milliwatts for _, milliwatts in ask(nvml, POWER, last)]
    assert fmean(watts) == pytest.approx(mean, rel=0.02)
    assert min(watts) < 0.97 * mean < 1.03 * mean < max(watts)


@pytest.mark.parametrize(
    ("kind", "error"),
    [(5, "NOT_SUPPORTED"), (6, "NOT_SUPPORTED"), (7, "NOT_SUPPORTED"), (10, "INVALID_ARGUMENT")],
)
def test_what_is_not_sampled(kind: int, error: str) -> None:
    with refused(error):
        ask(node(World(), 1), kind)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 8, 9])
def test_in_mig_mode_only_power_is_sampled(kind: int) -> None:
    world = World()
    nvml = node(world, 1, scenario=Scenario(mig=(ScriptedMig(gpu=0),)))
    world.now += 5
    nvml.nvmlDeviceGetCount()
    assert ask(nvml, POWER)
    with refused("NOT_SUPPORTED"):
        ask(nvml, kind)
