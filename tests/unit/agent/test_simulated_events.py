"""Events: heard once, by whoever listens when they happen."""

from typing import Any

import pytest
from tests.support.simulated_nodes import NVML, World, node, outcome, refused

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Fail, Hang, Scenario, ScriptedEvent, ScriptedMig

XID: int = NVML.nvmlEventTypeXidCriticalError
MIG_CHANGED: int = NVML.nvmlEventMigConfigChange
NO_INSTANCE = 0xFFFFFFFF


def listening(nvml: SimulatedNvml, *indices: int, types: int = XID) -> Any:
    events = nvml.nvmlEventSetCreate()
    for index in indices:
        nvml.nvmlDeviceRegisterEvents(nvml.nvmlDeviceGetHandleByIndex(index), types, events)
    return events


def heard(nvml: SimulatedNvml, events: Any) -> list[tuple[str, int, int, int]]:
    """Return what there is: GPU, type, data, instance."""
    found: list[tuple[str, int, int, int]] = []
    while True:
        event = outcome(nvml.nvmlEventSetWait, events, 0)
        if event == "TIMEOUT":
            return found
        uuid = nvml.nvmlDeviceGetUUID(event.device)
        found.append((uuid, event.eventType, event.eventData, event.gpuInstanceId))


def test_an_xid_is_heard_once_by_every_set_of_its_gpu() -> None:
    world = World()
    nvml = node(world)
    first, second, other = listening(nvml, 0, 2), listening(nvml, 2), listening(nvml, 1)
    nvml.play(
        Scenario(
            events=(
                ScriptedEvent(gpu=2, xid=79, at_seconds=3),
                ScriptedEvent(gpu=2, xid=31, at_seconds=4, gpu_instance=9),
            )
        )
    )
    world.now += 2
    assert heard(nvml, first) == []
    world.now += 3
    expected = [(nvml.uuids[2], XID, 79, NO_INSTANCE), (nvml.uuids[2], XID, 31, 9)]
    assert heard(nvml, first) == expected
    assert heard(nvml, first) == []
    assert heard(nvml, second) == expected
    assert heard(nvml, other) == []


def test_what_happened_before_anybody_listened_is_never_heard() -> None:
    world = World()
    nvml = node(world, scenario=Scenario(events=(ScriptedEvent(gpu=0, xid=79, at_seconds=1),)))
    world.now += 2
    events = listening(nvml, 0)
    world.now += 2
    assert heard(nvml, events) == []


def test_only_types_that_were_asked_for_are_heard() -> None:
    world = World()
    nvml = node(world)
    events = listening(nvml, 0, types=MIG_CHANGED)
    nvml.play(
        Scenario(
            events=(ScriptedEvent(gpu=0, xid=79),), mig=(ScriptedMig(gpu=0, devices=("1g.10gb",)),)
        )
    )
    world.now += 1
    nvml.nvmlDeviceGetCount()
    assert heard(nvml, events) == [(nvml.uuids[0], MIG_CHANGED, 0, NO_INSTANCE)]


def test_waiting_ends_when_something_happens_or_the_time_is_over() -> None:
    world = World()
    nvml = node(world)
    events = listening(nvml, 0)
    began = world.now
    with refused("TIMEOUT"):
        nvml.nvmlEventSetWait_v2(events, 500)
    assert world.now - began == pytest.approx(0.5)
    nvml.play(Scenario(events=(ScriptedEvent(gpu=0, xid=48, at_seconds=2),)))
    began = world.now
    assert nvml.nvmlEventSetWait_v2(events, 60_000).eventData == 48
    assert world.now - began == pytest.approx(2, abs=0.05)


def test_a_set_that_was_freed_is_gone() -> None:
    nvml = node(World())
    events = listening(nvml, 0)
    nvml.nvmlEventSetFree(events)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlEventSetFree(events)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlEventSetWait(events, 0)
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlDeviceRegisterEvents(nvml.nvmlDeviceGetHandleByIndex(0), XID, events)


def test_a_set_does_not_outlive_its_session() -> None:
    nvml = node(World())
    events = listening(nvml, 0)
    nvml.nvmlShutdown()
    nvml.nvmlInit()
    with refused("INVALID_ARGUMENT"):
        nvml.nvmlEventSetWait(events, 0)


def test_a_board_refuses_events_that_it_does_not_have() -> None:
    nvml = node(World(), 1, "T4")
    with refused("NOT_SUPPORTED"):
        listening(nvml, 0, types=XID | MIG_CHANGED)


def test_a_set_of_one_gpu_has_that_gpus_faults() -> None:
    world = World()
    faults = (
        Fail(gpu=1, function="nvmlEventSetWait", error="GPU_IS_LOST"),
        Hang(gpu=2, function="nvmlEventSetWait", seconds=3),
    )
    nvml = node(world, scenario=Scenario(faults=faults))
    sets = [listening(nvml, index) for index in range(3)]
    assert heard(nvml, sets[0]) == []
    with refused("GPU_IS_LOST"):
        nvml.nvmlEventSetWait(sets[1], 0)
    began = world.now
    assert heard(nvml, sets[2]) == []
    assert world.now - began == pytest.approx(3, abs=0.1)
