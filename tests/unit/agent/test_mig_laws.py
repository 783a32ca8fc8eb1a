"""What holds of partitions whatever is asked, whoever comes and goes, and whenever it crashes."""

from collections.abc import Callable
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mig_memory import Crashed, MemoryDriver, Stage, a_user, never

from stoker.agent.mig.comparing import is_as_wanted, target_of, wanted_of_target
from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd
from stoker.agent.mig.operations import UNBEGUN_STATES, Declared
from stoker.agent.partitions import Target
from stoker.core.mig.boards import A30_24GB, H100_80GB
from stoker.core.mig.geometry import MigState, Wanted
from stoker.core.mig.layouts import layouts, maximal_layouts

Happening = Callable[[Stage], None]
WISHES = [
    Wanted(False),
    *(wanted_of_target(Target(True, each)) for each in layouts(A30_24GB.geometry)),
]
BIG_WISHES = [
    Wanted(False),
    *(wanted_of_target(Target(True, each)) for each in maximal_layouts(H100_80GB.geometry)),
]


def wish(gpu: int, choice: int) -> Wanted:
    wishes = BIG_WISHES if gpu else WISHES
    return wishes[choice % len(wishes)]


def asks(number: int, gpu: int, choice: int, drain: float, evict: bool) -> Happening:
    def happen(stage: Stage) -> None:
        wanted = {f"GPU-{gpu}": wish(gpu, choice)}
        stage.apply(wanted, f"op{number}", drain_seconds=drain, evict=evict)

    return happen


def undoes(number: int) -> Happening:
    def happen(stage: Stage) -> None:
        stage.undo(f"undo{number}")

    return happen


def uses(gpu: int, place: int) -> Happening:
    """Somebody begins to use an instance; nobody else does."""

    def happen(stage: Stage) -> None:
        driver = stage.drivers[gpu]
        instances = [each for each in driver.gpu.instances if each.compute_instances]
        if not instances:
            return leaves(gpu)(stage)
        id_ = instances[place % len(instances)].id
        driver.busy = {id_}
        foreign = (ProcessToEnd(7, None, id_),)
        stage.see(driver.gpu.uuid, GpuUsers({id_: (a_user(driver.gpu),)}, foreign=foreign))
        return None

    return happen


def leaves(gpu: int) -> Happening:
    def happen(stage: Stage) -> None:
        stage.drivers[gpu].busy = set()
        stage.see(stage.drivers[gpu].gpu.uuid)

    return happen


def opens(gpu: int, is_open: bool) -> Happening:
    """Somebody opens the GPU, or closes it: while it is open, its mode does not change."""
    return lambda stage: setattr(stage.drivers[gpu], "is_open", is_open)


def resets(gpu: int) -> Happening:
    def happen(stage: Stage) -> None:
        leaves(gpu)(stage)
        stage.drivers[gpu].reset()
        stage.start()

    return happen


def crashes(after: int) -> Happening:
    """The agent will be killed after so many actions."""
    return lambda stage: setattr(stage, "crash_after", after)


def breaks(step: int, effect: str) -> Happening:
    """The step that comes so many steps from now fails."""

    def happen(stage: Stage) -> None:
        begun = len(stage.steps)
        stage.fails = lambda number, _: effect if number == begun + step else ""

    return happen


def waits(seconds: float) -> Happening:
    return lambda stage: stage.pass_time(seconds)


GPUS = st.integers(0, 1)
HAPPENINGS = st.one_of(
    st.builds(
        asks,
        st.integers(0, 9),
        GPUS,
        st.integers(0, 40),
        st.sampled_from([0.0, 30.0]),
        st.booleans(),
    ),
    st.builds(undoes, st.integers(0, 9)),
    st.builds(uses, GPUS, st.integers(0, 6)),
    st.builds(leaves, GPUS),
    st.builds(opens, GPUS, st.booleans()),
    st.builds(resets, GPUS),
    st.builds(crashes, st.integers(0, 40)),
    st.builds(breaks, st.integers(0, 12), st.sampled_from(["before", "after"])),
    st.builds(waits, st.sampled_from([1.0, 29.0, 100.0])),
)


def is_whole(stage: Stage, index: int) -> bool:
    """Whether nothing on the GPU is half made."""
    return all(each.compute_instances for each in stage.drivers[index].gpu.instances)


def check(stage: Stage) -> None:
    """What holds whenever the agent waits for something to happen."""
    assert not stage.has_let_go
    assert not stage.keeper.is_busy or any(
        stage.status(index).state is MigState.REBOOT_REQUIRED for index in (0, 1)
    )
    for index in (0, 1):
        gpu, status = stage.drivers[index].gpu, stage.status(index)
        record = stage.keeper.book.of(gpu.uuid)
        operation = record.operation
        if operation is None:
            continue
        if operation.is_stuck:
            assert status.is_withheld
            assert "going back failed too" in status.reason
            continue
        if operation.state is MigState.REBOOT_REQUIRED:
            assert gpu.is_pending != gpu.is_enabled
        elif operation.state in UNBEGUN_STATES:
            assert status.reason
            assert stage.keeper.due is not None
        else:
            assert is_whole(stage, index)
        if status.state is MigState.SUCCESS and record.declared is not None:
            assert is_as_wanted(gpu, record.declared.wanted)
            assert not status.is_withheld


@settings(max_examples=60)
@given(st.lists(HAPPENINGS, min_size=1, max_size=25))
def test_whatever_happens_nothing_is_left_half_made(happenings: list[Happening]) -> None:
    stage = Stage(
        [MemoryDriver(A30_24GB), MemoryDriver(H100_80GB, index=1, is_enabled=False)],
        declared={"GPU-0": Declared(WISHES[3], "site")},
    ).start()
    for happen in happenings:
        try:
            happen(stage)
        except Crashed:
            with suppress(Crashed):
                stage.start()
        check(stage)
    # Once nothing fails any more and everybody has left, all that was asked for comes to its end.
    stage.crash_after, stage.fails = None, never
    for index, driver in enumerate(stage.drivers):
        driver.busy, driver.is_open = set(), False
        stage.users.pop(driver.gpu.uuid, None)
        stage.start()
        stage.pass_time(200)
        assert is_whole(stage, index)
        assert driver.gpu.is_enabled == driver.gpu.is_pending
        assert stage.status(index).state in (None, MigState.SUCCESS, MigState.FAILED)
        declared = stage.keeper.book.of(driver.gpu.uuid).declared
        if declared is not None:
            assert is_as_wanted(driver.gpu, declared.wanted), target_of(driver.gpu)
            assert not stage.status(index).is_withheld
    assert stage.keeper.due is None
