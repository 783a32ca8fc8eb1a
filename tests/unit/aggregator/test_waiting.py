"""Requests that wait, by story: served, given up, cancelled, and clients that come and go."""

from tests.unit.aggregator.builders import (
    START,
    Scene,
    make_facts,
    share,
    waiting_scene,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.decisions import WAITER_GRACE_SECONDS
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import AllocationState
from stoker.aggregator.wishes import (
    Queued,
)


def test_waiting_request_is_granted_under_its_own_id() -> None:
    scene, holder, waiting = waiting_scene()
    scene.later(20.0)
    scene.hand_back(holder)
    scene.decide(serve=True)
    mine = scene.fleet.allocations[waiting]
    assert mine.state is AllocationState.GRANTED
    assert (mine.requested_at, mine.granted_at) == (START, START + 20.0)
    assert mine.wait_until is None
    assert (scene.fleet.waiting, scene.fleet.attached) == ({}, {})


def test_wait_that_is_over_ends_with_the_reason() -> None:
    scene, holder, waiting = waiting_scene()
    scene.later(59.9)
    scene.decide(serve=True)
    assert scene.state(waiting) is AllocationState.WAITING
    scene.later(0.1)
    scene.decide(serve=True)
    ended = scene.fleet.allocations[waiting]
    assert ended.state is AllocationState.ENDED
    assert ended.reason == (
        "waited 1m in the queue: no node for 1 x GPU: n1: "
        f"wanted 1 x GPU free on one node, 0 of 1 are: allocated to {holder}"
    )


def test_many_waits_may_be_over_at_once() -> None:
    scene, _, _ = waiting_scene()
    for _ in range(3):
        scene.wait(whole(), wait_seconds=30.0)
    scene.wait(share(1), wait_seconds=30.0)
    scene.later(31.0)
    scene.decide()
    ended = [a.reason for a in scene.fleet.allocations.values() if a.state == "ended"]
    assert len(ended) == 4
    assert all(reason.startswith("waited 31s in the queue: no node for") for reason in ended)


def test_request_whose_client_is_gone_is_cancelled_after_a_grace() -> None:
    scene, _, waiting = waiting_scene()
    scene.fleet.note(e.WaiterDetached(scene.now, waiting))
    scene.later(WAITER_GRACE_SECONDS - 0.1)
    scene.decide()
    assert scene.state(waiting) is AllocationState.WAITING
    scene.later(0.1)
    scene.decide()
    assert scene.fleet.allocations[waiting].reason == "cancelled: its client went away"


def test_client_that_dials_again_keeps_its_place() -> None:
    scene, _, waiting = waiting_scene()
    scene.fleet.note(e.WaiterDetached(scene.now, waiting))
    scene.later(WAITER_GRACE_SECONDS - 1.0)
    scene.fleet.note(e.WaiterAttached(scene.now, waiting))
    scene.later(WAITER_GRACE_SECONDS)
    scene.decide()
    assert scene.state(waiting) is AllocationState.WAITING


def test_request_waits_while_one_of_two_clients_is_on_the_line() -> None:
    scene, _, waiting = waiting_scene()
    scene.fleet.note(e.WaiterAttached(scene.now, waiting))
    scene.fleet.note(e.WaiterDetached(scene.now, waiting))
    scene.later(WAITER_GRACE_SECONDS + 1.0)
    scene.decide()
    assert scene.state(waiting) is AllocationState.WAITING


def test_request_whose_client_never_came_on_the_line_is_cancelled() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.grant(whole(ttl_seconds=1e6))
    reply = scene.allocate(whole(), wait_seconds=3600.0)
    scene.later(WAITER_GRACE_SECONDS)
    scene.decide()
    assert reply == Queued("a2")
    assert scene.fleet.allocations["a2"].reason == "cancelled: its client went away"


def test_after_a_restart_clients_have_the_grace_to_come_back() -> None:
    scene, _, waiting = waiting_scene()
    scene.fleet = Fleet.restored(scene.fleet.snapshot())
    scene.now += 30.0
    scene.fleet.note(e.Recovered(scene.now))
    scene.now += WAITER_GRACE_SECONDS - 0.1
    scene.decide()
    assert scene.state(waiting) is AllocationState.WAITING
    scene.now += 0.1
    scene.decide()
    assert scene.state(waiting) is AllocationState.ENDED


def test_lines_of_what_no_longer_waits_leave_nothing_behind() -> None:
    scene, holder, waiting = waiting_scene()
    scene.hand_back(holder)
    scene.decide(serve=True)
    for event in (e.WaiterAttached, e.WaiterDetached, e.WaiterDetached):
        scene.fleet.note(event(scene.now, waiting))
    assert (scene.fleet.attached, scene.fleet.detached_since) == ({}, {})


def test_waiting_for_what_nobody_has_keeps_the_place() -> None:
    scene = Scene(make_facts(gpus=1))
    waiting = scene.wait(whole(2))
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.WAITING
    scene.join(make_facts("n2", 2))
    scene.decide(serve=True)
    assert scene.fleet.allocations[waiting.id].node == "n2"
