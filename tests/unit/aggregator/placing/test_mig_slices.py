"""Tables of where GPU instances go are what their definition says, and pools go by them."""

import sys
from collections.abc import Sequence
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.aggregator.placing.mig_slices import (
    Choice,
    Shape,
    SlicePolicy,
    SlicePool,
    SliceTable,
    pool_of,
    table_of,
)
from stoker.core.mig.boards import A30_24GB, A100_40GB, BOARDS, H100_80GB, RTX_PRO_6000, Board
from stoker.core.mig.geometry import Geometry

MIX = (("1g.5gb", 5.0), ("1g.10gb", 4.0), ("3g.20gb", 1.0), ("7g.40gb", 5.0))


def places(shape: Shape, mask: int) -> list[int]:
    return [start for start in shape.starts if not mask & shape.mask(start)]


def unusable(shape: Shape, mask: int, slices: int) -> int:
    """How many idle slices no instance of the shape can take."""
    usable = 0
    for start in places(shape, mask):
        usable |= shape.mask(start)
    return slices - mask.bit_count() - usable.bit_count()


def best(table: SliceTable, mask: int, profile: str) -> Choice | None:
    return table.choices[table.shape_of[profile]].get(mask)


def reachable(shapes: Sequence[Shape]) -> set[int]:
    found = {0}
    todo = [0]
    while todo:
        mask = todo.pop()
        after = {mask | shape.mask(start) for shape in shapes for start in places(shape, mask)}
        todo += after - found
        found |= after
    return found


@pytest.mark.parametrize("board", [A30_24GB, A100_40GB, RTX_PRO_6000], ids=lambda each: each.name)
@pytest.mark.parametrize("policy", [SlicePolicy.FRAGMENTATION, SlicePolicy.EXPECTED_FRAGMENTATION])
def test_fragmentation_grows_least(board: Board, policy: SlicePolicy) -> None:
    geometry = board.geometry
    mix = MIX if board is A100_40GB and policy is SlicePolicy.EXPECTED_FRAGMENTATION else ()
    table = table_of(geometry, policy, mix)
    total = sum(share for _, share in mix)
    shares = [0.0] * len(table.shapes) if mix else [1 / len(table.shapes)] * len(table.shapes)
    for profile, share in mix:
        shares[table.shape_of[profile]] += share / total

    def fragmented(mask: int) -> float:
        return sum(
            share * unusable(shape, mask, geometry.memory_slices)
            for share, shape in zip(shares, table.shapes, strict=True)
        )

    for mask in reachable(table.shapes):
        for number, shape in enumerate(table.shapes):
            growths = {
                start: fragmented(mask | shape.mask(start)) - fragmented(mask)
                for start in places(shape, mask)
            }
            choice = table.choices[number].get(mask)
            assert (choice is None) == (not growths)
            if choice is not None:
                least = min(growths.values())
                assert growths[choice.start] == pytest.approx(least)
                # Idle slices shrink by as many wherever it goes: that decides nothing.
                assert choice.cost - shape.size == pytest.approx(least)


@pytest.mark.parametrize("board", BOARDS, ids=lambda each: each.name)
@pytest.mark.parametrize("policy", SlicePolicy)
def test_every_free_place_is_found_and_nothing_overlaps(board: Board, policy: SlicePolicy) -> None:
    table = table_of(board.geometry, policy)
    for profile in board.geometry.profiles:
        shape = Shape(profile.memory_slices, profile.starts)
        for mask in table.worth:
            choice = best(table, mask, profile.name)
            assert (choice is not None) == bool(places(shape, mask)), (profile.name, mask)
            if choice is not None:
                assert choice.start in places(shape, mask)


@pytest.mark.parametrize(
    ("profile", "mask", "start"),
    [
        ("3g.40gb", 0b00000000, 4),  # where 4g has no place
        ("3g.40gb", 0b11110000, 0),
        ("2g.20gb", 0b11110001, 2),  # beside a pair that is broken
        ("2g.20gb", 0b00110000, 0),
        ("1g.10gb", 0b11110001, 1),  # the rest of a pair that is broken already
        ("1g.10gb", 0b11111100, 0),
        ("1g.20gb", 0b00110001, 6),  # where 2g has no place
        ("1g.10gb+me", 0b11110001, 1),  # as its plain twin
        ("7g.80gb", 0b00000000, 0),
        ("7g.80gb", 0b00000001, None),
    ],
)
def test_where_ours_puts_an_instance(profile: str, mask: int, start: int | None) -> None:
    choice = best(table_of(H100_80GB.geometry), mask, profile)
    assert (None if choice is None else choice.start) == start


def test_a_begun_gpu_goes_before_an_idle_one() -> None:
    table = table_of(H100_80GB.geometry)
    pool = pool_of(table, [0b0, 0b01111111, 0b00111111, 0b00001111])
    assert pool.find(table.shape_of["1g.10gb"]) == (2, 6)
    assert pool_of(table, [0b1, 0b10000]).find(table.shape_of["7g.80gb"]) is None


def brute_force(table: SliceTable, shape: int, masks: Sequence[int]) -> float | None:
    costs = [each.cost for mask in masks if (each := table.choices[shape].get(mask)) is not None]
    return min(costs, default=None)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(SlicePolicy),
    geometry=st.sampled_from([A100_40GB.geometry, A30_24GB.geometry, RTX_PRO_6000.geometry]),
    gpus=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_pool_finds_the_best_there_is(
    policy: SlicePolicy, geometry: Geometry, gpus: int, seed: int
) -> None:
    """As instances come and go the pool finds what looking at every GPU would find."""
    rng = Random(seed)
    table = table_of(geometry, policy)
    pool = pool_of(table, [0] * gpus)
    there: list[tuple[int, int]] = []
    for _ in range(120):
        if there and rng.random() < 0.4:
            gpu, taken = there.pop(rng.randrange(len(there)))
            pool.change(gpu, pool.masks[gpu] & ~taken)
            continue
        shape = rng.randrange(len(table.shapes))
        best = brute_force(table, shape, pool.masks)
        found = pool.find(shape)
        assert (found is None) == (best is None)
        if found is None:
            continue
        gpu, start = found
        choice = table.choices[shape][pool.masks[gpu]]
        assert (choice.start, choice.cost) == (start, best)
        if table.is_by_number:
            equals = [table.choices[shape].get(mask) for mask in pool.masks]
            assert gpu == next(
                number
                for number, each in enumerate(equals)
                if each is not None and each.cost == best
            )
        taken = table.shapes[shape].mask(start)
        assert not pool.masks[gpu] & taken
        pool.change(gpu, pool.masks[gpu] | taken)
        there.append((gpu, taken))


def lines_run(pool: SlicePool, number: int) -> int:
    """How many lines a decision and the change that it makes take to run."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = pool.find(number)
        assert found is not None
        pool.change(found[0], pool.masks[found[0]] | pool.table.shapes[number].mask(found[1]))
    finally:
        sys.settrace(before)
    return count


def test_a_decision_takes_as_long_on_a_large_fleet() -> None:
    table = table_of(A100_40GB.geometry)
    masks = [0b0, 0b1, 0b1111, 0b110000, 0b11110011]
    for number in range(len(table.shapes)):
        few, many = (lines_run(pool_of(table, masks * times), number) for times in (3, 4000))
        assert few == many
