"""Several MIG devices in one allocation: granted together, held, given back, taken over."""

from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import GIB, Scene, make_facts, make_gpus, whole

from stoker.aggregator.model import (
    MIG_ANY,
    AllocationState,
    Gpu,
    HeldAllocation,
    MigDevice,
)
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.wishes import Refused, Settled

SIZES = {"1g.10gb": 10, "3g.40gb": 40}


def cut(gpu: Gpu, *profiles: str) -> Gpu:
    devices = tuple(
        MigDevice(f"MIG-{gpu.index}-{i}", each, SIZES[each] * GIB, i, 0)
        for i, each in enumerate(profiles)
    )
    return replace(gpu, mig_enabled=True, mig_devices=devices)


def scene_of(*cards: tuple[str, ...]) -> Scene:
    gpus = make_gpus("n1", len(cards))
    return Scene(
        make_facts(gpus=tuple(cut(gpu, *each) for gpu, each in zip(gpus, cards, strict=True)))
    )


TWO_CARDS = (("1g.10gb", "1g.10gb", "3g.40gb"), ("1g.10gb",))


def test_they_are_granted_together_or_not_at_all() -> None:
    scene = scene_of(*TWO_CARDS)
    assert isinstance(scene.allocate(whole(4, mig_profile="1g.10gb")), Refused)
    three = scene.grant(whole(3, mig_profile="1g.10gb"))
    assert {each.mig_device_uuid for each in three.devices} == {"MIG-0-0", "MIG-0-1", "MIG-1-0"}
    assert isinstance(scene.allocate(whole(mig_profile="1g.10gb")), Refused)
    assert isinstance(scene.allocate(whole(mig_profile="3g.40gb")), Settled)


def test_a_node_is_told_each_card_once_and_every_device() -> None:
    scene = scene_of(*TWO_CARDS)
    mine = scene.grant(whole(3, mig_profile="1g.10gb"))
    (command,) = scene.obey("n1")
    assert command.hold is not None
    assert command.hold.gpu_uuids == ("n1-0", "n1-1")
    assert command.hold.mig_device_uuids == ("MIG-0-0", "MIG-0-1", "MIG-1-0")
    assert command.hold.memory_bytes is None, "each device has its own"
    scene.hand_back(mine.id)
    assert isinstance(scene.allocate(whole(3, mig_profile="1g.10gb")), Settled)


def test_what_waits_is_granted_when_the_last_of_them_is_free() -> None:
    scene = scene_of(("1g.10gb", "1g.10gb"))
    first, second = (scene.grant(whole(mig_profile="1g.10gb", ttl_seconds=1e6)) for _ in range(2))
    scene.obey("n1")
    waiting = scene.wait(whole(2, mig_profile="1g.10gb"))
    scene.hand_back(first.id)
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.WAITING
    scene.hand_back(second.id)
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.GRANTED


def test_what_nobody_had_when_it_was_asked_for_is_found_once_a_card_is_cut_so() -> None:
    scene, placer = scene_of(("1g.10gb",), ()), Placer()
    request = whole(mig_profile="3g.40gb")
    assert find_place(request, scene.view(), placer=placer) is None
    first, second = scene.gpus_of("n1")
    scene.change_facts("n1", gpus=(first, cut(second, "3g.40gb")))
    plan = find_place(request, scene.view(), placer=placer)
    assert plan is not None
    assert [each.mig_device_uuid for each in plan.devices] == ["MIG-1-0"]


def held(*uuids: str, gpus: tuple[str, ...] = ("n1-0", "n1-1")) -> HeldAllocation:
    return HeldAllocation("old", gpus, None, "ann", 60.0, 5.0, mig_device_uuids=uuids)


@pytest.mark.parametrize(
    ("told", "profile"),
    [
        (held("MIG-0-0", "MIG-1-0"), "1g.10gb"),
        (held("MIG-0-2", "MIG-1-0"), MIG_ANY),
        (held("MIG-0-0", "MIG-0-1", gpus=("n1-0",)), "1g.10gb"),
    ],
    ids=["of two cards", "of two profiles", "of one card"],
)
def test_what_a_node_holds_and_nobody_knows_is_taken_over(
    told: HeldAllocation, profile: str
) -> None:
    scene = scene_of(*TWO_CARDS)
    scene.frame("n1", held=(told,))
    scene.decide()
    mine = scene.fleet.allocations["old"]
    assert tuple(each.mig_device_uuid for each in mine.devices) == told.mig_device_uuids
    assert (mine.request.gpus, mine.request.mig_profile) == (2, profile)
    assert scene.replayed().allocations["old"] == mine


@pytest.mark.parametrize(
    "told",
    [held("MIG-0-0"), held("MIG-0-0", "MIG-9-9"), held("MIG-0-0", "MIG-0-0", gpus=("n1-0",))],
    ids=["a card of which it has nothing", "a device that is not there", "a device twice"],
)
def test_what_cannot_be_held_is_not_taken_over(told: HeldAllocation) -> None:
    scene = scene_of(*TWO_CARDS)
    scene.frame("n1", held=(told,))
    scene.decide()
    assert "old" not in scene.fleet.allocations


def test_one_whose_device_is_taken_is_not_taken_over() -> None:
    scene = scene_of(*TWO_CARDS)
    mine = scene.grant(whole(mig_profile="1g.10gb"))
    taken = mine.devices[0].mig_device_uuid
    scene.frame("n1", held=(held("MIG-0-0", "MIG-1-0"),))
    scene.decide()
    assert taken in ("MIG-0-0", "MIG-1-0")
    assert "old" not in scene.fleet.allocations
