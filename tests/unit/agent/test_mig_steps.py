"""The steps from one layout to another: in an order that works, and none too many."""

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mig_memory import MemoryDriver, partitions

from stoker.agent.mig.comparing import layout_of
from stoker.agent.mig.steps import is_there, needs_reset, next_steps, obstacle, sentence
from stoker.agent.partitions import GpuPartitions, SetMode, Step, Target
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000, Board
from stoker.core.mig.geometry import Layout, Placed
from stoker.core.mig.layouts import layouts

ONE_3G = (Placed(4, 4, "3g.20gb"),)
TWO_3G = (Placed(0, 4, "3g.20gb"), *ONE_3G)
SEVEN = tuple(Placed(start, 1, "1g.5gb") for start in range(7))
PARTS = (Placed(4, 4, "3g.20gb", (2, 1)),)


def words(gpu: GpuPartitions, target: Target) -> list[str]:
    assert obstacle(gpu, target) == ""
    return [sentence(each) for each in next_steps(gpu, target)]


@pytest.mark.parametrize(
    ("requirement", "gpu", "target", "expected"),
    [
        ("what is there already takes no step", TWO_3G, TWO_3G, []),
        (
            "an instance is made with its compute instance",
            ONE_3G,
            TWO_3G,
            [
                "create GPU instance 3g.20gb@0",
                "create a compute instance of 3c in the GPU instance at 0",
            ],
        ),
        (
            "compute instances go before the GPU instance, and all goes before anything comes",
            TWO_3G,
            (Placed(0, 4, "4g.20gb"), Placed(4, 4, "3g.20gb")),
            [
                "destroy compute instance 0 of GPU instance 1 (MIG-0-1)",
                "destroy GPU instance 1: 3g.20gb@0",
                "create GPU instance 4g.20gb@0",
                "create a compute instance of 4c in the GPU instance at 0",
            ],
        ),
        (
            "the large ones are made first",
            (),
            (Placed(0, 1, "1g.5gb"), Placed(2, 2, "2g.10gb"), Placed(4, 4, "3g.20gb")),
            [
                "create GPU instance 3g.20gb@4",
                "create GPU instance 2g.10gb@2",
                "create GPU instance 1g.5gb@0",
                "create a compute instance of 3c in the GPU instance at 4",
                "create a compute instance of 2c in the GPU instance at 2",
                "create a compute instance of 1c in the GPU instance at 0",
            ],
        ),
        (
            "other compute instances are wanted: only those change",
            ONE_3G,
            PARTS,
            [
                "destroy compute instance 0 of GPU instance 1 (MIG-0-1)",
                "create a compute instance of 2c in the GPU instance at 4",
                "create a compute instance of 1c in the GPU instance at 4",
            ],
        ),
        (
            "a compute instance that is wanted stays where it is",
            PARTS,
            (Placed(4, 4, "3g.20gb", (2,)),),
            ["destroy compute instance 1 of GPU instance 1 (MIG-0-2)"],
        ),
    ],
)
def test_steps(requirement: str, gpu: Layout, target: Layout, expected: list[str]) -> None:
    assert words(partitions(A100_40GB, gpu), Target(True, target)) == expected


def test_mode_is_turned_on_before_anything_is_made_and_off_after_all_is_gone() -> None:
    off = partitions(A30_24GB, is_enabled=False)
    on = partitions(A30_24GB, (Placed(0, 4, "4g.24gb"),))
    assert words(off, Target(True, layout_of(on))) == [
        "turn MIG mode on",
        "create GPU instance 4g.24gb@0",
        "create a compute instance of 4c in the GPU instance at 0",
    ]
    assert words(on, Target(False)) == [
        "destroy compute instance 0 of GPU instance 1 (MIG-0-1)",
        "destroy GPU instance 1: 4g.24gb@0",
        "turn MIG mode off",
    ]
    assert words(off, Target(True)) == ["turn MIG mode on"]
    assert words(off, Target(False)) == []


