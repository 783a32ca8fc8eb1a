"""What a free MIG device costs its card, by the places that it would take."""

from dataclasses import replace

import pytest

from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import (
    Claim,
    DriverState,
    Gpu,
    GpuSample,
    MigDevice,
    Node,
    NodeFacts,
    NodeStatus,
    Request,
)
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.mig_growth import growth
from stoker.aggregator.placing.mig_slices import table_of
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.views import FleetView, GpuView, view_gpu, view_node
from stoker.core.mig.boards import H100_80GB
from stoker.core.mig.geometry import Layout, Placed
from stoker.core.mig.layouts import instance_id

GEOMETRY = H100_80GB.geometry
TABLE = table_of(GEOMETRY)
GIB = 2**30
LAYOUT = (
    Placed(0, 1, "1g.10gb"),
    Placed(1, 1, "1g.10gb"),
    Placed(2, 2, "2g.20gb"),
    Placed(4, 2, "2g.20gb", (1, 1)),
    Placed(6, 1, "1g.10gb"),
)


def told(layout: Layout | None = LAYOUT) -> NodeStatus:
    return NodeStatus(
        session=1,
        driver=DriverState.READING,
        samples={"g": GpuSample(memory_used_bytes=0)},
        processes=ProcessTable(0.0, ()),
        held={},
        mig={"g": GpuMig("g", layout=layout, geometry=GEOMETRY)},
    )


def card(used: tuple[str, ...] = (), layout: Layout | None = LAYOUT) -> GpuView:
    devices = tuple(
        MigDevice(f"{each.start}.{part}", each.profile, 10 * GIB, id_, part)
        for each in LAYOUT
        for id_ in [instance_id(GEOMETRY, each.size, each.start)]
        for part in range(len(each.compute) or 1)
    )
    gpu = Gpu("g", "NVIDIA H100 80GB HBM3", 0, 80 * GIB, mig_enabled=True, mig_devices=devices)
    status = told(layout)
    claims = tuple(Claim(uuid, 10 * GIB, mig_device_uuid=uuid) for uuid in used)
    return view_gpu(gpu, claims, (), status)


def device(view: GpuView, uuid: str) -> MigDevice:
    return next(each for each in view.gpu.mig_devices if each.uuid == uuid)


@pytest.mark.parametrize(
    ("used", "uuid", "loss"),
    [
        ((), "0.0", (0b0, 0b1)),
        (("0.0",), "1.0", (0b1, 0b10)),
        (("0.0",), "6.0", (0b1, 0b1000000)),
        (("2.0", "6.0"), "4.0", (0b1001100, 0b110000)),
        (("4.0",), "0.0", (0b110000, 0b1)),
    ],
)
def test_idle_instances_are_no_obstacle(
    used: tuple[str, ...], uuid: str, loss: tuple[int, int]
) -> None:
    view = card(used)
    assert growth(view, device(view, uuid)) == TABLE.loss(*loss)


def test_the_rest_of_a_broken_pair_costs_least() -> None:
    view = card(("0.0",))
    costs = {uuid: growth(view, device(view, uuid)) for uuid in ("1.0", "6.0")}
    assert costs["1.0"] < costs["6.0"]


def test_the_rest_of_an_instance_in_use_costs_nothing() -> None:
    view = card(("4.0",))
    assert growth(view, device(view, "4.1")) == 0.0


def test_what_is_to_be_taken_too_counts() -> None:
    view = card()
    assert growth(view, device(view, "1.0"), {"0.0"}) == TABLE.loss(0b1, 0b10)


def test_nothing_is_known_where_places_are_not_told() -> None:
    view = card(layout=None)
    assert growth(view, device(view, "0.0")) == 0.0
    blind = replace(view, mig=None)
    assert growth(blind, device(blind, "0.0")) == 0.0


def test_a_request_gets_the_device_that_costs_least() -> None:
    view = card(("0.0",))
    node = view_node(
        Node(NodeFacts("n", "j", "b", "1", simulated=True, gpus=(view.gpu,)), 0.0, 1),
        {"g": view.claims},
        told(),
        {},
    )
    request = Request(1, "alice", 60.0, mig_profile="1g.10gb")
    fleet = FleetView(0.0, {"n": node}, {"n": 10.0})
    one = choose(request, node, fleet) or ()
    assert [each.mig_device_uuid for each in one] == ["1.0"]
    both = choose(replace(request, gpus=2), node, fleet) or ()
    assert [each.mig_device_uuid for each in both] == ["1.0", "6.0"]
