"""Whether an endpoint may be called, by what the fleet knows of its node and GPUs; and its load."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    Scene,
    make_facts,
    make_health,
    make_samples,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import DriverState, GpuSample, MissingGpu
from stoker.aggregator.standings import Standing, stand
from stoker.aggregator.verdicts import Verdict

OTHER = "n1-1"  # a GPU that the endpoint does not have


def served(gpus: int = 1) -> tuple[Scene, str]:
    """Return a scene in which an endpoint is well, and its allocation."""
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    granted = scene.grant(whole(gpus, node="n1"))
    scene.obey("n1")
    return scene, granted.id


def standing(scene: Scene, id_: str, *, is_settled: bool = True) -> Standing:
    return stand(scene.fleet, id_, scene.now, is_settled=is_settled)


def gpu_cordoned(scene: Scene, uuid: str, drain_at: float | None = None) -> None:
    scene.record(e.GpuCordoned(scene.now, "n1", uuid, "fans", by_health=False, drain_at=drain_at))


def missing(scene: Scene) -> None:
    hung = MissingGpu(0, "n1-0", "driver_timeout", "its driver call hangs")
    scene.frame("n1", missing=(hung,), samples=make_samples(scene.gpus_of("n1")))


def stale(scene: Scene) -> None:
    scene.now += 3.1


# What happens; why the endpoint is out then; empty: it is not.
STORIES: dict[str, tuple[Callable[[Scene], object], str]] = {
    "nothing": (lambda scene: None, ""),
    "its GPU is unhealthy": (
        lambda scene: scene.judge("n1", make_health("n1-0")),
        "GPU 0 of node n1 is unhealthy: xid was found",
    ),
    "its GPU is degraded": (
        lambda scene: scene.judge("n1", make_health("n1-0", Verdict.DEGRADED)),
        "",
    ),
    "another GPU is unhealthy": (lambda scene: scene.judge("n1", make_health(OTHER)), ""),
    "its GPU is cordoned": (
        lambda scene: gpu_cordoned(scene, "n1-0"),
        "GPU 0 of node n1 is cordoned: fans",
    ),
    "its GPU is drained": (
        lambda scene: gpu_cordoned(scene, "n1-0", scene.now + 60),
        "GPU 0 of node n1 is drained: fans",
    ),
    "another GPU is cordoned": (lambda scene: gpu_cordoned(scene, OTHER), ""),
    "its node is cordoned": (
        lambda scene: scene.record(e.NodeCordoned(scene.now, "n1", "move")),
        "node n1 is cordoned: move",
    ),
    "its node is drained": (
        lambda scene: scene.record(e.NodeCordoned(scene.now, "n1", "move", scene.now + 60)),
        "node n1 is drained: move",
    ),
    "another node is cordoned": (
        lambda scene: scene.record(e.NodeCordoned(scene.now, "n2", "move")),
        "",
    ),
    "its node is disconnected": (
        lambda scene: scene.disconnect("n1"),
        "node n1 is disconnected: the stream broke",
    ),
    "its node is stale": (
        stale,
        "node n1 is stale: its newest sample is older than three sampling intervals",
    ),
    "its driver hangs": (
        lambda scene: scene.frame("n1", driver=DriverState.BLOCKED, driver_reason="hangs"),
        "node n1: driver blocked: hangs",
    ),
    "its GPU cannot be read": (missing, "GPU 0 of node n1 is out: its driver call hangs"),
}


@pytest.mark.parametrize("name", STORIES)
def test_endpoint_is_out_when_its_gpus_are(name: str) -> None:
    happens, out = STORIES[name]
    scene, id_ = served()
    happens(scene)
    found = standing(scene, id_)
    assert (found.out, found.over) == (out, "")


def test_one_gpu_of_several_takes_the_endpoint_out() -> None:
    scene, id_ = served(gpus=2)
    assert standing(scene, id_).out == ""
    scene.judge("n1", make_health(OTHER))
    assert standing(scene, id_).out == "GPU 1 of node n1 is unhealthy: xid was found"


def test_allocation_that_is_given_up_ends_the_endpoint() -> None:
    scene, id_ = served()
    scene.release(id_)
    assert standing(scene, id_).over.startswith(f"allocation {id_} is releasing")
    scene.obey("n1")
    scene.decide()
    assert standing(scene, id_).over.startswith(f"allocation {id_} is ended")
    assert standing(scene, "nobody").over == "allocation nobody is not known any more"


def test_agent_that_has_not_come_back_since_the_start_is_waited_for() -> None:
    """The endpoint gives signs of life itself; the node will be heard of in a moment."""
    scene, id_ = served()
    scene.fleet = scene.replayed()
    scene.fleet.note(e.Recovered(scene.now))
    assert standing(scene, id_, is_settled=False).out == ""
    assert standing(scene, id_, is_settled=True).out.startswith("node n1 is disconnected")
    scene.connect("n1")  # it has not told of its driver and GPUs yet
    assert standing(scene, id_, is_settled=False).out == ""
    assert standing(scene, id_, is_settled=True).out != ""


def test_agent_that_left_after_the_start_is_not_waited_for() -> None:
    scene, id_ = served()
    scene.disconnect("n1")
    assert standing(scene, id_, is_settled=False).out.startswith("node n1 is disconnected")


def test_load_is_that_of_the_busiest_and_the_fullest_gpu() -> None:
    scene, id_ = served(gpus=2)
    samples = make_samples(scene.gpus_of("n1"))
    loads = ((0, 0.25, 60), (1, 0.75, 20), (2, 1.0, 80))  # the last is not its own
    for index, utilization, gib in loads:
        uuid = f"n1-{index}"
        used = gib * GIB
        samples[uuid] = GpuSample(
            memory_used_bytes=used, utilization_ratio=utilization, at=scene.now
        )
    scene.frame("n1", samples=samples)
    assert standing(scene, id_) == Standing(utilization_ratio=0.75, memory_used_ratio=0.75)


def test_what_was_not_read_is_not_known() -> None:
    scene, id_ = served()
    scene.frame("n1", samples={"n1-0": GpuSample(power_watts=1.0, at=scene.now)})
    assert standing(scene, id_) == Standing()


def test_share_is_judged_by_its_gpu() -> None:
    scene = Scene(make_facts("n1", 1))
    granted = scene.grant(share(10))
    scene.obey("n1")
    busy = GpuSample(memory_used_bytes=72 * GIB, utilization_ratio=0.5, at=scene.now)
    scene.frame("n1", samples={"n1-0": busy})
    assert standing(scene, granted.id).memory_used_ratio == pytest.approx(0.9)
    old = replace(scene.fleet.nodes["n1"].facts, interval_seconds=0.1)
    scene.record(e.NodeRegistered(scene.now, old))
    scene.now += 0.31  # three intervals later it is not known any more
    assert standing(scene, granted.id).memory_used_ratio is None
