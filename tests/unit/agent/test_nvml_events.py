"""Xids are told once, by the GPU that had them, and none is lost on the way."""

from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import SLOW, Rig, failed

from stoker.agent.driver import InventoryChanged
from stoker.agent.nvml.events import EVENTS_MAX
from stoker.agent.readings import XidSeen
from stoker.agent.simulated.scenario import (
    Fail,
    Lose,
    Missing,
    ScriptedEvent,
    ScriptedMig,
    Vanish,
)

NVML: Any = pynvml
WAIT = "nvmlEventSetWait"


def test_an_xid_is_told_once_with_when_it_was_read() -> None:
    rig = Rig(events=(ScriptedEvent(gpu=2, xid=31, at_seconds=1.5),)).opened()
    assert [reading.xids for reading in rig.sample()] == [(), (), (), ()]
    assert [reading.xids for reading in rig.sample()] == [(), (), (XidSeen(5_002.0, 31),), ()]
    assert [reading.xids for reading in rig.sample()] == [(), (), (), ()]


def test_quiet_gpus_cost_one_call() -> None:
    rig = Rig().opened()
    rig.sample()
    assert rig.count(0)[WAIT] == 1


@pytest.mark.parametrize(
    ("mig", "told", "instance"),
    [
        ((ScriptedMig(gpu=0, devices=("1g.10gb",)),), 7, 7),
        ((ScriptedMig(gpu=0, devices=("1g.10gb",)),), None, None),
        ((), 0, None),  # outside MIG mode older drivers leave the number as they found it
    ],
)
def test_the_instance_that_an_xid_is_about(
    mig: tuple[ScriptedMig, ...], told: int | None, instance: int | None
) -> None:
    event = ScriptedEvent(gpu=0, xid=13, at_seconds=0.5, gpu_instance=told)
    rig = Rig(events=(event,), mig=mig).opened()
    assert rig.sample()[0].xids == (XidSeen(5_001.0, 13, instance),)


def test_a_storm_is_told_in_parts() -> None:
    events = tuple(ScriptedEvent(gpu=0, xid=31, at_seconds=0.5) for _ in range(EVENTS_MAX + 5))
    rig = Rig(events=events).opened()
    assert [len(rig.sample()[0].xids) for _ in range(3)] == [EVENTS_MAX, 5, 0]


def test_the_xid_of_a_gpu_that_went_is_told_with_its_loss() -> None:
    rig = Rig().opened()
    # The event stands in the driver's queue, then nothing answers any more.
    rig.play(
        Lose(gpu=1, function="nvmlDeviceGetMemoryInfo_v2"),
        events=(ScriptedEvent(gpu=1, xid=79, at_seconds=0.5),),
    )
    lost = rig.sample()[1]
    assert [seen.xid for seen in lost.xids] == [79]
    assert failed(lost) == {"gpu": "gpu_lost"}
    assert rig.sample()[1].xids == ()


def test_a_gpu_that_is_lost_by_its_own_event_set_takes_no_other_with_it() -> None:
    rig = Rig().opened()
    ask = rig.nvml.nvmlEventSetWait
    sets: list[Any] = []

    def wait(event_set: Any, milliseconds: int) -> Any:
        if event_set not in sets:
            sets.append(event_set)
        if sets.index(event_set) == 1:
            raise NVML.NVMLError(NVML.NVML_ERROR_GPU_IS_LOST)
        return ask(event_set, milliseconds)

    rig.nvml.nvmlEventSetWait = wait  # type: ignore[method-assign]
    rig.driver.inventory()
    readings = rig.sample()
    assert [failed(reading) for reading in readings] == [{}, {"gpu": "gpu_lost"}, {}, {}]
    rig.sample()
    assert rig.asked(1) == []


def test_an_xid_waits_for_a_reading_that_is_told() -> None:
    rig = Rig(events=(ScriptedEvent(gpu=0, xid=31, at_seconds=0.5),)).opened()
    rig.play(
        events=(ScriptedEvent(gpu=0, xid=31, at_seconds=0.5),),
        mig=(ScriptedMig(gpu=3, devices=("1g.10gb",)),),
    )
    with pytest.raises(InventoryChanged):  # by the last GPU, after the first was read
        rig.sample(SLOW)
    rig.driver.inventory()
    (seen,) = rig.sample()[0].xids
    assert seen.xid == 31
    assert rig.sample()[0].xids == ()


def test_what_happens_before_a_new_inventory_is_collected() -> None:
    rig = Rig(events=(ScriptedEvent(gpu=0, xid=31, at_seconds=0.5),)).opened()
    rig.now += 1
    rig.driver.inventory()
    assert [seen.xid for seen in rig.sample()[0].xids] == [31]


@pytest.mark.parametrize(
    "fault",
    [
        Missing(function="nvmlDeviceGetSupportedEventTypes"),
        Missing(function="nvmlEventSetCreate"),
        Missing(function=WAIT),
        Fail(function="nvmlDeviceGetSupportedEventTypes", error="NOT_SUPPORTED"),
        Fail(function="nvmlDeviceRegisterEvents", error="NOT_SUPPORTED"),
        Fail(function="nvmlDeviceRegisterEvents", error="NO_PERMISSION"),
    ],
)
def test_a_driver_without_events_tells_everything_else(fault: Any) -> None:
    rig = Rig(fault, events=(ScriptedEvent(gpu=0, xid=31, at_seconds=0.5),)).opened()
    reading = rig.sample()[0]
    assert (reading.xids, len(reading.facts) > 10) == ((), True)


def test_events_that_cannot_be_collected_now_are_counted() -> None:
    rig = Rig().opened()
    rig.play(Fail(function=WAIT, error="UNKNOWN"))
    reading = rig.sample()[0]
    assert failed(reading) == {"xids": "unknown"}
    assert len(reading.facts) > 10


def test_event_sets_are_given_back() -> None:
    rig = Rig().opened()
    made: list[Any] = []
    freed: list[Any] = []
    create, free = rig.nvml.nvmlEventSetCreate, rig.nvml.nvmlEventSetFree

    def count_made() -> Any:
        made.append(create())
        return made[-1]

    def count_freed(event_set: Any) -> None:
        freed.append(event_set)
        free(event_set)

    rig.nvml.nvmlEventSetCreate = count_made  # type: ignore[method-assign]
    rig.nvml.nvmlEventSetFree = count_freed  # type: ignore[method-assign]
    for _ in range(3):
        rig.driver.inventory()
    rig.play(Vanish(gpu=0))
    rig.driver.inventory()
    assert len(made) - len(freed[4:]) == 3  # four of the first inventory were made before
    rig.driver.close()
    assert len(freed) == len(made) + 4
