"""What partitioning by demand is told of the fleet: which GPUs it may cut, and what waits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    H100,
    Scene,
    make_facts,
    make_gpus,
    make_health,
    make_process,
    make_samples,
    share,
    whole,
)

from stoker.aggregator.cuts import CutGpu, InstanceUse, Proposal, ProposalKind
from stoker.aggregator.cutting import cut_gpus, demands, operation_of
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import MIG_ANY, Gpu, MigDevice
from stoker.aggregator.processes import Assignment, ProcessTable
from stoker.aggregator.wishes import Cordon
from stoker.core.mig.boards import board_of
from stoker.core.mig.geometry import Geometry, Layout, MigState, Placed, Wanted

LAYOUT: Layout = (Placed(0, 2, "2g.20gb"), Placed(2, 1, "1g.10gb"), Placed(4, 4, "3g.40gb"))
# As NVML numbers GPU instances at these places.
DEVICES = (
    MigDevice("MIG-2g", "2g.20gb", 20 * GIB, 3, 0),
    MigDevice("MIG-1g", "1g.10gb", 10 * GIB, 9, 0),
    MigDevice("MIG-3g", "3g.40gb", 40 * GIB, 2, 0),
)


def h100() -> Geometry:
    board = board_of(0, H100)
    assert board is not None
    return board.geometry


def cut_card(*devices: MigDevice) -> Gpu:
    (gpu,) = make_gpus("n1", 1)
    return replace(gpu, mig_enabled=True, mig_devices=devices or DEVICES)


def plain_card() -> Gpu:
    (gpu,) = make_gpus("n1", 1)
    return replace(gpu, mig_enabled=False)


def scene_of(gpu: Gpu | None = None, **told: Any) -> Scene:
    """A node of pool `train` with a card that is cut as LAYOUT, or as `told`."""
    card = gpu or cut_card()
    scene = Scene(make_facts(gpus=(card,), pool="train"))
    right: dict[str, Any] = {"layout": LAYOUT, "geometry": h100(), "changed_at": 5.0}
    scene.frame("n1", mig={card.uuid: GpuMig(card.uuid, **(right | told))})
    return scene


def cuttable(scene: Scene, pools: tuple[str, ...] = ("train",)) -> tuple[CutGpu, ...]:
    return cut_gpus(scene.view(), scene.fleet.conditions.table, pools)


def uses(scene: Scene) -> dict[str, InstanceUse]:
    (gpu,) = cuttable(scene)
    return {each.placed.profile: each for each in gpu.instances}


def test_a_card_is_told_as_it_is_cut() -> None:
    (gpu,) = cuttable(scene_of())
    assert (gpu.node, gpu.uuid, gpu.index, gpu.pool) == ("n1", "n1-0", 0, "train")
    assert (gpu.is_enabled, gpu.toggles_at_once, gpu.is_free) == (True, True, True)
    assert gpu.instances == tuple(InstanceUse(placed) for placed in LAYOUT)
    assert (gpu.geometry, gpu.changed_at) == (h100(), 5.0)


def test_a_card_that_is_not_cut_has_no_instances() -> None:
    (gpu,) = cuttable(scene_of(plain_card(), layout=()))
    assert (gpu.is_enabled, gpu.instances, gpu.is_free) == (False, (), True)
    scene = scene_of(plain_card(), layout=())
    scene.grant(share(8))
    (gpu,) = cuttable(scene)
    assert not gpu.is_free


def test_who_has_which_instance_is_told() -> None:
    scene = scene_of()
    mine = scene.grant(whole(mig_profile="1g.10gb"))
    other = make_process("n1-0", gpu_instance_id=2)
    handed = Assignment("n1-0", "kubelet", "pod", "MIG-2g")
    scene.frame("n1", processes=ProcessTable(scene.now, (other,), assignments=(handed,)))
    found = uses(scene)
    assert found["1g.10gb"] == InstanceUse(LAYOUT[1], (mine.id,))
    assert found["3g.40gb"] == InstanceUse(LAYOUT[2], is_foreign=True)
    assert found["2g.20gb"] == InstanceUse(LAYOUT[0], is_foreign=True)


@pytest.mark.parametrize(
    "devices",
    [
        DEVICES[:2],
        (*DEVICES[:2], replace(DEVICES[2], gpu_instance_id=1)),
        (*DEVICES[:2], replace(DEVICES[2], profile="4g.40gb")),
    ],
    ids=["one is missing", "one is elsewhere", "one is another"],
)
def test_where_the_list_and_the_places_do_not_fit_all_of_it_counts_as_used(
    devices: tuple[MigDevice, ...],
) -> None:
    assert all(each.is_busy for each in uses(scene_of(cut_card(*devices))).values())


def test_parts_of_one_instance_are_of_its_place() -> None:
    parts = tuple(MigDevice(f"MIG-{n}", "1c.2g.20gb", 20 * GIB, 3, n) for n in range(2))
    scene = scene_of(cut_card(*parts), layout=(Placed(0, 2, "2g.20gb", (1, 1)),))
    mine = scene.grant(whole(2, mig_profile="1c.2g.20gb"))
    assert uses(scene)["2g.20gb"].allocation_ids == (mine.id,)


Spoil = Callable[[Scene], object]
CUT_OFF: dict[str, Spoil] = {
    "the node is cordoned": lambda s: s.decide(Cordon("n1", "fans")),
    "the card is cordoned": lambda s: s.decide(Cordon("n1", "fans", "n1-0")),
    "the card is ill": lambda s: s.judge("n1", make_health("n1-0")),
    "the node is gone": lambda s: s.disconnect("n1"),
    "the node is stale": lambda s: setattr(s, "now", s.now + 60.0),
    "the card was not read": lambda s: s.frame("n1", samples=make_samples(())),
    "its processes are not known": lambda s: s.frame(
        "n1", processes=ProcessTable(s.now, (), unread_gpu_uuids=("n1-0",))
    ),
    "what others handed out is not known": lambda s: s.frame(
        "n1", processes=ProcessTable(s.now, (), assignments_unknown="no kubelet")
    ),
    "others have it whole": lambda s: s.frame(
        "n1", processes=ProcessTable(s.now, (), assignments=(Assignment("n1-0", "kubelet", "p"),))
    ),
}


@pytest.mark.parametrize("why", CUT_OFF)
def test_a_card_is_left_alone(why: str) -> None:
    scene = scene_of()
    CUT_OFF[why](scene)
    assert cuttable(scene) == ()


@pytest.mark.parametrize(
    "told",
    [
        {"is_withheld": True},
        {"layout": None},
        {"geometry": None},
        {"geometry": replace(h100(), memory_slices=0)},
        *({"state": state} for state in MigState if state is not MigState.SUCCESS),
    ],
    ids=", ".join,
)
def test_a_card_of_which_that_is_told_is_left_alone(told: dict[str, Any]) -> None:
    assert cuttable(scene_of(**told)) == ()
    assert cuttable(scene_of(state=MigState.SUCCESS)) != ()


def test_other_pools_are_left_alone() -> None:
    assert cuttable(scene_of(), pools=("infer",)) == ()


def test_a_card_in_mig_mode_with_a_process_on_the_whole_of_it_is_not_free() -> None:
    scene = scene_of()
    scene.frame("n1", processes=ProcessTable(scene.now, (make_process("n1-0"),)))
    (gpu,) = cuttable(scene)
    assert not gpu.is_free


# --- what waits


def test_what_waits_for_mig_devices_and_for_whole_gpus_is_demand() -> None:
    scene = scene_of()
    scene.grant(whole(mig_profile="3g.40gb", ttl_seconds=1e6))
    named = scene.wait(whole(2, mig_profile="3g.40gb"))
    scene.later(1.0)
    sized = scene.wait(
        whole(mig_profile=MIG_ANY, memory_bytes=70 * GIB, compute_milli=500, priority=1)
    )
    gpus = scene.wait(whole(1))
    scene.wait(share(8))
    scene.wait(whole(1, nodes=2))
    first, second, third = demands(scene.fleet.queue(), scene.view(), slices=7)
    assert (first.allocation_id, first.profile, first.memory_bytes_min) == (sized.id, "", 70 * GIB)
    assert (first.compute_slices_min, first.since) == (4, scene.now)
    assert (second.allocation_id, second.profile, second.count) == (named.id, "3g.40gb", 2)
    assert (third.allocation_id, third.whole_gpus, third.count) == (gpus.id, 1, 1)
    assert {each.nodes for each in (first, second, third)} == {frozenset({"n1"})}


def test_for_which_something_is_done_already_is_no_demand() -> None:
    scene = scene_of()
    waiting = scene.wait(whole(mig_profile="7g.80gb"))
    assert demands(scene.fleet.queue(), scene.view(), 7, {waiting.id}) == ()


@pytest.mark.parametrize(
    "elsewhere",
    [{"pool": "infer"}, {"node": "n2"}, {"models": ("A100",)}, {"cpu_milli": 10**6}],
    ids=str,
)
def test_a_node_that_could_not_host_it_anyway_is_not_named(elsewhere: dict[str, Any]) -> None:
    scene = scene_of()
    scene.wait(whole(mig_profile="7g.80gb", **elsewhere))
    (demand,) = demands(scene.fleet.queue(), scene.view(), 7)
    assert demand.nodes == frozenset()


# --- operations


def proposal(**fields: Any) -> Proposal:
    right = Proposal(
        kind=ProposalKind.CUT,
        node="n1",
        gpu_uuid="n1-0",
        gpu_index=0,
        wanted=Wanted(is_enabled=True, devices=(("3g.40gb", 2),)),
        layout=(Placed(0, 4, "3g.40gb"), Placed(4, 4, "3g.40gb")),
        for_allocations=("a1",),
        destroys=(),
        blast_radius=(),
        needs_reset=False,
        is_automatic=True,
        why="because",
    )
    return replace(right, **fields)


def test_the_same_proposal_is_one_operation_and_what_follows_another_one() -> None:
    told = GpuMig("n1-0", operation_id="op-1", layout=LAYOUT)
    id_ = operation_of(proposal(), told)
    assert operation_of(proposal(why="for another reason"), replace(told, reason="x")) == id_
    others = [
        operation_of(proposal(node="n2"), told),
        operation_of(proposal(wanted=Wanted(is_enabled=False), layout=()), told),
        operation_of(proposal(), replace(told, operation_id=id_)),
        operation_of(proposal(), replace(told, layout=())),
    ]
    assert len({id_, *others}) == 5
    assert len(id_) <= 128
