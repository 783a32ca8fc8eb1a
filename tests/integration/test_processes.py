"""Children that are started end: with their parent, or when they are told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.agent.processes import end, start, wait
from stoker.core.clock import SystemClock

CLOCK = SystemClock()
WAITING = "import sys, time; print(flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITING}"


def begun(program: str) -> subprocess.Popen[bytes]:
    process = start([sys.executable, "-c", program], stdout=subprocess.PIPE, new_session=True)
    assert process.stdout is not None
    with process.stdout as out:
        out.readline()
    return process


@pytest.mark.parametrize(
    ("program", "grace_seconds", "code"),
    [(WAITING, 10.0, -signal.SIGTERM), (DEAF, 0.05, -signal.SIGKILL)],
)
async def test_a_child_is_asked_to_end_and_then_killed(
    program: str, grace_seconds: float, code: int
) -> None:
    process = begun(program)
    assert await wait(process, 0.01, CLOCK) is None
    assert await end(process, grace_seconds=grace_seconds, clock=CLOCK) == code
    assert await end(process, grace_seconds=grace_seconds, clock=CLOCK) == code


def test_a_session_of_its_own_is_out_of_reach_of_our_terminal() -> None:
    process = begun(WAITING)
    try:
        assert os.getsid(process.pid) == process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent_however_that_ends(signum: int) -> None:
    # The child holds the pipe open until it ends: reading to the end waits for it.
    starting = f"start([sys.executable, '-c', {WAITING!r}], die_with_parent=True)"
    program = f"import sys, time; from stoker.agent.processes import start; x = {starting}"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{program}; time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with parent.stdout as out:
        assert out.readline() == b"\n"  # the child runs
        parent.send_signal(signum)
        assert parent.wait(10) == -signum
        assert out.read() == b""


def test_a_child_is_given_its_environment_and_nothing_to_read() -> None:
    process = start(
        [sys.executable, "-c", "import os, sys; print(os.environ['A'], sys.stdin.read())"],
        env={**os.environ, "A": "b"},
        stdout=subprocess.PIPE,
        die_with_parent=True,
    )
    assert process.communicate(timeout=10)[0] == b"b \n"
    assert process.returncode == 0


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        start([missing])
    process = start([missing], stderr=subprocess.PIPE, die_with_parent=True)
    told = process.communicate(timeout=10)[1].decode()
    assert (process.returncode, told) == (127, f"{missing}: No such file or directory\n")
