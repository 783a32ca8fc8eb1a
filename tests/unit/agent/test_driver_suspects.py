"""Which GPUs are left alone, who they are, and when each is tried again."""

from dataclasses import replace

import pytest

from stoker.agent.driver import DriverTimeout, Suspect
from stoker.agent.driver_host.suspects import Suspects
from stoker.agent.readings import GpuFault, GpuIdentity, Inventory


def inventory(*uuids: str | None, left_alone: tuple[int, ...] = ()) -> Inventory:
    """What a driver tells that finds these GPUs by index; None: one that it could not read."""
    kinds = {i: DriverTimeout.kind if i in left_alone else "x" for i in range(len(uuids))}
    return Inventory(
        at=0.0,
        driver_version=None,
        nvml_version=None,
        cuda_driver_version=None,
        simulated=True,
        gpus=tuple(GpuIdentity(i, u, "T4", 16) for i, u in enumerate(uuids) if u is not None),
        missing=tuple(GpuFault(i, None, kinds[i], "") for i, u in enumerate(uuids) if u is None),
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


@pytest.mark.parametrize(
    ("name", "hung_again_at", "pause"),
    [
        ("soon after it came back: its pauses go on growing", 100, 100),
        ("it was well for as long as its last pause: they begin anew", 120, 30),
    ],
)
def test_one_that_was_acquitted_and_hangs_again(
    suspects: Suspects, name: str, hung_again_at: float, pause: float
) -> None:
    suspects.exclude(1, "hung", 0)
    suspects.exclude(1, "hung", 0)
    suspects.acquit(suspects.learn(inventory("a", "b", "c")), 60)
    assert tuple(suspects) == ()
    assert suspects.seconds_until_due(60) is None
    suspects.exclude(1, "hung", hung_again_at)
    assert suspects.seconds_until_due(hung_again_at) == pause, name


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
    suspects.exclude(0, "hung again", 40)  # the one that hung in the trial
    suspects.put_off(40)  # the other, of which nothing is known
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


def test_a_trial_clears_those_that_were_tried_and_no_other(suspects: Suspects) -> None:
    suspects.exclude(0, "hung", 0)
    kept = suspects.exclude(1, "hung", 10)
    suspects.acquit(suspects.learn(inventory("a", None, "c", left_alone=(1,))), 30)
    assert tuple(suspects) == (kept,)


def test_one_that_is_lost_by_now_does_not_hang(suspects: Suspects) -> None:
    suspects.exclude(1, "hung", 0)
    suspects.acquit(suspects.learn(inventory("a", None, "c")), 30)
    assert tuple(suspects) == ()


def test_one_that_the_driver_itself_gives_up_on_is_tried_later(suspects: Suspects) -> None:
    suspects.exclude(1, "hung", 0)
    suspects.acquit(suspects.learn(inventory("a", None, "c", left_alone=(1,))), 30)
    assert [suspect.uuid for suspect in suspects] == ["b"]
    assert suspects.seconds_until_due(30) == 60


def hung_in_an_inventory(suspects: Suspects, index: int) -> Suspect:
    suspects.distrust_numbers()
    return suspects.exclude(index, "hung", 0)


@pytest.mark.parametrize(
    ("name", "told", "who"),
    [
        ("nobody moved: it is who was there", ("a", None, "c"), Suspect(1, "b", 3, "hung")),
        ("one went, the others moved up", ("a", None), Suspect(1, None, 2, "hung")),
        ("one came before the others", ("z", None, "b", "c"), Suspect(1, None, 4, "hung")),
        ("one went and one came", ("b", None, "z"), Suspect(1, None, 3, "hung")),
    ],
)
def test_who_hung_in_an_inventory_is_known_when_the_next_one_has_read_the_others(
    suspects: Suspects, name: str, told: tuple[str | None, ...], who: Suspect
) -> None:
    assert hung_in_an_inventory(suspects, 1) == Suspect(1, None, None, "hung")
    assert suspects.uuid_at(1) is None
    suspects.learn(inventory(*told, left_alone=(1,)))
    assert tuple(suspects) == (who,), name


def test_one_that_hangs_when_it_is_tried_stays_one_suspect(suspects: Suspects) -> None:
    suspects.exclude(1, "hung", 0)
    hung_in_an_inventory(suspects, 1)
    suspects.put_off(30)  # the trial of "b", which ended so
    suspects.learn(inventory("a", None, "c", left_alone=(1,)))
    assert [suspect.uuid for suspect in suspects] == ["b"]
    assert suspects.seconds_until_due(30) == 60


def test_a_suspect_that_moved_is_known_by_its_name_alone(suspects: Suspects) -> None:
    suspects.exclude(2, "hung", 0)
    # "b" is gone, so index 2 is nobody and the driver looks for "c" by name.
    left_alone = replace(inventory("a"), missing=(GpuFault(1, "c", DriverTimeout.kind, ""),))
    assert not suspects.misplaced_by(left_alone)
    suspects.learn(left_alone)
    assert tuple(suspects) == (Suspect(1, "c", 2, "hung"),)
    assert suspects.uuid_at(1) == "c"


def test_another_gpu_at_the_index_of_a_suspect_is_looked_for_once_more(suspects: Suspects) -> None:
    suspects.exclude(1, "hung", 0)
    # "a" went and "z" came: the driver counts as many, and left "c" alone in place of "b".
    misled = inventory("b", None, "z", left_alone=(1,))
    suspects.distrust_numbers()
    assert suspects.misplaced_by(misled)
    (by_name,) = suspects
    assert (by_name.uuid, by_name.gpu_count) == ("b", 0)
    right = replace(
        inventory("x", "c", "z"),
        gpus=(GpuIdentity(1, "c", "T4", 16), GpuIdentity(2, "z", "T4", 16)),
        missing=(GpuFault(0, "b", DriverTimeout.kind, ""),),
    )
    assert not suspects.misplaced_by(right)
    suspects.learn(right)
    assert tuple(suspects) == (Suspect(0, "b", 3, "hung"),)


def test_one_without_a_name_is_not_suspected_under_another_numbering(suspects: Suspects) -> None:
    hung_in_an_inventory(suspects, 3)
    suspects.learn(inventory("a", "b", "c", None, left_alone=(3,)))
    assert tuple(suspects) == (Suspect(3, None, 4, "hung"),)
    suspects.learn(inventory("b", "c", "d"))
    assert tuple(suspects) == ()
    assert suspects.due(1e9) == ()
