"""What people are shown of a plan is what would be done, and what it would cost them."""

from random import Random

import pytest
from tests.support.mig_memory import MemoryDriver, a_user, partitions

from stoker.agent.mig.choosing import choose
from stoker.agent.mig.comparing import layout_of, wanted_of_target
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers
from stoker.agent.mig.operations import Declared, GpuRecord, Past
from stoker.agent.mig.plan_report import (
    facts_of,
    how_it_is,
    plan_of,
    plan_of_target,
    refused_plan,
)
from stoker.agent.mig.steps import next_steps
from stoker.agent.partitions import GpuPartitions, SetMode, Target
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000, Board
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import layouts
from stoker.core.mig.reports import GpuPlan, InstanceChange, InstanceFacts

TWO_3G = (Placed(0, 4, "3g.20gb"), Placed(4, 4, "3g.20gb"))


def shown(plan: GpuPlan) -> list[str]:
    return [
        f"{each.action} {each.profile}@{each.start}{' busy' if each.is_busy else ''}"
        for each in plan.changes
    ]


def test_changes_are_told_by_place_and_what_goes_before_what_comes_there() -> None:
    gpu = partitions(A100_40GB, (Placed(0, 4, "3g.20gb", (1,)), Placed(4, 4, "3g.20gb")))
    users = GpuUsers({gpu.instances[1].id: (a_user(gpu),)})
    wanted = Wanted(True, (("4g.20gb", 1), ("3g.20gb", 1)))
    plan = plan_of(gpu, wanted, users)
    assert shown(plan) == ["destroy 3g.20gb@0", "create 4g.20gb@0", "keep 3g.20gb@4 busy"]
    assert plan.uuids_lost == ("MIG-0-1",)
    assert plan.in_the_way == ()
    assert plan.steps == (
        "destroy compute instance 0 of GPU instance 1 (MIG-0-1)",
        "destroy GPU instance 1: 3g.20gb@0",
        "create GPU instance 4g.20gb@0",
        "create a compute instance of 4c in the GPU instance at 0",
    )
    assert (plan.mode, plan.mode_wanted, plan.mode_change) == (True, True, "none")
    assert plan.notes == ()


def test_repair_changes_compute_instances_only() -> None:
    gpu = partitions(A100_40GB, TWO_3G[:1])
    plan = plan_of(gpu, Wanted(True, (("1c.3g.20gb", 2),)), NOBODY_THERE)
    assert plan.changes == (InstanceChange("repair", "3g.20gb", 0, 4, (1, 1), uuids=("MIG-0-1",)),)
    assert plan.uuids_lost == ("MIG-0-1",)


def test_plan_tells_what_would_be_done_if_those_in_the_way_left() -> None:
    gpu = partitions(A100_40GB, TWO_3G)
    user = a_user(gpu)
    users = GpuUsers({each.id: (user,) for each in gpu.instances})
    plan = plan_of(gpu, Wanted(True, (("7g.40gb", 1),)), users)
    assert plan.in_the_way == (user,)
    assert plan.refusal == ""
    assert shown(plan) == [
        *("destroy 3g.20gb@0 busy", "create 7g.40gb@0", "destroy 3g.20gb@4 busy"),
    ]


def test_plan_of_what_cannot_be_tells_only_why() -> None:
    gpu = partitions(A100_40GB, TWO_3G)
    plan = plan_of(gpu, Wanted(True, (("4g.20gb", 2),)), NOBODY_THERE)
    assert "at most 1 4g.20gb, not 2" in plan.refusal
    assert (plan.changes, plan.steps, plan.in_the_way) == ((), (), ())
    assert plan_of_target(gpu, Target(True, (Placed(1, 4, "4g.20gb"),)), NOBODY_THERE).refusal
    assert refused_plan(gpu, "why not").refusal == "why not"


