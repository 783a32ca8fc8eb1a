"""The line over the whole fleet: exact counts, the most frequent reason first, the nearest miss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    H100,
    T4,
    Scene,
    make_facts,
    make_gpus,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import Device, GpuTopology, Placement, Request
from stoker.aggregator.placing.place import explain
from stoker.aggregator.placing.smallest import RANKS
from stoker.aggregator.queueing import kept_for
from stoker.aggregator.wishes import Cordon

DOCS = Path(__file__).parents[4] / "docs" / "placement.md"


def summary(scene: Scene, request: Request) -> str:
    return explain(request, scene.view()).summary


def take(scene: Scene, node: str, count: int) -> None:
    """The first GPUs of the node are granted; written to the ledger, since there are many."""
    gpus = scene.gpus_of(node)[:count]
    devices = tuple(Device(g.uuid, g.model, g.index, g.memory_total_bytes, True) for g in gpus)
    placements = (Placement(node, devices),)
    id_ = scene.new_id()
    scene.record(e.AllocationGranted(scene.now, id_, whole(count), "", scene.now, placements))


def test_over_a_thousand_nodes() -> None:
    scene = Scene()
    for i in range(1213):
        model, gib = ("Tesla V100-SXM2-16GB", 16) if i < 500 else (T4, 16)
        if i >= 800:
            model, gib = H100, 80
        scene.join(make_facts(f"n-{i}", make_gpus(f"n-{i}", 4, model, gib)))
    for i in range(800, 1201):
        take(scene, f"n-{i}", 1 if i == 817 else 3)
    for i in range(1201, 1213):
        scene.record(e.NodeCordoned(scene.now, f"n-{i}", "Xid 79"))
    assert summary(scene, whole(4, models=("H100",))) == (
        "no node for 4 x H100: 1,213 nodes: "
        "800 wrong model (500 x Tesla V100-SXM2-16GB, 300 x Tesla T4), "
        "401 no 4 free GPUs on one node (best: n-817 has 3), 12 cordoned: Xid 79"
    )


def three(**facts: Any) -> Scene:
    """Nodes n0, n1 and n2 with one, two and three H100; `facts` are lists, one for each."""
    return Scene(
        *(
            replace(make_facts(f"n{i}", i + 1), **{name: each[i] for name, each in facts.items()})
            for i in range(3)
        )
    )


JOINED = "each joined to each by NVLink"
LINES: tuple[tuple[str, Callable[[], Scene], Request, str], ...] = (
    (
        "models",
        lambda: Scene(
            *(make_facts(f"n{i}", make_gpus(f"n{i}", 1, m)) for i, m in enumerate((A100, T4, T4)))
        ),
        whole(models=("H100",)),
        f"3 nodes: 3 wrong model (2 x {T4}, 1 x {A100})",
    ),
    ("GPUs in all", three, whole(4), "3 nodes: 3 fewer than 4 GPUs (best: n2 has 3)"),
    (
        "sizes of GPUs",
        three,
        whole(gpu_memory_min_bytes=90 * GIB),
        "3 nodes: 3 no GPU of 90 GiB (best: n0 has 80 GiB)",
    ),
    ("shares", three, share(90), "3 nodes: 3 GPUs too small for 90 GiB (best: n0 has 80 GiB)"),
    ("MIG", three, whole(mig_profile="1g.10gb"), "3 nodes: 3 no MIG 1g.10gb (none)"),
    (
        "labels",
        lambda: three(labels=[{"rack": "r1"}, {}, {}]),
        whole(node_labels={"rack": "r2"}),
        "3 nodes: 3 other labels (2 x no label rack, 1 x rack=r1)",
    ),
    (
        "drivers",
        lambda: three(driver_version=["535.1", "535.1", ""]),
        whole(driver_version_min=(570, 86)),
        "3 nodes: 3 driver older than 570.86 (2 x 535.1, 1 x not known)",
    ),
    (
        "CPUs",
        lambda: three(cpu_milli=[1000, 4000, None]),
        whole(cpu_milli=6000),
        "3 nodes: 3 fewer than 6 CPUs (best: n1 has 4 CPUs)",
    ),
    (
        "topology",
        three,
        whole(2, gpu_topology=GpuTopology.NVLINK, gpu_topology_required=True),
        f"3 nodes: 2 no 2 x GPU {JOINED} (best: n1 has 1), 1 fewer than 2 GPUs (best: n0 has 1)",
    ),
    (
        "a node that is not there",
        three,
        whole(node="n9"),
        "node n9 is not in the fleet, which has 3 nodes",
    ),
    (
        "a pool that is not there",
        lambda: three(pool=["a", "b", ""]),
        whole(pool="c"),
        "pool c has no node; there are a, b",
    ),
    (
        "a pool of few",
        lambda: three(pool=["a", "b", "b"]),
        whole(4, pool="b"),
        "2 nodes of pool b: 2 fewer than 4 GPUs (best: n2 has 3) (1 other node was not asked for)",
    ),
    (
        "the caller's host",
        three,
        whole(host_boot_id="b"),
        "the host that the command would run on is not in the fleet, which has 3 nodes",
    ),
)


@pytest.mark.parametrize(("what", "make", "request_", "line"), LINES, ids=[x[0] for x in LINES])
def test_line(what: str, make: Callable[[], Scene], request_: Request, line: str) -> None:
    assert summary(make(), request_) == f"no node for {request_.described()}: {line}"


def test_several_reasons_of_cordons_are_counted() -> None:
    scene = three()
    for name, reason in (("n0", "fan"), ("n1", "Xid 79"), ("n2", "Xid 79")):
        scene.record(e.NodeCordoned(scene.now, name, reason))
    assert summary(scene, whole()).endswith("3 nodes: 3 cordoned: 2 x Xid 79, 1 x fan")


def test_gpus_that_are_cordoned_are_no_number_to_compare() -> None:
    scene = three()
    for uuid in ("n0-0", "n1-0"):
        scene.decide(Cordon(uuid[:2], "Xid 79", uuid))
    assert summary(scene, whole(2)).endswith("1 of 3 nodes can host 2 x GPU now")
    assert summary(scene, whole(3)).endswith("1 of 3 nodes can host 3 x GPU now")


def test_what_is_kept_for_those_ahead_is_told_by_whom() -> None:
    scene = three()
    first = scene.grant(whole(3, node="n2"))
    waiting = scene.wait(whole(3))
    blocked = kept_for([waiting], scene.view())
    scene.obey("n2")
    scene.hand_back(first.id)
    refusals = explain(whole(3), scene.view(), blocked, 1)
    assert refusals.summary == (
        "no node for 3 x GPU: 3 nodes: 2 fewer than 3 GPUs (best: n1 has 2), "
        f"1 kept for requests ahead in the queue ({waiting.id})"
    )
    assert refusals.ahead == 1


def gang(**fields: Any) -> Request:
    return whole(1, nodes=3, **fields)


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (
            whole(2, nodes=3),
            "2 of 3 nodes can host one of the parts; 1 fewer than 2 GPUs (best: n0 has 1)",
        ),
        (
            gang(same_label="rack", same_label_required=True),
            "3 of 3 nodes can host one of the parts; at most 2 of them with one rack (r1)",
        ),
        (
            gang(service="s", anti_affinity="rack"),
            "3 of 3 nodes can host one of the parts; at most 2 of them with a different rack each",
        ),
        (
            gang(same_label="row", same_label_required=True),
            "0 of 3 nodes can host one of the parts; 3 no label row",
        ),
        (
            gang(models=("H100", "A100")),
            "3 of 3 nodes can host one of the parts; at most 2 of them of one GPU model",
        ),
    ],
)
def test_line_of_a_gang(request_: Request, line: str) -> None:
    scene = three(labels=[{"rack": "r1"}, {"rack": "r1"}, {"rack": "r2"}])
    if request_.models:
        scene.change_facts("n2", gpus=make_gpus("n2", 3, A100, 40))
    assert summary(scene, request_) == f"no place for {request_.described()}: {line}"


def test_the_docs_list_every_rank_of_changes() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    ranks = [row.split("|")[1].strip() for row in rows]
    assert [each for each in ranks if each.isdecimal()] == [str(i + 1) for i in range(len(RANKS))]
