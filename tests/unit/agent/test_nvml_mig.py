"""MIG devices: who they are, and that values are never those of another one."""

from collections.abc import Callable
from typing import Any

import pynvml  # type: ignore[import-untyped]
import pytest
from tests.support.nvml_rig import FAST, SLOW, Rig, failed, told

from stoker.agent.driver import InventoryChanged
from stoker.agent.facts import Fact
from stoker.agent.nvml.mig import profile_of
from stoker.agent.simulated.scenario import (
    Answer,
    Fail,
    Lose,
    Missing,
    ScriptedMig,
    ScriptedProcess,
    Vanish,
)

NVML: Any = pynvml
MIB = 2**20
LIST = "nvmlDeviceGetMigDeviceHandleByIndex"
NO_EVENTS = Missing(function="nvmlDeviceGetSupportedEventTypes")
TWO = ScriptedMig(gpu=0, devices=("3g.40gb", "1g.10gb"))


def profiles(reading: Any) -> list[str]:
    return [device.profile for device in reading.mig_devices]


def test_who_they_are_and_their_memory() -> None:
    work = ScriptedProcess(gpu=0, pid=5_000_001, memory="4GiB", mig_device=1)
    rig = Rig(mig=(TWO,), processes=(work,)).opened()
    reading, whole, *_ = rig.sample()
    assert [gpu.mig_enabled for gpu in rig.inventory.gpus] == [True, False, False, False]
    large, small = reading.mig_devices
    assert (large.profile, small.profile) == ("3g.40gb", "1g.10gb")
    assert large.uuid.startswith("MIG-")
    assert large.uuid != small.uuid
    assert large.gpu_instance_id != small.gpu_instance_id
    assert small.facts[Fact.MEMORY_USED_BYTES] >= 4 * 2**30
    assert large.facts[Fact.MEMORY_USED_BYTES] < 2**30
    total = large.facts[Fact.MEMORY_TOTAL_BYTES]
    assert 30 * 2**30 < total < reading.facts[Fact.MEMORY_TOTAL_BYTES]
    assert (reading.failures, whole.mig_devices) == ((), ())


def test_the_inventory_names_them_as_readings_do() -> None:
    rig = Rig(mig=(TWO,)).opened()
    partitioned, whole, *_ = rig.inventory.gpus
    large, small = partitioned.mig_devices
    assert (large.profile, large.memory_total_bytes) == ("3g.40gb", 40448 * MIB)
    assert (small.profile, small.memory_total_bytes) == ("1g.10gb", 9984 * MIB)
    assert whole.mig_devices == ()
    assert [(d.uuid, d.gpu_instance_id, d.compute_instance_id) for d in (large, small)] == [
        (d.uuid, d.gpu_instance_id, d.compute_instance_id) for d in rig.sample()[0].mig_devices
    ]


def test_the_inventory_of_a_gpu_without_partitions_yet_has_none() -> None:
    rig = Rig(mig=(ScriptedMig(gpu=0),)).opened()
    assert (rig.inventory.gpus[0].mig_enabled, rig.inventory.gpus[0].mig_devices) == (True, ())


@pytest.mark.parametrize(
    "fault",
    [
        Fail(gpu=0, function="nvmlDeviceGetMemoryInfo_v2", error="UNKNOWN", after_calls=1),
        Answer(gpu=0, function="nvmlDeviceGetMemoryInfo_v2", value={"total": 2**45}, after_calls=1),
    ],
)
def test_a_device_that_does_not_tell_its_memory_has_what_it_was_made_of(fault: Any) -> None:
    rig = Rig(fault, mig=(TWO,)).opened()  # the first call is about the whole GPU
    found = [(d.profile, d.memory_total_bytes) for d in rig.inventory.gpus[0].mig_devices]
    assert found == [("3g.40gb", 40448 * MIB), ("1g.10gb", 9984 * MIB)]


