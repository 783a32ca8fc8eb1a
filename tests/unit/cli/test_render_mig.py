"""What people see of partitions: plans as diffs, how far they are; as golden files."""

import io

import msgspec
import pytest
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_mig, screen
from stoker.core.mig.reports import (
    GpuMigFacts,
    GpuPlan,
    InstanceChange,
    InstanceFacts,
    InTheWay,
    MigReport,
    Verb,
)

AT = 1_800_000_000.0
H100 = "NVIDIA H100 80GB HBM3"
A100 = "NVIDIA A100-SXM4-80GB"
replace = msgspec.structs.replace


def text_of(shown: RenderableType, width: int = 120) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


def report(
    verb: Verb, plans: tuple[GpuPlan, ...] = (), gpus: tuple[GpuMigFacts, ...] = ()
) -> MigReport:
    return MigReport("host-a", verb, "mixed", "", plans, gpus)


ANN = InTheWay("allocation", "allocation 3f2a (ann, 2 processes)", ("MIG-2",), allocation_id="3f2a")
MINER = InTheWay("process", "process 4711 (mi\x1b[31mner, eve)", ("MIG-2",), pid=4711)
MIXED = GpuPlan(
    uuid="GPU-0",
    index=0,
    model=H100,
    mode=True,
    mode_wanted=True,
    mode_change="none",
    changes=(
        InstanceChange("repair", "1g.10gb", 0, 1),
        InstanceChange("keep", "1g.10gb", 1, 1, (1,), ("MIG-1",)),
        InstanceChange("destroy", "2g.20gb", 2, 2, (2,), ("MIG-2",), is_busy=True),
        InstanceChange("create", "1g.10gb", 2, 1),
        InstanceChange("create", "1g.10gb", 3, 1),
        InstanceChange("keep", "3g.40gb", 4, 4, (1, 2), ("MIG-3", "MIG-4"), is_busy=True),
    ),
    steps=("destroy the compute instance of MIG-2",),
    in_the_way=(ANN, MINER),
    uuids_lost=("MIG-2",),
    notes=("the agent asks ann to leave",),
)
FREE = replace(
    MIXED,
    changes=tuple(
        replace(change, is_busy=change.is_busy and change.action == "keep")
        for change in MIXED.changes
    ),
    in_the_way=(),
    notes=(),
)
ON = GpuPlan(
    uuid="GPU-1",
    index=1,
    model=A100,
    mode=False,
    mode_wanted=True,
    mode_change="reset",
    changes=tuple(InstanceChange("create", "1g.10gb", start, 1) for start in range(2)),
    steps=("turn MIG mode on",),
    in_the_way=(InTheWay("holder", "process 12 (nv-hostengine, root) has it open", (), pid=12),),
    uuids_lost=(),
)
THERE = GpuPlan(
    uuid="GPU-2",
    index=2,
    model=H100,
    mode=True,
    mode_wanted=True,
    mode_change="none",
    changes=(InstanceChange("keep", "7g.80gb", 0, 8, (7,), ("MIG-7",)),),
    steps=(),
    in_the_way=(),
    uuids_lost=(),
)
OFF = replace(THERE, uuid="GPU-3", index=3, mode=False, mode_wanted=False, changes=())
NEVER = GpuPlan(
    uuid="GPU-4",
    index=4,
    model=H100,
    mode=True,
    mode_wanted=True,
    mode_change="none",
    changes=(),
    steps=(),
    in_the_way=(),
    uuids_lost=(),
    refusal="wanted 3 x 3g.40gb, a board takes 2",
)
LEAVING = replace(
    THERE,
    uuid="GPU-5",
    index=5,
    mode_wanted=False,
    mode_change="at_once",
    changes=(InstanceChange("destroy", "7g.80gb", 0, 8, (7,), ()),),
    steps=("destroy", "destroy", "turn MIG mode off"),
    uuids_lost=("MIG-7",),
    notes=("the agent lets go of the driver meanwhile",),
)

