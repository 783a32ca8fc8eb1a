"""`stoker agent doctor` as a command on this machine: exit codes, JSON, deadlines, imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.doctor_hosts import answering, well

from stoker.agent.doctor.host import bus, module
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.roots import Roots
from stoker.cli import __main__ as entry
from stoker.cli import doctor

CODES = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}
NOBODY = "/nonexistent/agent.sock"


def run(*arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    command = [sys.executable, "-m", "stoker.cli", "agent", "doctor", *arguments]
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=timeout, check=False
    )


def has_gpu() -> bool:
    return bool(bus(Roots()).gpus) or module(Roots()).version is not None


def test_page_json_and_exit_code_tell_the_same() -> None:
    page, told = run("--socket", NOBODY), run("--socket", NOBODY, "--json")
    found = json.loads(told.stdout)
    assert page.returncode == told.returncode == found["exit_code"] == CODES[found["status"]]
    first, *rest = page.stdout.splitlines()
    assert first == found["summary"]
    assert first.startswith(f"{found['status']}: ")
    assert [check["name"] for check in found["checks"]] == [name.value for name in Name]
    shown = [line.split()[0] for line in rest if line[:1].isalpha()]
    assert set(shown) >= {name.value for name in Name}
    assert page.stderr == told.stderr == ""


def test_a_host_without_gpus_says_so() -> None:
    if has_gpu():
        pytest.skip("this machine has NVIDIA's GPUs, or their driver")
    done = run("--socket", NOBODY)
    assert done.returncode == 3
    assert done.stdout.splitlines()[0] == "UNKNOWN: no NVIDIA GPU on this host"


def test_only_what_is_asked_for_is_told() -> None:
    with answering(well()) as path:
        done = run("--socket", str(path), "--checks", "agent,aggregator", "--json")
    found = json.loads(done.stdout)
    assert [check["name"] for check in found["checks"]] == ["agent", "aggregator"]
    assert (done.returncode, found["summary"]) == (0, "OK: 2 checks")


def test_only_problems() -> None:
    with answering(well()) as path:
        done = run("--socket", str(path), "--checks", "agent,aggregator", "--only-problems")
    assert (done.returncode, done.stdout) == (0, "OK: 2 checks\n")


def test_nothing_is_waited_for_longer_than_said() -> None:
    began = time.monotonic()
    with answering(None) as path:
        done = run("--socket", str(path), "--checks", "agent", "--timeout", "1s")
    assert done.returncode == CODES["CRITICAL"]
    assert "there, and does not answer: no answer within 1 s" in done.stdout
    # It would wait for an answer for 15 s; a slow machine takes its time to start Python.
    assert time.monotonic() - began < 14.0


WRONG: dict[str, tuple[list[str], str]] = {
    "no such option": (["--nope"], "No such option"),
    "no such check": (["--checks", "gpu"], "--checks: wanted some of bus, kernel_module"),
    "no check": (["--skip", ",".join(Name)], "--skip: every check is left out"),
    "no duration": (["--timeout", "soon"], "--timeout: 'soon' is not a duration"),
    "too long": (["--timeout", "1h"], "--timeout: wanted 1 to 600 s"),
    "an argument": (["now"], "unexpected extra argument"),
    "a fleet": (["--address"], "No such option"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_understood_is_unknown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two would mean CRITICAL, and drain the host for a misspelt option."""
    arguments, told = WRONG[name]
    assert entry.run(["agent", "doctor", *arguments]) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("UNKNOWN: ")
    assert told in printed.out
    assert len(printed.out.splitlines()) == 1
    assert entry.run(["agent", "doctor", "--json", *arguments]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["exit_code"], found["checks"]) == ("UNKNOWN", 3, [])
    assert told in found["summary"]


def test_the_fleet_is_not_its_business(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--address", "localhost:1", "agent", "doctor"]) == 3
    assert "--address: this host is examined" in capsys.readouterr().out


def test_a_bug_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(doctor, "_names", fail)
    assert entry.run(["agent", "doctor"]) == 3
    assert "UNKNOWN: ZeroDivisionError: a bug" in capsys.readouterr().out
    monkeypatch.setenv("STOKER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        entry.run(["agent", "doctor"])


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["agent", "doctor", "--help"]) == 0
    told = capsys.readouterr().out
    assert "they are not those of the other commands" in told
    for line in ("0  OK", "1  WARNING", "2  CRITICAL", "3  UNKNOWN"):
        assert line in told


def test_the_process_that_asks_loads_no_driver(tmp_path: Path) -> None:
    """A library that hangs when it is loaded would take the command with it."""
    code = (
        "import sys; from stoker.cli.__main__ import run; "
        f"run(['agent', 'doctor', '--socket', {NOBODY!r}]); "
        "print([n for n in ('pynvml', 'grpc', 'stoker.agent.nvml.driver') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
