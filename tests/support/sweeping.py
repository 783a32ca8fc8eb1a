"""A child process that sweeps the GPUs through a real driver host, and tells how large both are.

`python -m tests.support.sweeping PLAN` does with each answer what the agent does, back to back (a
second of the state's clock is a sweep), and prints a line of JSON every so many sweeps. It waits
for a line before it goes on, so that whoever reads changes the world between two sweeps, never in
the middle of one.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import psutil
import uvloop
from tests.support.driver_hosts import PATIENCE, pid_of

from stoker.agent.driver_host.frames import DriverSource, RealDriver, SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.events import (
    DriverChanged,
    InventoryRead,
    LinkUp,
    ProcessesTaken,
    ProcessReadingBegun,
    SampleTaken,
    Started,
    Welcomed,
)
from stoker.agent.model import DriverState, DriverStatus
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import GpuReading, Inventory
from stoker.agent.tenants import see_all
from stoker.testing.load import SamplingPlan
from stoker.testing.load_sampling import EVERYTHING, FAST, SweptNode

# As the agent does at its usual rates, counted in sweeps; a page is made as for a scraper.
SLOW_EVERY, PROCESSES_EVERY, PAGE_EVERY = 10, 5, 15


class Plan(msgspec.Struct, frozen=True):
    """What to sweep, how often, and how often to tell."""

    sweeps: int
    tell_every: int
    simulate: tuple[str, ...] = ()  # none: the library
    scenario: str | None = None


class Told(msgspec.Struct, frozen=True):
    """How things stand after so many sweeps; the counts are since the last time."""

    sweeps: int
    agent_rss_bytes: int
    host_rss_bytes: int
    agent_files: int
    host_files: int
    host_starts: int
    inventories: int  # that differed from the one before
    readings: int  # of GPUs
    empty_readings: int  # of GPUs that could not be read
    mig_devices: int  # in all readings
    xids: int
    pids: tuple[int, ...]  # that used a GPU in some reading


# A node of its own: what runs on its GPUs is seen by nobody else's simulation.
NODE = "swept"


@dataclass(slots=True)
class _Counted:
    inventories: int = 0
    readings: int = 0
    empty_readings: int = 0
    mig_devices: int = 0
    xids: int = 0


class _Sweeper:
    """The agent's side, and what it saw since it told last."""

    def __init__(self, plan: Plan, host: DriverHost) -> None:
        self._plan, self._host = plan, host
        # What the state keeps of the last minute is what it would keep at a sweep a second.
        self._seconds = 0
        sampling = SamplingPlan(plan.simulate, plan.sweeps, 1.0, 0)
        self._node = SweptNode(sampling, lambda: float(self._seconds))
        self._proctable = ProcTable()
        self._inventory: Inventory | None = None
        self._counted = _Counted()
        self._pids: set[int] = set()

    async def run(self) -> None:
        now = time.time()
        await self._host.ready()
        reading = DriverChanged(now, DriverStatus(DriverState.READING))
        self._node.happen(Started(now), reading, LinkUp(now), Welcomed(now, 0))
        for number in range(1, self._plan.sweeps + 1):
            self._seconds = number
            await self._sweep(number)
            if number % self._plan.tell_every == 0:
                sys.stdout.write(msgspec.json.encode(self._told(number)).decode() + "\n")
                sys.stdout.flush()
                await asyncio.to_thread(sys.stdin.readline)

    async def _sweep(self, number: int) -> None:
        readings = await self._host.sample(EVERYTHING if number % SLOW_EVERY == 0 else FAST)
        await self._note_inventory()
        self._count(readings)
        self._node.happen(SampleTaken(time.time(), readings))
        if number % PROCESSES_EVERY == 0:
            self._node.happen(ProcessReadingBegun(time.time()))
            taken = await self._host.processes()
            seen = see_all(taken.processes, self._proctable)
            self._pids.update(each.pid for each in seen)
            self._node.happen(ProcessesTaken(time.time(), taken.started_at, seen))
        if number % PAGE_EVERY == 0:
            self._node.page(self._host)

    async def _note_inventory(self) -> None:
        inventory = await self._host.ready()
        if inventory != self._inventory:
            self._inventory = inventory
            self._counted.inventories += 1
            self._node.happen(InventoryRead(time.time(), inventory))

    def _count(self, readings: Sequence[GpuReading]) -> None:
        counted = self._counted
        counted.readings += len(readings)
        counted.empty_readings += sum(not reading.facts for reading in readings)
        counted.mig_devices += sum(len(reading.mig_devices) for reading in readings)
        counted.xids += sum(len(reading.xids) for reading in readings)

    def _told(self, number: int) -> Told:
        agent, host = psutil.Process(), psutil.Process(pid_of(self._host))
        counted, self._counted = self._counted, _Counted()
        pids, self._pids = self._pids, set()
        return Told(
            sweeps=number,
            agent_rss_bytes=agent.memory_info().rss,
            host_rss_bytes=host.memory_info().rss,
            agent_files=agent.num_fds(),
            host_files=host.num_fds(),
            host_starts=self._host.counters.starts_total,
            inventories=counted.inventories,
            readings=counted.readings,
            empty_readings=counted.empty_readings,
            mig_devices=counted.mig_devices,
            xids=counted.xids,
            pids=tuple(sorted(pids)),
        )


async def _run(plan: Plan) -> None:
    source: DriverSource = RealDriver()
    if plan.simulate:
        source = SimulatedDriver(plan.simulate, NODE, scenario_path=plan.scenario)
    host = DriverHost(source, patience=PATIENCE)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(host.run())
        try:
            await _Sweeper(plan, host).run()
        finally:
            running.cancel()


class Sweeping:
    """Such a child, as a test holds it."""

    def __init__(self, plan: Plan, environment: Mapping[str, str]) -> None:
        """Start it."""
        self._plan = plan
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.sweeping", msgspec.json.encode(plan).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
            env={**environment},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def hear(self) -> Told:
        """Return how things stand; the sweeps stand still until `go_on`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the sweeps ended with status {self._process.wait()}"
        return msgspec.json.decode(line, type=Told)

    def go_on(self) -> None:
        """Let it sweep until it tells again."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the straight line that fits the points best (least squares)."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


if __name__ == "__main__":
    uvloop.run(_run(msgspec.json.decode(sys.argv[1], type=Plan)))
