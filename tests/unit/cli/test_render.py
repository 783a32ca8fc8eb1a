"""What people see, as golden files: tables with everything that can be in them."""

import io
from dataclasses import replace

import pytest
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render, screen
from stoker.client import (
    Allocation,
    AllocationState,
    Assignment,
    Device,
    Gpu,
    GpuCordon,
    GpuHealth,
    GpuMig,
    GpuVerdict,
    MissingGpu,
    Node,
    Nodes,
    NodeState,
    Owner,
    Process,
    RepairAction,
    Request,
)

NOW = 1_800_000_000.0
GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


def text_of(shown: RenderableType, width: int = 200) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


def gpu(index: int, *holders: str, is_read: bool = True, foreign: Process | None = None) -> Gpu:
    return Gpu(
        uuid=f"GPU-0000000{index}",
        model=H100,
        index=index,
        pci_bus_id=f"00000000:0{index}:00.0",
        memory_total_bytes=81559 * 2**20,
        memory_used_bytes=(3 + index) * GIB if is_read else None,
        utilization_ratio=0.125 * index if is_read else None,
        memory_utilization_ratio=None,
        temperature_celsius=30.0 + index if is_read else None,
        power_watts=70.4 if is_read else None,
        energy_joules=None,
        sm_clock_hertz=None,
        memory_clock_hertz=None,
        last_sample_at=NOW if is_read else None,
        allocation_ids=holders,
        processes=(foreign,) if foreign else (),
    )


def node(name: str, *gpus: Gpu, state: NodeState = NodeState.READY) -> Node:
    return Node(
        name=name,
        state=state,
        state_reason="",
        simulated=False,
        cordoned=None,
        pool="train",
        labels={},
        boot_id="b",
        agent_version="0.1.0",
        driver_version="580.1",
        cuda_version="13.0",
        interval_seconds=1.0,
        last_sample_at=NOW - 0.4,
        gpus=gpus,
    )


