"""Room for GPU instances is made by few moves that hold in their order, within a budget."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.aggregator.placing.mig_moves import (
    MOVES_MAX,
    LayoutPool,
    MoveBudget,
    Room,
    Spot,
    slices_moved,
)
from stoker.aggregator.placing.mig_slices import SliceTable, table_of
from stoker.core.mig.boards import A30_24GB, A100_40GB, RTX_PRO_6000
from stoker.core.mig.geometry import Geometry

TABLE = table_of(A100_40GB.geometry)
ONE, DOUBLE, TWO, THREE, FOUR, SEVEN = range(6)


def filled(gpus: int, *spots: Spot, table: SliceTable = TABLE) -> LayoutPool:
    pool = LayoutPool(table, gpus)
    for spot in spots:
        pool.put(spot)
    return pool


def moves_of(room: Room | None) -> list[tuple[int, int, int]]:
    assert room is not None
    return [(each.origin.gpu, each.origin.start, each.goal.gpu) for each in room.moves]


def test_who_fits_best_elsewhere_moves() -> None:
    # 1g would break a half that is whole; 2g goes beside 1g, on a GPU that is begun anyway.
    pool = filled(3, Spot(0, ONE, 6), Spot(1, TWO, 0), Spot(2, FOUR, 0))
    room = pool.make_room(SEVEN)
    assert moves_of(room) == [(1, 0, 0)]
    assert room is not None
    assert (room.spot, slices_moved(TABLE, room.moves)) == (Spot(1, SEVEN, 0), 2)


def test_two_move_where_one_does_not_do() -> None:
    pool = filled(2, Spot(0, ONE, 0), Spot(0, ONE, 4), Spot(1, THREE, 4), Spot(1, TWO, 2))
    room = pool.make_room(SEVEN)
    assert sorted(moves_of(room)) == [(0, 0, 1), (0, 4, 1)]


def test_who_finds_no_other_place_stays() -> None:
    assert filled(1, Spot(0, ONE, 0)).make_room(SEVEN) is None
    assert filled(2, Spot(0, FOUR, 0), Spot(1, FOUR, 0)).make_room(SEVEN) is None


def test_an_instance_may_move_on_its_own_gpu() -> None:
    room = filled(1, Spot(0, TWO, 0)).make_room(FOUR)
    assert moves_of(room) == [(0, 0, 0)]


def test_more_than_two_are_too_many() -> None:
    crowd = [Spot(0, ONE, start) for start in (0, 2, 4)]
    assert filled(2, *crowd, Spot(1, FOUR, 0)).make_room(SEVEN) is None
    assert filled(2, *crowd[1:], Spot(1, FOUR, 0)).make_room(SEVEN) is not None


@settings(max_examples=80, deadline=None)
@given(
    geometry=st.sampled_from([A100_40GB.geometry, A30_24GB.geometry, RTX_PRO_6000.geometry]),
    gpus=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_moves_hold_in_their_order(geometry: Geometry, gpus: int, seed: int) -> None:
    """Nobody is lost, nothing overlaps, and one move that would do is never missed."""
    rng = Random(seed)
    table = table_of(geometry)
    pool = LayoutPool(table, gpus)
    spots: list[Spot] = []
    for _ in range(100):
        if spots and rng.random() < 0.4:
            pool.take(spots.pop(rng.randrange(len(spots))))
            continue
        shape = rng.randrange(len(table.shapes))
        found = pool.find(shape)
        if found is not None:
            pool.put(found)
            spots.append(found)
            continue
        masks = list(pool.pool.masks)
        room = pool.make_room(shape)
        assert pool.pool.masks == masks
        assert (room is not None) >= can_by_one_move(table, masks, spots, shape)
        if room is None:
            continue
        assert 1 <= len(room.moves) <= MOVES_MAX
        pool.carry_out(
            room
        )  # asserts of each place that it is free, of each mover that it is there
        for move in room.moves:
            assert move.origin.shape == move.goal.shape
            spots.remove(move.origin)
            spots.append(move.goal)
        spots.append(room.spot)
        assert room.spot.shape == shape
        assert_no_overlap(table, pool, spots)


def can_by_one_move(table: SliceTable, masks: list[int], spots: list[Spot], shape: int) -> bool:
    """Whether some instance can go to a free place so that another fits where it was."""
    for spot in spots:
        own = table.shapes[spot.shape].mask(spot.start)
        for start in table.shapes[shape].starts:
            taken = table.shapes[shape].mask(start)
            if (masks[spot.gpu] & ~own) & taken:
                continue
            after = list(masks)
            after[spot.gpu] |= taken
            mover = table.shapes[spot.shape]
            if any(not mask & mover.mask(to) for mask in after for to in mover.starts):
                return True
    return False


def assert_no_overlap(table: SliceTable, pool: LayoutPool, spots: list[Spot]) -> None:
    masks = [0] * len(pool.pool.masks)
    for spot in spots:
        own = table.shapes[spot.shape].mask(spot.start)
        assert not masks[spot.gpu] & own
        masks[spot.gpu] |= own
    assert masks == pool.pool.masks


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=400),
    share=st.floats(0.01, 0.5),
    burst=st.floats(1.0, 20.0),
)
def test_no_more_requests_cause_moves_than_their_share(
    sizes: list[int], share: float, burst: float
) -> None:
    budget = MoveBudget(share, burst)
    caused = 0
    for number, size in enumerate(sizes, 1):
        budget.count_request()
        if budget.allows(size, 8):
            budget.take()
            caused += 1
        assert caused <= share * number + 1e-6


@pytest.mark.parametrize(("size", "requests"), [(8, 20), (4, 45), (1, 63)])
def test_smaller_requests_leave_the_budget_to_larger_ones(size: int, requests: int) -> None:
    budget = MoveBudget(share=0.05, burst=5.0)
    count = 0
    while not budget.allows(size, 8):
        budget.count_request()
        count += 1
    assert count == pytest.approx(requests, abs=1)
