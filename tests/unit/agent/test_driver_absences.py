"""Which lost GPUs are waited for, and when a fresh session looks for them."""

import pytest

from stoker.agent.driver_host.absences import Absences
from stoker.agent.readings import GpuFault, GpuIdentity, GpuReading, Inventory, ReadFailure


def inventory(*uuids: str, missing: tuple[GpuFault, ...] = ()) -> Inventory:
    gpus = tuple(GpuIdentity(index, uuid, "T4", 16) for index, uuid in enumerate(uuids))
    return Inventory(0.0, None, None, None, simulated=True, gpus=gpus, missing=missing)


def lost(uuid: str | None, kind: str = "gpu_lost", index: int = 2) -> GpuFault:
    return GpuFault(index, uuid, kind, "")


@pytest.fixture
def absences() -> Absences:
    made = Absences(retrial_seconds_min=30, retrial_seconds_max=100)
    made.learn(inventory("a", "b", "c"), 0)
    return made


def test_nobody_is_waited_for_when_all_are_there(absences: Absences) -> None:
    assert (tuple(absences), absences.seconds_until_due(0)) == ((), None)


@pytest.mark.parametrize(
    ("name", "found", "awaited"),
    [
        ("lost", inventory("a", "b", missing=(lost("c"),)), ["c"]),
        ("needs a reset", inventory("a", "b", missing=(lost("c", "reset_required"),)), ["c"]),
        ("an error without a name", inventory("a", "b", missing=(lost("c", "unknown"),)), ["c"]),
        ("lost before it told its name", inventory("a", "b", "c", missing=(lost(None),)), [2]),
        ("not counted any more", inventory("a", "b"), ["c"]),
        ("left alone", inventory("a", "b", missing=(lost("c", "driver_timeout"),)), []),
        ("not ours", inventory("a", "b", missing=(lost("c", "no_permission"),)), []),
    ],
)
def test_who_is_waited_for(
    absences: Absences, name: str, found: Inventory, awaited: list[str | int]
) -> None:
    absences.learn(found, 0)
    assert list(absences) == awaited, name


@pytest.mark.parametrize(
    ("fact", "kind", "is_awaited"),
    [
        ("gpu", "gpu_lost", True),
        ("gpu", "driver_timeout", False),
        ("power_watts", "unknown", False),
    ],
)
def test_one_that_is_lost_in_a_sample(
    absences: Absences, fact: str, kind: str, is_awaited: bool
) -> None:
    reading = GpuReading("b", 0.0, failures=(ReadFailure(fact, kind, ""),))
    assert absences.notice([reading], 0) == is_awaited
    assert ("b" in tuple(absences)) == is_awaited
    assert not absences.notice([reading], 1)  # it is known by now


def renew(absences: Absences, found: Inventory, now: float) -> None:
    tried = absences.due(now)
    absences.learn(found, now)
    absences.renewed(tried, now)


def test_each_renewal_in_vain_doubles_the_time_to_the_next(absences: Absences) -> None:
    gone = inventory("a", "b", missing=(lost("c"),))
    absences.learn(gone, 0)
    pauses = [absences.seconds_until_due(0)]
    for now in (30, 1000, 2000, 3000):
        renew(absences, gone, now)
        pauses.append(absences.seconds_until_due(now))
    assert pauses == [30, 60, 100, 100, 100]


def test_one_whose_time_has_not_come_is_not_put_off_by_another_ones(absences: Absences) -> None:
    gone = inventory("a", missing=(lost("b", index=1), lost("c")))
    absences.learn(inventory("a", "b", missing=(lost("c"),)), 0)
    absences.learn(gone, 20)
    renew(absences, gone, 30)
    assert absences.due(49) == ()
    assert absences.due(50) == ("b",)


def test_one_that_is_back_is_waited_for_no_more(absences: Absences) -> None:
    absences.learn(inventory("a", "b", missing=(lost("c"),)), 0)
    renew(absences, inventory("a", "b", "c"), 30)
    assert tuple(absences) == ()


def test_one_that_is_not_counted_is_given_up_after_the_longest_pause(absences: Absences) -> None:
    for now in (0, 30, 1000):
        renew(absences, inventory("a", "b"), now)
        assert tuple(absences) == ("c",)
    renew(absences, inventory("a", "b"), 2000)
    assert tuple(absences) == ()
    absences.learn(inventory("a", "b"), 2001)
    assert tuple(absences) == ()
