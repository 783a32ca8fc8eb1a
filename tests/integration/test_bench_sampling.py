"""`stoker bench sampling`: what it reports, of what, and how it ends where it cannot measure."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.nvml_library import LIBRARY, build_full, counting, environment

from stoker.core.errors import ExitCode

SAMPLING = (sys.executable, "-m", "stoker.cli", "bench", "sampling")
RUN_SECONDS_MAX = 120.0
FEW = ("--sweeps=4", "--interval=0")

MACHINE = {"processor", "cores", "memory_bytes", "kernel", "python", "grpc", "filesystem"}
SWEEP = {
    *("host_cpu_seconds_per_sweep", "agent_cpu_seconds_per_sweep", "wall_p50_seconds"),
    *("wall_p99_seconds", "calls_per_sweep", "values_per_sweep"),
}
KINDS = ("fast", "fast_and_slow", "processes")
REPORT = {
    *("source", "driver_version", "gpus", "sweeps", "interval_seconds", *KINDS),
    *("cores_at_usual_rates", "series", "page_bytes", "scrape_cpu_seconds", "frame_bytes"),
    *("host_rss_bytes", "agent_rss_bytes", "at", "machine"),
}


def sampling(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*SAMPLING, *arguments),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        env={**os.environ, **variables},
        check=False,
    )


def measured(*arguments: str, **variables: str) -> dict[str, Any]:
    done = sampling(*arguments, "--json", **variables)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_figures(found: dict[str, Any]) -> None:
    assert found.keys() == REPORT
    assert found["machine"].keys() == MACHINE
    for kind in KINDS:
        assert found[kind].keys() == SWEEP
        assert found[kind]["calls_per_sweep"] > 0
        assert 0 < found[kind]["wall_p50_seconds"] <= found[kind]["wall_p99_seconds"]
        assert found[kind]["host_cpu_seconds_per_sweep"] > 0
        assert found[kind]["agent_cpu_seconds_per_sweep"] > 0
    # A sweep of everything is one of the fast facts and more.
    fast, everything = found["fast"], found["fast_and_slow"]
    assert everything["calls_per_sweep"] > fast["calls_per_sweep"]
    assert everything["values_per_sweep"] > fast["values_per_sweep"]
    assert found["series"] > everything["values_per_sweep"] / 2
    assert min(found["host_rss_bytes"], found["agent_rss_bytes"]) > 2**20
    assert found["cores_at_usual_rates"] > 0


def test_simulated_gpus_are_swept_on_request() -> None:
    found = measured(*FEW, "--simulate=2xH100-80GB", "--simulate=T4")
    check_figures(found)
    assert found["gpus"] == 3
    assert found["source"] == "simulated 2xH100-80GB, simulated T4"
    assert found["sweeps"] == 4


@pytest.mark.compiler
def test_the_library_that_is_found_is_swept(tmp_path: Path) -> None:
    with counting(tmp_path / "page") as page:
        given = environment(build_full(tmp_path), page=page, gpus=5, pids=[os.getpid()])
        found = measured(*FEW, "--gpus=5", **given)
        counted = page.read()
    check_figures(found)
    assert (found["gpus"], found["source"]) == (5, LIBRARY)
    assert found["driver_version"] == "580.95.05"
    assert found["processes"]["values_per_sweep"] == 5
    # A wrapper of nvidia-ml-py may call twice: for the size of the answer, and for the answer.
    sweeps = found["sweeps"] * sum(found[kind]["calls_per_sweep"] for kind in KINDS)
    assert counted.calls > sweeps
    assert counted.things == 0


def test_without_a_library_and_a_simulation_it_says_what_is_missing(tmp_path: Path) -> None:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        pass
    else:
        pytest.skip(f"this machine has {LIBRARY}")
    done = sampling(*FEW, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == ExitCode.MISSING
    assert done.stdout == ""
    said = done.stderr.splitlines()[-1]
    for word in (LIBRARY, "LD_LIBRARY_PATH", "--simulate"):
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--simulate=8xT5",), "'T5' is not known; the nearest is T4"),
        (("--simulate=T4", "--gpus=4"), "--gpus: wanted 4, found 1 that can be read"),
        (("--gpus=0",), "--gpus: wanted at least 1"),
        (("--sweeps=0",), "--sweeps: wanted at least 1"),
        (("--interval=-1",), "--interval: wanted at least 0"),
        (("--interval=often",), "'often' is not a valid float"),
    ],
)
def test_bad_options_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = sampling(*arguments)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]


def test_without_json_every_figure_is_a_line_with_its_unit() -> None:
    done = sampling(*FEW, "--simulate=T4")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["fast host cpu seconds per sweep"].strip().endswith(" us")
    assert rows["processes wall p99 seconds"].strip().endswith(" ms")
    assert rows["host rss bytes"].strip().endswith("MiB")
    assert {"fast and slow calls per sweep", "machine kernel"} <= rows.keys()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_its_driver_host(sent: signal.Signals, status: int) -> None:
    command = (*SAMPLING, "--simulate=T4", "--sweeps=1000", "--interval=60")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        family: list[psutil.Process] = []
        while len(family) < 2:  # what sweeps, and its driver host
            assert process.poll() is None
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=RUN_SECONDS_MAX)
    assert process.returncode == status
    assert out == ""
    _, alive = psutil.wait_procs(family, timeout=RUN_SECONDS_MAX)
    assert alive == []
