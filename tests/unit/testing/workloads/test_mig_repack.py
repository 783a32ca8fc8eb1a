"""What fits with free migration is what some packing of every GPU holds."""

from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.placing.mig_slices import Shape, plain_profiles
from stoker.core.mig.boards import BOARDS
from stoker.testing.workloads.mig_repack import SEVEN_SLICE_SHAPES, fits

Counts = tuple[int, ...]


@cache
def layouts() -> frozenset[Counts]:
    """How many instances of each shape one GPU can have, in every way."""
    found: set[tuple[int, Counts]] = set()
    todo = [(0, (0,) * len(SEVEN_SLICE_SHAPES))]
    while todo:
        mask, counts = state = todo.pop()
        if state in found:
            continue
        found.add(state)
        for number, shape in enumerate(SEVEN_SLICE_SHAPES):
            for start in shape.starts:
                if not mask & shape.mask(start):
                    more = (*counts[:number], counts[number] + 1, *counts[number + 1 :])
                    todo.append((mask | shape.mask(start), more))
    return frozenset(counts for _, counts in found)


@cache
def packings(gpus: int) -> frozenset[Counts]:
    if gpus == 1:
        return layouts()
    return frozenset(
        tuple(map(sum, zip(one, others, strict=True)))
        for one in layouts()
        for others in packings(gpus - 1)
    )


def test_one_gpu_exhaustively() -> None:
    for counts in product(range(9), range(6), range(5), range(4), range(3), range(3)):
        assert fits(1, counts) == (counts in layouts()), counts


@given(
    st.tuples(
        *(st.integers(0, most) for most in (14, 8, 6, 4, 2, 2)),
    )
)
def test_two_gpus(counts: Counts) -> None:
    assert fits(2, counts) == (counts in packings(2))


@pytest.mark.parametrize("board", BOARDS, ids=lambda each: each.name)
def test_boards_of_seven_slices_have_these_shapes(board: object) -> None:
    geometry = next(each.geometry for each in BOARDS if each is board)
    shapes = tuple(Shape(each.memory_slices, each.starts) for each in plain_profiles(geometry))
    assert (shapes == SEVEN_SLICE_SHAPES) == (geometry.compute_slices == 7)