def allocation(id_: str, state: AllocationState = AllocationState.GRANTED) -> Allocation:
    return Allocation(
        id=id_,
        state=state,
        node="gpu-1",
        devices=(Device("GPU-00000000", H100, 0, 81559 * 2**20, exclusive=True),),
        env={"CUDA_VISIBLE_DEVICES": "GPU-00000000", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        expires_at=NOW + 59.0,
        request=Request(1, "ada@lab", 60.0),
        requested_at=NOW - 100.0,
        granted_at=NOW - 61.0,
        ended_at=None,
        ended_reason="",
        queue_position=None,
        resource_version=9,
        held_by_node=True,
    )


def waiting(id_: str, position: int, request: Request) -> Allocation:
    return replace(
        allocation(id_, AllocationState.WAITING),
        node="",
        devices=(),
        env={},
        expires_at=None,
        granted_at=None,
        request=request,
        queue_position=position,
    )


FLEET = Nodes(
    nodes=(
        node(
            "gpu-1",
            gpu(0, "a-1"),
            gpu(1, "a-2", "a-3"),
            gpu(2, foreign=Process(4711, "bob", "python train.py", GIB, "", NOW)),
            gpu(3, is_read=False),
        ),
        replace(
            node("gpu-3", gpu(0), gpu(1, "a-3", is_read=False)),
            missing_gpus=(
                MissingGpu(1, "GPU-00000001", "gpu_lost", "it fell off the bus"),
                MissingGpu(2, "", "driver_timeout", "nvmlDeviceGetUUID has not returned for 1 s"),
            ),
        ),
        replace(node("sim-1", gpu(0)), simulated=True, pool="", cordoned="fan is loud"),
        replace(
            node("gpu-2", state=NodeState.DISCONNECTED),
            state_reason="its agent has not connected",
            driver_version="",
            last_sample_at=None,
        ),
    ),
    resource_version=12,
    aggregator_version="0.1.0",
)
SHARE = Device("GPU-00000001", H100, 1, 20 * GIB, exclusive=False)
ALLOCATIONS = (
    allocation("a-1"),
    replace(allocation("a-2"), devices=(SHARE,), request=Request(1, "ci", 60.0, 20 * GIB)),
    replace(
        allocation("a-3", AllocationState.RELEASING),
        expires_at=None,
        ended_reason="expired: no keep-alive for 1m",
    ),
    waiting("a-4", 1, Request(8, "eve@lab", 60.0, models=("H100-80GB",))),
    waiting("a-5", 12, Request(1, "eve@lab", 60.0, 30 * GIB)),
)


def judged(gpu: Gpu, verdict: GpuVerdict, action: RepairAction = RepairAction.NONE) -> Gpu:
    return replace(gpu, health=GpuHealth(gpu.uuid, verdict, action, "xid", "Xid 79"))


def assigned(gpu: Gpu, *holders: str, processes: tuple[Process, ...] = ()) -> Gpu:
    by = tuple(Assignment(gpu.uuid, "kubelet", holder) for holder in holders)
    return replace(gpu, assignments=by, processes=processes)


def foreign(pid: int, user: str, owner: Owner | None) -> Process:
    return Process(pid, user, "python train.py", GIB, "", NOW, owner)


POD = Owner(pod_uid="1-2", pod_namespace="ml", pod_name="train-0", container_name="trainer")
BY_HEALTH = GpuCordon("Xid 79: the GPU fell off the bus", by_health=True, at=NOW - 60.0)
UNWELL = Nodes(
    nodes=(
        replace(
            node(
                "gpu-1",
                judged(gpu(0), GpuVerdict.HEALTHY),
                replace(
                    judged(gpu(1), GpuVerdict.UNHEALTHY, RepairAction.RESET_GPU), cordon=BY_HEALTH
                ),
                judged(gpu(2, "a-1"), GpuVerdict.DEGRADED, RepairAction.DRAIN),
                replace(
                    judged(gpu(3, "a-2", is_read=False), GpuVerdict.UNKNOWN),
                    cordon=GpuCordon("to be replaced", by_health=False, at=NOW, drain_at=NOW + 9),
                ),
                # Idle, and not free all the same; its own processes are not told twice.
                assigned(
                    gpu(4),
                    "pod ml/train-0 (container trainer)",
                    processes=(foreign(4711, "bob", POD),),
                ),
                replace(
                    gpu(5),
                    processes=(
                        foreign(4712, "bob", Owner(slurm_job="12")),
                        foreign(4713, "bob", Owner(slurm_job="12")),
                        foreign(4714, "", Owner(unit="jupyter.service")),
                        foreign(4715, "eve", None),
                    ),
                ),
                judged(gpu(6), GpuVerdict.UNHEALTHY, RepairAction.UNKNOWN),
            ),
            cordoned="fan is loud",
            drain_at=NOW + 570.0,
        ),
        replace(node("gpu-2", gpu(0)), assignments_unknown="kubelet does not answer"),
    ),
    resource_version=12,
    aggregator_version="0.1.0",
)


@pytest.mark.parametrize("width", [200, 100, 80])
def test_status_of_what_is_not_well(golden: Golden, width: int) -> None:
    shown = render.status(UNWELL, (), "127.0.0.1:7070", NOW)
    golden(f"cli/status-unwell-{width}.txt", text_of(shown, width))


def test_top_of_what_is_not_well(golden: Golden) -> None:
    shown = [text_of(render.top(UNWELL, NOW, 6), width) for width in (200, 120, 80)]
    golden("cli/top-unwell.txt", "\n".join(shown))


def test_top_has_a_line_for_each_gpu_however_much_is_said_of_it() -> None:
    for width in (60, 80, 100, 120):
        shown = text_of(render.top(UNWELL, NOW, 6), width).splitlines()
        rows = [line for line in shown if line.startswith("gpu-1")]
        assert len(rows) == 6


def test_status(golden: Golden) -> None:
    golden("cli/status.txt", text_of(render.status(FLEET, ALLOCATIONS, "127.0.0.1:7070", NOW)))


# how far its partitions are, who holds it -> what is said where else it would be free
WITHHELD: dict[tuple[str, tuple[str, ...]], str] = {
    ("applying", ()): "MIG applying",
    ("reboot-required", ()): "MIG reboot-required",
    ("draining", ("a-1",)): "a-1, MIG draining",
}


@pytest.mark.parametrize(("state", "holders"), WITHHELD)
def test_gpu_on_which_nothing_may_be_placed_is_not_free(
    state: str, holders: tuple[str, ...]
) -> None:
    mig = GpuMig(state, "", "mixed", "op-1", True, None, False, None, None)
    withheld = replace(gpu(0, *holders), mig=mig)
    nodes = replace(FLEET, nodes=(node("gpu-1", withheld),))
    line = text_of(render.status(nodes, (), "127.0.0.1:7070", NOW), 160).splitlines()[-1]
    assert WITHHELD[state, holders] in line
    assert "free" not in line
    ready = replace(withheld, allocation_ids=(), mig=replace(mig, is_withheld=False))
    nodes = replace(FLEET, nodes=(node("gpu-1", ready),))
    assert " free " in text_of(render.status(nodes, (), "127.0.0.1:7070", NOW), 160)


def test_status_of_nothing(golden: Golden) -> None:
    nothing = Nodes((), 0, "0.1.0")
    golden("cli/status-empty.txt", text_of(render.status(nothing, (), "127.0.0.1:7070", NOW)))


def test_allocation(golden: Golden) -> None:
    golden("cli/allocation.txt", text_of(render.allocation(ALLOCATIONS[0], NOW)))


def test_what_is_copied_is_never_folded() -> None:
    shown = text_of(render.allocation(ALLOCATIONS[0], NOW), width=20)
    assert "CUDA_VISIBLE_DEVICES=GPU-00000000\n" in shown


def test_top_shows_what_fits(golden: Golden) -> None:
    golden("cli/top.txt", text_of(render.top(FLEET, NOW, 3)))


def test_top_of_nothing(golden: Golden) -> None:
    golden("cli/top-empty.txt", text_of(render.top(Nodes((), 0, "0.1.0"), NOW, None)))


def test_narrow_terminals_leave_out_what_matters_least(golden: Golden) -> None:
    status = render.status(FLEET, ALLOCATIONS, "127.0.0.1:7070", NOW)
    shown = [f"{width} columns\n{text_of(status, width)}" for width in (100, 80, 60)]
    golden("cli/status-narrow.txt", "\n".join(shown))


@pytest.mark.parametrize("hostile", ["\x1b[2J", "[red]", "a\nb", "\x07", "\u202e"])
def test_foreign_words_about_health_do_not_disturb_the_terminal(hostile: str) -> None:
    cordon = GpuCordon(hostile, by_health=True, at=NOW)
    sick = replace(judged(gpu(0), GpuVerdict.UNHEALTHY), cordon=cordon)
    held = assigned(gpu(1), hostile, processes=(foreign(1, hostile, Owner(unit=hostile)),))
    fleet = Nodes((node("n", sick, held),), 1, "0.1.0")
    for shown in (render.status(fleet, (), "127.0.0.1:7070", NOW), render.top(fleet, NOW, None)):
        text = text_of(shown)
        assert all(line.isprintable() for line in text.splitlines())
        assert len([line for line in text.splitlines() if line.startswith("n ")]) >= 2
        if hostile == "[red]":
            assert text.count("[red]") == 3


@pytest.mark.parametrize("hostile", ["\x1b[2J", "[red]", "a\nb", "\x07", "\u202e"])
def test_foreign_words_do_not_disturb_the_terminal(hostile: str) -> None:
    fleet = Nodes((replace(node("n", gpu(0)), pool=hostile, cordoned=hostile),), 1, "0.1.0")
    taken = replace(allocation("a"), request=Request(1, hostile, 60.0))
    shown = text_of(render.status(fleet, (taken,), "127.0.0.1:7070", NOW))
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(shown.splitlines()) == 1 + (1 + 2) + (1 + 2) + (1 + 2)
    if hostile == "[red]":
        assert shown.count("[red]") == 3  # words, not markup
