"""Which endpoint a call goes to: by weight and our own calls, not to one that just failed."""

import random
from collections import Counter

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.client.errors import ClientError, NoEndpoint, Unreachable
from stoker.client.routing import (
    BACK_OFF_FIRST_SECONDS,
    BACK_OFF_SECONDS_MAX,
    Picker,
    is_failure,
)
from stoker.client.services import Endpoint, ServiceEndpoints

AWAY = Unreachable("nobody there")


def told(
    weights: dict[str, float], *, epoch: str = "e1", settled: bool = True, version: int = 1
) -> ServiceEndpoints:
    endpoints = tuple(
        Endpoint(
            f"id-{at}", at, weight, "as well as its peers" if weight else "cordoned", "a", "n", ()
        )
        for at, weight in weights.items()
    )
    return ServiceEndpoints("tok", version, epoch, settled, 0.0, endpoints)


def picker(weights: dict[str, float], seed: int = 1) -> Picker:
    made = Picker("tok", random.Random(seed))
    made.update(told(weights))
    return made


def picks(made: Picker, count: int, now: float = 0.0) -> Counter[str]:
    """Pick so often, each call over before the next."""
    found = Counter[str]()
    for _ in range(count):
        endpoint = made.pick(now)
        made.done(endpoint, now, ok=True)
        found[endpoint.address] += 1
    return found


def addresses(made: Picker) -> set[str]:
    return {each.address for each in made.endpoints}


def test_idle_endpoints_are_called_by_their_weight() -> None:
    found = picks(picker({"a": 0.7, "b": 0.2, "c": 0.1}), 10_000)
    assert [found[each] / 10_000 for each in "abc"] == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def test_calls_under_way_are_spread_by_the_weight() -> None:
    made = picker({"a": 0.6, "b": 0.3, "c": 0.1})
    under_way = Counter(made.pick(0.0).address for _ in range(1000))
    assert [under_way[each] / 1000 for each in "abc"] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_endpoint_that_does_not_answer_is_avoided_before_its_weight_changes() -> None:
    """Calls on b pile up; those on a are over at once."""
    made = picker({"a": 0.5, "b": 0.5})
    stuck = 0
    for _ in range(1000):
        endpoint = made.pick(0.0)
        if endpoint.address == "a":
            made.done(endpoint, 0.0, ok=True)
        else:
            stuck += 1
    # Two are drawn, and both times it is these two: it is called only as long as it is idle.
    assert stuck == 1


def test_many_callers_do_not_flood_a_slow_endpoint_that_is_idle_for_each_of_them() -> None:
    """Each has one call on the fast one; for its next the slow one is no better for being idle."""
    went = Counter[str]()
    for seed in range(500):
        made = picker({"fast": 0.98, "slow": 0.02}, seed)
        while (first := made.pick(0.0)).address != "fast":
            made.done(first, 0.0, ok=True)
        went[made.pick(0.0).address] += 1
    assert went["slow"] / 500 == pytest.approx(0.02, abs=0.02)


def test_endpoint_without_weight_is_not_called() -> None:
    assert picks(picker({"a": 0.0, "b": 1.0}), 100) == {"b": 100}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "service tok has no endpoint"),
        ({"a": 0.0, "b": 0.0}, "none of its 2 endpoints can be called: a: cordoned; b: cordoned"),
        (dict.fromkeys("abcde", 0.0), "c: cordoned; 2 more"),
    ],
)
def test_where_there_is_none_to_call_it_says_why(weights: dict[str, float], said: str) -> None:
    with pytest.raises(NoEndpoint, match=said):
        picker(weights).pick(0.0)


def test_before_anything_was_heard_it_says_what_is_in_the_way() -> None:
    made = Picker("tok", random.Random(1))
    with pytest.raises(Unreachable, match="has not told of its endpoints yet"):
        made.pick(0.0)
    made.lose(AWAY)
    with pytest.raises(Unreachable, match="nobody there"):
        made.pick(0.0)


def fail(made: Picker, now: float, address: str = "a") -> None:
    """Have a call on this endpoint fail."""
    while (endpoint := made.pick(now)).address != address:
        made.done(endpoint, now, ok=None)
    made.done(endpoint, now, ok=False)


def test_endpoint_that_failed_is_left_out_for_a_moment() -> None:
    made = picker({"a": 0.5, "b": 0.5})
    fail(made, 0.0)
    assert picks(made, 100, now=0.2) == {"b": 100}
    assert "a" in picks(made, 100, now=BACK_OFF_FIRST_SECONDS)


def test_moment_grows_with_every_failure_up_to_a_bound_and_ends_with_a_success() -> None:
    made = picker({"a": 0.5, "b": 0.5})
    now = 0.0
    for failures in range(10):
        fail(made, now)
        longest = min(BACK_OFF_FIRST_SECONDS * 2**failures, BACK_OFF_SECONDS_MAX)
        assert picks(made, 50, now + 0.49 * longest) == {"b": 50}
        now += longest
    assert "a" in picks(made, 50, now)  # well, by which it is as if it had never failed
    fail(made, now)
    assert "a" in picks(made, 50, now + BACK_OFF_FIRST_SECONDS)


def test_calls_that_fail_together_are_one_failure() -> None:
    made = picker({"a": 1.0})
    under_way = [made.pick(0.0) for _ in range(20)]
    for endpoint in under_way:
        made.done(endpoint, 0.0, ok=False)
    made.update(told({"a": 0.5, "b": 0.5}))
    assert "a" in picks(made, 50, now=BACK_OFF_FIRST_SECONDS)


def test_where_all_failed_the_first_to_come_back_is_called() -> None:
    made = picker({"a": 0.5, "b": 0.5})
    fail(made, 0.0, "a")
    fail(made, 10.0, "b")
    fail(made, 10.1, "a")  # after b: its moment is longer too
    assert picks(made, 10, now=10.2) == {"b": 10}


