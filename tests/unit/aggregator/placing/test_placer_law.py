"""The placer, which is fast, decides as the filters say, and as one that starts anew would."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.builders import Scene, make_samples
from tests.unit.aggregator.placing.small_fleets import REQUESTS, TENANTS, Case, cases, nodes

from stoker.aggregator import events as e
from stoker.aggregator.admission import objection
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import Plan, Request
from stoker.aggregator.placing import gangs
from stoker.aggregator.placing.filters import refuse
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.parts import taken_values
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.policies import POLICIES, Policies
from stoker.aggregator.placing.shapes import shape_of
from stoker.aggregator.views import FleetView
from stoker.aggregator.wishes import Release

LAW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Draw = Callable[[st.SearchStrategy[Any]], Any]


def able(request: Request, view: FleetView, blocked: Sequence[str] = ()) -> list[str]:
    """The nodes that no filter refuses, looked at one by one."""
    taken = taken_values(request, view)
    return sorted(
        name
        for name, node in view.nodes.items()
        if name not in blocked and refuse(request, node, view, taken) is None
    )


def make_placer(policy: str = "fragmentation", **fields: Any) -> Placer:
    return Placer(Policies.named(policy), draw=lambda below: below // 2, **fields)


@LAW
@given(
    cases(),
    st.lists(REQUESTS, min_size=1, max_size=4),
    st.sampled_from(sorted(POLICIES)),
    st.sets(st.sampled_from(("n0", "n1"))),
)
def test_what_fits_is_what_no_filter_refuses(
    case: Case, requests: list[Request], policy: str, kept: set[str]
) -> None:
    view = case.scene.view()
    placer = make_placer(policy)
    blocked = dict.fromkeys(sorted(kept & set(view.nodes)), "a99")
    for request in requests:
        names = able(request, view, tuple(blocked))
        assert placer.feasible(request, view, blocked) == names
        plan = placer.find(request, view, blocked)
        if request.nodes > 1:
            expected = gangs.find(request, view, names)
            assert (plan is None) == (expected is None)
        else:
            assert (plan is not None) == bool(names)
        if plan is not None:
            assert {placement.node for placement in plan.placements} <= set(names)
            assert objection(plan, request, view) == ""


# --- what is kept is what would be found anew

# Of these no price depends on how full the fleet was when it was looked at last.
STEADY = ("fgd", "binpack", "spread", "energy", "bestfit", "dotprod", "clustering", "packing")
PLAIN_MIX = [
    Request(1, "ann", 60.0),
    Request(1, "ann", 60.0, compute_milli=500),
    Request(1, "ann", 60.0, compute_milli=300, cpu_milli=2000),
]


class World:
    """A scene in which things happen, and a placer that is kept all along."""

    def __init__(self, draw: Draw, policies: Policies) -> None:
        self.draw = draw
        count = draw(st.integers(1, 4))
        self.names = [f"n{i}" for i in range(count)]
        self.scene = Scene(*(draw(nodes(name)) for name in self.names))
        self.policies = policies
        self.kept = self.placer()
        self.granted: list[str] = []

    def placer(self) -> Placer:
        mix = Mix.of(shape_of(request) for request in PLAIN_MIX)
        return Placer(self.policies, mix, is_learning=False)

    def happen(self) -> None:
        """One thing of all that can happen."""
        name = self.draw(st.sampled_from(self.names))
        scene = self.scene
        match self.draw(st.sampled_from(("grant",) * 5 + EVENTS)):
            case "grant":
                request = replace(self.draw(TENANTS), ttl_seconds=1e6)
                plan = self.kept.find(request, scene.view())
                if plan is not None:
                    self.granted.append(scene.new_id())
                    scene.record(self.granted_event(self.granted[-1], request, plan))
            case "release":
                if self.granted:
                    id_ = self.granted.pop(self.draw(st.integers(0, len(self.granted) - 1)))
                    scene.decide(Release(id_))
            case "obey":
                if scene.fleet.status(name).session:
                    scene.obey(name)
                    scene.decide()
            case "draft":
                self.try_out(scene.fleet.draft())
            case "cordon":
                scene.record(e.NodeCordoned(scene.now, name, "repair"))
            case "uncordon":
                scene.record(e.NodeUncordoned(scene.now, name))
            case "cordon a GPU":
                uuid = scene.gpus_of(name)[0].uuid
                cordon = e.GpuCordoned(scene.now, name, uuid, "fan", by_health=False, drain_at=None)
                scene.record(cordon)
            case "go":
                if scene.fleet.status(name).session:
                    scene.disconnect(name)
            case "come":
                scene.connect(name)
                scene.report(name)
            case "grow stale":
                scene.now += 10.0
            case "sample":
                if scene.fleet.status(name).session:
                    scene.frame(name, samples=make_samples(scene.gpus_of(name)))
            case "sample all":
                scene.sample()
            case "set the clock back":
                scene.now -= 5.0
            case _:
                scene.record(e.NodeRegistered(scene.now, self.draw(nodes(name))))
                scene.connect(name)
                scene.report(name)

    def granted_event(self, id_: str, request: Request, plan: Plan) -> e.AllocationGranted:
        now = self.scene.now
        return e.AllocationGranted(now, id_, request, "", now, plan.placements)

    def try_out(self, draft: Fleet) -> None:
        """Decide on a draft that is thrown away."""
        for number in range(self.draw(st.integers(1, 3))):
            request = self.draw(TENANTS)
            plan = self.kept.find(request, draft.view(self.scene.now))
            if plan is not None:
                draft.apply(self.granted_event(f"d{number}", request, plan), draft.version + 1)

    def check(self) -> None:
        """The placer that was kept decides as a new one."""
        view = self.scene.view()
        request = self.draw(REQUESTS)
        assert self.kept.find(request, view) == self.placer().find(request, view)
        assert self.kept.feasible(request, view) == able(request, view)


EVENTS = (
    *("release", "obey", "draft", "cordon", "uncordon", "cordon a GPU", "go", "come"),
    *("grow stale", "sample", "sample all", "set the clock back", "register"),
)


@LAW
@given(st.data(), st.sampled_from(STEADY))
def test_a_placer_that_is_kept_decides_as_a_new_one(data: st.DataObject, policy: str) -> None:
    world = World(data.draw, Policies.named(policy))
    for _ in range(data.draw(st.integers(1, 12))):
        world.happen()
        world.check()


@LAW
@given(st.data())
def test_pools_that_follow_different_policies(data: st.DataObject) -> None:
    policies = Policies.named("fgd", {"train": "binpack", "infer": "spread"})
    world = World(data.draw, policies)
    for _ in range(data.draw(st.integers(1, 6))):
        world.happen()
        world.check()
