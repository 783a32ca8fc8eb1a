"""Where instances are put so that what stays stays: the search, against a search through all."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mig_layouts import A30, A100, LAYOUTS, RTX, at, profile

from stoker.core.mig.geometry import Geometry, Layout, Placed
from stoker.core.mig.layouts import (
    Instance,
    arrange,
    describe,
    instances_of,
    misfit,
    objection,
)

# --- arranging


def brute_force(geometry: Geometry, instances: list[Instance], keep: Layout) -> set[Layout]:
    """Return every legal layout of these instances with those to keep, by trying all."""
    pool = sorted(instances)
    for each in keep:
        if (each.profile, each.compute) not in pool:
            return set()
        pool.remove((each.profile, each.compute))
    found: set[Layout] = set()

    def add(layout: Layout, number: int) -> None:
        if number == len(pool):
            if objection(geometry, layout) is None:
                found.add(tuple(sorted(layout)))
            return
        name, compute = pool[number]
        each = profile(geometry, name)
        for start in each.starts:
            placed = Placed(start, each.memory_slices, name, compute)
            if not any(placed.mask & other.mask for other in layout):
                add((*layout, placed), number + 1)

    if objection(geometry, keep) is None:
        add(keep, 0)
    return found


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Geometry, list[Instance], Layout, Layout]:
    """A board, what is wanted on it, what must stay of what is there, and what there is."""
    geometry = draw(st.sampled_from([A30, A100, RTX]))
    there = draw(st.sampled_from(LAYOUTS[geometry]))
    there = tuple(draw(st.sampled_from(variants(geometry, each))) for each in there)
    names = [each.name for each in geometry.profiles]
    kept = tuple(each for each in there if draw(st.integers(0, 3)) == 0)
    more = draw(st.lists(st.sampled_from(names), max_size=5))
    instances: list[Instance] = [(each.profile, each.compute) for each in kept]
    instances += [
        draw(
            st.sampled_from(
                [(v.profile, v.compute) for v in variants(geometry, first(geometry, n))]
            )
        )
        for n in more
    ]
    return geometry, instances, kept, there


def first(geometry: Geometry, name: str) -> Placed:
    each = profile(geometry, name)
    return Placed(each.starts[0], each.memory_slices, name)


def variants(geometry: Geometry, placed: Placed) -> list[Placed]:
    slices = profile(geometry, placed.profile).compute_slices
    return [placed] if slices == 1 else [placed, replace(placed, compute=(1,) * slices)]


@given(tasks())
def test_the_search_is_exact(task: tuple[Geometry, list[Instance], Layout, Layout]) -> None:
    geometry, instances, keep, there = task
    possible = brute_force(geometry, instances, keep)
    found = arrange(geometry, instances, keep, there)
    if found is None:
        assert possible == set()
        return
    assert found in possible
    assert set(keep) <= set(found)
    places = {(each.start, each.profile) for each in there}

    def staying(layout: Layout) -> tuple[int, int]:
        same = sum((each.start, each.profile) in places for each in layout)
        return same, len(set(layout) & set(there))

    assert staying(found) == max(map(staying, possible))


@given(tasks())
def test_nothing_overlaps_and_nothing_is_left_out(
    task: tuple[Geometry, list[Instance], Layout, Layout],
) -> None:
    geometry, instances, keep, there = task
    found = arrange(geometry, instances, keep, there)
    if found is None:
        return
    assert objection(geometry, found) is None
    assert Counter((each.profile, each.compute) for each in found) == Counter(instances)
    assert list(found) == sorted(found)


@given(st.sampled_from([A30, A100, RTX]).flatmap(lambda g: st.sampled_from(LAYOUTS[g])))
def test_what_is_there_already_stays_as_it_is(layout: Layout) -> None:
    geometry = next(g for g, found in LAYOUTS.items() if layout in found)
    instances = [(each.profile, each.compute) for each in layout]
    assert arrange(geometry, instances, prefer=layout) == tuple(sorted(layout))
    assert arrange(geometry, instances, keep=layout) == tuple(sorted(layout))


@pytest.mark.parametrize(
    ("instances", "keep", "prefer", "expected"),
    [
        # The order in which the driver would fail: the large one last.
        (["1g", "1g", "2g", "3g"], [], [], "3g.20gb@4 2g.10gb@0 1g.5gb@2 1g.5gb@3"),
        (["3g"], [], [], "3g.20gb@4"),
        (["3g"], [], ["3g.20gb@0"], "3g.20gb@0"),  # kept, though elsewhere were more room
        (["3g", "2g"], ["2g.10gb@4"], [], "3g.20gb@0 2g.10gb@4"),
        (["3g", "2g"], ["2g.10gb@4"], ["3g.20gb@4"], "3g.20gb@0 2g.10gb@4"),
        (["4g", "2g"], ["2g.10gb@2"], [], None),
        (["4g", "3g"], [], ["3g.20gb@0"], "4g.20gb@0 3g.20gb@4"),
        (["2g", "1g"], ["3g.20gb@0"], [], None),  # it is not wanted any more
        (["1g", "1g"], ["1g.5gb@3"], ["1g.5gb@5"], "1g.5gb@3 1g.5gb@5"),
        (["7g"], [], ["1g.5gb@0"], "7g.40gb@0"),
        ([], [], ["7g.40gb@0"], "no instances"),
    ],
)
def test_what_stays_where(
    instances: list[str], keep: list[str], prefer: list[str], expected: str | None
) -> None:
    names = {"1g": "1g.5gb", "2g": "2g.10gb", "3g": "3g.20gb", "4g": "4g.20gb", "7g": "7g.40gb"}
    found = arrange(
        A100, [(names[each], ()) for each in instances], at(A100, *keep), at(A100, *prefer)
    )
    assert (describe(found) if found is not None else None) == expected


def test_instances_whose_parts_fit_stay_before_those_that_need_others() -> None:
    there = at(A100, "3g.20gb@0(2c+1c)", "3g.20gb@4")
    found = arrange(A100, [("3g.20gb", (1, 2))], prefer=there)
    assert found == at(A100, "3g.20gb@0(2c+1c)")
    found = arrange(A100, [("3g.20gb", (3,))], prefer=there)
    assert found == at(A100, "3g.20gb@4")


@pytest.mark.parametrize(
    ("geometry", "devices", "reason"),
    [
        (A100, {"4g.20gb": 2}, "there may be at most 1 4g.20gb, not 2"),
        (A100, {"3g.20gb": 3}, "there may be at most 2 3g.20gb, not 3"),
        (A100, {"1g.5gb": 8}, "there may be at most 7 1g.5gb, not 8"),
        (A100, {"4g.20gb": 1, "2g.10gb": 2}, "they take 8 compute slices of 7"),
        (A100, {"3g.20gb": 2, "1g.5gb": 1}, "they take 9 memory slices of 8"),
        (A30, {"1g.6gb+me": 1, "2g.12gb+me": 1}, "only one instance may have the media"),
        (RTX, {"1g.24gb+me.all": 1, "1g.24gb": 1}, "takes all media engines"),
    ],
)
def test_why_an_empty_board_does_not_hold_them(
    geometry: Geometry, devices: dict[str, int], reason: str
) -> None:
    assert reason in (misfit(geometry, instances_of(geometry, devices)) or "it does")


def test_why_a_board_of_few_places_does_not_hold_them() -> None:
    # A driver that offers fewer places than the table.
    narrow = Geometry(4, 4, tuple(replace(each, starts=each.starts[:1]) for each in A30.profiles))
    assert misfit(narrow, [("2g.12gb", ()), ("1g.6gb", ())]) == (
        "there are slices enough, and no places at which 2g.12gb, 1g.6gb lie beside each other"
    )


@given(tasks())
def test_what_does_not_fit_has_a_reason_and_what_fits_has_none(
    task: tuple[Geometry, list[Instance], Layout, Layout],
) -> None:
    geometry, instances, _, _ = task
    assert (misfit(geometry, instances) is None) == (arrange(geometry, instances) is not None)
