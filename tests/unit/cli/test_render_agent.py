"""What people see of an agent's answers, as golden files."""

import io
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_agent, screen
from stoker.cli.text import document
from stoker.core.local import (
    AssignmentFacts,
    DriverCall,
    DriverFacts,
    GpuFacts,
    GpuName,
    HeldFacts,
    HolderFacts,
    LinkFacts,
    ProcessFacts,
    Profiling,
    Released,
    ReleaseFacts,
    Resumed,
    SetHealthy,
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


PERSISTENCED = ("/dev/nvidiactl", *(f"/dev/nvidia{number}" for number in (0, 1, 2, 3, 5)))
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
        GpuFacts("GPU-00000000", 0, H100, True, "", "healthy", "none", (), 0, 0),
        GpuFacts("GPU-00000001", 1, H100, True, "", "healthy", "none", (), 0, 0),
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


SHARED = UsersFacts(
    held=(),
    processes=(
        ProcessFacts(
            *(4711, "ann", "python3 train.py", "GPU-00000000", 0, ""),
            *(30 * 2**30, "pod ml/train-0 (container trainer)"),
        ),
        ProcessFacts(
            4712, "eve", "python3 -m ipykernel", "GPU-00000001", 1, "", 2**30, "unit b.scope"
        ),
    ),
    processes_age_seconds=1.2,
    unread_gpus=(GpuName("GPU-00000003", 3),),
    assignments=(
        AssignmentFacts("GPU-00000000", 0, "kubelet", "pod ml/train-0 (container trainer)"),
        AssignmentFacts("GPU-gone", None, "slurm", "Slurm job 12"),
    ),
    holders=(
        HolderFacts(
            811, "root", "nvidia-persistenced --verbose", PERSISTENCED, "unit nvidia.slice"
        ),
        HolderFacts(4711, "ann", "python3 train.py", ("/dev/nvidia0",), "pod ml/train-0"),
        HolderFacts(4713, "", "", (), ""),
    ),
)
SLOWED = "the hardware slowed it for its heat 8 times in 10 minutes, wanted fewer than 6"
SICK = replace(
    WELL,
    gpus=(
        GpuFacts("GPU-00000000", 0, H100, True, "", "healthy", "none", (), 31 * 2**30, 2**20),
        GpuFacts(
            *("GPU-00000001", 1, H100, True, "", "degraded", "drain"),
            *((SLOWED,), 20 * 2**30, 19 * 2**30),
        ),
        GpuFacts(
            *("GPU-00000002", 2, H100, True, "", "unhealthy", "rma"),
            *(("a row could not be remapped", "Xid 48 came back \x1b[31m"), 0, None),
        ),
        GpuFacts("GPU-00000003", 3, "", False, "it fell off the bus", "unhealthy", "reboot"),
    ),
    users=SHARED,
    blind=("the kernel's log: no helper answers, and /dev/kmsg is not for uid 998",),
)
UNSEEN = replace(
    WELL,
    users=replace(NOBODY, assignments_unknown="the kubelet's socket: permission denied"),
    blind=("what others have handed out: the kubelet's socket: permission denied",),
)
UNKNOWN_HOLDERS = replace(
    NOBODY,
    holders_unknown="no helper answers at /run/stoker/helper.sock",
    assignments_unknown="the kubelet's socket: permission denied",
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
    "agent-status-sick": Row(render_agent.status(SICK), width=140),
    "agent-status-sick-narrow": Row(render_agent.status(SICK), width=60),
    "agent-status-unseen": Row(render_agent.status(UNSEEN)),
    "agent-released-shared": Row(render_agent.released(Released(RELEASE, "", 0.31, "", SHARED))),
    "agent-released-unseen": Row(
        render_agent.released(Released(RELEASE, "", 0.31, "", UNKNOWN_HOLDERS))
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
            render_agent.set_healthy(SetHealthy("GPU-1", ("Xid 79", "a row \x1b[31m"), "")),
            (
                "GPU-1: 2 faults forgotten\n"
                "  Xid 79\n"
                "  a row \\x1b[31m\n"
                "what is still so will be found again\n"
            ),
        ),
        (
            render_agent.set_healthy(SetHealthy("GPU-1", (), "")),
            "GPU-1: no fault of it was remembered\n",
        ),
        (
            render_agent.set_healthy(SetHealthy("GPU-1", ("Xid 79",), "no room")),
            (
                "GPU-1: 1 fault forgotten\n"
                "  Xid 79\n"
                "what is still so will be found again\n"
                "not noted down (no room): a restart of the agent remembers them\n"
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


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ((), "-"),
        (("/dev/nvidia0",), "nvidia0"),
        (PERSISTENCED, "nvidia0-3, nvidia5, nvidiactl"),
        (("/dev/nvidia10", "/dev/nvidia9", "/dev/nvidia-uvm"), "nvidia9-10, nvidia-uvm"),
        (("/dev/nvidia-caps/nvidia-cap1", "/tmp/nvidia0"), "nvidia-caps/nvidia-cap1, /tmp/nvidia0"),
    ],
)
def test_device_files_in_few_words(paths: tuple[str, ...], text: str) -> None:
    assert render_agent.devices(paths) == text


@pytest.mark.parametrize(
    ("held", "line"),
    [
        (HeldFacts("a1", "ann", ("GPU-0", "GPU-1"), None, False), "a1 ann GPU-0, GPU-1 all"),
        (
            HeldFacts("a1", "ann", ("GPU-0",), 2**30, False, compute_milli=125),
            "a1 ann GPU-0 1 GiB 12.5 % of the compute",
        ),
        (
            HeldFacts("a1", "ann", ("GPU-0",), 10 * 2**30, True, ("MIG-1",)),
            "a1 ann MIG-1 10 GiB to be let go of once processes are read",
        ),
        (
            HeldFacts(
                *("a1", "ann", ("GPU-0",), None, False),
                cpu_milli=1500,
                host_memory_bytes=2**35,
                gang_nodes=2,
            ),
            "a1 ann GPU-0 all 1.5 CPUs, 32 GiB of the host, one of 2 nodes",
        ),
    ],
    ids=["whole GPUs", "a share", "a MIG device", "part of a gang, with CPUs and memory"],
)
def test_what_is_held_is_told_with_all_that_it_takes(held: HeldFacts, line: str) -> None:
    page = text_of(render_agent.status(replace(WELL, users=replace(NOBODY, held=(held,)))))
    assert line in [" ".join(each.split()) for each in page.splitlines()]


def _said_everywhere(said: str) -> list[RenderableType]:
    """Return every page, with the same words wherever the agent's words are shown."""
    gpu = GpuFacts(said, 0, said, False, said, said, said, (said,), 1, 1)
    users = UsersFacts(
        held=(HeldFacts(said, said, (said,), None, False),),
        processes=(ProcessFacts(1, said, said, said, None, said, 1, said),),
        processes_age_seconds=None,
        unread_gpus=(),
        assignments=(AssignmentFacts(said, None, said, said),),
        assignments_unknown=said,
        holders=(HolderFacts(1, said, said, (said,), said),),
        holders_unknown=said,
    )
    return [
        render_agent.status(replace(WELL, gpus=(gpu,), users=users, blind=(said,))),
        render_agent.released(Released(RELEASE, said, 0.1, said, users)),
        render_agent.released(Released(RELEASE, said, 0.1, "", replace(users, holders=()))),
        render_agent.set_healthy(SetHealthy(said, (said,), said)),
    ]


@given(st.text(min_size=1, max_size=12))
def test_no_word_of_an_agent_disturbs_the_terminal(said: str) -> None:
    plain = [text_of(shown, 10_000) for shown in _said_everywhere("x")]
    for shown, expected in zip(_said_everywhere(said), plain, strict=True):
        text = text_of(shown, 10_000)
        assert all(line.isprintable() for line in text.split("\n"))
        assert len(text.split("\n")) == len(expected.split("\n"))


def test_markup_is_words() -> None:
    for shown in _said_everywhere("[red]x[/red]"):
        assert "[red]x[/red]" in text_of(shown, 10_000)


@pytest.mark.parametrize("answer", [SICK, UNSEEN, Released(RELEASE, "", 0.31, "", SHARED)])
def test_json_has_all_that_an_agent_says(answer: Status | Released) -> None:
    assert msgspec.convert(document(answer), type(answer)) == answer
