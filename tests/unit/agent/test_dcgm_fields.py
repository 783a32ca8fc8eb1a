"""What DCGM's fields mean, what is no value, and which fields are watched when not all can be."""

import pytest

from stoker.agent.dcgm.fields import (
    FIELDS,
    MetricGroup,
    Selection,
    described,
    in_base_unit,
    is_blank,
    is_fresh,
    of_instance,
    select,
)
from stoker.agent.facts import FACTS, Rate
from stoker.testing.dcgm_engine import A100_GROUPS, T4_GROUPS, Groups


def groups(*rows: tuple[int, int, tuple[int, ...]]) -> list[MetricGroup]:
    return [MetricGroup(*row) for row in rows]


def test_a_field_tells_one_fact_that_is_read_with_every_tick() -> None:
    assert len(set(FIELDS.values())) == len(FIELDS)
    assert {FACTS[fact].rate for fact in FIELDS.values()} == {Rate.FAST}


@pytest.mark.parametrize(
    ("chip", "watched", "left_out"),
    [
        (T4_GROUPS, (1002, 1003, 1004, 1001, 1005, 1009, 1010, 1007), (1006, 1008)),
        (A100_GROUPS, tuple(FIELDS), ()),
        (((0, 0, ()),), (), ()),
        ((), (), ()),
    ],
    ids=["T4", "A100", "a group of nothing", "no groups"],
)
def test_what_a_chip_can_watch_at_once(
    chip: Groups, watched: tuple[int, ...], left_out: tuple[int, ...]
) -> None:
    assert select(groups(*chip)) == Selection(watched, left_out)


@pytest.mark.parametrize(
    ("rows", "watched"),
    [
        ([(0, 1, (1006, 1007, 1008)), (0, 2, (1002,))], (1002,)),
        ([(0, 1, (1002,)), (0, 2, (1002, 1016))], (1002, 1016)),
        ([(0, 1, (1003, 1004, 1001)), (0, 2, (1002, 1016))], (1002, 1016)),
        ([(0, 1, (1005,)), (0, 2, (1009,)), (1, 0, (1009,))], (1005, 1009)),
        ([(0, 1, (1040, 1041)), (0, 2, (1016,))], (1016,)),
    ],
    ids=[
        "the most wanted field outweighs many",
        "of two with it, the one with more",
        "all others together do not outweigh it",
        "what another group has too is not lost",
        "fields that we do not know weigh nothing",
    ],
)
def test_of_groups_that_exclude_each_other_the_most_wanted_is_watched(
    rows: list[tuple[int, int, tuple[int, ...]]], watched: tuple[int, ...]
) -> None:
    assert select(groups(*rows)).watched == watched
    assert select(groups(*reversed(rows))).watched == watched


def test_an_instance_has_no_traffic_of_its_own() -> None:
    assert of_instance((1002, 1009, 1010, 1011, 1012, 1006)) == (1002, 1006)


@pytest.mark.parametrize(
    ("value", "blank"),
    [
        (0x7FFFFFFFFFFFFFF0, True),
        (9223372036854775794, True),  # NOT_SUPPORTED
        (0x7FFFFFFFFFFFFFEF, False),
        (0, False),
        (140737488355328.0, True),
        (140737488355331.0, True),  # NOT_PERMISSIONED
        (140737488355327.0, False),
        (0.0, False),
        ("<<<NULL>>>", True),
        ("<<<NOT_FOUND>>>", True),
        ("GPU-1", False),
    ],
)
def test_blanks(value: float | str, blank: bool) -> None:
    assert is_blank(value) is blank


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        (1002, 0.25, 0.25),
        (1002, 0.0, 0.0),
        (1002, 1.0005, 1.0),
        (1002, 1.2, None),
        (1002, -0.1, None),
        (1002, float("nan"), None),
        (1002, 140737488355330.0, None),
        (1009, 12_000_000_000, 12e9),
        (1009, 0, 0.0),
        (1009, -1, None),
        (1011, 0x7FFFFFFFFFFFFFF2, None),
    ],
)
def test_a_value_in_base_units(field: int, value: float, told: float | None) -> None:
    assert in_base_unit(field, value) == told


@pytest.mark.parametrize(
    ("measured_at", "fresh"),
    [(97.0, True), (96.9, False), (100.0, True), (103.0, True), (103.1, False), (0.0, False)],
)
def test_a_value_is_told_for_three_intervals(measured_at: float, fresh: bool) -> None:
    assert is_fresh(measured_at, 100.0, 1.0) is fresh


def test_fields_are_named_for_people() -> None:
    assert described((1006, 1008)) == "1006 fp64_active_ratio, 1008 fp16_active_ratio"
