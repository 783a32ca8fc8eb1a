"""The policy `balanced`: what is made of a reading, and where requests go by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.builders import A100, GIB, H100, START, make_gpus, share, whole
from tests.unit.aggregator.placing.boards import fleet_of, granted, partitioned, view_of

from stoker.aggregator.model import (
    Allocation,
    Claim,
    Device,
    GpuSample,
    NodeStatus,
    Placement,
    Plan,
    Request,
)
from stoker.aggregator.placing.balanced import Balancer, Load, estimate
from stoker.aggregator.placing.filters import refuse
from stoker.aggregator.views import FleetView, NodeView


@dataclass(frozen=True)
class Tenant:
    """A share of a GPU of 80 GiB."""

    gib: float
    milli: int | None = None
    age: float = 3600.0  # since it was granted, when the sample was taken


@dataclass(frozen=True)
class Card:
    """A GPU of 80 GiB, what it told at START, and who is on it."""

    busy: float | None = 0.0
    used_gib: float | None = 0.0
    tenants: tuple[Tenant, ...] = ()
    is_read: bool = True


def fleet(nodes: Mapping[str, Sequence[Card]], model: str = H100) -> FleetView:
    views: list[NodeView] = []
    statuses: dict[str, NodeStatus] = {}
    allocations: list[Allocation] = []
    for name, cards in nodes.items():
        gpus = make_gpus(name, len(cards), model)
        claims: dict[str, tuple[Claim, ...]] = {}
        samples: dict[str, GpuSample] = {}
        mine: list[Allocation] = []
        for gpu, card in zip(gpus, cards, strict=True):
            for tenant in card.tenants:
                id_ = f"{gpu.uuid}/{len(mine)}"
                size = int(tenant.gib * GIB)
                device = Device(gpu.uuid, model, gpu.index, size, False, tenant.milli)
                request = whole(1, memory_bytes=size, compute_milli=tenant.milli)
                mine.append(
                    granted(id_, request, Placement(name, (device,)), at=START - tenant.age)
                )
                claim = Claim(id_, size, tenant.milli or 0)
                claims[gpu.uuid] = (*claims.get(gpu.uuid, ()), claim)
            if card.is_read:
                used = None if card.used_gib is None else int(card.used_gib * GIB)
                samples[gpu.uuid] = GpuSample(
                    memory_used_bytes=used, utilization_ratio=card.busy, at=START
                )
        views.append(view_of(gpus, node=name, claims=claims, tenants=mine))
        statuses[name] = NodeStatus(session=1, samples=samples)
        allocations += mine
    return replace(fleet_of(*views, allocations=allocations), statuses=statuses)


@pytest.mark.parametrize(
    ("what", "card", "compute", "memory"),
    [
        ("what is measured", Card(0.3, 8.0, (Tenant(40),)), 0.3, 0.1),
        ("idle", Card(), 0.0, 0.0),
        (
            "what was granted after the sample is added",
            Card(0.3, 40, (Tenant(40), Tenant(8, age=-1))),
            0.4,
            0.6,
        ),
        ("compute as it was promised", Card(0.0, 0.0, (Tenant(8, 500, age=-1),)), 0.5, 0.1),
        (
            "half seen after half of the time",
            Card(0.2, 8, (Tenant(40), Tenant(16, age=15))),
            0.3,
            0.2,
        ),
        ("all seen after all of it", Card(0.2, 8, (Tenant(16, age=30),)), 0.2, 0.1),
        ("not more than is promised", Card(0.05, 16, (Tenant(16, age=0),)), 0.2, 0.2),
        ("unless more is measured", Card(0.9, 72, (Tenant(8, age=0),)), 0.9, 0.9),
        ("unknown counts as promised", Card(None, None, (Tenant(40), Tenant(8, 500))), 1.0, 0.6),
        ("only the utilisation is unknown", Card(None, 4, (Tenant(40),)), 0.5, 0.05),
        ("nothing was read", Card(is_read=False, tenants=(Tenant(40),)), 0.5, 0.5),
    ],
)
def test_what_is_made_of_a_reading(what: str, card: Card, compute: float, memory: float) -> None:
    view = fleet({"n1": [card]})
    gpu = view.nodes["n1"].gpus[0]
    sample = (view.statuses["n1"].samples or {}).get(gpu.gpu.uuid)
    load = estimate(gpu, sample, view)
    assert (load.compute, load.memory) == pytest.approx((compute, memory))
    assert load.promised_memory == pytest.approx(sum(tenant.gib for tenant in card.tenants) / 80)


def test_the_scarcer_of_compute_and_memory_decides() -> None:
    loads = [Load(0.9, 0.1, 0), Load(0.1, 0.9, 0), Load(0.6, 0.6, 0), Load(0.5, 0.5, 0)]
    norms = [load.norm for load in loads]
    assert norms[0] == pytest.approx(norms[1])
    assert norms[3] < norms[2] < norms[0]


def where(plan: Plan | None) -> str | None:
    return None if plan is None else plan.devices[0].uuid


def find(request: Request, view: FleetView) -> Plan | None:
    names = [name for name, node in view.nodes.items() if refuse(request, node, view) is None]
    return Balancer().find(request, view, names)


EIGHT_GIB = share(8)


@dataclass(frozen=True)
class Row:
    what: str
    nodes: Mapping[str, Sequence[Card]]
    expected: str | None
    request: Request = EIGHT_GIB


ROWS = (
    Row("the least busy", {"a": [Card(0.9), Card(0.5)], "b": [Card(0.1), Card(0.3)]}, "b-0"),
    Row("the least full", {"a": [Card(0.1, 60), Card(0.1, 10)], "b": [Card(0.1, 40)]}, "a-1"),
    Row("not what has no room", {"a": [Card(0.0, 0.0, (Tenant(75),)), Card(0.8)]}, "a-1"),
    Row(
        "not what has no compute left to promise",
        {"a": [Card(0.0, 0.0, (Tenant(8, 700),)), Card(0.8)]},
        "a-1",
        share(8, compute_milli=400),
    ),
    Row(
        "not where a grant is on its way",
        {"a": [Card(0.0, 0.0, (Tenant(20, age=-1),)), Card(0.2)]},
        "a-1",
    ),
    Row(
        "a card that tells nothing is as loaded as it is promised",
        {"a": [Card(None, None, (Tenant(40),)), Card(0.3, 10)]},
        "a-1",
    ),
    Row(
        "a small difference is none: the least promised",
        {"a": [Card(0.30, 8, (Tenant(8),)), Card(0.34, 8, (Tenant(4),))]},
        "a-1",
    ),
    Row("and then by name", {"b": [Card(0.30)], "a": [Card(0.34), Card(0.33)]}, "a-0"),
    Row("nowhere", {"a": [Card(tenants=(Tenant(79),))]}, None),
    Row("MIG, no card has any", {"a": [Card()]}, None, whole(1, mig_profile="1g.10gb")),
    Row(
        "whole: the node with least load",
        {"a": [Card(0.9), Card()], "b": [Card(0.2), Card()]},
        "b-0",
        whole(1),
    ),
    Row(
        "whole: of nodes alike the least promised",
        {"a": [Card(0.02, 1, (Tenant(10),)), Card()], "b": [Card(0.03), Card()]},
        "b-0",
        whole(1),
    ),
    Row("whole: none free", {"a": [Card(tenants=(Tenant(1),))]}, None, whole(1)),
    Row(
        "what the request prefers goes first",
        {"a": [Card(0.9)], "b": [Card(0.0)]},
        "a-0",
        share(8, preferred_gpu_uuid="a-0"),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_where_a_request_goes(row: Row) -> None:
    assert where(find(row.request, fleet(row.nodes))) == row.expected


def test_of_the_model_that_was_asked_for() -> None:
    gpus = (*make_gpus("a", 1), replace(make_gpus("x", 1, A100)[0], index=1))
    view = fleet_of(view_of(gpus, node="a"))
    assert where(find(share(8, models=("A100",)), view)) == "x-0"


def test_a_mig_device_of_the_least_loaded_card() -> None:
    cards = (partitioned(0, ("1g.10gb", 10), ("1g.10gb", 10)), partitioned(1, ("1g.10gb", 10)))
    claims = {"n1-0": (Claim("other", 10 * GIB, mig_device_uuid="MIG-n1-0-0"),)}
    view = fleet_of(view_of(cards, claims=claims))
    plan = find(whole(1, mig_profile="1g.10gb"), view)
    assert plan is not None
    assert plan.devices[0].mig_device_uuid == "MIG-n1-1-0"


def test_a_burst_that_no_sample_has_seen_is_spread() -> None:
    """Twelve grants in one instant on four GPUs, one of which was read as the least busy."""
    nodes = {"a": [Card(0.0), Card(0.1)], "b": [Card(0.1), Card(0.1)]}
    assert burst(nodes, Balancer(), 12) == [3, 3, 3, 3]
    assert burst(nodes, Balancer(settle_seconds=0.0, hysteresis=0.0), 12) == [12, 0, 0, 0]


def burst(nodes: Mapping[str, list[Card]], balancer: Balancer, count: int) -> list[int]:
    """How many shares each GPU gets in turn, of which no sample tells."""
    now = {name: list(cards) for name, cards in nodes.items()}
    for _ in range(count):
        view = fleet(now)
        plan = balancer.find(share(4), view, list(view.nodes))
        assert plan is not None
        cards, place = now[plan.node], plan.devices[0].index
        cards[place] = replace(cards[place], tenants=(*cards[place].tenants, Tenant(4, age=-1)))
    return [len(card.tenants) for cards in now.values() for card in cards]


# --- laws


@st.composite
def cards(draw: st.DrawFn) -> Card:
    tenants = tuple(
        Tenant(
            draw(st.integers(1, 19)),
            draw(st.none() | st.integers(1, 250)),
            draw(st.sampled_from((-1.0, 3.0, 20.0, 100.0))),
        )
        for _ in range(draw(st.integers(0, 4)))
    )
    maybe = st.none() | st.floats(0, 1)
    used = draw(st.none() | st.floats(0, 80))
    return Card(draw(maybe), used, tenants, draw(st.booleans()))


worlds = st.dictionaries(
    st.sampled_from(("n1", "n2", "n3")), st.lists(cards(), min_size=1, max_size=3), min_size=1
)


@st.composite
def wishes(draw: st.DrawFn) -> Request:
    milli = draw(st.none() | st.integers(1, 900))
    return whole(1, memory_bytes=draw(st.integers(1, 60)) * GIB, compute_milli=milli)


@settings(max_examples=40)
@given(worlds, worlds, wishes())
def test_a_balancer_that_is_kept_decides_as_a_new_one(
    before: dict[str, list[Card]], after: dict[str, list[Card]], request: Request
) -> None:
    """Whatever it has seen before: nodes that came, went, or have other GPUs now."""
    kept = Balancer()
    for nodes in (before, after, before):
        view = fleet(nodes)
        able = [name for name, node in view.nodes.items() if refuse(request, node, view) is None]
        plan = kept.find(request, view, able)
        assert plan == Balancer().find(request, view, able)
        assert (plan is None) is (not able)


@given(worlds, wishes())
def test_no_gpu_that_fits_is_clearly_less_loaded(
    nodes: dict[str, list[Card]], request: Request
) -> None:
    view = fleet(nodes)
    able = [name for name, node in view.nodes.items() if refuse(request, node, view) is None]
    plan = Balancer(hysteresis=0.05).find(request, view, able)
    if plan is None:
        return

    def after(name: str, place: int) -> float:
        gpu = view.nodes[name].gpus[place]
        sample = (view.statuses[name].samples or {}).get(gpu.gpu.uuid)
        load = estimate(gpu, sample, view)
        memory = (request.memory_bytes or 0) / (80 * GIB)
        compute = memory if request.compute_milli is None else request.compute_milli / 1000
        return Load(load.compute + compute, load.memory + memory, 0.0).norm

    chosen = after(plan.node, plan.devices[0].index)
    for name in able:
        for place, gpu in enumerate(view.nodes[name].gpus):
            fits = gpu.room_bytes >= (request.memory_bytes or 0)
            if fits and gpu.compute_free_milli >= (request.compute_milli or 0):
                assert chosen <= after(name, place) + 0.05 + 1e-9
