"""`stoker bench routing`: real replicas, the same calls by each policy, and what is told."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from stoker.cli.bench.routing_figures import Policies, objections, p99_ratio, policy_figures
from stoker.testing.load import Measure
from stoker.testing.load_calls import due_times
from stoker.testing.replica_messages import CallsPlan, CallsReport

BENCH = (sys.executable, "-m", "stoker.cli", "bench", "routing")
# Far more than a run needs; a hang is to fail with its output.
RUN_SECONDS_MAX = 120.0
FIGURES = {
    *("calls", "errors", "call_p50_seconds", "call_p90_seconds", "call_p99_seconds"),
    *("call_max_seconds", "shares", "lag_p99_seconds"),
}


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = (*BENCH, *arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )


@pytest.mark.slow
def test_every_call_is_answered_under_each_policy() -> None:
    done = bench("--replicas=2", "--rate=20", "--seconds=2", "--slow=8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {
        *("replicas", "slots", "call_seconds", "slow_factor", "rate", "seconds", "policies"),
        *("p99_ratio", "valid", "invalid_reasons", "at", "machine"),
    }
    assert found["policies"].keys() == {"round_robin", "stoker"}
    for figures in found["policies"].values():
        assert figures.keys() == FIGURES
        assert figures["errors"] == 0
        assert figures["calls"] > 0
        assert sum(figures["shares"]) == pytest.approx(1.0)
        assert 0 < figures["call_p50_seconds"] <= figures["call_p99_seconds"]
    # Each replica in its turn, and the same calls at the same times.
    by_turns, routed = found["policies"]["round_robin"], found["policies"]["stoker"]
    assert by_turns["calls"] == routed["calls"]
    assert by_turns["shares"][0] == pytest.approx(0.5, abs=0.51 / by_turns["calls"])
    assert routed["shares"][0] < by_turns["shares"][0]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--replicas=1", "--replicas: wanted at least 2 and at most 64, found 1"),
        ("--slots=0", "--slots: wanted at least 1"),
        ("--call-seconds=0", "--call-seconds: wanted more than 0 and at most 1"),
        ("--slow=0.5", "--slow: wanted at least 1"),
        ("--rate=nan", "--rate: wanted more than 0"),
        ("--seconds=0", "--seconds: wanted more than 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(argument: str, said: str) -> None:
    done = bench(argument)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line


def test_calls_are_due_at_the_same_times_of_every_window() -> None:
    """However long the warm-up before it was, which ends by the clock."""
    plan = CallsPlan("", "bench", "stoker", rate=20.0, seed=7)
    one, other = (
        [due - begins_at for due in due_times(plan, Measure(begins_at, begins_at + 30.0))]
        for begins_at in (100.0, 2000.5)
    )
    assert one == pytest.approx(other)
    assert len(one) == pytest.approx(600, rel=0.2)


REPORT = CallsReport(
    calls=4,
    errors={},
    by_address={"b": 3, "a": 1},
    call_micros=[1_000, 2_000, 3_000, 4_000],
    lag_micros=[10] * 4,
)


def test_figures_are_in_the_order_of_the_replicas() -> None:
    figures = policy_figures(REPORT, ["a", "b", "c"])
    assert figures.shares == (0.25, 0.75, 0.0)
    assert (figures.call_p50_seconds, figures.call_p99_seconds) == (0.002, 0.004)
    halved = replace(figures, call_p99_seconds=0.002)
    assert p99_ratio(Policies(round_robin=figures, stoker=halved)) == 0.5
    nothing = policy_figures(CallsReport(0, {}, {}, [], []), ["a"])
    assert nothing.shares == (0.0,)
    assert p99_ratio(Policies(round_robin=nothing, stoker=figures)) is None


@pytest.mark.parametrize(
    ("lag_micros", "errors", "said"),
    [
        ([10] * 4, {}, []),
        ([60_000] * 4, {}, ["stoker: the callers were 0.060 s late"]),
        ([10] * 4, {"AioRpcError": 1}, ["stoker: 1 of 4 calls failed"]),
        ([], {}, ["stoker: no call was due"]),
    ],
)
def test_a_run_counts_only_if_the_calls_were_as_they_should(
    lag_micros: list[int], errors: dict[str, int], said: list[str]
) -> None:
    report = CallsReport(4, errors, {}, [1_000], lag_micros)
    found = objections("stoker", policy_figures(report, ["a"]))
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))