def test_what_the_driver_does_not_know_of_a_partitioned_gpu_is_not_asked() -> None:
    rig = Rig(mig=(TWO,)).opened()
    reading = rig.sample(SLOW)[0]
    loads = {"utilization_ratio", "memory_utilization_ratio", "encoder_utilization_ratio"}
    assert not told(reading) & loads
    assert "nvmlDeviceGetUtilizationRates" not in rig.asked(0)
    assert reading.facts[Fact.MIG_MODE] == 1


def test_devices_are_listed_once_while_the_driver_tells_changes() -> None:
    rig = Rig(mig=(TWO,)).opened()
    for rates in (FAST, SLOW, FAST):
        assert len(rig.sample(rates)[0].mig_devices) == 2
        assert rig.count(0)[LIST] == 0


def test_devices_are_listed_with_slow_facts_where_the_driver_tells_no_changes() -> None:
    rig = Rig(NO_EVENTS, mig=(TWO,)).opened()
    rig.sample()
    assert rig.count(0)[LIST] == 0
    rig.sample(SLOW)
    assert rig.count(0)[LIST] > 0
    more = ScriptedMig(gpu=0, devices=("3g.40gb", "1g.10gb", "1g.10gb"))
    rig.play(NO_EVENTS, mig=(more,))
    assert len(rig.sample(SLOW)[0].mig_devices) == 3


@pytest.mark.parametrize("events", [(), (NO_EVENTS,)])
@pytest.mark.parametrize(
    ("devices", "found"),
    [
        (("1g.10gb",), ["1g.10gb"]),
        (("2g.20gb", "1g.10gb", "1g.10gb"), ["2g.20gb", "1g.10gb", "1g.10gb"]),
        ((), []),
    ],
)
def test_another_layout_is_seen_in_the_very_next_reading(
    devices: tuple[str, ...], found: list[str], events: tuple[Any, ...]
) -> None:
    rig = Rig(*events, mig=(TWO,)).opened()
    before = {device.uuid for device in rig.sample()[0].mig_devices}
    rig.play(*events, mig=(ScriptedMig(gpu=0, devices=devices),))
    reading = rig.sample()[0]
    assert sorted(profiles(reading)) == sorted(found)
    assert failed(reading) == {}
    assert Fact.MEMORY_USED_BYTES in reading.facts
    assert not {device.uuid for device in reading.mig_devices} & before or "1g.10gb" in found


def change_within(rig: Rig, function: str, change: Callable[[], None]) -> None:
    """Let something happen right before the next call of a function on a MIG device."""
    ask = getattr(rig.nvml, function)
    waiting: list[Callable[[], None]] = []
    handles = [rig.nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu0(rig), place) for place in (0, 1)]

    def asked(handle: Any, *arguments: Any) -> Any:
        if waiting and handle in handles:
            waiting.pop()()
        return ask(handle, *arguments)

    setattr(rig.nvml, function, asked)
    rig.driver.inventory()
    waiting.append(change)


def gpu0(rig: Rig) -> Any:
    return rig.nvml.nvmlDeviceGetHandleByIndex(0)


@pytest.mark.parametrize("function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo"])
def test_a_layout_that_changes_in_the_middle_of_a_reading(function: str) -> None:
    rig = Rig(mig=(TWO,)).opened()
    new = ScriptedMig(gpu=0, devices=("2g.20gb", "2g.20gb"))
    change_within(rig, function, lambda: rig.play(mig=(new,)))
    reading = rig.sample()[0]
    assert profiles(reading) == ["2g.20gb", "2g.20gb"]  # what was read of the old one is gone
    assert failed(reading) == {}
    sizes = {device.facts[Fact.MEMORY_TOTAL_BYTES] for device in reading.mig_devices}
    assert len(sizes) == 1
    assert Fact.MEMORY_USED_BYTES in reading.facts


