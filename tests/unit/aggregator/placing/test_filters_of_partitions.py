"""GPUs that are withheld until they are partitioned (MIG): what that keeps from a request."""

from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import GIB, Scene, make_facts, share, whole
from tests.unit.aggregator.placing.test_filters import REFUSED
from tests.unit.aggregator.placing.test_filters_of_constraints import CASES, SEVEN, Case

from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import Refusal
from stoker.aggregator.placing.filters import could_ever_fit, fits, refuse
from stoker.aggregator.placing.summary import WORDS
from stoker.core.mig.geometry import MigState

HALF = GpuMig("", MigState.APPLYING, "2 of 5 steps", "all-balanced", "op-1", is_withheld=True)
FAILED = GpuMig("", MigState.FAILED, "destroying 1g.10gb@0 failed", is_withheld=True)

WITHHELD = (
    Case(
        *("a GPU that is partitioned anew", whole(), 1),
        filter="mig_withheld",
        wanted="1",
        found="0",
        reason="wanted 1 x GPU on one node, 0 of 1 are not withheld: GPU 0: its MIG layout "
        "'all-balanced' is not in place: applying: 2 of 5 steps",
        lasting=True,
    ),
    Case(
        *("more than those that are not", whole(2), 2),
        filter="mig_withheld",
        wanted="2",
        found="1",
        reason="wanted 2 x GPU on one node, 1 of 2 are not withheld: GPU 0: its MIG layout "
        "'all-balanced' is not in place: applying: 2 of 5 steps",
        lasting=True,
    ),
    Case(
        *("a share of it", share(8), 1),
        filter="mig_withheld",
        wanted=str(8 * GIB),
        found="0",
        reason="wanted 8 GiB of one GPU, the largest that is not withheld has 0 B: GPU 0: its MIG "
        "layout 'all-balanced' is not in place: applying: 2 of 5 steps",
        lasting=True,
    ),
    Case(
        *("a MIG device that it has still", whole(mig_profile="1g.10gb"), (SEVEN,)),
        filter="mig_withheld",
        wanted="1g.10gb",
        found="0",
        reason="wanted one MIG 1g.10gb of a GPU, every GPU that has one is withheld: GPU 0: its "
        "MIG layout 'all-balanced' is not in place: applying: 2 of 5 steps",
        lasting=True,
    ),
    Case("the GPU beside it", whole(), 2),
    Case("a share of the GPU beside it", share(8), 2),
)


@pytest.mark.parametrize("case", WITHHELD, ids=lambda case: case.what)
def test_first_gpu_is_withheld(case: Case) -> None:
    scene = Scene(make_facts(gpus=case.gpus))
    scene.frame("n1", mig={"n1-0": replace(HALF, gpu_uuid="n1-0")})
    view = scene.view()
    node = view.nodes["n1"]
    expected = Refusal("n1", case.filter, case.reason, case.wanted, case.found)
    assert refuse(case.request, node, view) == (expected if case.filter else None)
    assert fits(case.request, node, view) is not bool(case.filter)
    assert could_ever_fit(case.request, node, view) is not case.lasting


def test_gpu_that_is_withheld_beside_one_that_is_held_is_told_of() -> None:
    scene = Scene(make_facts(gpus=2))
    held = scene.grant(whole())
    scene.frame("n1", mig={"n1-1": replace(FAILED, gpu_uuid="n1-1")})
    refusal = refuse(whole(), scene.view().nodes["n1"], scene.view())
    assert refusal is not None
    assert refusal.filter == "gpus_free"
    assert refusal.reason == (
        f"wanted 1 x GPU free on one node, 0 of 2 are: allocated to {held.id}; "
        "GPU 1: its MIG layout is not in place: failed: destroying 1g.10gb@0 failed"
    )


def test_every_filter_has_a_row() -> None:
    # The queue's refusal is placement's own; what is refused without constraints is in REFUSED.
    told = {case.filter for case in (*REFUSED, *CASES, *WITHHELD)} - {""}
    assert told | {"queue"} == WORDS.keys()
