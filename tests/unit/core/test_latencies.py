"""Counts of latencies: where an operation counts, and what the counts tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.core.latencies import BOUNDS, BUCKETS, bucket_of, quantile

COUNTS = st.lists(st.integers(0, 1000), min_size=BUCKETS, max_size=BUCKETS)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (0.05, 5), (60.0, BUCKETS - 2), (60.1, BUCKETS - 1)],
)
def test_operation_counts_where_the_bound_is_not_exceeded(seconds: float, bucket: int) -> None:
    assert bucket_of(seconds) == bucket


def in_bucket(number: int) -> list[int]:
    return [4 if each == number else 0 for each in range(BUCKETS)]


@pytest.mark.parametrize(
    ("counts", "ratio", "expected"),
    [
        ([0] * BUCKETS, 0.5, None),
        (in_bucket(0), 0.5, 0.0005),
        (in_bucket(5), 0.5, 0.0375),  # half-way between 0.025 and 0.05
        (in_bucket(5), 1.0, 0.05),
        (in_bucket(BUCKETS - 1), 0.5, 60.0),  # beyond the last bound nothing is known
    ],
)
def test_quantile(counts: list[int], ratio: float, expected: float | None) -> None:
    assert quantile(counts, ratio) == pytest.approx(expected)


@given(COUNTS, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_higher_quantile_is_not_shorter(counts: list[int], one: float, other: float) -> None:
    low, high = (quantile(counts, each) for each in sorted((one, other)))
    assert (low is None) == (high is None) == (sum(counts) == 0)
    if low is not None and high is not None:
        assert 0.0 <= low <= high <= BOUNDS[-1]


@given(COUNTS.filter(any), st.floats(0.01, 1.0), st.integers(-20, 20))
def test_only_proportions_count(counts: list[int], ratio: float, halvings: int) -> None:
    scaled = quantile([2.0**halvings * each for each in counts], ratio)
    assert scaled == pytest.approx(quantile(counts, ratio))
