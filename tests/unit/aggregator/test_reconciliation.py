"""What a node reports against what the ledger says: adoption, strays, renamed hosts."""

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import GIB, START, Scene, make_facts, make_gpus, share, whole

from stoker.aggregator import events as e
from stoker.aggregator.model import AllocationState, HeldAllocation, NodeFacts, Request
from stoker.aggregator.tenancy import allocations_on
from stoker.aggregator.wishes import (
    Queued,
    Refused,
    Settled,
)


def held(
    id_: str, *uuids: str, memory_bytes: int | None = None, holder: str = "ann"
) -> HeldAllocation:
    return HeldAllocation(id_, uuids, memory_bytes, holder, 60.0, START - 100.0)


def reported(*allocations: HeldAllocation, facts: NodeFacts | None = None) -> Scene:
    """A ledger without history, and a node of two GPUs that says what it holds."""
    scene = Scene()
    facts = facts or make_facts(gpus=2)
    scene.journals[facts.name] = {each.id: each for each in allocations}
    scene.join(facts)
    scene.decide()
    return scene


def test_whole_gpus_are_adopted() -> None:
    scene = reported(held("x", "n1-0", "n1-1"))
    mine = scene.fleet.allocations["x"]
    assert (mine.state, mine.node) == (AllocationState.GRANTED, "n1")
    assert [(d.uuid, d.exclusive, d.memory_bytes) for d in mine.devices] == [
        ("n1-0", True, 80 * GIB),
        ("n1-1", True, 80 * GIB),
    ]
    assert mine.request == replace(whole(2), holder="ann", ttl_seconds=60.0)
    assert scene.fleet.expires_at("x") == START + 60.0, "its full TTL from now"
    assert scene.send_commands("n1") == ()
    assert scene.view().nodes["n1"].free_gpus == 0


def test_shares_are_adopted_beside_each_other() -> None:
    scene = reported(
        held("x", "n1-0", memory_bytes=50 * GIB), held("y", "n1-0", memory_bytes=30 * GIB)
    )
    assert {"x", "y"} == set(allocations_on(scene.fleet, "n1"))
    assert scene.view().nodes["n1"].gpus[0].room_bytes == 0
    assert scene.fleet.allocations["x"].request.memory_bytes == 50 * GIB


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(held("x", "n1-0"), held("y", "n1-0"), id="one GPU twice"),
        pytest.param(
            held("x", "n1-0"), held("y", "n1-0", memory_bytes=GIB), id="a share of a held GPU"
        ),
        pytest.param(
            held("x", "n1-0", memory_bytes=50 * GIB),
            held("y", "n1-0", memory_bytes=31 * GIB),
            id="more memory than there is",
        ),
        pytest.param(
            held("x", "n1-0", memory_bytes=GIB), held("y", "n1-0", "n1-1"), id="a gang over a share"
        ),
    ],
)
def test_of_two_that_exclude_each_other_one_is_adopted(
    first: HeldAllocation, second: HeldAllocation
) -> None:
    scene = reported(first, second)
    assert set(scene.fleet.allocations) == {"x"}
    (told,) = scene.obey("n1")
    assert (told.allocation_id, told.is_hold) == ("y", False)
    assert told.reason == "the ledger does not grant it"


@pytest.mark.parametrize(
    "stray",
    [
        pytest.param(held("x", "n9-0"), id="a GPU that the node has not"),
        pytest.param(held("x", "n1-0", "n9-0"), id="one of its GPUs is not there"),
        pytest.param(held("x"), id="no GPU"),
        pytest.param(held("x", "n1-0", "n1-0"), id="one GPU twice"),
        pytest.param(held("x", "n1-0", memory_bytes=81 * GIB), id="more than the GPU has"),
        pytest.param(held("x", "n1-0", memory_bytes=0), id="nothing of a GPU"),
        pytest.param(held("x", "n1-0", "n1-1", memory_bytes=GIB), id="a share of two GPUs"),
        pytest.param(
            replace(held("x", "n1-0", "n1-1"), compute_milli=500), id="compute of two GPUs"
        ),
        pytest.param(replace(held("x", "n1-0"), compute_milli=500), id="compute without memory"),
    ],
)
def test_what_cannot_be_granted_is_dropped(stray: HeldAllocation) -> None:
    scene = reported(stray)
    assert scene.fleet.allocations == {}
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [("x", False)]
    scene.decide()
    assert scene.send_commands("n1") == ()


def test_what_is_being_dropped_is_not_adopted_when_its_gpu_becomes_free() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.journals["n1"]["x"] = held("x", "n1-0")
    scene.connect("n1")
    scene.decide()
    dropped = scene.send_commands("n1")  # the node takes its time
    assert [c.allocation_id for c in dropped] == ["x"]
    del scene.journals["n1"][mine.id]
    scene.release(mine.id)
    scene.send_commands("n1")
    scene.frame("n1", held=tuple(scene.journals["n1"].values()), commands_done=2)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert "x" not in scene.fleet.allocations


