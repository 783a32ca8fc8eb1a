"""Rounds by story: allocate, wait, serve, keep alive, expire, release, cordon, forget."""

from collections.abc import Callable

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    START,
    Scene,
    durable_tables,
    make_facts,
    share,
    waiting_scene,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.decisions import (
    FORGOTTEN_AT_ONCE,
    FORGOTTEN_LATE_SECONDS,
    REMEMBERED_MAX,
    REMEMBERED_SECONDS,
    WAITER_GRACE_SECONDS,
    Round,
    consider,
    next_due,
)
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import AllocationState, Device, Placement, Plan, Refusals, Request
from stoker.aggregator.wishes import (
    Allocate,
    Cordon,
    KeyReused,
    Queued,
    Refused,
    Release,
    Settled,
    Uncordon,
    Unknown,
)

# --- allocate


def test_grant_names_the_node_and_its_devices() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(2, labels={"team": "x"}), key="k")
    assert mine.state is AllocationState.GRANTED
    assert (mine.node, [d.uuid for d in mine.devices]) == ("n1", ["n1-0", "n1-1"])
    assert (mine.requested_at, mine.granted_at, mine.version) == (START, START, 2)


def test_ninth_gpu_is_refused_with_a_reason_per_node() -> None:
    scene = Scene(make_facts("n1"), make_facts("n2"))
    scene.grant(whole(8, node="n1"))
    scene.grant(whole(8, node="n2"))
    reply = scene.allocate(whole())
    assert isinstance(reply, Refused)
    assert [(r.node, r.filter, r.wanted, r.found) for r in reply.refusals.nodes] == [
        ("n1", "gpus_free", "1", "0"),
        ("n2", "gpus_free", "1", "0"),
    ]
    assert reply.refusals.ahead == 0
    assert len(scene.fleet.allocations) == 2, "a refusal leaves nothing behind"


def test_wishes_of_one_round_see_what_those_before_were_given() -> None:
    scene = Scene(make_facts(gpus=2))
    replies = scene.decide(Allocate(whole()), Allocate(whole()), Allocate(whole()))
    assert [type(reply) for reply in replies] == [Settled, Settled, Refused]
    uuids = [d.uuid for a in scene.fleet.allocations.values() for d in a.devices]
    assert sorted(uuids) == ["n1-0", "n1-1"]


def test_newcomer_of_a_round_does_not_overtake_one_that_was_queued_in_it() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.grant(whole(1))
    replies = scene.decide(
        Allocate(whole(2)), Allocate(whole(2), wait_seconds=60.0), Allocate(whole(1))
    )
    assert [type(reply) for reply in replies] == [Refused, Queued, Refused]
    last = replies[-1]
    assert isinstance(last, Refused)
    assert (last.refusals.nodes[0].filter, last.refusals.ahead) == ("queue", 1)


def test_reasons_of_a_round_are_those_of_the_moment() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.grant(whole(1))
    before, _, after = scene.decide(Allocate(whole(2)), Allocate(whole()), Allocate(whole(2)))
    assert isinstance(before, Refused)
    assert isinstance(after, Refused)
    assert (before.refusals.nodes[0].found, after.refusals.nodes[0].found) == ("1", "0")


def test_release_in_a_round_does_not_free_the_devices_yet() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    replies = scene.decide(Release(mine.id), Allocate(whole()))
    assert [type(reply) for reply in replies] == [Settled, Refused]


def test_gang_is_granted_whole_or_not_at_all() -> None:
    scene = Scene(make_facts("n1", 3), make_facts("n2", 3))
    assert isinstance(scene.allocate(whole(4)), Refused)
    assert scene.fleet.claims == {}
    assert {d.uuid for d in scene.grant(whole(3)).devices} == {"n1-0", "n1-1", "n1-2"}


# --- idempotency keys


@pytest.mark.parametrize("state", ["granted", "releasing", "ended"])
def test_same_key_is_the_same_allocation(state: str) -> None:
    scene = Scene(make_facts())
    mine = scene.grant(whole(labels={"a": "1"}), key="k")
    if state == "releasing":
        scene.release(mine.id)
    elif state == "ended":
        scene.hand_back(mine.id)
    assert scene.state(mine.id) == state
    assert scene.allocate(whole(labels={"a": "1"}), key="k") == Settled(mine.id)
    assert len(scene.fleet.allocations) == 1


