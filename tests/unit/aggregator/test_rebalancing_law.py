"""What holds for every plan of moves, on fleets made up by chance."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.builders import (
    A100,
    H100,
    Scene,
    make_facts,
    make_gpus,
    make_process,
    share,
    whole,
)
from tests.unit.aggregator.moving import end, placed, plan, wish_before

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.board import Board
from stoker.aggregator.model import Allocation, AllocationState, GpuSample, Placement, Plan, Request
from stoker.aggregator.moves import MovePolicy
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.filters import matches_gpu, refuse
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.usable import Usable, kinds_of, size_milli
from stoker.aggregator.views import NodeView

SEEDS = st.integers(0, 2**32 - 1)  # drawn choice by choice, fleets come out all but empty


def make_request(rng: Random, *, gpus_max: int, is_plain: bool) -> Request:
    """A wish with some of what a wish can ask for; a plain one has no others of its service."""
    fields: dict[str, Any] = {
        "movable": rng.random() < 0.7,
        "models": rng.choice([(), (), (), ("H100-80GB",), (A100,)]),
        "pool": rng.choice([None, None, None, "p"]),
        "cpu_milli": rng.choice([0, 0, 2000]),
    }
    if not is_plain and rng.random() < 0.5:
        fields["service"] = "s"
        fields["anti_affinity"] = rng.choice([None, None, "gpu", "node", "rack"])
        fields["spread"] = rng.choice([None, None, "gpu", "node", "rack"])
    if rng.random() < 0.4:
        fields["nodes"] = 1 if is_plain else rng.choice([1, 1, 1, 2])
        return whole(rng.randint(1, gpus_max), **fields)
    gib = rng.choice([5, 10, 30])
    return share(gib, compute_milli=rng.choice([None, None, 250]), **fields)


def make_scene(seed: int, nodes_max: int, gpus_max: int, *, is_plain: bool = False) -> Scene:
    """A fleet, and on it what placement granted in some order, less what has ended meanwhile."""
    rng = Random(seed)
    scene = Scene()
    for number in range(rng.randint(2, nodes_max)):
        name = f"n{number}"
        model, gib = rng.choice([(H100, 80), (H100, 80), (H100, 80), (A100, 40)])
        gpus = make_gpus(name, rng.randint(1, gpus_max), model, gib)
        facts = make_facts(name, gpus, pool=rng.choice(["", "p"]))
        rack = rng.choice([None, "x", "y"])
        labels = None if rack is None else {"rack": rack}
        scene.join(replace(facts, labels=labels, cpu_milli=rng.choice([4000, 64_000, 64_000])))
    for _ in range(rng.randint(3, 12)):
        grant_anywhere(make_request(rng, gpus_max=gpus_max, is_plain=is_plain), scene, rng)
    wanted = whole(rng.randint(1, gpus_max))
    wish_before(scene, wanted, times=rng.randint(0, 20))
    if not is_plain:
        for _ in range(rng.randint(0, 3)):
            request = make_request(rng, gpus_max=gpus_max, is_plain=is_plain)
            scene.allocate(request, wait_seconds=60.0)
        scene.later(100.0)  # what is held has been for long
        for name, node in scene.fleet.nodes.items():
            scene.report(name, samples={gpu.uuid: make_sample(rng) for gpu in node.facts.gpus})
    return scene


def grant_anywhere(request: Request, scene: Scene, rng: Random) -> None:
    """Grant it some place at which it fits: good placement would leave too little to mend."""
    view = scene.view()
    plan = find_place(request, view)
    if plan is None:
        return
    placements = plan.placements
    if request.nodes == 1:
        fitting = [n for n, node in view.nodes.items() if refuse(request, node, view) is None]
        node = view.nodes[rng.choice(sorted(fitting))]
        gpus = [gpu for gpu in node.gpus if matches_gpu(request, gpu.gpu)]
        rng.shuffle(gpus)
        devices = choose(request, replace(node, gpus=tuple(gpus)), view, [gpus[0].gpu.uuid])
        assert devices is not None
        placements = (Placement(node.name, devices),)
    id_ = scene.new_id()
    scene.record(e.AllocationGranted(scene.now, id_, request, "", scene.now, placements))


def make_sample(rng: Random) -> GpuSample:
    return GpuSample(
        memory_used_bytes=0,
        memory_reserved_bytes=0,
        utilization_ratio=rng.choice([None, 0.0, 0.0, 0.3, 0.95, 1.0]),
    )


def carry_out(scene: Scene, allocation_id: str, to: tuple[Placement, ...]) -> None:
    """One move on the real fleet, by its events: the new place first, then the old one ends."""
    view = scene.view()
    allocation = scene.fleet.allocations[allocation_id]
    request = allocation.request
    for placement in to:
        assert refuse(request, view.nodes[placement.node], view) is None
    assert objection(Plan(to), request, view) == ""
    id_ = f"{allocation_id} moved"
    scene.record(e.AllocationGranted(scene.now, id_, request, "", scene.now, to))
    end(scene, allocation)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(0, 4), st.sampled_from([None, "p"]), st.data())
def test_every_step_of_a_plan_is_allowed(
    seed: int, moves_max: int, pool: str | None, data: st.DataObject
) -> None:
    scene = make_scene(seed, 5, 4)
    known = sorted(scene.fleet.allocations)
    skip = data.draw(st.sets(st.sampled_from(known), max_size=1)) if known else set[str]()
    policy = MovePolicy()
    found = plan(scene, moves_max, policy, pool, sorted(skip))
    assert len(found.moves) <= moves_max
    ids = [move.allocation_id for move in found.moves]
    assert len(set(ids)) == len(ids)
    for move in found.moves:
        before = scene.fleet.allocations[move.allocation_id]
        assert before.state is AllocationState.GRANTED
        assert before.request.movable
        assert move.allocation_id not in skip
        assert move.from_placements == before.placements
        names = {each.node for each in (*move.from_placements, *move.to_placements)}
        assert pool is None or all(scene.fleet.nodes[n].facts.pool == pool for n in names)
        assert move.cost_milli == size_milli(before, scene.view().nodes) > 0
        carry_out(scene, move.allocation_id, move.to_placements)
    gain = sum(m.gain_milli for m in found.moves if m.kind == "defragment")
    cost = sum(m.cost_milli for m in found.moves if m.kind == "defragment")
    assert gain >= policy.defragment_gain_min * cost - 1


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_plans_come_to_an_end(seed: int) -> None:
    scene = make_scene(seed, 4, 4, is_plain=True)
    for _ in range(20):
        moves = plan(scene).moves
        if not moves:
            return
        for move in moves:
            carry_out(scene, move.allocation_id, move.to_placements)
    raise AssertionError("moves go to and fro")


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_one_move_is_the_best_of_all(seed: int) -> None:
    scene = make_scene(seed, 3, 3, is_plain=True)
    found = plan(scene, moves_max=1)
    best = best_of_all(scene, MovePolicy())
    net = sum(move.gain_milli - move.cost_milli for move in found.moves)
    assert abs(net - best) <= 1, (found, best)


def best_of_all(scene: Scene, policy: MovePolicy) -> float:
    """The most that any single move gains beyond its cost; 0: none gains enough."""
    view = scene.view()
    usable = Usable(kinds_of(view.allocations.values()))
    best = 0.0
    for allocation in list(view.allocations.values()):
        if allocation.state is not AllocationState.GRANTED or not allocation.request.movable:
            continue
        cost = size_milli(allocation, view.nodes)
        for placement in every_place(allocation.request, scene):
            if objection(Plan((placement,)), allocation.request, view):
                continue
            board = Board(view)
            board.put(replace(allocation, id="copy"), (placement,))
            board.take(allocation.id)
            names = {allocation.node, placement.node}
            after = sum(usable.milli(board.view.nodes[n], board.view) for n in sorted(names))
            before = sum(usable.milli(view.nodes[n], view) for n in sorted(names))
            if round(after - before) >= policy.defragment_gain_min * cost:
                best = max(best, after - before - cost)
    return best


def every_place(request: Request, scene: Scene) -> Iterator[Placement]:
    view = scene.view()
    for name, node in view.nodes.items():
        if refuse(request, node, view) is not None:
            continue
        matching = [i for i, gpu in enumerate(node.gpus) if matches_gpu(request, gpu.gpu)]
        for chosen in combinations(matching, request.gpus):
            yield placed(view, request, name, chosen)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.data())
def test_a_board_shows_what_the_fleet_becomes(seed: int, data: st.DataObject) -> None:
    scene = make_scene(seed, 3, 3)
    held = sorted(a.id for a in scene.fleet.allocations.values() if a.state == "granted")
    for name in sorted(scene.fleet.nodes):
        scene.obey(name)
        run_processes(scene, name)
    board = Board(scene.view())
    taken = data.draw(st.sets(st.sampled_from(held))) if held else set[str]()
    for id_ in sorted(taken):
        board.take(id_)
        end(scene, scene.fleet.allocations[id_])
    for name in sorted(scene.fleet.nodes):
        scene.obey(name)
        run_processes(scene, name)
    view = scene.view()
    wished = make_request(Random(seed), gpus_max=3, is_plain=True)
    plan = find_place(wished, view)
    if plan is not None:
        new = Allocation("new", AllocationState.GRANTED, wished, scene.now, 0)
        board.put(new, plan.placements)
        granted = e.AllocationGranted(scene.now, "new", wished, "", scene.now, plan.placements)
        scene.record(granted)
        view = scene.view()
    assert {n: seen(board.view.nodes[n]) for n in view.nodes} == {
        n: seen(view.nodes[n]) for n in view.nodes
    }


def run_processes(scene: Scene, name: str) -> None:
    """Whoever holds something on the node has a process there."""
    view = scene.view()
    processes = tuple(
        make_process(device.uuid, allocation_id=id_, memory_used_bytes=1)
        for id_ in sorted(scene.journals[name])
        for device in view.allocations[id_].devices_on(name)
    )
    scene.frame(name, processes=ProcessTable(scene.now, processes))


def seen(node: NodeView) -> object:
    """What placement goes by."""
    return (
        *(node.gpus, node.cpu_free_milli, node.host_memory_free_bytes, dict(node.services)),
        *(node.free_gpus, dict(node.free_by_model), node.room_bytes_max),
    )
