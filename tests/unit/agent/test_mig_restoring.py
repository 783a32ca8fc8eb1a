"""Going back, changing the mode, and what is declared: told as stories."""

from tests.support.mig_memory import MemoryDriver, Stage, never
from tests.support.mig_stories import (
    HALVES,
    OFF,
    QUARTERS,
    a_stage,
    an_allocation,
    declare,
    shown,
)

from stoker.agent.mig import actions as do
from stoker.agent.mig import events as on
from stoker.agent.mig.comparing import layout_of
from stoker.agent.mig.in_the_way import NOBODY_THERE
from stoker.agent.mig.operations import Declared
from stoker.agent.partitions import CreateGpuInstance
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB
from stoker.core.mig.geometry import MigState, Placed, Wanted

# --- undo


def test_undo_goes_back_to_the_places_before_and_again_forward() -> None:
    before = (Placed(0, 4, "3g.20gb"), Placed(4, 1, "1g.5gb"))
    rig = a_stage(before, A100_40GB)
    rig.apply(Wanted(True, (("7g.40gb", 1),)))
    assert shown(rig) == "7g.40gb@0"
    rig.undo("back")
    assert layout_of(rig.gpu) == before
    assert rig.status().state is MigState.SUCCESS
    assert not rig.status().is_withheld
    rig.undo("forth")
    assert shown(rig) == "7g.40gb@0"
    rig.undo("forth")  # that is known
    assert shown(rig) == "7g.40gb@0"


def test_undo_of_what_waits_only_takes_it_back() -> None:
    rig = a_stage((Placed(0, 2, "2g.12gb"), Placed(2, 2, "2g.12gb")))
    rig.apply(Wanted(True, (("4g.24gb", 1),)), "done")
    rig.see("GPU-0", an_allocation(rig))
    rig.apply(QUARTERS, "waits", drain_seconds=600)
    assert rig.status().state is MigState.DRAINING
    rig.undo()
    status = rig.status()
    assert (status.state, status.leave_by, status.is_withheld) == (MigState.SUCCESS, None, False)
    assert shown(rig) == "4g.24gb@0"
    assert status.config == "wish"
    rig.see("GPU-0")
    rig.undo("again")
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"


def test_undo_of_a_mode_that_is_pending_takes_it_back() -> None:
    rig = a_stage(None, is_open=True)
    rig.apply(HALVES)
    assert rig.gpu.is_pending
    (facts,) = rig.keeper.facts()
    assert facts.undo == "MIG mode off"
    rig.undo()
    assert not rig.gpu.is_pending
    assert rig.status().state is MigState.SUCCESS


def test_undo_of_nothing_is_refused() -> None:
    rig = a_stage()
    rig.undo()
    rig.send(on.UndoAsked(2, "undo", ("GPU-0",)))
    assert list(rig.answers()) == [
        "there is nothing to undo: the partitions of no GPU of this node were changed",
        "GPU-0: there is nothing to undo: its partitions were not changed",
    ]
    assert "nothing to undo" in rig.keeper.plan_undo("GPU-0").refusal


def test_failed_operation_is_not_what_an_undo_takes_back() -> None:
    rig = a_stage()
    rig.apply(HALVES)
    rig.fails = lambda number, step: "before" if isinstance(step, CreateGpuInstance) else ""
    rig.apply(QUARTERS, "fails")
    assert rig.status().state is MigState.FAILED
    rig.fails = never
    rig.start()
    rig.undo()
    assert shown(rig) == "4g.24gb@0"


# --- the mode


def test_agent_lets_go_of_the_driver_only_while_the_mode_is_changed() -> None:
    rig = a_stage(None, H100_80GB)
    done = rig.apply(Wanted(True, (("7g.80gb", 1),)))
    kinds = [
        each for each in done if isinstance(each, do.LetGoOfDriver | do.DoStep | do.TakeDriver)
    ]
    names = [type(each.step if isinstance(each, do.DoStep) else each).__name__ for each in kinds]
    assert names == [
        *("LetGoOfDriver", "SetMode", "TakeDriver"),
        *("CreateGpuInstance", "CreateComputeInstance"),
    ]


def test_agent_that_cannot_let_go_leaves_all_as_it_was() -> None:
    rig = a_stage(None, H100_80GB)
    rig.letting_go_fails = "a call of the driver hangs"
    rig.apply(Wanted(True))
    status = rig.status()
    assert status.state is MigState.FAILED
    assert status.reason == (
        "the agent cannot let go of the driver: a call of the driver hangs; "
        "nothing was changed: MIG mode off"
    )
    assert not rig.has_let_go


def test_mode_that_waits_for_a_reset_is_told_and_gone_on_with_afterwards() -> None:
    rig = a_stage(None, is_open=True)
    rig.apply(HALVES)
    status = rig.status()
    assert status.state is MigState.REBOOT_REQUIRED
    assert status.reason == (
        "MIG mode on is pending: reset the GPU, or reboot: somebody has the GPU open"
    )
    assert status.is_withheld
    assert not rig.has_let_go
    assert rig.keeper.due is None
    rig.drivers[0].reset()
    rig.start()
    assert rig.status().state is MigState.SUCCESS
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"
    rig.undo()
    assert rig.status().state is MigState.REBOOT_REQUIRED
    rig.drivers[0].is_open = False
    rig.start()  # whoever had it open is gone, and the mode can be changed now
    assert rig.status().state is MigState.SUCCESS
    assert not rig.gpu.is_enabled


