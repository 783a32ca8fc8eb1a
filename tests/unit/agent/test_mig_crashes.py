"""A crash after every action, and a failure at every step: a GPU ends as before or as wanted."""

from contextlib import suppress
from itertools import product
from random import Random

import pytest
from tests.support.mig_memory import Crashed, Fails, MemoryDriver, Stage, as_target, never

from stoker.agent.mig.comparing import is_as_wanted, wanted_of_target
from stoker.agent.mig.operations import Declared
from stoker.agent.partitions import Target
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB, Board
from stoker.core.mig.geometry import Layout, MigState, Placed, Wanted
from stoker.core.mig.layouts import layouts

# Before and after, or None: MIG mode off.
Pair = tuple[Layout | None, Layout | None]


def stage(board: Board, before: Layout | None) -> Stage:
    return Stage([MemoryDriver(board, before or (), is_enabled=before is not None)]).start()


def wanted(layout: Layout | None) -> Wanted:
    return wanted_of_target(Target(layout is not None, layout or ()))


def fails_at(number: int, effect: str) -> Fails:
    return lambda each, _: effect if each == number else ""


def fails_from(number: int) -> Fails:
    return lambda each, _: "before" if each >= number else ""


def every_pair(board: Board) -> list[Pair]:
    every = [None, *layouts(board.geometry)]
    return [(before, after) for before, after in product(every, every) if before != after]


def some_pairs(board: Board, count: int) -> list[Pair]:
    every = [None, *layouts(board.geometry, plain=False)]
    rng = Random(board.name)
    return [(rng.choice(every), rng.choice(every)) for _ in range(count)]


PARTS: list[Pair] = [
    ((Placed(0, 4, "3g.20gb", (1, 1)),), (Placed(0, 4, "3g.20gb", (2, 1)),)),
    ((Placed(0, 4, "4g.20gb"),), (Placed(0, 4, "4g.20gb", (2, 1, 1)),)),
    ((Placed(0, 4, "3g.20gb", (1, 1, 1)),), (Placed(0, 4, "4g.20gb", (2,)),)),
]
CASES = [
    pytest.param(A30_24GB, some_pairs(A30_24GB, 20), id="A30, sampled"),
    pytest.param(A30_24GB, every_pair(A30_24GB), id="A30, every", marks=pytest.mark.slow),
    pytest.param(A100_40GB, PARTS, id="A100, compute instances"),
    pytest.param(A100_40GB, some_pairs(A100_40GB, 3), id="A100, sampled"),
    pytest.param(H100_80GB, some_pairs(H100_80GB, 3), id="H100, sampled"),
    pytest.param(A100_40GB, some_pairs(A100_40GB, 100), id="A100, many", marks=pytest.mark.slow),
]


def assert_says_how_it_is(stage: Stage, before: Target) -> None:
    """The GPU is as before or as wanted, nothing half made, and what is told of it is true."""
    now, status = as_target(stage.gpu), stage.status()
    if status.state is MigState.SUCCESS:
        operation = stage.keeper.book.of(stage.gpu.uuid).operation
        assert operation is not None
        assert is_as_wanted(stage.gpu, operation.wanted)
    else:
        assert now == before
        assert status.state in (None, MigState.FAILED), status
        if status.state is MigState.FAILED:
            assert "old layout" in status.reason or "nothing was changed" in status.reason
    assert not status.is_withheld
    assert not stage.has_let_go
    assert stage.keeper.due is None


@pytest.mark.parametrize(("board", "pairs"), CASES)
def test_crash_after_every_action(board: Board, pairs: list[Pair]) -> None:
    """After the next start the operation has come to its end, or was never begun."""
    for before, after in pairs:
        smooth = stage(board, before)
        smooth.apply(wanted(after))
        assert smooth.status().state is MigState.SUCCESS
        for crash_after in range(len(smooth.actions)):
            crashed = stage(board, before)
            old = as_target(crashed.gpu)
            crashed.crash_after = crash_after
            with suppress(Crashed):
                crashed.apply(wanted(after))
            crashed.crash_after = None
            assert_says_how_it_is(crashed.start(), old)
            # Whoever asked does not know what became of it, and asks again.
            crashed.apply(wanted(after))
            assert crashed.status().state is MigState.SUCCESS
            assert is_as_wanted(crashed.gpu, wanted(after))


@pytest.mark.parametrize("effect", ["before", "after"])
@pytest.mark.parametrize(("board", "pairs"), CASES)
def test_failure_at_every_step(board: Board, pairs: list[Pair], effect: str) -> None:
    """Before the step took effect, or after it did: the old layout is made again."""
    for before, after in pairs:
        smooth = stage(board, before)
        smooth.apply(wanted(after))
        for number in range(len(smooth.steps)):
            failed = stage(board, before)
            old = as_target(failed.gpu)
            failed.fails = fails_at(number, effect)
            failed.apply(wanted(after))
            assert failed.status().state is MigState.FAILED
            assert as_target(failed.gpu) == old
            assert_says_how_it_is(failed, old)


@pytest.mark.parametrize(("board", "pairs"), CASES)
def test_way_back_that_fails_is_told_and_tried_again_by_the_next_start(
    board: Board, pairs: list[Pair]
) -> None:
    for before, after in pairs[:20]:
        smooth = stage(board, before)
        smooth.apply(wanted(after))
        for number in range(1, len(smooth.steps)):
            stuck = stage(board, before)
            old = as_target(stuck.gpu)
            stuck.fails = fails_from(number)
            stuck.apply(wanted(after))
            status = stuck.status()
            assert status.state is MigState.FAILED
            assert status.is_withheld
            assert "going back failed too" in status.reason
            assert "the GPU has" in status.reason
            stuck.fails = never
            stuck.start()
            assert as_target(stuck.gpu) == old
            assert_says_how_it_is(stuck, old)


@pytest.mark.parametrize(("board", "pairs"), CASES)
def test_crash_on_the_way_back(board: Board, pairs: list[Pair]) -> None:
    for before, after in pairs[:1]:
        smooth = stage(board, before)
        smooth.apply(wanted(after))
        for number, crash_after in product(range(0, len(smooth.steps), 3), range(0, 60, 4)):
            crashed = stage(board, before)
            old = as_target(crashed.gpu)
            crashed.fails = fails_at(number, "after")
            crashed.crash_after = crash_after
            with suppress(Crashed):
                crashed.apply(wanted(after))
            crashed.crash_after, crashed.fails = None, never
            assert_says_how_it_is(crashed.start(), old)


def test_declared_layout_survives_a_crash_at_every_action() -> None:
    layout = (Placed(0, 4, "3g.40gb"), Placed(4, 4, "3g.40gb"))
    declared = {"GPU-0": Declared(wanted(layout), "two")}
    for crash_after in range(40):
        crashed = Stage([MemoryDriver(H100_80GB, is_enabled=False)], declared=declared)
        crashed.crash_after = crash_after
        with suppress(Crashed):
            crashed.start()
        crashed.crash_after = None
        crashed.start()
        assert crashed.status().state is MigState.SUCCESS
        assert as_target(crashed.gpu) == Target(True, layout)