def test_a_handle_that_leads_to_another_device_tells_nothing_of_it() -> None:
    rig = Rig(NO_EVENTS, mig=(TWO,)).opened()
    ask = rig.nvml.nvmlDeviceGetUUID
    listed = [device.uuid for device in rig.sample()[0].mig_devices]
    others = {listed[0]: "MIG-of-somebody-else", listed[1]: listed[1]}

    def uuid(handle: Any) -> str:
        real = ask(handle)
        return others.get(real, real)

    rig.nvml.nvmlDeviceGetUUID = uuid  # type: ignore[method-assign]
    reading = rig.sample()[0]
    assert [device.uuid for device in reading.mig_devices] == ["MIG-of-somebody-else", listed[1]]
    assert rig.count(0)[LIST] > 0


@pytest.mark.parametrize("error", ["NOT_FOUND", "INVALID_ARGUMENT", "GPU_IS_LOST", "UNKNOWN"])
def test_whatever_a_stale_handle_answers_the_gpu_is_read_on(error: str) -> None:
    rig = Rig(mig=(TWO,)).opened()
    gone: list[Any] = []
    ask_memory, ask_uuid = rig.nvml.nvmlDeviceGetMemoryInfo, rig.nvml.nvmlDeviceGetUUID

    def gone_or(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(handle: Any, *arguments: Any) -> Any:
            if handle in gone:
                raise NVML.NVMLError(getattr(NVML, f"NVML_ERROR_{error}"))
            return ask(handle, *arguments)

        return asked

    rig.nvml.nvmlDeviceGetMemoryInfo = gone_or(ask_memory)  # type: ignore[method-assign]
    rig.nvml.nvmlDeviceGetUUID = gone_or(ask_uuid)  # type: ignore[method-assign]
    rig.driver.inventory()
    assert len(rig.sample()[0].mig_devices) == 2
    gone.append(rig.nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu0(rig), 0))
    reading = rig.sample()[0]
    assert profiles(reading) == ["1g.10gb"]
    assert not reading.is_lost
    assert Fact.MEMORY_USED_BYTES in reading.facts
    assert failed(reading).keys() == {"mig_mode"}  # the list is not complete, and says so


def test_counters_of_an_instance_that_was_made_anew_begin_anew() -> None:
    rig = Rig(mig=(TWO,)).opened()
    for _ in range(2):
        rig.sample(profiling=True)
    before = rig.sample(profiling=True)[0].mig_devices
    anew = ScriptedMig(gpu=0, devices=TWO.devices, from_seconds=0.5)
    rig.play(mig=(anew,))
    rig.now += 1
    after = rig.driver.sample()[0].mig_devices
    assert [each.gpu_instance_id for each in after] == [each.gpu_instance_id for each in before]
    assert [each.uuid for each in after] != [each.uuid for each in before]
    assert all(Fact.SM_ACTIVE_RATIO in each.facts for each in before)
    assert not any(Fact.SM_ACTIVE_RATIO in each.facts for each in after)
    again = rig.sample(profiling=True)[0].mig_devices
    assert all(Fact.SM_ACTIVE_RATIO in each.facts for each in again)


def test_a_gpu_that_is_lost_is_not_taken_for_a_stale_handle() -> None:
    rig = Rig(mig=(TWO,)).opened()
    rig.play(Lose(gpu=0, function="nvmlDeviceGetMemoryInfo_v2", after_calls=1), mig=(TWO,))
    readings = rig.sample()
    assert [failed(reading) for reading in readings] == [{"gpu": "gpu_lost"}, {}, {}, {}]
    assert readings[0].mig_devices == ()


def test_memory_that_fails_is_counted_and_the_device_stays() -> None:
    rig = Rig(mig=(TWO,)).opened()
    rig.play(Fail(gpu=0, function="nvmlDeviceGetMemoryInfo_v2", error="UNKNOWN"), mig=(TWO,))
    reading = rig.sample()[0]
    assert profiles(reading) == ["3g.40gb", "1g.10gb"]
    assert [dict(device.facts) for device in reading.mig_devices] == [{}, {}]
    assert failed(reading)["memory_used_bytes"] == "unknown"


