"""The bound: right where it can be worked out by hand, and above whatever can in fact be packed."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.testing.workloads.bound import allocated_max, best_pattern, no_loss_max
from stoker.testing.workloads.tasks import Host, Task

LARGE = 2**50


def hosts_of(count: int, gpus: int = 1, model: str = "G2", cpu_milli: int = 10**6) -> list[Host]:
    return [Host(f"{model}-{n}", model, gpus, cpu_milli, LARGE) for n in range(count)]


def shares(*millis: int) -> list[Task]:
    return [Task(f"s{n}", 0, 0, 1, milli) for n, milli in enumerate(millis)]


@pytest.mark.parametrize(
    ("hosts", "tasks", "milli"),
    [
        pytest.param(hosts_of(1), shares(600, 600), 600, id="two that do not fit together"),
        pytest.param(hosts_of(2), shares(600, 600, 400), 1600, id="what fits beside is added"),
        pytest.param(hosts_of(3), shares(*[810] * 3), 2430, id="what is left of each is lost"),
        pytest.param(hosts_of(3), shares(*[400] * 9), 2400, id="two on each"),
        pytest.param(
            hosts_of(2), [*shares(100), Task("w", 0, 0, 2, 1000)], 100, id="GPUs of one node only"
        ),
        pytest.param(
            hosts_of(1, gpus=2), [*shares(100), Task("w", 0, 0, 2, 1000)], 2000, id="whole GPUs"
        ),
        pytest.param(
            hosts_of(2), [Task("g", 0, 0, 1, 1000, nodes=2)], 2000, id="a gang, one GPU each"
        ),
        pytest.param(
            [*hosts_of(1), *hosts_of(1, model="T4")],
            [Task(f"t{n}", 0, 0, 1, 1000, models=("T4",)) for n in range(2)],
            1000,
            id="a model that is scarce",
        ),
        pytest.param(
            hosts_of(2, cpu_milli=1000),
            [Task(f"t{n}", 1000, 0, 1, 300) for n in range(6)],
            600,
            id="CPU runs out before GPUs do",
        ),
    ],
)  # fmt: skip
def test_the_bound_is_what_can_be_worked_out_by_hand(
    hosts: list[Host], tasks: list[Task], milli: int
) -> None:
    assert allocated_max(hosts, tasks) == pytest.approx(milli, abs=0.2)


@pytest.mark.parametrize(
    ("tasks", "kept"),
    [
        (shares(600, 400, 600, 400), 4),
        (shares(600, 600, 400, 400), 4),  # clairvoyant: in any order
        (shares(600, 600, 600), 2),
        (shares(1), 1),
        ([], 0),
        ([Task("cpu", 10**9, 0, 0, 0)], 0),
    ],
)
def test_no_loss_counts_the_tasks_that_fit_together(tasks: list[Task], kept: int) -> None:
    assert no_loss_max(hosts_of(2), tasks) == kept


def packed_max(bins: int, sizes: Sequence[int]) -> int:
    """The most that so many GPUs can hold, tried out."""
    best = 0
    for places in itertools.product(range(bins + 1), repeat=len(sizes)):
        sums = [0] * (bins + 1)
        for place, size in zip(places, sizes, strict=True):
            sums[place] += size
        if all(total <= 1000 for total in sums[:bins]):
            best = max(best, sum(sums[:bins]))
    return best


@settings(max_examples=30, deadline=None)
@given(
    bins=st.integers(1, 2),
    sizes=st.lists(st.sampled_from([110, 230, 320, 470, 500, 650, 810]), min_size=1, max_size=6),
)
def test_no_packing_exceeds_the_bound(bins: int, sizes: list[int]) -> None:
    best = packed_max(bins, sizes)
    found = allocated_max(hosts_of(bins), shares(*sizes))
    assert best - 0.2 <= found <= min(1000 * bins, sum(sizes)) + 0.2
    kept = no_loss_max(hosts_of(bins), shares(*sizes))
    fits = [n for n in range(len(sizes) + 1) if packed_max(bins, sizes[:n]) == sum(sizes[:n])]
    assert kept >= max(fits)


@given(
    worths=st.dictionaries(
        st.sampled_from([110, 230, 320, 470, 500, 650, 810]), st.integers(-2, 9), max_size=3
    )
)
def test_the_best_pattern_is_the_best_of_all(worths: dict[int, float]) -> None:
    worth, pattern = best_pattern(worths, 10)
    assert sum(size * count for size, count in pattern.items()) <= 1000
    assert worth == sum(worths[size] * count for size, count in pattern.items())
    ranges = [range(1000 // size + 1) for size in worths]
    tried = [
        sum(count * value for count, value in zip(counts, worths.values(), strict=True))
        for counts in itertools.product(*ranges)
        if sum(count * size for count, size in zip(counts, worths, strict=True)) <= 1000
    ]
    assert worth == max(tried)
