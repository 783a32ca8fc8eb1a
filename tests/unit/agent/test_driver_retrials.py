"""When something that failed is tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.driver_host.retrials import Retrials


def made() -> Retrials[str]:
    return Retrials(seconds_min=30, seconds_max=100)


def test_nothing_is_tried_at_first() -> None:
    trials = made()
    assert (tuple(trials), trials.due(1e9), trials.seconds_until_due(0)) == ((), (), None)


def test_pauses_grow_up_to_the_longest() -> None:
    trials, now, pauses = made(), 0.0, list[float | None]()
    for _ in range(4):
        trials.put_off("a", now)
        pauses.append(trials.seconds_until_due(now))
        now += 1000
    assert pauses == [30, 60, 100, 100]
    assert trials.is_last_pause("a")


def test_the_next_trial_is_of_the_one_whose_pause_ends_first() -> None:
    trials = made()
    trials.put_off("a", 0)
    trials.put_off("b", 10)
    assert [trials.due(now) for now in (29, 30, 40)] == [(), ("a",), ("a", "b")]
    assert [trials.seconds_until_due(now) for now in (0, 30, 60)] == [30, 0, 0]


@pytest.mark.parametrize(
    ("failed_again_at", "pause"),
    [(60, 60), (89, 60), (90, 30)],
)
def test_what_works_only_for_a_moment_is_not_begun_with_anew(
    failed_again_at: float, pause: float
) -> None:
    trials = made()
    trials.put_off("a", 0)
    trials.settle("a", 60)
    assert "a" not in trials
    assert trials.due(1e9) == ()
    trials.put_off("a", failed_again_at)
    assert trials.seconds_until_due(failed_again_at) == pause


@pytest.mark.parametrize(
    ("known", "renamed", "pause"),
    [(1, 1, 30), (2, 1, 60), (1, 2, 60), (0, 2, 60)],
)
def test_of_two_that_are_one_the_longer_pause_counts(
    known: int, renamed: int, pause: float
) -> None:
    trials = made()
    for key, failures in (("known", known), ("renamed", renamed)):
        for _ in range(failures):
            trials.put_off(key, 0)
    trials.rename("renamed", "known")
    assert tuple(trials) == ("known",)
    assert trials.seconds_until_due(0) == pause


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 200))))
def test_what_failed_last_is_tried_within_the_longest_pause_and_nothing_else(
    story: list[tuple[str, bool, float]],
) -> None:
    trials, now, failed_at = made(), 0.0, dict[str, float]()
    for key, fails, seconds in story:
        now += seconds
        if fails:
            trials.put_off(key, now)
            failed_at[key] = now
        else:
            trials.settle(key, now)
            failed_at.pop(key, None)
        assert set(trials) == failed_at.keys()
        assert set(trials.due(now + 100)) == failed_at.keys()
        assert {k for k, at in failed_at.items() if now - at < 30} & set(trials.due(now)) == set()
