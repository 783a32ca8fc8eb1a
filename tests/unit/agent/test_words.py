"""What the node says of itself in one line, for every way it can be."""

from dataclasses import replace

import pytest
from tests.support.node import Node, allocation, inventory

from stoker.agent.events import DriverChanged, InventoryRead, SampleTaken, SamplingFailed
from stoker.agent.facts import Fact
from stoker.agent.model import DriverState, DriverStatus, Release
from stoker.agent.readings import WHOLE_GPU, GpuFault, GpuReading, ReadFailure
from stoker.agent.words import describe_release, list_gpus, summarize

AT = 1_800_000_000.0  # 2027-01-15 08:00 UTC


@pytest.mark.parametrize(
    ("until", "held", "expected"),
    [
        (AT + 600, 2, "released by root at 2027-01-15 08:00 UTC for 10m, 2 allocations held"),
        (
            None,
            1,
            "released by root at 2027-01-15 08:00 UTC until it is resumed, 1 allocation held",
        ),
    ],
)
def test_a_release_is_told_with_who_when_how_long_and_what_is_held(
    until: float | None, held: int, expected: str
) -> None:
    assert describe_release(Release(AT, until, "root"), held) == expected


def lost(index: int) -> GpuReading:
    failure = ReadFailure(WHOLE_GPU, "gpu_lost", f"GPU-{index}: it fell off the bus")
    return GpuReading(f"GPU-{index}", 0.0, failures=(failure,))


def read(index: int) -> GpuReading:
    return GpuReading(f"GPU-{index}", 0.0, facts={Fact.TEMPERATURE_CELSIUS: 30.0})


def test_all_is_well() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    assert summarize(node.view) == "2 GPUs read; 1 allocation held; aggregator connected"


def test_a_machine_without_gpus_is_no_failure() -> None:
    node = Node()
    node.happen(InventoryRead(0.0, inventory()))
    node.happen(DriverChanged(0.0, DriverStatus(DriverState.READING)))
    node.happen(SampleTaken(0.0, ()))
    assert summarize(node.view) == "0 GPUs read; 0 allocations held; aggregator not connected"


def test_a_gpu_that_is_lost_is_named_with_the_reason() -> None:
    node = Node().ready()
    node.happen(SampleTaken(node.now, (read(0), lost(1))))
    assert summarize(node.view).startswith(
        "1 of 2 GPUs read (out: GPU 1: GPU-1: it fell off the bus); "
    )
    assert [(gpu.index, gpu.is_read) for gpu in list_gpus(node.view)] == [(0, True), (1, False)]


def test_a_gpu_that_the_driver_counts_and_cannot_open_is_named_too() -> None:
    node = Node().ready()
    fault = GpuFault(1, None, "reset_required", "it must be reset")
    node.happen(InventoryRead(node.now, replace(inventory(0), missing=(fault,))))
    node.happen(SampleTaken(node.now, (read(0),)))
    assert summarize(node.view).startswith("1 of 2 GPUs read (out: GPU 1: it must be reset); ")


def test_of_many_gpus_that_are_out_some_are_named() -> None:
    node = Node().ready(*range(8))
    node.happen(SampleTaken(node.now, (read(0), *map(lost, range(1, 8)))))
    said = summarize(node.view)
    assert said.startswith("1 of 8 GPUs read (out: GPU 1: ")
    assert "GPU 4: GPU-4: it fell off the bus; and 3 more)" in said
    assert "GPU 5" not in said


def test_no_gpu_that_answers_is_named_one_by_one() -> None:
    node = Node().ready()
    node.happen(SampleTaken(node.now, (lost(0), lost(1))))
    assert summarize(node.view).startswith("0 of 2 GPUs read (out: GPU 0: GPU-0: it fell off")


def test_a_gpu_of_which_nothing_was_told_yet_is_not_called_read() -> None:
    node = Node()
    node.happen(InventoryRead(0.0, inventory(0)))
    node.happen(DriverChanged(0.0, DriverStatus(DriverState.READING)))
    assert summarize(node.view).startswith("0 of 1 GPU read (out: GPU 0: not read yet); ")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            DriverStatus(DriverState.BLOCKED, "nvmlInit: has not returned within 1 s"),
            (
                "no GPU is read: driver blocked: nvmlInit: has not returned within 1 s; "
                "0 allocations held; aggregator connected"
            ),
        ),
        (
            DriverStatus(DriverState.STARTING),
            "no GPU is read: driver starting; 0 allocations held; aggregator connected",
        ),
        (
            DriverStatus(DriverState.RELEASED, "released by root, 0 allocations held"),
            "no GPU is read: released by root, 0 allocations held; aggregator connected",
        ),
    ],
)
def test_a_driver_that_is_not_read_is_told_with_the_reason(
    status: DriverStatus, expected: str
) -> None:
    node = Node().ready()
    node.happen(DriverChanged(node.now, status))
    node.happen(SamplingFailed(node.now, "driver_timeout", "gone"))
    assert summarize(node.view) == expected
    assert all(not gpu.is_read and gpu.reason for gpu in list_gpus(node.view))