def test_reset_is_noticed_while_the_agent_runs() -> None:
    rig = a_stage(None, is_open=True)
    rig.apply(HALVES)
    rig.drivers[0].reset()
    rig.send(on.PartitionsRead((rig.gpu,)))
    assert rig.status().state is MigState.SUCCESS


def test_pending_mode_can_be_taken_back() -> None:
    rig = a_stage(None, is_open=True)
    rig.apply(HALVES)
    rig.apply(OFF, "never mind")
    assert rig.status().state is MigState.SUCCESS
    assert not rig.gpu.is_pending


def test_mode_that_hopper_will_not_change_is_a_failure() -> None:
    rig = a_stage(None, H100_80GB, is_open=True)
    rig.apply(Wanted(True))
    assert rig.status().state is MigState.FAILED
    assert rig.status().reason == (
        "the driver did not turn MIG mode on: somebody has the GPU open; "
        "nothing was changed: MIG mode off"
    )


# --- what is declared


def test_declared_layout_is_made_at_the_start_and_the_gpu_withheld_until_then() -> None:
    rig = Stage([MemoryDriver(A30_24GB)])
    declare(rig)
    *before, last = [each.gpus[0] for each in rig.actions if isinstance(each, do.Report)]
    assert len(before) > 2
    assert all(each.is_withheld for each in before)
    assert (last.state, last.is_withheld, last.config) == (MigState.SUCCESS, False, "site")
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"


def test_declared_layout_that_is_in_place_takes_no_operation() -> None:
    rig = declare(a_stage((Placed(0, 2, "2g.12gb"), Placed(2, 2, "2g.12gb"))))
    status = rig.status()
    assert (status.state, status.operation_id) == (MigState.SUCCESS, "")
    assert not status.is_withheld
    assert not rig.steps


def test_declared_layout_waits_for_users_without_asking_them_to_leave() -> None:
    rig = a_stage()
    rig.users["GPU-0"] = an_allocation(rig)
    declare(rig)
    status = rig.status()
    assert (status.state, status.leave_by) == (MigState.PENDING, None)
    assert status.is_withheld
    assert "allocation a1" in status.reason
    rig.pass_time(7_200)
    assert rig.status().state is MigState.PENDING
    rig.users["GPU-0"] = NOBODY_THERE
    rig.pass_time(10)
    assert rig.status().state is MigState.SUCCESS


def test_asked_for_takes_the_place_of_declared_that_waits() -> None:
    rig = a_stage()
    rig.users["GPU-0"] = an_allocation(rig)
    declare(rig)
    rig.users["GPU-0"] = NOBODY_THERE
    rig.apply(QUARTERS)
    assert shown(rig) == "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3"
    rig.pass_time(60)
    assert shown(rig) == "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3"


def test_what_was_applied_is_made_anew_after_a_reboot() -> None:
    rig = a_stage(None, H100_80GB)
    rig.apply(Wanted(True, (("3g.40gb", 2),)))
    rig.drivers = [MemoryDriver(H100_80GB, is_enabled=False)]  # the mode is lost with the driver
    rig.start()
    assert shown(rig) == "3g.40gb@0 3g.40gb@4"
    assert rig.status().state is MigState.SUCCESS


def test_configuration_wins_over_what_was_applied_only_when_it_says_something_new() -> None:
    rig = declare(a_stage())
    rig.apply(QUARTERS)
    rig.start()
    assert shown(rig) == "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3"
    declare(rig, Wanted(True, (("4g.24gb", 1),)))
    assert shown(rig) == "4g.24gb@0"


def test_what_is_no_longer_configured_is_left_as_it_is() -> None:
    rig = declare(a_stage())
    rig.declared = {}
    rig.start()
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"
    rig.drivers[0].reset()
    rig.start()
    assert shown(rig) == "no instances"
    assert not rig.status().is_withheld


def test_configuration_that_changes_while_the_old_one_waits() -> None:
    rig = a_stage()
    rig.users["GPU-0"] = an_allocation(rig)
    declare(rig)
    declare(rig, Wanted(True, (("4g.24gb", 1),)))
    assert rig.status().state is MigState.SUCCESS
    assert shown(rig) == "4g.24gb@0"


def test_what_somebody_else_changes_is_told_and_withheld_and_not_fought() -> None:
    rig = declare(a_stage())
    rig.drivers[0].reset()
    steps = len(rig.steps)
    rig.send(on.PartitionsRead((rig.gpu,)))
    status = rig.status()
    assert status.state is MigState.FAILED
    assert status.reason == "it was changed by somebody else since, and has no instances"
    assert status.is_withheld
    assert len(rig.steps) == steps
    rig.apply(HALVES)
    assert rig.status().state is MigState.SUCCESS


def test_gpu_that_comes_later_gets_what_is_declared_for_it() -> None:
    rig = declare(a_stage(gpus=2))
    one, two = rig.drivers
    rig.send(on.PartitionsRead((one.gpu,)))
    two.reset()
    rig.send(on.PartitionsRead((one.gpu, two.gpu)))
    assert shown(rig, 1) == "2g.12gb@0 2g.12gb@2"


def test_configuration_that_is_told_again_changes_nothing() -> None:
    rig = declare(a_stage())
    rig.drivers[0].reset()
    rig.send(on.PartitionsRead((rig.gpu,)), on.Configured(rig.declared))
    assert shown(rig) == "no instances"
    rig.send(on.Configured({"GPU-0": Declared(QUARTERS, "site")}))
    assert shown(rig) == "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3"


def test_undo_makes_what_was_declared_before_count_again() -> None:
    rig = declare(a_stage())
    rig.apply(QUARTERS)
    rig.undo()
    rig.drivers[0].reset()
    rig.start()
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"
    assert rig.status().config == "site"