def test_memory_larger_than_the_card_is_not_told() -> None:
    rig = Rig(mig=(TWO,)).opened()
    fault = Answer(gpu=0, function="nvmlDeviceGetMemoryInfo_v2", value={"total": 2**45})
    rig.play(fault, mig=(TWO,))
    reading = rig.sample()[0]
    assert [dict(device.facts) for device in reading.mig_devices] == [{}, {}]
    assert failed(reading)["memory_total_bytes"] == "not_available"


def test_a_list_that_fails_is_told_and_tried_again_with_slow_facts() -> None:
    rig = Rig(Fail(function="nvmlDeviceGetMaxMigDeviceCount", error="UNKNOWN"), mig=(TWO,)).opened()
    for _ in range(2):
        reading = rig.sample()[0]
        assert failed(reading) == {"mig_mode": "unknown"}
        assert rig.count(0)["nvmlDeviceGetMaxMigDeviceCount"] == 0
    rig.play(mig=(TWO,))
    reading = rig.sample(SLOW)[0]
    assert (profiles(reading), reading.failures) == (["3g.40gb", "1g.10gb"], ())


# Modes and numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [FAST, SLOW])
@pytest.mark.parametrize(("before", "after"), [((TWO,), ()), ((), (TWO,))])
def test_a_mode_that_changed_asks_for_a_new_inventory(
    before: tuple[ScriptedMig, ...], after: tuple[ScriptedMig, ...], rates: Any
) -> None:
    rig = Rig(mig=before).opened()
    rig.sample()
    rig.play(mig=after)
    with pytest.raises(InventoryChanged, match=rf"{rig.nvml.uuids[0]}: .*MIG mode"):
        rig.sample(rates)
    inventory = rig.driver.inventory()
    assert inventory.gpus[0].mig_enabled is bool(after)
    assert len(rig.sample()[0].mig_devices) == (2 if after else 0)


def test_a_mode_that_went_is_seen_by_its_stale_devices() -> None:
    rig = Rig(NO_EVENTS, mig=(TWO,)).opened()
    rig.play(NO_EVENTS)
    with pytest.raises(InventoryChanged, match="not in MIG mode any more"):
        rig.sample()


def test_a_gpu_that_is_counted_no_more_asks_for_a_new_inventory() -> None:
    rig = Rig().opened()
    rig.play(Vanish(gpu=3))
    with pytest.raises(InventoryChanged, match="counted 4 GPUs, now 3"):
        rig.sample(SLOW)
    rig.driver.inventory()
    assert len(rig.sample(SLOW)) == 3


def test_another_gpu_in_the_same_place_asks_for_a_new_inventory() -> None:
    rig = Rig().opened()
    rig.play(Answer(gpu=2, function="nvmlDeviceGetUUID", value="GPU-new"))
    rig.sample()
    with pytest.raises(InventoryChanged, match=f"{rig.nvml.uuids[2]}: in its place is GPU-new"):
        rig.sample(SLOW)


@pytest.mark.parametrize(
    ("slices", "parts", "megabytes", "profile"),
    [
        (1, 1, 9984, "1g.10gb"),
        (3, 3, 40448, "3g.40gb"),
        (2, 1, 20096, "1c.2g.20gb"),
        (7, 7, 81152, "7g.79gb"),
    ],
)
def test_a_profile_made_of_its_parts(slices: int, parts: int, megabytes: int, profile: str) -> None:
    made_of = NVML.c_nvmlDeviceAttributes()
    made_of.gpuInstanceSliceCount, made_of.computeInstanceSliceCount = slices, parts
    made_of.memorySizeMB = megabytes
    assert profile_of(made_of) == profile


def test_a_device_without_a_name_is_called_by_its_parts() -> None:
    rig = Rig(mig=(TWO,))
    ask = rig.nvml.nvmlDeviceGetName

    def name(handle: Any) -> str:
        return ask(handle).partition(" MIG ")[0]

    rig.nvml.nvmlDeviceGetName = name  # type: ignore[method-assign]
    assert profiles(rig.opened().sample()[0]) == ["3g.40gb", "1g.10gb"]