def test_same_key_in_one_round_is_granted_once() -> None:
    scene = Scene(make_facts())
    replies = scene.decide(Allocate(whole(), "k"), Allocate(whole(), "k"))
    assert replies == [Settled("a1"), Settled("a1")]


def test_same_key_of_one_that_waits_waits_on() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.grant(whole())
    first = scene.allocate(whole(), key="k", wait_seconds=60.0)
    assert scene.allocate(whole(), key="k", wait_seconds=9.0) == first == Queued("a2")
    assert scene.fleet.allocations["a2"].wait_until == START + 60.0


def test_key_of_another_request_is_refused() -> None:
    scene = Scene(make_facts())
    mine = scene.grant(whole(), key="k")
    assert scene.allocate(whole(2), key="k") == KeyReused(mine.id)
    assert len(scene.fleet.allocations) == 1


def test_key_of_a_refused_request_may_be_used_again() -> None:
    scene = Scene(make_facts(gpus=1))
    other = scene.grant(whole())
    assert isinstance(scene.allocate(whole(), key="k"), Refused)
    scene.hand_back(other.id)
    assert isinstance(scene.allocate(whole(), key="k"), Settled)


def test_without_a_key_every_call_is_a_wish_of_its_own() -> None:
    scene = Scene(make_facts())
    assert scene.allocate(whole()) != scene.allocate(whole())


def test_keys_survive_a_restart() -> None:
    scene = Scene(make_facts())
    mine = scene.grant(whole(), key="k")
    scene.fleet = Fleet.restored(scene.fleet.snapshot())
    scene.fleet.note(e.Recovered(scene.now))
    assert scene.allocate(whole(), key="k") == Settled(mine.id)


# --- leases


def test_lease_that_ran_out_is_given_up_and_handed_back() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=60.0))
    scene.obey("n1")
    scene.later(59.9)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.later(0.1)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert scene.fleet.allocations[mine.id].reason == "expired: no keep-alive for 1m"
    assert isinstance(scene.allocate(whole()), Refused), "its node still holds it"
    scene.obey("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.fleet.allocations[mine.id].reason == "expired: no keep-alive for 1m"
    assert isinstance(scene.allocate(whole()), Settled)


def test_lease_that_is_kept_alive_goes_on() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=60.0))
    for _ in range(10):
        scene.later(50.0)
        scene.fleet.note(e.KeptAlive(scene.now, mine.id))
        scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_lease_that_ran_out_and_was_released_in_the_same_round_is_given_up_once() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=60.0))
    scene.later(60.0)
    assert scene.decide(Release(mine.id)) == [Settled(mine.id)]
    assert [type(event).__name__ for event in scene.log].count("AllocationReleasing") == 1


def test_housekeeping_leaves_alone_what_its_round_has_settled_before() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole(ttl_seconds=60.0))
    waiting = scene.wait(whole(), wait_seconds=60.0)
    scene.later(60.0)
    one = Round(scene.fleet, scene.now, scene.new_id)
    for id_ in (mine.id, waiting.id):
        assert one.wish(Release(id_)) == Settled(id_)
    settled = list(one.events)
    one.housekeep({"n1"})
    one.housekeep({"n1"})
    assert [type(event).__name__ for event in settled] == ["AllocationReleasing", "AllocationEnded"]
    assert one.events == settled


def test_next_due_is_when_housekeeping_has_something_to_do() -> None:
    scene, holder, waiting = waiting_scene()
    assert next_due(scene.fleet) == START + 60.0
    scene.fleet.note(e.WaiterDetached(START + 5.0, waiting))
    assert next_due(scene.fleet) == START + 5.0 + WAITER_GRACE_SECONDS
    scene.release(waiting)
    assert next_due(scene.fleet) == START + 1e6
    scene.release(holder)
    assert next_due(scene.fleet) is None


# --- release


