"""What of a node a request gets: whole GPUs, a share, or a MIG device."""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.aggregator.builders import A100, GIB, H100, make_gpus, share, whole
from tests.unit.aggregator.placing.boards import (
    bridged_pairs,
    dgx_h100,
    dgx_v100,
    fleet_of,
    granted,
    partitioned,
    plain,
    view_of,
)

from stoker.aggregator.model import (
    MIG_ANY,
    Claim,
    Device,
    Gpu,
    GpuTopology,
    Placement,
    Request,
)
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.filters import refuse
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.topology import satisfies
from stoker.aggregator.views import NodeView

NVLINK, NUMA = GpuTopology.NVLINK, GpuTopology.NUMA


def places(request: Request, node: NodeView, **hints: Any) -> tuple[int, ...] | None:
    """The indexes of the GPUs that are chosen."""
    devices = choose(request, node, fleet_of(node), **hints)
    return None if devices is None else tuple(device.index for device in devices)


@dataclass(frozen=True)
class Row:
    what: str
    request: Request
    node: NodeView
    expected: tuple[int, ...] | None


MIXED = (
    *make_gpus("n1", 2, A100, 40),
    *(replace(gpu, uuid=f"h{gpu.index}", index=gpu.index + 2) for gpu in make_gpus("n1", 3)),
)
REQUIRED = {"gpu_topology_required": True}
WHOLE = (
    Row("nothing but CPUs", Request(0, "ann", 60.0, cpu_milli=1000), view_of(plain()), ()),
    Row("all that there are", whole(8), view_of(dgx_h100()), tuple(range(8))),
    Row("more than are free", whole(8), view_of(dgx_h100(), [3]), None),
    Row("the model with fewest free", whole(2), view_of(MIXED), (0, 1)),
    Row("all of one model", whole(3), view_of(MIXED), (2, 3, 4)),
    Row("not of two models", whole(4), view_of(MIXED), None),
    Row("the model that was asked for", whole(1, models=("H100",)), view_of(MIXED), (2,)),
    Row("one of several models", whole(3, models=("A100", "H100")), view_of(MIXED), (2, 3, 4)),
    Row("with the memory", whole(1, gpu_memory_min_bytes=60 * GIB), view_of(MIXED), (2,)),
    Row(
        "the model of which a set lies as preferred",
        whole(2, gpu_topology=NUMA),
        view_of((*make_gpus("a", 2, A100), *(replace(g, index=g.index + 2) for g in plain()[:3]))),
        (2, 3),
    ),
    Row(
        "nothing, where the topology is required and cannot be had",
        whole(4, gpu_topology=NVLINK, **REQUIRED),
        view_of(bridged_pairs()),
        None,
    ),
    Row(
        "the next best, where it is but preferred",
        whole(4, gpu_topology=NVLINK),
        view_of(bridged_pairs()),
        (0, 1, 2, 3),
    ),
    Row(
        "four that are all linked",
        whole(4, gpu_topology=NVLINK, **REQUIRED),
        view_of(dgx_v100(), [0]),
        (4, 5, 6, 7),
    ),
    Row(
        "not fewer sockets than there are",
        whole(4, gpu_topology=NUMA, **REQUIRED),
        view_of(plain(), [0, 7]),
        None,
    ),
    Row("the GPU that is named", whole(1, preferred_gpu_uuid="n1-5"), view_of(plain()), (5,)),
    Row(
        "another, if it is taken", whole(1, preferred_gpu_uuid="n1-5"), view_of(plain(), [5]), (4,)
    ),
    Row(
        "with the GPU that is named its other half",
        whole(2, preferred_gpu_uuid="n1-3"),
        view_of(bridged_pairs()),
        (2, 3),
    ),
    Row(
        "not the GPU that is named, where the topology would be lost",
        whole(2, preferred_gpu_uuid="n1-3", gpu_topology=NVLINK, **REQUIRED),
        view_of(bridged_pairs(), [2]),
        (0, 1),
    ),
    Row(
        "the model of the GPU that is named",
        whole(2, preferred_gpu_uuid="h1"),
        view_of(MIXED),
        (2, 3),
    ),
)


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row.what)
def test_whole_gpus(row: Row) -> None:
    assert places(row.request, row.node) == row.expected


def test_whole_gpus_are_held_alone_with_all_of_their_memory() -> None:
    node = view_of(dgx_h100())
    assert choose(whole(1), node, fleet_of(node)) == (Device("n1-0", H100, 0, 80 * GIB, True),)


