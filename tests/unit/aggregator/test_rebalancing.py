"""Which moves are planned, by example: what waits, what is hot, what is in fragments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import GIB, Scene, make_facts, make_gpus, share, whole
from tests.unit.aggregator.moving import end, hold, mover, plan, sharer, warm, where, wish_before

from stoker.aggregator.events import NodeCordoned
from stoker.aggregator.model import Allocation, AllocationState, MigDevice, NodeFacts, Plan, Request
from stoker.aggregator.moves import Move, MovePolicy
from stoker.aggregator.processes import Process, ProcessTable
from stoker.aggregator.rebalancing import confirmed
from stoker.aggregator.wishes import Cordon, MoveOver, Refused, Settled, Unknown

# --- room for what waits


def test_a_holder_leaves_so_that_a_waiting_request_has_its_node() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    one = hold(scene, mover(), "n1", 2)
    hold(scene, whole(2), "n2", 0, 1)
    scene.wait(whole(4))
    found = plan(scene)
    assert where(found) == {one.id: [("n2", (2,))]}
    (move,) = found.moves
    assert (move.kind, move.cost_milli, move.gain_milli) == ("defragment", 1000, 4000)
    assert move.reason == "makes room on node n1 for 4 x GPU, which ann waits for"
    assert found.summary == (
        "1 move: 4 GPUs' worth become usable, for 1 GPUs' worth carried over; "
        "then there is room for 4 x GPU"
    )


def test_several_holders_leave_and_share_the_gain_by_what_they_carry() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    two, one = hold(scene, mover(2), "n1", 0, 1), hold(scene, mover(), "n1", 3)
    hold(scene, whole(), "n2", 0)
    scene.wait(whole(4))
    found = plan(scene)
    assert where(found) == {two.id: [("n2", (1, 2))], one.id: [("n2", (3,))]}
    assert [move.gain_milli for move in found.moves] == [2666, 1334]
    assert [move.reason[-13:] for move in found.moves] == ["(move 1 of 2)", "(move 2 of 2)"]


def test_no_more_moves_than_the_budget_has() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    hold(scene, mover(), "n1", 0)
    hold(scene, mover(), "n1", 3)
    hold(scene, whole(2), "n2", 0, 1)
    scene.wait(whole(4))
    assert len(plan(scene, moves_max=2).moves) == 2
    assert plan(scene, moves_max=1).moves == ()  # one of the two alone is of no use


def test_the_cheapest_node_is_emptied() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4), make_facts("n3", 4))
    hold(scene, mover(2), "n1", 0, 1)
    cheap = hold(scene, sharer(20), "n2", 1)
    hold(scene, whole(2), "n3", 0, 1)
    scene.wait(whole(4))
    assert where(plan(scene)) == {cheap.id: [("n1", (2,))]}


def test_only_what_is_in_the_way_leaves() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 1))
    hold(scene, mover(), "n1", 0)
    small = hold(scene, sharer(10), "n1", 1)
    scene.wait(whole(1, node="n1"))
    found = plan(scene)
    assert where(found) == {small.id: [("n2", (0,))]}
    assert found.moves[0].reason.startswith("makes room on node n1")


def test_what_would_have_to_carry_too_much_stays() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    hold(scene, mover(2), "n1", 0, 1)
    scene.wait(share(70, node="n1"))
    assert plan(scene).moves == ()
    cheap = MovePolicy(defragment_gain_min=0.1)
    assert len(plan(scene, policy=cheap).moves) == 1


NOBODY_MOVES: dict[str, Callable[[Scene], object]] = {
    "who is not movable": lambda scene: hold(scene, whole(), "n1", 2),
    "who asked for this node": lambda scene: hold(scene, mover(node="n1"), "n1", 2),
    "who asked for its pool": lambda scene: hold(scene, mover(pool="p"), "n1", 2),
    "whose like is on the other node": lambda scene: hold(
        scene, mover(service="s", anti_affinity="node"), "n1", 2
    ),
    "whose preferred GPU it is": lambda scene: hold(
        scene, mover(preferred_gpu_uuid="n1-2"), "n1", 2
    ),
    "who is being released": lambda scene: scene.release(hold(scene, mover(), "n1", 2).id),
}


@pytest.mark.parametrize("name", NOBODY_MOVES)
def test_nobody_moves(name: str) -> None:
    scene = Scene(make_facts("n1", 4, pool="p"), make_facts("n2", 4))
    hold(scene, whole(2, service="s"), "n2", 0, 1)
    NOBODY_MOVES[name](scene)
    scene.wait(whole(4))
    found = plan(scene)
    assert found.moves == ()
    assert found.summary.startswith("nothing to move: ")


def test_who_was_asked_before_is_left_alone() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    one, other = hold(scene, mover(), "n1", 2), hold(scene, mover(), "n2", 1)
    scene.wait(whole(4))
    (first,) = where(plan(scene))
    left = one if first == other.id else other
    assert where(plan(scene, skip=[first])).keys() == {left.id}
    assert plan(scene, skip=[one.id, other.id]).moves == ()


def test_what_goes_first_is_helped_first() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    hold(scene, mover(), "n1", 0)
    hold(scene, mover(), "n2", 0)
    scene.wait(whole(4, holder="late"))
    scene.wait(whole(4, holder="urgent", priority=5))
    found = plan(scene)
    assert len(found.moves) == 1  # then there is room for nobody else
    assert "which urgent waits for" in found.moves[0].reason


def test_what_is_behind_gets_nothing_that_is_kept() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    hold(scene, whole(), "n1", 0)
    hold(scene, whole(), "n2", 0)
    hold(scene, mover(), "n2", 1)
    scene.wait(whole(4))  # cannot be helped, and keeps both nodes
    scene.wait(whole(3))
    assert plan(scene).moves == ()


def test_nothing_moves_to_a_node_that_is_kept_for_another() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4), make_facts("n3", 1))
    hold(scene, mover(), "n1", 0)
    hold(scene, whole(2), "n2", 0, 1)
    hold(scene, share(1), "n3", 0)
    scene.wait(whole(4, node="n2"))  # nothing helps it, and n2 is kept for it
    scene.wait(whole(4, node="n1"))
    assert plan(scene).moves == ()
    wish_before(scene, whole(4), times=50)  # nor does anything go there to mend fragments
    assert plan(scene).moves == ()


def test_a_gang_gets_its_nodes() -> None:
    scene = Scene(*(make_facts(f"n{i}", 2) for i in range(4)))
    for node in ("n0", "n1"):
        hold(scene, mover(), node, 0)
    hold(scene, whole(), "n2", 0)
    hold(scene, whole(), "n3", 0)
    scene.wait(whole(2, nodes=2))
    found = plan(scene)
    assert {to[0][0] for to in where(found).values()} == {"n2", "n3"}
    assert "makes room on nodes n0, n1 for 2 nodes with 2 x GPU each" in found.moves[0].reason


def test_a_gang_moves_whole() -> None:
    scene = Scene(make_facts("n0", 4), *(make_facts(f"n{i}", 2) for i in (1, 2, 3)))
    gang = hold(scene, mover(nodes=2), "n0", 1, more="n1")
    scene.wait(whole(4))
    ((id_, to),) = where(plan(scene)).items()
    assert id_ == gang.id
    assert len({node for node, _ in to} - {"n0"}) == 2


def test_a_mig_device_goes_to_another_card() -> None:
    scene = Scene(mig_facts("n1"), mig_facts("n2"))
    wish = whole(1, mig_profile="1g.10gb", node="n1")
    movable = scene.grant(whole(1, mig_profile="1g.10gb", movable=True))
    assert movable.node == "n1"
    scene.grant(wish)
    scene.wait(wish)
    assert plan(scene).moves == ()  # as much is carried as is gained
    found = plan(scene, policy=MovePolicy(defragment_gain_min=1.0))
    assert where(found) == {movable.id: [("n2", (0,))]}
    assert found.moves[0].to_placements[0].devices[0].mig_device_uuid == "MIG-n2-0"


def test_with_a_pool_nothing_else_is_touched() -> None:
    scene = Scene(*(make_facts(f"n{i}", 2, pool=f"p{i // 2}") for i in range(4)))
    hold(scene, mover(), "n0", 0)
    hold(scene, whole(), "n1", 0)
    inside = hold(scene, mover(), "n2", 0)
    hold(scene, whole(), "n3", 0)
    scene.wait(whole(2))
    assert where(plan(scene, pool="p1")) == {inside.id: [("n3", (1,))]}
    end(scene, inside)
    hold(scene, mover(), "n2", 0)
    hold(scene, whole(), "n3", 1)
    assert plan(scene, pool="p1").moves == ()  # only another pool has room


def mig_facts(name: str) -> NodeFacts:
    (gpu,) = make_gpus(name, 1)
    devices = tuple(MigDevice(f"MIG-{name}-{i}", "1g.10gb", 10 * GIB, i, 0) for i in range(2))
    return make_facts(name, (replace(gpu, mig_enabled=True, mig_devices=devices),))


# --- hot GPUs


def crowded(*gib: float, **fields: Any) -> tuple[Scene, list[Allocation]]:
    """Shares that are all on one GPU of two nodes with one each."""
    scene = Scene(make_facts("n1", 1), make_facts("n2", 1))
    return scene, [hold(scene, sharer(each, **fields), "n1", 0) for each in gib]


def test_a_hot_gpu_is_relieved_of_the_cheapest_that_cools_it() -> None:
    scene, (_, _, small) = crowded(40, 20, 16)
    warm(scene, {"n1-0": 1.0, "n2-0": 0.1})
    found = plan(scene)
    assert where(found) == {small.id: [("n2", (0,))]}
    (move,) = found.moves
    # 16 of 76 GiB promised, so that part of its work.
    assert (move.kind, move.cost_milli, move.gain_milli) == ("relieve", 200, 210)
    assert move.reason == (
        "GPU 0 of n1 is hot (100 % busy, 0 % of its memory in use); "
        "without it 79 % busy, 0 % of its memory in use"
    )
    assert found.summary == "1 move: 0.21 GPUs' worth cool down, for 0.2 GPUs' worth carried over"


# utilisation of the crowded GPU, of the other one -> moves
HEATS = {
    "hot beside a cold one": (0.95, 0.0, 1),
    "not hot enough": (0.89, 0.0, 0),
    "the other would not stay cool": (0.95, 0.4, 0),
    "both are hot": (1.0, 0.95, 0),
}


@pytest.mark.parametrize("name", HEATS)
def test_when_a_gpu_is_relieved(name: str) -> None:
    here, there, moves = HEATS[name]
    scene, _ = crowded(30, 30)
    warm(scene, {"n1-0": here, "n2-0": there})
    assert len(plan(scene).moves) == moves


def test_a_gpu_is_hot_by_its_memory_too() -> None:
    scene, (_, small) = crowded(40, 32)
    warm(scene, {}, {"n1-0": 0.95})
    process = Process("n1-0", 2, memory_used_bytes=32 * GIB, allocation_id=small.id)
    scene.frame("n1", processes=ProcessTable(scene.now, (process,)))
    found = plan(scene)
    assert where(found) == {small.id: [("n2", (0,))]}
    assert found.moves[0].gain_milli == 400


def test_what_a_process_holds_is_what_leaves_with_it() -> None:
    scene, (big, small) = crowded(40, 32)
    warm(scene, {}, {"n1-0": 0.95})
    processes = (
        Process("n1-0", 1, memory_used_bytes=74 * GIB, allocation_id=small.id),
        Process("n1-0", 2, memory_used_bytes=2 * GIB, allocation_id=big.id),
    )
    scene.frame("n1", processes=ProcessTable(scene.now, processes))
    assert plan(scene).moves == ()  # wherever that goes is hot, and the other one is not the cause


def test_a_share_that_has_come_just_now_counts_where_it_went() -> None:
    scene, _ = crowded(30, 30)
    warm(scene, {"n1-0": 1.0})
    hold(scene, share(40), "n2", 0)
    assert plan(scene).moves == ()


def test_one_alone_on_its_gpu_would_be_as_hot_elsewhere() -> None:
    scene, _ = crowded(60)
    warm(scene, {"n1-0": 1.0})
    assert plan(scene).moves == ()


def test_nothing_moves_by_samples_that_do_not_tell() -> None:
    scene, _ = crowded(30, 30)
    scene.later(1000.0)
    scene.now += 100.0  # nor do they come any more
    assert plan(scene).moves == ()


def test_what_was_relieved_stays_as_it_is() -> None:
    scene, (*_, small) = crowded(40, 20, 16)
    warm(scene, {"n1-0": 1.0, "n2-0": 0.2})
    (move,) = plan(scene).moves
    hold(scene, small.request, "n2", 0)
    end(scene, small)
    load = move.gain_milli / 1000
    warm(scene, {"n1-0": 1.0 - load, "n2-0": 0.2 + load})
    assert plan(scene).moves == ()


# --- fragments


def test_shares_are_joined_on_fewer_gpus() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    lone = hold(scene, sharer(10), "n1", 0)
    hold(scene, share(40), "n2", 0)
    wish_before(scene, whole(2), times=4)
    wish_before(scene, whole(1), times=4)
    found = plan(scene)
    assert where(found) == {lone.id: [("n2", (0,))]}
    (move,) = found.moves
    # Of ten wishes four were for two GPUs: 0 -> 2 of n1; four for one: 1 -> 2; two were for shares:
    # for 10 GiB it stays as it is, for 40 GiB what is left of n2's GPU is none of use any more.
    assert (move.kind, move.cost_milli) == ("defragment", 125)
    assert move.gain_milli == int((4 * 2000 + 4 * 1000 + 125 - 500) / 10)
    assert move.reason == (
        "n1 has 2 free GPUs instead of 1: 1.162 GPUs' worth more of use to the requests that the "
        "fleet has had"
    )


def test_shares_on_one_node_are_joined_too() -> None:
    scene = Scene(make_facts("n1", 2))
    first, second = hold(scene, sharer(10), "n1", 0), hold(scene, sharer(20), "n1", 1)
    wish_before(scene, whole(1), times=8)
    assert where(plan(scene)) == {first.id: [("n1", (1,))]}
    assert second.id not in where(plan(scene))


def test_two_that_free_a_node_only_together_go_together() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    for gpu in (0, 1):
        hold(scene, sharer(10), "n1", gpu)
        hold(scene, share(10), "n2", gpu)
    wish_before(scene, whole(2), times=20)
    found = plan(scene)
    assert {node for ((node, _),) in where(found).values()} == {"n2"}
    assert len(found.moves) == 2


def test_nothing_moves_for_requests_that_fit_as_it_is() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    hold(scene, mover(), "n1", 0)
    hold(scene, mover(), "n2", 0)
    wish_before(scene, whole(1), times=20)
    assert plan(scene).moves == ()


def test_nothing_goes_to_a_gpu_that_would_be_hot() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    hold(scene, sharer(10), "n1", 0)
    hold(scene, share(40), "n2", 0)
    wish_before(scene, whole(2), times=4)
    wish_before(scene, whole(1), times=4)
    warm(scene, {"n2-0": 0.85, "n2-1": 0.85, "n1-0": 0.2})
    assert plan(scene).moves == ()


def test_preferences_are_met_no_worse() -> None:
    def scene_of(request: Request) -> Scene:
        scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
        hold(scene, request, "n1", 0)
        hold(scene, share(40, service="s"), "n2", 0)
        wish_before(scene, whole(2), times=8)
        return scene

    assert len(plan(scene_of(sharer(10))).moves) == 1
    assert plan(scene_of(sharer(10, service="s", spread="node"))).moves == ()
    assert len(plan(scene_of(sharer(10, near_service="s"))).moves) == 1


def test_a_plan_says_by_which_requests_it_was_measured() -> None:
    scene = Scene(make_facts("n1", 2))
    wish_before(scene, whole(2), times=3)
    wish_before(scene, share(10, cpu_milli=100), times=2)
    wish_before(scene, share(10, holder="bob", priority=3), times=2)
    wish_before(scene, share(10), times=2)
    wish_before(scene, whole(1, mig_profile="1g.10gb"), times=9)
    kinds = plan(scene).kinds
    assert [(kind.request.described(), kind.count) for kind in kinds] == [
        ("10 GiB of one GPU", 4),
        ("2 x GPU", 3),
        ("10 GiB of one GPU", 2),
    ]


# --- what the holder agreed to, when it did


def agreed(scene: Scene, move: Move, kept: tuple[str, ...] = ()) -> Plan | str:
    found = plan(scene)
    return confirmed(move, scene.view(), found.kinds, scene.fleet.tenants, kept)


def one_move() -> tuple[Scene, Move]:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4), make_facts("n3", 4))
    hold(scene, mover(), "n1", 2)
    hold(scene, whole(2), "n2", 0, 1)
    hold(scene, whole(2), "n3", 0, 1)
    scene.wait(whole(4))
    (move,) = plan(scene).moves
    return scene, move


def test_the_place_that_was_offered_is_taken_while_it_is_free() -> None:
    scene, move = one_move()
    assert agreed(scene, move) == Plan(move.to_placements)


def test_another_place_that_keeps_the_gain_is_as_good() -> None:
    scene, move = one_move()
    (to,) = move.to_placements
    hold(scene, whole(2), to.node, 2, 3)
    found = agreed(scene, move)
    assert isinstance(found, Plan)
    assert {found.node, to.node} == {"n2", "n3"}


def test_a_move_is_off_when_the_gain_would_be_lost() -> None:
    scene, move = one_move()
    hold(scene, whole(2), "n2", 2, 3)
    hold(scene, whole(2), "n3", 2, 3)
    found = agreed(scene, move)  # there is room on its own node, where it is in the way
    assert found == (
        f"the place that was offered to {move.allocation_id} is taken, and no other is worth a move"
    )


def test_a_move_is_off_when_its_allocation_is_given_up() -> None:
    scene, move = one_move()
    scene.release(move.allocation_id)
    assert agreed(scene, move) == f"allocation {move.allocation_id} is no longer granted"


def test_a_move_is_off_when_its_node_is_cordoned() -> None:
    scene, move = one_move()
    scene.decide(*(Cordon(node, "for a test") for node in ("n2", "n3")))
    assert "no other is worth a move" in str(agreed(scene, move))


def test_a_move_is_off_when_its_place_is_kept_by_now() -> None:
    scene, move = one_move()
    (to,) = move.to_placements
    found = agreed(scene, move, kept=(to.node,))
    assert isinstance(found, Plan)
    assert found.node not in (to.node, "n1")
    assert "no other is worth a move" in str(agreed(scene, move, kept=("n2", "n3")))


# --- as a wish


def test_a_move_is_granted_once_as_an_allocation_of_its_own() -> None:
    scene, move = one_move()
    wish = MoveOver(move, plan(scene).kinds, "move/1")
    (reply,) = scene.decide(wish)
    assert isinstance(reply, Settled)
    new = scene.fleet.allocations[reply.id]
    old = scene.fleet.allocations[move.allocation_id]
    assert (new.request, new.placements) == (old.request, move.to_placements)
    assert (new.state, old.state) == (AllocationState.GRANTED, AllocationState.GRANTED)
    assert scene.decide(wish, wish) == [reply, reply]
    scene.release(old.id)
    assert scene.decide(wish) == [reply]  # also when its answer comes this late


def test_a_move_that_came_to_nothing_is_refused() -> None:
    scene, move = one_move()
    wish = MoveOver(move, plan(scene).kinds, "move/1")
    before = len(scene.log)
    (unknown,) = scene.decide(replace(wish, move=replace(move, allocation_id="b")))
    assert unknown == Unknown("allocation b")
    scene.decide(*(Cordon(node, "for a test") for node in ("n2", "n3")))
    (refused,) = scene.decide(wish)
    assert isinstance(refused, Refused)
    assert "no other is worth a move" in refused.refusals.summary
    assert all(isinstance(event, NodeCordoned) for event in scene.log[before:])


def test_those_that_wait_ahead_of_the_one_for_whom_room_is_made_keep_their_nodes() -> None:
    scene, move = one_move()
    wish = MoveOver(move, plan(scene).kinds, "move/1")
    scene.wait(whole(4, priority=5))  # came after the offer, and goes first
    (refused,) = scene.decide(wish)
    assert isinstance(refused, Refused)
