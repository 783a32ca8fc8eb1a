"""Which GPUs should be there: those that were when all were; a slot tells a new card from a gap."""

import pytest

from stoker.agent.health.expected import compare
from stoker.agent.model import NumberedGpu, NumberedInventory
from stoker.agent.readings import GpuFault, GpuIdentity
from stoker.agent.verdicts import ExpectedGpu

MODEL = "NVIDIA H100 80GB HBM3"


def identity(uuid: str, index: int, slot: int | None = None) -> GpuIdentity:
    pci = None if slot is None else f"00000000:{slot:02X}:00.0"
    return GpuIdentity(index, uuid, MODEL, 1 << 30, pci)


def expected(uuid: str, index: int, slot: int | None = None) -> ExpectedGpu:
    pci = None if slot is None else f"00000000:{slot:02X}:00.0"
    return ExpectedGpu(uuid, index, pci, MODEL)


def inventory(*gpus: GpuIdentity, missing: tuple[GpuFault, ...] = ()) -> NumberedInventory:
    numbered = tuple(NumberedGpu(number, gpu) for number, gpu in enumerate(gpus, 1))
    return NumberedInventory("570", "12.8", numbered, missing)


def lost(index: int, uuid: str | None) -> GpuFault:
    return GpuFault(index, uuid, "gpu_lost", "it is lost")


A, B, C = expected("a", 0, 1), expected("b", 1, 2), expected("c", 2, 3)
Compared = tuple[tuple[ExpectedGpu, ...], tuple[str, ...], tuple[str, ...], dict[str, int]]
# name, expected before, inventory; then: expected after, replaced, absent, unread
ROWS: list[tuple[str, tuple[ExpectedGpu, ...], NumberedInventory, Compared]] = [
    (
        "the first inventory",
        (),
        inventory(identity("a", 0, 1), identity("b", 1, 2)),
        ((A, B), (), (), {}),
    ),
    ("the first inventory is not whole", (), inventory(identity("a", 0, 1),
     missing=(lost(1, "b"),)), ((), (), (), {"b": 1})),
    ("all are there", (A, B), inventory(identity("a", 0, 1), identity("b", 1, 2)),
     ((A, B), (), (), {})),
    ("one more", (A,), inventory(identity("a", 0, 1), identity("b", 1, 2)), ((A, B), (), (), {})),
    ("one is gone", (A, B), inventory(identity("b", 0, 2)), ((A, B), (), ("a",), {})),
    ("all are gone", (A, B), inventory(), ((A, B), (), ("a", "b"), {})),
    ("one is counted and cannot be read", (A, B), inventory(identity("a", 0, 1),
     missing=(lost(1, "b"),)), ((A, B), (), (), {"b": 1})),
    ("one is counted and cannot be named", (A, B), inventory(identity("a", 0, 1),
     missing=(lost(1, None),)), ((A, B), (), (), {"b": 1})),
    ("one is gone, another cannot be named", (A, B, C), inventory(identity("a", 0, 1),
     missing=(lost(1, None),)), ((A, B, C), (), ("c",), {"b": 1})),
    ("the first is gone, and the second moved up and cannot be named", (A, B), inventory(
     missing=(lost(0, None),)), ((A, B), (), ("b",), {"a": 0})),
    ("cannot be named, and is not where it was", (C,), inventory(missing=(lost(0, None),)),
     ((C,), (), (), {"c": 0})),
    ("another card in its slot", (A, B), inventory(identity("a", 0, 1), identity("x", 1, 2)),
     ((A, expected("x", 1, 2)), ("b",), (), {})),
    ("another card in its slot, and one is gone", (A, B, C), inventory(identity("a", 0, 1),
     identity("x", 1, 2)), ((A, C), ("b",), ("c",), {})),
    ("two cards changed their slots", (A, B), inventory(identity("b", 0, 1), identity("a", 1, 2)),
     ((expected("b", 0, 1), expected("a", 1, 2)), (), (), {})),
    ("slots are not told", (expected("a", 0), expected("b", 1)), inventory(identity("a", 0)),
     ((expected("a", 0), expected("b", 1)), (), ("b",), {})),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "found", "then"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_comparison(
    before: tuple[ExpectedGpu, ...],
    found: NumberedInventory,
    then: Compared,
) -> None:
    compared = compare(before, found)
    assert (
        compared.expected,
        compared.replaced,
        tuple(each.uuid for each in compared.absent),
        {uuid: fault.index for uuid, fault in compared.unread},
    ) == then
