"""Gangs: on all of their nodes or on none, and never refused while there is a way."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.builders import A100, GIB, H100, make_gpus, share, whole
from tests.unit.aggregator.placing.boards import fleet_of, granted, view_of

from stoker.aggregator.model import Device, Placement, Request
from stoker.aggregator.placing.filters import refuse
from stoker.aggregator.placing.gangs import find
from stoker.aggregator.views import FleetView, NodeView


def node(
    name: str, free: int = 2, rack: str = "", zone: str = "", model: str = H100, web: int = 0
) -> NodeView:
    """A node with so many GPUs of 8 free, and replicas of `web` that share the last one."""
    labels = {key: value for key, value in (("rack", rack), ("zone", zone)) if value}
    gpus = make_gpus(name, 8, model)
    tenants = [
        granted(
            f"web on {name} {i}",
            share(1, service="web"),
            Placement(name, (Device(gpus[7].uuid, model, 7, GIB, exclusive=False),)),
        )
        for i in range(web)
    ]
    return view_of(gpus, range(free, 8), name, labels, tenants)


def fleet(*nodes: NodeView) -> FleetView:
    return fleet_of(*nodes, allocations=tenants_of(*nodes))


def tenants_of(*nodes: NodeView) -> list[Any]:
    """The replicas of `web`, for the filters to name."""
    return [
        granted(
            f"web on {each.name} 0",
            share(1, service="web"),
            Placement(each.name, (Device(each.gpus[7].gpu.uuid, H100, 7, GIB, exclusive=False),)),
        )
        for each in nodes
        if "web" in each.services
    ]


def candidates(request: Request, view: FleetView) -> list[str]:
    return [
        name for name, each in sorted(view.nodes.items()) if refuse(request, each, view) is None
    ]


def gang(nodes: int, gpus: int = 2, **fields: Any) -> Request:
    return whole(gpus, nodes=nodes, **fields)


@dataclass(frozen=True)
class Row:
    what: str
    request: Request
    nodes: tuple[NodeView, ...]
    expected: tuple[str, ...] | None


RACKS = (
    node("a1", rack="a"),
    node("a2", rack="a"),
    node("a3", rack="a"),
    node("b1", rack="b"),
    node("b2", rack="b"),
    node("c1", rack="c"),
    node("d1"),
)
TOGETHER: dict[str, Any] = {"same_label": "rack", "same_label_required": True}
APART: dict[str, Any] = {"service": "web", "anti_affinity": "rack"}
ROWS = (
    Row("the first nodes", gang(3), RACKS, ("a1", "a2", "a3")),
    Row("all of them", gang(7), RACKS, ("d1", "a1", "a2", "a3", "b1", "b2", "c1")),
    Row("all or nothing", gang(8), RACKS, None),
    Row("nothing where one part does not fit", gang(2), (node("a"), node("b", free=1)), None),
    Row("no two parts on one node", gang(2), (node("a", free=8),), None),
    Row("the rack that has just enough", gang(2, **TOGETHER), RACKS, ("b1", "b2")),
    Row("the only rack that has enough", gang(3, **TOGETHER), RACKS, ("a1", "a2", "a3")),
    Row("no rack has enough", gang(4, **TOGETHER), RACKS, None),
    Row("no rack is no rack in common", gang(2, **TOGETHER), (node("a"), node("b")), None),
    Row("rather in one rack", gang(2, same_label="rack"), RACKS, ("b1", "b2")),
    Row("else in few", gang(4, same_label="rack"), RACKS, ("a1", "a2", "a3", "b1")),
    Row("one in each rack", gang(3, **APART), RACKS, ("a1", "b1", "c1")),
    Row("and one where no rack is known", gang(4, **APART), RACKS, ("d1", "a1", "b1", "c1")),
    Row("not two in a rack", gang(5, **APART), RACKS, None),
    Row(
        "not in the rack where one is",
        gang(2, **APART),
        (node("a1", rack="a", web=1), node("a2", rack="a"), node("b1", rack="b")),
        None,
    ),
    Row(
        "one zone, and one in each rack of it",
        gang(2, same_label="zone", same_label_required=True, **APART),
        (
            node("x1", rack="a", zone="x"),
            node("x2", rack="a", zone="x"),
            node("x3", rack="a", zone="x"),
            node("y1", rack="b", zone="y"),
            node("y2", rack="c", zone="y"),
        ),
        ("y1", "y2"),
    ),
    Row(
        "spread over racks as evenly as can be",
        gang(4, service="web", spread="rack"),
        (*RACKS[:5], node("c1", rack="c", web=2), node("c2", rack="c")),
        ("a1", "b1", "a2", "b2"),
    ),
    Row(
        "rather on nodes without it",
        gang(2, service="web", spread="node"),
        (node("a", web=2), node("b", web=1), node("c")),
        ("b", "c"),
    ),
    Row(
        "rather in the rack near a service",
        gang(2, near_service="web", **TOGETHER),
        (*RACKS[:2], node("a3", rack="a", web=1), *RACKS[3:]),
        ("a1", "a3"),
    ),
    Row(
        "all parts on GPUs of one model",
        gang(2),
        (node("a", model=A100), node("b"), node("c")),
        ("b", "c"),
    ),
    Row("not on two models", gang(2), (node("a", model=A100), node("b")), None),
    Row(
        "CPUs alone have no model",
        Request(0, "ann", 60.0, nodes=2, cpu_milli=1000),
        (node("a", model=A100), node("b")),
        ("a", "b"),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_where_a_gang_goes(row: Row) -> None:
    view = fleet(*row.nodes)
    plan = find(row.request, view, candidates(row.request, view))
    expected = None if row.expected is None else sorted(row.expected)
    assert (None if plan is None else sorted(each.node for each in plan.placements)) == expected


def test_each_node_gives_the_same() -> None:
    view = fleet(*RACKS)
    plan = find(gang(2), view, ["c1", "a3"])
    assert plan is not None
    assert [(each.node, [device.uuid for device in each.devices]) for each in plan.placements] == [
        ("a3", ["a3-0", "a3-1"]),
        ("c1", ["c1-0", "c1-1"]),
    ]


def test_parts_that_follow_each_other_lie_together() -> None:
    nodes = (node("n1", rack="b"), node("n2", rack="a"), node("n3", rack="b"), node("n4", rack="a"))
    view = fleet(*nodes)
    plan = find(gang(4, same_label="rack"), view, [each.name for each in nodes])
    assert plan is not None
    assert [each.node for each in plan.placements] == ["n2", "n4", "n1", "n3"]


def test_what_the_policy_likes_best_goes_first() -> None:
    view = fleet(*RACKS)
    plan = find(gang(2), view, ["c1", "b2", "a1", "a2"])
    assert plan is not None
    assert {each.node for each in plan.placements} == {"c1", "b2"}
    by_model = fleet(node("a", model=A100), node("b"), node("c"), node("d", model=A100))
    plan = find(gang(2), by_model, ["d", "a", "b", "c"])
    assert plan is not None
    assert {each.node for each in plan.placements} == {"a", "d"}


def test_a_gpu_that_two_nodes_list_is_given_once() -> None:
    renamed = view_of(make_gpus("a", 8), range(2, 8), "renamed")
    view = fleet(node("a"), renamed, node("b"))
    plan = find(gang(2), view, ["a", "renamed", "b"])
    assert plan is not None
    assert {each.node for each in plan.placements} == {"a", "b"}


# --- against all there is


@st.composite
def worlds(draw: st.DrawFn) -> tuple[FleetView, Request]:
    names = [f"n{i}" for i in range(draw(st.integers(1, 7)))]
    values = st.sampled_from(("", "a", "b", "c"))
    nodes = [
        node(
            name,
            draw(st.integers(0, 3)),
            draw(values),
            draw(values),
            draw(st.sampled_from((H100, H100, A100))),
            draw(st.sampled_from((0, 0, 0, 1))),
        )
        for name in names
    ]
    labels: Mapping[str, Any] = draw(
        st.fixed_dictionaries(
            {
                "service": st.sampled_from((None, "web")),
                "anti_affinity": st.sampled_from((None, "node", "gpu", "rack", "zone")),
                "spread": st.sampled_from((None, "node", "rack", "zone")),
                "same_label": st.sampled_from((None, "rack", "zone")),
                "same_label_required": st.booleans(),
                "near_service": st.sampled_from((None, "web")),
            }
        )
    )
    request = gang(draw(st.integers(2, 4)), draw(st.integers(1, 2)), **labels)
    return fleet(*nodes), request


def is_allowed(request: Request, view: FleetView, names: tuple[str, ...]) -> bool:
    """Whether a gang may lie on these nodes, each of which can host a part."""

    def values(label: str | None) -> list[str | None]:
        if label is None:
            return []
        return [(view.nodes[name].node.facts.labels or {}).get(label) for name in names]

    if request.same_label_required:
        shared = values(request.same_label)
        if shared and (None in shared or len(set(shared)) > 1):
            return False
    if request.service is not None and request.anti_affinity not in (None, "node", "gpu"):
        known = [value for value in values(request.anti_affinity) if value is not None]
        if len(set(known)) < len(known):
            return False
    models = [
        {model for model, free in view.nodes[name].free_by_model.items() if free >= request.gpus}
        for name in names
    ]
    return any(all(model in others for others in models) for model in models[0])


@settings(max_examples=200)
@given(worlds())
def test_a_gang_is_placed_where_it_may_be_and_whenever_it_may_be(
    world: tuple[FleetView, Request],
) -> None:
    view, request = world
    able = candidates(request, view)
    allowed = [
        names for names in combinations(able, request.nodes) if is_allowed(request, view, names)
    ]
    plan = find(request, view, able)
    assert (plan is not None) is bool(allowed)
    if plan is None:
        return
    names = tuple(sorted(each.node for each in plan.placements))
    assert names in allowed
    assert all(len(each.devices) == request.gpus for each in plan.placements)
    if request.same_label is not None:
        racks = [racks_of(view, other, request.same_label) for other in allowed]
        if 1 in racks:
            assert racks_of(view, names, request.same_label) == 1


def racks_of(view: FleetView, names: tuple[str, ...], label: str) -> int:
    """How many values of the label there are, each node without it counted for itself."""
    values = [(view.nodes[name].node.facts.labels or {}).get(label, name) for name in names]
    return len(set(values))
