"""What the fleet notices: lemons from the ledger, stragglers from the samples of gangs."""

from collections.abc import Iterable
from dataclasses import replace

from tests.unit.aggregator.builders import START, Scene, make_facts, make_gpus, make_health, whole

from stoker.aggregator.findings import Finding, Findings, gangs
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.lemons import LemonPolicy
from stoker.aggregator.model import GpuSample, NodeFacts
from stoker.aggregator.stragglers import Gang, Signal, Straggler, Stragglers

DAY = 86_400.0


def facts(name: str, count: int = 8) -> NodeFacts:
    gpus = make_gpus(name, count)
    return make_facts(name, tuple(replace(gpu, pci_bus_id=f"slot {gpu.index}") for gpu in gpus))


def fail_often(scene: Scene, node: str = "n1", uuid: str = "n1-0", times: int = 6) -> None:
    for number in range(times):
        scene.judge(node, make_health(uuid, since=float(number)))
        scene.later(DAY)
        scene.judge(node)
        scene.later(DAY)


def test_gpu_that_keeps_failing_is_a_lemon_also_after_a_restart() -> None:
    scene = Scene(*(facts(f"n{i}") for i in range(1, 9)))
    fail_often(scene)
    (found,) = Findings().found(scene.fleet, scene.now)
    assert (found.kind, found.node, found.uuid, found.slot) == ("lemon_gpu", "n1", "n1-0", "slot 0")
    assert found.since == START
    assert "6 failures" in found.reason
    for fleet in (scene.replayed(), Fleet.restored(scene.fleet.snapshot())):
        assert Findings().found(fleet, scene.now) == (found,)


def test_fleet_in_which_nothing_fails_is_silent() -> None:
    scene = Scene(facts("n1"), facts("n2"))
    scene.judge("n1")
    assert Findings().found(scene.fleet, scene.now) == ()


def test_lemon_is_one_no_more_when_its_failures_are_old() -> None:
    scene = Scene(*(facts(f"n{i}") for i in range(1, 9)))
    fail_often(scene)
    findings = Findings(LemonPolicy(window_seconds=30 * DAY))
    assert len(findings.found(scene.fleet, scene.now)) == 1
    assert findings.found(scene.fleet, scene.now + 30 * DAY) == ()


# --- stragglers


class Notebook(Stragglers):
    """Writes down what it is shown, and finds what it is told."""

    def __init__(self, *stragglers: Straggler) -> None:
        super().__init__()
        self.shown: list[tuple[float, list[Gang]]] = []
        self._told = stragglers

    def observe(self, now: float, gangs: Iterable[Gang]) -> None:
        self.shown.append((now, list(gangs)))

    def found(self) -> tuple[Straggler, ...]:
        return self._told


def make_hot_samples(scene: Scene, node: str, at: float) -> dict[str, GpuSample]:
    return {
        gpu.uuid: GpuSample(sm_clock_hertz=10**9 + gpu.index, power_watts=700.0, at=at)
        for gpu in scene.gpus_of(node)
    }


def test_gangs_are_whole_gpus_of_one_model_with_their_fresh_samples() -> None:
    scene = Scene(facts("n1"), facts("n2"))
    small = scene.grant(whole(2, node="n2"))
    gang = scene.grant(whole(3, node="n1"))
    waiting = scene.wait(whole(8))
    samples = make_hot_samples(scene, "n1", scene.now)
    stale = gang.devices[1].uuid
    samples[stale] = replace_at(samples[stale], scene.now - 3.5)
    scene.frame("n1", samples=samples)
    (shown,) = gangs(scene.fleet, scene.now)
    assert (shown.allocation_id, shown.model) == (gang.id, gang.devices[0].model)
    assert [(m.node, m.index, m.sm_clock_hertz) for m in shown.members] == [
        ("n1", device.index, 10**9 + device.index)
        for device in gang.devices
        if device.uuid != stale
    ]
    assert {small.id, waiting.id}.isdisjoint({shown.allocation_id})
    scene.release(gang.id)
    assert list(gangs(scene.fleet, scene.now)) == []


def replace_at(sample: GpuSample, at: float) -> GpuSample:
    return GpuSample(sm_clock_hertz=sample.sm_clock_hertz, at=at)


def test_straggler_is_told_with_its_slot_and_its_allocation() -> None:
    scene = Scene(facts("n1"))
    gang = scene.grant(whole(4))
    straggler = Straggler(gang.id, "n1", "n1-2", START, Signal.SM_CLOCK, "it is slow")
    notebook = Notebook(straggler)
    findings = Findings(stragglers=notebook)
    scene.frame("n1", samples=make_hot_samples(scene, "n1", scene.now))
    findings.observe(scene.fleet, scene.now)
    ((now, (shown,)),) = notebook.shown
    assert (now, shown.allocation_id, len(shown.members)) == (scene.now, gang.id, 4)
    assert findings.found(scene.fleet, scene.now) == (
        Finding("straggler", "n1", "n1-2", "slot 2", "it is slow", START, gang.id),
    )
