"""A gang lives and ends as one: granted on all of its nodes, over when the last of them let go."""

from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import (
    A100,
    START,
    Scene,
    durable_tables,
    make_facts,
    make_gpus,
    whole,
)

from stoker.aggregator.model import AllocationState, HeldAllocation
from stoker.aggregator.tenancy import still_with
from stoker.aggregator.wishes import Queued, Refused, Settled

NODES = ("n1", "n2", "n3")


def three_nodes(gpus: int = 2) -> Scene:
    return Scene(*(make_facts(name, gpus) for name in NODES))


def granted_on_two() -> tuple[Scene, str]:
    """A gang on n1 and n2 of three nodes, held by both."""
    scene = three_nodes()
    gang = scene.grant(whole(2, nodes=2))
    assert gang.nodes == ("n1", "n2")
    for name in gang.nodes:
        scene.obey(name)
    scene.decide()
    return scene, gang.id


def test_every_node_holds_its_own_part() -> None:
    scene, id_ = granted_on_two()
    held = {name: scene.journals[name].get(id_) for name in NODES}
    assert held["n3"] is None
    for name in ("n1", "n2"):
        part = held[name]
        assert part is not None
        assert (part.gpu_uuids, part.gang_nodes) == ((f"{name}-0", f"{name}-1"), 2)
    assert [scene.view().nodes[name].free_gpus for name in NODES] == [0, 0, 2]


def test_it_is_over_when_the_last_node_has_let_go() -> None:
    scene, id_ = granted_on_two()
    scene.release(id_)
    scene.obey("n1")
    scene.decide()
    assert scene.state(id_) is AllocationState.RELEASING, "n2 has not confirmed it"
    assert still_with(scene.fleet, scene.fleet.allocations[id_]) == ("n2",)
    refused = scene.allocate(whole(2, node="n1"))
    assert isinstance(refused, Refused), "what one node let go of is still part of it"
    scene.obey("n2")
    scene.decide()
    assert scene.state(id_) is AllocationState.ENDED
    assert isinstance(scene.allocate(whole(2, nodes=3)), Settled)


def test_order_in_which_nodes_let_go_does_not_matter() -> None:
    scene, id_ = granted_on_two()
    scene.release(id_)
    scene.obey("n2")
    scene.decide()
    assert scene.state(id_) is AllocationState.RELEASING
    scene.obey("n1")
    scene.decide()
    assert scene.state(id_) is AllocationState.ENDED


def test_it_stays_while_a_node_cannot_be_heard_and_ends_when_it_is_back() -> None:
    scene, id_ = granted_on_two()
    scene.disconnect("n2")
    scene.release(id_)
    scene.obey("n1")
    scene.decide()
    assert scene.state(id_) is AllocationState.RELEASING
    scene.connect("n2")
    scene.report("n2")
    scene.obey("n2")
    scene.decide()
    assert scene.state(id_) is AllocationState.ENDED


def test_what_a_node_said_before_it_went_still_holds() -> None:
    """Nodes are switched off when their work is done: the others' GPUs must not wait for them."""
    scene, id_ = granted_on_two()
    scene.release(id_)
    scene.obey("n2")
    scene.decide()
    scene.disconnect("n2")
    scene.obey("n1")
    scene.disconnect("n1")
    scene.decide()
    assert scene.state(id_) is AllocationState.ENDED


def test_clone_of_one_of_its_nodes_does_not_speak_for_it() -> None:
    """A disk image of n2, with its journal, on other GPUs."""
    scene, id_ = granted_on_two()
    clone = make_facts("n4", 2, incarnation=scene.fleet.nodes["n2"].facts.incarnation)
    scene.journals["n4"] = dict(scene.journals["n2"])
    scene.disconnect("n2")
    scene.join(clone)
    scene.decide()
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n4")] == [(id_, False)]
    scene.release(id_)
    scene.obey("n1")
    scene.decide()
    assert scene.state(id_) is AllocationState.RELEASING, "n2 has not confirmed it"


