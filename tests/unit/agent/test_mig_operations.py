"""Operations on partitions, told as stories: what happens, what is done, how it ends."""

from dataclasses import replace

import msgspec
import pytest
from tests.support.mig_memory import NOW, a_user, never
from tests.support.mig_stories import (
    HALVES,
    OFF,
    QUARTERS,
    WHOLE,
    a_process,
    a_stage,
    an_allocation,
    declare,
    shown,
)

from stoker.agent.mig import actions as do
from stoker.agent.mig import events as on
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers, ProcessToEnd
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.operations import KNOWN_MAX, Book, Declared
from stoker.agent.partitions import CreateGpuInstance, SetMode
from stoker.core.mig.boards import A30_24GB, H100_80GB
from stoker.core.mig.geometry import MigState, Placed, Wanted
from stoker.core.mig.reports import InTheWay

# --- asked, and done


def test_operation_is_noted_before_its_first_step_and_after_each() -> None:
    rig = a_stage()
    done = rig.apply(HALVES)
    kinds = [type(each).__name__ for each in done if not isinstance(each, do.Report)]
    step = ["DoStep", "ReadPartitions", "Save"]
    assert kinds == [
        *("Save", "Answer", "ReadPartitions", "LookForUsers", "Save"),
        *(6 * step),
        "Save",
    ]
    assert shown(rig) == "2g.12gb@0 2g.12gb@2"
    status = rig.status()
    assert (status.state, status.config, status.operation_id) == (MigState.SUCCESS, "wish", "op")
    assert not status.is_withheld
    assert status.changed_at == NOW


def test_states_on_the_way_are_reported() -> None:
    rig = a_stage()
    reports = [each.gpus[0] for each in rig.apply(HALVES) if isinstance(each, do.Report)]
    states = list(dict.fromkeys(each.state for each in reports))
    assert states == [MigState.PENDING, MigState.APPLYING, MigState.SUCCESS]
    assert all(each.is_withheld for each in reports[:-1])


def test_progress_is_told_in_steps() -> None:
    rig = a_stage()
    rig.fails = lambda number, _: "" if number < 3 else "before"
    rig.apply(HALVES)
    (facts,) = rig.keeper.facts()
    assert facts.state == "failed"
    assert facts.operation_id == "op"
    rig = a_stage()
    rig.apply(HALVES)
    (facts,) = rig.keeper.facts()
    assert (facts.steps_done, facts.steps_total) == (6, 6)
    assert facts.undo == "4g.24gb@0"
    assert facts.pci_device_id == "0x20B710DE"


def test_applying_twice_changes_nothing() -> None:
    rig = a_stage()
    rig.apply(HALVES)
    before = rig.gpu
    for operation in ("op", "another"):
        done = rig.apply(HALVES, operation)
        assert not [each for each in done if isinstance(each, do.DoStep)]
        assert rig.status().state is MigState.SUCCESS
        assert rig.gpu == before
    # What changed nothing is nothing to go back to.
    rig.undo()
    assert shown(rig) == "4g.24gb@0"


def test_operation_that_is_known_is_not_begun_again() -> None:
    rig = a_stage()
    rig.apply(HALVES, "first")
    rig.apply(QUARTERS, "second")
    done = rig.apply(HALVES, "first")
    assert [type(each) for each in done] == [do.Answer]
    assert shown(rig) == "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3"


def test_only_so_many_operations_are_remembered() -> None:
    rig = a_stage()
    for number in range(KNOWN_MAX + 5):
        rig.apply(HALVES, f"op{number}")
    record = rig.keeper.book.of(rig.gpu.uuid)
    assert len(record.known) == KNOWN_MAX
    assert record.knows("op20")
    assert not record.knows("op4")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wanted(True, (("3g.20gb", 1),)), "MIG device '3g.20gb' is not offered"),
        (Wanted(True, (("2g.12gb", 3),)), "at most 2 2g.12gb, not 3"),
    ],
)
def test_what_is_illegal_on_one_gpu_is_refused_for_all(wish: Wanted, reason: str) -> None:
    rig = a_stage(gpus=2)
    done = rig.apply({"GPU-0": HALVES, "GPU-1": wish})
    (answer,) = done
    assert isinstance(answer, do.Answer)
    assert reason in answer.refusal
    assert "GPU-1" in answer.refusal
    assert rig.status().state is None


