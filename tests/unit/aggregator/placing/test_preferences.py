"""What a request would like of a node: which of the nodes that fit are in a better tier."""

import pytest
from tests.unit.aggregator.builders import GIB, H100, share, whole
from tests.unit.aggregator.placing.boards import (
    bridged_pairs,
    dgx_h100,
    fleet_of,
    granted,
    plain,
    view_of,
)

from stoker.aggregator.model import Device, GpuTopology, Placement, Request
from stoker.aggregator.placing.preferences import Tiers, has_preferences, tier
from stoker.aggregator.views import FleetView

NVLINK, NUMA = GpuTopology.NVLINK, GpuTopology.NUMA


def fleet() -> FleetView:
    """Five nodes; three replicas of `web` at rack r1 (two on n1, one on n2), `db` on n3."""

    def tenant(id_: str, service: str, node: str, index: int) -> tuple[str, Device]:
        return id_, Device(f"{node}-{index}", H100, index, GIB, exclusive=False)

    web1 = granted(
        "w1", share(1, service="web"), Placement("n1", (tenant("w1", "web", "n1", 0)[1],))
    )
    web2 = granted(
        "w2", share(1, service="web"), Placement("n1", (tenant("w2", "web", "n1", 1)[1],))
    )
    web3 = granted(
        "w3", share(1, service="web"), Placement("n2", (tenant("w3", "web", "n2", 0)[1],))
    )
    database = granted(
        "db", share(1, service="db"), Placement("n3", (tenant("db", "db", "n3", 0)[1],))
    )
    return fleet_of(
        view_of(dgx_h100("n1"), node="n1", labels={"rack": "r1"}, tenants=[web1, web2]),
        view_of(plain("n2"), (0, 1), node="n2", labels={"rack": "r1"}, tenants=[web3]),
        view_of(bridged_pairs(8, "n3"), (0, 1, 2, 4, 6), "n3", {"rack": "r2"}, [database]),
        view_of(bridged_pairs(2, "n4"), (), "n4", {"rack": "r3"}),
        view_of(plain("n5")[:2], (), "n5"),
        allocations=[web1, web2, web3, database],
    )


@pytest.mark.parametrize(
    ("what", "request_", "best_first"),
    [
        (
            "the node of the GPU that is named",
            whole(1, preferred_gpu_uuid="n2-3"),
            "n2 | n1 n3 n4 n5",
        ),
        ("not where that is taken", whole(1, preferred_gpu_uuid="n2-0"), "n1 n2 n3 n4 n5"),
        ("where two are linked", whole(2, gpu_topology=NVLINK), "n1 n4 | n2 n3 n5"),
        ("where four are at one socket", whole(3, gpu_topology=NUMA), "n1 n2 | n3 n4 n5"),
        ("near a service", whole(1, near_service="db"), "n3 | n1 n2 n4 n5"),
        ("on the node with fewest", share(1, service="web", spread="node"), "n3 n4 n5 | n2 | n1"),
        (
            "in the rack with fewest, and last where no rack is known",
            share(1, service="web", spread="rack"),
            "n3 n4 | n1 n2 | n5",
        ),
        (
            "a GPU without it is on every node",
            share(1, service="web", spread="gpu"),
            "n1 n2 n3 n4 n5",
        ),
        (
            "the named GPU before the topology before the service",
            whole(2, preferred_gpu_uuid="n2-2", gpu_topology=NVLINK, near_service="db"),
            "n2 | n1 n4 | n3 | n5",
        ),
    ],
)
def test_tiers(what: str, request_: Request, best_first: str) -> None:
    view = fleet()
    found: dict[tuple[int, ...], list[str]] = {}
    for name, node in view.nodes.items():
        if request_.gpus <= node.free_gpus:
            found.setdefault(tier(request_, node, view), []).append(name)
    expected = [
        [name for name in names.split() if view.nodes[name].free_gpus >= request_.gpus]
        for names in best_first.split(" | ")
    ]
    assert [names for _, names in sorted(found.items())] == [names for names in expected if names]


@pytest.mark.parametrize(
    ("what", "request_", "expected"),
    [
        ("nothing", whole(1), False),
        ("a named GPU", whole(1, preferred_gpu_uuid="n1-0"), True),
        ("a topology", whole(2, gpu_topology=NUMA), True),
        ("one GPU lies as it likes", whole(1, gpu_topology=NVLINK), False),
        (
            "what must be is no preference",
            whole(2, gpu_topology=NUMA, gpu_topology_required=True),
            False,
        ),
        ("a neighbour", whole(1, near_service="db"), True),
        ("to be spread", whole(1, service="web", spread="rack"), True),
        ("without a service nothing is spread", whole(1, spread="rack"), False),
    ],
)
def test_which_requests_have_preferences(what: str, request_: Request, expected: bool) -> None:
    assert has_preferences(request_) is expected


def test_the_gpu_with_fewest_of_a_service_says_how_crowded_a_node_is() -> None:
    web = granted(
        "w", share(1, service="web"), Placement("n1", (Device("n1-0", H100, 0, GIB, False),))
    )
    view = fleet_of(
        view_of(plain("n1")[:1], (), "n1", tenants=[web]), view_of(plain("n2")[:1], (), "n2")
    )
    tiers = Tiers(share(1, service="web", spread="gpu"), view)
    assert tiers.of(view.nodes["n2"]) < tiers.of(view.nodes["n1"])
