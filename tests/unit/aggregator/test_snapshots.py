"""What is tried on a draft stays there; what was stored comes back from events and snapshots."""

import pytest
from tests.unit.aggregator.builders import (
    START,
    Scene,
    durable_tables,
    make_facts,
    make_health,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import (
    Request,
)
from stoker.aggregator.wishes import Drain

# --- drafts


def busy_scene() -> Scene:
    """Two nodes with everything: granted, releasing, ended, waiting, attached, detached."""
    scene = Scene(make_facts("n1", 2), make_facts("n2", 2))
    scene.grant(whole(2, node="n1"), key="k1")
    scene.grant(share(20, node="n2"), key="k2")
    third = scene.grant(share(20, node="n2"))
    ended = scene.grant(whole(node="n2"))
    for node in ("n1", "n2"):
        scene.obey(node)
    scene.hand_back(ended.id)
    scene.release(third.id)
    scene.wait(whole(2))
    gone = scene.wait(whole(2, priority=3), wait_seconds=60.0)
    scene.fleet.note(e.WaiterDetached(scene.now, gone.id))
    scene.record(e.NodeCordoned(scene.now, "n2", "repair", scene.now + 60.0))
    scene.judge("n1", make_health("n1-0"))
    scene.judge("n2", make_health("n2-0"))
    scene.decide(Drain("n2", "fans", "n2-1", 30.0))
    return scene


def all_tables(fleet: Fleet) -> dict[str, object]:
    volatile = ("statuses", "expires", "wait_until", "attached", "detached_since", "sent")
    return {
        **durable_tables(fleet),
        **{name: dict(getattr(fleet, name)) for name in volatile},
        "fresh_until": dict(fleet.fresh_until),
        "unreconciled": set(fleet.unreconciled),
        "versions": (fleet.capacity_version, fleet.hosts_version),
        "deadline": fleet.next_deadline(),
        "view": dict(fleet.view(START).nodes),
    }


EVERYTHING: tuple[e.DurableEvent, ...] = (
    e.NodeRegistered(START, make_facts("n1", 4)),
    e.NodeRegistered(START, make_facts("n3")),
    e.NodeUncordoned(START, "n2"),
    e.GpuHealthChanged(START, "n1", "n1-1", "0000:01", make_health("n1-1")),
    e.GpuCordoned(START, "n1", "n1-1", "xid", by_health=True, fault=("xid", 1.0)),
    e.GpuUncordoned(START, "n1", "n1-0", by_health=False, acknowledged=("xid", 1.0)),
    e.GpuForgotten(START, "n2", "n2-1"),
    e.NodeCordoned(START, "n1", "drain"),
    e.AllocationsForgotten(START, ("a4",)),
    e.AllocationReleasing(START, "a1", "released"),
    e.AllocationEnded(START, "a1", "released"),
    e.AllocationEnded(START, "a3", "released"),
    e.AllocationEnded(START, "a5", "cancelled"),
    e.AllocationRequested(START, "b1", whole(8), "k9", START + 60.0),
    e.AllocationAdopted(
        *(START, "b2", Request(1, "x", 9.0)),
        Scene(make_facts("n3")).grant(whole()).placements,
    ),
)


def test_what_is_tried_on_a_draft_does_not_show_below() -> None:
    scene = busy_scene()
    before = all_tables(scene.fleet)
    draft = scene.fleet.draft()
    assert all_tables(draft) | {"deadline": None} == before | {"deadline": None}
    for event in EVERYTHING:
        draft.apply(event, draft.version + 1)
        draft.view(START)
    assert all_tables(scene.fleet) == before
    tables = all_tables(draft)
    untouched = [name for name in before if tables[name] == before[name]]
    assert untouched == ["sent", "fresh_until"], "apply touched all that it may touch"


def test_what_was_tried_on_a_draft_does_the_same_below() -> None:
    scene = busy_scene()
    draft = scene.fleet.draft()
    for event in EVERYTHING:
        draft.apply(event, draft.version + 1)
    scene.record(*EVERYTHING)
    below, drafted = dict(durable_tables(scene.fleet)), dict(durable_tables(draft))
    for name in ("allocations", "nodes"):  # what was changed comes last in a draft
        del below[name], drafted[name]
    assert drafted == below
    assert dict(draft.allocations) == dict(scene.fleet.allocations)
    assert dict(draft.nodes) == dict(scene.fleet.nodes)


def test_draft_takes_no_reports() -> None:
    draft = Scene(make_facts()).fleet.draft()
    with pytest.raises(AssertionError, match="durable events only"):
        draft.note(e.KeptAlive(START, "a1"))


# --- snapshots and replay


def test_snapshot_brings_back_what_a_replay_does() -> None:
    scene = busy_scene()
    scene.record(*EVERYTHING)
    expected = durable_tables(scene.fleet)
    assert durable_tables(scene.replayed()) == expected
    assert durable_tables(Fleet.restored(scene.fleet.snapshot())) == expected


def test_snapshot_and_the_events_after_it_bring_back_everything() -> None:
    scene = busy_scene()
    snapshot, after = scene.fleet.snapshot(), len(scene.log)
    scene.record(*EVERYTHING)
    fleet = Fleet.restored(snapshot)
    for event in scene.log[after:]:
        fleet.apply(event, fleet.version + 1)
    assert durable_tables(fleet) == durable_tables(scene.fleet)


def test_ended_are_forgotten_in_the_order_in_which_they_ended() -> None:
    # Also where the clock was set back in between.
    scene = Scene(make_facts(gpus=2))
    first, second = scene.grant(whole()), scene.grant(whole())
    for node_holds in (second, first):
        scene.hand_back(node_holds.id)
        scene.now -= 60.0
        scene.sample()
    assert list(scene.fleet.ended) == [second.id, first.id]
    assert list(Fleet.restored(scene.fleet.snapshot()).ended) == [second.id, first.id]
