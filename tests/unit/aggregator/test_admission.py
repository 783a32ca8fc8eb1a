"""A plan made on an older view is admitted only if all of it still holds."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    Scene,
    make_facts,
    make_gpus,
    make_process,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.model import Device, DriverState, Placement, Plan, Request
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.wishes import Cordon

ANY = whole(1)  # what it asks of the hosts is nothing


def planned(scene: Scene, request: Request) -> Plan:
    plan = find_place(request, scene.view())
    assert plan is not None
    return plan


def test_plan_that_still_holds_is_admitted() -> None:
    scene = Scene(make_facts(gpus=2))
    plan = planned(scene, whole(2))
    scene.later(1.0)
    assert objection(plan, ANY, scene.view()) == ""


def cordon(scene: Scene) -> None:
    scene.record(e.NodeCordoned(scene.now, "n1", "repair"))


def disconnect(scene: Scene) -> None:
    scene.disconnect("n1")


def block_driver(scene: Scene) -> None:
    scene.frame("n1", driver=DriverState.BLOCKED, driver_reason="no answer")


def wait(scene: Scene) -> None:
    scene.now += 3.5


def take_one(scene: Scene) -> None:
    scene.grant(whole(1))


def use_one(scene: Scene) -> None:
    scene.frame("n1", processes=ProcessTable(scene.now, (make_process("n1-1"),)))


def cordon_one(scene: Scene) -> None:
    scene.decide(Cordon("n1", "Xid 79", "n1-1"))


def remove_one(scene: Scene) -> None:
    scene.change_facts("n1", gpus=make_gpus("n1", 1))


@pytest.mark.parametrize(
    ("meanwhile", "why_not"),
    [
        (cordon, "node n1 is cordoned: repair"),
        (disconnect, "node n1: disconnected: the stream broke"),
        (block_driver, "node n1: driver blocked: no answer"),
        (wait, "node n1: its newest sample is stale"),
        (take_one, "GPU n1-0 on node n1 is no longer free"),
        (use_one, "GPU n1-1 on node n1 is no longer free"),
        (cordon_one, "GPU n1-1 on node n1 is cordoned: Xid 79"),
        (remove_one, "GPU n1-1 is no longer on node n1"),
    ],
)
def test_whole_plan_is_refused(meanwhile: Callable[[Scene], None], why_not: str) -> None:
    scene = Scene(make_facts(gpus=2))
    plan = planned(scene, whole(2))
    meanwhile(scene)
    assert objection(plan, ANY, scene.view()) == why_not


def test_share_is_refused_when_less_room_is_left() -> None:
    scene = Scene(make_facts(gpus=1))
    plan = planned(scene, share(60))
    scene.grant(share(30))
    assert objection(plan, ANY, scene.view()) == (
        f"GPU n1-0 on node n1: wanted {60 * GIB} bytes, {50 * GIB} are left"
    )
    assert objection(planned(scene, share(50)), ANY, scene.view()) == ""


def test_plan_for_a_node_that_is_not_there_is_refused() -> None:
    plan = Plan((Placement("n9", (Device("n9-0", "H100", 0, GIB, exclusive=True),)),))
    assert objection(plan, ANY, Scene(make_facts()).view()) == "node n9 is gone"


def test_plan_is_refused_where_the_host_has_no_cpu_or_memory_left() -> None:
    facts = replace(make_facts(gpus=2), cpu_milli=4000, host_memory_bytes=10 * GIB)
    scene = Scene(facts)
    wants_cpu, wants_memory = whole(1, cpu_milli=3000), whole(1, host_memory_bytes=8 * GIB)
    plan = planned(scene, wants_cpu)
    assert objection(plan, wants_cpu, scene.view()) == ""
    scene.grant(whole(1, cpu_milli=2000, host_memory_bytes=4 * GIB))
    assert objection(plan, wants_cpu, scene.view()) == (
        "node n1: wanted 3000 milli of CPU, found 2000"
    )
    assert objection(plan, wants_memory, scene.view()) == (
        f"node n1: wanted {8 * GIB} bytes of its memory, found {6 * GIB}"
    )
