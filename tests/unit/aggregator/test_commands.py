"""What a node is told, and when it has certainly let go."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import GIB, START, share, whole

from stoker.aggregator.commands import difference, has_let_go, to_hold
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Command,
    Device,
    HeldAllocation,
    Placement,
)

GRANTED = Allocation(
    id="a",
    state=AllocationState.GRANTED,
    request=whole(2),
    requested_at=START,
    version=7,
    placements=(
        Placement(
            "n1",
            (
                Device("n1-0", "H100", 0, 80 * GIB, exclusive=True),
                Device("n1-1", "H100", 1, 80 * GIB, exclusive=True),
            ),
        ),
    ),
    granted_at=START + 1.0,
)
RELEASING = replace(GRANTED, state=AllocationState.RELEASING, reason="released")
HOLD = HeldAllocation("a", ("n1-0", "n1-1"), None, "ann", 60.0, START + 1.0)
TOLD_TO_HOLD = {"a": Command(3, "a", HOLD)}
TOLD_TO_DROP = {"a": Command(4, "a", None, "released")}


def hold(id_: int) -> tuple[Command, ...]:
    return (Command(id_, "a", HOLD),)


def drop(id_: int, reason: str = "released") -> tuple[Command, ...]:
    return (Command(id_, "a", None, reason),)


@dataclass(frozen=True)
class Case:
    what: str
    told: tuple[Command, ...]
    wanted: Allocation | None = None
    held: bool = False
    sent: dict[str, Command] = field(default_factory=dict[str, Command])


STRAY = "the ledger does not grant it"
DIFFERENCES = (
    Case("nothing wanted, nothing held", ()),
    Case("granted, and not held", hold(9), wanted=GRANTED),
    Case("granted, and told already", (), wanted=GRANTED, sent=TOLD_TO_HOLD),
    Case("granted, and held", (), wanted=GRANTED, held=True),
    Case("dropped before it was granted", hold(9), wanted=GRANTED, sent=TOLD_TO_DROP),
    Case("being dropped since before it was granted", (), GRANTED, held=True, sent=TOLD_TO_DROP),
    Case("released, and held", drop(9), wanted=RELEASING, held=True),
    Case("released while a hold is under way", drop(9), wanted=RELEASING, sent=TOLD_TO_HOLD),
    Case("released, held, told to hold", drop(9), RELEASING, held=True, sent=TOLD_TO_HOLD),
    Case("released, and told already", (), RELEASING, held=True, sent=TOLD_TO_DROP),
    Case("released, and never there on this stream", drop(9), wanted=RELEASING),
    Case("held, and not in the ledger", drop(9, STRAY), held=True),
    Case("over, and held once more", drop(9, STRAY), held=True, sent=TOLD_TO_HOLD),
    Case("not in the ledger, and told already", (), held=True, sent=TOLD_TO_DROP),
)


@pytest.mark.parametrize("case", DIFFERENCES, ids=lambda case: case.what)
def test_difference(case: Case) -> None:
    wanted = {"a": case.wanted} if case.wanted else {}
    held = {"a": HOLD} if case.held else {}
    assert difference("n1", wanted, held, case.sent, 9, inventory_known=True) == case.told


@pytest.mark.parametrize("case", DIFFERENCES, ids=lambda case: case.what)
def test_telling_twice_equals_telling_once(case: Case) -> None:
    wanted = {"a": case.wanted} if case.wanted else {}
    held = {"a": HOLD} if case.held else {}
    sent = {**case.sent, **{command.allocation_id: command for command in case.told}}
    assert difference("n1", wanted, held, sent, 10, inventory_known=True) == ()


def test_commands_are_numbered_in_a_row() -> None:
    wanted = {id_: replace(GRANTED, id=id_) for id_ in "bcd"}
    stray = replace(HOLD, gpu_uuids=("n1-9",))
    told = difference("n1", wanted, {"a": stray}, {}, 5, inventory_known=True)
    assert [(command.id, command.allocation_id, command.is_hold) for command in told] == [
        (5, "b", True),
        (6, "c", True),
        (7, "d", True),
        (8, "a", False),
    ]


def test_hold_waits_for_what_is_dropped_from_its_gpus() -> None:
    stray = replace(HOLD, id="b", gpu_uuids=("n1-1",))
    told = difference("n1", {"a": GRANTED}, {"b": stray}, {}, 1, inventory_known=True)
    assert [(command.allocation_id, command.is_hold) for command in told] == [("b", False)]
    sent = {"b": told[0]}
    assert difference("n1", {"a": GRANTED}, {"b": stray}, sent, 2, inventory_known=True) == ()
    assert difference("n1", {"a": GRANTED}, {}, sent, 2, inventory_known=True) == hold(2)
    elsewhere = {"b": replace(HOLD, id="b", gpu_uuids=("n1-9",))}
    assert difference("n1", {"a": GRANTED}, elsewhere, sent, 2, inventory_known=True) == hold(2)


@pytest.mark.parametrize("what", ["cpu_milli", "host_memory_bytes"])
def test_hold_waits_for_what_is_dropped_from_its_host(what: str) -> None:
    some: dict[str, Any] = {what: GIB}
    wanted = {"a": replace(GRANTED, request=whole(2, **some))}
    stray = replace(HOLD, id="b", gpu_uuids=("n1-9",), **some)
    told = difference("n1", wanted, {"b": stray}, {}, 1, inventory_known=True)
    assert [(command.allocation_id, command.is_hold) for command in told] == [("b", False)]
    after = difference("n1", wanted, {}, {"b": told[0]}, 2, inventory_known=True)
    assert [(command.allocation_id, command.is_hold) for command in after] == [("a", True)]
    frugal = {"b": replace(HOLD, id="b", gpu_uuids=("n1-9",))}
    both = difference("n1", wanted, frugal, {}, 1, inventory_known=True)
    assert [command.allocation_id for command in both] == ["a", "b"]


def test_what_could_not_be_adopted_yet_is_not_dropped() -> None:
    assert difference("n1", {}, {"a": HOLD}, {}, 1, inventory_known=False) == ()
    known = difference("n1", {"a": RELEASING}, {"a": HOLD}, {}, 1, inventory_known=False)
    assert known == drop(1), "what the ledger knows needs no inventory"


@pytest.mark.parametrize(
    ("held", "sent", "done", "expected"),
    [
        pytest.param(True, {}, 9, False, id="it is held"),
        pytest.param(True, TOLD_TO_DROP, 9, False, id="it is held though a drop is done"),
        pytest.param(False, {}, 9, False, id="the hello had it not, and nobody looked"),
        pytest.param(False, TOLD_TO_HOLD, 0, False, id="a hold is under way"),
        pytest.param(False, TOLD_TO_HOLD, 3, False, id="a hold is done, its report is to come"),
        pytest.param(False, TOLD_TO_DROP, 3, False, id="a drop is under way"),
        pytest.param(False, TOLD_TO_DROP, 4, True, id="a drop is done"),
        pytest.param(False, TOLD_TO_DROP, 5, True, id="a drop and what came after it are done"),
    ],
)
def test_has_let_go(held: bool, sent: dict[str, Command], done: int, expected: bool) -> None:
    assert has_let_go("a", {"a": HOLD} if held else {}, sent, done) is expected


def test_share_is_held_as_so_many_bytes() -> None:
    device = Device("n1-0", "H100", 0, 20 * GIB, exclusive=False)
    shared = replace(GRANTED, request=share(20), placements=(Placement("n1", (device,)),))
    told = HeldAllocation("a", ("n1-0",), 20 * GIB, "ann", 60.0, START + 1.0)
    assert to_hold(shared, shared.devices) == told


def test_each_node_of_a_gang_holds_its_part() -> None:
    here, there = (Device(f"n{i}-0", "H100", 0, 80 * GIB, exclusive=True) for i in (1, 2))
    gang = replace(
        GRANTED,
        request=whole(1, nodes=2, cpu_milli=8000, host_memory_bytes=GIB),
        placements=(Placement("n1", (here,)), Placement("n2", (there,))),
    )
    for node in ("n1", "n2"):
        (command,) = difference(node, {"a": gang}, {}, {}, 1, inventory_known=True)
        part = HeldAllocation("a", (f"{node}-0",), None, "ann", 60.0, START + 1.0)
        assert command.hold == replace(part, gang_nodes=2, cpu_milli=8000, host_memory_bytes=GIB)
