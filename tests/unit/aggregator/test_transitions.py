"""Every step of an allocation's life that the table has is taken, and every other is refused."""

from dataclasses import dataclass, replace

import pytest
from tests.unit.aggregator.builders import GIB, START, Scene, durable_tables, make_facts, whole

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.lives import InvalidTransition
from stoker.aggregator.model import TRANSITIONS, AllocationState, Device, Placement

DEVICES = (Device("n1-0", "H100", 0, 80 * GIB, exclusive=True),)

EVENTS: dict[str, e.DurableEvent] = {
    "AllocationRequested": e.AllocationRequested(START, "a", whole(), "key", START + 60.0),
    "AllocationGranted": e.AllocationGranted(
        START, "a", whole(), "key", START, (Placement("n1", DEVICES),)
    ),
    "AllocationAdopted": e.AllocationAdopted(START, "a", whole(), (Placement("n1", DEVICES),)),
    "AllocationReleasing": e.AllocationReleasing(START, "a", "released"),
    "AllocationEnded": e.AllocationEnded(START, "a", "released"),
    "AllocationsForgotten": e.AllocationsForgotten(START, ("a",)),
}
# How an allocation gets into each state.
PATHS: dict[AllocationState | None, tuple[str, ...]] = {
    None: (),
    AllocationState.WAITING: ("AllocationRequested",),
    AllocationState.GRANTED: ("AllocationGranted",),
    AllocationState.RELEASING: ("AllocationGranted", "AllocationReleasing"),
    AllocationState.ENDED: ("AllocationGranted", "AllocationReleasing", "AllocationEnded"),
}
# Forgetting is no step between two states, and only what has ended is forgotten.
ALLOWED = {
    (before, name): to
    for before, steps in TRANSITIONS.items()
    for to, names in steps.items()
    for name in names
} | {(AllocationState.ENDED, "AllocationsForgotten"): None}


def fleet_with(before: AllocationState | None) -> Fleet:
    scene = Scene(make_facts(gpus=1))
    scene.record(*(EVENTS[name] for name in PATHS[before]))
    return scene.fleet


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("before", PATHS, ids=str)
def test_event_does_what_the_table_says(before: AllocationState | None, name: str) -> None:
    fleet = fleet_with(before)
    tables = durable_tables(fleet)
    if (before, name) in ALLOWED:
        fleet.apply(EVENTS[name], fleet.version + 1)
        after = fleet.allocations.get("a")
        assert (after.state if after else None) == ALLOWED[before, name]
    else:
        with pytest.raises(InvalidTransition, match=name):
            fleet.apply(EVENTS[name], fleet.version + 1)
        assert durable_tables(fleet) == tables, "a refused event changes nothing"


def test_table_has_every_state_and_every_event_of_allocations() -> None:
    assert TRANSITIONS.keys() == {None, *AllocationState}
    named = {name for steps in TRANSITIONS.values() for names in steps.values() for name in names}
    known = {name for name in e.KINDS if name.startswith("Allocation")}
    assert named | {"AllocationsForgotten"} == known == EVENTS.keys()


def granted(id_: str, *devices: Device, node: str = "n1") -> e.AllocationGranted:
    return e.AllocationGranted(START, id_, whole(), "", START, (Placement(node, devices),))


def half_a_gang(id_: str, *devices: Device) -> e.AllocationGranted:
    return replace(granted(id_, *devices), request=whole(nodes=2))


WHOLE = Device("n1-0", "H100", 0, 80 * GIB, exclusive=True)
SHARE = Device("n1-0", "H100", 0, 20 * GIB, exclusive=False)
OTHER = Device("n1-1", "H100", 1, 80 * GIB, exclusive=True)


@dataclass(frozen=True)
class Impossible:
    what: str
    before: tuple[e.DurableEvent, ...]
    event: e.DurableEvent
    story: str


IMPOSSIBLE = (
    Impossible("whole after whole", (granted("a", WHOLE),), granted("b", WHOLE), "n1-0 is taken"),
    Impossible("whole after share", (granted("a", SHARE),), granted("b", WHOLE), "n1-0 is taken"),
    Impossible("share after whole", (granted("a", WHOLE),), granted("b", SHARE), "n1-0 is taken"),
    Impossible(
        "a gang of which one is taken",
        (granted("a", WHOLE),),
        granted("b", OTHER, WHOLE),
        "n1-0 is taken",
    ),
    Impossible("one device twice", (), granted("a", SHARE, SHARE), "a device twice"),
    Impossible("no device", (), granted("a"), "fewer devices than asked for"),
    Impossible("half a gang", (), half_a_gang("a", WHOLE), "a gang of 2 nodes on 1"),
    Impossible("no such node", (), granted("a", WHOLE, node="n9"), "there is no node n9"),
    Impossible("cordon of no node", (), e.NodeCordoned(START, "n9", "x"), "there is no node n9"),
    Impossible("uncordon of no node", (), e.NodeUncordoned(START, "n9"), "there is no node n9"),
    Impossible(
        "whole while its tenant is leaving",
        (granted("a", WHOLE), e.AllocationReleasing(START, "a", "released")),
        granted("b", WHOLE),
        "n1-0 is taken",
    ),
    Impossible(
        "forgetting one that is granted beside one that ended",
        (
            granted("a", WHOLE),
            e.AllocationReleasing(START, "a", "released"),
            e.AllocationEnded(START, "a", "released"),
            granted("b", OTHER),
        ),
        e.AllocationsForgotten(START, ("a", "b")),
        "b has not ended",
    ),
)


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=lambda case: case.what)
def test_impossible_event_is_refused_and_changes_nothing(case: Impossible) -> None:
    scene = Scene(make_facts(gpus=2))
    scene.record(*case.before)
    tables = durable_tables(scene.fleet)
    with pytest.raises(InvalidTransition, match=case.story):
        scene.fleet.apply(case.event, scene.fleet.version + 1)
    assert durable_tables(scene.fleet) == tables
    scene.record(e.NodeCordoned(START, "n1", "the version was not used up"))


def test_versions_rise() -> None:
    fleet = Scene(make_facts()).fleet
    with pytest.raises(AssertionError, match="after 1"):
        fleet.apply(e.NodeCordoned(START, "n1", "x"), fleet.version)


def test_volatile_events_leave_durable_tables_alone() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.grant(whole())
    tables = durable_tables(scene.fleet)
    scene.later(1.0)
    scene.send_commands("n1")
    scene.disconnect("n1")
    scene.connect("n1")
    assert durable_tables(scene.fleet) == tables
