"""Every constraint of a request: what keeps it, and what the refusal wanted, found and says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    H100,
    Scene,
    make_facts,
    make_gpus,
    make_samples,
    share,
    whole,
)

from stoker.aggregator.model import (
    MIG_ANY,
    Gpu,
    GpuTopology,
    MigDevice,
    Refusal,
    Request,
)
from stoker.aggregator.placing.filters import could_ever_fit, fits, refuse
from stoker.aggregator.placing.parts import parts_max
from stoker.aggregator.wishes import Cordon

NUMA, NVLINK = GpuTopology.NUMA, GpuTopology.NVLINK


def kind(count: int = 8, model: str = H100, gib: int = 80, **fields: Any) -> tuple[Gpu, ...]:
    return tuple(replace(gpu, **fields) for gpu in make_gpus("n1", count, model, gib))


def in_pairs(count: int = 4) -> tuple[Gpu, ...]:
    """GPUs 0 and 1 are linked, 2 and 3, and so on; the first half is on NUMA node 0."""
    return tuple(
        replace(gpu, nvlink_peers=((f"n1-{gpu.index ^ 1}", 4),), numa_node=2 * gpu.index // count)
        for gpu in make_gpus("n1", count)
    )


def cut(*profiles: str, uuid: str = "n1-0") -> Gpu:
    """A card in MIG mode with these devices."""
    devices = tuple(
        MigDevice(f"MIG-{i}", profile, int(profile.split(".")[1][:-2]) * GIB, i, 0)
        for i, profile in enumerate(profiles)
    )
    gpu = make_gpus("n1", 1)[0]
    return replace(gpu, uuid=uuid, mig_enabled=True, mig_devices=devices)


@dataclass(frozen=True)
class Case:
    """One node, what it holds, and a request; no filter: it fits."""

    what: str
    request: Request
    gpus: tuple[Gpu, ...] | int = 8
    facts: dict[str, Any] | None = None
    held: Sequence[Request] = ()
    filter: str = ""
    wanted: str = ""
    found: str = ""
    reason: str = ""
    lasting: bool = False


LABELS = {"labels": {"rack": "r1", "zone": "a"}}
PAIRS = in_pairs()
MIXED = (*make_gpus("n1", 2, A100, 40), *make_gpus("t", 2))
SEVEN = cut(*("1g.10gb",) * 7)

CASES = (
    Case("any of several models", whole(models=("A100", "H100"))),
    Case(
        *("none of several models", whole(models=("A100", "T4"))),
        filter="model",
        wanted="A100 or T4",
        found=H100,
        reason=f"wanted A100 or T4, it has {H100}",
        lasting=True,
    ),
    Case("as much memory as the card has", whole(gpu_memory_min_bytes=80 * GIB)),
    Case(
        *("a larger card", whole(gpu_memory_min_bytes=81 * GIB)),
        filter="gpu_memory",
        wanted=str(81 * GIB),
        found=str(80 * GIB),
        reason="wanted a GPU with at least 81 GiB, its largest has 80 GiB",
        lasting=True,
    ),
    Case("the large cards of a mixed node", whole(2, gpu_memory_min_bytes=80 * GIB), MIXED),
    Case(
        *("more large cards than a mixed node has", whole(3, gpu_memory_min_bytes=40 * GIB), MIXED),
        filter="gpus_total",
        wanted="3",
        found="2",
        reason=f"wanted 3 x GPU, all of one model, on one node, it has 2 x {A100}, 2 x {H100}",
        lasting=True,
    ),
    Case(
        *("the compute capability", whole(compute_capability_min=(8, 0))),
        kind(compute_capability="9.0"),
    ),
    Case(
        *("ten is more than nine", whole(compute_capability_min=(9, 0))),
        kind(compute_capability="10.0"),
    ),
    Case(
        *("a later compute capability", whole(compute_capability_min=(8, 0))),
        kind(compute_capability="7.5"),
        filter="compute_capability",
        wanted="8.0",
        found="7.5",
        reason="wanted compute capability 8.0 or more, it has 7.5",
        lasting=True,
    ),
    Case(
        *("a compute capability that is not known", whole(compute_capability_min=(8, 0))),
        filter="compute_capability",
        wanted="8.0",
        found="not known",
        reason="wanted compute capability 8.0 or more, it has not known",
        lasting=True,
    ),
    Case(
        *("the driver", whole(driver_version_min=(570,))),
        facts={"driver_version": "570.124.06"},
    ),
    Case(
        *("a later driver", whole(driver_version_min=(570, 133))),
        facts={"driver_version": "570.124.06"},
        filter="driver_version",
        wanted="570.133",
        found="570.124.06",
        reason="wanted a driver of at least 570.133, its driver is 570.124.06",
        lasting=True,
    ),
    Case(
        *("a driver that is not known", whole(driver_version_min=(570,))),
        filter="driver_version",
        wanted="570",
        found="not known",
        reason="wanted a driver of at least 570, its driver is not known",
        lasting=True,
    ),
    Case("the labels", whole(node_labels={"rack": "r1", "zone": "a"}), facts=LABELS),
    Case(
        *("another value of a label", whole(node_labels={"zone": "a", "rack": "r2"})),
        facts=LABELS,
        filter="node_labels",
        wanted="rack=r2",
        found="rack=r1",
        reason="label rack=r2 was asked for, it has rack=r1",
        lasting=True,
    ),
    Case(
        *("a label that it has not", whole(node_labels={"row": "7"})),
        facts=LABELS,
        filter="node_labels",
        wanted="row=7",
        found="no label row",
        reason="label row=7 was asked for, it has no label row",
        lasting=True,
    ),
    Case(
        *("a part of a gang", whole(8, nodes=2, same_label="rack", same_label_required=True)),
        facts=LABELS,
    ),
    Case("a gang's label that is but preferred", whole(8, nodes=2, same_label="rack")),
    Case(
        *("a gang's label", whole(8, nodes=2, same_label="rack", same_label_required=True)),
        filter="same_label",
        wanted="label rack",
        found="no label rack",
        reason="the nodes of a gang shall share the value of label rack, it has none",
        lasting=True,
    ),
    Case("the CPUs", whole(cpu_milli=8000), facts={"cpu_milli": 8000}),
    Case(
        *("more CPUs than there are", whole(cpu_milli=8001)),
        facts={"cpu_milli": 8000},
        filter="cpu_total",
        wanted="8001",
        found="8000",
        reason="wanted 8.001 CPUs, it has 8 CPUs in all",
        lasting=True,
    ),
    Case(
        *("CPUs of a host that does not tell", whole(cpu_milli=1000)),
        filter="cpu_total",
        wanted="1000",
        found="not known",
        reason="wanted 1 CPU, it does not tell how many it has",
        lasting=True,
    ),
    Case(
        *("CPUs that others have", whole(cpu_milli=2000)),
        facts={"cpu_milli": 8000},
        held=(whole(cpu_milli=6500),),
        filter="cpu_free",
        wanted="2000",
        found="1500",
        reason="wanted 2 CPUs, 1.5 of 8 CPUs are free",
    ),
    Case("the host's memory", whole(host_memory_bytes=GIB), facts={"host_memory_bytes": GIB}),
    Case(
        *("more of the host's memory than there is", whole(host_memory_bytes=2 * GIB)),
        facts={"host_memory_bytes": GIB},
        filter="host_memory_total",
        wanted=str(2 * GIB),
        found=str(GIB),
        reason="wanted 2 GiB of host memory, it has 1 GiB in all",
        lasting=True,
    ),
    Case(
        *("memory of a host that does not tell", whole(host_memory_bytes=GIB)),
        filter="host_memory_total",
        wanted=str(GIB),
        found="not known",
        reason="wanted 1 GiB of host memory, it does not tell its own",
        lasting=True,
    ),
    Case(
        *("the host's memory that others have", whole(host_memory_bytes=3 * GIB)),
        facts={"host_memory_bytes": 4 * GIB},
        held=(whole(host_memory_bytes=2 * GIB),),
        filter="host_memory_free",
        wanted=str(3 * GIB),
        found=str(2 * GIB),
        reason="wanted 3 GiB of host memory, 2 GiB of 4 GiB is free",
    ),
    Case(
        "CPUs alone, of a host without GPUs",
        replace(whole(cpu_milli=1), gpus=0),
        0,
        {"cpu_milli": 1},
    ),
    Case(
        "half of the compute", whole(compute_milli=500), held=(whole(7), whole(compute_milli=500))
    ),
    Case("memory beside promised compute", share(8), 1, held=(share(8, compute_milli=1000),)),
    Case(
        *("compute that is promised", share(8, compute_milli=600), 1),
        held=(share(8, compute_milli=500),),
        filter="compute_free",
        wanted="600",
        found="500",
        reason="wanted 60 % of the compute of one GPU, at most 50 % is not promised on one with "
        "the memory: allocated to a1",
    ),
    Case(
        *("the memory of a part of the compute", whole(compute_milli=500), 1),
        held=(share(50),),
        filter="memory_free",
        wanted=str(40 * GIB),
        found=str(30 * GIB),
        reason="wanted 40 GiB of one GPU, at most 30 GiB is free on one: allocated to a1",
    ),
    Case("a MIG device", whole(mig_profile="1g.10gb"), (SEVEN,)),
    Case("any MIG device with the memory", share(20, mig_profile=MIG_ANY), (cut("2g.20gb"),)),
    Case(
        *("a profile that no card is cut into", whole(mig_profile="3g.40gb"), (SEVEN,)),
        filter="mig_total",
        wanted="3g.40gb",
        found="7 x 1g.10gb",
        reason="wanted one MIG 3g.40gb of a GPU, it has 7 x 1g.10gb",
        lasting=True,
    ),
    Case(
        *("a MIG device of a card that is whole", whole(mig_profile="1g.10gb")),
        kind(1, mig_enabled=False),
        filter="mig_total",
        wanted="1g.10gb",
        found="none",
        reason="wanted one MIG 1g.10gb of a GPU, its GPUs are not partitioned",
        lasting=True,
    ),
    Case(
        *("a MIG device of a card without MIG", whole(mig_profile="1g.10gb")),
        filter="mig_total",
        wanted="1g.10gb",
        found="none",
        reason="wanted one MIG 1g.10gb of a GPU, its GPUs have no MIG",
        lasting=True,
    ),
    Case(
        *("a MIG device that another has", whole(mig_profile="1g.10gb"), (cut("1g.10gb"),)),
        held=(whole(mig_profile=MIG_ANY),),
        filter="mig_free",
        wanted="1g.10gb",
        found="0",
        reason="wanted one MIG 1g.10gb of a GPU, 0 of 1 are free: allocated to a1",
    ),
    Case("two that NVLink joins", whole(2, gpu_topology=NVLINK, gpu_topology_required=True), PAIRS),
    Case(
        *("four that switches join", whole(4, gpu_topology=NVLINK, gpu_topology_required=True)),
        kind(nvswitch_links=18),
    ),
    Case("two on one NUMA node", whole(2, gpu_topology=NUMA, gpu_topology_required=True), PAIRS),
    Case("pairs that would be nice", whole(3, gpu_topology=NVLINK), PAIRS),
    Case("one that is joined to none", whole(1, gpu_topology=NVLINK, gpu_topology_required=True)),
    Case(
        *("three of pairs", whole(3, gpu_topology=NVLINK, gpu_topology_required=True), PAIRS),
        filter="topology_total",
        wanted="3",
        found="2",
        reason="wanted 3 x GPU each joined to each by NVLink, at most 2 of its 4 are",
        lasting=True,
    ),
    Case(
        *("NUMA nodes that are not known", whole(2, gpu_topology=NUMA, gpu_topology_required=True)),
        filter="topology_total",
        wanted="2",
        found="1",
        reason="wanted 2 x GPU on one memory node of the host, at most 1 of its 8 are",
        lasting=True,
    ),
    Case(
        *("a pair that is broken", whole(2, gpu_topology=NVLINK, gpu_topology_required=True)),
        (*in_pairs(2), make_gpus("n1", 3)[2]),
        held=(whole(preferred_gpu_uuid="n1-0"),),
        filter="topology_free",
        wanted="2",
        found="1",
        reason="wanted 2 x GPU each joined to each by NVLink, at most 1 of the 2 free ones are: "
        "allocated to a1",
    ),
    Case(
        "beside another service",
        whole(service="web", anti_affinity="node"),
        held=(whole(service="db"),),
    ),
    Case(
        *("on another GPU than its own", share(8, service="web", anti_affinity="gpu"), 2),
        held=(share(8, service="web"),),
    ),
    Case(
        *("beside its own", whole(service="web", anti_affinity="node")),
        held=(whole(service="web"),),
        filter="anti_affinity",
        wanted="no other of web",
        found="a1",
        reason="a1 of service web is there, and none shall be beside another on a node",
    ),
    Case(
        *("on a rack where its own are", whole(service="web", anti_affinity="rack")),
        facts=LABELS,
        held=(whole(service="web"),),
        filter="anti_affinity",
        wanted="no other of web with rack=r1",
        found="a1",
        reason="a1 of service web is on a node with rack=r1, and no two of them shall share it",
    ),
    Case(
        *("without the label on which its own are", whole(service="web", anti_affinity="rack")),
        held=(whole(service="web"),),
    ),
    Case(
        *("on a GPU of its own", share(8, service="web", anti_affinity="gpu"), 1),
        held=(share(8, service="web"),),
        filter="anti_affinity",
        wanted="a GPU without web",
        found="a1",
        reason="only GPU 0 would have the room, where others of service web are: a1",
    ),
    Case(
        *(
            "a MIG device beside its own",
            whole(mig_profile=MIG_ANY, service="w", anti_affinity="gpu"),
        ),
        (SEVEN,),
        held=(whole(mig_profile=MIG_ANY, service="w"),),
        filter="anti_affinity",
        wanted="a GPU without w",
        found="a1",
        reason="only GPU 0 would have the room, where others of service w are: a1",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_constraint(case: Case) -> None:
    scene = Scene(replace(make_facts(gpus=case.gpus), **(case.facts or {})))
    for held in case.held:
        scene.grant(held)
    view = scene.view()
    node = view.nodes["n1"]
    expected = Refusal("n1", case.filter, case.reason, case.wanted, case.found)
    assert refuse(case.request, node, view) == (expected if case.filter else None)
    assert fits(case.request, node, view) is not bool(case.filter)
    assert could_ever_fit(case.request, node, view) is not case.lasting


def test_mig_device_of_a_cordoned_card() -> None:
    scene = Scene(make_facts(gpus=(SEVEN,)))
    scene.decide(Cordon("n1", "Xid 63", "n1-0"))
    view = scene.view()
    refusal = refuse(whole(mig_profile="1g.10gb"), view.nodes["n1"], view)
    assert refusal is not None
    assert (refusal.filter, refusal.wanted, refusal.found) == ("gpus_cordoned", "1g.10gb", "0")
    assert refusal.reason == (
        "wanted one MIG 1g.10gb of a GPU, every GPU that has one is cordoned: "
        "GPU 0 is cordoned: Xid 63 (for 0ms)"
    )


def test_anti_affinity_looks_at_other_nodes_of_the_rack() -> None:
    racks = {"n1": "r1", "n2": "r1", "n3": "r2"}
    scene = Scene(*(replace(make_facts(n), labels={"rack": racks[n]}) for n in racks))
    held = scene.grant(whole(service="web", node="n1"))
    view = scene.view()
    request = whole(service="web", anti_affinity="rack")
    refusals = [refuse(request, node, view) for node in view.nodes.values()]
    assert [each and each.found for each in refusals] == [held.id, held.id, None]


def test_what_others_held_of_the_rack_is_free_again() -> None:
    scene = Scene(replace(make_facts(), labels={"rack": "r1"}))
    held = scene.grant(whole(service="web"))
    scene.obey("n1")
    scene.hand_back(held.id)
    view = scene.view()
    assert refuse(whole(service="web", anti_affinity="rack"), view.nodes["n1"], view) is None


@pytest.mark.parametrize(
    ("fields", "count", "value"),
    [
        ({}, 5, ""),
        ({"same_label": "rack"}, 5, ""),
        ({"same_label": "rack", "same_label_required": True}, 2, "r1"),
        ({"service": "s", "anti_affinity": "rack"}, 3, ""),
        ({"service": "s", "anti_affinity": "node"}, 5, ""),
        (
            {
                "same_label": "zone",
                "same_label_required": True,
                "service": "s",
                "anti_affinity": "rack",
            },
            2,
            "a",
        ),
    ],
)
def test_parts_of_a_gang_that_some_nodes_host_together(
    fields: dict[str, Any], count: int, value: str
) -> None:
    labels: tuple[dict[str, str], ...] = (
        {"rack": "r1", "zone": "a"},
        {"rack": "r1", "zone": "a"},
        {"rack": "r2", "zone": "a"},
        {"rack": "r2"},
        {},
    )
    scene = Scene(*(replace(make_facts(f"n{i}"), labels=each) for i, each in enumerate(labels)))
    found = parts_max(whole(8, nodes=9, **fields), scene.view().nodes.values())
    assert (found.count, found.value) == (count, value)


def test_a_card_that_is_not_read_counts_for_no_share() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.frame("n1", samples=make_samples(()))
    view = scene.view()
    assert not fits(share(1), view.nodes["n1"], view)