def test_of_a_model_that_the_caller_has_decided_on() -> None:
    assert places(whole(1), view_of(MIXED), model=H100) == (2,)
    assert places(whole(4), view_of(MIXED), model=H100) is None
    assert places(share(10), view_of(MIXED), model=H100) == (2,)


def shared(**shares_gib: float) -> NodeView:
    """Four GPUs, with so much of each held by shares; `g2=0.5` means half of the compute as well.

    Tenants of the service `web` hold what is on GPU 0.
    """
    gpus = plain()[:4]
    claims: dict[str, tuple[Claim, ...]] = {}
    for name, gib in shares_gib.items():
        uuid = f"n1-{name[1:]}"
        claims[uuid] = (Claim(f"on {uuid}", int(gib * GIB), compute_milli=500),)
    web = granted(
        "on n1-0",
        share(1, service="web"),
        Placement("n1", (Device("n1-0", H100, 0, GIB, exclusive=False),)),
    )
    return view_of(gpus, claims=claims, tenants=[web] if "g0" in shares_gib else [])


SHARES = (
    Row("the tightest that fits", share(10), shared(g0=40, g1=60, g2=75), (1,)),
    Row("one that is shared already", share(10), shared(g2=1), (2,)),
    Row("a new one, if none has the room", share(30), shared(g0=60, g1=60), (2,)),
    Row("none has the room", share(81), shared(), None),
    Row("with the compute", share(10, compute_milli=501), shared(g0=60, g1=50), (2,)),
    Row("exactly the compute", share(10, compute_milli=500), shared(g0=60, g1=50), (0,)),
    Row("compute alone takes as much memory", whole(1, compute_milli=300), shared(g1=57), (0,)),
    Row("and fits where it is there", whole(1, compute_milli=300), shared(g1=56), (1,)),
    Row("the GPU that is named", share(10, preferred_gpu_uuid="n1-3"), shared(g1=60), (3,)),
    Row(
        "not with its own kind, if that is asked",
        share(10, service="web", anti_affinity="gpu"),
        shared(g0=60, g1=20),
        (1,),
    ),
    Row("with its own kind, if not", share(10, service="web"), shared(g0=60, g1=20), (0,)),
    Row(
        "rather where its own kind is not",
        share(10, service="web", spread="gpu"),
        shared(g0=60),
        (1,),
    ),
    Row(
        "with its own kind, where nothing else has the room",
        share(30, service="web", spread="gpu"),
        shared(g0=40, g1=60, g2=60, g3=60),
        (0,),
    ),
)


@pytest.mark.parametrize("row", SHARES, ids=lambda row: row.what)
def test_shares(row: Row) -> None:
    assert places(row.request, row.node) == row.expected


def test_a_share_has_the_bytes_and_the_compute_that_were_asked_for() -> None:
    node = shared()
    half = choose(whole(1, compute_milli=500), node, fleet_of(node))
    assert half == (Device("n1-0", H100, 0, 40 * GIB, exclusive=False, compute_milli=500),)
    bytes_alone = choose(share(10), node, fleet_of(node))
    assert bytes_alone == (Device("n1-0", H100, 0, 10 * GIB, exclusive=False),)


def test_a_policy_says_which_gpu_and_the_request_before_it() -> None:
    node = shared(g1=60)
    assert places(share(10), node, prefer=("n1-3", "n1-0")) == (3,)
    assert places(share(90), node, prefer=("n1-3",)) is None
    assert places(share(10, preferred_gpu_uuid="n1-2"), node, prefer=("n1-3",)) == (2,)
    assert places(share(30), shared(g3=60), prefer=("n1-3", "n1-0")) == (0,)


def mig(*taken: str) -> NodeView:
    """GPU 0 has three small devices and one of 40 GB, GPU 1 two of 20 GB and a small one, GPU 2 is
    cut into two compute instances of one GPU instance and a GPU instance of one."""
    small, middle, large = ("1g.10gb", 10), ("2g.20gb", 20), ("3g.40gb", 40)
    third = partitioned(2, ("1c.2g.20gb", 20), ("1c.2g.20gb", 20), ("1c.2g.20gb", 20))
    halves = (
        third.mig_devices[0],
        replace(third.mig_devices[1], gpu_instance_id=1, compute_instance_id=1),
        third.mig_devices[2],
    )
    gpus = (
        partitioned(0, small, small, small, large),
        partitioned(1, middle, middle, small),
        replace(third, mig_devices=halves),
    )
    claims: dict[str, tuple[Claim, ...]] = {}
    for uuid in taken:
        gpu = f"n1-{uuid.split('-')[2]}"
        claim = Claim(uuid, 1, mig_device_uuid=uuid)
        claims[gpu] = (*claims.get(gpu, ()), claim)
    return view_of(gpus, claims=claims)