def test_gpu_that_is_not_there_is_refused_with_those_that_are() -> None:
    rig = a_stage()
    rig.apply({"GPU-9": HALVES})
    rig.send(on.ApplyAsked(1, "op", {}))
    assert list(rig.answers()) == [
        "GPU-9 has no partitions here; the GPUs that do: GPU-0",
        "no GPU of this node is meant by it",
    ]


def test_gpus_have_their_turn_one_after_the_other() -> None:
    rig = a_stage(gpus=3)
    done = rig.apply({f"GPU-{index}": HALVES for index in (2, 0, 1)})
    order = [each.gpu_uuid for each in done if isinstance(each, do.DoStep)]
    assert order == [f"GPU-{index}" for index in range(3) for _ in range(6)]


def test_another_operation_waits_for_none_and_interrupts_none() -> None:
    rig = a_stage()
    keeper = rig.keeper
    declared = {"GPU-0": Declared(HALVES, "wish")}
    (save, *_) = keeper.handle(on.ApplyAsked(1, "one", declared), NOW)
    assert isinstance(save, do.Save)
    keeper.handle(on.Saved(save.ticket), NOW)
    keeper.handle(on.PartitionsRead((rig.gpu,), is_all=False), NOW)
    ticket = save.ticket + 1
    keeper.handle(on.UsersSeen({"GPU-0": NOBODY_THERE}, ticket), NOW)
    assert keeper.is_busy
    (answer,) = keeper.handle(on.ApplyAsked(2, "two", declared), NOW)
    assert answer == do.Answer(2, "GPU-0: operation one (wish) is applying")


# --- who is in the way


def test_without_time_to_leave_a_user_is_a_refusal_and_nothing_is_touched() -> None:
    rig = a_stage()
    rig.see("GPU-0", a_process(rig, "process 7 (python, bob)"))
    rig.apply(HALVES)
    status = rig.status()
    assert status.state is MigState.FAILED
    assert status.reason == (
        "GPU-0: 4g.24gb@0 would have to go, and is in use by process 7 (python, bob)"
    )
    assert not rig.steps
    assert not status.is_withheld
    assert rig.keeper.due is None


def test_user_who_leaves_in_time_lets_it_go_on() -> None:
    rig = a_stage()
    rig.see("GPU-0", an_allocation(rig))
    rig.apply(HALVES, drain_seconds=600)
    status = rig.status()
    assert (status.state, status.leave_by) == (MigState.DRAINING, NOW + 600)
    assert status.is_withheld
    assert status.leaving_allocation_ids == ("a1",)
    assert not status.is_evicting
    rig.pass_time(60)
    assert not rig.steps
    rig.see("GPU-0")
    assert rig.status().state is MigState.SUCCESS
    assert rig.status().leave_by is None
    assert rig.status().leaving_allocation_ids == ()


def test_user_who_does_not_leave_in_time_is_a_refusal() -> None:
    rig = a_stage()
    rig.see("GPU-0", an_allocation(rig))
    rig.apply(HALVES, drain_seconds=600)
    rig.pass_time(599)
    assert rig.status().state is MigState.DRAINING
    rig.pass_time(2)
    status = rig.status()
    assert status.state is MigState.FAILED
    assert "not left in time" in status.reason
    assert "allocation a1 (alice, no process)" in status.reason
    assert not rig.steps
    assert not rig.ended


