"""`stoker bench placement`: figures from runs, and how they are shown."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tests.conftest import Golden

from stoker.cli.bench.figures import Machine
from stoker.cli.bench.placement import CONTENDERS, check_policies, described, parse_seeds
from stoker.cli.bench.placement_figures import (
    Mean,
    PlacementReport,
    Wins,
    bound_figures,
    published_figures,
    timed_figures,
)
from stoker.cli.bench.placement_table import placement_lines
from stoker.core.errors import BadInput
from stoker.testing.workloads.messages import Bound, PublishedRun, TimedRun

MACHINE = Machine("A processor", 2, 2**34, "6.1", "3.11", "1.85", "ext4")


def published(
    policy: str, seed: int, at_100: float, at_130: float, loss: float | None = 95.0
) -> PublishedRun:
    allocated = {99: at_100 - 1, 100: at_100, 130: at_130}
    return PublishedRun(policy, seed, allocated, loss, 1000, 50, 0.04, 120e-6)


def timed(policy: str, seed: int, mean: float) -> TimedRun:
    return TimedRun(policy, seed, mean, mean + 10, 88.0, 2.5, 5.0, 1000, 0.05, 90e-6)


FGD = [published("fgd", 42, 95.1, 95.3), published("fgd", 43, 95.2, 95.4)]
OURS = [
    published("fragmentation", 42, 95.6, 95.8, 95.4),
    published("fragmentation", 43, 95.2, 95.5),
]


REPORT = PlacementReport(
    protocol="fgd",
    nodes=1213,
    gpus=6212,
    tasks=8152,
    copies=1,
    seeds=(42, 43),
    mix="given",
    compiled=True,
    offered=None,
    policies={},
    bound=None,
    at="2026-01-02T03:04:05Z",
    machine=MACHINE,
)


def shown(found: PlacementReport) -> str:
    return "\n".join([*placement_lines(found), ""])


def test_a_mean_of_one_has_no_deviation() -> None:
    assert Mean.of([2.0]) == Mean(2.0, None)
    assert Mean.of([1.0, 2.0, 3.0]) == Mean(2.0, 1.0)


def test_policies_are_held_against_fgd_seed_by_seed() -> None:
    figures = published_figures(OURS, FGD)
    assert figures.better_than_fgd == Wins(at_100=1, at_130=2, seeds=2)  # equal is not better
    assert figures.allocated_at_130.mean == pytest.approx(95.65)
    assert figures.first_loss_at == pytest.approx(95.2)
    assert figures.decisions_per_second == pytest.approx(2000 / 0.08)
    assert published_figures(FGD, FGD).better_than_fgd is None
    assert published_figures(OURS, []).better_than_fgd is None


def test_a_run_without_a_loss_leaves_no_mean_of_first_losses() -> None:
    runs = [published("fgd", 42, 95.0, 95.0, None), FGD[0]]
    assert published_figures(runs, []).first_loss_at is None


def test_table_of_the_published_protocol(golden: Golden) -> None:
    policies = {"fgd": published_figures(FGD, FGD), "fragmentation": published_figures(OURS, FGD)}
    bound = bound_figures([Bound(42, 96.9, 99.9, 96.3), Bound(43, 96.8, 99.8, 96.4)])
    golden("cli/bench-placement.txt", shown(replace(REPORT, policies=policies, bound=bound)))


def test_table_of_one_seed_on_fleets_made_by_seed(golden: Golden) -> None:
    policies = {"spread": published_figures([published("spread", 7, 80.0, 81.0, None)], [])}
    small = replace(REPORT, seeds=(7,), tasks=None, nodes=57, gpus=298, compiled=False)
    found = replace(small, policies=policies, mix="learned")
    golden("cli/bench-placement-one.txt", shown(found))


def test_table_of_the_timed_protocol(golden: Golden) -> None:
    runs = [timed("fgd", 42, 80.0), timed("fgd", 43, 82.0)]
    policies = {"fgd": timed_figures(runs)}
    found = replace(REPORT, protocol="timed", policies=policies, offered=88.0)
    golden("cli/bench-placement-timed.txt", shown(found))


def test_reports_stand_beside_what_was_published(golden: Golden, tmp_path: Path) -> None:
    policies = {"fgd": published_figures(FGD, FGD), "fragmentation": published_figures(OURS, FGD)}
    bound = bound_figures([Bound(42, 96.9, 99.9, 96.3)])
    found = {
        "default": replace(REPORT, policies=policies, bound=bound),
        "unpublished": replace(REPORT, policies={"fgd": policies["fgd"]}),
    }
    for trace, one in found.items():
        (tmp_path / f"{trace}.json").write_bytes(msgspec.json.encode(one))
    script = Path(__file__).parents[3] / "scripts" / "placement_table.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    golden("placement_table.txt", done.stdout)


@pytest.mark.parametrize(
    ("text", "seeds"), [("42-44", (42, 43, 44)), ("7", (7,)), ("0-0", (0,)), ("9-10", (9, 10))]
)
def test_seeds_are_a_range_or_one(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "4-2", "a-b", "1-", "-1", "1-2-3", "0-1000", "1,2", "٣"])
def test_what_is_no_range_of_seeds_is_said(text: str) -> None:
    with pytest.raises(BadInput, match="--seeds: wanted"):
        parse_seeds(text)


def test_policies_are_all_contenders_unless_some_are_named() -> None:
    assert check_policies(()) == CONTENDERS
    assert check_policies(("spread", "all")) == ("spread", *CONTENDERS)
    assert check_policies(("FGD", "spread", "fgd")) == ("fgd", "spread")
    with pytest.raises(BadInput, match="--policy: wanted all or one of frag.*, found 'best'"):
        check_policies(("best",))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (FGD[0], "fgd, seed 42: 95.30 % allocated in the end"),
        (timed("spread", 3, 80.0), "spread, seed 3: 80.00 % allocated on the mean"),
        (Bound(42, 96.9, 99.9, 96.3), "bound, seed 42: 96.90 % at 100 %"),
    ],
)
def test_progress_tells_what_came_of_a_run(
    result: PublishedRun | TimedRun | Bound, said: str
) -> None:
    assert described(result) == said
