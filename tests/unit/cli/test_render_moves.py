"""What people see of a plan of moves, as golden files."""

import io
from dataclasses import replace

import pytest
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_moves, screen
from stoker.client import Device, Move, MovePlan, Placement

H100 = "NVIDIA H100 80GB HBM3"


def text_of(shown: RenderableType, width: int = 160) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


def at(node: str, *indexes: int, mig_profile: str = "") -> Placement:
    devices = tuple(
        Device(f"GPU-{node}-{i}", H100, i, 80, exclusive=True, mig_profile=mig_profile)
        for i in indexes
    )
    return Placement(node, devices, {})


PLAN = MovePlan(
    (
        Move(
            *("a-1", (at("n1", 2),), (at("n2", 0),), "defragment"),
            "makes room on node n1 for 4 x GPU, which ann waits for",
            *(1000, 4000, "f-1"),
        ),
        Move(
            *("a-2", (at("n3", 0), at("n4", 0, 1)), (at("n5", 6), at("n6", 2, 3)), "defragment"),
            "n3 has 4 free GPUs instead of 3: 3.2 GPUs' worth more of use to the requests that the "
            "fleet has had",
            *(3000, 4125, "f-2"),
        ),
        Move(
            *("a\x1b[2J3", (at("n7", 1),), (at("n7", 5, mig_profile="1g.10gb"),), "relieve"),
            "GPU 1 of n7 is hot (96 % busy, 40 % of its memory in use); without it 70 % busy, "
            "30 % of its memory in use",
            *(250, 260, ""),
        ),
    ),
    "3 moves: 8.125 GPUs' worth become usable and 0.26 GPUs' worth cool down, for 4.25 GPUs' worth "
    "carried over; then there is room for 4 x GPU",
)
NOTHING = "nothing to move: 2 movable allocations, and no move that gains enough for what it costs"


@pytest.mark.parametrize(
    ("name", "plan", "is_applied", "width"),
    [
        ("rebalance", PLAN, False, 160),
        ("rebalance-narrow", PLAN, False, 80),
        ("rebalance-applied", PLAN, True, 160),
        ("rebalance-nothing", MovePlan((), NOTHING), False, 160),
    ],
)
def test_plan(golden: Golden, name: str, plan: MovePlan, is_applied: bool, width: int) -> None:
    shown = render_moves.plan(plan, is_applied=is_applied)
    golden(f"cli/{name}.txt", text_of(shown, width))


def test_one_holder_is_asked() -> None:
    one = replace(PLAN, moves=PLAN.moves[:1])
    last = text_of(render_moves.plan(one, is_applied=True)).splitlines()[-1]
    assert last.strip() == "1 holder asked; each answers with its next keep-alives"
