"""What went wrong is not forgotten: what could not be noted down, and what was left half-made."""

import msgspec
from tests.support.mig_memory import MemoryDriver, Stage, a_user

from stoker.agent.mig.in_the_way import GpuUsers
from stoker.agent.mig.operations import Book
from stoker.core.mig.boards import A100_40GB
from stoker.core.mig.geometry import MigState, Placed, Wanted

UUID = "GPU-0"
HALVES = Wanted(True, (("3g.20gb", 2),))
SEVENTHS = Wanted(True, (("1g.5gb", 7),))
WHOLE = (Placed(0, 8, "7g.40gb"),)


def noted_state(stage: Stage) -> MigState:
    operation = msgspec.json.decode(stage.disk, type=Book).of(UUID).operation
    assert operation is not None
    return operation.state


def layout(stage: Stage) -> list[tuple[str, int]]:
    return [(each.profile, each.start) for each in stage.gpu.instances]


def test_an_end_that_could_not_be_noted_down_is_noted_later() -> None:
    stage = Stage([MemoryDriver(A100_40GB, WHOLE)]).start()
    stage.users[UUID] = GpuUsers(everywhere=(a_user(stage.gpu),))
    stage.apply(HALVES, "op-1", drain_seconds=8)
    stage.saving_fails = "no space left on device"
    stage.pass_time(20)
    assert stage.status().state is MigState.FAILED
    assert noted_state(stage) is MigState.DRAINING
    stage.saving_fails = ""
    stage.pass_time(20)
    assert noted_state(stage) is MigState.FAILED
    stage.users.clear()
    stage.start()
    assert (stage.status().state, layout(stage)) == (MigState.FAILED, [("7g.40gb", 0)])


def half_made() -> Stage:
    """A GPU whose first operation could go neither forward nor back, and is used by somebody."""
    stage = Stage([MemoryDriver(A100_40GB)]).start()
    stage.fails = lambda number, _: "before" if number >= 1 else ""
    stage.apply(HALVES, "op-1")
    assert stage.status().state is MigState.FAILED
    assert layout(stage) == [("3g.20gb", 0)]
    assert not stage.gpu.instances[0].compute_instances
    stage.fails = lambda _number, _step: ""
    stage.users[UUID] = GpuUsers(everywhere=(a_user(stage.gpu),))
    return stage


def test_what_is_half_made_is_not_forgotten_for_an_operation_that_does_not_begin() -> None:
    stage = half_made()
    stage.apply(SEVENTHS, "op-2")
    status = stage.status()
    assert (status.state, status.operation_id) == (MigState.FAILED, "op-2")
    assert status.is_withheld
    stage.users.clear()
    stage.start()
    assert stage.status().state is MigState.FAILED
    assert layout(stage) == [], "the layout before the operation that went wrong"
    assert not stage.status().is_withheld


def test_an_operation_that_succeeds_mends_what_was_half_made() -> None:
    stage = half_made()
    stage.users.clear()
    stage.apply(SEVENTHS, "op-2")
    assert stage.status().state is MigState.SUCCESS
    assert not stage.status().is_withheld
    stage.undo("op-3")
    assert layout(stage) == [], "before it there was nothing that anybody wanted"
