"""What keeps failing is told apart, with its odds; chance, bursts and whole nodes are not told."""

import math
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.lemons import (
    RATE_PUBLISHED_PER_GPU_DAY,
    Failure,
    Lemon,
    LemonKind,
    LemonPolicy,
    Place,
    find_lemons,
    poisson_tail,
)

HOUR = 3600.0
DAY = 24 * HOUR
NOW = 1000 * DAY
GPU, SLOT = LemonKind.GPU, LemonKind.SLOT


def slot(index: int) -> str:
    return f"0000:{index:02x}:00.0"


def place(number: int) -> Place:
    """Return the slot of the GPU of that number: eight on a node."""
    return Place(f"node-{number // 8}", slot(number % 8))


def fleet(gpus: int = 80) -> dict[str, Place]:
    return {f"GPU-{number}": place(number) for number in range(gpus)}


def failed(days_ago: float, number: int, where: int | None = None, what: str = "Xid 79") -> Failure:
    """A failure of the card of that number, in its own slot or in another one's."""
    at = place(number if where is None else where)
    return Failure(NOW - days_ago * DAY, f"GPU-{number}", at.node, at.slot, what)


def node_failed(days_ago: float, node: int) -> list[Failure]:
    """All of a node fails, one card after the other."""
    return [failed(days_ago - i * 20 / DAY, 8 * node + i) for i in range(8)]


def told(lemons: tuple[Lemon, ...]) -> list[tuple[LemonKind, str, int]]:
    """Return of what kind the findings are, the card or the slot, and how many failures count."""
    return [
        (lemon.kind, lemon.uuid if lemon.kind is GPU else f"{lemon.node} {lemon.slot}", count)
        for lemon in lemons
        for count in [lemon.failures]
    ]


THRICE = [failed(9, 3), failed(5, 3), failed(1, 3)]
MOVED = fleet() | {"GPU-3": place(70), "GPU-70": place(3)}
REPLACED = {("GPU-new" if uuid == "GPU-3" else uuid): at for uuid, at in fleet().items()}
WITHOUT = {uuid: at for uuid, at in fleet().items() if uuid != "GPU-3"}
WITHOUT_NODE = {uuid: at for uuid, at in fleet().items() if at.node != "node-0"}

FOUND: dict[str, tuple[list[Failure], dict[str, Place], list[tuple[LemonKind, str, int]]]] = {
    "a card that failed three times": (THRICE, fleet(), [(GPU, "GPU-3", 3)]),
    "also where it is alone with seven others": (THRICE, fleet(8), [(GPU, "GPU-3", 3)]),
    "a card that took its fault along": (
        [failed(9, 3), failed(5, 3), failed(1, 3, where=70)],
        MOVED,
        [(GPU, "GPU-3", 3)],
    ),
    "a slot in which different cards failed": (
        [failed(9, 3), failed(5, 70, where=3), failed(1, 50, where=3)],
        fleet(),
        [(SLOT, f"node-0 {slot(3)}", 3)],
    ),
    "the slot, where its card failed often and then the next one": (
        [*THRICE, failed(0.1, 70, where=3)],
        MOVED,
        [(SLOT, f"node-0 {slot(3)}", 4)],
    ),
    "the card, where it failed elsewhere as often as another one in its slot": (
        [failed(9, 3), failed(5, 3), failed(3, 3, where=70), failed(1, 70, where=3)],
        MOVED,
        [(GPU, "GPU-3", 3)],
    ),
    "two at a time": (
        [*THRICE, *(failed(days, 42) for days in (8, 6, 4, 2))],
        fleet(),
        [(GPU, "GPU-42", 4), (GPU, "GPU-3", 3)],
    ),
    "one that failed very often does not hide another": (
        [*THRICE, *(failed(days / 2, 42) for days in range(1, 50))],
        fleet(),
        [(GPU, "GPU-42", 49), (GPU, "GPU-3", 3)],
    ),
    "a card that is not seen any more, as long as its slot is empty": (
        THRICE,
        WITHOUT,
        [(GPU, "GPU-3", 3)],
    ),
    "the card that failed first, where its neighbour fails when it is mended": (
        [failed(days + 0.1, 4) for days in (9, 5, 1)]
        + [failed(days + 0.003, 4) for days in (9, 5, 1)]
        + [failed(days, 3) for days in (9, 5, 1)],
        fleet(),
        [(GPU, "GPU-4", 3)],
    ),
    "a card that fails again six hours after it failed": (
        [failed(2 - i * 0.25, 3) for i in range(3)],
        fleet(),
        [(GPU, "GPU-3", 3)],
    ),
}

