"""Where requests go under each policy, told as situations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    START,
    Scene,
    make_facts,
    make_gpus,
    make_samples,
    share,
    whole,
)
from tests.unit.aggregator.placing.boards import partitioned

from stoker.aggregator import events as e
from stoker.aggregator.model import MIG_ANY, Gpu, NodeFacts, Plan, Request
from stoker.aggregator.placing import columns, scoring
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.place import place
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.policies import POLICIES, Policies, policy_named
from stoker.aggregator.placing.shapes import shape_of

L4 = "NVIDIA L4"


def host(name: str, gpus: int | tuple[Gpu, ...] = 8, cpus: int = 96, **fields: Any) -> NodeFacts:
    return replace(
        make_facts(name, gpus), cpu_milli=cpus * 1000, host_memory_bytes=512 * GIB, **fields
    )


def part(milli: int, **fields: Any) -> Request:
    return whole(1, compute_milli=milli, **fields)


def make_placer(policy: str = "binpack", mix: Sequence[Request] = (), **fields: Any) -> Placer:
    known = Mix.of(shape_of(request) for request in mix)
    return Placer(Policies.named(policy), known, is_learning=False, **fields)


def where(plan: Plan | None) -> str | None:
    """`node` or `node/index of the GPU`, of a share or a single GPU."""
    if plan is None:
        return None
    return f"{plan.node}/{plan.devices[0].index}" if len(plan.devices) == 1 else plan.node


@dataclass(frozen=True)
class Row:
    policy: str
    what: str
    taken: Sequence[Request]  # granted before, each with the node that it names
    request: Request
    expected: str
    mix: Sequence[Request] = ()


def on(node: str, request: Request) -> Request:
    return replace(request, node=node, ttl_seconds=1e6)


ONE_OF_BOTH = (on("a", part(300)), on("b", part(500)))
ROWS = (
    Row("binpack", "a share goes to the fullest GPU", ONE_OF_BOTH, part(200), "b/0"),
    Row("binpack", "a GPU goes to the fullest machine", (on("b", whole(6)),), whole(1), "b/6"),
    Row("spread", "a share goes to the emptiest GPU", (on("a", part(300)),), part(200), "b/0"),
    Row("spread", "GPUs go to the emptiest machine", (on("a", whole(1)),), whole(2), "b"),
    Row("bestfit", "least is left of CPU and GPU", (on("b", whole(4)),), whole(1), "b/4"),
    Row("dotprod", "least product of free and asked", (on("b", whole(4)),), whole(1), "b/4"),
    Row("clustering", "tasks of one kind together", (on("b", whole(2)),), whole(2), "b"),
    Row("clustering", "away from other kinds", (on("a", whole(2)),), whole(1), "b/0"),
    Row("packing", "a share on a GPU in use", (on("b", part(300)),), part(200), "b/0"),
    Row("packing", "a GPU on a node in use", (on("b", part(300)),), whole(1), "b/1"),
    Row("random", "any: here the last", (), whole(8), "b"),
    Row(
        "fgd",
        "where what is left is still of use",
        (on("a", part(500)), on("b", part(300))),
        part(700),
        "b/0",
        mix=[part(500), part(700)],
    ),
    Row(
        "fragmentation",
        "the rest that a size belongs to",
        (on("a", part(600)), on("b", part(810))),
        part(190),
        "b/0",
        mix=[part(810), part(190)] * 10 + [part(600), part(400)],
    ),
    Row(
        "fragmentation",
        "whole nodes are kept for jobs that need them",
        (on("b", whole(1)),),
        whole(1),
        "b/1",
        mix=[whole(8)] * 5 + [whole(1)] * 5,
    ),
    Row(
        "energy",
        "a host that draws power already",
        (on("b", whole(1)),),
        whole(1),
        "b/1",
        mix=[whole(1)],
    ),
)


def the_last(below: int) -> int:
    return below - 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.policy}: {row.what}")
def test_where_a_request_goes(row: Row) -> None:
    scene = Scene(host("a"), host("b"))
    for request in row.taken:
        scene.grant(request)
    placer = make_placer(row.policy, row.mix, draw=the_last)
    assert where(placer.find(row.request, scene.view())) == row.expected


def test_every_policy_has_a_row_or_a_test_of_its_own() -> None:
    assert {row.policy for row in ROWS} == POLICIES.keys() - {"balanced"}


def test_balanced_goes_by_what_the_gpus_do() -> None:
    scene = Scene(host("a", 1), host("b", 1))
    for node, busy in (("a", 0.9), ("b", 0.2)):
        samples = make_samples(scene.gpus_of(node))
        scene.frame(
            node,
            samples={
                uuid: type(sample)(memory_used_bytes=0, utilization_ratio=busy)
                for uuid, sample in samples.items()
            },
        )
    assert where(make_placer("balanced").find(share(4), scene.view())) == "b/0"


def test_a_model_that_others_need_is_left_to_them() -> None:
    scene = Scene(host("a"), host("b", make_gpus("b", 8, L4, 80)))
    bound = [whole(1, models=("H100",))] * 9
    placer = make_placer("fragmentation", [*bound, whole(1)])
    assert where(placer.find(whole(1), scene.view())) == "b/0"
    placer = make_placer("fragmentation", [whole(1)])
    assert where(placer.find(whole(1), scene.view())) == "a/0"


def test_cpus_are_left_to_the_gpus_beside_them() -> None:
    scene = Scene(host("a", cpus=96), host("b", cpus=200))
    hungry = whole(1, cpu_milli=24_000)
    placer = make_placer("fragmentation", [whole(1, cpu_milli=12_000)])
    assert where(placer.find(hungry, scene.view())) == "b/0"


def test_energy_takes_the_card_that_may_draw_least() -> None:
    hungry = tuple(replace(gpu, power_limit_watts=700.0) for gpu in make_gpus("a", 2))
    thrifty = tuple(replace(gpu, power_limit_watts=300.0) for gpu in make_gpus("b", 2))
    scene = Scene(host("a", hungry), host("b", thrifty))
    assert where(make_placer("energy", [whole(1)]).find(whole(1), scene.view())) == "b/0"


@pytest.mark.parametrize("policy", ["fragmentation", "binpack", "spread"])
def test_who_wants_no_gpu_leaves_hosts_with_gpus_alone(policy: str) -> None:
    scene = Scene(host("a"), host("b", ()))
    request = Request(0, "ann", 60.0, cpu_milli=4000)
    plan = make_placer(policy, [whole(1, cpu_milli=12_000)]).find(request, scene.view())
    assert plan is not None
    assert (plan.node, plan.devices) == ("b", ())


def test_the_smallest_mig_device_where_fewest_are_left() -> None:
    scene = Scene(
        host("a", (partitioned(0, ("1g.10gb", 10), ("1g.10gb", 10), node="a"),)),
        host("b", (partitioned(0, ("1g.10gb", 10), ("3g.40gb", 40), node="b"),)),
        host("c", (partitioned(0, ("1g.10gb", 10), node="c"),)),
    )
    placer = make_placer("fragmentation")
    view = scene.view()
    assert where(placer.find(whole(1, mig_profile="1g.10gb"), view)) == "c/0"
    large = whole(1, mig_profile=MIG_ANY, memory_bytes=20 * GIB)
    assert where(placer.find(large, view)) == "b/0"
    assert placer.find(whole(1, mig_profile="7g.80gb"), view) is None


# --- ties


def test_equal_places_go_by_name_or_in_the_order_given() -> None:
    scene = Scene(*(host(name) for name in ("b", "c", "a")))
    view = scene.view()
    assert where(make_placer().find(whole(1), view)) == "a/0"
    assert where(make_placer(order=("c", "b")).find(whole(1), view)) == "c/0"
    assert make_placer(order=("c", "b")).feasible(whole(1), view) == ["c", "b", "a"]


def test_a_node_that_joins_later_takes_its_place_in_the_order() -> None:
    scene = Scene(host("b"))
    placer = make_placer()
    assert where(placer.find(whole(1), scene.view())) == "b/0"
    scene.join(host("a"))
    assert where(placer.find(whole(1), scene.view())) == "a/0"


def test_nodes_that_are_kept_for_others_are_passed_by() -> None:
    scene = Scene(*(host(name) for name in ("a", "b", "c")))
    placer, view = make_placer(), scene.view()
    blocked = {"a": "a1"}
    assert where(placer.find(whole(1), view, blocked)) == "b/0"
    blocked["b"] = "a2"
    assert where(placer.find(whole(1), view, blocked)) == "c/0"
    assert placer.ranked(whole(1), view, {**blocked, "c": "a3"}) == []
    assert where(placer.find(whole(1), view)) == "a/0"


# --- nodes that nobody hears of


@pytest.mark.parametrize("nodes", [3, 40])
def test_stale_nodes_are_put_aside_until_they_are_heard_of(nodes: int) -> None:
    names = [f"n{i:02}" for i in range(nodes)]
    scene = Scene(*(host(name) for name in names))
    placer = make_placer()
    assert where(placer.find(whole(1), scene.view())) == "n00/0"
    scene.now += 10.0
    assert placer.find(whole(1), scene.view()) is None
    scene.frame(names[-1], samples=make_samples(scene.gpus_of(names[-1])))
    assert where(placer.find(whole(1), scene.view())) == f"{names[-1]}/0"


def test_a_clock_that_is_set_back_makes_nodes_fresh_again() -> None:
    scene = Scene(host("a"))
    placer = make_placer()
    scene.now = START + 10.0
    assert placer.find(whole(1), scene.view()) is None
    scene.now = START
    assert where(placer.find(whole(1), scene.view())) == "a/0"


# --- what is kept


def test_a_draft_that_was_thrown_away_leaves_nothing_behind() -> None:
    scene = Scene(host("a", 1), host("b", 1))
    placer = make_placer()
    draft = scene.fleet.draft()
    plan = placer.find(whole(1), draft.view(START))
    assert plan is not None
    draft.apply(
        e.AllocationGranted(START, "d1", whole(1), "", START, plan.placements), draft.version + 1
    )
    assert where(placer.find(whole(1), draft.view(START))) == "b/0"
    assert where(placer.find(whole(1), scene.fleet.draft().view(START))) == "a/0"
    assert where(placer.find(whole(1), scene.view())) == "a/0"


def test_a_view_of_another_fleet_and_back() -> None:
    scene, other = Scene(host("a"), host("b")), Scene(host("b"), host("c"))
    placer = make_placer()
    for _ in range(2):
        assert placer.feasible(whole(1), scene.view()) == ["a", "b"]
        assert placer.feasible(whole(1), other.view()) == ["b", "c"]


def test_more_shapes_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SCORES_MAX", 0)
    monkeypatch.setattr(scoring, "SHAPES_MIN", 8)
    scene = Scene(host("a", cpus=30), host("b"))
    placer = make_placer()
    for _ in range(2):
        for cpus in range(20, 40):
            expected = "a/0" if cpus <= 30 else "b/0"
            plan = placer.find(whole(1, cpu_milli=cpus * 1000), scene.view())
            assert where(plan) == expected


def test_more_changes_than_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_LOG_MIN", 8)
    scene = Scene(host("a"), host("b"))
    placer = make_placer()
    assert where(placer.find(whole(1), scene.view())) == "a/0"
    for _ in range(300):
        granted = scene.grant(on("a", whole(8)))
        assert where(placer.find(whole(2), scene.view())) == "b"
        scene.hand_back(granted.id)
        assert where(placer.find(whole(2), scene.view())) == "a"
    assert where(placer.find(whole(1), scene.view())) == "a/0"


def test_more_labels_than_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LABELS_MAX", 2)
    labels = {f"l{i}": "x" for i in range(6)}
    scene = Scene(host("a"), host("b", labels=labels))
    placer = make_placer()
    for _ in range(2):
        for name in labels:
            assert where(placer.find(whole(1, node_labels={name: "x"}), scene.view())) == "b/0"
            assert placer.find(whole(1, node_labels={name: "y"}), scene.view()) is None


def test_a_mix_is_learnt_from_what_arrives() -> None:
    scene = Scene(host("a"), host("b"))
    for request in (on("a", part(600)), on("b", part(810))):
        scene.grant(request)
    placer = Placer(Policies.named("fragmentation"))
    for request in ([part(810), part(190)] * 10 + [part(600), part(400)]) * 10:
        placer.learn(request)
    assert where(placer.find(part(190), scene.view())) == "b/0"


# --- pools


def test_each_pool_follows_its_policy() -> None:
    scene = Scene(*(host(f"{pool}{i}", pool=pool) for pool in ("pack", "thin") for i in (1, 2)))
    for node in ("pack2", "thin2"):
        scene.grant(on(node, whole(1)))
    placer = Placer(Policies.named("binpack", {"thin": "spread"}))
    view = scene.view()
    assert where(placer.find(whole(1, pool="pack"), view)) == "pack2/1"
    assert where(placer.find(whole(1, pool="thin"), view)) == "thin1/0"
    # For any pool: each proposes, and the default takes the fuller one.
    assert where(placer.find(whole(1), view)) == "pack2/1"


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no placement policy 'best'; known are fragmentation, bin"
    ):
        policy_named("best")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("binpack", "b/1"),
        ("spread", "a/0"),
        ("3*binpack+spread", "b/1"),
        ("binpack+3*spread", "a/0"),
    ],
)
def test_a_mixture_goes_by_the_weights(text: str, expected: str) -> None:
    scene = Scene(host("a"), host("b"), host("c", 1))
    for request in (on("b", whole(1)), on("c", whole(1))):
        scene.grant(request)
    assert where(make_placer(text).find(whole(1), scene.view())) == expected


def test_a_mixture_in_one_pool_leaves_the_others_alone() -> None:
    scene = Scene(*(host(f"{pool}{i}", pool=pool) for pool in ("mix", "thin") for i in (1, 2)))
    for node in ("mix2", "thin2"):
        scene.grant(on(node, whole(1)))
    placer = Placer(Policies.named("spread", {"mix": "2*binpack+energy"}))
    assert where(placer.find(whole(1, pool="mix"), scene.view())) == "mix2/1"
    assert where(placer.find(whole(1, pool="thin"), scene.view())) == "thin1/0"


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("binpack+best", "no placement policy 'best'"),
        ("two*binpack", "wanted a weight before 'two.binpack'"),
        ("0*binpack+energy", "wanted a weight above 0 for binpack, found 0"),
        ("binpack+balanced", "balanced does not score nodes"),
    ],
)
def test_a_mixture_that_cannot_be(text: str, story: str) -> None:
    with pytest.raises(ValueError, match=story):
        policy_named(text)


def test_two_halves_fit_on_one_card_of_which_the_driver_keeps_a_part() -> None:
    facts = make_facts("n1", 1)
    scene = Scene(facts)
    scene.frame("n1", samples=make_samples(facts.gpus, reserved_bytes=GIB + 1))
    placer = Placer()
    for _ in range(2):
        half = whole(1, compute_milli=500)
        plan = placer.find(half, scene.view())
        assert plan == place(half, scene.view())
        assert plan is not None
        (device,) = plan.devices
        assert device.memory_bytes == (79 * GIB - 1) // 2
        scene.record(
            e.AllocationGranted(scene.now, scene.new_id(), half, "", scene.now, plan.placements)
        )
    assert placer.find(whole(1, compute_milli=1), scene.view()) is None
    assert not isinstance(place(whole(1, compute_milli=1), scene.view()), Plan)


def test_what_was_asked_for_before_there_was_any_gpu_is_found_once_there_is() -> None:
    scene, placer = Scene(make_facts(gpus=0)), Placer()
    for request in (whole(), share(8)):
        assert placer.find(request, scene.view()) is None
    scene.change_facts("n1", gpus=make_gpus("n1", 1))
    scene.report("n1")
    for request in (whole(), share(8)):
        assert placer.find(request, scene.view()) is not None
