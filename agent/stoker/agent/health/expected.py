"""Which GPUs the node should have: what it had when its inventory was whole, compared with now."""

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.agent.health.kernel_log import parse_address
from stoker.agent.model import NumberedInventory
from stoker.agent.readings import GpuFault, GpuIdentity
from stoker.agent.verdicts import ExpectedGpu


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an inventory lacks, and what it has."""

    expected: tuple[ExpectedGpu, ...]  # from now on
    replaced: tuple[str, ...]  # another card is in their slot
    absent: tuple[ExpectedGpu, ...]  # not counted by the driver any more
    unread: tuple[tuple[str, GpuFault], ...]  # counted, and not to be read, by UUID


def compare(expected: Sequence[ExpectedGpu], inventory: NumberedInventory) -> Comparison:
    """Return what of the expected GPUs is there, gone, or replaced."""
    present = inventory.uuids
    named = {fault.uuid: fault for fault in inventory.missing if fault.uuid is not None}
    slots = {
        address: gpu.identity.uuid
        for gpu in inventory.gpus
        if (address := _address(gpu.identity.pci_bus_id)) is not None
    }
    gone = [each for each in expected if each.uuid not in present and each.uuid not in named]
    replaced = [each for each in gone if _address(each.pci_bus_id) in slots]
    rest = [each for each in gone if each not in replaced]
    unnamed = [fault for fault in inventory.missing if fault.uuid is None]
    pairs = _paired(rest, unnamed)
    paired = {uuid for uuid, _ in pairs}
    absent = [each for each in rest if each.uuid not in paired]
    left = tuple(each for each in expected if each not in replaced)
    if not inventory.missing and not absent:  # it is whole
        left = tuple(_expected(gpu.identity) for gpu in inventory.gpus)
    return Comparison(
        expected=left,
        replaced=tuple(each.uuid for each in replaced),
        absent=tuple(absent),
        unread=(*((uuid, fault) for uuid, fault in named.items()), *pairs),
    )


def _paired(gone: Sequence[ExpectedGpu], unnamed: Sequence[GpuFault]) -> list[tuple[str, GpuFault]]:
    """Say which of those that are gone the driver means by GPUs that it cannot name.

    The index tells, as long as no other GPU is gone; what is left goes by the order of the slots.
    """
    by_index = {fault.index: fault for fault in unnamed}
    pairs = [(each.uuid, by_index.pop(each.index)) for each in gone if each.index in by_index]
    taken = {uuid for uuid, _ in pairs}
    rest = [each.uuid for each in gone if each.uuid not in taken]
    return [*pairs, *zip(rest, by_index.values(), strict=False)]


def _expected(gpu: GpuIdentity) -> ExpectedGpu:
    return ExpectedGpu(gpu.uuid, gpu.index, gpu.pci_bus_id, gpu.model)


def _address(pci_bus_id: str | None) -> tuple[int, int, int] | None:
    return None if pci_bus_id is None else parse_address(pci_bus_id)
