"""`stoker bench mig`: its protocol, its figures, its table, and what it refuses."""

import json
import subprocess
import sys

import pytest
from tests.conftest import Golden

from stoker.aggregator.placing.mig_slices import SlicePolicy
from stoker.cli.bench.figures import Machine
from stoker.cli.bench.mig import mig_options, parse_loads, parse_mixes, parse_policies
from stoker.cli.bench.mig_figures import MigReport, cells_of, mig_lines
from stoker.cli.bench.mig_playing import BOARD, MIXES, PROFILES, REPACK, Outcome, Run, play
from stoker.core.errors import BadInput
from stoker.testing.workloads.mig_repack import SEVEN_SLICE_SHAPES

BENCH = (sys.executable, "-m", "stoker.cli", "bench", "mig")
# Far more than these runs need; a hang is to fail with its output.
RUN_SECONDS_MAX = 120.0
MACHINE = Machine("A processor", 2, 2**34, "6.1", "3.11", "1.85", "ext4")


def outcome(
    policy: str, seed: int, slices: float, *, moves: bool = False, load: float = 1.0
) -> Outcome:
    run = Run(policy, "uniform", load, seed, 100, 60_000, moves)
    share, count = (4.5, 2700) if moves else (0.0, 0)
    return Outcome(run, slices + 4, slices, share, count, 2 * count, 500_000.0 - seed)


OUTCOMES = [
    *(outcome("mfi", seed, 91.0 + seed) for seed in (0, 1)),
    *(outcome("places", seed, 92.0 + seed) for seed in (0, 1)),
    *(outcome("places", seed, 94.0 + seed, moves=True) for seed in (0, 1)),
    *(outcome(REPACK, seed, 95.0 + seed) for seed in (0, 1)),
    outcome("mfi", 0, 100.0, load=0.7),
    outcome("places", 0, 100.0, load=0.7),
    outcome("places", 0, 100.0, load=0.7, moves=True),
    outcome(REPACK, 0, 100.0, load=0.7),
]


def test_the_protocol_is_played_on_the_board_as_nvml_tells_it() -> None:
    for profile, shape in zip(PROFILES, SEVEN_SLICE_SHAPES, strict=True):
        told = BOARD.geometry.profile(profile)
        assert told is not None
        assert (told.memory_slices, told.starts) == (shape.size, shape.starts)


def test_figures() -> None:
    full, slack = cells_of(OUTCOMES)
    assert (full.mix, full.load, slack.load) == ("uniform", 1.0, 0.7)
    assert list(full.policies) == ["mfi", "places", "places+moves", "repack"]
    ours, moved = full.policies["places"], full.policies["places+moves"]
    assert (ours.slices_accepted.mean, ours.slices_gap.mean, ours.slices_gap.std) == (92.5, 3.0, 0)
    assert ours.moves is None
    assert ours.decisions_per_second == 499_999.0
    assert moved.moves is not None
    assert moved.moves.gap_closed == pytest.approx(200 / 3)
    without_gap = slack.policies["places+moves"].moves
    assert without_gap is not None
    assert without_gap.gap_closed is None


def test_table(golden: Golden) -> None:
    report = MigReport(
        "A100-40GB", 100, 60_000, 2, cells_of(OUTCOMES), "2026-01-02T03:04:05Z", MACHINE
    )
    golden("cli/bench-mig.txt", "\n".join([*mig_lines(report), ""]))


@pytest.mark.parametrize("mix", MIXES)
def test_ours_accepts_no_less_than_the_published_and_moves_are_bounded(mix: str) -> None:
    """Seeds of their own: nothing was chosen by them, and nothing is reported of them."""
    seeds = range(100, 103)

    def mean(policy: str, *, moves: bool = False) -> tuple[float, float, float]:
        done = [play(Run(policy, mix, 1.0, seed, 100, 20_000, moves)) for seed in seeds]
        return (
            sum(each.requests_accepted for each in done) / len(seeds),
            sum(each.slices_accepted for each in done) / len(seeds),
            max(each.requests_with_moves for each in done),
        )

    published, ours = mean(SlicePolicy.FRAGMENTATION), mean(SlicePolicy.PLACES)
    moved, best = mean(SlicePolicy.PLACES, moves=True), mean(REPACK)
    # On so few requests equal rules differ by as much.
    assert ours[0] > published[0] - 0.2
    assert ours[1] > published[1] - 0.3
    assert ours[1] < moved[1] <= best[1] + 0.1
    assert moved[1] - ours[1] > 0.6 * (best[1] - ours[1])
    assert moved[2] <= 5.0


def test_a_run_comes_out_the_same() -> None:
    run = Run(SlicePolicy.PLACES, "bimodal", 1.3, 7, 10, 2_000, moves=True)
    one, other = play(run), play(run)
    assert (one.slices_accepted, one.moves) == (other.slices_accepted, other.moves)
    assert one.slices_accepted < 100.0


def test_nothing_is_lost_where_there_is_room_for_all() -> None:
    for policy in (*SlicePolicy, REPACK):
        done = play(Run(policy, "skew-small", 0.01, 1, 100, 2_000))
        assert (done.requests_accepted, done.slices_accepted) == (100.0, 100.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7,", "--load: wanted numbers above 0 and at most 10, as in 0.7,0.85,1.0,1.3, found ''"),
        ("nan", "found 'nan'"),
        ("11", "found '11'"),
    ],
)
def test_loads_that_are_none(text: str, message: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_loads(text)
    assert message in str(refused.value)


def test_what_is_typed() -> None:
    assert parse_loads("1,0.7,1.0") == (1.0, 0.7)
    assert parse_mixes("bimodal,uniform") == ("bimodal", "uniform")
    assert parse_policies((), moves=False) == tuple(SlicePolicy)
    assert parse_policies(("mfi,mcc",), moves=True) == ("mfi", "mcc", "places")
    with pytest.raises(BadInput, match="--mix: wanted some of uniform,skew-small"):
        parse_mixes("even")
    with pytest.raises(BadInput, match="--policy: wanted some of first-fit, best-fit"):
        parse_policies(("best",), moves=False)


def test_every_cell_is_played_and_repack_always() -> None:
    options = mig_options("0.7,1", "uniform", 2, ("mfi",), 10, 100, 1, moves=True)
    runs = options.runs()
    assert len(set(runs)) == len(runs) == 2 * 2 * 4
    assert [(each.policy, each.moves) for each in runs[:8:2]] == [
        ("mfi", False),
        ("places", False),
        ("places", True),
        ("repack", False),
    ]


def test_the_command_tells_programs() -> None:
    small = ("--gpus=10", "--requests=500", "--seeds=1", "--load=1", "--mix=bimodal", "--jobs=1")
    done = subprocess.run(
        (*BENCH, *small, "--policy=places", "--moves", "--json"),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert list(cell["policies"]) == ["places", "places+moves", "repack"]
    assert cell["policies"]["places+moves"]["moves"]["requests_with_moves"]["mean"] <= 5.0
    assert "places, bimodal at load 1" in done.stderr
