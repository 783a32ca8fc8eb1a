"""A driver host of a simulated node in a test: its scene, its life, what is waited for."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from stoker.agent.driver import DriverError
from stoker.agent.driver_host.__main__ import SIMULATED_DEVICE
from stoker.agent.driver_host.frames import DriverSource, SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.process import ReadState, Spawn, spawn_host, state_of
from stoker.agent.driver_host.states import Patience, Running
from stoker.agent.processes import Child
from stoker.agent.readings import GpuReading

T = TypeVar("T")

# Deadlines are long where nothing hangs, so that a slow machine is not taken for a hung driver.
PATIENCE = Patience(
    start_seconds=30,
    call_seconds=30,
    end_grace_seconds=10,
    release_grace_seconds=10,
    kill_seconds=10,
    restart_seconds_min=0.01,
    restart_seconds_max=0.05,
    retrial_seconds_min=600,
)
HASTY = replace(PATIENCE, call_seconds=0.5, end_grace_seconds=0.1, release_grace_seconds=0.1)
EVENTUALLY_SECONDS = 30
# A call that every sample makes for every GPU, and no inventory.
HANGING = "nvmlDeviceGetTemperatureV"


class Spawner:
    """Starts driver hosts, and sees to it that there is never more than one."""

    def __init__(self, kind: Spawn = spawn_host) -> None:
        self.kind = kind
        self.started: list[Child] = []

    def __call__(self, source: DriverSource, agent: socket.socket, page: int) -> Child:
        assert all(process.poll() is not None for process in self.started)
        process = self.kind(source, agent, page)
        self.started.append(process)
        return process


@asynccontextmanager
async def running(
    source: DriverSource,
    patience: Patience = PATIENCE,
    spawn: Spawn | None = None,
    read_state: ReadState = state_of,
) -> AsyncGenerator[DriverHost]:
    """A driver host that runs, and of which nothing is left afterwards."""
    spawner = Spawner(spawn or spawn_host)
    host = DriverHost(source, patience=patience, spawn=spawner, read_state=read_state)
    task = asyncio.create_task(host.run())
    try:
        yield host
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [process for process in spawner.started if process.poll() is None] == []


class Scene:
    """A simulated node of four cards, and the file that says what happens on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = SimulatedDriver(("4xH100-80GB",), "n1", scenario_path=str(path))

    def faults(self, *faults: dict[str, Any], **more: Any) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text(json.dumps({"faults": faults, **more}))
        draft.rename(self.path)

    def mend(self) -> None:
        self.path.unlink()


def hang(gpu: int | None, function: str = HANGING) -> dict[str, Any]:
    return {"fault": "hang", "gpu": gpu, "function": function}


async def eventually(ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool]) -> T:
    """The first answer of which it holds; errors on the way are part of the story."""
    async with asyncio.timeout(EVENTUALLY_SECONDS):
        while True:
            try:
                answer = await ask()
            except DriverError:
                pass
            else:
                if holds(answer):
                    return answer
            await asyncio.sleep(0.01)


def has_facts(reading: GpuReading) -> bool:
    return bool(reading.facts)


def pid_of(host: DriverHost) -> int:
    assert isinstance(host.state, Running)
    return host.state.pid


def proc(host: DriverHost, name: str) -> str:
    return Path(f"/proc/{pid_of(host)}/{name}").read_text(errors="replace")


def open_devices(pid: int | None = None) -> list[str]:
    """Which devices a process has open, real or simulated; None: this process and its children."""
    pids = (
        [pid] if pid is not None else [os.getpid(), *(c.pid for c in psutil.Process().children())]
    )
    found: list[str] = []
    for each in pids:
        for link in Path(f"/proc/{each}/fd").glob("*"):
            with suppress(FileNotFoundError):  # it was closed since, or the process ended
                name = os.readlink(link).removeprefix("/memfd:").removesuffix(" (deleted)")
                if name.startswith(("/dev/nvidia", SIMULATED_DEVICE)):
                    found.append(name)
    return sorted(found)


def is_in(host: DriverHost, function: str) -> bool:
    return host.call is not None and host.call.function == function


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
