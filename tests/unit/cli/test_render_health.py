"""What people see of the fleet's health, as golden files; foreign words in it are only words."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_health, screen
from stoker.client import (
    Finding,
    FleetHealth,
    GpuCondition,
    GpuCordon,
    GpuHealth,
    GpuVerdict,
    RepairAction,
)

NOW = 1_800_000_000.0
H100 = "NVIDIA H100 80GB HBM3"
ADDRESS = "127.0.0.1:7070"


def text_of(shown: RenderableType, width: int = 200) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


def condition(
    index: int,
    verdict: GpuVerdict | None,
    action: RepairAction = RepairAction.NONE,
    reason: str = "",
    *holders: str,
    cordon: GpuCordon | None = None,
    withheld: str = "",
) -> GpuCondition:
    uuid = f"GPU-0000000{index}"
    since = NOW - 7500.0 if reason else None
    health = None if verdict is None else GpuHealth(uuid, verdict, action, "xid", reason, since)
    return GpuCondition(
        node="gpu-1",
        uuid=uuid,
        index=index,
        model=H100,
        pci_bus_id=f"00000000:0{index}:00.0",
        health=health,
        cordon=cordon,
        cordon_withheld=withheld,
        allocation_ids=holders,
    )


REMAP = "a row could not be remapped (row_remap_failed): the memory is worn out"
BUS = "Xid 79: the GPU fell off the bus; back after 2 resets"
SHARE = "16 of at most 16 GPUs are cordoned for their health"
SICK = FleetHealth(
    gpus=(
        condition(
            *(3, GpuVerdict.UNHEALTHY, RepairAction.RMA, REMAP, "a-1", "a-2"),
            cordon=GpuCordon(REMAP, by_health=True, at=NOW - 7500.0),
        ),
        condition(
            *(4, GpuVerdict.UNHEALTHY, RepairAction.REBOOT, BUS, "a-3"),
            cordon=GpuCordon("ticket 4711", by_health=False, at=NOW - 60, drain_at=NOW + 570.0),
        ),
        condition(5, GpuVerdict.UNHEALTHY, RepairAction.RESET_GPU, "Xid 95", withheld=SHARE),
        condition(6, GpuVerdict.UNKNOWN, RepairAction.UNKNOWN, "it has not been read for 12 s"),
        condition(7, GpuVerdict.DEGRADED, RepairAction.RESTART_APP, "Xid 31 for 2 minutes"),
        condition(
            0, GpuVerdict.HEALTHY, cordon=GpuCordon("kept for a demo", by_health=False, at=NOW)
        ),
        condition(1, None),
    ),
    findings=(
        Finding("lemon_gpu", "gpu-1", "GPU-00000003", "", "5 faults in 9 days", NOW - 864_000, ""),
        Finding(
            *("lemon_slot", "gpu-2", "", "00000000:04:00.0"),
            *("2 cards failed here in 30 days", NOW - 50, ""),
        ),
        Finding(
            *("straggler", "gpu-3", "GPU-00000009", "00000000:09:00.0"),
            *("its SM clock is 12 % below the 7 others of its allocation", NOW - 0.2, "a-9"),
        ),
        Finding("of_the_future", "gpu-4", "", "", "something else", NOW - 3, ""),
    ),
    gpus_total=80,
    cordoned_by_health=16,
    cordoned_by_health_max=16,
    resource_version=12,
)
WELL = replace(SICK, gpus=(), findings=(), cordoned_by_health=0)
ALL_SHOWN = replace(WELL, gpus=(condition(0, GpuVerdict.HEALTHY),), gpus_total=1)

ROWS = {
    "health": (SICK, 200),
    "health-narrow": (SICK, 70),
    "health-well": (WELL, 200),
    "health-all": (ALL_SHOWN, 200),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_people_see(name: str, golden: Golden) -> None:
    found, width = ROWS[name]
    golden(f"cli/{name}.txt", text_of(render_health.health(found, ADDRESS, NOW), width))


@pytest.mark.parametrize(
    ("cordoned", "most", "text"),
    [
        (3, 16, "3 of at most 16 GPUs are cordoned for their health"),
        (1, 1, "1 of at most 1 GPU is cordoned for its health"),
        (0, 0, "0 of at most 0 GPUs are cordoned for their health"),
    ],
)
def test_how_many_more_may_be_cordoned_is_the_last_line(
    cordoned: int, most: int, text: str
) -> None:
    found = replace(WELL, cordoned_by_health=cordoned, cordoned_by_health_max=most)
    assert text_of(render_health.health(found, ADDRESS, NOW)).splitlines()[-1] == text


def test_reason_is_folded_and_never_cut() -> None:
    shown = text_of(render_health.health(SICK, ADDRESS, NOW), 70)
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 70


def said_everywhere(said: str) -> RenderableType:
    cordon = GpuCordon(said, by_health=True, at=NOW, drain_at=NOW)
    health = GpuHealth(said, GpuVerdict.UNHEALTHY, RepairAction.RMA, said, f"{said} too", NOW)
    gpu = GpuCondition(said, said, 0, said, said, health, cordon, said, (said,))
    finding = Finding(said, said, said, said, said, NOW, said)
    found = replace(SICK, gpus=(gpu,), findings=(finding,))
    return render_health.health(found, said, NOW)


@given(st.text(min_size=1, max_size=12))
def test_no_word_of_the_fleet_disturbs_the_terminal(said: str) -> None:
    lines = text_of(said_everywhere(said), 10_000).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == len(text_of(said_everywhere("x"), 10_000).split("\n"))


def test_markup_is_words() -> None:
    assert text_of(said_everywhere("[red]"), 10_000).count("[red]") == 11
