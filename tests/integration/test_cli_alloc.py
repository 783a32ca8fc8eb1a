"""`stoker alloc -- COMMAND` on real daemons: signals, lost allocations, the end of everything."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.daemons import Stage, plain_environment, ready_nodes
from tests.support.waiting import until, until_true

from stoker.client import Allocation, AllocationState, AsyncFleet
from stoker.core.errors import ExitCode

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Writes what happens to it into a file; ends with 5 after SIGTERM, and tells of SIGINTs then.
COMMAND = """
import os, signal, sys
log = open(sys.argv[1], "w", buffering=1)
interrupts = []
def on_interrupt(*_):
    interrupts.append(1)
    print("interrupted", file=log)
def on_term(*_):
    print(f"terminated after {len(interrupts)} interrupts", file=log)
    sys.exit(5)
signal.signal(signal.SIGINT, on_interrupt)
signal.signal(signal.SIGTERM, on_term)
print(f"running as {os.getpid()} on {os.environ['CUDA_VISIBLE_DEVICES']}", file=log)
while True:
    signal.pause()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncFleet]:
    """A fleet with one node of one GPU, so that nothing may be left behind."""
    async with Stage(tmp_path_factory.mktemp("alloc")) as stage:
        await stage.aggregator().start()
        await stage.agent("node-a", "1xT4").start()
        async with stage.fleet() as fleet:
            await ready_nodes(fleet, 1)
            yield fleet


class Errand:
    """A running `stoker alloc`."""

    def __init__(self, folder: Path, fleet: AsyncFleet, *arguments: str) -> None:
        self.log = folder / "command.log"
        self.said = folder / "stderr"
        self.command = [sys.executable, "-m", "stoker.cli", "alloc", *arguments]
        if "--" in arguments:
            self.command += [sys.executable, "-c", COMMAND, str(self.log)]
        self.environment = plain_environment({"STOKER_ADDRESS": fleet.address})
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        with self.said.open("wb") as said:
            return subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )

    def logged(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text(encoding="utf-8")

    async def running(self) -> int:
        """Return the PID of the command once it runs."""
        await until_true("the command to run", lambda: self.logged(" on GPU-"))
        return int(self.log.read_text(encoding="utf-8").split()[2])

    async def ended(self) -> int:
        await until_true("the end of `stoker alloc`", lambda: self.process.poll() is not None)
        return self.process.returncode


async def only(fleet: AsyncFleet, state: AllocationState) -> Allocation:
    """Return the allocation that is in this state, once there is one."""

    async def look() -> Allocation | None:
        found = (await fleet.allocations(include_ended=True)).allocations
        return next((each for each in found if each.state is state), None)

    return await until(f"an allocation that is {state}", look)


async def free(fleet: AsyncFleet) -> None:
    """Return once nothing is allocated."""

    async def look() -> bool:
        return not (await fleet.allocations()).allocations

    await until("the GPU to be free", look)


async def test_signals_reach_the_command_and_its_exit_code_comes_back(
    fleet: AsyncFleet, tmp_path: Path
) -> None:
    errand = Errand(tmp_path, fleet, "--holder", "me", "--")
    await errand.running()
    granted = await only(fleet, AllocationState.GRANTED)
    assert errand.logged(granted.env["CUDA_VISIBLE_DEVICES"])
    errand.process.send_signal(signal.SIGINT)
    await until_true("the interrupt", lambda: errand.logged("interrupted"))
    errand.process.send_signal(signal.SIGTERM)
    assert await errand.ended() == 5
    assert errand.logged("terminated after 1 interrupts")
    assert (await fleet.allocations()).allocations == ()


async def test_command_that_a_signal_ends_is_told_as_shells_do(
    fleet: AsyncFleet, tmp_path: Path
) -> None:
    errand = Errand(tmp_path, fleet, "--")
    os.kill(await errand.running(), signal.SIGKILL)
    assert await errand.ended() == 128 + signal.SIGKILL
    await free(fleet)


async def test_command_ends_when_its_allocation_does(fleet: AsyncFleet, tmp_path: Path) -> None:
    errand = Errand(tmp_path, fleet, "--ttl", "2s", "--")
    await errand.running()
    granted = await only(fleet, AllocationState.GRANTED)
    await fleet.release(granted.id, reason="needed elsewhere", wait=0.0)
    assert await errand.ended() == 5
    assert errand.logged("terminated")
    assert "needed elsewhere" in errand.said.read_text(encoding="utf-8")
    await free(fleet)


async def test_command_ends_with_a_killed_client_and_the_lease_with_its_ttl(
    fleet: AsyncFleet, tmp_path: Path
) -> None:
    errand = Errand(tmp_path, fleet, "--ttl", "2s", "--")
    await errand.running()
    granted = await only(fleet, AllocationState.GRANTED)
    errand.process.kill()
    errand.process.wait()
    await until_true("the command to be asked to end", lambda: errand.logged("terminated"))
    await free(fleet)
    remembered = (await fleet.allocations(include_ended=True)).allocations
    (ended,) = [each for each in remembered if each.id == granted.id]
    assert ended.ended_reason.startswith("expired")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_wait_leaves_the_queue(
    fleet: AsyncFleet, tmp_path: Path, signum: signal.Signals
) -> None:
    holder = await fleet.request(holder="first")
    errand = Errand(tmp_path, fleet, "--wait", "--")
    waiting = await only(fleet, AllocationState.WAITING)
    told = errand.said
    await until_true("its id to be told", lambda: waiting.id in told.read_text(encoding="utf-8"))
    await until_true("the reason", lambda: "node-a" in told.read_text(encoding="utf-8"))
    errand.process.send_signal(signum)
    assert await errand.ended() == 128 + signum
    live = (await fleet.allocations()).allocations
    assert [each.id for each in live] == [holder.id]
    assert not errand.log.exists()
    await fleet.release(holder.id)


async def test_refused_command_never_runs(fleet: AsyncFleet, tmp_path: Path) -> None:
    errand = Errand(tmp_path, fleet, "--gpus", "2", "--")
    assert await errand.ended() == ExitCode.REFUSED
    assert "node-a" in errand.said.read_text(encoding="utf-8")
    assert not errand.log.exists()


# Makes a terminal its own, and becomes the command.
ON_TERMINAL = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


class ErrandOnTerminal(Errand):
    """A running `stoker alloc` in the foreground of a terminal."""

    def start(self) -> "subprocess.Popen[bytes]":
        self.keyboard, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, str(terminal), *self.command],
            env=self.environment,
            pass_fds=[terminal],
        )
        os.close(terminal)
        return process


async def test_key_reaches_the_command_once(fleet: AsyncFleet, tmp_path: Path) -> None:
    errand = ErrandOnTerminal(tmp_path, fleet, "--")
    try:
        await errand.running()
        os.write(errand.keyboard, b"\x03")  # Ctrl-C
        await until_true("the interrupt", lambda: errand.logged("interrupted"))
        errand.process.send_signal(signal.SIGTERM)
        assert await errand.ended() == 5
        assert errand.logged("terminated after 1 interrupts")
    finally:
        os.close(errand.keyboard)
    await free(fleet)
