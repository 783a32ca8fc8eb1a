"""Which GPUs are left alone, who they are, and when each is tried again."""

import pytest

from stoker.agent.driver import Suspect
from stoker.agent.driver_suspects import Suspects
from stoker.agent.readings import GpuFault, GpuIdentity, Inventory


def inventory(*uuids: str | None) -> Inventory:
    """What a driver tells that finds these GPUs by index; None: one that it could not read."""
    return Inventory(
        at=0.0,
        driver_version=None,
        nvml_version=None,
        cuda_driver_version=None,
        simulated=True,
        gpus=tuple(GpuIdentity(i, u, "T4", 16) for i, u in enumerate(uuids) if u is not None),
        missing=tuple(GpuFault(i, None, "x", "") for i, u in enumerate(uuids) if u is None),
    )


@pytest.fixture
def suspects() -> Suspects:
    made = Suspects(retrial_seconds_min=30, retrial_seconds_max=100)
    made.learn(inventory("a", "b", "c"))
    return made


def test_nobody_is_suspected_at_first(suspects: Suspects) -> None:
    assert tuple(suspects) == ()
    assert suspects.due(1e9) == ()
    assert suspects.seconds_until_due(0) is None


def test_each_hang_in_a_row_doubles_the_time_until_the_next_trial(suspects: Suspects) -> None:
    now, pauses = 0.0, list[float | None]()
    for _ in range(4):
        suspects.exclude(1, "hung", now)
        pauses.append(suspects.seconds_until_due(now))
        now += 1000
    assert pauses == [30, 60, 100, 100]
    assert tuple(suspects) == (Suspect(1, "b", 3, "hung"),)


def test_one_that_was_acquitted_begins_anew(suspects: Suspects) -> None:
    suspects.exclude(1, "hung", 0)
    suspects.exclude(1, "hung", 0)
    suspects.acquit(suspects.due(60))
    assert tuple(suspects) == ()
    suspects.exclude(1, "hung", 100)
    assert suspects.seconds_until_due(100) == 30


def test_those_that_are_due_are_tried_and_the_others_left_alone(suspects: Suspects) -> None:
    first, second = suspects.exclude(0, "hung", 0), suspects.exclude(1, "hung", 10)
    assert suspects.due(29) == ()
    due = suspects.due(30)
    assert due == ("a",)
    assert suspects.without(due) == (second,)
    assert suspects.without(()) == (first, second)
    assert suspects.seconds_until_due(35) == 0


def test_a_trial_that_fails_is_not_repeated_at_once(suspects: Suspects) -> None:
    suspects.exclude(0, "hung", 0)
    suspects.exclude(1, "hung", 0)
    due = suspects.due(40)
    suspects.exclude(0, "hung again", 40)  # the one that hung in the trial
    suspects.put_off(due, 40)  # the other, of which nothing is known
    assert suspects.due(99) == ()
    assert suspects.due(100) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "told", "known"),
    [
        ("one that was read once is known by name", ("a", None, "c"), "b"),
        ("the numbering changed: nobody knows which it is", ("a", None), None),
        ("more GPUs than before: the same", ("a", None, "c", "d"), None),
    ],
)
def test_who_is_missing(
    suspects: Suspects, name: str, told: tuple[str | None, ...], known: str | None
) -> None:
    completed = suspects.learn(inventory(*told))
    assert [fault.uuid for fault in completed.missing] == [known], name
    assert suspects.exclude(1, "hung", 0).uuid == known


def test_one_that_was_never_read_is_suspected_by_its_index() -> None:
    suspects = Suspects(retrial_seconds_min=30, retrial_seconds_max=100)
    assert suspects.exclude(2, "hung", 0) == Suspect(2, None, None, "hung")
    assert suspects.due(30) == (2,)