def test_only_who_is_on_what_goes_is_asked_to_leave() -> None:
    rig = a_stage((Placed(0, 2, "2g.12gb"), Placed(2, 2, "2g.12gb")))
    left, right = rig.gpu.instances
    users = {
        each.id: (InTheWay("allocation", name, (), allocation_id=name),)
        for each, name in ((left, "a1"), (right, "a2"))
    }
    rig.see("GPU-0", GpuUsers(users))
    rig.apply(Wanted(True, (("2g.12gb", 1), ("1g.6gb", 2))), drain_seconds=60)
    assert rig.status().leaving_allocation_ids == ("a1",)


def test_evicted_are_foreign_processes_on_what_goes_and_only_after_the_deadline() -> None:
    rig = a_stage((Placed(0, 2, "2g.12gb"), Placed(2, 2, "2g.12gb")))
    left, right = rig.gpu.instances
    users = GpuUsers(
        {left.id: (a_user(rig.gpu),), right.id: (a_user(rig.gpu, "process 8 (python, eve)"),)},
        foreign=(ProcessToEnd(7, NOW, left.id), ProcessToEnd(8, NOW, right.id)),
    )
    rig.see("GPU-0", users)
    rig.apply(Wanted(True, (("2g.12gb", 1), ("1g.6gb", 2))), drain_seconds=60, evict=True)
    rig.pass_time(59)
    assert rig.status().is_evicting
    assert not rig.ended
    rig.pass_time(2)
    assert set(rig.ended) == {ProcessToEnd(7, NOW, left.id)}
    rig.see("GPU-0", replace(users, instances={right.id: users.instances[right.id]}))
    assert rig.status().state is MigState.SUCCESS
    assert shown(rig) == "2g.12gb@2 1g.6gb@0 1g.6gb@1"


def test_who_cannot_be_made_to_go_is_a_refusal_in_the_end() -> None:
    rig = a_stage()
    rig.see("GPU-0", an_allocation(rig))
    rig.apply(HALVES, evict=True)
    assert rig.status().is_evicting
    rig.pass_time(59)
    assert rig.status().state is MigState.DRAINING
    rig.pass_time(10)
    assert rig.status().state is MigState.FAILED
    assert "not all could be made to go" in rig.status().reason
    assert not rig.ended  # an allocation is the aggregator's to end
    assert not rig.steps


def test_look_that_tells_nothing_of_the_gpu_is_no_look_at_an_idle_one() -> None:
    rig = a_stage()
    keeper = rig.keeper
    (save, *_) = keeper.handle(on.ApplyAsked(1, "op", {"GPU-0": Declared(HALVES, "wish")}), NOW)
    assert isinstance(save, do.Save)
    keeper.handle(on.Saved(save.ticket), NOW)
    keeper.handle(on.PartitionsRead((rig.gpu,), is_all=False), NOW)
    keeper.handle(on.UsersSeen({}, save.ticket + 1), NOW)
    assert rig.status().state is MigState.FAILED
    assert "whoever else uses it: nobody has told who it is" in rig.status().reason


def test_user_who_comes_after_the_look_makes_the_driver_refuse_and_the_old_layout_stays() -> None:
    rig = a_stage()
    rig.drivers[0].busy = {rig.gpu.instances[0].id}
    rig.apply(HALVES)
    status = rig.status()
    assert status.state is MigState.FAILED
    assert "in use by another client" in status.reason
    assert "nothing was changed: 4g.24gb@0" in status.reason
    assert shown(rig) == "4g.24gb@0"


# --- what goes wrong around it


def test_what_cannot_be_noted_is_not_begun() -> None:
    rig = a_stage()
    rig.saving_fails = "mig.json: no space left on device"
    rig.apply(HALVES)
    assert list(rig.answers()) == ["it cannot be noted down: mig.json: no space left on device"]
    assert rig.status().state is None
    assert not rig.status().is_withheld
    assert not rig.steps


def test_first_step_is_not_done_unless_it_was_noted_that_there_will_be_steps() -> None:
    rig = a_stage()
    rig.see("GPU-0", an_allocation(rig))
    rig.apply(HALVES, drain_seconds=60)
    rig.saving_fails = "no space left on device"
    rig.see("GPU-0")
    assert not rig.steps
    assert rig.status().state is MigState.FAILED
    assert rig.status().reason == "it cannot be noted down: no space left on device"


