"""The published protocol: which tasks arrive, how many, in which order; and the recorded times."""

from collections import Counter
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stoker.testing.workloads.arrivals import (
    ARRIVED_RATIO,
    Departures,
    arranged,
    arrivals,
    recorded,
)
from stoker.testing.workloads.outcome import Occupation, Step, allocated_at, curve_of
from stoker.testing.workloads.tasks import Host, Task, Workload

HOST = Host("n1", "G2", 8, 96_000, 2**40)


def tasks_of(*gpus: int) -> tuple[Task, ...]:
    return tuple(Task(f"t{n}", 1000, 0, each, 1000) for n, each in enumerate(gpus))


def asked(tasks: list[Task]) -> int:
    return sum(task.gpu_milli_total for task in tasks)


@given(
    seed=st.integers(0, 1000), gpus=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any)
)
def test_every_task_arrives_once_then_drawn_ones_until_the_next_would_be_too_much(
    seed: int, gpus: list[int]
) -> None:
    workload = Workload((HOST,), tasks_of(*gpus))
    limit = ARRIVED_RATIO * workload.capacity_milli
    assume(asked(list(workload.tasks)) <= limit)
    found = arrivals(workload, Random(seed))
    assert Counter(found[: len(gpus)]) == Counter(workload.tasks)
    assert asked(found) <= limit
    largest = max(task.gpu_milli_total for task in workload.tasks)
    assert asked(found) + largest > limit


@given(seed=st.integers(0, 1000))
def test_of_a_mix_that_asks_for_more_tasks_are_taken_away_and_none_is_drawn(seed: int) -> None:
    workload = Workload((HOST,), tasks_of(*[1, 2, 4] * 4))
    found = arrivals(workload, Random(seed))
    assert Counter(found) <= Counter(workload.tasks)
    assert asked(found) <= ARRIVED_RATIO * workload.capacity_milli < asked(found) + 4000


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    hosts = tuple(Host(f"n{n}", "G2", 8, 1, 1) for n in range(20))
    workload = Workload(hosts, tasks_of(*[1, 0, 2] * 10))
    runs: list[tuple[tuple[str, ...], list[Task]]] = []
    for seed in (1, 1, 2):
        order, rng = arranged(workload, seed)
        runs.append((order, arrivals(workload, rng)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] != runs[2][1]
    assert set(runs[0][0]) == {host.name for host in hosts}


def test_a_larger_fleet_has_every_host_and_every_task_so_many_times() -> None:
    large = Workload((HOST,), tasks_of(1, 2)).times(3)
    assert [host.name for host in large.hosts] == ["n1-0", "n1-1", "n1-2"]
    assert Counter(large.tasks) == dict.fromkeys(tasks_of(1, 2), 3)


def timed(*times: tuple[float, float]) -> Workload:
    return Workload(
        (HOST,),
        tuple(Task(f"t{at:g}", 1, 0, 1, 1000, (), 1, at, runs) for at, runs in times),
    )


def test_tasks_come_at_their_times_and_those_without_do_not_come() -> None:
    workload = timed((30.0, 1.0), (10.0, 2.0), (20.0, 3.0))
    without = Workload(workload.hosts, (*workload.tasks, *tasks_of(1)))
    coming = recorded(without, Random(1))
    assert [(each.at, each.runs_seconds) for each in coming] == [(10, 2), (20, 3), (30, 1)]


def test_what_ends_first_departs_first_and_once() -> None:
    departures = Departures()
    for at, id_ in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (1.0, "d")):
        departures.add(at, id_)
    assert list(departures.until(2.0)) == [(1.0, "a"), (1.0, "d"), (2.0, "b")]
    assert list(departures.until(2.5)) == []
    assert list(departures.until(9.0)) == [(3.0, "c")]


def test_the_curve_is_the_mean_over_arrivals_of_the_rounded_per_cent() -> None:
    # 1000 thousandths in all: 10 of them are one per cent.
    steps = [Step(96, 90), Step(104, 100), Step(106, 100), Step(1300, 950)]
    curve = curve_of(steps, 1000, first_lost=2)
    assert curve.allocated == {10: pytest.approx(9.5), 11: 10.0, 130: 95.0}
    assert curve.first_loss_at == pytest.approx(10.6)


def test_where_no_arrival_falls_on_a_per_cent_the_last_before_it_counts() -> None:
    allocated = {97: 90.0, 102: 91.0, 128: 92.0}
    assert [allocated_at(allocated, at) for at in (97, 100, 102, 130)] == [90.0, 90.0, 91.0, 92.0]


def test_without_a_loss_there_is_no_first_one() -> None:
    assert curve_of([Step(10, 10)], 100, None).first_loss_at is None


def test_occupation_is_weighed_by_how_long_it_lasts() -> None:
    occupation = Occupation(100.0)
    occupation.change(100.0, 1000)
    occupation.change(110.0, 500)
    occupation.change(130.0, -1500)
    assert occupation.mean_milli(140.0) == pytest.approx((10 * 1000 + 20 * 1500) / 40)
    assert occupation.peak_milli == 1500
