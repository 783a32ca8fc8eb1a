"""Which GPUs DCGM is asked about, and that no fact of a GPU has two sources."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.dcgm.fields import FIELDS
from stoker.agent.dcgm.merge import READINGS_UNTOLD_MIN, Question, Sources, Told
from stoker.agent.facts import Fact
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuIdentity,
    GpuReading,
    Inventory,
    MigDeviceReading,
    ReadFailure,
)

POWER = {Fact.POWER_WATTS: 300.0}
SM, OCCUPANCY = Fact.SM_ACTIVE_RATIO, Fact.SM_OCCUPANCY_RATIO
TRAFFIC = Fact.PCIE_TRANSMIT_BYTES_PER_SECOND
FAILURE = ReadFailure("dcgm", "not_available", "g0: why")


def reading(uuid: str = "g0", at: float = 1.0, **more: object) -> GpuReading:
    return GpuReading(uuid, at, **{"facts": POWER, **more})  # type: ignore[arg-type]


def inventory(**capabilities: str | None) -> Inventory:
    gpus = (
        GpuIdentity(index, uuid, "a card", 1 << 30, compute_capability=capability)
        for index, (uuid, capability) in enumerate(capabilities.items())
    )
    return Inventory(1.0, None, None, None, True, tuple(gpus))


def mig(instance: int, device: str = "", **facts: float) -> MigDeviceReading:
    told = {Fact(name): value for name, value in facts.items()}
    return MigDeviceReading(device or f"m{instance}", instance, 0, "1g.5gb", told)


def asked(sources: Sources, *readings: GpuReading, profiling: bool = True) -> Question:
    return sources.question(readings, profiling=profiling)


def learnt(*readings: GpuReading) -> Sources:
    """What was asked about so often, and so long, that it is known who needs DCGM."""
    sources = Sources()
    for number in range(READINGS_UNTOLD_MIN):
        asked(sources, *(replace(each, at=each.at + number * 10) for each in readings))
    return sources


def test_a_gpu_before_hopper_is_asked_about_at_once() -> None:
    sources = Sources()
    sources.learn(inventory(g0="8.0", g1="9.0", g2=None))
    question = asked(sources, reading("g0"), reading("g1"), reading("g2"))
    assert question == Question({"g0": frozenset()}, profiling=True)


@pytest.mark.parametrize(
    ("at", "is_asked"),
    [
        ([0, 10], False),
        ([0, 1, 2], False),
        ([0, 2, 4, 4.9], False),
        ([0, 2, 5], True),
        ([0, 1, 2, 3, 4, 5], True),
    ],
)
def test_another_is_asked_about_when_nvml_had_its_chance(at: list[float], is_asked: bool) -> None:
    sources = Sources()
    sources.learn(inventory(g0="9.0"))
    questions = [asked(sources, reading(at=moment)) for moment in at]
    assert [bool(question.gpus) for question in questions] == [
        *(False for _ in at[:-1]),
        is_asked,
    ]


def test_only_the_gpus_without_are_asked_about() -> None:
    told = reading("g1", facts={SM: 0.5})
    assert asked(learnt(reading("g0"), told), reading("g0"), told).gpus.keys() == {"g0"}


@pytest.mark.parametrize(
    "first",
    [
        reading(facts={SM: 0.5}),
        reading(mig_devices=(mig(1, sm_active_ratio=0.5),)),
    ],
    ids=["of the GPU", "of an instance"],
)
def test_who_told_once_is_never_asked_about(first: GpuReading) -> None:
    sources = Sources()
    sources.learn(inventory(g0="8.0"))
    asked(sources, first)
    for number in range(2 * READINGS_UNTOLD_MIN):
        assert asked(sources, reading(at=10.0 * number)).gpus == {}
        assert asked(sources, reading(at=10.0 * number), profiling=False).gpus == {}


def test_traffic_alone_is_no_hardware_counter() -> None:
    before = reading(facts={TRAFFIC: 1.0})
    assert asked(learnt(before), before).gpus.keys() == {"g0"}


def test_a_failure_of_nvml_is_no_sign_that_it_cannot() -> None:
    failed = (ReadFailure(SM, "unknown", "g0: GPM"),)
    sources = Sources()
    for number in range(2 * READINGS_UNTOLD_MIN):
        assert asked(sources, reading(at=10.0 * number, failures=failed)).gpus == {}


def test_a_lost_gpu_is_not_asked_about() -> None:
    lost = GpuReading("g0", 1.0, failures=(ReadFailure(WHOLE_GPU, "gpu_lost", "g0: lost"),))
    assert asked(learnt(reading()), lost).gpus == {}


def test_a_pause_is_for_all_that_may_be_measured() -> None:
    sources = Sources()
    sources.learn(inventory(before="8.0", unknown=None, hopper="9.0"))
    asked(sources, reading("told", facts={SM: 0.5}))
    names = ("before", "unknown", "hopper", "told")
    question = asked(sources, *map(reading, names), profiling=False)
    assert question == Question({"before": frozenset(), "unknown": frozenset()}, profiling=False)
    for number in range(2 * READINGS_UNTOLD_MIN):
        asked(sources, reading("unknown", at=10.0 * number), profiling=False)
    # Nobody tells anything in a pause: it decides nothing.
    assert asked(sources, reading("unknown", at=100.0)).gpus == {}


def test_the_instances_are_part_of_the_question() -> None:
    divided = reading(mig_devices=(mig(1), mig(5), mig(5, "m5b")))
    assert asked(learnt(divided), divided).gpus == {"g0": frozenset({1, 5})}


def test_what_dcgm_tells_joins_the_reading() -> None:
    divided = reading(mig_devices=(mig(1, memory_used_bytes=7.0), mig(5)))
    told = Told(
        {"g0": {SM: 0.5}, "g9": {SM: 0.9}},
        {("g0", 1): {SM: 0.25}, ("g9", 5): {SM: 0.9}},
        {"g0": FAILURE},
    )
    earlier = ReadFailure("power_watts", "unknown", "g0: power")
    merged = learnt(divided).merged(
        GpuReading("g0", 1.0, facts=POWER, mig_devices=divided.mig_devices, failures=(earlier,)),
        told,
    )
    assert merged.facts == {**POWER, SM: 0.5}
    assert [device.facts for device in merged.mig_devices] == [
        {Fact.MEMORY_USED_BYTES: 7.0, SM: 0.25},
        {},
    ]
    assert merged.failures == (earlier, FAILURE)


def test_a_fact_that_nvml_told_is_never_taken_from_dcgm() -> None:
    sources = learnt(reading(facts={**POWER, TRAFFIC: 5.0}))
    told = Told({"g0": {TRAFFIC: 9.0, OCCUPANCY: 0.5}})
    # Not even while NVML does not tell it: the series would change its source.
    assert sources.merged(reading(), told).facts == {**POWER, OCCUPANCY: 0.5}


PROFILING = st.dictionaries(st.sampled_from(list(FIELDS.values())), st.floats(0, 1))


@given(history=st.lists(PROFILING, min_size=1, max_size=6), more=PROFILING)
def test_every_fact_has_one_source_for_good(
    history: list[dict[Fact, float]], more: dict[Fact, float]
) -> None:
    sources, by_nvml = Sources(), set[Fact]()
    for facts in history:
        before = reading(facts=facts)
        asked(sources, before)
        by_nvml |= facts.keys()
        merged = sources.merged(before, Told({"g0": more}))
        assert {fact: merged.facts[fact] for fact in facts} == facts
        by_dcgm = merged.facts.keys() - facts.keys()
        assert by_dcgm == more.keys() - by_nvml
