"""How driver hosts end: released, held by the kernel, never fit to start, left by their agent."""

import asyncio
import ctypes
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.driver_hosts import (
    HANGING,
    HASTY,
    PATIENCE,
    Scene,
    eventually,
    hang,
    has_facts,
    is_gone,
    is_in,
    open_devices,
    pid_of,
    proc,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    DriverUnavailable,
    HostReleased,
    HostStuck,
    LibraryMissing,
)
from stoker.agent.driver_host.frames import DriverSource, RealDriver, SimulatedDriver
from stoker.agent.driver_host.states import Failed, Released, Stopping, Unreaped
from stoker.testing.undying import Undying


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "scenario.json")


async def test_released_devices_are_free_and_can_be_taken_again(scene: Scene) -> None:
    async with running(scene.source) as host:
        await host.ready()
        holder = pid_of(host)
        assert open_devices(holder) == [f"stoker-simulated-nvidia{gpu}" for gpu in range(4)]
        await host.release()
        assert isinstance(host.state, Released)
        assert is_gone(holder)
        assert open_devices() == []
        for ask in (host.sample, host.processes, host.inventory, host.ready):
            with pytest.raises(HostReleased, match="stoker agent resume"):
                await ask()
        host.resume()
        assert len((await host.ready()).gpus) == 4
        assert pid_of(host) != holder
        assert (host.counters.restarts_total, host.counters.kills_total) == (0, 0)


async def test_a_hung_host_is_released_too(scene: Scene) -> None:
    async with running(scene.source, replace(PATIENCE, release_grace_seconds=0.1)) as host:
        await host.ready()
        scene.faults(hang(2))
        asking = asyncio.create_task(host.sample())
        await until_true("the call that hangs", lambda: is_in(host, HANGING))
        await host.release()
        assert open_devices() == []
        with pytest.raises(HostReleased):
            await asking
        assert host.counters.kills_total == 1


async def test_a_host_that_is_being_ended_is_not_replaced_when_it_is_released(
    scene: Scene,
) -> None:
    patience = replace(HASTY, restart_seconds_min=600, restart_seconds_max=600)
    async with running(scene.source, patience) as host:
        await host.ready()
        scene.faults(hang(2))
        with pytest.raises(DriverTimeout):
            await host.sample()
        await until_true("the end of the host", lambda: isinstance(host.state, Stopping))
        await host.release()
        assert isinstance(host.state, Released)
        assert host.counters.starts_total == 1


async def test_release_while_there_is_no_host_and_none_can_be_started(scene: Scene) -> None:
    scene.faults(driver_loaded=False)
    patience = replace(PATIENCE, restart_seconds_min=600, restart_seconds_max=600)
    async with running(scene.source, patience) as host:
        await until_true("a failure", lambda: isinstance(host.state, Failed))
        await host.release()
        scene.mend()
        host.resume()
        assert len((await host.ready()).gpus) == 4


async def test_while_a_host_cannot_be_reaped_no_other_is_started(scene: Scene) -> None:
    spawn = Undying()
    patience = replace(HASTY, kill_seconds=0.1)
    async with running(scene.source, patience, spawn, spawn.read_state) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        spawn.hold()
        scene.faults(hang(2))
        with pytest.raises(DriverTimeout):
            await host.sample()
        await until_true("a host that is held", lambda: isinstance(host.state, Unreaped))
        (held,) = spawn.started
        told = f"pending: PID {held.pid} in uninterruptible sleep, in {HANGING} of {uuids[2]}; "
        for ask in (host.sample, host.processes, host.inventory, host.ready):
            with pytest.raises(HostStuck, match=re.escape(told)) as stuck:
                await ask()
            assert stuck.value.exit_code == 9
        assert len(spawn.started) == host.counters.starts_total == 1
        spawn.let_go()
        readings = await eventually(host.sample, lambda _: True)
        assert len([reading for reading in readings if has_facts(reading)]) == 3
        assert len(spawn.started) == host.counters.starts_total == 2
        assert (host.counters.kills_total, host.counters.unreaped_total) == (1, 1)
        assert host.counters.hangs_by_function == {HANGING: 1}


