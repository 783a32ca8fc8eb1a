"""Workloads made by seed: the same for the same seed, in the kinds and sizes that are asked for."""

from collections import Counter
from random import Random

import pytest

from stoker.testing.workloads.generated import CONSTRAINED, OPENB, SHARES_ALONE, generate
from stoker.testing.workloads.tasks import Workload


def made(seed: int = 1, turns: float = 4.0) -> Workload:
    return generate(Random(seed), turns=turns)


def test_a_seed_makes_one_workload_and_another_seed_another() -> None:
    assert made() == made()
    assert made() != made(seed=2)


def test_tasks_ask_for_the_fleet_so_often_and_the_last_one_passes_it() -> None:
    found = made(turns=2.0)
    asked = sum(task.gpu_milli_total for task in found.tasks)
    assert asked - found.tasks[-1].gpu_milli_total < 2 * found.capacity_milli <= asked


def test_a_fleet_may_be_larger_and_every_host_has_its_name() -> None:
    one, three = generate(Random(1)), generate(Random(1), fleets=3)
    assert three.capacity_milli == 3 * one.capacity_milli
    assert len({host.name for host in three.hosts}) == 3 * len(one.hosts)


def test_tasks_are_of_the_sizes_of_openb_as_often_as_there() -> None:
    tasks = made(turns=20.0).tasks
    shares = Counter(task.gpu_milli for task in tasks if task.is_share)
    assert shares.most_common(2) == [(810, shares[810]), (470, shares[470])]
    assert shares[810] / shares.total() == pytest.approx(1078 / 3078, abs=0.03)
    assert sum(task.gpus == 0 for task in tasks) / len(tasks) == pytest.approx(0.133, abs=0.02)
    assert {task.gpus for task in tasks} == {0, 1, 2, 4, 8}


def test_variants_have_shares_alone_or_tasks_that_name_a_model_of_the_fleet() -> None:
    alone = generate(Random(1), SHARES_ALONE).tasks
    assert all(task.is_share or task.gpus == 0 for task in alone)
    constrained = generate(Random(1), CONSTRAINED)
    models = {host.model for host in constrained.hosts}
    single = [task for task in constrained.tasks if task.gpus == 1]
    named = [task for task in single if task.models]
    assert len(named) / len(single) == pytest.approx(0.33, abs=0.06)
    assert all(models.issuperset(task.models) for task in named)
    assert all(not task.models for task in generate(Random(1), OPENB).tasks)


def test_by_time_tasks_ask_for_a_tenth_more_than_all_gpu_time() -> None:
    found = made(turns=8.0)
    arrivals = [task.arrives_at for task in found.tasks if task.arrives_at is not None]
    assert arrivals == sorted(arrivals)
    asked = sum(task.gpu_milli_total * (task.runs_seconds or 0.0) for task in found.tasks)
    assert asked == pytest.approx(1.1 * found.capacity_milli * arrivals[-1])