PLANS: dict[str, tuple[GpuPlan, ...]] = {
    "mig-plan": (FREE, LEAVING, THERE, OFF),
    "mig-plan-in-the-way": (MIXED, ON),
    "mig-plan-refused": (FREE, NEVER),
    "mig-plan-nothing": (THERE, OFF),
    "mig-plan-nobody": (),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(golden: Golden, name: str) -> None:
    golden(f"cli/{name}.txt", text_of(render_mig.plan(report("plan", PLANS[name]))))


# compute slices of a 3g.40gb -> what its MIG devices are called
NAMES: dict[tuple[int, ...], list[str]] = {
    (): [],
    (3,): ["3g.40gb"],
    (1, 2): ["1c.3g.40gb", "2c.3g.40gb"],
}


@pytest.mark.parametrize("compute", NAMES)
def test_devices_are_called_as_the_driver_calls_them(compute: tuple[int, ...]) -> None:
    assert render_mig.device_names("3g.40gb", compute) == NAMES[compute]


@pytest.mark.parametrize(
    ("profile", "slices"), [("1g.10gb+me", 1), ("2g.24gb-me", 2), ("4g.96gb+gfx", 4)]
)
def test_attributes_stay_with_the_profile(profile: str, slices: int) -> None:
    assert render_mig.device_names(profile, (slices,)) == [profile]


SMALL = tuple(InstanceFacts("1g.10gb", start, 1, (1,), (f"MIG-{start}",)) for start in range(2))
GPUS = (
    GpuMigFacts(
        uuid="GPU-0",
        index=0,
        model=H100,
        pci_device_id="0x233010DE",
        mode=True,
        mode_pending=True,
        instances=(*SMALL, InstanceFacts("3g.40gb", 4, 4, (1, 2), ("MIG-3", "MIG-4"))),
        state="success",
        config="mixed",
        operation_id="3f2a11",
        changed_at=AT - 7200,
        undo="7g.80gb@0",
    ),
    GpuMigFacts(
        uuid="GPU-1",
        index=1,
        model=A100,
        pci_device_id="0x20B210DE",
        mode=False,
        mode_pending=True,
        instances=(),
        state="reboot-required",
        reason="MIG mode is pending: reset the GPU or reboot",
        config="mixed",
        operation_id="3f2a12",
        is_withheld=True,
    ),
    GpuMigFacts(
        uuid="GPU-2",
        index=2,
        model=H100,
        pci_device_id="0x233010DE",
        mode=True,
        mode_pending=True,
        instances=(InstanceFacts("2g.20gb", 0, 2, (), ()),),
        state="applying",
        config="mixed",
        operation_id="3f2a13",
        is_withheld=True,
        steps_done=3,
        steps_total=9,
    ),
    GpuMigFacts(
        uuid="GPU-3",
        index=3,
        model=H100,
        pci_device_id="0x233010DE",
        mode=True,
        mode_pending=True,
        instances=SMALL,
        state="draining",
        reason="allocation 3f2a (ann) is asked to leave",
        config="mixed",
        operation_id="3f2a14",
        is_withheld=True,
        leave_by=AT + 42.0,
    ),
    GpuMigFacts(
        uuid="GPU-4",
        index=4,
        model="Tesla T4",
        pci_device_id="0x1EB810DE",
        mode=None,
        mode_pending=None,
        instances=(),
    ),
    GpuMigFacts(
        uuid="GPU-5",
        index=5,
        model=H100,
        pci_device_id="0x233010DE",
        mode=True,
        mode_pending=True,
        instances=(),
        unread="that takes root, or the helper",
    ),
)


@pytest.mark.parametrize(
    ("name", "gpus", "width"),
    [
        ("mig-status", GPUS, 200),
        ("mig-status-narrow", GPUS, 80),
        ("mig-status-none", (), 120),
    ],
)
def test_status(golden: Golden, name: str, gpus: tuple[GpuMigFacts, ...], width: int) -> None:
    shown = render_mig.status(report("status", gpus=gpus), AT)
    golden(f"cli/{name}.txt", text_of(shown, width))


def test_undo(golden: Golden) -> None:
    on = replace(GPUS[1], mode=True, undo="MIG mode off")
    unread = replace(GPUS[5], undo="1g.10gb@0")
    shown = render_mig.undo(report("status", gpus=(GPUS[0], on, GPUS[2], unread)))
    golden("cli/mig-undo.txt", text_of(shown))
