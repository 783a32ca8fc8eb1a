"""Verdicts that flap, and a fleet that is judged ill as a whole: neither may wear out the rest."""

from dataclasses import replace

from tests.unit.aggregator.builders import Scene, make_facts, make_health

from stoker.aggregator.conditions import COUNTED_SECONDS
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import next_due
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.upkeep import REVIEWED_AT_ONCE, SPACED_SECONDS_PER_GPU
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.wishes import Uncordon

CHANGES_MAX = CordonPolicy().changes_per_hour_max
XID = make_health("n1-0")


def noted(scene: Scene) -> Verdict:
    return scene.fleet.conditions.table["n1-0"].verdict


def flap(scene: Scene, times: int) -> None:
    """The GPU is ill and well again, so often; each time it is another fault."""
    for number in range(times):
        scene.later(1.0)
        scene.judge("n1", replace(XID, since=scene.now))
        scene.later(1.0)
        if number < times - 1:
            scene.judge("n1")


def test_gpu_that_flaps_stays_ill_and_does_not_fill_the_ledger() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1")
    begun = scene.now
    before = len(scene.log)
    flap(scene, 1000)
    scene.judge("n1")
    told = [type(event).__name__ for event in scene.log[before:]]
    assert told.count("GpuHealthChanged") <= CHANGES_MAX
    assert len(told) <= 2 * CHANGES_MAX
    assert noted(scene) is Verdict.UNHEALTHY
    assert scene.cordons() != {}
    # Once the hour is over, what its agent has said last is noted, though nothing more is told.
    assert next_due(scene.fleet, scene.watch) == begun + COUNTED_SECONDS
    scene.later(COUNTED_SECONDS)
    scene.decide()
    assert noted(scene) is Verdict.HEALTHY
    scene.later(60.0)
    scene.decide()
    assert scene.cordons() == {}
    scene.decide()
    assert next_due(scene.fleet, scene.watch) is None


def test_gpu_that_flaps_becomes_worse_at_once() -> None:
    scene = Scene(make_facts(gpus=1))
    for _ in range(CHANGES_MAX):
        scene.judge("n1", make_health("n1-0", Verdict.DEGRADED))
        scene.judge("n1")
    assert scene.cordons() == {}
    scene.judge("n1", XID)
    assert scene.cordons() == {"n1-0": XID.reason}


def test_restart_counts_the_changes_of_a_gpu_that_flaps_as_before() -> None:
    scene = Scene(make_facts(gpus=1))
    flap(scene, 100)
    for fleet in (scene.replayed(), Fleet.restored(scene.fleet.snapshot())):
        assert fleet.conditions.table == scene.fleet.conditions.table


def test_what_flaps_is_not_waited_for_when_its_node_is_gone() -> None:
    scene = Scene(make_facts(gpus=1))
    flap(scene, 100)
    scene.judge("n1")
    scene.disconnect("n1")
    scene.now += COUNTED_SECONDS
    scene.decide()
    scene.decide()
    assert next_due(scene.fleet, scene.watch) is None
    assert noted(scene) is Verdict.UNHEALTHY


def test_cordons_of_a_fleet_that_is_judged_ill_as_a_whole_are_looked_at_less_often() -> None:
    nodes = [make_facts(f"n{number}", gpus=64) for number in range(20)]
    scene = Scene(*nodes)
    for facts in nodes:
        scene.frame(facts.name, health=tuple(make_health(gpu.uuid) for gpu in facts.gpus))
    scene.decide()
    assert len(scene.cordons()) == 256, "a fifth, at once"
    spacing = (1280 - REVIEWED_AT_ONCE) * SPACED_SECONDS_PER_GPU
    assert next_due(scene.fleet, scene.watch) == scene.now + spacing
    scene.decide(Uncordon("n0", "n0-0"))
    scene.decide()
    assert len(scene.cordons()) == 255
    scene.later(spacing + 0.001)
    scene.decide()
    assert len(scene.cordons()) == 256
    scene.decide(Uncordon("n0", "n0-1"))
    scene.now -= 3600.0  # somebody set the clock back
    scene.decide()
    assert len(scene.cordons()) == 256
