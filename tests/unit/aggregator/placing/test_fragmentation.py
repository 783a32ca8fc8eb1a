"""The closed form of FGD's fragmentation is its definition."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.aggregator.placing.fragmentation import level_of, points, usual, worths
from stoker.aggregator.placing.tasks import Task

CARDS = 2


def make_task(
    cpu: int = 0, gpus: int = 1, milli: Sequence[int] = (1000, 1000), weight: float = 1.0
) -> Task:
    fits = tuple(each > 0 for each in milli)
    is_share = gpus == 1 and max(milli) < 1000
    return Task(cpu, 0, gpus, is_share, tuple(milli), fits, weight)


@st.composite
def tasks_of_mix(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Task:
    cpu = draw(st.sampled_from((0, 1000, 4000, 8000)))
    weight = draw(st.floats(0.1, 9.0))
    gpus = draw(st.sampled_from((0, 1, 1, 1, 2, 3)))
    if gpus != 1:
        return make_task(cpu, gpus, weight=weight)
    return make_task(cpu, 1, (draw(st.integers(0, 1000)), draw(st.integers(0, 1000))), weight)


def fragmented(task: Task, card: int, cpu: int, left: Sequence[int]) -> float:
    """How many of the idle thousandths are no use to the task, as FGD defines it."""
    idle = sum(left)
    if task.gpus == 0 or task.milli[card] == 0 or cpu < task.cpu_milli:
        return idle
    if task.gpus == 1:
        return sum(each for each in left if each < task.milli[card])
    free = sum(each == 1000 for each in left)
    return idle if free < task.gpus else sum(each for each in left if each < 1000)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(tasks_of_mix(), min_size=1, max_size=6),
    st.integers(0, CARDS - 1),
    st.integers(0, 10_000),
    st.lists(st.integers(0, 999) | st.just(1000), min_size=1, max_size=4),
)
def test_closed_form(tasks: list[Task], card: int, cpu: int, left: list[int]) -> None:
    tasks = usual(tasks, covered=1.0)
    tables = worths(tasks, CARDS, gpus_max=4)
    level = sum(1 for each in tables.levels if each <= cpu)
    useful = sum(tables.left[card, level, each] for each in left)
    useful += tables.free[card, level, sum(each == 1000 for each in left)]
    defined = sum(task.weight * fragmented(task, card, cpu, left) for task in tasks)
    assert sum(left) - useful / 1000 == pytest.approx(defined, abs=0.01)


def test_usual_tasks_are_the_most_frequent_ones() -> None:
    tasks = [make_task(gpus=k, weight=w) for k, w in ((1, 60.0), (2, 30.0), (4, 6.0), (8, 4.0))]
    found = usual(tasks)
    assert [task.gpus for task in found] == [1, 2, 4]
    assert sum(task.weight for task in found) == pytest.approx(1.0)


def test_tasks_that_differ_in_host_memory_alone_are_one() -> None:
    one = make_task(4000)
    other = Task(4000, 2**30, 1, False, (1000, 1000), (True, True), 1.0)
    assert [task.weight for task in usual([one, other])] == [1.0]


@pytest.mark.parametrize(
    ("cpu", "level"), [(0, 0), (500, 1), (1000, 1), (1500, 2), (4000, 2), (9000, 2)]
)
def test_a_demand_between_two_levels_takes_the_higher_one(cpu: int, level: int) -> None:
    assert level_of([1000, 4000], cpu) == level


def test_points_are_those_of_a_logistic_curve() -> None:
    found = points()
    assert len(found) == 99
    assert found[49] == 0  # no change is 50 points
    assert found[72] < 1_000_000 < found[73]  # a GPU less of fragments is 73