async def test_release_of_a_host_that_is_held_comes_true_when_it_is_let_go(scene: Scene) -> None:
    spawn = Undying()
    async with running(scene.source, replace(HASTY, kill_seconds=0.1), spawn) as host:
        await host.ready()
        spawn.hold()
        scene.faults(hang(2))
        asking = asyncio.create_task(host.sample())
        await until_true("the call that hangs", lambda: is_in(host, HANGING))
        for _ in range(2):  # as it is found out, and when it is known
            with pytest.raises(HostStuck, match="was killed and has not ended"):
                await host.release()
        with pytest.raises(HostReleased):
            await asking
        report = host.describe()
        assert isinstance(report.state, Unreaped)
        assert (report.is_wanted, report.function) == (False, HANGING)
        assert open_devices(spawn.started[0].pid) != []  # and nobody said otherwise
        spawn.let_go()
        await until_true("the release", lambda: isinstance(host.state, Released))
        assert host.counters.starts_total == 1
        scene.mend()
        host.resume()
        assert len((await host.ready()).gpus) == 4


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (SimulatedDriver(("2xH10",), "n1"), "GPU model 'H10' is not known"),
        (SimulatedDriver(("T4",), "n1", scenario_path="/proc/version"), "malformed"),
    ],
)
async def test_a_simulation_that_cannot_be_made_says_why(source: DriverSource, told: str) -> None:
    async with running(source) as host:
        with pytest.raises(DriverUnavailable, match=told):
            await host.ready()


async def test_a_host_that_talks_nonsense_is_ended(scene: Scene) -> None:
    def spawn(source: DriverSource, agent: socket.socket, page: int) -> subprocess.Popen[bytes]:
        program = (
            f"import socket; s = socket.socket(fileno={agent.fileno()});"
            "s.sendall(bytes.fromhex('7fffffff')); s.recv(1 << 20); s.recv(1)"
        )
        return subprocess.Popen([sys.executable, "-c", program], pass_fds=[agent.fileno()])

    async with running(scene.source, spawn=spawn) as host:
        with pytest.raises(DriverError, match="does not speak as this agent does"):
            await host.ready()


async def test_a_host_that_cannot_be_started_says_why(scene: Scene) -> None:
    def spawn(source: DriverSource, agent: socket.socket, page: int) -> subprocess.Popen[bytes]:
        raise FileNotFoundError(2, "No such file or directory")

    async with running(scene.source, spawn=spawn) as host:
        with pytest.raises(DriverError, match="cannot be started: No such file"):
            await host.ready()


async def test_a_host_is_not_given_the_service_managers_socket(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    async with running(scene.source) as host:
        await host.ready()
        environ = proc(host, "environ")
    assert "NOTIFY_SOCKET" not in environ
    assert "PATH=" in environ


AGENT = """
import asyncio, sys
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.driver_host.link import DriverHost

async def main(path):
    host = DriverHost(SimulatedDriver(("4xH100-80GB",), "n1", scenario_path=path))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(host.run())
        await host.ready()
        print(host.state.pid, flush=True)
        if await asyncio.to_thread(sys.stdin.readline):
            asking = asyncio.create_task(host.sample())
            while not (host.call and host.call.function == sys.argv[2]):
                await asyncio.sleep(0.01)
            print("asked", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("is_hung", [False, True])
def test_a_host_does_not_outlive_its_agent(scene: Scene, is_hung: bool) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            AGENT,
            scene.path,
            HANGING,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        assert agent.stderr is not None
        host = int(agent.stdout.readline())
        assert not is_gone(host)
        if is_hung:
            scene.faults(hang(2))
            agent.stdin.write(b"hang\n")
            agent.stdin.flush()
            assert agent.stdout.readline() == b"asked\n"
        agent.kill()
        # The host holds the agent's stderr open until it ends: reading to the end waits for it.
        told = agent.stderr.read().decode()
    asyncio.run(until_true("the end of the host", lambda: is_gone(host)))
    left = f"driver host {host}: {HANGING} has not returned; leaving it\n"
    assert told == (left if is_hung else "")


def has_a_library() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


async def test_a_machine_without_the_library_says_exactly_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_a_library():
        pytest.skip("this machine has an NVML library")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    async with running(RealDriver()) as host:
        with pytest.raises(LibraryMissing) as missing:
            await host.ready()
    assert str(missing.value).startswith(
        "nvmlInit: libnvidia-ml.so.1: cannot open shared object file: No such file or directory"
    )
    assert "LD_LIBRARY_PATH is not set" in str(missing.value)
    assert missing.value.exit_code == 4


async def test_a_file_that_is_no_library_is_told_as_the_loader_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("this is no library, however long it may be" * 9)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    async with running(RealDriver()) as host:
        with pytest.raises(LibraryMissing) as missing:
            await host.ready()
    assert "invalid ELF header" in str(missing.value)
    assert str(tmp_path) in str(missing.value)
    assert missing.value.exit_code == 4
