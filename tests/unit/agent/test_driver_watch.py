"""When a question counts as hung, look by look."""

import pytest

from stoker.agent.driver_host.watch import CallWatch, Limits, Note, Overdue

LIMITS = Limits(call_seconds=1.0, question_seconds=10.0)

POWER_0 = Note(0, "power", 1)
POWER_1 = Note(1, "power", 2)
COUNT = Note(None, "count", 3)
IDLE: None = None


def verdict(*looks: Note | None) -> tuple[int, Overdue | None]:
    """After how many looks the question is given up, and why."""
    watch = CallWatch(LIMITS)
    for number, note in enumerate(looks, 1):
        if (overdue := watch.look(note)) is not None:
            return number, overdue
    return len(looks), None


def test_a_look_costs_a_quarter_of_the_time_that_a_call_may_take() -> None:
    assert CallWatch(LIMITS).pause_seconds == 0.25


@pytest.mark.parametrize(
    ("name", "looks", "given_up_after"),
    [
        # The fifth look comes four pauses after the first: the call has taken 1 s at least.
        ("one call at every look", [POWER_0] * 9, 5),
        ("it began after the first look", [IDLE] + [POWER_0] * 9, 6),
        ("it goes on", [POWER_0, POWER_1] * 10, None),
        ("the same function for the same GPU, called again", [*[POWER_0] * 4, POWER_1] * 4, None),
        ("a torn read is another call", [*[POWER_0] * 4, Note(0, "pount", 1), POWER_0], None),
        ("a call about no GPU", [COUNT] * 9, 5),
        ("between two calls it may be as long as the whole", [IDLE] * 39, None),
        ("but no longer", [IDLE] * 50, 40),
    ],
)
def test_when_a_question_is_given_up(
    name: str, looks: list[Note | None], given_up_after: int | None
) -> None:
    number, overdue = verdict(*looks)
    assert (number if overdue else None) == given_up_after, name


def test_a_call_that_hangs_is_blamed_on_its_gpu() -> None:
    assert verdict(*[POWER_1] * 5)[1] == Overdue(POWER_1, 1, "has not returned within 1 s")


@pytest.mark.parametrize(
    ("name", "looks", "blamed", "found"),
    [
        (
            "most looks were at one GPU",
            [*[POWER_1] * 3, POWER_0] * 10,
            1,
            "took most of 10 s, and there was no end of it",
        ),
        ("they were at both alike", [POWER_1, POWER_0] * 20, None, "has not answered within 10 s"),
        ("they were at none", [COUNT, IDLE] * 20, None, "has not answered within 10 s"),
    ],
)
def test_who_is_to_blame_when_every_call_returns_and_there_is_no_end(
    name: str, looks: list[Note | None], blamed: int | None, found: str
) -> None:
    number, overdue = verdict(*looks)
    assert number == 40
    assert overdue == Overdue(looks[-1], blamed, found), name