SILENT: dict[str, tuple[list[Failure], dict[str, Place]]] = {
    "no failure": ([], fleet()),
    "two failures": (THRICE[:2], fleet()),
    "three failures within hours": ([failed(2 - i / 12, 3) for i in range(3)], fleet()),
    "a third failure before the window": ([failed(30.5, 3), *THRICE[1:]], fleet()),
    "a third failure a minute ago: others of its node may follow": (
        [*THRICE[:2], failed(60 / DAY, 3)],
        fleet(),
    ),
    "a third failure that is still to come": ([*THRICE[:2], failed(-1, 3)], fleet()),
    "a node that lost its power again and again": (
        [failure for days in (9, 5, 1) for failure in node_failed(days, 0)],
        fleet(),
    ),
    "a third failure with the whole node": ([*THRICE[:2], *node_failed(1, 0)], fleet()),
    "a fleet in which everything fails": (
        [failed(days + n / 100, n) for n in range(80) for days in (20, 10, 5, 1)],
        fleet(),
    ),
    "a card that was replaced": (THRICE, REPLACED),
    "a node that is gone": (THRICE, WITHOUT_NODE),
    "different cards of one node, each once": ([failed(9, 3), failed(5, 4), failed(1, 5)], fleet()),
    "cards of one node, each once, whose slots are not known": (
        [replace(failed(days, 3 + i), slot="") for i, days in enumerate((9, 5, 1))],
        fleet(),
    ),
    "two cards in one slot, each once": ([failed(9, 3), failed(5, 70, where=3)], fleet()),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    failures, gpus, expected = FOUND[name]
    assert told(find_lemons(failures, gpus, NOW)) == expected


@pytest.mark.parametrize("name", SILENT)
def test_silent(name: str) -> None:
    failures, gpus = SILENT[name]
    assert find_lemons(failures, gpus, NOW) == ()


def test_a_finding_says_where_it_is_and_with_which_odds() -> None:
    failures = [
        failed(12, 3),
        failed(7, 3, what="Xid 48"),
        failed(5, 3),
        failed(0.5, 3, where=70),
    ]
    (lemon,) = find_lemons(failures, MOVED, NOW)
    mean = 30 * RATE_PUBLISHED_PER_GPU_DAY
    assert lemon.odds == pytest.approx(2 * 80 * mean * mean**3 / 6, rel=0.02)
    assert replace(lemon, odds=0.0) == Lemon(
        kind=GPU,
        node="node-8",
        uuid="GPU-3",
        slot=slot(6),
        since=NOW - 12 * DAY,
        failures=4,
        odds=0.0,
        reason=(
            "4 failures in 12 days (Xid 79 3 times, Xid 48), of one card in 2 slots: "
            "node-0 0000:03:00.0, node-8 0000:06:00.0; at the fleet's rate (0.0091 per GPU in "
            "30 days) the odds of one such among 80 GPUs are 1 in 10^6"
        ),
    )


def test_a_slot_is_told_with_the_cards_that_failed_in_it_and_the_one_that_is_in_it() -> None:
    failures = [failed(0.6, 3, what=""), failed(0.4, 70, 3, what=""), failed(0.2, 50, 3, what="")]
    (lemon,) = find_lemons(failures, MOVED, NOW)
    assert (lemon.kind, lemon.node, lemon.slot, lemon.uuid) == (SLOT, *_parts(place(3)), "GPU-70")
    assert lemon.reason.startswith(
        "3 failures in 10 hours, of 3 cards in one slot: GPU-3, GPU-50, GPU-70; at "
    )


def _parts(where: Place) -> tuple[str, str]:
    return where.node, where.slot


@dataclass(frozen=True)
class Needed:
    gpus: int
    others: int  # other GPUs that failed once
    failures: int


# What docs/findings.md says.
@pytest.mark.parametrize(
    "row",
    [
        Needed(gpus=8, others=0, failures=3),
        Needed(gpus=336, others=3, failures=3),
        Needed(gpus=1300, others=11, failures=3),
        Needed(gpus=16384, others=149, failures=4),
        Needed(gpus=100_000, others=910, failures=4),
        Needed(gpus=336, others=15, failures=4),  # five times the published rate
        Needed(gpus=8, others=1, failures=5),
        Needed(gpus=8, others=3, failures=7),
        Needed(gpus=8, others=6, failures=12),
    ],
    ids=str,
)
def test_failures_needed(row: Needed) -> None:
    """The larger the fleet, and the more it fails, the more failures are needed."""
    gpus = {f"GPU-{number}": Place(f"node-{number}", slot(0)) for number in range(row.gpus)}

    def failures(count: int) -> list[Failure]:
        own = [Failure(NOW - (i + 1) * DAY, "GPU-0", "node-0", slot(0)) for i in range(count)]
        others = [
            Failure(NOW - DAY, f"GPU-{n}", f"node-{n}", slot(0)) for n in range(1, row.others + 1)
        ]
        return own + others

    assert find_lemons(failures(row.failures - 1), gpus, NOW) == ()
    (lemon,) = find_lemons(failures(row.failures), gpus, NOW)
    assert lemon.uuid == "GPU-0"


@pytest.mark.parametrize("mean", [0.0, 1e-9, 0.01, 0.5, 3.0, 40.0, 2000.0])
@pytest.mark.parametrize("least", [0, 1, 2, 5, 50])
def test_poisson_tail(mean: float, least: int) -> None:
    log = math.log(mean) if mean else -math.inf
    terms = [
        math.exp(n * log - mean - math.lgamma(n + 1)) if mean or n else 1.0
        for n in range(least, 4000)
        if mean or not n
    ]
    assert poisson_tail(mean, least) == pytest.approx(math.fsum(terms), rel=1e-9)


def test_odds_are_how_many_findings_chance_gives_when_one_looks_all_the_time() -> None:
    """By trial: a process of 1.5 per window, watched for 20,000 windows."""
    rng, mean, least, windows = Random(1), 1.5, 4, 20_000
    at, times, hits = 0.0, list[float](), 0
    while (at := at + rng.expovariate(mean)) < windows:
        times = [*(time for time in times if time > at - 1.0), at]
        hits += len(times) >= least
    assert hits / windows == pytest.approx(mean * poisson_tail(mean, least - 1), rel=0.05)


def test_a_healthy_fleet_is_as_silent_as_stated() -> None:
    """60 GPUs at twenty times the published rate, with odds so lax that chance does find some."""
    rng, runs, found = Random(2), 400, 0
    gpus = {f"GPU-{n}": Place(f"node-{n}", slot(0)) for n in range(60)}
    policy = LemonPolicy(odds_max=0.2)
    for _ in range(runs):
        failures = list[Failure]()
        at = NOW - policy.window_seconds
        rate = 20 * RATE_PUBLISHED_PER_GPU_DAY * len(gpus) / DAY
        while (at := at + rng.expovariate(rate)) < NOW:
            number = rng.randrange(len(gpus))
            failures.append(Failure(at, f"GPU-{number}", f"node-{number}", slot(0)))
        found += any(find_lemons(failures, gpus, f.at + 600.0, policy) for f in failures)
    assert 0 < found / runs <= 0.2


# Laws, over fleets in which every card has a node to itself.
ALONE = {f"GPU-{n}": Place(f"node-{n}", slot(0)) for n in range(30)}
HOURS = st.integers(min_value=0, max_value=29 * 24)
EVENTS = st.lists(st.tuples(st.integers(0, 5), HOURS), max_size=40)


def alone(events: list[tuple[int, int]], first: int = 0) -> list[Failure]:
    return [
        Failure(NOW - DAY - hours * HOUR, f"GPU-{first + n}", f"node-{first + n}", slot(0))
        for n, hours in events
    ]


@given(EVENTS, st.randoms(use_true_random=False))
def test_order_of_failures_does_not_matter(events: list[tuple[int, int]], rng: Random) -> None:
    failures = alone(events)
    mixed = failures.copy()
    rng.shuffle(mixed)
    assert find_lemons(mixed, ALONE, NOW) == find_lemons(failures, ALONE, NOW)


@given(EVENTS, st.lists(st.integers(0, 5 * 3600), max_size=3))
def test_repeats_within_a_burst_change_nothing(
    events: list[tuple[int, int]], later: list[int]
) -> None:
    apart = [(n, hours - hours % 12) for n, hours in events]
    failures = alone(apart)
    repeats = [replace(each, at=each.at + seconds) for each in failures for seconds in later]
    assert find_lemons(failures + repeats, ALONE, NOW) == find_lemons(failures, ALONE, NOW)


@given(EVENTS)
def test_only_what_failed_often_enough_is_found(events: list[tuple[int, int]]) -> None:
    counts = {f"GPU-{n}": len({hours for m, hours in events if m == n}) for n, _ in events}
    for lemon in find_lemons(alone(events), ALONE, NOW):
        assert 3 <= lemon.failures <= counts[lemon.uuid]
        assert lemon.odds <= LemonPolicy().odds_max


@given(EVENTS, EVENTS)
def test_failures_elsewhere_never_make_a_lemon(
    events: list[tuple[int, int]], elsewhere: list[tuple[int, int]]
) -> None:
    before = {lemon.uuid for lemon in find_lemons(alone(events), ALONE, NOW)}
    both = alone(events) + alone(elsewhere, first=10)
    mine = {f"GPU-{n}" for n in range(6)}
    after = {lemon.uuid for lemon in find_lemons(both, ALONE, NOW)} & mine
    assert after <= before


@given(st.lists(HOURS, max_size=8), st.integers(1, 100_000))
def test_healthy_gpus_never_make_a_lemon_where_nothing_else_fails(
    hours: list[int], more: int
) -> None:
    failures = alone([(0, each) for each in hours])
    grown = ALONE | {f"GPU-more-{n}": Place(f"more-{n}", slot(0)) for n in range(0, more, 997)}
    before, after = find_lemons(failures, ALONE, NOW), find_lemons(failures, grown, NOW)
    assert {lemon.uuid for lemon in after} <= {lemon.uuid for lemon in before} <= {"GPU-0"}
    assert all(b.odds >= a.odds for a, b in zip(before, after, strict=False))


@given(EVENTS, st.integers(-1000, 1000))
def test_only_ages_matter(events: list[tuple[int, int]], days: int) -> None:
    failures = alone(events)
    shift = days * DAY
    moved = [replace(each, at=each.at + shift) for each in failures]
    there = find_lemons(moved, ALONE, NOW + shift)
    assert [replace(lemon, since=lemon.since - shift) for lemon in there] == list(
        find_lemons(failures, ALONE, NOW)
    )


@given(EVENTS, st.integers(0, 2))
def test_what_a_whole_node_does_at_once_makes_no_lemon(
    events: list[tuple[int, int]], index: int
) -> None:
    """Three cards on one node that fail together, as often as they like, and one of them once."""
    gpus = {f"GPU-{i}": Place("node", slot(i)) for i in range(3)}
    together = [
        Failure(NOW - DAY - hours * HOUR - i * 30, f"GPU-{i}", "node", slot(i))
        for _, hours in events
        for i in range(3)
    ]
    single = Failure(NOW - 1000.0, f"GPU-{index}", "node", slot(index))
    assert find_lemons([*together, single], gpus, NOW) == ()