def test_nothing_is_dropped_before_the_node_has_told_its_gpus() -> None:
    scene = reported(held("x", "n1-0"), facts=make_facts(gpus=()))
    assert scene.fleet.allocations == {}
    assert scene.send_commands("n1") == ()
    scene.change_facts("n1", gpus=make_gpus("n1", 1))
    scene.decide()
    assert scene.state("x") is AllocationState.GRANTED


def test_what_the_node_was_told_to_let_go_of_is_dropped_not_adopted() -> None:
    # It ended and was forgotten; the node did not hear that its report of it had arrived.
    scene = reported(replace(held("x", "n1-0"), is_leaving=True))
    assert scene.fleet.allocations == {}
    assert [(c.allocation_id, c.is_hold) for c in scene.send_commands("n1")] == [("x", False)]


def test_what_has_ended_is_dropped_not_adopted() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    journal = dict(scene.journals["n1"])
    scene.hand_back(mine.id)
    scene.journals["n1"] = journal  # its disk was restored
    scene.connect("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [(mine.id, False)]


def test_gpu_of_a_stray_is_given_to_nobody_before_it_is_dropped() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    journal = dict(scene.journals["n1"])
    scene.hand_back(mine.id)
    scene.journals["n1"] = journal  # its disk was restored
    scene.connect("n1")
    scene.report("n1")
    for request in (whole(), share(1)):
        refused = scene.allocate(request)
        assert isinstance(refused, Refused)
        assert refused.refusals.nodes[0].reason.endswith(
            "held by the node for a1, which the ledger does not grant"
        )
    before = scene.fleet.capacity_version
    scene.obey("n1")
    assert scene.fleet.capacity_version > before
    assert isinstance(scene.allocate(whole()), Settled)


def test_what_another_node_was_granted_is_dropped() -> None:
    scene = Scene(make_facts("n1", 1), make_facts("n2", 1))
    mine = scene.grant(whole(node="n1"))
    scene.journals["n2"][mine.id] = held(mine.id, "n2-0")
    scene.connect("n2")
    scene.decide()
    assert scene.fleet.allocations[mine.id].node == "n1"
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n2")] == [(mine.id, False)]


def test_what_a_restored_ledger_has_as_waiting_is_granted_as_the_node_holds_it() -> None:
    scene = Scene(make_facts(gpus=1))
    other = scene.grant(whole())
    waiting = scene.allocate(whole(priority=3), key="k", wait_seconds=60.0)
    scene.hand_back(other.id)
    scene.journals["n1"]["a2"] = held("a2", "n1-0")
    scene.connect("n1")
    scene.decide()
    mine = scene.fleet.allocations["a2"]
    assert (mine.state, mine.request.priority) == (AllocationState.GRANTED, 3)
    assert (mine.idempotency_key, mine.requested_at) == ("k", START)
    assert scene.fleet.waiting == {}
    assert waiting != scene.allocate(whole(priority=3), key="k")


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        pytest.param(whole(2, node="n1"), held("a2", "n1-0"), id="fewer GPUs"),
        pytest.param(whole(1, node="n1"), held("a2", "n1-0", "n1-1"), id="more GPUs"),
        pytest.param(whole(1, nodes=2), held("a2", "n1-0"), id="a part of a gang"),
        pytest.param(
            whole(1, node="n1"),
            held("a2", "n1-0", memory_bytes=GIB),
            id="a share, not the GPU",
        ),
        pytest.param(share(1, node="n1"), held("a2", "n1-0"), id="the GPU, not a share"),
        pytest.param(
            whole(1, mig_profile="1g.10gb"), held("a2", "n1-0"), id="the GPU, not a MIG device"
        ),
    ],
)
def test_waiting_request_is_not_granted_what_it_did_not_ask_for(
    wish: Request, told: HeldAllocation
) -> None:
    """So does a ledger that was restored, or an agent that does not know of gangs."""
    scene = Scene(make_facts(gpus=2), make_facts("n2", gpus=1))
    scene.grant(whole(2, node="n1"))
    assert isinstance(scene.allocate(wish, wait_seconds=60.0), Queued)
    scene.hand_back("a1")
    scene.journals["n1"]["a2"] = told
    scene.connect("n1")
    scene.report("n1")
    scene.decide()
    assert scene.state("a2") is AllocationState.WAITING
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [("a2", False)]


