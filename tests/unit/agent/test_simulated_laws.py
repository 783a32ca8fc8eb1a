"""Laws of a simulated node: what counts never goes back, whatever happens and when it is read."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.simulated_nodes import NVML, World, node, outcome

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Scenario, ScriptedMig, ScriptedProcess
from stoker.core.gpu_models import MODELS

ALL_LINKS = 2**32 - 1
COUNTERS: list[int | tuple[int, int]] = [
    83,
    197,
    198,
    74,
    269,
    (138, ALL_LINKS),
    (139, 0),
    (141, ALL_LINKS),
    94,
    4,
]

seconds = st.floats(0, 60)
ratios = st.floats(0, 1)
processes = st.builds(
    ScriptedProcess,
    gpu=st.integers(0, 1),
    pid=st.integers(5_000_000, 5_000_100),
    memory=st.integers(0, 2**38),
    utilization=ratios,
    decoder=ratios,
    mig_device=st.integers(0, 3),
    from_seconds=seconds,
    until_seconds=st.none() | seconds,
)
layouts = st.builds(
    ScriptedMig,
    gpu=st.integers(0, 1),
    devices=st.sampled_from([(), ("1g.10gb",) * 4, ("7g.80gb",)]),
    from_seconds=seconds,
    until_seconds=st.none() | seconds,
)
scenarios = st.builds(
    Scenario,
    processes=st.lists(processes, max_size=5).map(tuple),
    mig=st.lists(layouts, max_size=3).map(tuple),
)


def counters(nvml: SimulatedNvml, gpu: Any) -> list[int]:
    values = nvml.nvmlDeviceGetFieldValues(gpu, COUNTERS)
    assert [value.nvmlReturn for value in values] == [0] * len(COUNTERS)
    return [value.value.ullVal for value in values]


@settings(max_examples=60, deadline=None)
@given(scenario=scenarios, pauses=st.lists(st.floats(0, 30), min_size=1, max_size=8))
def test_counters_never_go_back(scenario: Scenario, pauses: list[float]) -> None:
    world = World()
    nvml = node(world, 2, scenario=scenario)
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(2)]
    before = [counters(nvml, gpu) for gpu in gpus]
    for pause in pauses:
        world.now += pause
        after = [counters(nvml, gpu) for gpu in gpus]
        for was, now in zip(before, after, strict=True):
            assert all(early <= late for early, late in zip(was, now, strict=True))
        before = after


@settings(max_examples=60, deadline=None)
@given(scenario=scenarios, pause=st.floats(0, 60))
def test_parts_never_exceed_the_whole(scenario: Scenario, pause: float) -> None:
    world = World()
    nvml = node(world, 2, scenario=scenario)
    world.now += pause
    for index in range(2):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu, NVML.nvmlMemory_v2)
        assert memory.used + memory.reserved + memory.free == memory.total
        power = nvml.nvmlDeviceGetPowerUsage(gpu)
        assert 0 < power <= MODELS["H100-80GB"].power_limit_watts * 1000
        used = 0
        for place in range(7):
            device = outcome(nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, place)
            if device == "NOT_FOUND":
                break
            part = nvml.nvmlDeviceGetMemoryInfo(device)
            assert part.used + part.free == part.total
            used += part.used
        assert used <= memory.used or nvml.nvmlDeviceGetMigMode(gpu) == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    scenario=scenarios,
    split=st.lists(st.floats(0.1, 20), min_size=1, max_size=10),
)
def test_how_often_it_is_read_changes_little(scenario: Scenario, split: list[float]) -> None:
    totals: list[list[int]] = []
    for pauses in (split, [sum(split)]):
        world = World()
        nvml = node(world, 2, scenario=scenario)
        for pause in pauses:
            world.now += pause
            nvml.nvmlDeviceGetCount()
        gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(2)]
        totals.append([nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus])
    for often, once in zip(*totals, strict=True):
        assert abs(often - once) <= 0.05 * max(often, once) + 50_000  # millijoules
