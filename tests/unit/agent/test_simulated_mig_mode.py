"""MIG mode of simulated GPUs: who may change it, when it takes effect, and what ends it."""

from typing import Any

import pytest
from tests.support.mig_cards import MigCard
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Fail,
    Scenario,
    ScriptedMig,
    ScriptedProcess,
    ScriptedReset,
)
from stoker.core.errors import BadInput

DONE, IN_USE, RESET_REQUIRED = (
    NVML.NVML_SUCCESS,
    NVML.NVML_ERROR_IN_USE,
    NVML.NVML_ERROR_RESET_REQUIRED,
)
AMPERE, HOPPER, BLACKWELL = "A100-40GB", "H100-80GB", "RTX-PRO-6000"
USER = ScriptedProcess(gpu=0, pid=5_000_001, memory="1GiB")


def card(world: World, model: str, scenario: Scenario | None = None, **options: Any) -> MigCard:
    options = {"is_root": True, **options}
    return MigCard(node(world, 2, model, scenario=scenario or Scenario(), **options))


def play(world: World, on: MigCard, scenario: Scenario) -> None:
    """Let another scenario begin, a moment later."""
    world.now += 1
    on.nvml.play(scenario)


@pytest.mark.parametrize(
    ("model", "scenario", "answer", "mode"),
    [
        (AMPERE, Scenario(), DONE, [1, 1]),
        (HOPPER, Scenario(), DONE, [1, 1]),
        (BLACKWELL, Scenario(), DONE, [1, 1]),
        # Who uses the GPU is in the way. Ampere remembers what was wished, Hopper does not.
        (AMPERE, Scenario(processes=(USER,)), IN_USE, [0, 1]),
        (HOPPER, Scenario(processes=(USER,)), IN_USE, [0, 0]),
        # A virtual machine cannot reset its GPU, and from Hopper on need not.
        (AMPERE, Scenario(pass_through=True), RESET_REQUIRED, [0, 1]),
        (HOPPER, Scenario(pass_through=True), DONE, [1, 1]),
    ],
)
def test_the_call_succeeds_and_tells_what_became_of_the_mode(
    model: str, scenario: Scenario, answer: int, mode: list[int]
) -> None:
    gpu = card(World(), model, scenario)
    assert gpu.enable() == answer
    assert gpu.mode == mode
    assert MigCard(gpu.nvml, 1).mode == [0, 0]  # of this GPU only


@pytest.mark.parametrize(("model", "pending"), [(AMPERE, 0), (HOPPER, 1)])
def test_no_instance_is_destroyed_with_the_mode(model: str, pending: int) -> None:
    gpu = card(World(), model)
    gpu.enable()
    name = {AMPERE: "3g.20gb", HOPPER: "3g.40gb"}[model]
    instance = gpu.create(name)
    assert gpu.disable() == IN_USE
    assert gpu.mode == [1, pending]
    assert len(gpu.places) == 1
    gpu.nvml.nvmlGpuInstanceDestroy(instance)
    assert gpu.disable() == DONE
    assert gpu.mode == [0, 0]


def test_a_wish_can_be_tried_again_and_taken_back() -> None:
    world = World()
    gpu = card(world, AMPERE, Scenario(processes=(USER,)))
    assert gpu.enable() == IN_USE
    assert gpu.disable() == DONE
    assert gpu.mode == [0, 0]
    assert gpu.enable() == IN_USE
    play(world, gpu, Scenario())
    assert gpu.mode == [0, 1]  # its user is gone, and nobody has tried since
    assert gpu.enable() == DONE
    assert gpu.mode == [1, 1]


def test_a_reset_makes_a_pending_mode_take_effect() -> None:
    world = World()
    gpu = card(world, AMPERE, Scenario(pass_through=True))
    gpu.enable()
    play(world, gpu, Scenario(pass_through=True, resets=(ScriptedReset(gpu=0, at_seconds=5),)))
    world.now += 4.9
    assert gpu.mode == [0, 1]
    world.now += 0.2
    assert gpu.mode == [1, 1]
    gpu.create("1g.5gb")
    world.now += 10
    assert len(gpu.places) == 1  # it happened once


@pytest.mark.parametrize(("model", "name"), [(AMPERE, "1g.5gb"), (HOPPER, "1g.10gb")])
def test_a_reset_takes_the_instances_and_leaves_the_mode(model: str, name: str) -> None:
    world = World()
    gpu = card(world, model)
    other = MigCard(gpu.nvml, 1)
    for each in (gpu, other):
        each.enable()
        each.device(name)
    handle = gpu.instances[0]
    play(world, gpu, Scenario(resets=(ScriptedReset(gpu=0),)))
    assert gpu.places == {}
    assert gpu.uuids == []
    assert gpu.mode == [1, 1]
    with refused("INVALID_ARGUMENT"):
        gpu.nvml.nvmlGpuInstanceGetInfo(handle)
    assert len(other.uuids) == 1


def test_counters_begin_anew_with_a_reset() -> None:
    world = World()
    gpu = card(world, AMPERE)
    world.now += 60
    before = gpu.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.gpu)
    assert before > 0
    gpu.enable()
    assert gpu.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.gpu) < before


