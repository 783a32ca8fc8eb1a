"""A GPU that the hardware holds back is found in ten minutes of load; healthy jobs never are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.stragglers import (
    Gang,
    Member,
    Signal,
    Straggler,
    StragglerPolicy,
    Stragglers,
)

MHZ = 1e6
STEP = 10.0
POLICY = StragglerPolicy()


Shown = Mapping[str, float | None]
NOTHING: Shown = {}


def member(index: int, shown: Shown = NOTHING, node: str = "n1") -> Member:
    """A healthy GPU under load, but for what is said."""
    usual = Member(
        uuid=f"{node}-{index}",
        node=node,
        index=index,
        sm_clock_hertz=1700 * MHZ,
        memory_clock_hertz=2619 * MHZ,
        power_watts=650.0,
        utilization_ratio=0.98,
        temperature_celsius=65.0,
        pcie_link_bytes_per_second=63e9,
    )
    return msgspec.structs.replace(usual, **shown)


def gang(*shown: Shown, healthy: int = 7) -> Gang:
    """Those members first, then healthy ones."""
    rows = (*shown, *[NOTHING] * healthy)
    return Gang("a1", "H100", tuple(member(index, each) for index, each in enumerate(rows)))


def watched(stragglers: Stragglers, now: float, seconds: float, *gangs: Gang) -> float:
    """Observe the same for so long; return when it ends."""
    end = now + seconds
    while now < end:
        now += STEP
        stragglers.observe(now, gangs)
    return now


def found(*gangs: Gang, seconds: float = 900.0, policy: StragglerPolicy = POLICY) -> list[str]:
    """Who is found by the end, with the signal."""
    stragglers = Stragglers(policy)
    stragglers.observe(0.0, gangs)
    watched(stragglers, 0.0, seconds, *gangs)
    return [f"{row.uuid} {row.signal}" for row in stragglers.found()]


SLOW: Shown = {"sm_clock_hertz": 1400 * MHZ, "power_watts": 560.0}
HOT: Shown = {**SLOW, "temperature_celsius": 89.0}
IDLE: Shown = {"utilization_ratio": 0.0, "sm_clock_hertz": 345 * MHZ, "power_watts": 75.0}
UNTOLD: Shown = {"utilization_ratio": None}


FOUND: dict[str, tuple[Gang, list[str]]] = {
    "a slow card": (gang(SLOW), ["n1-0 sm_clock"]),
    "a slow card among three": (gang(SLOW, healthy=2), ["n1-0 sm_clock"]),
    "three of eight": (gang(SLOW, SLOW, HOT, healthy=5), [f"n1-{i} sm_clock" for i in range(3)]),
    "slow at the power that all others draw, at the limit": (
        gang({"sm_clock_hertz": 1400 * MHZ}),
        ["n1-0 sm_clock"],
    ),
    "slow, where power is not told": (
        gang({"sm_clock_hertz": 1400 * MHZ, "power_watts": None}),
        ["n1-0 sm_clock"],
    ),
    "a memory clock that stays low": (
        gang({"memory_clock_hertz": 1593 * MHZ}),
        ["n1-0 memory_clock"],
    ),
    "lanes that are not used, though it waits for half of the time": (
        gang({"pcie_link_bytes_per_second": 31e9, "utilization_ratio": 0.5}),
        ["n1-0 pcie_link"],
    ),
    "one row for a GPU that is behind in all": (
        gang({**SLOW, "memory_clock_hertz": 1593 * MHZ, "pcie_link_bytes_per_second": 4e9}),
        ["n1-0 sm_clock"],
    ),
    "a node whose cards are all throttled, beside another node": (
        Gang("a1", "H100", (*(member(i, NOTHING, "n1") for i in range(4)),
                            *(member(i, HOT, "n2") for i in range(2)))),
        ["n2-0 sm_clock", "n2-1 sm_clock"],
    ),
    "a slow card beside one that tells no clock": (
        gang(SLOW, {"sm_clock_hertz": None}),
        ["n1-0 sm_clock"],
    ),
}  # fmt: skip

SILENT: dict[str, tuple[Gang, ...]] = {
    "healthy": (gang(),),
    "eight per cent, as healthy cards differ": (gang({"sm_clock_hertz": 1564 * MHZ}),),
    "two GPUs: nobody can say which is right": (gang(SLOW, healthy=1),),
    "three GPUs of which one is idle": (
        gang(SLOW, IDLE, healthy=1),
    ),
    "two halves": (gang(SLOW, SLOW, SLOW, SLOW, healthy=4),),
    "idle, one of them at a lower clock": (
        gang(*[{**IDLE, "sm_clock_hertz": 1980 * MHZ}] * 7, IDLE, healthy=0),
    ),
    "utilization is not told": (gang(*[UNTOLD] * 7, {**SLOW, **UNTOLD}, healthy=0),),
    "a GPU that the program does not use": (
        gang({**IDLE, "pcie_link_bytes_per_second": 4e9}),
    ),
    "a heavier stage: at the power limit when the others are not": (
        gang({"sm_clock_hertz": 1400 * MHZ, "power_watts": 699.0}),
    ),
    "clocks that differ all over": (
        gang(*({"sm_clock_hertz": (1300 + 80 * i) * MHZ} for i in range(8)), healthy=0),
    ),
    "a data loader that lets one rank wait": (
        gang({"utilization_ratio": 0.4, "power_watts": 300.0}),
    ),
    "a rank that works while the others wait": (
        gang({}, *[{"utilization_ratio": 0.5, "power_watts": 350.0}] * 7, healthy=0),
    ),
    "allocations of one GPU each": tuple(
        Gang(f"a{i}", "H100", (member(i, SLOW if i == 3 else NOTHING),)) for i in range(8)
    ),
    "two models in one allocation": (
        Gang("a1", "H100", tuple(member(i) for i in range(4))),
        Gang("a1", "A100", tuple(member(i, SLOW) for i in range(4, 8))),
    ),
    "nothing is read": (Gang("a1", "H100", tuple(Member(f"u{i}", "n1", i) for i in range(8))),),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    seen, expected = FOUND[name]
    assert found(seen) == expected


@pytest.mark.parametrize("name", SILENT)
def test_silent(name: str) -> None:
    assert found(*SILENT[name], seconds=7200.0) == []


def test_a_finding_says_what_was_seen() -> None:
    stragglers = Stragglers()
    stragglers.observe(1000.0, [gang(HOT)])
    watched(stragglers, 1000.0, 900.0, gang(HOT))
    assert stragglers.found() == (
        Straggler(
            allocation_id="a1",
            node="n1",
            uuid="n1-0",
            since=1000.0,
            signal=Signal.SM_CLOCK,
            reason="SM clock 1400 MHz under load, 0.82 of the 1700 MHz of its 8 GPUs' median; "
            "560 W (median 650 W); 89 C (median 65 C)",
        ),
    )


def test_what_is_read_later_changes_neither_reason_nor_since() -> None:
    stragglers = Stragglers()
    stragglers.observe(0.0, [gang(HOT)])
    now = watched(stragglers, 0.0, 900.0, gang(HOT))
    before = stragglers.found()
    watched(stragglers, now, 900.0, gang({**HOT, "sm_clock_hertz": 1300 * MHZ}))
    assert stragglers.found() == before


@dataclass(frozen=True)
class Turns:
    """Behind for so many of ten steps."""

    behind: int
    seconds: float | None  # of load until it is found; None: never


@pytest.mark.parametrize(
    "row", [Turns(10, 600.0), Turns(9, 1150.0), Turns(8, None), Turns(5, None)], ids=str
)
def test_how_soon(row: Turns) -> None:
    stragglers = Stragglers()
    stragglers.observe(0.0, [gang()])
    found_at = None
    for step in range(1, 2000):
        now = step * STEP
        stragglers.observe(now, [gang(SLOW) if step % 10 < row.behind else gang()])
        if found_at is None and stragglers.found():
            found_at = now
    assert found_at == row.seconds


@pytest.mark.parametrize("seconds", [10.0, 30.0, 60.0])
def test_it_takes_ten_minutes_however_often_one_looks(seconds: float) -> None:
    stragglers = Stragglers()
    stragglers.observe(0.0, [gang(SLOW)])
    now = 0.0
    while not stragglers.found():
        now += seconds
        stragglers.observe(now, [gang(SLOW)])
    assert now == 600.0


def found_after(seconds: float, seen: Gang) -> tuple[Stragglers, float]:
    stragglers = Stragglers()
    stragglers.observe(0.0, [seen])
    now = watched(stragglers, 0.0, seconds, seen)
    assert stragglers.found()
    return stragglers, now


def test_it_is_over_when_it_has_caught_up() -> None:
    stragglers, now = found_after(600.0, gang(SLOW))
    watched(stragglers, now, 140.0, gang())
    assert stragglers.found()
    watched(stragglers, now + 140.0, 10.0, gang())
    assert stragglers.found() == ()
    assert len(stragglers) == 0


def test_it_is_over_after_five_minutes_however_long_it_was() -> None:
    stragglers, now = found_after(86400.0, gang(SLOW))
    watched(stragglers, now, 300.0, gang())
    assert stragglers.found() == ()


def test_a_little_better_is_not_over() -> None:
    stragglers, now = found_after(600.0, gang(SLOW))
    watched(stragglers, now, 3600.0, gang({"sm_clock_hertz": 1550 * MHZ}))
    assert stragglers.found()


def test_it_is_over_when_the_allocation_is_gone() -> None:
    stragglers, now = found_after(600.0, gang(SLOW))
    stragglers.observe(now + STEP, [])
    assert stragglers.found() == ()
    stragglers.observe(now + 2 * STEP, [gang(SLOW)])
    assert stragglers.found() == ()


def test_time_without_load_counts_neither_way() -> None:
    stragglers = Stragglers()
    stragglers.observe(0.0, [gang(SLOW)])
    now = watched(stragglers, 0.0, 400.0, gang(SLOW))
    now = watched(stragglers, now, 1200.0, gang(*[IDLE] * 8, healthy=0))
    now = watched(stragglers, now, 190.0, gang(SLOW))
    assert stragglers.found() == ()
    now = watched(stragglers, now, 10.0, gang(SLOW))
    assert stragglers.found()
    watched(stragglers, now, 7200.0, gang(*[IDLE] * 8, healthy=0))
    assert stragglers.found()


def test_evidence_that_is_not_enough_lapses() -> None:
    stragglers = Stragglers()
    stragglers.observe(0.0, [gang(SLOW)])
    now = watched(stragglers, 0.0, 500.0, gang(SLOW))
    now = watched(stragglers, now, 1810.0, gang(*[IDLE] * 8, healthy=0))
    assert len(stragglers) == 0
    watched(stragglers, now, 500.0, gang(SLOW))
    assert stragglers.found() == ()


def test_a_pause_of_the_observer_is_no_evidence() -> None:
    stragglers = Stragglers()
    for now in (0.0, 3600.0, 7200.0):
        stragglers.observe(now, [gang(SLOW)])
    assert stragglers.found() == ()


def test_a_clock_that_goes_back_is_no_evidence() -> None:
    stragglers = Stragglers()
    stragglers.observe(10_000.0, [gang(SLOW)])
    for now in (0.0, 5000.0, 9000.0):
        stragglers.observe(now, [gang(SLOW)])
    assert len(stragglers) == 0


def test_a_member_that_is_not_read_for_a_while_keeps_its_finding() -> None:
    stragglers, now = found_after(600.0, gang(SLOW))
    rest = Gang("a1", "H100", gang(SLOW).members[1:])
    watched(stragglers, now, 600.0, rest)
    assert stragglers.found()


# Laws.
CLOCKS = st.sampled_from([1000.0, 1350.0, 1500.0, 1600.0, 1700.0, 1750.0, None])
MOMENTS = st.lists(st.lists(CLOCKS, min_size=4, max_size=4), min_size=1, max_size=40)


def seen_by(
    moments: Sequence[Sequence[float | None]],
    changed: Callable[[float, Gang], Sequence[tuple[float, Gang]]],
) -> list[tuple[Straggler, ...]]:
    """What is found after each moment, each lasting for three minutes by a lax policy."""
    policy = StragglerPolicy(observed_seconds=300.0, step_seconds_max=180.0)
    stragglers = Stragglers(policy)
    story: list[tuple[Straggler, ...]] = []
    for number, clocks in enumerate(moments):
        members = [
            member(i, {"sm_clock_hertz": None if clock is None else clock * MHZ})
            for i, clock in enumerate(clocks)
        ]
        for now, each in changed(180.0 * number, Gang("a1", "H100", tuple(members))):
            stragglers.observe(now, [each])
        story.append(stragglers.found())
        assert len(stragglers) <= len(members)
    return story


def plainly(now: float, each: Gang) -> list[tuple[float, Gang]]:
    return [(now, each)]


@given(MOMENTS)
def test_the_same_moment_told_twice_changes_nothing(
    moments: list[list[float | None]],
) -> None:
    assert seen_by(moments, plainly) == seen_by(moments, lambda now, g: [(now, g), (now, g)])


@given(MOMENTS, st.randoms(use_true_random=False))
def test_order_of_members_does_not_matter(moments: list[list[float | None]], rng: Random) -> None:
    def mixed(now: float, each: Gang) -> list[tuple[float, Gang]]:
        members = rng.sample(each.members, len(each.members))
        return [(now, Gang(each.allocation_id, each.model, tuple(members)))]

    assert seen_by(moments, plainly) == seen_by(moments, mixed)


@given(MOMENTS, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_only_ratios_matter(moments: list[list[float | None]], factor: float) -> None:
    def scaled(now: float, each: Gang) -> list[tuple[float, Gang]]:
        members = [
            msgspec.structs.replace(
                m, sm_clock_hertz=m.sm_clock_hertz and m.sm_clock_hertz * factor
            )
            for m in each.members
        ]
        return [(now, Gang(each.allocation_id, each.model, tuple(members)))]

    def uuids(story: list[tuple[Straggler, ...]]) -> list[list[str]]:
        return [[row.uuid for row in rows] for rows in story]

    assert uuids(seen_by(moments, plainly)) == uuids(seen_by(moments, scaled))


@given(MOMENTS)
def test_what_can_be_at_most_half_of_a_gang_is_found(moments: list[list[float | None]]) -> None:
    for rows in seen_by(moments, plainly):
        assert len(rows) <= 2


@given(MOMENTS)
def test_the_fastest_all_along_is_never_found(moments: list[list[float | None]]) -> None:
    fastest = [[9000.0, *clocks[1:]] for clocks in moments]
    assert all(row.uuid != "n1-0" for rows in seen_by(fastest, plainly) for row in rows)
