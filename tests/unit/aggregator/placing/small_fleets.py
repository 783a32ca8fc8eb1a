"""Small fleets in all kinds of states, and requests for them: what laws are checked on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    H100,
    T4,
    Scene,
    make_facts,
    make_process,
    make_samples,
)

from stoker.aggregator import events as e
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import (
    MIG_ANY,
    Allocation,
    DriverState,
    Gpu,
    GpuTopology,
    MigDevice,
    NodeFacts,
    Request,
)
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.wishes import Allocate, Cordon, Release, Settled
from stoker.core.mig.geometry import MigState

CAPABILITIES = {H100: "9.0", A100: "8.0", T4: "7.5"}
SIZES = {H100: 80, A100: 40, T4: 16}


@dataclass(frozen=True)
class Case:
    """A fleet, and a request that was not granted yet."""

    scene: Scene
    request: Request
    ahead: tuple[Allocation, ...]


def gpu(node: str, index: int, model: str, links: str) -> Gpu:
    peers = ((f"{node}-{index ^ 1}", 4),) if links == "pairs" else ()
    return Gpu(
        f"{node}-{index}",
        model,
        index,
        SIZES[model] * GIB,
        number=index + 1,
        compute_capability=CAPABILITIES[model],
        numa_node=None if links == "none" else index // 2,
        nvlink_peers=peers,
        nvswitch_links=18 if links == "switch" else 0,
        mig_enabled=False if model != T4 else None,
    )


def cut(card: Gpu, profiles: tuple[str, ...]) -> Gpu:
    devices = tuple(
        MigDevice(f"MIG-{card.uuid}-{i}", each, int(each.split(".")[1][:-2]) * GIB, i, 0)
        for i, each in enumerate(profiles)
    )
    return replace(card, mig_enabled=True, mig_devices=devices)


@st.composite
def nodes(draw: Callable[[st.SearchStrategy[Any]], Any], name: str) -> NodeFacts:
    model = draw(st.sampled_from((H100, H100, A100, T4)))
    other = draw(st.sampled_from((model, model, model, A100)))
    links = draw(st.sampled_from(("none", "pairs", "switch")))
    count = draw(st.sampled_from((1, 2, 3, 4)))
    gpus = [gpu(name, i, model if i < 2 else other, links) for i in range(count)]
    if model != T4 and draw(st.integers(0, 3)) == 0:
        profiles = draw(st.sampled_from((("1g.10gb",) * 2, ("3g.40gb",), ())))
        gpus[0] = cut(gpus[0], profiles)
        if count > 1 and draw(st.booleans()):
            gpus[1] = cut(gpus[1], ("1g.10gb", "3g.40gb"))
    labels = draw(
        st.sampled_from(({}, {"rack": "r1"}, {"rack": "r2"}, {"rack": "r1", "zone": "a"}))
    )
    return replace(
        make_facts(name, tuple(gpus), pool=draw(st.sampled_from(("", "train", "infer")))),
        labels=labels,
        driver_version=draw(st.sampled_from(("", "535.129.03", "570.124.06"))),
        cpu_milli=draw(st.sampled_from((None, 4000, 16000))),
        host_memory_bytes=draw(st.sampled_from((None, 64 * GIB))),
    )


KINDS = (
    *(Request(k, "ann", 60.0) for k in (1, 1, 2, 3, 4)),
    Request(1, "ann", 60.0, memory_bytes=10 * GIB),
    Request(1, "ann", 60.0, memory_bytes=60 * GIB),
    Request(1, "ann", 60.0, compute_milli=500),
    Request(1, "ann", 60.0, memory_bytes=8 * GIB, compute_milli=600),
    Request(1, "ann", 60.0, mig_profile="1g.10gb"),
    Request(1, "ann", 60.0, mig_profile="3g.40gb"),
    Request(1, "ann", 60.0, mig_profile=MIG_ANY, memory_bytes=20 * GIB),
    Request(1, "ann", 60.0, mig_profile=MIG_ANY, compute_milli=400),
    Request(2, "ann", 60.0, mig_profile="1g.10gb"),
    Request(3, "ann", 60.0, mig_profile=MIG_ANY, memory_bytes=8 * GIB),
    Request(1, "ann", 60.0, nodes=2),
    Request(2, "ann", 60.0, nodes=2),
    Request(1, "ann", 60.0, nodes=3),
)
PARTICULAR: tuple[dict[str, Any], ...] = (
    {"models": ("H100",)},
    {"models": ("A100", "H100")},
    {"models": ("T4",)},
    {"gpu_memory_min_bytes": 40 * GIB},
    {"compute_capability_min": (8, 0)},
    {"compute_capability_min": (9, 0)},
    {"driver_version_min": (535,)},
    {"driver_version_min": (570,)},
    {"pool": "train"},
    {"pool": "infer"},
    {"node": "n0"},
    {"node_labels": {"rack": "r1"}},
    {"node_labels": {"rack": "r2", "zone": "a"}},
    {"host_boot_id": "boot of n0"},
    {"cpu_milli": 2000},
    {"cpu_milli": 6000},
    {"host_memory_bytes": 40 * GIB},
    {"gpu_topology": GpuTopology.NUMA, "gpu_topology_required": True},
    {"gpu_topology": GpuTopology.NVLINK, "gpu_topology_required": True},
    {"same_label": "rack", "same_label_required": True},
    {"service": "web", "anti_affinity": "gpu"},
    {"service": "web", "anti_affinity": "node"},
    {"service": "web", "anti_affinity": "rack"},
    {"service": "web"},
    {"priority": 1},
    {"priority": 2},
)


def made(kind: Request, particular: list[dict[str, Any]]) -> Request:
    for fields in particular:
        kind = replace(kind, **fields)
    return kind


def anywhere(request: Request) -> Request:
    return replace(request, node=None, host_boot_id=None, pool=None, node_labels=None)


REQUESTS = st.builds(
    made, st.sampled_from(KINDS), st.lists(st.sampled_from(PARTICULAR), max_size=2)
)
# Those that usually find a place.
TENANTS = REQUESTS.map(anywhere)


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any], with_queue: bool = True) -> Case:
    count = draw(st.integers(1, 4))
    scene = Scene(*(draw(nodes(f"n{i}")) for i in range(count)))
    names = [f"n{i}" for i in range(count)]
    granted = [
        reply.id
        for request in draw(st.lists(TENANTS, min_size=1, max_size=8))
        for reply in scene.decide(Allocate(replace(request, ttl_seconds=1e6), "", 0.0))
        if isinstance(reply, Settled)
    ]
    for name in names:
        scene.obey(name)
        state = draw(st.sampled_from(("well",) * 8 + ("cordoned", "stale", "gone", "hung", "used")))
        if state == "cordoned":
            scene.record(e.NodeCordoned(scene.now, name, "repair"))
        elif state == "stale":
            scene.frame(name, samples=make_samples(()))
        elif state == "gone":
            scene.disconnect(name)
        elif state == "hung":
            scene.frame(name, driver=DriverState.BLOCKED)
        elif state == "used":
            index = draw(st.integers(0, len(scene.gpus_of(name)) - 1))
            process = make_process(f"{name}-{index}", memory_used_bytes=4 * GIB)
            scene.frame(name, processes=ProcessTable(scene.now, (process,)))
    for name in names:
        for card in scene.gpus_of(name):
            cordon = draw(st.sampled_from(("", "", "", "", "", "", "by hand", "by health")))
            if cordon == "by hand":
                scene.decide(Cordon(name, "fan", card.uuid))
            elif cordon:
                scene.record(
                    e.GpuCordoned(
                        scene.now, name, card.uuid, "Xid 79", by_health=True, drain_at=None
                    )
                )
    for name in names:
        withheld = {
            card.uuid: GpuMig(card.uuid, MigState.APPLYING, "2 of 5 steps", "half", "op", True)
            for card in scene.gpus_of(name)
            if draw(st.integers(0, 9)) == 0
        }
        if withheld:
            scene.frame(name, mig=withheld)
    for id_ in granted:
        if draw(st.integers(0, 5)) == 0:
            scene.decide(Release(id_))
    request = draw(REQUESTS)
    if with_queue:
        for waiting in draw(st.lists(REQUESTS, max_size=2)):
            scene.decide(Allocate(waiting, "", 3600.0))
    ahead = [each for each in scene.fleet.queue() if each.request.priority >= request.priority]
    return Case(scene, request, tuple(ahead))
