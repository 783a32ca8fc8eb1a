"""An agent without root sees all with the helper beside it; without, it names what it does not."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest
from tests.support.root_helper import NOBODY, SECONDS_MAX, LogPipe, open_folder, running
from tests.support.unprivileged import GPU, SHARE

from stoker.testing.kubelet import Kubelet

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."
# A /dev of its own, with a file in place of a card: the kernel tells its name to who looks at it.
HOLD = """
mount -t tmpfs -o size=64k none /dev
: > /dev/nvidia0; : > /dev/nvidiactl; : > /dev/other
exec 3</dev/nvidia0 4</dev/nvidiactl 5</dev/other
echo holding
exec sleep 1000
"""

pytestmark = [pytest.mark.root, pytest.mark.tmpfs]


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def log(folder: Path) -> Generator[LogPipe]:
    """A log that only root may read."""
    pipe = LogPipe(folder / "kmsg", mode=0o600)
    pipe.write(7, XID)
    yield pipe
    pipe.close()


@pytest.fixture
async def kubelet(folder: Path) -> AsyncGenerator[Kubelet]:
    """A kubelet in a folder that only root may enter, as a real one is."""
    (folder / "kubelet").mkdir(mode=0o700)
    async with Kubelet(folder / "kubelet" / "k.sock") as kubelet:
        kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [GPU])
        yield kubelet


@pytest.fixture(params=[0, 1], ids=["of root", "of another user"])
def holder(request: pytest.FixtureRequest) -> Generator[tuple[int, int]]:
    """The PID and the user of a Slurm job's process that holds a GPU."""
    uid: int = request.param
    become = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    hold = HOLD.replace("exec sleep", f"exec {' '.join(become)} sleep") if uid else HOLD
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hold],
        env={
            "PATH": os.environ["PATH"],
            "SLURM_JOB_ID": "4711",
            "SLURM_JWT": "secret",
            "STOKER_ALLOCATION_ID": SHARE.id,
        },
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        _await_command(process.pid, "sleep")
        yield process.pid, uid
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _await_command(pid: int, name: str) -> None:
    while Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() != name:
        os.sched_yield()


async def seen_by_nobody(folder: Path, pid: int) -> dict[str, Any]:
    return await asyncio.to_thread(_seen_by_nobody, folder, pid)


def _seen_by_nobody(folder: Path, pid: int) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.unprivileged", str(NOBODY)),
            *(str(folder / name) for name in ("helper.sock", "kmsg", "kubelet/k.sock")),
            str(pid),
        ],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=2 * SECONDS_MAX,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("uid") == NOBODY
    return found


@contextlib.contextmanager
def running_for_nobody(folder: Path) -> Generator[None]:
    with running(folder, *options(folder), user=str(NOBODY)):
        yield


def options(folder: Path) -> tuple[str, ...]:
    return (
        *("--kmsg", str(folder / "kmsg")),
        *("--pod-resources", str(folder / "kubelet" / "k.sock")),
    )


def effective_capabilities(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return status.partition("\nCapEff:")[2].split()[0]


def expect_everything(found: dict[str, Any], pid: int, uid: int) -> None:
    assert [pid, uid, "sleep", "/dev/nvidia0", "/dev/nvidiactl"] in found["holders"]
    assert found["job"] == {"SLURM_JOB_ID": "4711", "STOKER_ALLOCATION_ID": SHARE.id}
    assert found["log"] == [XID]
    assert found["allocation"] == SHARE.id
    assert found["assigned"] == [[GPU, "pod ml/train-0 (container trainer)"]]


@pytest.mark.usefixtures("log", "kubelet")
async def test_with_the_helper_it_has_everything(folder: Path, holder: tuple[int, int]) -> None:
    pid, uid = holder
    with running_for_nobody(folder):
        found = await seen_by_nobody(folder, pid)
    expect_everything(found, pid, uid)


@pytest.mark.usefixtures("log", "kubelet")
async def test_three_capabilities_and_a_socket_of_the_service_manager_are_enough(
    folder: Path, holder: tuple[int, int]
) -> None:
    pid, uid = holder
    few = "-all,+syslog,+sys_ptrace,+dac_read_search"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fsencode(folder / "helper.sock"))
        os.chown(folder / "helper.sock", NOBODY, NOBODY)
        listener.listen()
        with running(
            folder,
            *options(folder),
            user=str(NOBODY),
            inherited=listener,
            prefix=("setpriv", f"--bounding-set={few}"),
        ) as found:
            assert effective_capabilities(found.process.pid) == "0000000400080004"
            seen = await seen_by_nobody(folder, pid)
    expect_everything(seen, pid, uid)


@pytest.mark.usefixtures("log", "kubelet")
async def test_without_it_each_thing_that_is_lacking_is_named(
    folder: Path, holder: tuple[int, int]
) -> None:
    pid, _ = holder
    found = await seen_by_nobody(folder, pid)
    why = f"helper at {folder}/helper.sock: nothing is there; is stoker-agent-helper running?"
    assert found == {
        "holders": f"who has the driver's device files open cannot be seen: {why}",
        "job": f"which job process {pid} is of cannot be read: {why}",
        "log": (
            f"the kernel's log cannot be followed through the helper: {why}; "
            f"{folder}/kmsg: Permission denied"
        ),
        "allocation": "",
        "assigned": (
            f"what the kubelet has handed out is not known: {folder}/kubelet/k.sock: "
            f"Permission denied; the kubelet cannot be reached through the helper: {why}"
        ),
    }


@pytest.mark.usefixtures("log", "kubelet")
async def test_a_helper_for_somebody_else_is_none(folder: Path, holder: tuple[int, int]) -> None:
    pid, _ = holder
    with running(folder, *options(folder), user="1"):
        found = await seen_by_nobody(folder, pid)
    why = f"its socket is not for the user with UID {NOBODY}"
    assert found.pop("allocation") == ""
    assert all(why in told for told in found.values())
