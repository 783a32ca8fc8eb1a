"""What the sampling loop decides: when the next tick is, and what to say about the driver."""

import pytest

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    GpuLost,
    HostEnded,
    HostRenewed,
    LibraryMismatch,
)
from stoker.agent.driver_host.states import (
    Failed,
    HostState,
    Released,
    Running,
    Starting,
    Stopping,
    Unreaped,
)
from stoker.agent.model import DriverState, DriverStatus
from stoker.agent.sampler import describe_driver, next_tick

HUNG = DriverTimeout("has not returned within 1 s", function="nvmlDeviceGetPowerUsage", gpu="GPU-1")
HUNG_TEXT = "GPU-1: nvmlDeviceGetPowerUsage: has not returned within 1 s"
STUCK = Unreaped(7, 0.0, "D", "nvmlDeviceGetPowerUsage", "GPU 1")
WORD = "released by root"


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
    ("state", "error", "released", "expected"),
    [
        (Starting(None, 0.0), None, None, (DriverState.STARTING, "")),
        (Running(7, 0.0), None, None, (DriverState.READING, "")),
        (Running(7, 0.0), GpuLost("lost"), None, (DriverState.READING, "")),
        (Stopping(7, 0.0), HUNG, None, (DriverState.BLOCKED, HUNG_TEXT)),
        (Starting(8, 0.0), HUNG, None, (DriverState.BLOCKED, HUNG_TEXT)),
        (Stopping(7, 0.0), LibraryMismatch("differs"), None, (DriverState.FAILED, "differs")),
        (Starting(8, 0.0), HostRenewed("replaced"), None, (DriverState.STARTING, "replaced")),
        (Failed(HUNG, 0.0), None, None, (DriverState.BLOCKED, HUNG_TEXT)),
        (Failed(HostEnded("it ended"), 0.0), None, None, (DriverState.FAILED, "it ended")),
        (STUCK, HUNG, None, (DriverState.BLOCKED, STUCK.reason)),
        (STUCK, None, WORD, (DriverState.BLOCKED, f"{STUCK.reason}; {WORD}")),
        (Running(7, 0.0), None, WORD, (DriverState.RELEASED, f"being let go of: {WORD}")),
        (Stopping(7, 0.0), HUNG, WORD, (DriverState.RELEASED, f"being let go of: {WORD}")),
        (Released(0.0), HUNG, WORD, (DriverState.RELEASED, WORD)),
        (Released(0.0), None, None, (DriverState.STARTING, "")),
    ],
    ids=[
        "nothing is wrong yet",
        "it answers",
        "it answers, and a GPU is lost",
        "it hung and is being ended",
        "it hung and another one starts",
        "the driver was replaced and it is being ended",
        "it gives way to a fresh one",
        "it hung and is gone",
        "it crashed",
        "the kernel holds it",
        "the kernel holds it and somebody waits for its end",
        "a release has just been asked for",
        "it is being ended for a release",
        "it is released",
        "it was resumed just now",
    ],
)
def test_what_is_told_about_the_driver(
    state: HostState,
    error: DriverError | None,
    released: str | None,
    expected: tuple[DriverState, str],
) -> None:
    told = describe_driver(state, error, 3, released)
    assert told == DriverStatus(*expected, restarts=3)
