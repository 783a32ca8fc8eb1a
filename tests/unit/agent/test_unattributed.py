"""What counts as memory that no process accounts for."""

import pytest

from stoker.agent.model import ProcessSeen
from stoker.agent.readings import GpuSample
from stoker.agent.unattributed import TOLERANCE_BYTES, unattributed_bytes

GIB = 2**30


def sample(used: int | None, *, uuid: str = "GPU-0", reserved: int | None = 1) -> GpuSample:
    return GpuSample(uuid, 0.0, memory_used_bytes=used, memory_reserved_bytes=reserved)


def process(used: int | None, *, uuid: str = "GPU-0") -> ProcessSeen:
    return ProcessSeen(uuid, 42, memory_used_bytes=used)


@pytest.mark.parametrize(
    ("what", "before", "after", "processes", "expected"),
    [
        ("idle", 0, 0, [], 0),
        ("the driver's own", TOLERANCE_BYTES, TOLERANCE_BYTES, [], 0),
        ("left behind", 8 * GIB, 8 * GIB, [], 8 * GIB),
        ("left behind, beside others", 8 * GIB, 8 * GIB, [2 * GIB, GIB], 5 * GIB),
        ("all accounted for", 8 * GIB, 8 * GIB, [6 * GIB, 2 * GIB], 0),
        ("a process has come since", 0, 8 * GIB, [], 0),
        ("a process has come, and was told", 0, 8 * GIB, [8 * GIB], 0),
        ("a process has gone before it was told", 8 * GIB, 0, [], 0),
        ("a process has grown since", 1 * GIB, 8 * GIB, [1 * GIB], 0),
        ("memory that processes share", 8 * GIB, 8 * GIB, [8 * GIB, 8 * GIB], 0),
        ("a process whose memory is not told", 8 * GIB, 8 * GIB, [1 * GIB, None], None),
        ("not read before", None, 8 * GIB, [], None),
        ("not read after", 8 * GIB, None, [], None),
    ],
)
def test_unattributed(
    what: str,
    before: int | None,
    after: int | None,
    processes: list[int | None],
    expected: int | None,
) -> None:
    told = unattributed_bytes([sample(before)], [sample(after)], map(process, processes), ())
    assert told == ({} if expected is None else {"GPU-0": expected}), what


def test_a_gpu_is_left_out_alone() -> None:
    samples = [sample(GIB, uuid=f"GPU-{n}") for n in range(3)]
    processes = [process(None, uuid="GPU-1"), process(GIB, uuid="GPU-9")]
    assert unattributed_bytes(samples, samples, processes, ["GPU-2"]) == {"GPU-0": GIB}


def test_a_driver_that_counts_its_reserve_as_used_says_nothing() -> None:
    assert unattributed_bytes([sample(GIB, reserved=None)], [sample(GIB)], [], ()) == {}
    assert unattributed_bytes([sample(GIB)], [sample(GIB, reserved=None)], [], ()) == {}


def test_a_gpu_that_came_or_went_in_between_says_nothing() -> None:
    assert unattributed_bytes([], [sample(GIB)], [], ()) == {}
    assert unattributed_bytes([sample(GIB)], [], [], ()) == {}