def test_nothing_is_done_while_the_wanted_mode_waits_for_a_reset() -> None:
    driver = MemoryDriver(A30_24GB, is_enabled=False, is_open=True)
    driver.do(SetMode(True))
    target = Target(True, (Placed(0, 4, "4g.24gb"),))
    assert needs_reset(driver.gpu, target)
    assert words(driver.gpu, target) == []
    assert not is_there(driver.gpu, target)
    # Without that wish, the mode that is pending is taken back.
    assert words(driver.gpu, Target(False)) == ["turn MIG mode off"]
    driver.reset()
    assert len(words(driver.gpu, target)) == 2


def test_instance_without_compute_instance_is_repaired_where_it_is_wanted_else_destroyed() -> None:
    driver = MemoryDriver(A100_40GB, ONE_3G)
    (destroy, *_) = next_steps(driver.gpu, Target(True))
    driver.do(destroy)
    assert not is_there(driver.gpu, Target(True, ONE_3G))
    assert words(driver.gpu, Target(True, ONE_3G)) == [
        "create a compute instance of 3c in the GPU instance at 4"
    ]
    assert words(driver.gpu, Target(True)) == ["destroy GPU instance 1: 3g.20gb@4"]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ((Placed(1, 2, "2g.10gb"),), "2g.10gb cannot lie at 1"),
        ((Placed(0, 4, "4g.20gb"), Placed(0, 1, "1g.5gb")), "overlap"),
        ((Placed(0, 4, "4g.24gb"),), "4g.24gb is not offered"),
        ((Placed(0, 4, "4g.20gb", (3, 3)),), "6 compute slices of 4"),
    ],
)
def test_obstacle_is_told_before_there_is_a_step(layout: Layout, reason: str) -> None:
    assert reason in obstacle(partitions(A100_40GB), Target(True, layout))


def walk(driver: MemoryDriver, target: Target) -> list[Step]:
    """Do the first of the steps that are left until none is; return all that were done."""
    done: list[Step] = []
    planned = next_steps(driver.gpu, target)
    while steps := next_steps(driver.gpu, target):
        driver.do(steps[0])
        done.append(steps[0])
        assert len(done) <= len(planned), "more steps than were planned"
    assert is_there(driver.gpu, target)
    assert len(done) == len(planned)
    return done


@pytest.mark.parametrize("board", [A30_24GB, RTX_PRO_6000], ids=lambda board: board.name)
def test_steps_lead_from_every_layout_to_every_other(board: Board) -> None:
    every = list(layouts(board.geometry))
    assert len(every) == 26
    for before, after in product(every, every):
        driver = MemoryDriver(board, before)
        walk(driver, Target(True, after))
        assert layout_of(driver.gpu) == after


@pytest.mark.parametrize("board", [A100_40GB, H100_80GB], ids=lambda board: board.name)
def test_steps_lead_from_sampled_layouts_to_others(board: Board) -> None:
    every = list(layouts(board.geometry, plain=False))
    rng = Random(board.name)
    for _ in range(300):
        before, after = rng.choice(every), rng.choice(every)
        driver = MemoryDriver(board, before)
        walk(driver, Target(True, after))
        assert layout_of(driver.gpu) == after


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, ...]:
    """Compute instances that fit into a 4g: in any order of making."""
    found: list[int] = []
    while (left := 4 - sum(found)) and draw(st.booleans()):
        found.append(draw(st.sampled_from([each for each in (1, 2, 4) if each <= left])))
    return tuple(sorted(found, reverse=True)) or (1,)


@given(parts(), parts(), st.sets(st.integers(0, 3)))
def test_compute_instances_change_in_place(
    before: tuple[int, ...], after: tuple[int, ...], gone: set[int]
) -> None:
    """Also where some are gone, so that what is left lies scattered."""

    def placed(compute: tuple[int, ...]) -> Placed:
        return Placed(0, 4, "4g.20gb", () if compute == (4,) else compute)

    driver = MemoryDriver(A100_40GB, (placed(before),))
    (instance,) = driver.gpu.instances
    for step in next_steps(driver.gpu, Target(True)):
        if getattr(step, "compute_instance_id", None) in gone:
            driver.do(step)
    walk(driver, Target(True, (placed(after),)))
    assert layout_of(driver.gpu) == (placed(after),)
    assert driver.gpu.instances[0].id == instance.id