@pytest.mark.parametrize(
    ("what", "request_", "node", "expected"),
    [
        ("by profile", whole(1, mig_profile="2g.20gb"), mig(), "MIG-n1-1-0"),
        ("the GPU with least left", whole(1, mig_profile="1g.10gb"), mig(), "MIG-n1-1-2"),
        (
            "the GPU that others have left least of",
            whole(1, mig_profile="1g.10gb"),
            mig("MIG-n1-0-3", "MIG-n1-0-0"),
            "MIG-n1-0-1",
        ),
        ("no such profile", whole(1, mig_profile="7g.80gb"), mig(), None),
        ("all taken", whole(1, mig_profile="3g.40gb"), mig("MIG-n1-0-3"), None),
        ("the smallest", whole(1, mig_profile=MIG_ANY), mig(), "MIG-n1-1-2"),
        (
            "the smallest with the memory, then with fewest slices",
            whole(1, mig_profile=MIG_ANY, memory_bytes=11 * GIB),
            mig(),
            "MIG-n1-2-2",
        ),
        (
            "of a GPU instance that is begun",
            whole(1, mig_profile="1c.2g.20gb"),
            mig("MIG-n1-2-0"),
            "MIG-n1-2-1",
        ),
        (
            "too small for the memory",
            whole(1, mig_profile="1g.10gb", memory_bytes=11 * GIB),
            mig(),
            None,
        ),
        (
            "on the GPU that is named",
            whole(1, mig_profile="1g.10gb", preferred_gpu_uuid="n1-0"),
            mig(),
            "MIG-n1-0-0",
        ),
    ],
)
def test_mig_devices(what: str, request_: Request, node: NodeView, expected: str | None) -> None:
    devices = choose(request_, node, fleet_of(node))
    assert (devices[0].mig_device_uuid if devices else None) == expected


