"""What a node tells of its partitions: who is asked to leave, who is made to, what is withheld."""

from typing import Any

import pytest
from tests.unit.aggregator.builders import START, Scene, make_facts, share, whole

from stoker.aggregator.decisions import next_due
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.leaving import Leave, leave_of
from stoker.aggregator.model import Allocation, AllocationState
from stoker.aggregator.wishes import Refused, Settled
from stoker.core.mig.geometry import MigState

WHY = "GPU 0 is to be partitioned anew as MIG layout 'half' (operation op-1)"


def told(uuid: str = "n1-0", **fields: Any) -> dict[str, GpuMig]:
    """A GPU that is being cleared, or whatever else `fields` say."""
    being_cleared: dict[str, Any] = {
        "state": MigState.DRAINING,
        "config": "half",
        "operation_id": "op-1",
        "is_withheld": True,
    }
    return {uuid: GpuMig(uuid, **{**being_cleared, **fields})}


def scene_of(gpus: int = 2) -> Scene:
    return Scene(make_facts(gpus=gpus))


def held(scene: Scene, request: Any) -> Allocation:
    mine = scene.grant(request)
    scene.obey("n1")
    return mine


def due(scene: Scene) -> float | None:
    scene.watch.version = scene.fleet.conditions.version
    return next_due(scene.fleet, scene.watch)


def test_a_holder_is_asked_to_leave_and_nobody_else() -> None:
    scene = scene_of()
    mine, other = held(scene, whole()), held(scene, whole())
    scene.frame("n1", mig=told(leaving=(mine.id,), leave_by=START + 60.0))
    assert leave_of(scene.fleet, mine) == Leave(f"{WHY} on node n1", START + 60.0, False)
    assert leave_of(scene.fleet, other) is None


def test_whoever_keeps_his_instance_is_neither_asked_nor_made_to_go() -> None:
    scene = scene_of()
    mine, beside = held(scene, share(8, ttl_seconds=1e6)), held(scene, share(8, ttl_seconds=1e6))
    assert mine.devices[0].uuid == beside.devices[0].uuid
    uuid = mine.devices[0].uuid
    scene.frame("n1", mig=told(uuid, leaving=(mine.id,), leave_by=START + 60.0, is_evicting=True))
    assert leave_of(scene.fleet, mine) is not None
    assert leave_of(scene.fleet, beside) is None
    scene.later(61.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.RELEASING
    assert scene.state(beside.id) is AllocationState.GRANTED


@pytest.mark.parametrize("after", ["told otherwise", "given up", "connected anew"])
def test_a_holder_is_no_longer_asked(after: str) -> None:
    scene = scene_of()
    mine = held(scene, whole())
    scene.frame("n1", mig=told(leaving=(mine.id,), leave_by=START + 60.0))
    match after:
        case "told otherwise":
            scene.frame("n1", mig=told(state=MigState.FAILED))
        case "given up":
            scene.release(mine.id)
        case _:
            scene.connect("n1")
    assert leave_of(scene.fleet, scene.fleet.allocations[mine.id]) is None


def test_of_two_gpus_the_one_that_is_needed_first_is_told() -> None:
    scene = scene_of()
    mine = held(scene, whole(2))
    later = told("n1-0", leaving=(mine.id,), leave_by=START + 60.0) | told(
        "n1-1", leaving=(mine.id,), leave_by=START + 30.0, is_evicting=True
    )
    scene.frame("n1", mig=later)
    leave = leave_of(scene.fleet, mine)
    assert leave is not None
    assert (leave.leave_by, leave.is_evicting) == (START + 30.0, True)


def test_who_is_not_gone_in_time_is_made_to_go_where_the_node_evicts() -> None:
    scene = scene_of()
    mine, other = held(scene, share(8, ttl_seconds=1e6)), held(scene, whole(ttl_seconds=1e6))
    assert mine.devices[0].uuid != other.devices[0].uuid
    uuid = mine.devices[0].uuid
    scene.frame("n1", mig=told(uuid, leaving=(mine.id,), leave_by=START + 60.0, is_evicting=True))
    assert due(scene) == START + 60.0
    scene.later(59.9)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.later(0.1)
    scene.decide()
    assert (scene.state(mine.id), scene.fleet.allocations[mine.id].reason) == (
        AllocationState.RELEASING,
        f"drained: {WHY}",
    )
    assert scene.state(other.id) is AllocationState.GRANTED
    assert due(scene) == scene.fleet.expires_at(other.id), "nothing is left to end but leases"
    assert scene.replayed().allocations[mine.id].state is AllocationState.RELEASING
    scene.obey("n1")
    scene.decide()
    assert scene.state(mine.id) is AllocationState.ENDED


@pytest.mark.parametrize("why", ["only asked", "not connected"])
def test_nobody_is_made_to_go(why: str) -> None:
    scene = scene_of()
    mine = held(scene, whole(ttl_seconds=1e6))
    scene.frame(
        "n1", mig=told(leaving=(mine.id,), leave_by=START + 60.0, is_evicting=why != "only asked")
    )
    if why == "not connected":
        scene.disconnect("n1")
    scene.later(61.0)
    scene.decide()
    assert scene.state(mine.id) is AllocationState.GRANTED
    assert due(scene) == scene.fleet.expires_at(mine.id)


def test_nothing_goes_to_a_withheld_gpu_until_its_node_says_otherwise() -> None:
    scene = scene_of(gpus=1)
    scene.frame("n1", mig=told(state=MigState.APPLYING))
    assert isinstance(scene.allocate(whole()), Refused)
    scene.frame("n1", mig=told(state=MigState.SUCCESS, is_withheld=False))
    assert isinstance(scene.allocate(whole()), Settled)


def test_what_waits_is_looked_at_when_a_gpu_is_withheld_no_longer_and_only_then() -> None:
    scene = scene_of(gpus=1)
    scene.frame("n1", mig=told(state=MigState.APPLYING, reason="1 of 5 steps"))
    waiting = scene.wait(whole())
    before = scene.fleet.capacity_version
    scene.frame("n1", mig=told(state=MigState.APPLYING, reason="2 of 5 steps"))
    assert scene.fleet.capacity_version == before
    mig = scene.view().nodes["n1"].gpus[0].mig
    assert mig is not None
    assert mig.reason == "2 of 5 steps", "who asks why reads the newest"
    scene.frame("n1", mig=told(state=MigState.SUCCESS, is_withheld=False))
    assert scene.fleet.capacity_version > before
    scene.decide(serve=True)
    assert scene.state(waiting.id) is AllocationState.GRANTED


def test_what_a_node_told_is_forgotten_with_its_stream() -> None:
    scene = scene_of(gpus=1)
    scene.frame("n1", mig=told(state=MigState.APPLYING))
    scene.connect("n1")
    scene.report("n1")
    assert scene.fleet.status("n1").mig is None
    assert isinstance(scene.allocate(whole()), Settled)
    scene.frame("n1", samples={})
    scene.frame("n1", mig={})
    assert scene.fleet.status("n1").mig == {}