def test_release_is_confirmed_by_the_node_before_the_devices_are_free() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    assert scene.release(mine.id) == Settled(mine.id)
    for _ in range(2):
        scene.decide()
        assert scene.state(mine.id) is AllocationState.RELEASING
    assert isinstance(scene.allocate(whole()), Refused)
    (dropped,) = scene.obey("n1")
    assert (dropped.allocation_id, dropped.is_hold, dropped.reason) == (mine.id, False, "released")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.grant(whole()).node == "n1"


def test_release_while_the_hold_is_under_way_waits_for_the_drop() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.send_commands("n1")  # the node has not read it yet
    scene.release(mine.id)
    scene.frame("n1", held=())
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    scene.obey("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED


def test_release_of_what_the_node_was_never_told_waits_for_a_look_at_its_processes() -> None:
    # Its client has had the devices since the grant.
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.release(mine.id)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert [c.is_hold for c in scene.obey("n1")] == [False]
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.send_commands("n1") == ()


def test_release_on_a_node_that_is_cut_off_waits_for_it() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.disconnect("n1")
    scene.release(mine.id)
    scene.later(3600.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    scene.connect("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING, "its hello says that it holds it"
    scene.obey("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED


def test_release_on_a_node_that_lost_its_journal_is_confirmed_all_the_same() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.release(mine.id)
    scene.journals["n1"].clear()
    scene.connect("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert [c.is_hold for c in scene.obey("n1")] == [False]
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED


def test_granted_allocation_is_told_anew_to_a_node_that_lost_its_journal() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.journals["n1"].clear()
    scene.connect("n1")
    scene.decide()
    (told,) = scene.obey("n1")
    assert (told.allocation_id, told.is_hold) == (mine.id, True)
    assert scene.state(mine.id) is AllocationState.GRANTED


def test_hold_that_was_lost_with_its_stream_is_sent_on_the_next() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    assert [command.is_hold for command in scene.send_commands("n1")] == [True]
    scene.connect("n1")
    scene.decide()
    assert [command.allocation_id for command in scene.send_commands("n1")] == [mine.id]
    assert scene.send_commands("n1") == ()


def test_releasing_twice_equals_releasing_once() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.release(mine.id)
    tables = durable_tables(scene.fleet)
    assert scene.release(mine.id) == Settled(mine.id)
    assert durable_tables(scene.fleet) == tables
    scene.obey("n1")
    scene.decide()
    assert scene.release(mine.id) == Settled(mine.id)
    assert scene.state(mine.id) is AllocationState.ENDED


def test_release_of_what_waits_leaves_the_queue() -> None:
    scene, _, waiting = waiting_scene()
    assert scene.release(waiting) == Settled(waiting)
    assert scene.fleet.allocations[waiting].reason == "cancelled: released"
    assert scene.fleet.queue() == []


def test_release_of_what_is_not_known() -> None:
    assert Scene().release("a9") == Unknown("allocation a9")


def test_node_that_cannot_hold_it_ends_the_allocation() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.send_commands("n1")
    scene.refuse("n1", mine.id, "GPU n1-0 fell off the bus")
    scene.decide()
    reason = "refused by node n1: GPU n1-0 fell off the bus"
    assert scene.state(mine.id) is AllocationState.RELEASING
    scene.obey("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED
    assert scene.fleet.allocations[mine.id].reason == reason


# --- cordon


def test_cordoned_node_takes_nothing_new_and_keeps_what_it_has() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole())
    assert scene.decide(Cordon("n1", "Xid 79"), Allocate(whole()))[0] == Settled("n1")
    refused = scene.allocate(whole())
    assert isinstance(refused, Refused)
    assert refused.refusals.nodes[0].reason == "cordoned: Xid 79"
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.decide(Uncordon("n1"))
    assert isinstance(scene.allocate(whole()), Settled)


@pytest.mark.parametrize(
    ("wishes", "events"),
    [
        pytest.param([Cordon("n1", "x"), Cordon("n1", "x")], 1, id="cordoned twice"),
        pytest.param([Cordon("n1", "x"), Cordon("n1", "y")], 2, id="for another reason"),
        pytest.param([Uncordon("n1")], 0, id="not cordoned"),
        pytest.param([Cordon("n1", "x"), Uncordon("n1"), Uncordon("n1")], 2, id="uncordoned twice"),
    ],
)
def test_cordon_is_recorded_when_it_changes_something(
    wishes: list[Cordon | Uncordon], events: int
) -> None:
    scene = Scene(make_facts())
    recorded = len(scene.log)
    assert scene.decide(*wishes) == [Settled("n1")] * len(wishes)
    assert len(scene.log) - recorded == events


def test_cordon_of_what_is_not_known() -> None:
    assert Scene().decide(Cordon("n9", "x"), Uncordon("n9")) == [Unknown("node n9")] * 2


# --- forgetting


def with_ended(scene: Scene, count: int) -> None:
    """So many allocations that have ended now, with keys."""
    devices = (Device("n1-0", "H100", 0, 80 * GIB, exclusive=True),)
    for i in range(count):
        id_ = f"old{len(scene.fleet.ended)}-{i}"
        scene.record(
            e.AllocationGranted(
                scene.now, id_, whole(), id_, scene.now, (Placement("n1", devices),)
            ),
            e.AllocationReleasing(scene.now, id_, "released"),
            e.AllocationEnded(scene.now, id_, "released"),
        )


def test_ended_allocations_are_forgotten_when_they_are_too_old() -> None:
    scene = Scene(make_facts(gpus=1))
    with_ended(scene, 3)
    scene.now += FORGOTTEN_LATE_SECONDS
    with_ended(scene, 2)
    scene.now += REMEMBERED_SECONDS - 1.0
    scene.decide()
    assert len(scene.fleet.ended) == 5
    scene.now += 1.0
    scene.decide()
    assert len(scene.fleet.ended) == 0, "all that are too old go at once"
    assert (scene.fleet.allocations, scene.fleet.keys) == ({}, {})


def test_of_too_many_ended_allocations_the_oldest_are_forgotten() -> None:
    scene = Scene(make_facts(gpus=1))
    with_ended(scene, REMEMBERED_MAX + FORGOTTEN_AT_ONCE - 1)
    recorded = len(scene.log)
    scene.decide()
    assert len(scene.log) == recorded, "not for so few"
    oldest = list(scene.fleet.ended)[:FORGOTTEN_AT_ONCE]
    with_ended(scene, 1)
    scene.decide()
    assert len(scene.fleet.ended) == len(scene.fleet.allocations) == REMEMBERED_MAX
    assert not set(oldest) & scene.fleet.ended.keys()
    assert isinstance(scene.allocate(whole(), key=oldest[0]), Settled), "its key is free again"


# --- what would happen


def test_consider_says_where_a_newcomer_would_go_and_places_nothing() -> None:
    scene = Scene(make_facts(gpus=1))
    tables = durable_tables(scene.fleet)
    plan = consider(whole(), scene.fleet, scene.now)
    assert isinstance(plan, Plan)
    assert (plan.node, [d.uuid for d in plan.devices]) == ("n1", ["n1-0"])
    assert durable_tables(scene.fleet) == tables


def test_consider_says_why_a_waiting_request_waits() -> None:
    scene, holder, first = waiting_scene()
    second = scene.wait(whole()).id
    scene.hand_back(holder)
    assert isinstance(consider(whole(), scene.fleet, scene.now, until=first), Plan)
    answer = consider(whole(), scene.fleet, scene.now, until=second)
    assert isinstance(answer, Refusals)
    assert (answer.ahead, answer.nodes[0].found) == (1, first)


@pytest.mark.parametrize(
    "make",
    [lambda: whole(9), lambda: share(81), lambda: whole(pool="x"), lambda: whole(models=("T4",))],
)
def test_refused_requests_of_a_round_share_their_reasons(make: Callable[[], Request]) -> None:
    scene = Scene(make_facts())
    one, other, after = scene.decide(
        Allocate(make()), Allocate(make()), Allocate(whole(8)), Allocate(make())
    )[:2] + scene.decide(Allocate(make()))
    assert one == other == after
    assert isinstance(one, Refused)
