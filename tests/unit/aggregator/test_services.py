"""Services by story, on a virtual clock: who is in, with which part of the calls, and why not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator import services as s
from stoker.aggregator.routing import Load
from stoker.aggregator.services import (
    ENDPOINTS_PER_SERVICE_MAX,
    GONE_SECONDS,
    SERVICES_MAX,
    SETTLE_SECONDS,
    SILENCE_SECONDS,
    Endpoint,
    EndpointLeft,
    EndpointRegistered,
    Reviewed,
    Services,
    Sign,
    SignGiven,
)
from stoker.aggregator.standings import Standing
from stoker.core.latencies import BUCKETS, bucket_of

START = 1_000_000.0
REVIEW_SECONDS = 0.25
SIGN_SECONDS = 0.5
WELL = Standing()


def sign(operations: int = 0, seconds: float = 0.01, errors: int = 0, in_flight: int = 0) -> Sign:
    counts = [0] * BUCKETS
    counts[bucket_of(seconds)] = operations - errors
    return Sign(operations, errors, tuple(counts), (operations - errors) * seconds, in_flight)


class Stage:
    """Endpoints that give signs of life twice a second, and a review every quarter of a second."""

    def __init__(self) -> None:
        self.now = START
        self.services = Services(START)
        self.standings: dict[str, Standing] = {}
        self.signs: dict[str, Callable[[], Sign]] = {}  # of those that still speak
        self.published: list[tuple[float, dict[str, float]]] = []
        self.reviewed = Reviewed((), (), ())
        self._ticks = 0

    def register(self, id_: str, service: str = "tok", **fields: object) -> None:
        endpoint = Endpoint(
            *(id_, service, f"10.0.0.1:{len(self.signs)}", f"a-{id_}", "n1"),
            *((f"GPU-{id_}",), "0", None, self.now),
        )
        endpoint = replace(endpoint, **fields)  # type: ignore[arg-type]
        self.services.handle(EndpointRegistered(self.now, endpoint))
        self.signs[id_] = sign

    def leave(self, id_: str) -> None:
        self.signs.pop(id_, None)
        self.services.handle(EndpointLeft(self.now, id_))

    def review(self) -> Reviewed:
        def stand(allocation_id: str) -> Standing:
            return self.standings.get(allocation_id.removeprefix("a-"), WELL)

        self.reviewed = self.services.review(self.services.due(self.now), self.now, stand)
        if self.reviewed.changed:
            self.published.append((self.now, self.weights()))
        return self.reviewed

    def later(self, seconds: float) -> None:
        for _ in range(round(seconds / REVIEW_SECONDS)):
            self.now += REVIEW_SECONDS
            self._ticks += 1
            if self._ticks % round(SIGN_SECONDS / REVIEW_SECONDS) == 0:
                for id_, make in self.signs.items():
                    self.services.handle(SignGiven(self.now, id_, make()))
            self.review()

    def weights(self, service: str = "tok") -> dict[str, float]:
        view = self.services.view(service, self.now)
        return {each.endpoint.id: round(each.share.weight, 3) for each in view.endpoints}

    def reason(self, id_: str, service: str = "tok") -> str:
        views = self.services.view(service, self.now).endpoints
        return next(each.share.reason for each in views if each.endpoint.id == id_)


def staged(*ids: str) -> Stage:
    stage = Stage()
    for id_ in ids:
        stage.register(id_)
    stage.later(1.0)
    return stage


def test_registered_endpoints_share_the_calls() -> None:
    stage = Stage()
    stage.register("a")
    assert stage.weights() == {}  # it shows with the next review
    assert stage.review().changed == ("tok",)
    assert stage.weights() == {"a": 1.0}
    stage.register("b")
    stage.later(REVIEW_SECONDS)
    assert stage.weights() == {"a": 0.5, "b": 0.5}


def test_endpoint_that_leaves_is_not_called_from_then_on() -> None:
    stage = staged("a", "b")
    stage.leave("a")
    assert "a" not in stage.weights()
    assert stage.review().changed == ("tok",)
    assert stage.weights() == {"b": 1.0}
    stage.leave("a")  # once more changes nothing
    assert stage.review().changed == ()


def test_last_endpoint_takes_the_service_with_it() -> None:
    stage = staged("a")
    before = stage.services.view("tok", stage.now).version
    stage.leave("a")
    assert stage.review().changed == ("tok",)
    assert stage.services.names() == []
    view = stage.services.view("tok", stage.now)
    assert view.endpoints == ()
    assert view.version > before
    assert stage.review().changed == ()


def test_silent_endpoint_leaves_within_two_seconds() -> None:
    stage = staged("a", "b")
    stage.later(SIGN_SECONDS)
    del stage.signs["a"]
    fell_silent = stage.now
    stage.later(2.0)
    left = next(at for at, weights in stage.published if at > fell_silent and not weights["a"])
    assert left - fell_silent <= 2.0
    assert stage.weights() == {"a": 0.0, "b": 1.0}
    assert stage.reason("a") == f"silent for more than {SILENCE_SECONDS:g} s"


def test_silent_endpoint_that_speaks_again_is_called_again() -> None:
    stage = staged("a", "b")
    del stage.signs["a"]
    stage.later(3.0)
    assert stage.weights()["a"] == 0.0
    stage.signs["a"] = sign
    stage.later(1.0)
    assert stage.weights() == {"a": 0.5, "b": 0.5}


def test_silent_endpoint_is_not_waited_for_without_end() -> None:
    stage = staged("a", "b")
    del stage.signs["a"]
    stage.later(GONE_SECONDS - 1.0)
    assert not stage.reviewed.silent
    stage.later(2.0)
    assert stage.reviewed.silent == ("a",)


@pytest.mark.parametrize(
    ("standing", "reason"),
    [
        (Standing(out="GPU 0 is unhealthy: Xid 79"), "GPU 0 is unhealthy: Xid 79"),
        (Standing(over="allocation a-a is releasing"), "allocation a-a is releasing"),
    ],
)
def test_what_the_fleet_holds_against_an_endpoint_takes_it_out_at_once(
    standing: Standing, reason: str
) -> None:
    stage = staged("a", "b")
    stage.standings["a"] = standing
    stage.later(REVIEW_SECONDS)
    assert stage.weights() == {"a": 0.0, "b": 1.0}
    assert stage.reason("a") == reason
    assert stage.reviewed.over == ((("a", reason),) if standing.over else ())


def test_endpoint_whose_gpu_is_well_again_is_called_again() -> None:
    stage = staged("a", "b")
    stage.standings["a"] = Standing(out="cordoned")
    stage.later(1.0)
    del stage.standings["a"]
    stage.later(REVIEW_SECONDS)
    assert stage.weights() == {"a": 0.5, "b": 0.5}


def test_where_all_are_out_nobody_is_called() -> None:
    stage = staged("a", "b")
    stage.standings = {"a": Standing(out="cordoned"), "b": Standing(out="cordoned")}
    stage.later(REVIEW_SECONDS)
    assert stage.weights() == {"a": 0.0, "b": 0.0}


def test_slowed_endpoint_loses_calls_and_gets_them_back() -> None:
    stage = staged("a", "b", "c")
    for id_ in "abc":
        stage.signs[id_] = lambda: sign(10, 0.009)
    stage.later(4.0)
    assert stage.weights() == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, abs=0.01)
    stage.signs["a"] = lambda: sign(5, 0.2, in_flight=2)
    stage.later(4.0)
    assert stage.weights()["a"] < 0.1
    assert stage.reason("a").startswith("slower: a median of ")
    stage.signs["a"] = lambda: sign(5, 0.009)
    stage.later(12.0)
    assert stage.weights()["a"] > 0.25


def test_failing_endpoint_does_not_draw_calls_by_being_fast() -> None:
    stage = staged("a", "b")
    stage.signs = {"a": lambda: sign(100, errors=100), "b": lambda: sign(10, 0.2, in_flight=2)}
    stage.later(4.0)
    assert stage.weights()["a"] < 0.2
    assert "100 % of its operations fail" in stage.reason("a")


def test_busy_gpu_loses_calls_slowly() -> None:
    """One sample is no load: utilization counts half after the half-life."""
    stage = staged("a", "b")
    stage.standings = {"a": Standing(utilization_ratio=0.0), "b": Standing(utilization_ratio=0.0)}
    stage.later(1.0)
    stage.standings["a"] = Standing(utilization_ratio=1.0)
    stage.later(REVIEW_SECONDS)
    assert stage.weights() == {"a": 0.5, "b": 0.5}
    stage.later(20.0)
    assert stage.weights()["a"] == pytest.approx(0.2, abs=0.05)


def test_weights_do_not_flap_with_the_noise_of_reports() -> None:
    stage = staged("a", "b")
    turns = iter(range(10**6))
    stage.signs = {
        "a": lambda: sign(10 + next(turns) % 3, 0.0075, in_flight=next(turns) % 2),
        "b": lambda: sign(10, 0.0075, in_flight=next(turns) % 2),
    }
    stage.later(5.0)
    published = len(stage.published)
    stage.later(30.0)
    # Between them lies only that the aggregator has settled.
    assert len(stage.published) - published <= 1


def test_what_was_seen_long_ago_says_nothing() -> None:
    stage = staged("a", "b")
    stage.signs["a"] = lambda: sign(1, 5.0)
    stage.signs["b"] = lambda: sign(1, 0.01)
    stage.later(4.0)
    assert stage.weights()["a"] < 0.1
    stage.signs = {"a": sign, "b": sign}
    stage.later(30.0)
    view = stage.services.view("tok", stage.now)
    assert [each.load for each in view.endpoints] == [Load(in_flight=0.0), Load(in_flight=0.0)]
    assert stage.weights() == {"a": 0.5, "b": 0.5}


def test_rate_counts_the_last_seconds() -> None:
    stage = staged("a")
    stage.signs["a"] = lambda: sign(50)
    stage.later(30.0)
    (view,) = stage.services.view("tok", stage.now).endpoints
    assert view.operations_per_second == pytest.approx(100.0, rel=0.01)


def test_what_was_done_in_an_outage_is_counted_and_is_no_load() -> None:
    """A replica that comes back tells at once of all that it did meanwhile."""
    stage = staged("b")
    stage.signs["b"] = lambda: sign(50, 0.009)
    stage.register("a", gpu="1")
    stage.services.handle(SignGiven(stage.now, "a", sign(60_000, 0.009)))
    stage.signs["a"] = lambda: sign(50, 0.2)
    stage.later(4.0)
    view = stage.services.view("tok", stage.now).endpoints
    (rate,) = [each.operations_per_second for each in view if each.endpoint.id == "a"]
    assert rate == pytest.approx(100.0, rel=0.05)
    assert stage.reason("a").startswith("slower: a median of ")
    assert stage.services.totals()["tok", "n1", "1"].operations == 60_000 + 8 * 50


def test_aggregator_that_stood_still_holds_it_against_nobody() -> None:
    stage = staged("a", "b")
    stage.now += 60.0
    assert stage.review().changed == ("tok",)  # it has settled meanwhile
    assert stage.weights() == {"a": 0.5, "b": 0.5}
    assert stage.reviewed.silent == ()


def test_round_that_takes_long_is_no_standstill() -> None:
    """Other work has the loop between one service and the next; everybody is heard meanwhile."""
    stage = staged("a")
    for number in range(8):
        stage.register(f"b{number}", f"other-{number}")
    stage.later(1.0)
    del stage.signs["a"]
    for _ in range(4):
        for name in stage.services.due(stage.now):
            stage.services.review((name,), stage.now, lambda _: WELL)
            stage.now += 0.25
            for id_, make in stage.signs.items():
                stage.services.handle(SignGiven(stage.now, id_, make()))
    assert stage.weights() == {"a": 0.0}
    assert stage.weights("other-0") == {"b0": 1.0}


def test_process_that_stands_still_within_a_round_holds_it_against_nobody() -> None:
    stage = staged("a")
    names = stage.services.due(stage.now)
    stage.now += 60.0
    stage.services.review(names, stage.now, lambda _: WELL)
    assert stage.weights() == {"a": 1.0}


def test_clock_that_is_set_back_keeps_no_silent_endpoint_in() -> None:
    stage = staged("a", "b")
    stage.now -= 3600.0
    del stage.signs["a"]
    stage.later(2.0)
    assert stage.weights() == {"a": 0.0, "b": 1.0}


def test_clock_that_is_set_back_unsettles_nothing() -> None:
    stage = staged("a")
    stage.later(SETTLE_SECONDS)
    stage.now -= 3600.0
    stage.later(1.0)
    assert stage.services.view("tok", stage.now).is_settled


def test_settling_is_told() -> None:
    stage = staged("a")
    assert not stage.services.view("tok", stage.now).is_settled
    stage.later(SETTLE_SECONDS)
    assert [at for at, _ in stage.published] == [START + REVIEW_SECONDS, START + SETTLE_SECONDS]
    assert stage.services.view("tok", stage.now).is_settled


def test_versions_rise() -> None:
    stage = staged("a")
    versions = [stage.services.view("tok", stage.now).version]
    for id_ in "bc":
        stage.register(id_)
        stage.later(REVIEW_SECONDS)
        versions.append(stage.services.view("tok", stage.now).version)
    stage.register("x", "other")
    stage.later(REVIEW_SECONDS)
    assert stage.services.view("tok", stage.now).version == versions[-1]
    assert versions == sorted(set(versions))


def test_address_names_its_endpoint() -> None:
    stage = staged("a")
    assert stage.services.at_address("tok", "10.0.0.1:0") == "a"
    assert stage.services.at_address("other", "10.0.0.1:0") is None
    assert stage.services.at_address("tok", "10.0.0.2:0") is None


def test_there_is_room_for_so_many_and_not_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    for number in range(ENDPOINTS_PER_SERVICE_MAX):
        stage.register(str(number))
    assert stage.services.no_room_for("tok") == "service tok has 1024 endpoints already"
    assert stage.services.no_room_for("other") == ""
    monkeypatch.setattr(s, "ENDPOINTS_MAX", ENDPOINTS_PER_SERVICE_MAX)
    assert stage.services.no_room_for("other") == "there are 1024 endpoints already"
    stage.leave("0")
    assert stage.services.no_room_for("tok") == ""


def test_there_is_room_for_so_many_services() -> None:
    stage = Stage()
    for number in range(SERVICES_MAX):
        stage.register(str(number), f"s{number}")
    assert stage.services.no_room_for("one-more") == "there are 1000 services already"
    assert stage.services.no_room_for("s0") == ""


def test_sums_outlive_their_endpoints_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "TOTALS_MAX", 2)
    stage = staged("a")
    stage.services.handle(SignGiven(stage.now, "a", sign(3, 0.02, errors=1)))
    stage.leave("a")
    sums = stage.services.totals()["tok", "n1", "0"]
    assert (sums.operations, sums.errors) == (3, 1)
    assert sums.latency_counts[bucket_of(0.02)] == 2
    assert sums.latency_sum_seconds == pytest.approx(0.04)
    for number in ("1", "2"):
        stage.register(number, gpu=number)
        stage.services.handle(SignGiven(stage.now, number, sign(1)))
    assert list(stage.services.totals()) == [("tok", "n1", "1"), ("tok", "n1", "2")]


# What may happen, to three endpoints of two services.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("register", "leave", "silence", "speak", "out", "well", "later")),
        st.sampled_from("abc"),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_the_weights_are_those_of_who_is_well(
    steps: list[tuple[str, str]],
) -> None:
    stage = Stage()
    there: set[str] = set()
    for what, id_ in steps:
        match what:
            case "register" if id_ not in there:
                stage.register(id_, "tok" if id_ < "c" else "other")
                there.add(id_)
            case "leave":
                stage.leave(id_)
                there.discard(id_)
            case "silence":
                stage.signs.pop(id_, None)
            case "speak" if id_ in there:
                stage.signs[id_] = sign
            case "out":
                stage.standings[id_] = Standing(out="ill")
            case "well":
                stage.standings.pop(id_, None)
            case _:
                stage.later(2.0)
    stage.later(2.0)
    for service in ("tok", "other"):
        members = {id_ for id_ in there if (id_ == "c") == (service == "other")}
        called = {id_ for id_ in members if id_ in stage.signs and id_ not in stage.standings}
        weights = stage.weights(service)
        assert weights.keys() == members
        assert {id_ for id_, weight in weights.items() if weight} == called
        assert sum(weights.values()) == pytest.approx(float(bool(called)), abs=0.01)
