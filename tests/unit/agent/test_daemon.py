"""What the daemon decides on its own: when the next tick is, and what to say about the driver."""

import pytest

from stoker.agent.daemon import describe_driver, in_thread, next_tick, see
from stoker.agent.driver import DriverError, DriverTimeout, GpuLost, HostEnded, LibraryMismatch
from stoker.agent.driver_link import (
    Failed,
    HostState,
    Released,
    Running,
    Starting,
    Stopping,
    Unreaped,
)
from stoker.agent.model import DriverState, DriverStatus, ProcessSeen
from stoker.agent.proctable import ProcessFacts
from stoker.agent.readings import ProcessReading

HUNG = DriverTimeout("has not returned within 1 s", function="nvmlDeviceGetPowerUsage", gpu="GPU-1")
HUNG_TEXT = "GPU-1: nvmlDeviceGetPowerUsage: has not returned within 1 s"


@pytest.mark.parametrize(
    ("due", "now", "expected"),
    [
        (10.0, 10.0, 12.0),
        (10.0, 10.3, 12.0),
        (10.0, 11.99, 12.0),
        (10.0, 12.0, 14.0),
        (10.0, 12.1, 14.0),
        (10.0, 99.0, 100.0),
        (10.0, 9.5, 12.0),
    ],
    ids=[
        "the tick took no time",
        "it took a while",
        "it took almost the interval",
        "it took the whole interval",
        "the next one was missed",
        "many were missed",
        "the sleep ended early",
    ],
)
def test_ticks_keep_their_beat_and_are_not_made_up_for(
    due: float, now: float, expected: float
) -> None:
    assert next_tick(due, now, 2.0) == expected


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        (Starting(None, 0.0), None, (DriverState.STARTING, "")),
        (Running(7, 0.0), None, (DriverState.READING, "")),
        (Running(7, 0.0), GpuLost("lost"), (DriverState.READING, "")),
        (Stopping(7, 0.0), HUNG, (DriverState.BLOCKED, HUNG_TEXT)),
        (Starting(8, 0.0), HUNG, (DriverState.BLOCKED, HUNG_TEXT)),
        (Stopping(7, 0.0), LibraryMismatch("differs"), (DriverState.FAILED, "differs")),
        (Failed(HUNG, 0.0), None, (DriverState.BLOCKED, HUNG_TEXT)),
        (Failed(HostEnded("it ended"), 0.0), None, (DriverState.FAILED, "it ended")),
        (
            Unreaped(7, 0.0),
            HUNG,
            (
                DriverState.BLOCKED,
                "driver host 7 was killed, and the kernel does not let go of it",
            ),
        ),
        (Released(), None, (DriverState.FAILED, "released on request")),
    ],
)
def test_what_is_told_about_the_driver(
    state: HostState, error: DriverError | None, expected: tuple[DriverState, str]
) -> None:
    assert describe_driver(state, error, 3) == DriverStatus(*expected, restarts=3)


def test_a_process_is_what_the_driver_and_proc_tell() -> None:
    reading = ProcessReading("GPU-0", 42, "compute", 2**30, "/usr/bin/python3")
    facts = ProcessFacts(42, "python3 train.py", 12.5, "ann", (7,), "a")
    assert see(reading, facts) == ProcessSeen(
        "GPU-0", 42, "ann", "python3 train.py", 2**30, 12.5, "a"
    )
    assert see(reading, ProcessFacts(42, "train")).user == ""


async def test_what_is_raised_in_a_thread_is_raised_where_it_is_awaited() -> None:
    def fail() -> int:
        raise KeyError("missing")

    assert await in_thread(lambda: 42) == 42
    with pytest.raises(KeyError, match="missing"):
        await in_thread(fail)
