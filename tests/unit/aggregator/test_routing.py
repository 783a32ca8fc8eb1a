"""Weights: how calls are dealt out among endpoints, as a table, and as laws."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.routing import DEAD_BAND, Candidate, Load, Share, kept_steady, weigh

EVEN = Load(0.5, 0.5, 2.0, 0.010, 0.0)


def weights(*candidates: Candidate) -> list[float]:
    return [share.weight for share in weigh(candidates).values()]


def beside_even(**different: float | None) -> Share:
    """Return the share of an endpoint beside one on which all is even."""
    load = replace(EVEN, **different)
    return weigh([Candidate("it", load), Candidate("peer", EVEN)])["it"]


# What is different from its peer; its part of the calls; why.
ROWS: dict[str, tuple[dict[str, float | None], float, str]] = {
    "nothing": ({}, 0.5, "as well as its peers"),
    # A quarter beside one.
    "twice as slow": ({"latency_p50_seconds": 0.020}, 0.2, "slower: a median of 20 ms"),
    "hopelessly slow": ({"latency_p50_seconds": 9.0}, 0.02 / 1.02, "slower: a median of 9 s"),
    # Of 1 - 0.75 u a quarter is left, and of its peer's five eighths.
    "always busy": ({"utilization_ratio": 1.0}, 2 / 7, "its GPU is 100 % busy"),
    "memory full": ({"memory_used_ratio": 1.0}, 0.2, "its GPU's memory is 100 % full"),
    "memory well used": ({"memory_used_ratio": 0.9}, 0.5, "as well as its peers"),
    # The mean is four: 1 / (1 + 6 / 4) beside 1 / (1 + 2 / 4).
    "six under way": ({"in_flight": 6.0}, 0.4 / (0.4 + 2 / 3), "6.0 operations under way"),
    "half fail": ({"error_ratio": 0.5}, 0.2, "50 % of its operations fail"),
    "all fail": ({"error_ratio": 1.0}, 0.05 / 1.05, "100 % of its operations fail"),
    "fast, for all fail": (
        {"error_ratio": 1.0, "latency_p50_seconds": None, "in_flight": 0.0},
        0.05 / (0.05 + 1 / 3),  # an idle queue beside two that wait
        "100 % of its operations fail",
    ),
    "nothing is known": (
        dict.fromkeys(
            (
                *("utilization_ratio", "memory_used_ratio", "in_flight"),
                *("latency_p50_seconds", "error_ratio"),
            ),
        ),
        0.5,
        "as well as its peers",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_part_of_the_calls_beside_an_even_peer(name: str) -> None:
    different, weight, reason = ROWS[name]
    share = beside_even(**different)
    assert share.weight == pytest.approx(weight)
    assert share.reason == reason


def test_worst_reason_comes_first() -> None:
    share = beside_even(latency_p50_seconds=0.1, utilization_ratio=1.0)
    assert share.reason == "slower: a median of 100 ms; its GPU is 100 % busy"


def test_capacity_deals_where_all_tell_it() -> None:
    idle = Load()
    assert weights(Candidate("a", idle, 30), Candidate("b", idle, 10)) == pytest.approx(
        [0.75, 0.25]
    )
    assert weights(Candidate("a", idle, 30), Candidate("b", idle)) == pytest.approx([0.5, 0.5])


def test_operations_under_way_count_by_the_capacity() -> None:
    large = Candidate("large", replace(EVEN, in_flight=9.0), 30)
    small = Candidate("small", replace(EVEN, in_flight=3.0), 10)
    assert weights(large, small) == pytest.approx([0.75, 0.25])


def test_endpoint_that_is_out_gets_nothing_and_keeps_its_reason() -> None:
    found = weigh([Candidate("ill", EVEN, out="Xid 79"), Candidate("well", EVEN)])
    assert found == {"ill": Share(0.0, "Xid 79"), "well": Share(1.0, "as well as its peers")}


def test_where_all_are_out_nobody_is_called() -> None:
    assert weights(Candidate("a", EVEN, out="Xid"), Candidate("b", EVEN, out="Xid")) == [0.0, 0.0]
    assert weigh([]) == {}


# --- laws

RATIOS = st.floats(0.0, 1.0)
LOADS = st.builds(
    Load,
    utilization_ratio=st.none() | RATIOS,
    memory_used_ratio=st.none() | RATIOS,
    in_flight=st.none() | st.floats(0.0, 1e6),
    latency_p50_seconds=st.none() | st.floats(0.0, 60.0),
    error_ratio=st.none() | RATIOS,
)
CAPACITIES = st.none() | st.integers(1, 1_000_000)


@st.composite
def services(draw: st.DrawFn) -> list[Candidate]:
    return [
        Candidate(str(number), draw(LOADS), draw(CAPACITIES), draw(st.sampled_from(("", "ill"))))
        for number in range(draw(st.integers(0, 6)))
    ]


@given(services())
def test_weights_are_parts_of_a_whole(service: list[Candidate]) -> None:
    shares = weigh(service)
    assert list(shares) == [each.id for each in service]
    for each in service:
        assert (shares[each.id].weight > 0) == (not each.out)
        assert shares[each.id].reason
    is_any_well = any(not each.out for each in service)
    assert sum(share.weight for share in shares.values()) == pytest.approx(float(is_any_well))


# Field, and the most that it can be.
WORSE = {
    "utilization_ratio": 1.0,
    "memory_used_ratio": 1.0,
    "in_flight": 1e6,
    "latency_p50_seconds": 60.0,
    "error_ratio": 1.0,
}


@given(services(), st.sampled_from(sorted(WORSE)), RATIOS)
def test_more_load_never_draws_more_calls(
    service: list[Candidate], field: str, more: float
) -> None:
    for place, each in enumerate(service):
        now = getattr(each.load, field)
        if now is None:
            continue
        worse = replace(each.load, **{field: now + more * (WORSE[field] - now)})
        after = [*service[:place], replace(each, load=worse), *service[place + 1 :]]
        before_weight = weigh(service)[each.id].weight
        assert weigh(after)[each.id].weight <= before_weight * (1 + 1e-9)


@given(services())
def test_order_of_registration_does_not_matter(service: list[Candidate]) -> None:
    one, other = weigh(service), weigh(service[::-1])
    for each in service:
        assert one[each.id].weight == pytest.approx(other[each.id].weight)


# --- hysteresis


def shares(*parts: float) -> dict[str, Share]:
    return {str(number): Share(part, "") for number, part in enumerate(parts)}


@pytest.mark.parametrize(
    ("fresh", "published", "stands"),
    [
        (shares(0.5, 0.5), shares(0.5, 0.5), True),
        (shares(0.44, 0.56), shares(0.5, 0.5), True),
        (shares(0.39, 0.61), shares(0.5, 0.5), False),
        (shares(1.0), shares(0.5, 0.5), False),
        (shares(0.5, 0.5), shares(1.0), False),
        (shares(0.0, 1.0), shares(0.001, 0.999), False),
        ({"a": Share(0.0, "silent")}, {"a": Share(0.0, "Xid 79")}, False),
        ({"a": Share(1.0, "one")}, {"a": Share(1.0, "other")}, True),
        ({}, {}, True),
    ],
)
def test_published_weights_stand_until_one_moved_far(
    fresh: dict[str, Share], published: dict[str, Share], stands: bool
) -> None:
    assert kept_steady(fresh, published) is stands


@given(st.lists(RATIOS, min_size=2, max_size=40), st.floats(0.1, 0.9))
def test_noise_within_the_band_never_republishes(noise: list[float], middle: float) -> None:
    """Whatever is published first, what stays within a tenth around the middle lets it stand."""
    width = DEAD_BAND / 2 * min(middle, 1 - middle) * 0.9
    told = [middle + width * (2 * each - 1) for each in noise]
    published = shares(told[0], 1 - told[0])
    assert all(kept_steady(shares(each, 1 - each), published) for each in told)