@pytest.mark.parametrize(
    ("what", "request_", "node", "expected"),
    [
        (
            "of the card with least left",
            whole(2, mig_profile="1g.10gb"),
            mig(),
            ["MIG-n1-0-0", "MIG-n1-1-2"],
        ),
        (
            "small ones before those beside them",
            whole(3, mig_profile=MIG_ANY),
            mig(),
            ["MIG-n1-0-0", "MIG-n1-0-1", "MIG-n1-1-2"],
        ),
        (
            "of a card that is in use though another has less left",
            whole(2, mig_profile="1g.10gb"),
            mig("MIG-n1-0-3"),
            ["MIG-n1-0-0", "MIG-n1-0-1"],
        ),
        ("more than there are", whole(11, mig_profile=MIG_ANY), mig(), None),
        (
            "with enough compute",
            whole(1, mig_profile=MIG_ANY, compute_milli=400),
            mig(),
            ["MIG-n1-0-3"],
        ),
        (
            "as much compute as a slice has",
            whole(1, mig_profile=MIG_ANY, compute_milli=142),
            mig(),
            ["MIG-n1-1-2"],
        ),
        (
            "more compute than any has",
            whole(1, mig_profile=MIG_ANY, compute_milli=900),
            mig(),
            None,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_mig_devices_and_as_much_compute(
    what: str, request_: Request, node: NodeView, expected: list[str] | None
) -> None:
    devices = choose(request_, node, fleet_of(node))
    assert (devices and [device.mig_device_uuid for device in devices]) == expected


def test_a_mig_device_is_held_with_its_memory() -> None:
    node = mig()
    assert choose(whole(1, mig_profile="3g.40gb"), node, fleet_of(node)) == (
        Device(
            "n1-0",
            H100,
            0,
            40 * GIB,
            exclusive=False,
            mig_device_uuid="MIG-n1-0-3",
            mig_profile="3g.40gb",
        ),
    )


# --- laws

CUT = (
    partitioned(0, ("1g.10gb", 10), ("1g.10gb", 10), ("3g.40gb", 40)),
    partitioned(1, ("2g.20gb", 20), ("1g.10gb", 10)),
    *plain()[2:5],
)
BOARDS = (dgx_h100(), dgx_v100(), bridged_pairs(), plain(), MIXED, CUT)


WEB = granted(
    "web",
    share(1, service="web"),
    Placement("n1", (Device("n1-0", H100, 0, GIB, exclusive=False),)),
)


@st.composite
def nodes(draw: st.DrawFn) -> NodeView:
    gpus = draw(st.sampled_from(BOARDS))
    taken = draw(st.sets(st.integers(0, len(gpus) - 1)))
    claims: dict[str, tuple[Claim, ...]] = {}
    for place in draw(st.sets(st.integers(0, len(gpus) - 1))) - taken:
        size = draw(st.integers(1, 40))
        devices = [device.uuid for device in gpus[place].mig_devices]
        uuid = draw(st.sampled_from(devices)) if devices else ""
        milli = 0 if devices else size * 10
        claims[gpus[place].uuid] = (Claim(f"on {place}", size * GIB, milli, uuid),)
    tenants = [WEB] if draw(st.booleans()) else []
    return view_of(gpus, taken, claims=claims, tenants=tenants)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    common: dict[str, Any] = {
        "models": draw(st.sampled_from(((), ("H100",), ("A100", "V100")))),
        "service": "web",
        "anti_affinity": draw(st.none() | st.just("gpu")),
        "spread": draw(st.none() | st.just("gpu")),
        "preferred_gpu_uuid": draw(st.none() | st.sampled_from(("n1-0", "n1-3"))),
    }
    kind = draw(st.sampled_from(("whole", "share", "mig")))
    if kind == "mig":
        profile = draw(st.sampled_from(("1g.10gb", "3g.40gb", "7g.80gb", MIG_ANY)))
        least = draw(st.none() | st.sampled_from((9 * GIB, 15 * GIB)))
        count = draw(st.integers(1, 3))
        part = draw(st.none() | st.just(400)) if profile == MIG_ANY else None
        return whole(count, mig_profile=profile, memory_bytes=least, compute_milli=part, **common)
    if kind == "share":
        sizes = draw(
            st.sampled_from(
                (
                    {"memory_bytes": 45 * GIB},
                    {"compute_milli": 700},
                    {"memory_bytes": 10 * GIB, "compute_milli": 900},
                )
            )
        )
        return whole(1, **sizes, **common)
    topology = draw(st.sampled_from(GpuTopology))
    required = draw(st.booleans())
    gpus = draw(st.integers(1, 8))
    return whole(gpus, gpu_topology=topology, gpu_topology_required=required, **common)


@given(nodes(), requests())
def test_there_is_a_choice_where_no_filter_refuses_and_only_there(
    node: NodeView, request: Request
) -> None:
    view = replace(fleet_of(node), allocations={WEB.id: WEB})
    devices = choose(request, node, view)
    assert (devices is None) is (refuse(request, node, view) is not None)
    if devices is None:
        return
    by_uuid = {gpu.gpu.uuid: gpu for gpu in node.gpus}
    chosen = [by_uuid[device.uuid] for device in devices]
    assert len({device.mig_device_uuid or device.uuid for device in devices}) == request.gpus
    assert len({device.model for device in devices}) == 1
    assert [device.index for device in devices] == sorted(device.index for device in devices)
    if request.is_whole:
        assert all(gpu.is_free for gpu in chosen)
        assert len({gpu.gpu.model for gpu in chosen}) == 1
        lies = satisfies([gpu.gpu for gpu in chosen], request.gpu_topology)
        assert lies or not request.gpu_topology_required
        if not lies and request.preferred_gpu_uuid is None:
            assert not any_set_lies(request, node)


def any_set_lies(request: Request, node: NodeView) -> bool:
    """Whether any free GPUs of one model that would do lie as preferred, by trying all."""
    free = [gpu.gpu for gpu in node.gpus if gpu.is_free]
    kinds: dict[str, list[Gpu]] = {}
    for gpu in free:
        kinds.setdefault(gpu.model, []).append(gpu)
    return any(
        satisfies(chosen, request.gpu_topology)
        for model, gpus in kinds.items()
        if not request.models or any(wanted in model for wanted in request.models)
        for chosen in combinations(gpus, request.gpus)
    )


@pytest.mark.parametrize("board", [dgx_h100(), dgx_v100(), bridged_pairs(), plain()])
def test_the_search_over_the_fleet_gives_the_same_gpus(board: tuple[Gpu, ...]) -> None:
    placer = Placer()
    for taken in ((), (0,), (2, 5), (0, 1, 6)):
        node = view_of(board, taken)
        for gpus in range(1, 8 - len(taken) + 1):
            view = fleet_of(node)
            plan = placer.find(whole(gpus), view)
            assert plan is not None
            assert plan.devices == choose(whole(gpus), node, view)
