"""Requirements on sending a call again: which failures, after what pauses, for how long."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.client.model import Change
from stoker.client.retrying import (
    FIRST_PAUSE_SECONDS,
    PAUSE_SECONDS_MAX,
    RETRIED,
    Method,
    Seen,
    Tries,
    is_retried,
    pause_seconds,
)

# method, status, the aggregator's reason, with an idempotency key -> sent again
DECISIONS = {
    "nobody there": (Method.LIST_NODES, "UNAVAILABLE", "", False, True),
    "cut off by a restart": (Method.RELEASE, "CANCELLED", "", False, True),
    "aggregator says that it stops": (Method.EXPLAIN, "UNAVAILABLE", "STOPPING", False, True),
    "allocate with a key": (Method.ALLOCATE, "UNAVAILABLE", "", True, True),
    "allocate without a key might grant twice": (Method.ALLOCATE, "UNAVAILABLE", "", False, False),
    "refused": (Method.ALLOCATE, "RESOURCE_EXHAUSTED", "CANNOT_PLACE", True, False),
    "the store is the aggregator's own trouble": (
        *(Method.ALLOCATE, "UNAVAILABLE", "STORE_UNAVAILABLE", True, False),
    ),
    "no time left": (Method.LIST_NODES, "DEADLINE_EXCEEDED", "", False, False),
    "a watch that has run its time goes on": (Method.WATCH, "DEADLINE_EXCEEDED", "", False, True),
    "a watch that fell behind goes on": (Method.WATCH, "ABORTED", "WATCH_TOO_SLOW", False, True),
    "a watch of what is gone": (Method.WATCH, "OUT_OF_RANGE", "VERSION_TOO_OLD", False, False),
    "a bug": (Method.CORDON, "INTERNAL", "", False, False),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_what_is_sent_again(name: str) -> None:
    method, status, reason, has_key, expected = DECISIONS[name]
    assert is_retried(method, status, reason, has_key=has_key) is expected


def test_every_method_is_decided() -> None:
    assert RETRIED.keys() == set(Method)


@given(st.integers(1, 10_000), st.randoms(use_true_random=False))
def test_pauses_grow_and_are_bounded(failures: int, rng: Random) -> None:
    pause = pause_seconds(failures, rng)
    assert FIRST_PAUSE_SECONDS / 2 <= pause <= PAUSE_SECONDS_MAX
    assert pause <= FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 60)


def give_up_at(tries: Tries, now: float) -> float:
    """Fail from `now` on, at once each time; returns when the tries end."""
    while (pause := tries.pause_after_failure(now)) is not None:
        now += pause
    return now


@given(st.randoms(use_true_random=False), st.floats(0.0, 60.0), st.floats(0.0, 60.0))
def test_tries_end_with_deadline_or_patience(rng: Random, seconds: float, patience: float) -> None:
    end = give_up_at(Tries(100.0, 100.0 + seconds, patience, rng), 100.0)
    assert 100.0 <= end <= 100.0 + min(seconds, patience)
    # What is left is less than a pause.
    assert end >= 100.0 + min(seconds, patience) - PAUSE_SECONDS_MAX


def test_patience_is_for_each_outage() -> None:
    tries = Tries(0.0, 1000.0, 5.0, Random(1))
    assert give_up_at(tries, 0.0) <= 5.0
    tries.heard(500.0)
    assert 500.0 < give_up_at(tries, 500.0) <= 505.0


def test_remaining_time_is_a_valid_deadline() -> None:
    tries = Tries(0.0, 10.0, 10.0, Random(1))
    assert tries.remaining_seconds(4.0) == 6.0
    assert tries.remaining_seconds(11.0) > 0


def change(version: int, event: str) -> Change:
    return Change(version, 0.0, event, None)


def test_watch_goes_on_after_the_last_change() -> None:
    seen = Seen(7)
    assert seen.resume_from == 7
    seen.note(change(8, "AllocationGranted"))
    assert seen.resume_from == 8


def test_watch_from_nothing_begins_again_until_a_first_change() -> None:
    seen = Seen(0)
    seen.note(change(41, "Present"))
    assert seen.resume_from == 0  # the rest of what is present has not come
    seen.note(change(42, "AllocationGranted"))
    assert seen.resume_from == 42
