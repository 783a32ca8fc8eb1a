"""What is said of the driver host's states, and what its counters and deadlines promise."""

import pytest

from stoker.agent.driver_host.states import (
    HUNG_FUNCTIONS_MAX,
    OTHER_FUNCTIONS,
    HostState,
    Patience,
    Running,
    Starting,
    Stopping,
    Unreaped,
    stuck,
    why_busy,
    with_hang,
)
from stoker.agent.driver_host.watch import Limits, Note
from stoker.core.errors import ExitCode


def test_devices_are_free_or_known_to_be_held_within_a_second() -> None:
    patience = Patience()
    assert patience.release_grace_seconds + patience.kill_seconds < 1


def test_a_whole_question_may_take_ten_times_as_long_as_a_call() -> None:
    patience = Patience(call_seconds=0.5, start_seconds=20)
    assert patience.limits == Limits(call_seconds=0.5, question_seconds=5)
    assert patience.start_limits == Limits(call_seconds=20, question_seconds=200)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            Unreaped(7, 0.0, "D", "nvmlDeviceGetName", "GPU-1"),
            "pending: PID 7 in uninterruptible sleep, in nvmlDeviceGetName of GPU-1",
        ),
        (Unreaped(7, 0.0, "D", "nvmlInit"), "pending: PID 7 in uninterruptible sleep, in nvmlInit"),
        (Unreaped(7, 0.0, "R"), "pending: PID 7 was killed and has not ended (state R)"),
        (Unreaped(7, 0.0), "pending: PID 7 was killed and has not ended (state unknown)"),
    ],
)
def test_what_is_said_while_the_kernel_holds_a_host(state: Unreaped, reason: str) -> None:
    assert state.reason == reason
    assert str(stuck(state)).startswith(f"{reason}; ")
    assert stuck(state).exit_code is ExitCode.PENDING


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (Starting(None, 0.0), "the driver host is not started yet"),
        (Starting(7, 0.0), "driver host 7 is starting, in nvmlInit"),
        (Stopping(7, 0.0), "driver host 7 is being ended"),
        (Running(7, 0.0), "the driver host is busy with another question"),
    ],
)
def test_why_a_question_is_not_taken(state: HostState, why: str) -> None:
    assert why_busy(state, Note(None, "nvmlInit")) == why


def test_hangs_are_told_apart_by_function_up_to_a_bound() -> None:
    hangs = with_hang(with_hang({}, "a"), "a")
    assert hangs == {"a": 2}
    for number in range(HUNG_FUNCTIONS_MAX + 5):
        hangs = with_hang(hangs, f"f{number}")
    assert len(hangs) == HUNG_FUNCTIONS_MAX + 1
    assert hangs[OTHER_FUNCTIONS] == 6
    assert with_hang(hangs, "a")["a"] == 3
