"""What people see of an explanation, and the words that say what to suppose."""

from dataclasses import replace

import pytest
from tests.conftest import Golden
from tests.unit.cli.test_render import ALLOCATIONS, GIB, H100, NOW, text_of

from stoker.cli.render_why import explanation
from stoker.cli.suppositions import parse_supposition
from stoker.client import (
    AddNodes,
    Device,
    Explanation,
    Placement,
    ProposedChange,
    Refusal,
    Refusals,
    RemoveNode,
    Request,
    RequestAhead,
    UncordonNode,
    WhatIf,
)
from stoker.core.errors import BadInput

REFUSALS = Refusals(
    summary="no node for 8 x H100-80GB: 5 nodes: 3 wrong model, 1 no 8 free GPUs, 1 cordoned",
    nodes=(
        Refusal("gpu-1", "gpus_free", "wanted 8, 1 of 4 is free", "8", "1"),
        Refusal("sim-1", "cordoned", "cordoned: fan is loud", "not cordoned", "fan is loud"),
    ),
    nodes_total=5,
    ahead=120,
)
GPUS = (Device("GPU-1", H100, 0, 80 * GIB, True), Device("GPU-2", H100, 3, 80 * GIB, True))
PLACES = tuple(Placement(name, GPUS, {}) for name in ("gpu-1", "gpu-2"))
WHY = Explanation(
    placeable=False,
    node="",
    summary=f"has waited 40s: {REFUSALS.summary}",
    refusals=REFUSALS,
    allocation=ALLOCATIONS[3],
    change=ProposedChange(
        "spread_nodes",
        "take 4 GPUs on each of 2 nodes instead of 8 on one",
        Request(4, "ann", 60.0, nodes=2),
        "",
        (),
        (),
        PLACES,
    ),
    ahead=(RequestAhead("a-2", "bob@lab", "8 x H100-80GB", 5, NOW - 3661.0),),
)


def test_explanation(golden: Golden) -> None:
    golden("cli/why.txt", text_of(explanation(WHY, NOW)))


def test_explanation_of_what_nothing_mends(golden: Golden) -> None:
    why = replace(WHY, allocation=None, change=None, ahead=())
    golden("cli/why-nothing.txt", text_of(explanation(why, NOW)))


def test_explanation_of_what_would_be_placed(golden: Golden) -> None:
    choice = "policy binpack (fills nodes); 3 nodes can host it, next would be gpu-2"
    why = Explanation(True, "gpu-1", "it would be placed on gpu-1", None, None, PLACES[:1], choice)
    golden("cli/why-placeable.txt", text_of(explanation(why, NOW)))


def test_reasons_are_folded_and_never_cut() -> None:
    shown = text_of(explanation(replace(WHY, allocation=None, ahead=()), NOW), width=40)
    assert max(len(line) for line in shown.splitlines()) <= 40
    assert "…" not in shown
    assert " ".join(shown.split()).count("1 of 4 is free") == 1


@pytest.mark.parametrize("hostile", ["\x1b[2J", "[red]", "a\nb", "\x07", "\u202e"])
def test_foreign_words_do_not_disturb_the_terminal(hostile: str) -> None:
    assert WHY.change is not None
    why = replace(
        WHY,
        summary=hostile,
        choice=hostile,
        change=replace(WHY.change, summary=hostile),
        ahead=(RequestAhead(hostile, hostile, hostile, 0, NOW),),
    )
    shown = text_of(explanation(why, NOW), width=500)
    assert len(shown.splitlines()) == len(text_of(explanation(WHY, NOW), 500).splitlines()) + 1
    assert not any(each in shown for each in ("\x1b", "\x07", "\u202e"))


SAID: tuple[tuple[str, WhatIf], ...] = (
    ("add 2xH100-node", AddNodes(2, "H100")),
    ("add H100-80GB", AddNodes(1, "H100-80GB")),
    ("add 8xH100-80GB", AddNodes(8, "H100-80GB")),
    ("add 2 nodes 8xH100-80GB", AddNodes(8, "H100-80GB", 2)),
    ("add 2 nodes of 8 x H100-80GB in pool train", AddNodes(8, "H100-80GB", 2, "train")),
    ("Add 1 node with T4", AddNodes(1, "T4")),
    ("remove n3", RemoveNode("n3")),
    ("  uncordon   n-1.lab ", UncordonNode("n-1.lab")),
)


@pytest.mark.parametrize(("text", "change"), SAID, ids=[text for text, _ in SAID])
def test_what_is_said_is_supposed(text: str, change: WhatIf) -> None:
    assert parse_supposition(text) == change


@pytest.mark.parametrize("text", ["", "add", "remove", "remove a b", "drain n1", "add 2 nodes"])
def test_what_cannot_be_understood_is_told(text: str) -> None:
    with pytest.raises(BadInput, match="wanted add .* found"):
        parse_supposition(text)