def test_call_that_tells_nothing_changes_nothing() -> None:
    made = picker({"a": 1.0})
    endpoint = made.pick(0.0)
    assert made.in_flight(endpoint) == 1
    made.done(endpoint, 0.0, ok=None)
    assert made.in_flight(endpoint) == 0
    assert picks(made, 1) == {"a": 1}


def test_call_that_was_not_picked_is_a_mistake() -> None:
    made = picker({"a": 1.0})
    endpoint = made.pick(0.0)
    made.done(endpoint, 0.0, ok=True)
    with pytest.raises(ValueError, match="a has no call under way"):
        made.done(endpoint, 0.0, ok=True)


def test_call_may_end_after_its_endpoint_has_gone() -> None:
    made = picker({"a": 1.0})
    endpoint = made.pick(0.0)
    made.update(told({"b": 1.0}))
    made.done(endpoint, 0.0, ok=False)
    assert addresses(made) == {"b"}


# --- the aggregator goes and comes back


def test_while_the_aggregator_is_away_calls_go_on() -> None:
    made = picker({"a": 0.5, "b": 0.5})
    made.lose(AWAY)
    assert made.trouble is AWAY
    assert set(picks(made, 100)) == {"a", "b"}
    made.update(told({"a": 1.0}, version=2))
    assert made.trouble is None
    assert picks(made, 10) == {"a": 10}


def test_it_says_once_that_the_aggregator_is_away(caplog: pytest.LogCaptureFixture) -> None:
    made = picker({"a": 1.0})
    for _ in range(3):
        made.lose(AWAY)
    (record,) = caplog.records
    assert (
        "the endpoints of tok are not told any more; calls go on to the 1 known" in record.message
    )


def test_until_a_new_aggregator_has_settled_the_endpoints_of_before_stay() -> None:
    made = picker({"a": 0.4, "b": 0.3, "c": 0.3})
    made.update(told({}, epoch="e2", settled=False))
    assert addresses(made) == {"a", "b", "c"}
    made.update(told({"a": 1.0}, epoch="e2", settled=False))
    assert addresses(made) == {"a", "b", "c"}
    made.update(told({"b": 1.0}, epoch="e2", settled=False))  # a came back, and has left
    assert addresses(made) == {"b", "c"}
    made.update(told({"b": 1.0}, epoch="e2", settled=True))
    assert addresses(made) == {"b"}


def test_first_to_come_back_does_not_get_the_calls_of_all() -> None:
    """The weights of a set make a whole, and it is the whole of one at first."""
    names = "abcdefghij"
    made = picker(dict.fromkeys(names, 0.1))
    made.update(told({"a": 1.0}, epoch="e2", settled=False))
    assert {e.address: e.weight for e in made.endpoints} == pytest.approx(dict.fromkeys(names, 0.1))
    made.update(told({"a": 0.75, "b": 0.25, "k": 0.0}, epoch="e2", settled=False))
    weights = {e.address: e.weight for e in made.endpoints}
    assert weights == pytest.approx({**dict.fromkeys(names, 0.1), "a": 0.15, "b": 0.05, "k": 0.0})


def test_endpoint_that_left_under_the_same_aggregator_is_gone_at_once() -> None:
    made = Picker("tok", random.Random(1))
    made.update(told({"a": 0.5, "b": 0.5}, settled=False))
    made.update(told({"b": 1.0}, settled=False))
    assert addresses(made) == {"b"}


# --- which exceptions say that an endpoint is in trouble


class Lost(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Lost(grpc.StatusCode.UNAVAILABLE), True),
        (Lost(grpc.StatusCode.DEADLINE_EXCEEDED), True),
        (Lost(grpc.StatusCode.RESOURCE_EXHAUSTED), True),
        (Lost(grpc.StatusCode.INTERNAL), True),
        (Lost(grpc.StatusCode.INVALID_ARGUMENT), False),
        (Lost(grpc.StatusCode.NOT_FOUND), False),
        (Lost(grpc.StatusCode.CANCELLED), None),
        (grpc.FutureCancelledError(), None),
        (grpc.RpcError("made by a wrapper, without a status"), True),
        (ConnectionError(), True),
        (TimeoutError(), True),
    ],
)
def test_answer_is_no_failure_and_a_cancelled_call_tells_nothing(
    error: Exception, expected: bool | None
) -> None:
    assert is_failure(error) is expected


# --- laws

WEIGHTS = st.dictionaries(
    st.sampled_from("abcdef"), st.sampled_from((0.0, 0.01, 0.5, 1.0)), max_size=6
)


@given(
    WEIGHTS,
    st.lists(st.tuples(st.sampled_from((True, False, None)), st.floats(0.0, 3.0)), max_size=30),
    st.integers(0, 1000),
)
def test_whatever_fails_one_with_weight_is_picked_if_there_is_one(
    weights: dict[str, float], calls: list[tuple[bool | None, float]], seed: int
) -> None:
    made, now = picker(weights, seed), 0.0
    for ok, later in calls:
        now += later
        try:
            endpoint = made.pick(now)
        except ClientError:
            assert not any(weights.values())
            return
        assert weights[endpoint.address] > 0
        made.done(endpoint, now, ok=ok)
    assert all(made.in_flight(each) == 0 for each in made.endpoints)


@given(st.integers(0, 10_000))
def test_draw_is_as_the_seed_says(seed: int) -> None:
    one, other = (picker({"a": 0.5, "b": 0.3, "c": 0.2}, seed) for _ in range(2))
    assert [one.pick(0.0).address for _ in range(20)] == [
        other.pick(0.0).address for _ in range(20)
    ]
