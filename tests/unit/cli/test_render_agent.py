"""What people see of an agent's answers, as golden files."""

import io
from dataclasses import dataclass

import pytest
from msgspec.structs import replace
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_agent, screen
from stoker.core.local import (
    DriverCall,
    DriverFacts,
    GpuFacts,
    GpuName,
    HeldFacts,
    LinkFacts,
    ProcessFacts,
    Profiling,
    Released,
    ReleaseFacts,
    Resumed,
    Status,
    UsersFacts,
)

AT = 1_800_000_000.0
H100 = "NVIDIA H100 80GB HBM3"
WHY = "nvmlDeviceGetTemperatureV has not returned within 1 s"
RELEASE = ReleaseFacts(at=AT - 30, until=AT + 570, by="root")
PENDING = "pending: PID 4243 in uninterruptible sleep, in nvmlDeviceGetTemperatureV of GPU 1"


def text_of(shown: RenderableType, width: int = 120) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


USERS = UsersFacts(
    held=(
        HeldFacts("a1", "ann", ("GPU-00000000",), None, False),
        HeldFacts("a2", "bob \x1b[31mred", ("GPU-00000001",), 20 * 2**30, True),
    ),
    processes=(
        ProcessFacts(4711, "ann", "python3 train.py --epochs 90", "GPU-00000000", 0, "a1"),
        ProcessFacts(4712, "", "", "GPU-00000001", 1, ""),
        ProcessFacts(4713, "eve", "miner\nGPU", "GPU-gone", None, ""),
    ),
    processes_age_seconds=4.2,
    unread_gpus=(GpuName("GPU-00000002", 2),),
)
NOBODY = UsersFacts(held=(), processes=(), processes_age_seconds=0.3, unread_gpus=())
WELL = Status(
    at=AT,
    node="host-a",
    pid=4242,
    version="0.1.0",
    simulated=False,
    driver_version="580.105.08",
    summary="2 GPUs read; 0 allocations held; aggregator connected",
    driver=DriverFacts("reading", "", AT - 5400, 4243, None, 1, 0, 0, 0),
    release=None,
    release_unsaved="",
    profiling=Profiling(is_paused=False, until=None),
    gpus=(
        GpuFacts("GPU-00000000", 0, H100, True, ""),
        GpuFacts("GPU-00000001", 1, H100, True, ""),
    ),
    last_success_age_seconds=0.4,
    samples=5400,
    sample_failures={},
    users=NOBODY,
    link=LinkFacts(("127.0.0.1:7070",), True, 1, 0),
)
HURT = replace(
    WELL,
    simulated=True,
    driver=DriverFacts(
        "blocked", WHY, AT - 2, 4243, DriverCall("nvmlDeviceGetTemperatureV", 1), 3, 2, 2, 1
    ),
    profiling=Profiling(is_paused=True, until=AT + 60),
    gpus=(
        GpuFacts("GPU-00000000", 0, H100, False, f"driver blocked: {WHY}"),
        GpuFacts("GPU-00000001", 1, H100, False, f"driver blocked: {WHY}"),
        GpuFacts(None, 2, "", False, "it must be reset"),
    ),
    last_success_age_seconds=None,
    samples=0,
    sample_failures={"host_unavailable": 2, "driver_timeout": 1},
    users=USERS,
    link=LinkFacts(("10.0.0.1:7070", "10.0.0.2:7070"), False, 600, 12),
)
GONE = UsersFacts(held=(), processes=(), processes_age_seconds=None, unread_gpus=())
AWAY = replace(
    WELL,
    driver=DriverFacts(
        "released", "released by root for 10m, 0 allocations held", AT, None, None, 1, 0, 0, 0
    ),
    release=RELEASE,
    release_unsaved="no room",
    gpus=(GpuFacts("GPU-00000000", 0, H100, False, "released by root for 10m"),),
    users=GONE,
)


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown, and how wide the terminal is."""

    shown: RenderableType
    width: int = 120


ROWS = {
    "agent-status": Row(render_agent.status(WELL)),
    "agent-status-hurt": Row(render_agent.status(HURT)),
    "agent-status-narrow": Row(render_agent.status(HURT), width=60),
    "agent-status-released": Row(render_agent.status(AWAY)),
    "agent-released": Row(render_agent.released(Released(RELEASE, "", 0.31, "", USERS))),
    "agent-released-unsaved": Row(
        render_agent.released(Released(ReleaseFacts(AT, None, "root"), "no room", 0.31, "", NOBODY))
    ),
    "agent-pending": Row(render_agent.released(Released(RELEASE, "", 0.98, PENDING, NOBODY))),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_people_see(name: str, golden: Golden) -> None:
    shown = text_of(ROWS[name].shown, ROWS[name].width)
    golden(f"cli/{name}.txt", shown)
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (render_agent.resumed(Resumed(True, "")), "the driver is taken again\n"),
        (render_agent.resumed(Resumed(False, "")), "the driver was not released\n"),
        (
            render_agent.resumed(Resumed(True, "no room")),
            (
                "the driver is taken again\n"
                "not noted down (no room): a restart of the agent releases it again\n"
            ),
        ),
        (
            render_agent.profiling(Profiling(False, None)),
            "the hardware counters are read\n",
        ),
        (
            render_agent.profiling(Profiling(True, None)),
            (
                "the hardware counters are left alone until they are resumed "
                "(stoker agent profiling resume)\n"
            ),
        ),
        (
            render_agent.profiling(Profiling(True, AT)),
            (
                "the hardware counters are left alone until 2027-01-15 08:00:00 UTC "
                "(stoker agent profiling resume)\n"
            ),
        ),
    ],
)
def test_what_is_said_in_a_line(shown: RenderableType, text: str) -> None:
    assert text_of(shown) == text