@pytest.mark.parametrize(
    ("board", "is_on", "change", "notes"),
    [
        (
            A30_24GB,
            False,
            "reset",
            (
                "the agent lets go of the driver while the mode is changed",
                "the driver resets the GPU for it; if it cannot, a reset or a reboot is due",
            ),
        ),
        (
            H100_80GB,
            False,
            "at_once",
            (
                "the agent lets go of the driver while the mode is changed",
                "the mode is lost with the driver; the agent sets it again at its start",
            ),
        ),
        (
            H100_80GB,
            True,
            "at_once",
            ("the agent lets go of the driver while the mode is changed",),
        ),
    ],
    ids=["A30 on", "H100 on", "H100 off"],
)
def test_change_of_mode(board: Board, is_on: bool, change: str, notes: tuple[str, ...]) -> None:
    plan = plan_of(partitions(board, is_enabled=is_on), Wanted(not is_on), NOBODY_THERE)
    assert (plan.mode, plan.mode_wanted, plan.mode_change) == (is_on, not is_on, change)
    assert plan.steps == (f"turn MIG mode {'off' if is_on else 'on'}",)
    assert plan.notes == notes


def test_mode_that_is_pending() -> None:
    driver = MemoryDriver(A30_24GB, is_enabled=False, is_open=True)
    driver.do(SetMode(True))
    plan = plan_of(driver.gpu, Wanted(True, (("4g.24gb", 1),)), NOBODY_THERE)
    assert plan.steps == ()
    assert plan.notes == ("MIG mode is pending to be on: reset the GPU, or reboot",)
    assert how_it_is(driver.gpu) == "MIG mode off, on with the next reset"


def test_half_made_instance_is_told() -> None:
    driver = MemoryDriver(A30_24GB, (Placed(0, 4, "4g.24gb"),))
    driver.do(next_steps(driver.gpu, Target(True))[0])
    assert how_it_is(driver.gpu) == "no instances, and without compute instances 4g.24gb@0"
    assert facts_of(driver.gpu, GpuRecord()).instances == (InstanceFacts("4g.24gb", 0, 4, (), ()),)


def test_facts_of_a_gpu() -> None:
    gpu = partitions(A100_40GB, TWO_3G[1:])
    declared = Declared(Wanted(True, (("3g.20gb", 1),)), "one")
    record = GpuRecord(declared=declared, undo=Past(Target(False), None), changed_at=5.0)
    facts = facts_of(gpu, record, "the helper is not there")
    assert (facts.state, facts.config, facts.is_withheld) == ("success", "one", False)
    assert (facts.undo, facts.unread) == ("MIG mode off", "the helper is not there")
    assert facts.instances == (InstanceFacts("3g.20gb", 4, 4, (3,), ("MIG-0-1",)),)
    assert facts_of(gpu, GpuRecord()).state == ""


def played(gpu: GpuPartitions, before: Layout, target: Target, board: Board) -> GpuPartitions:
    driver = MemoryDriver(board, before)
    while steps := next_steps(driver.gpu, target):
        driver.do(steps[0])
    return driver.gpu


@pytest.mark.parametrize("board", [A30_24GB, A100_40GB, RTX_PRO_6000], ids=lambda board: board.name)
def test_plan_is_what_happens(board: Board) -> None:
    """The UUIDs that it says are lost are those that are, and what it keeps is kept."""
    every = list(layouts(board.geometry, plain=False))
    rng = Random(board.name)
    for _ in range(40):
        before, after = rng.choice(every), rng.choice(every)
        gpu = partitions(board, before)
        wanted = wanted_of_target(Target(True, after))
        target = choose(gpu, wanted, NOBODY_THERE)
        assert isinstance(target, Target)
        plan = plan_of(gpu, wanted, NOBODY_THERE)
        now = played(gpu, before, target, board)
        old, new = (
            {part.uuid for each in told.instances for part in each.compute_instances}
            for told in (gpu, now)
        )
        assert set(plan.uuids_lost) == old - new
        kept = [each for each in plan.changes if each.action == "keep"]
        assert {uuid for each in kept for uuid in each.uuids} == old & new
        made = [each for each in plan.changes if each.action == "create"]
        assert {each.start for each in (*kept, *made)} == {each.start for each in layout_of(now)}
        assert len(plan.steps) == len(next_steps(gpu, target))