@pytest.mark.parametrize(
    ("model", "name", "mode"),
    [(AMPERE, "1g.5gb", [1, 1]), (HOPPER, "1g.10gb", [0, 0]), (BLACKWELL, "1g.24gb", [0, 0])],
)
def test_instances_end_with_the_driver_and_from_hopper_on_the_mode_does(
    model: str, name: str, mode: list[int]
) -> None:
    world = World()
    gpu = card(world, model)
    gpu.enable()
    gpu.device(name)
    play(world, gpu, Scenario(driver_loaded=False))
    with refused("DRIVER_NOT_LOADED"):
        _ = gpu.mode
    play(world, gpu, Scenario())
    assert gpu.mode == mode
    assert gpu.uuids == []


@pytest.mark.parametrize(
    ("model", "mode"),
    [(AMPERE, [1, 1]), (HOPPER, [0, 0])],
)
def test_a_pending_mode_takes_effect_when_the_driver_is_loaded(model: str, mode: list[int]) -> None:
    world = World()
    gpu = card(world, model, Scenario(processes=(USER,)))
    assert gpu.enable() == IN_USE
    play(world, gpu, Scenario(driver_loaded=False))
    play(world, gpu, Scenario())
    assert gpu.mode == mode


@pytest.mark.parametrize("mode", [-1, 2])
def test_there_are_two_modes(mode: int) -> None:
    gpu = card(World(), HOPPER)
    with refused("INVALID_ARGUMENT"):
        gpu.nvml.nvmlDeviceSetMigMode(gpu.gpu, mode)


@pytest.mark.parametrize("model", ["L40S", "T4"])
def test_a_board_without_mig_has_no_mode(model: str) -> None:
    gpu = card(World(), model)
    for ask in (gpu.enable, gpu.disable, lambda: gpu.mode):
        with refused("NOT_SUPPORTED"):
            ask()


def test_only_root_changes_the_mode_and_everybody_reads_it() -> None:
    gpu = card(World(), HOPPER, is_root=False)
    with refused("NO_PERMISSION"):
        gpu.enable()
    assert gpu.mode == [0, 0]


def test_what_the_scenario_partitions_no_call_does() -> None:
    world = World()
    layout = ScriptedMig(gpu=0, devices=("3g.40gb", "1c.2g.20gb"), until_seconds=10)
    gpu = card(world, HOPPER, Scenario(mig=(layout,)))
    assert gpu.mode == [1, 1]
    assert gpu.places == {2: (4, 9), 3: (0, 14)}  # it is read as if calls had made it
    before = gpu.uuids
    for change in (
        gpu.disable,
        lambda: gpu.create("2g.20gb"),
        lambda: gpu.nvml.nvmlGpuInstanceDestroy(gpu.instances[0]),
        lambda: gpu.split(gpu.instances[0], "2g.20gb", 1),
    ):
        with refused("NOT_SUPPORTED"):
            change()
    assert gpu.uuids == before
    world.now += 11
    assert gpu.mode == [0, 0]
    with refused("NOT_SUPPORTED"):
        gpu.enable()
    assert MigCard(gpu.nvml, 1).enable() == DONE


def test_what_calls_made_is_there_again_when_the_scenario_ends() -> None:
    world = World()
    gpu = card(world, HOPPER)
    gpu.enable()
    uuid = gpu.device("2g.20gb", 0)
    play(world, gpu, Scenario(mig=(ScriptedMig(gpu=0, devices=("7g.80gb",)),)))
    assert uuid not in gpu.uuids
    play(world, gpu, Scenario())
    assert gpu.uuids == [uuid]


def test_faults_strike_by_name_and_by_gpu() -> None:
    fault = Fail(function="nvmlDeviceSetMigMode", error="GPU_IS_LOST", gpu=0, after_calls=1)
    gpu = card(World(), HOPPER, Scenario(faults=(fault,)))
    assert gpu.enable() == DONE
    with refused("GPU_IS_LOST"):
        gpu.disable()
    assert gpu.mode == [1, 1]
    assert MigCard(gpu.nvml, 1).enable() == DONE


def test_a_reset_is_of_a_gpu_that_is_there() -> None:
    with pytest.raises(BadInput, match="there is no GPU 2, only 2"):
        card(World(), HOPPER, Scenario(resets=(ScriptedReset(gpu=2),)))


def events_of(nvml: SimulatedNvml, gpu: Any) -> Any:
    events = nvml.nvmlEventSetCreate()
    nvml.nvmlDeviceRegisterEvents(gpu, NVML.nvmlEventMigConfigChange, events)
    return events


def test_every_change_is_an_event_and_a_wish_is_none() -> None:
    gpu = card(World(), AMPERE)
    events = events_of(gpu.nvml, gpu.gpu)

    def heard() -> int:
        count = 0
        while (event := outcome(gpu.nvml.nvmlEventSetWait, events, 0)) != "TIMEOUT":
            assert event.eventType == NVML.nvmlEventMigConfigChange
            assert event.device is gpu.gpu
            count += 1
        return count

    gpu.enable()
    assert heard() == 1
    instance = gpu.create("2g.10gb")
    assert heard() == 1
    part = gpu.split(instance, "2g.10gb")
    assert heard() == 1
    gpu.disable()  # IN_USE: it is pending
    assert heard() == 0
    gpu.nvml.nvmlComputeInstanceDestroy(part)
    gpu.nvml.nvmlGpuInstanceDestroy(instance)
    assert heard() == 2
