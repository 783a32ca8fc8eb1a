"""Runs over workloads that can be worked out by hand, and over many that come and go."""

from random import Random

import pytest

from stoker.testing.workloads.generated import generate
from stoker.testing.workloads.messages import Play, PublishedRun, TimedRun
from stoker.testing.workloads.plays import find_bound, play
from stoker.testing.workloads.tasks import Host, Task, Workload

POLICIES = ("random", "dotprod", "clustering", "packing", "bestfit", "fgd", "fragmentation")


def one_gpu_each(gpus: int, nodes: int) -> Workload:
    """Tasks that each take a GPU, on a fleet that has so many."""
    hosts = tuple(Host(f"n{n}", "G2", gpus, 96_000, 2**40) for n in range(nodes))
    return Workload(hosts, (Task("t", 1000, 2**30, 1, 1000),))


def published(workload: Workload, policy: str, *, is_learning: bool = False) -> PublishedRun:
    run = play(workload, Play(policy, 1), is_learning=is_learning)
    assert isinstance(run, PublishedRun)
    return run


def timed(*tasks: Task, gpus: int = 1) -> TimedRun:
    workload = Workload((Host("n1", "G2", gpus, 96_000, 2**40),), tasks)
    run = play(workload, Play("bestfit", 1, is_timed=True), is_learning=True)
    assert isinstance(run, TimedRun)
    return run


def task(at: float, runs: float, milli: int = 1000) -> Task:
    return Task(f"t{at:g}", 1000, 0, 1, milli, arrives_at=at, runs_seconds=runs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_learning", [False, True])
def test_every_policy_fills_a_fleet_that_can_be_filled(policy: str, is_learning: bool) -> None:
    run = published(one_gpu_each(gpus=4, nodes=5), policy, is_learning=is_learning)
    assert (run.arrivals, run.lost) == (26, 6)
    assert run.allocated[50] == pytest.approx(50)
    assert run.allocated[100] == run.allocated[130] == pytest.approx(100)
    assert run.first_loss_at == pytest.approx(105)
    assert 0 < run.decision_p99_seconds < run.decision_seconds


def test_the_bound_of_a_fleet_that_can_be_filled_is_all_of_it() -> None:
    found = find_bound(one_gpu_each(gpus=4, nodes=5), 1)
    assert found.allocated_at_100 == pytest.approx(100, abs=0.01)
    assert found.allocated_at_130 == pytest.approx(100, abs=0.01)
    assert found.no_loss_at == pytest.approx(100)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_the_same_when_it_is_played_again(policy: str) -> None:
    workload = generate(Random(1))
    one, again = published(workload, policy), published(workload, policy)
    assert one.allocated == again.allocated
    assert one.first_loss_at == again.first_loss_at


def test_by_time_what_ends_makes_room_at_that_instant() -> None:
    run = timed(task(0, 10), task(5, 10), task(10, 10), task(30, 5))
    assert run.refused == pytest.approx(25)  # the second one
    assert run.refused_gpu_time == pytest.approx(100 * 10 / 35)
    assert run.allocated_mean == pytest.approx(100 * 20 / 30)
    assert run.offered_mean == pytest.approx(100 * 30 / 30)
    assert run.allocated_peak == pytest.approx(100)


def test_by_time_a_gang_has_all_of_its_nodes_or_nothing() -> None:
    hosts = tuple(Host(f"n{n}", "G2", 2, 96_000, 2**40) for n in range(3))
    gang = Task("gang", 1000, 0, 2, 1000, nodes=2, arrives_at=0.0, runs_seconds=10.0)
    second = Task("second", 1000, 0, 2, 1000, nodes=2, arrives_at=5.0, runs_seconds=10.0)
    run = play(
        Workload(hosts, (gang, second, task(10, 1))), Play("fgd", 1, True), is_learning=False
    )
    assert isinstance(run, TimedRun)
    assert run.refused == pytest.approx(100 / 3)
    assert run.allocated_peak == pytest.approx(100 * 4 / 6)
    assert run.allocated_mean == pytest.approx(100 * 4 / 6)


def test_by_time_nothing_is_left_behind_by_many_that_come_and_go() -> None:
    # More than the fleet remembers of what has ended; each alone takes all of it.
    run = timed(*(task(at, 1.0) for at in range(1200)))
    assert run.refused == 0
    assert run.allocated_mean == pytest.approx(100)
