"""`stoker bench`: it measures what it says, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from stoker.cli.bench.figures import Spread, agents_objections, clients_objections
from stoker.cli.bench.visibility import Look, Seen, frames_seen, seconds_until_shown
from stoker.testing.load import AgentsReport, ClientsReport, percentile

BENCH = (sys.executable, "-m", "stoker.cli", "bench")
# Far more than these runs need; a hang is to fail with its output.
RUN_SECONDS_MAX = 120.0

MACHINE = {"processor", "cores", "memory_bytes", "kernel", "python", "grpc", "filesystem"}
INGEST = {
    *("nodes", "gpus", "hz", "seconds", "connections", "frames_sent", "frames_acked", "dropped"),
    *("disconnects", "frames_per_second", "bytes_per_frame", "stream_bytes_per_frame"),
    *("acks_per_frame", "ack_p50_seconds", "ack_p90_seconds", "ack_p99_seconds"),
    *("ack_max_seconds", "visible_p50_seconds", "visible_p99_seconds", "nodes_visible"),
    *("cpu_seconds_per_frame", "aggregator_cores", "aggregator_rss_bytes"),
    *("bare_cpu_seconds_per_frame", "bare_acks_per_frame", "bare_ack_p99_seconds"),
    *("cpu_ratio_to_bare", "generator_cores", "generator_lag_p99_seconds", "valid"),
    *("invalid_reasons", "at", "machine"),
}
ALLOCATE = {
    *("nodes", "gpus", "hz", "rate", "seconds", "hold_seconds_mean", "connections", "requests"),
    *("granted", "refused", "errors", "granted_twice", "achieved_per_second"),
    *("grant_p50_seconds", "grant_p90_seconds", "grant_p99_seconds", "grant_max_seconds"),
    *("release_p50_seconds", "release_p99_seconds", "commits", "frames_per_second"),
    *("fsync_p50_seconds", "fsync_p99_seconds"),
    *("frames_dropped", "ack_p99_seconds", "aggregator_cores", "aggregator_rss_bytes"),
    *("generator_cores", "generator_lag_p99_seconds", "client_lag_p99_seconds", "valid"),
    *("invalid_reasons", "at", "machine"),
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (*BENCH, *arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )


def measured(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_ingest_counts_every_frame_of_every_agent(tmp_path: Path) -> None:
    sizes = ("--nodes=10", "--gpus=3", "--hz=2", "--seconds=2")
    found = measured("ingest", *sizes, f"--data-dir={tmp_path}")
    assert found.keys() == INGEST
    assert found["machine"].keys() == MACHINE
    assert found["connections"] == 10
    assert found["frames_acked"] == found["frames_sent"] > 0
    assert found["dropped"] == found["disconnects"] == 0
    assert found["nodes_visible"] == 10
    assert found["frames_per_second"] == found["frames_sent"] / 2
    assert 0 < found["bytes_per_frame"] < found["stream_bytes_per_frame"]
    assert found["ack_p50_seconds"] <= found["ack_p99_seconds"] <= found["ack_max_seconds"]
    assert found["aggregator_rss_bytes"] > 2**20
    assert list(tmp_path.iterdir()) == []


def test_allocate_grants_what_is_asked_for_and_takes_it_back(tmp_path: Path) -> None:
    sizes = ("--nodes=10", "--gpus=8", "--rate=20", "--seconds=2")
    found = measured("allocate", *sizes, f"--data-dir={tmp_path}")
    assert found.keys() == ALLOCATE
    assert found["connections"] == 10
    assert found["granted"] == found["requests"] > 0
    assert found["refused"] == found["granted_twice"] == found["frames_dropped"] == 0
    assert found["errors"] == {}
    assert found["grant_p50_seconds"] <= found["grant_p90_seconds"] <= found["grant_p99_seconds"]
    # A commit can carry many events, and each lease has three: granted, given up, over.
    assert 0 < found["commits"] <= 3 * found["granted"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_json_the_figures_are_lines_for_people() -> None:
    done = bench("ingest", "--nodes=2", "--seconds=1", "--no-bare")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert {"cpu seconds per frame", "machine kernel"} <= rows.keys()
    assert rows["connections"].strip() == "2"
    assert rows["cpu ratio to bare"].strip() == "-"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ingest", "--nodes=0"), "--nodes: wanted at least 1 and at most 20000, found 0"),
        (("ingest", "--nodes=1000000"), "--nodes: wanted at least 1 and at most 20000"),
        (("ingest", "--gpus=0"), "--gpus: wanted at least 1"),
        (("ingest", "--hz=-1"), "--hz: wanted more than 0"),
        (("ingest", "--hz=nan"), "--hz: wanted more than 0"),
        (("ingest", "--seconds=0"), "--seconds: wanted more than 0"),
        (("allocate", "--rate=-5"), "--rate: wanted more than 0 and at most 100000, found -5"),
        (("allocate", "--rate=many"), "'many' is not a valid float"),
        (("allocate", "--data-dir=/nowhere/at/all"), "/nowhere/at/all"),
        (("scrape",), "scrape"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert said in line


def test_without_what_the_daemons_need_it_says_what_is_missing() -> None:
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'psutil' else find(name)\n"
        "from stoker.cli.__main__ import run\n"
        "sys.exit(run(['bench', 'ingest', '--nodes=1']))\n"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=False)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "psutil is not here" in line


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_all_it_started(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    command = (*BENCH, "ingest", "--nodes=5", "--seconds=600", f"--data-dir={tmp_path}")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("measuring"):
                break
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2  # the aggregator and a generator
        assert list(tmp_path.iterdir()) != []
        os.kill(process.pid, sent)
        out, _ = process.communicate(timeout=RUN_SECONDS_MAX)
    assert process.returncode == status
    assert out == ""
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == []


def agents_report(**changed: Any) -> AgentsReport:
    usual: dict[str, Any] = {
        "connections": 2,
        "frames_sent": 100,
        "frames_acked": 100,
        "frames_dropped": 0,
        "acks": 100,
        "disconnects": 0,
        "message_bytes": 50_000,
        "stream_bytes": 70_000,
        "ack_micros": [500] * 100,
        "lag_micros": [100] * 100,
        "sampled_at": {},
        "sends": {},
    }
    return AgentsReport(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"lag_micros": [100] * 99 + [9_000_000]}, []),  # one straggler is within 99 %
        ({"lag_micros": [100] * 98 + [600_000] * 2}, ["0.60 s late"]),
        ({"lag_micros": []}, ["no frame was sent"]),
        ({"connections": 1}, ["2 agents had 1 TCP connections"]),
        ({"disconnects": 3}, ["3 streams ended"]),
    ],
)
def test_a_run_counts_only_if_the_agents_sent_as_they_should(
    changed: dict[str, Any], said: list[str]
) -> None:
    found = agents_objections(agents_report(**changed), nodes=2)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("lag_micros", "said"),
    [([100] * 100, None), ([60_000] * 2 + [100] * 98, "0.060 s late"), ([], "no request was due")],
)
def test_a_run_counts_only_if_the_clients_asked_as_they_should(
    lag_micros: list[int], said: str | None
) -> None:
    report = ClientsReport(len(lag_micros), 0, 0, {}, 0, [], [], lag_micros)
    found = clients_objections(report)
    assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize(
    ("values", "ratio", "expected"),
    [
        ([], 0.5, None),
        ([7.0], 0.99, 7.0),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 0.99, 4.0),
        ([1.0, 2.0, 3.0, 4.0], 1.0, 4.0),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 1.0),
    ],
)
def test_percentile_is_a_value_that_was_seen(
    values: list[float], ratio: float, expected: float | None
) -> None:
    assert percentile(values, ratio) == expected


def test_spread_is_in_seconds_whatever_the_order() -> None:
    assert Spread.of_micros([3_000_000, 1_000_000, 2_000_000]) == Spread(2.0, 3.0, 3.0, 3.0)
    assert Spread.of_micros([]) == Spread(None, None, None, None)


ALL_SHOWN = [Seen(age / 10, True) for age in range(10)]
SHOWN_FROM_300_MS = [Seen(age / 10, age >= 3) for age in range(10)]
ONE_STRAGGLER = [Seen(age / 10, age >= 3 and age != 8) for age in range(10)]


@pytest.mark.parametrize(
    ("seen", "ratio", "expected"),
    [
        ([], 0.5, None),
        (ALL_SHOWN, 0.99, 0.0),
        (list(reversed(ALL_SHOWN)), 0.99, 0.0),
        (SHOWN_FROM_300_MS, 0.5, 0.3),
        (SHOWN_FROM_300_MS, 0.99, 0.3),
        (ONE_STRAGGLER, 0.5, 0.3),  # five of the six from 0.3 on are shown
        (ONE_STRAGGLER, 0.99, 0.9),
        ([Seen(5.0, False)], 0.5, None),
    ],
)
def test_until_shown_is_the_age_from_which_on_so_many_are(
    seen: list[Seen], ratio: float, expected: float | None
) -> None:
    assert seconds_until_shown(seen, ratio) == expected


def test_a_look_tells_of_every_frame_sent_before_it_whether_it_is_shown() -> None:
    # Sent at 10 and 11 (monotonic), sampled at 1000 and 1001 (Unix); the look comes at 11.25.
    sends = {"a": [(10.0, 1000.0), (11.0, 1001.0)], "b": [(10.5, 1000.5), (11.5, 1001.5)]}
    look = Look(asked_at=11.25, sampled_at={"a": 1000.01, "b": None})
    assert list(frames_seen(look, sends, interval_seconds=1.0)) == [
        Seen(1.25, True),  # the aggregator's clock is 10 ms ahead
        Seen(0.25, False),
        Seen(0.75, False),
    ]
