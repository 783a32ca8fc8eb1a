"""Drains by story: what is held is ended after a grace, and a restart does not forget it."""

from tests.unit.aggregator.builders import (
    START,
    Scene,
    make_facts,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.decisions import Round, next_due
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import AllocationState
from stoker.aggregator.wishes import Cordon, Drain, Refused, Uncordon


def test_drain_ends_what_is_held_after_its_grace() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(ttl_seconds=1e6))
    scene.obey("n1")
    scene.decide(Drain("n1", "new fans", grace_seconds=600.0))
    assert scene.fleet.nodes["n1"].drain_at == START + 600.0
    assert isinstance(scene.allocate(whole()), Refused)
    scene.watch.version = scene.fleet.conditions.version
    assert next_due(scene.fleet, scene.watch) == START + 600.0
    scene.later(599.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.later(1.0)
    scene.decide()
    ending = scene.fleet.allocations[mine.id]
    assert (ending.state, ending.reason) == (AllocationState.RELEASING, "drained: new fans")
    assert next_due(scene.fleet, scene.watch) is None, "nothing is left to end"


def test_drain_of_a_gpu_ends_what_has_a_part_of_it() -> None:
    scene = Scene(make_facts(gpus=4))
    gang = scene.grant(whole(2, ttl_seconds=1e6))
    parts = [scene.grant(share(20, ttl_seconds=1e6)) for _ in range(2)]
    other = scene.grant(whole(ttl_seconds=1e6))
    scene.obey("n1")
    for uuid in (gang.devices[1].uuid, parts[0].devices[0].uuid):
        scene.decide(Drain("n1", "hot", uuid, 30.0))
    scene.later(30.0)
    scene.decide()
    states = {a.id: scene.state(a.id) for a in (gang, *parts, other)}
    assert states == {
        gang.id: AllocationState.RELEASING,
        parts[0].id: AllocationState.RELEASING,
        parts[1].id: AllocationState.RELEASING,
        other.id: AllocationState.GRANTED,
    }
    assert scene.fleet.allocations[gang.id].reason == "drained: hot"


def test_drain_without_grace_waits() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=1e6))
    scene.decide(Drain("n1", "new fans"))
    scene.later(86_400.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    assert scene.fleet.nodes["n1"].cordoned == "new fans"


def test_cordon_leaves_a_drain_as_it_is_and_uncordon_ends_it() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(ttl_seconds=1e6))
    scene.decide(Drain("n1", "fans", grace_seconds=60.0), Drain("n1", "hot", "n1-0", 60.0))
    scene.decide(Cordon("n1", "power"), Cordon("n1", "power", "n1-0"))
    assert (scene.fleet.drains, dict(scene.fleet.conditions.drains)) == (
        {"n1": START + 60.0},
        {"n1-0": START + 60.0},
    )
    scene.decide(Uncordon("n1"), Uncordon("n1", "n1-0"))
    scene.later(60.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_drain_goes_on_over_a_restart() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=1e6))
    scene.decide(Drain("n1", "fans", grace_seconds=60.0))
    for fleet in (scene.replayed(), Fleet.restored(scene.fleet.snapshot())):
        fleet.note(e.Recovered(START + 10.0))
        assert next_due(fleet) == START + 60.0
        one = Round(fleet, START + 60.0, scene.new_id)
        one.housekeep(set())
        released = [event for event in one.events if isinstance(event, e.AllocationReleasing)]
        assert [(each.id, each.reason) for each in released] == [(mine.id, "drained: fans")]
