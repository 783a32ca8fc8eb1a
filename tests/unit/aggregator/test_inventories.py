"""What sits in the slots of a node, and what of it can be read."""

from dataclasses import dataclass, replace

import pytest
from tests.unit.aggregator.builders import make_facts, make_gpus

from stoker.aggregator.inventories import Inventory, named, with_inventory
from stoker.aggregator.model import Gpu, MissingGpu

GPUS = make_gpus("n1", 4)
KNOWN = make_facts(gpus=GPUS)


def out(index: int, uuid: str = "") -> MissingGpu:
    return MissingGpu(index, uuid, "gpu_lost", "it fell off the bus")


def told(gpus: tuple[Gpu, ...], *missing: MissingGpu) -> Inventory:
    return Inventory("570", "12.8", gpus, missing)


@dataclass(frozen=True)
class Row:
    what: str
    inventory: Inventory
    missing: tuple[str, ...]  # their UUIDs, as far as they are known
    slots: tuple[str, ...]  # UUIDs of all GPUs of the node


FIRST, SECOND, THIRD, FOURTH = GPUS
ROWS = (
    Row("all are there", told(GPUS), (), ("n1-0", "n1-1", "n1-2", "n1-3")),
    Row("one was taken out", told(GPUS[:3]), (), ("n1-0", "n1-1", "n1-2")),
    Row(
        "one is out of use",
        told((FIRST, SECOND, FOURTH), out(2, "n1-2")),
        ("n1-2",),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
    ),
    Row(
        "an agent that was started meanwhile does not know its name",
        told((FIRST, SECOND, FOURTH), out(2)),
        ("n1-2",),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
    ),
    Row(
        "the driver counts less than before: it may be any",
        told((FIRST, SECOND), out(2)),
        ("",),
        ("n1-0", "n1-1"),
    ),
    Row(
        "its index is now that of another, which can be read",
        told((FIRST, SECOND, replace(FOURTH, index=2)), out(3)),
        ("",),
        ("n1-0", "n1-1", "n1-3"),
    ),
    Row(
        "one that can be read is not missing under its name",
        told((FIRST, SECOND, FOURTH), out(2, "n1-1")),
        ("n1-2",),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
    ),
    Row(
        "one that was never seen",
        told(GPUS, out(4, "n1-4")),
        ("n1-4",),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
    ),
    Row(
        "all are out of use",
        told((), *(out(index) for index in range(4))),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
        ("n1-0", "n1-1", "n1-2", "n1-3"),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_slots(row: Row) -> None:
    inventory = named(row.inventory, KNOWN)
    assert tuple(each.uuid for each in inventory.missing) == row.missing
    facts = with_inventory(KNOWN, inventory, KNOWN)
    assert tuple(gpu.uuid for gpu in facts.gpus) == row.slots
    assert facts.driver_version == "570"


def test_card_that_goes_out_of_use_and_comes_back_changes_nothing_that_is_stored() -> None:
    before = with_inventory(KNOWN, told(GPUS), KNOWN)
    gone = named(told((FIRST, SECOND, FOURTH), out(2, "n1-2")), before)
    assert with_inventory(before, gone, before) == before
    assert with_inventory(before, named(told(GPUS), before), before) == before


def test_number_that_another_has_now_is_not_that_of_a_missing_card() -> None:
    """A journal that could not keep a number gives it to the next."""
    inventory = named(told((replace(FIRST, number=3),), out(2, "n1-2")), KNOWN)
    facts = with_inventory(KNOWN, inventory, KNOWN)
    assert [(gpu.uuid, gpu.number) for gpu in facts.gpus] == [("n1-0", 3), ("n1-2", 0)]


def test_numbers_of_another_journal_mean_nothing() -> None:
    reinstalled = replace(KNOWN, incarnation="another", gpus=())
    inventory = named(told((FIRST,), out(2, "n1-2")), KNOWN)
    facts = with_inventory(reinstalled, inventory, KNOWN)
    assert [(gpu.uuid, gpu.number) for gpu in facts.gpus] == [("n1-0", 1), ("n1-2", 0)]


def test_node_that_nobody_knew_has_what_it_tells() -> None:
    inventory = named(told((FIRST,), out(1)), None)
    assert inventory.missing == (out(1),)
    assert with_inventory(make_facts(gpus=()), inventory, None).gpus == (FIRST,)
