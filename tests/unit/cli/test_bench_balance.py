"""`stoker bench balance`: its table, its JSON, and what it refuses."""

import json
import subprocess
import sys

import msgspec
import pytest
from tests.conftest import Golden

from stoker.cli.bench.balance import BalanceFigures, BalanceReport, balance_lines
from stoker.cli.bench.figures import Machine
from stoker.cli.bench.placement_figures import Mean

BENCH = (sys.executable, "-m", "stoker.cli", "bench", "balance")
# Far more than these runs need; a hang is to fail with its output.
RUN_SECONDS_MAX = 120.0


def figures(peak: float, std: float | None = 0.1) -> BalanceFigures:
    def mean(value: float) -> Mean:
        return Mean(value, std)

    return BalanceFigures(
        memory_peak_to_mean=mean(peak),
        utilization_peak_to_mean=mean(peak + 0.5),
        memory_mean=mean(0.4),
        utilization_mean=mean(0.3),
        waiting_work=mean(peak / 100),
        refused=mean(0.005),
        decisions_per_second=1500.0 * peak,
        by_seed=(),
    )


def report(*seeds: int, std: float | None = 0.1) -> BalanceReport:
    policies = {"balanced": figures(1.6, std), "binpack": figures(12.75, std)}
    machine = Machine("A processor", 2, 2**34, "6.1", "3.11", "1.85", "ext4")
    return BalanceReport(
        8, 64, 600.0, 1200.0, seeds, 1234.5, policies, "2026-01-02T03:04:05Z", machine
    )


def test_table(golden: Golden) -> None:
    golden("cli/bench-balance.txt", "\n".join([*balance_lines(report(1, 2, 3)), ""]))


def test_table_of_one_seed(golden: Golden) -> None:
    golden("cli/bench-balance-one.txt", "\n".join([*balance_lines(report(7, std=None)), ""]))


def test_every_policy_is_played_with_every_seed() -> None:
    course = ("--nodes=1", "--gpus=4", "--warm-up=20", "--seconds=60")
    done = subprocess.run(
        (*BENCH, *course, "--seeds=1-2", "--json"),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == msgspec.to_builtins(report()).keys()
    assert list(found["policies"]) == ["balanced", "live", "spread", "binpack"]
    assert (found["gpus"], found["seeds"], found["seconds"]) == (4, [1, 2], 60.0)
    for each in found["policies"].values():
        assert [run["seed"] for run in each["by_seed"]] == [1, 2]
        assert each["memory_peak_to_mean"]["mean"] >= 1.0
    assert "binpack, seed 2 (8 of 8)" in done.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--nodes=0", "--nodes: wanted at least 1 and at most 1000, found 0"),
        ("--seeds=2-1", "--seeds: wanted a seed or two"),
        ("--seconds=nan", "--seconds: wanted at least 1 and at most 86400, found nan"),
        ("--warm-up=-1", "--warm-up: wanted at least 0 and at most 86400, found -1"),
    ],
)
def test_what_makes_no_sense_is_refused(option: str, said: str) -> None:
    done = subprocess.run(
        (*BENCH, option), capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
