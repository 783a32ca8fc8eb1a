"""The keeper's edge: what it does for a decision, what it says meanwhile, and what holds it up."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.mig_rig import MigRig
from tests.support.node import allocation

from stoker.agent.driver import HostStuck
from stoker.agent.events import ReleaseAsked, ResumeAsked
from stoker.agent.mig.declared import MigConfig, declare
from stoker.agent.mig.library import Library
from stoker.agent.mig.reporting import MigRefusal, UnknownGpu
from stoker.agent.model import HeldAllocation, ProcessSeen
from stoker.core.errors import BadInput, StoreFull
from stoker.core.mig.geometry import MigState
from stoker.core.mig.reports import MigAsk, Verb

MIXED = [("2g.20gb", 0), ("1g.10gb", 2), ("1g.10gb", 3), ("3g.40gb", 4)]


@pytest.fixture
def rig(tmp_path: Path) -> MigRig:
    rig = MigRig(tmp_path)
    rig.read_inventory()
    return rig


async def test_partitions_are_told_once_the_gpus_are_known(tmp_path: Path) -> None:
    rig = MigRig(tmp_path)
    async with rig.running():
        assert rig.told == []
        assert rig.stepper.reads == 0
        rig.read_inventory()
        await rig.settle()
        (status,) = rig.told[-1]
        assert (status.gpu_uuid, status.state, status.is_withheld) == (rig.uuids[0], None, False)
        assert status.layout == ()
        assert status.geometry is not None


async def test_an_applied_configuration_is_in_place_and_told(rig: MigRig) -> None:
    async with rig.running():
        report = await rig.apply("2x1g.10gb", "2g.20gb", "3g.40gb")
        assert rig.layout() == MIXED
        (facts,) = report.gpus
        assert (facts.state, facts.operation_id, facts.mode) == ("success", "op", True)
        assert [(each.profile, each.start) for each in facts.instances] == MIXED
        assert {each.state for (each,) in rig.told} >= {MigState.APPLYING, MigState.SUCCESS}
        assert all(each.is_withheld for (each,) in rig.told if each.state is MigState.APPLYING)
        assert rig.told[-1][0].is_withheld is False
        inventory = rig.node.view.inventory
        assert inventory is not None
        assert len(inventory.mig_devices(rig.uuids[0])) == 4


async def test_the_driver_is_let_go_of_for_a_change_of_mode_and_for_nothing_else(
    rig: MigRig,
) -> None:
    async with rig.running():
        await rig.apply("7g.80gb")
        assert rig.handles.told == ["release", "resume"]
        await rig.apply("3g.40gb", operation="again")
        assert rig.handles.told == ["release", "resume"]
        assert not rig.worker.has_let_go


async def test_a_driver_that_cannot_be_let_go_of_leaves_everything_as_it_is(rig: MigRig) -> None:
    rig.handles.error = HostStuck("PID 7 is in uninterruptible sleep")
    async with rig.running():
        report = await rig.apply("7g.80gb")
        assert (report.gpus[0].state, report.gpus[0].mode) == ("failed", False)
        assert "uninterruptible" in report.gpus[0].reason
        assert rig.handles.told == ["release", "resume"]
        assert rig.stepper.steps == []


async def test_applying_twice_is_no_step(rig: MigRig) -> None:
    async with rig.running():
        await rig.apply("3g.40gb", "2g.20gb")
        steps = len(rig.stepper.steps)
        assert steps
        assert (await rig.apply("3g.40gb", "2g.20gb")).gpus[0].state == "success"
        again = await rig.apply("3g.40gb", "2g.20gb", operation="another")
        assert again.gpus[0].state == "success"
        assert len(rig.stepper.steps) == steps


async def test_a_plan_changes_nothing_and_an_undo_goes_back(rig: MigRig) -> None:
    async with rig.running():
        planned = await rig.ask("plan", "3g.40gb", "4g.40gb")
        (plan,) = planned.plans
        assert [(each.action, each.profile) for each in plan.changes] == [
            ("create", "4g.40gb"),
            ("create", "3g.40gb"),
        ]
        assert rig.stepper.steps == []
        await rig.apply("2x1g.10gb", "2g.20gb", "3g.40gb")
        await rig.apply("7g.80gb", operation="whole")
        assert rig.layout() == [("7g.80gb", 0)]
        undone = await rig.ask("undo", operation_id="back")
        await rig.settle()
        assert [each.uuid for each in undone.plans] == [rig.uuids[0]]
        assert rig.layout() == MIXED


async def test_while_the_driver_is_released_nothing_is_begun_and_who_has_it_is_named(
    rig: MigRig,
) -> None:
    async with rig.running():
        await rig.settle()
        reads = rig.stepper.reads
        rig.happen(ReleaseAsked(rig.clock.now(), None, "ann"))
        verbs: list[Verb] = ["apply", "undo"]
        for verb in verbs:
            with pytest.raises(MigRefusal, match=r"released by ann .*`stoker agent resume`"):
                await rig.ask(verb, "7g.80gb")
        plan = await rig.ask("plan", "7g.80gb")
        assert plan.plans[0].changes
        assert rig.stepper.reads == reads


async def test_a_release_in_the_middle_holds_it_up_until_the_driver_is_taken_again(
    rig: MigRig,
) -> None:
    rig.stepper.held_up = asyncio.Event()
    rig.stepper.held_up.set()
    async with rig.running():
        await rig.apply("2g.20gb")
        rig.stepper.held_up = asyncio.Event()
        asked = asyncio.create_task(rig.ask("apply", "7g.80gb", operation_id="next"))
        await rig.settle()
        rig.happen(ReleaseAsked(rig.clock.now(), None, "ann"))
        rig.stepper.held_up.set()
        await asked
        await rig.settle()
        (facts,) = (await rig.status()).gpus
        assert (facts.state, facts.is_withheld) == ("pending", True)
        assert facts.reason.startswith("waits: the driver is released by ann")
        assert rig.told[-1][0].reason == facts.reason
        assert rig.layout() == [("2g.20gb", 4)]
        rig.happen(ResumeAsked(rig.clock.now(), "ann"))
        await rig.settle()
        assert rig.state() is MigState.SUCCESS
        assert rig.layout() == [("7g.80gb", 0)]


async def test_who_is_in_the_way_is_named_and_nothing_is_touched(rig: MigRig) -> None:
    async with rig.running():
        await rig.apply("3g.40gb", "4g.40gb")
        (instance, _) = (await rig.status()).gpus[0].instances
        steps = len(rig.stepper.steps)
        rig.processes = (
            ProcessSeen(rig.uuids[0], 4711, "bob", "python", gpu_instance_id=_id(rig, 0)),
        )
        report = await rig.apply("7g.80gb", operation="whole")
        assert report.gpus[0].state == "failed"
        assert "4711" in report.gpus[0].reason
        assert "bob" in report.gpus[0].reason
        assert len(rig.stepper.steps) == steps
        assert instance.start == 0


async def test_an_allocation_is_asked_to_leave_and_then_it_goes_on(rig: MigRig) -> None:
    async with rig.running():
        await rig.apply("3g.40gb", "4g.40gb")
        inventory = rig.node.view.inventory
        assert inventory is not None
        device = inventory.mig_devices(rig.uuids[0])[0].uuid
        rig.node.hold(_of(allocation("a", 0), rig.uuids[0], device))
        assert rig.node.held == {"a"}
        report = await rig.apply("7g.80gb", operation="whole", drain_seconds=60.0)
        assert report.gpus[0].state == "draining"
        assert report.gpus[0].leave_by == rig.clock.now() + 60.0
        assert "allocation a" in report.gpus[0].reason
        rig.node.drop("a")
        rig.read_processes()
        assert rig.node.held == set()
        await rig.clock.advance(10.0)
        await rig.settle()
        assert rig.layout() == [("7g.80gb", 0)]
        assert rig.told[-1][0].leave_by is None


async def test_who_has_not_left_in_time_is_left_alone_and_it_fails(rig: MigRig) -> None:
    async with rig.running():
        await rig.apply("3g.40gb", "4g.40gb")
        rig.processes = (
            ProcessSeen(rig.uuids[0], 4711, "bob", "python", gpu_instance_id=_id(rig, 0)),
        )
        await rig.apply("7g.80gb", operation="whole", drain_seconds=60.0)
        assert rig.state() is MigState.DRAINING
        for _ in range(14):
            await rig.clock.advance(5.0)
            await rig.settle()
        assert rig.state() is MigState.FAILED
        assert not rig.told[-1][0].is_withheld
        assert rig.layout() == [("4g.40gb", 0), ("3g.40gb", 4)]
        assert rig.stepper.ended == []


async def test_what_is_declared_is_in_place_before_anything_is_held(tmp_path: Path) -> None:
    rig = MigRig(tmp_path, declaration=declare(MigConfig(gpus={"all": "7x1g.10gb"})))
    rig.read_inventory()
    wanted = _of(allocation("a", 0), rig.uuids[0])
    rig.node.hold(wanted)
    assert rig.node.held == set()
    async with rig.running():
        assert rig.state() is MigState.SUCCESS
        assert len(rig.layout()) == 7
        # The whole GPU, which was asked for before, is not to be had any more.
        refusals = [each for frame in rig.node.frames for each in frame.refusals]
        assert [each.allocation_id for each in refusals] == ["a"]
        assert rig.node.held == set()
    assert rig.told[-1][0].config == "agent configuration"


async def test_without_anybody_who_may_the_gpu_is_withheld_and_the_reason_told(
    tmp_path: Path,
) -> None:
    rig = MigRig(tmp_path, "2xH100-80GB", declare(MigConfig(gpus={"1": "7g.80gb"})))
    rig.read_inventory()
    rig.stepper.unavailable = "it takes root: run stoker-agent-helper"
    async with rig.running():
        free, withheld = rig.told[-1]
        assert (free.is_withheld, free.layout) == (False, None)
        assert (withheld.is_withheld, withheld.state) == (True, MigState.PENDING)
        assert "run stoker-agent-helper" in withheld.reason
        facts = (await rig.status()).gpus
        assert all("run stoker-agent-helper" in each.unread for each in facts)
        with pytest.raises(MigRefusal, match="run stoker-agent-helper"):
            await rig.ask("plan", "7g.80gb")
        rig.stepper.unavailable = ""
        await rig.clock.advance(10.0)
        await rig.settle()
        assert rig.state(1) is MigState.SUCCESS
        assert rig.layout(1) == [("7g.80gb", 0)]


async def test_when_nobody_may_any_more_it_is_refused_until_somebody_does(rig: MigRig) -> None:
    async with rig.running():
        await rig.apply("7g.80gb")
        rig.stepper.unavailable = "nobody listens: is stoker-agent-helper running?"
        with pytest.raises(MigRefusal, match="is stoker-agent-helper running"):
            await rig.ask("apply", "3g.40gb", operation_id="next")
        assert rig.layout() == [("7g.80gb", 0)]
        (facts,) = (await rig.status()).gpus
        assert "is stoker-agent-helper running" in facts.unread
        reads, rig.stepper.unavailable = rig.stepper.reads, ""
        await rig.clock.advance(10.0)
        await rig.settle()
        assert rig.stepper.reads == reads + 1  # by itself
        assert (await rig.apply("3g.40gb", operation="next")).gpus[0].state == "success"


async def test_cards_without_mig_are_not_asked_about_it(tmp_path: Path) -> None:
    rig = MigRig(tmp_path, "2xT4")
    rig.read_inventory()
    async with rig.running():
        assert rig.stepper.reads == 0
        assert rig.told == [()]
        assert [each.mode for each in (await rig.status()).gpus] == [None, None]
        with pytest.raises(BadInput, match="is about no GPU that is meant"):
            await rig.ask("apply", "1g.10gb", operation_id="op")


async def test_a_full_disk_refuses_and_leaves_everything_as_it_is(rig: MigRig) -> None:
    async with rig.running():
        rig.disk_error = StoreFull("mig.json: no space left on device")
        with pytest.raises(MigRefusal, match="no space left"):
            await rig.ask("apply", "7g.80gb", operation_id="op")
        await rig.settle()
        assert rig.stepper.steps == []
        rig.disk_error = None
        assert (await rig.apply("7g.80gb")).gpus[0].state == "success"


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (MigAsk("plan"), BadInput, "no configuration is given"),
        (MigAsk("status", gpus=("7",)), UnknownGpu, "no GPU is called '7' here; there are 0"),
        (MigAsk("undo", gpus=("GPU-x",)), UnknownGpu, "no GPU is called 'GPU-x'"),
    ],
)
async def test_what_cannot_be_meant_is_named(
    ask: MigAsk, error: type[Exception], message: str, rig: MigRig
) -> None:
    async with rig.running():
        with pytest.raises(error, match=message):
            await rig.worker.answer(ask)


async def test_who_asks_before_or_after_is_told_to_come_again(rig: MigRig) -> None:
    with pytest.raises(MigRefusal, match="the agent is starting, or ending"):
        await rig.status()


async def test_a_driver_that_hangs_holds_up_the_answer_and_not_the_agent(rig: MigRig) -> None:
    async with rig.running():
        rig.stepper.held_up = asyncio.Event()
        asked = asyncio.create_task(rig.ask("plan", "7g.80gb"))
        await rig.settle()
        assert not asked.done()
        assert (await rig.status()).gpus
        rig.stepper.held_up.set()
        assert (await asked).plans


def _id(rig: MigRig, place: int) -> int:
    """The ID of the GPU instance at that place, counted from 0."""
    with Library(rig.table) as library:
        return library.read(rig.uuids[0]).instances[place].id


def _of(wanted: HeldAllocation, uuid: str, *devices: str) -> HeldAllocation:
    return replace(wanted, gpu_uuids=(uuid,), mig_device_uuids=devices)
