"""Where requests go: best fit, all or nothing, and one line that says why nowhere."""

from dataclasses import dataclass

import pytest
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    T4,
    Scene,
    make_facts,
    make_gpus,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import Plan, Refusals, Request
from stoker.aggregator.placing.place import explain, find_place, place


def three_nodes() -> Scene:
    """Free are 8 of 8 GPUs on n1, 3 of 8 on n2, 2 of 4 on n3."""
    scene = Scene(make_facts("n1"), make_facts("n2"), make_facts("n3", 4))
    scene.grant(whole(5, node="n2"))
    scene.grant(whole(2, node="n3"))
    return scene


@dataclass(frozen=True)
class Best:
    what: str
    request: Request
    node: str
    uuids: tuple[str, ...]


BEST_WHOLE = (
    Best("where the fewest are left", whole(1), "n3", ("n3-2",)),
    Best("where none is left", whole(3), "n2", ("n2-5", "n2-6", "n2-7")),
    Best("the only node with so many", whole(4), "n1", ("n1-0", "n1-1", "n1-2", "n1-3")),
    Best("the node that was asked for", whole(1, node="n1"), "n1", ("n1-0",)),
    Best("the host that was asked for", whole(1, host_boot_id="boot of n2"), "n2", ("n2-5",)),
)


@pytest.mark.parametrize("case", BEST_WHOLE, ids=lambda case: case.what)
def test_whole_gpus_go_where_the_fewest_are_left(case: Best) -> None:
    plan = place(case.request, three_nodes().view())
    assert isinstance(plan, Plan)
    assert (plan.node, tuple(d.uuid for d in plan.devices)) == (case.node, case.uuids)
    assert all(d.exclusive and d.memory_bytes == 80 * GIB for d in plan.devices)


def shared_nodes() -> Scene:
    """Room for shares: 80 and 30 GiB on n1, 20 and 80 on n2; n3's only GPU is held whole."""
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2), make_facts("n3", 1))
    scene.grant(whole(1, node="n3"))
    scene.grant(share(50, node="n1"))
    scene.grant(share(60, node="n2"))
    return scene


BEST_SHARE = (
    Best("the shared GPU with the least room", share(20), "n2", ("n2-0",)),
    Best("the next one when that is too small", share(21), "n1", ("n1-0",)),
    Best("a free one only when no shared one will do", share(31), "n1", ("n1-1",)),
    Best("a free one on the node that was asked for", share(21, node="n2"), "n2", ("n2-1",)),
)


@pytest.mark.parametrize("case", BEST_SHARE, ids=lambda case: case.what)
def test_share_goes_to_the_gpu_with_the_least_room(case: Best) -> None:
    plan = place(case.request, shared_nodes().view())
    assert isinstance(plan, Plan)
    assert (plan.node, tuple(d.uuid for d in plan.devices)) == (case.node, case.uuids)
    (device,) = plan.devices
    assert (device.exclusive, device.memory_bytes) == (False, case.request.memory_bytes)


def test_on_mixed_nodes_only_gpus_of_the_model_are_left_over() -> None:
    mixed = (*make_gpus("m", 6, T4, 16), *make_gpus("a", 2, A100, 40))
    scene = Scene(make_facts("mixed", mixed), make_facts("pure", make_gpus("p", 4, A100, 40)))
    plan = place(whole(2, models=("A100",)), scene.view())
    assert isinstance(plan, Plan)
    assert (plan.node, [d.uuid for d in plan.devices]) == ("mixed", ["a-0", "a-1"])


def test_gang_is_not_spread_over_nodes() -> None:
    scene = Scene(make_facts("n1", 3), make_facts("n2", 3))
    assert find_place(whole(4), scene.view()) is None


def test_same_fleet_gives_the_same_plan() -> None:
    names = [f"n{i}" for i in (3, 1, 2)]
    plans = {find_place(whole(), Scene(*map(make_facts, names)).view()) for _ in range(5)}
    assert [plan.node for plan in plans if plan is not None] == ["n1"]  # the first by name


def test_node_kept_for_another_is_passed_by() -> None:
    scene = Scene(make_facts("n1"), make_facts("n2"))
    plan = place(whole(), scene.view(), {"n1": "a7"})
    assert isinstance(plan, Plan)
    assert plan.node == "n2"
    refused = place(whole(), scene.view(), {"n1": "a7", "n2": "a8"})
    assert isinstance(refused, Refusals)
    assert [(r.node, r.filter, r.found) for r in refused.nodes] == [
        ("n1", "queue", "a7"),
        ("n2", "queue", "a8"),
    ]
    assert refused.nodes[0].reason == "it is kept for a7, which is ahead in the queue"


def summary(scene: Scene, request: Request) -> str:
    refusals = place(request, scene.view())
    assert isinstance(refusals, Refusals)
    return refusals.summary


def test_summary_of_an_empty_fleet() -> None:
    assert summary(Scene(), whole(2)) == "no node for 2 x GPU: the fleet has no nodes yet"


def test_summary_of_one_node_is_its_reason() -> None:
    scene = Scene(make_facts(gpus=1))
    assert summary(scene, whole(2, models=("H100",))) == (
        "no node for 2 x H100: n1: wanted 2 x H100 on one node, it has 1"
    )


def test_summary_counts_what_hinders_and_names_the_nearest_miss() -> None:
    scene = three_nodes()
    scene.record(e.NodeCordoned(scene.now, "n1", "Xid 79"))
    assert summary(scene, whole(4)) == (
        "no node for 4 x GPU: 3 nodes: 2 no 4 free GPUs on one node (best: n2 has 3), "
        "1 cordoned: Xid 79"
    )


def test_summary_names_the_nearest_miss_in_memory() -> None:
    scene = shared_nodes()
    scene.grant(share(70, node="n1"))
    scene.grant(share(75, node="n2"))
    assert summary(scene, share(40)) == (
        "no node for 40 GiB of one GPU: 3 nodes: 3 no 40 GiB free on one GPU (best: n1 has 30 GiB)"
    )


def test_explanation_says_how_many_nodes_can_host_it() -> None:
    scene = three_nodes()
    explained = explain(whole(3), scene.view())
    assert explained.summary == "2 of 3 nodes can host 3 x GPU now"
    assert [refusal.node for refusal in explained.nodes] == ["n3"]