def test_disk_that_fills_up_on_the_way_stops_nothing() -> None:
    rig = a_stage()

    def fill(number: int, _step: object) -> str:
        rig.saving_fails = "no space left on device"
        return ""

    rig.fails = fill
    rig.apply(HALVES)
    assert rig.status().state is MigState.SUCCESS
    rig.saving_fails, rig.fails = "", never
    rig.start()
    assert rig.status().state is MigState.SUCCESS


def test_reading_that_fails_is_tried_again_and_then_told() -> None:
    rig = a_stage()
    keeper, uuid = rig.keeper, rig.gpu.uuid
    (save, *_) = keeper.handle(on.ApplyAsked(1, "op", {uuid: Declared(HALVES, "wish")}), NOW)
    assert isinstance(save, do.Save)
    now = NOW
    actions = keeper.handle(on.Saved(save.ticket), now)
    for _ in range(2):
        assert do.ReadPartitions(uuid) in actions
        keeper.handle(on.ReadingFailed(uuid, "the helper is not there"), now)
        assert keeper.due is not None
        now = keeper.due
        actions = keeper.handle(on.Ticked(), now)
    keeper.handle(on.ReadingFailed(uuid, "the helper is not there"), now)
    assert rig.status().state is MigState.FAILED
    assert rig.status().reason == ("its partitions cannot be told: the helper is not there")
    (facts,) = keeper.facts()
    assert facts.unread == "the helper is not there"


def test_driver_that_says_done_and_does_nothing_is_not_believed() -> None:
    rig = a_stage()
    driver = rig.drivers[0]
    really = driver.do
    driver.do = lambda step: None if isinstance(step, CreateGpuInstance) else really(step)  # type: ignore[method-assign]
    rig.apply(HALVES)
    status = rig.status()
    assert status.state is MigState.FAILED
    assert "the driver did not create GPU instance 2g.12gb@0" in status.reason
    assert "going back failed too" in status.reason
    assert status.is_withheld


def test_late_answers_are_of_the_past() -> None:
    rig = a_stage()
    rig.apply(HALVES)
    late: list[on.MigEvent] = [
        on.StepDone("GPU-0"),
        on.StepFailed("GPU-0", "busy", "too late"),
        on.DriverLetGo(),
        on.LettingGoFailed("too late"),
        on.ProcessesEnded("GPU-0"),
        on.Saved(1),
        on.SavingFailed(2, "too late"),
        on.UsersSeen({"GPU-0": NOBODY_THERE}, 3),
        on.PartitionsRead((rig.gpu,), is_all=False),
        on.Ticked(),
    ]
    for event in late:
        assert rig.keeper.handle(event, NOW) == ()


def test_book_is_the_same_when_it_is_read_again() -> None:
    rig = declare(a_stage(None, H100_80GB), Wanted(True, (("1c.3g.40gb", 2), ("1g.10gb", 1))))
    rig.apply(Wanted(True, (("7g.80gb", 1),)), drain_seconds=5, evict=True)
    rig.fails = lambda _number, step: "before" if isinstance(step, SetMode) else ""
    rig.apply(OFF, "fails")
    book = rig.keeper.book
    assert msgspec.json.decode(msgspec.json.encode(book), type=Book) == book
    assert book.of("GPU-0").undo is not None


def test_nothing_is_begun_before_partitions_are_known() -> None:
    keeper = Keeper("start")
    assert keeper.handle(on.Loaded(Book()), NOW) == ()
    assert keeper.handle(on.UsersSeen({}), NOW) == ()
    assert keeper.statuses() == ()
    assert keeper.facts() == ()


def test_layout_and_geometry_are_told() -> None:
    rig = a_stage()
    assert rig.status().layout == WHOLE
    assert rig.status().geometry == A30_24GB.geometry
