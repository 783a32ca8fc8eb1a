"""Bursts of replicas on 64 shared GPUs: how even the load is under each policy, on one seed."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from stoker.testing.balancing.arrivals import OFFERED, make_replicas
from stoker.testing.balancing.playing import LIVE, Course, Evenness, play
from stoker.testing.balancing.shared_fleet import GPU_MEMORY_BYTES

SEED = 1
COURSE = Course(nodes=8, gpus_each=8, warm_up_seconds=300.0, seconds=600.0)


@cache
def played(policy: str) -> Evenness:
    return play(policy, SEED, COURSE)


@pytest.mark.parametrize("other", ["binpack", LIVE])
def test_balanced_is_the_most_even(other: str) -> None:
    """In memory and in utilisation, of which the peak is bounded: a GPU is never busier than 1."""
    ours, theirs = played("balanced"), played(other)
    assert ours.memory_peak_to_mean < 0.85 * theirs.memory_peak_to_mean
    assert ours.utilization_peak_to_mean < 0.9 * theirs.utilization_peak_to_mean
    assert ours.waiting_work < 0.2 * theirs.waiting_work
    assert ours.refused <= theirs.refused


def test_what_gpus_do_is_seen_by_balanced_and_not_by_spread() -> None:
    """Memory is promised, so a spread knows it; what replicas do to the compute it does not."""
    ours, theirs = played("balanced"), played("spread")
    assert ours.utilization_peak_to_mean < theirs.utilization_peak_to_mean
    assert ours.waiting_work < theirs.waiting_work


def test_a_run_is_the_same_every_time() -> None:
    course = Course(nodes=2, gpus_each=4, warm_up_seconds=30.0, seconds=60.0)
    one, other = (replace(play("balanced", 5, course), decisions_per_second=0.0) for _ in range(2))
    assert one == other
    assert one.replicas == len(make_replicas(5, 90.0, 8, GPU_MEMORY_BYTES))


def test_replicas_ask_for_as_much_as_is_said() -> None:
    seconds = 100_000.0
    replicas = make_replicas(3, seconds, 64, GPU_MEMORY_BYTES)
    held = sum(replica.memory_bytes * replica.run_seconds for replica in replicas)
    assert held / (64 * GPU_MEMORY_BYTES * seconds) == pytest.approx(OFFERED, rel=0.05)


def test_replicas_come_in_bursts() -> None:
    """Within some three seconds come many times as many as on the mean."""
    at = [replica.at for replica in make_replicas(3, 3000.0, 64, GPU_MEMORY_BYTES)]
    assert at == sorted(at)
    counts = Counter(int(one // 3) for one in at)
    assert max(counts.values()) > 8 * len(at) / 1000


def test_a_longer_time_begins_as_a_shorter_one() -> None:
    short, long = (make_replicas(3, seconds, 8, GPU_MEMORY_BYTES) for seconds in (300.0, 900.0))
    assert long[: len(short)] == short
    assert len(long) > len(short)