@pytest.mark.parametrize("first", ["n1", "n2b"])
def test_renamed_node_speaks_for_the_part_under_its_old_name(first: str) -> None:
    scene, id_ = granted_on_two()
    facts = scene.fleet.nodes["n2"].facts
    scene.disconnect("n2")
    scene.journals["n2b"] = scene.journals["n2"]
    scene.join(replace(facts, name="n2b"))
    scene.decide()
    allocation = scene.fleet.allocations[id_]
    assert allocation.state is AllocationState.RELEASING
    assert allocation.reason == "its node n2 is called n2b now"
    for name in (first, "n1" if first == "n2b" else "n2b"):
        assert scene.state(id_) is AllocationState.RELEASING
        scene.obey(name)
        scene.decide()
    assert scene.state(id_) is AllocationState.ENDED


def test_refusal_of_one_node_gives_the_whole_gang_up() -> None:
    scene = three_nodes()
    id_ = scene.grant(whole(2, nodes=2)).id
    scene.obey("n1")
    scene.send_commands("n2")
    scene.refuse("n2", id_, "GPU n2-0 is used by PID 5")
    scene.decide()
    allocation = scene.fleet.allocations[id_]
    assert allocation.state is AllocationState.RELEASING
    assert allocation.reason == "refused by node n2: GPU n2-0 is used by PID 5"


def test_it_expires_as_one() -> None:
    scene, id_ = granted_on_two()
    scene.later(61.0)
    scene.decide()
    assert scene.state(id_) is AllocationState.RELEASING
    for name in ("n1", "n2"):
        scene.obey(name)
    scene.decide()
    assert scene.state(id_) is AllocationState.ENDED


def test_it_is_all_or_nothing() -> None:
    scene = three_nodes()
    scene.grant(whole(1, node="n2"))
    scene.grant(whole(1, node="n3"))
    assert isinstance(scene.allocate(whole(2, nodes=2)), Refused)
    assert [scene.view().nodes[name].free_gpus for name in NODES] == [2, 1, 1]


def test_gpus_of_one_gang_are_of_one_model() -> None:
    other = make_facts("a1", make_gpus("a1", 2, A100, 40))
    scene = Scene(make_facts("n1", 2), other)
    assert isinstance(scene.allocate(whole(2, nodes=2)), Refused)
    scene.join(make_facts("a2", make_gpus("a2", 2, A100, 40)))
    assert scene.grant(whole(2, nodes=2)).nodes == ("a1", "a2")


def test_one_that_waits_gets_all_its_nodes_at_once() -> None:
    scene = three_nodes()
    first = scene.grant(whole(2, nodes=2, ttl_seconds=1e6))
    waiting = scene.wait(whole(2, nodes=2))
    newcomer = scene.allocate(whole(2), wait_seconds=60.0)
    assert isinstance(newcomer, Queued), "n3 is kept for the gang"
    scene.release(first.id)
    scene.obey("n1")
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.WAITING
    scene.obey("n2")
    scene.decide(serve=True)
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.GRANTED
    assert len(scene.fleet.allocations[waiting.id].nodes) == 2


def test_gang_that_the_fleet_could_never_host_keeps_nothing() -> None:
    scene = three_nodes()
    scene.wait(whole(2, nodes=4))
    assert isinstance(scene.allocate(whole(2)), Settled)


def test_part_that_the_ledger_does_not_know_is_dropped() -> None:
    """One part alone is of no use, and nobody knows of the others in this instant."""
    scene = Scene()
    part = HeldAllocation("x", ("n1-0",), None, "ann", 60.0, START, gang_nodes=2)
    scene.journals["n1"] = {"x": part}
    scene.join(make_facts("n1", 2))
    scene.decide()
    assert "x" not in scene.fleet.allocations
    (command,) = scene.send_commands("n1")
    assert (command.allocation_id, command.is_hold) == ("x", False)


def test_restart_knows_all_of_it() -> None:
    scene, id_ = granted_on_two()
    assert durable_tables(scene.replayed()) == durable_tables(scene.fleet)
    assert scene.replayed().allocations[id_].nodes == ("n1", "n2")
