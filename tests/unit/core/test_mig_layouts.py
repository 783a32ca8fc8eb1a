"""Which GPU instances fit beside each other on a board, and where they are best put."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mig_layouts import A30, A100, H100, LAYOUTS, RTX, at, every_board, only, profile

from stoker.core.errors import BadInput
from stoker.core.mig.boards import (
    Board,
)
from stoker.core.mig.geometry import Geometry, Placed
from stoker.core.mig.layouts import (
    Instance,
    best_start,
    describe,
    free_starts,
    instance_id,
    instances_of,
    layouts,
    maximal_layouts,
    objection,
    place,
    split_device,
)

# --- what is legal


@every_board
def test_there_are_as_many_maximal_layouts_as_published(board: Board) -> None:
    plain = 19 if board.geometry.compute_slices == 7 else 5
    assert len(maximal_layouts(board.geometry)) == plain
    with_double_memory = only(board.geometry, {*range(7), 9})
    doubled = 78 if board.geometry.compute_slices == 7 else 5
    assert len(maximal_layouts(with_double_memory, plain=False)) == doubled


def test_the_maximal_layouts_of_four_slices() -> None:
    assert {describe(layout) for layout in maximal_layouts(A30)} == {
        "4g.24gb@0",
        "2g.12gb@0 2g.12gb@2",
        "2g.12gb@0 1g.6gb@2 1g.6gb@3",
        "2g.12gb@2 1g.6gb@0 1g.6gb@1",
        "1g.6gb@0 1g.6gb@1 1g.6gb@2 1g.6gb@3",
    }
    assert {describe(layout) for layout in maximal_layouts(RTX)} == {
        "4g.96gb@0",
        "2g.48gb@0 2g.48gb@6",
        "2g.48gb@0 1g.24gb@6 1g.24gb@9",
        "2g.48gb@6 1g.24gb@0 1g.24gb@3",
        "1g.24gb@0 1g.24gb@3 1g.24gb@6 1g.24gb@9",
    }


@every_board
def test_every_layout_is_legal_and_listed_once(board: Board) -> None:
    for is_plain in (True, False):
        found = list(layouts(board.geometry, plain=is_plain))
        assert len(set(found)) == len(found)
        assert found[0] == ()
        assert all(objection(board.geometry, layout) is None for layout in found)
        maximal = maximal_layouts(board.geometry, plain=is_plain)
        assert set(maximal) <= set(found)


def test_the_list_of_layouts_misses_none() -> None:
    placements = [
        Placed(start, each.memory_slices, each.name)
        for each in A30.profiles
        for start in each.starts
    ]
    legal = {
        tuple(sorted(chosen))
        for count in range(5)
        for chosen in combinations(placements, count)
        if objection(A30, chosen) is None
    }
    assert set(layouts(A30, plain=False)) == legal


@pytest.mark.parametrize(
    ("geometry", "words", "reason"),
    [
        (A100, ["4g.20gb@0", "4g.20gb@0"], "4g.20gb at 0 and 4g.20gb at 0 overlap"),
        (A100, ["4g.20gb@4"], "4g.20gb cannot lie at 4 with 4 memory slices; it has 4 and begins"),
        (A100, ["3g.20gb@0", "2g.10gb@2"], "3g.20gb at 0 and 2g.10gb at 2 overlap"),
        (A100, ["2g.10gb@6"], "2g.10gb cannot lie at 6"),
        (A100, ["1g.5gb@7"], "1g.5gb cannot lie at 7"),
        (A100, ["1g.5gb+me@0", "1g.5gb+me@1"], "there may be at most 1 1g.5gb+me, not 2"),
        (A100, ["3g.20gb@4(2c+2c)"], "compute instances of 3g.20gb take 4 compute slices of 3"),
        (A100, ["4g.20gb@0(3c)"], "4g.20gb has at most 0 compute instances of 3 slices, not 1"),
        (A30, ["1g.6gb+me@0", "2g.12gb+me@2"], "only one instance may have the media extensions"),
        (RTX, ["1g.24gb+me.all@0", "1g.24gb@3"], "1g.24gb+me.all takes all media engines"),
        (RTX, ["2g.48gb+me.all@0", "1g.24gb+gfx@6"], "and 1g.24gb+gfx would have some"),
        (RTX, ["1g.24gb+me.all@0", "2g.48gb+me.all@6"], "takes all media engines"),
        (RTX, ["1g.24gb@1"], "begins at 0, 3, 6, 9"),
    ],
)
def test_what_is_not_legal_has_a_reason(geometry: Geometry, words: list[str], reason: str) -> None:
    layout = at(geometry, *words)
    assert reason in (objection(geometry, layout) or "legal")
    assert objection(geometry, layout[::-1]) is not None


def test_a_profile_of_another_board_is_not_legal() -> None:
    told = objection(A30, (Placed(0, 1, "1g.5gb"),))
    assert told == (
        "1g.5gb is not offered; there are 1g.6gb, 1g.6gb+me, 2g.12gb, 2g.12gb+me, 4g.24gb"
    )


def test_nothing_is_there_twice() -> None:
    (placed,) = at(A100, "3g.20gb@4")
    assert objection(A100, (placed, placed)) == "3g.20gb at 4 and 3g.20gb at 4 overlap"


def test_a_wrong_size_is_not_legal() -> None:
    assert "with 3 memory slices" in (objection(A100, (Placed(4, 3, "3g.20gb"),)) or "")


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (A100, ["4g.20gb@0", "3g.20gb@4"]),
        (A100, ["3g.20gb@0", "3g.20gb@4"]),
        (A100, ["1g.10gb@0", "1g.10gb@2", "1g.10gb@4", "1g.10gb@6"]),
        (A100, ["1g.5gb+me@0", "1g.5gb@1", "1g.10gb@6"]),
        (A100, ["7g.40gb@0(4c+2c+1c)"]),
        (A100, ["3g.20gb@4(1c+1c+1c)"]),
        (RTX, ["1g.24gb+me.all@0", "1g.24gb-me@3", "2g.48gb-me@6"]),
        (RTX, ["1g.24gb+me@0", "1g.24gb+gfx@3", "2g.48gb-me@6"]),
        (RTX, ["4g.96gb+gfx@0"]),
    ],
)
def test_what_is_legal(geometry: Geometry, words: list[str]) -> None:
    assert objection(geometry, at(geometry, *words)) is None


# --- what still fits


@given(st.data())
def test_a_start_is_free_where_one_more_is_legal(data: st.DataObject) -> None:
    geometry = data.draw(st.sampled_from([A30, A100, RTX]))
    layout = data.draw(st.sampled_from(LAYOUTS[geometry]))
    name = data.draw(st.sampled_from(geometry.profiles)).name
    each = profile(geometry, name)
    legal = tuple(
        start
        for start in each.starts
        if objection(geometry, (*layout, Placed(start, each.memory_slices, name))) is None
    )
    assert free_starts(geometry, layout, name) == legal
    best = best_start(geometry, layout, name)
    assert best in legal if legal else best is None


def test_a_profile_that_is_not_offered_fits_nowhere() -> None:
    assert free_starts(A30, (), "1g.5gb") == ()
    assert best_start(A30, (), "1g.5gb") is None


@pytest.mark.parametrize(
    ("geometry", "there", "name", "start"),
    [
        (A100, [], "3g.20gb", 4),  # at 0 it would waste a compute slice
        (A100, [], "4g.20gb", 0),
        (A100, [], "2g.10gb", 4),  # beside the memory slice that has no compute slice
        (A100, [], "1g.5gb", 6),
        (A100, [], "1g.10gb", 6),
        (A100, ["3g.20gb@4"], "3g.20gb", 0),
        (A100, ["3g.20gb@4", "1g.5gb@0"], "1g.5gb", 1),  # a 2g still fits at 2
        (A100, ["4g.20gb@0"], "1g.5gb", 6),
        (A100, ["7g.40gb@0"], "1g.5gb", None),
        (A100, ["1g.5gb+me@0"], "1g.5gb+me", None),
        (A30, ["1g.6gb@0"], "1g.6gb", 1),
        (RTX, ["1g.24gb@9"], "1g.24gb", 6),
        (RTX, ["1g.24gb+me.all@0"], "1g.24gb", None),
        (RTX, ["1g.24gb+me.all@0"], "1g.24gb-me", 3),
    ],
)
def test_the_best_start(geometry: Geometry, there: list[str], name: str, start: int | None) -> None:
    assert best_start(geometry, at(geometry, *there), name) == start


@given(st.data())
def test_no_other_start_leaves_more_places(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS[A100]))
    name = data.draw(st.sampled_from(A100.profiles)).name
    size = profile(A100, name).memory_slices

    def left(start: int) -> int:
        after = (*layout, Placed(start, size, name))
        return sum(
            len(free_starts(A100, after, p.name)) for p in A100.profiles if "+" not in p.name
        )

    starts = free_starts(A100, layout, name)
    best = best_start(A100, layout, name)
    if best is not None:
        assert left(best) == max(map(left, starts))


# --- MIG devices and the GPU instances that they take


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("2g.10gb", ("2g.10gb", None)),
        ("1c.2g.10gb", ("2g.10gb", 1)),
        ("2c.2g.10gb", ("2g.10gb", None)),
        ("1g.5gb+me", ("1g.5gb+me", None)),
        ("4c.7g.40gb", ("7g.40gb", 4)),
    ],
)
def test_a_device_is_a_gpu_instance_or_a_part_of_one(
    name: str, split: tuple[str, int | None]
) -> None:
    assert split_device(A100, name) == split


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("1g.6gb", "MIG device '1g.6gb' is not offered; there are 1g.5gb, 1g.5gb+me, 1g.10gb"),
        ("1c.1g.6gb", "MIG device '1c.1g.6gb' is not offered"),
        ("3c.4g.20gb", "4g.20gb has no compute instance of 3 slices; there are 1c, 2c, 4c"),
        ("2c.1g.5gb", "1g.5gb has no compute instance of 2 slices; there are 1c"),
        ("0c.1g.5gb", "is not offered"),
        ("", "MIG device '' is not offered"),
    ],
)
def test_a_device_that_the_board_does_not_offer(name: str, told: str) -> None:
    with pytest.raises(BadInput) as refused:
        split_device(A100, name)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("devices", "instances"),
    [
        ({}, ()),
        ({"1g.5gb": 2, "3g.20gb": 1}, (("3g.20gb", ()), ("1g.5gb", ()), ("1g.5gb", ()))),
        ({"1c.3g.20gb": 1, "2c.3g.20gb": 1}, (("3g.20gb", (2, 1)),)),
        ({"1c.3g.20gb": 4}, (("3g.20gb", (1,)), ("3g.20gb", (1, 1, 1)))),
        ({"2c.3g.20gb": 2}, (("3g.20gb", (2,)), ("3g.20gb", (2,)))),
        ({"1c.2g.10gb": 1, "2g.10gb": 1}, (("2g.10gb", ()), ("2g.10gb", (1,)))),
        ({"1g.5gb": 0}, ()),
        ({"1g.10gb": 1, "2g.10gb": 1}, (("2g.10gb", ()), ("1g.10gb", ()))),
    ],
)
def test_the_gpu_instances_that_devices_take(
    devices: dict[str, int], instances: tuple[Instance, ...]
) -> None:
    assert instances_of(A100, devices) == instances


@given(st.data())
def test_parts_lose_nothing_and_take_no_instance_too_many(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([p.name for p in A100.profiles if p.compute_slices > 1]))
    whole = profile(A100, name)
    sizes = [p.compute_slices for p in whole.compute_profiles if not p.is_whole]
    wanted = data.draw(st.dictionaries(st.sampled_from(sizes), st.integers(1, 3), min_size=1))
    found = instances_of(A100, {f"{size}c.{name}": count for size, count in wanted.items()})
    assert Counter(size for _, parts in found for size in parts) == Counter(wanted)
    for each in found:
        assert objection(A100, (Placed(whole.starts[0], whole.memory_slices, *each),)) is None
    if whole.compute_slices < 7:  # sizes of which each divides the next leave no gaps
        total = sum(size * count for size, count in wanted.items())
        if sizes == [1, 2] and whole.compute_slices == 3:
            least = max(wanted.get(2, 0), -(-total // 3))
        else:
            least = -(-total // whole.compute_slices)
        assert len(found) == least


# --- words, IDs, places


def test_a_layout_in_words() -> None:
    layout = at(A100, "2g.10gb@0", "1g.5gb@2", "3g.20gb@4(2c+1c)")
    assert describe(layout) == "3g.20gb@4(2c+1c) 2g.10gb@0 1g.5gb@2"
    assert describe(()) == "no instances"


@every_board
def test_instance_ids_are_unique(board: Board) -> None:
    for layout in layouts(board.geometry):
        ids = [instance_id(board.geometry, each.size, each.start) for each in layout]
        assert len(set(ids)) == len(ids)


def test_instance_ids_are_those_of_the_guide() -> None:
    ids = [instance_id(A100, size, start) for size, start in ((8, 0), (4, 4), (2, 0), (1, 2))]
    assert ids == [0, 2, 3, 9]


@given(st.permutations(["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]))
def test_the_order_of_asking_decides_nothing(names: list[str]) -> None:
    starts = place(H100, [profile(H100, name) for name in names])
    assert starts is not None
    assert sorted(zip(names, starts, strict=True)) == [
        *(("1g.10gb", 2), ("1g.10gb", 3), ("2g.20gb", 0), ("3g.40gb", 4)),
    ]


def test_what_does_not_fit_is_placed_nowhere() -> None:
    assert place(H100, [profile(H100, "4g.40gb")] * 2) is None
    assert place(H100, []) == ()