def test_what_was_dropped_while_it_waited_is_held_when_it_is_granted() -> None:
    scene = Scene(make_facts(gpus=2))
    other = scene.grant(whole(2))
    scene.obey("n1")
    waiting = scene.wait(whole(1))
    scene.journals["n1"][waiting.id] = held(waiting.id, "n1-0")  # its disk was restored
    scene.connect("n1")
    scene.report("n1")
    scene.decide()
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [(waiting.id, False)]
    scene.hand_back(other.id)
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.GRANTED
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [(waiting.id, True)]
    assert scene.send_commands("n1") == ()


@pytest.mark.parametrize("what", ["cpu_milli", "host_memory_bytes"])
def test_what_a_stray_has_of_the_host_is_given_to_nobody_before_it_is_dropped(what: str) -> None:
    facts = replace(make_facts(gpus=2), cpu_milli=4 * GIB, host_memory_bytes=4 * GIB)
    stray = held("x", "n1-0")
    half: dict[str, Any] = {what: 2 * GIB}
    scene = reported(replace(stray, gang_nodes=2, **half), facts=facts)
    assert isinstance(scene.allocate(whole(**{what: 3 * GIB})), Refused)
    mine = scene.grant(whole(**half))
    assert mine.devices[0].uuid == "n1-1"
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [("x", False)]
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n1")] == [(mine.id, True)]
    scene.hand_back(mine.id)
    assert isinstance(scene.allocate(whole(**{what: 3 * GIB})), Settled)


def test_nodes_are_reconciled_only_while_they_are_connected() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.send_commands("n1")
    scene.refuse("n1", mine.id, "no")
    scene.disconnect("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.connect("n1")
    scene.decide()
    assert [c.is_hold for c in scene.obey("n1")] == [True], "it may accept it now"


# --- a host that is called something else now


def renamed(scene: Scene) -> None:
    """The agent of n1, with its journal and its GPUs, comes back as n2."""
    scene.disconnect("n1")
    facts = replace(scene.fleet.nodes["n1"].facts, name="n2", boot_id="another boot")
    scene.journals["n2"] = scene.journals.pop("n1")
    scene.join(facts)


def test_renamed_host_is_granted_once() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole())
    scene.obey("n1")
    renamed(scene)
    assert scene.view().nodes["n2"].free_gpus == 1
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert scene.fleet.allocations[mine.id].reason == "its node n1 is called n2 now"
    assert scene.view().nodes["n2"].free_gpus == 1, "the host still holds it"
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n2")] == [(mine.id, False)]
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.view().nodes["n2"].free_gpus == 2


def test_renamed_host_that_held_nothing_hands_back_too() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.release(mine.id)  # nobody was told
    renamed(scene)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert [(c.allocation_id, c.is_hold) for c in scene.obey("n2")] == [(mine.id, False)]
    assert scene.send_commands("n2") == (), "it was told"
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.fleet.allocations[mine.id].reason == "released"


def test_clone_of_a_host_does_not_speak_for_it() -> None:
    # The same disk image, so the same incarnation; other GPUs.
    scene = Scene(make_facts("n1", 1, incarnation="image"))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.disconnect("n1")
    scene.join(make_facts("n2", 1, incarnation="image"))
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_renamed_host_speaks_for_itself_beside_a_clone_of_it() -> None:
    scene = Scene(make_facts("n1", 1, incarnation="image"))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.join(make_facts("n0", 1, incarnation="image"))  # that was known before it
    renamed(scene)
    scene.decide()
    assert scene.fleet.allocations[mine.id].reason == "its node n1 is called n2 now"
    scene.obey("n2")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED


def test_other_agent_on_the_same_gpus_does_not_speak_for_the_first() -> None:
    scene = Scene(make_facts("n1", 1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.disconnect("n1")
    scene.join(make_facts("n2", make_gpus("n1", 1)))
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    assert scene.view().nodes["n2"].free_gpus == 0


def test_former_name_that_is_connected_speaks_for_itself() -> None:
    scene = Scene(make_facts("n1", 1, incarnation="j"))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.join(make_facts("n2", make_gpus("n1", 1), incarnation="j"))
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_shares_on_a_renamed_host_are_given_up_together() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = [scene.grant(share(20)).id for _ in range(3)]
    scene.obey("n1")
    renamed(scene)
    scene.decide()
    scene.obey("n2")
    scene.decide()
    assert {scene.state(id_) for id_ in mine} == {AllocationState.ENDED}
    assert scene.fleet.claims == {}


def test_refusal_of_a_node_is_for_what_it_was_granted() -> None:
    scene = Scene(make_facts("n1", 1), make_facts("n2", 1))
    mine = scene.grant(whole(node="n1"))
    scene.refuse("n2", mine.id, "not mine")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_adoption_is_durable() -> None:
    scene = reported(held("x", "n1-0"))
    assert isinstance(scene.log[-1], e.AllocationAdopted)
