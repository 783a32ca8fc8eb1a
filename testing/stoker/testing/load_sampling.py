"""The agent's side of `stoker bench sampling`: sweeps the GPUs through a real driver host.

Run as `python -m stoker.testing.load_sampling PLAN`. It has loaded what the agent loads, and does
with each answer what the agent does: decode it, take it into the state, make the frame. What it
leaves out is sending that frame.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import uvloop

from stoker.agent.actions import SaveJournal, SendFrame
from stoker.agent.config import MetricsConfig
from stoker.agent.driver import DriverError
from stoker.agent.driver_host.frames import DriverSource, RealDriver, SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Running
from stoker.agent.events import (
    DriverChanged,
    Event,
    FrameAcked,
    InventoryRead,
    JournalSaved,
    LinkUp,
    ProcessesTaken,
    ProcessReadingBegun,
    SampleTaken,
    Started,
    Welcomed,
)
from stoker.agent.facts import Rate
from stoker.agent.metrics.exporter import Pages
from stoker.agent.metrics.snapshot import Durations, Snapshot
from stoker.agent.model import DriverState, DriverStatus, NodeIdentity
from stoker.agent.nvml.table import NvmlTable
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import GpuReading
from stoker.agent.state import NodeState
from stoker.agent.tenants import see_all
from stoker.agent.wire import frame_message
from stoker.core.errors import ExitCode
from stoker.testing.load import (
    Failed,
    Found,
    Lacking,
    SamplingPlan,
    SamplingReport,
    Sweeping,
    SweepsReport,
    say,
    to_micros,
)

NODE = "bench"
WARM_UP_SWEEPS = 5
# As the agent reads them, unless told otherwise.
INTERVAL_SECONDS, SLOW_INTERVAL_SECONDS, PROCESSES_INTERVAL_SECONDS = 1.0, 10.0, 5.0
FAST, EVERYTHING = (Rate.FAST,), (Rate.FAST, Rate.SLOW)


class SweptNode:
    """The node's state, connected to an aggregator that acknowledges every frame at once."""

    def __init__(self, plan: SamplingPlan, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Take what is simulated, and the clock that the state goes by."""
        self._monotonic = monotonic
        identity = NodeIdentity(
            node=NODE,
            agent_version="bench",
            boot_id=f"{Random(plan.seed).getrandbits(128):032x}",
            simulated=bool(plan.simulate),
            pool="",
            labels={},
            interval_seconds=INTERVAL_SECONDS,
            process_id="bench",
        )
        self.state = NodeState((), identity)
        self.frame_bytes = 0

    def happen(self, *events: Event) -> None:
        """Tell the state, and do what it asks for, as far as it is about frames."""
        todo = list(events)
        while todo:
            event = todo.pop(0)
            for action in self.state.handle(event, self._monotonic()):
                match action:
                    case SaveJournal(ticket):
                        todo.append(JournalSaved(event.at, ticket))
                    case SendFrame(frame):
                        self.frame_bytes = len(frame_message(frame).SerializeToString())
                        todo.append(FrameAcked(event.at, frame.sequence))
                    case _:
                        pass  # readings come by themselves here, and no stream is opened
        self.state.view()

    def page(self, host: DriverHost) -> str:
        """Return the page for Prometheus."""
        return Pages(partial(self._snapshot, host), MetricsConfig()).own("").text

    def _snapshot(self, host: DriverHost) -> Snapshot:
        return Snapshot(
            view=self.state.view(),
            monotonic_seconds=self._monotonic(),
            host=host.counters,
            sample_durations=Durations(),
            processes_interval_seconds=PROCESSES_INTERVAL_SECONDS,
        )


class _Bench:
    """One driver host, and the sweeps that are made through it."""

    def __init__(self, plan: SamplingPlan, host: DriverHost) -> None:
        self._plan = plan
        self._host = host
        self._node = SweptNode(plan)
        self._proctable = ProcTable()

    async def run(self) -> SamplingReport:
        """Make all sweeps; raises DriverError."""
        inventory = await self._host.ready()
        say(Found(len(inventory.gpus)))
        now = time.time()
        self._node.happen(
            Started(now),
            InventoryRead(now, inventory),
            DriverChanged(now, DriverStatus(DriverState.READING)),
            LinkUp(now),
            Welcomed(now, 0),
        )
        fast = await self._sweep("fast facts", partial(self._sample, FAST))
        everything = await self._sweep("all facts", partial(self._sample, EVERYTHING))
        processes = await self._sweep("processes", self._read_processes)
        await self._sample(EVERYTHING)  # a page tells nothing that is old
        page, scrape_seconds = self._scrape()
        rss_bytes = psutil.Process().memory_info().rss
        host_rss_bytes = psutil.Process(self._pid).memory_info().rss
        return SamplingReport(
            driver_version=inventory.driver_version,
            gpus=len(inventory.gpus),
            fast=fast,
            everything=everything,
            processes=processes,
            series=sum(not line.startswith("#") for line in page.splitlines()),
            page_bytes=len(page),
            scrape_cpu_seconds=scrape_seconds,
            frame_bytes=self._node.frame_bytes,
            rss_bytes=rss_bytes,
            host_rss_bytes=host_rss_bytes,
        )

    @property
    def _pid(self) -> int:
        state = self._host.state
        assert isinstance(state, Running), state
        return state.pid

    async def _sweep(self, what: str, once: Callable[[], Coroutine[Any, Any, int]]) -> SweepsReport:
        """Sweep so often, at the interval of the plan, and tell what it took."""
        plan, micros, told = self._plan, list[int](), 0
        for _ in range(WARM_UP_SWEEPS):
            told = await once()
        host_began, agent_used = _cpu_seconds(self._pid), 0.0
        said_at = due = time.monotonic()
        for number in range(plan.sweeps):
            due += plan.interval_seconds
            cpu_began, began = time.process_time(), time.monotonic()
            told = await once()
            micros.append(to_micros(time.monotonic() - began))
            agent_used += time.process_time() - cpu_began
            if time.monotonic() - said_at >= 1.0:
                said_at = time.monotonic()
                say(Sweeping(what, number + 1, plan.sweeps))
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        host_used = _cpu_seconds(self._pid) - host_began
        return SweepsReport(plan.sweeps, host_used, agent_used, micros, told)

    async def _sample(self, rates: tuple[Rate, ...]) -> int:
        readings = await self._host.sample(rates)
        self._node.happen(SampleTaken(time.time(), readings))
        return sum(map(_told, readings))

    async def _read_processes(self) -> int:
        self._node.happen(ProcessReadingBegun(time.time()))
        reading = await self._host.processes()
        seen = see_all(reading.processes, self._proctable)
        self._node.happen(
            ProcessesTaken(time.time(), started_at=reading.started_at, processes=seen)
        )
        return len(seen)

    def _scrape(self) -> tuple[str, float]:
        """Return the page and the CPU time that one takes."""
        self._node.page(self._host)
        began = time.process_time()
        page = self._node.page(self._host)
        return page, time.process_time() - began


def _told(reading: GpuReading) -> int:
    """Return how many values a reading has."""
    labelled = sum(map(len, reading.by_label.values()))
    mig = sum(len(device.facts) for device in reading.mig_devices)
    return len(reading.facts) + labelled + 3 * len(reading.extents) + mig


def _cpu_seconds(pid: int) -> float:
    """Return what a process has used, to the nanosecond where the kernel counts so finely."""
    try:
        parts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except FileNotFoundError:  # a thread has just ended
        parts = []
    if parts:
        return sum(int(part.split()[0]) for part in parts) / 1e9
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def count_calls(plan: SamplingPlan) -> dict[str, int]:
    """Return how many calls each sweep makes; loads into this process what the agent never does."""
    from stoker.agent.nvml.driver import NvmlDriver, nvidia_ml_py  # noqa: PLC0415

    calls = 0

    def announce(index: int, function: str) -> None:
        nonlocal calls
        calls += 1

    table = _simulated(plan) if plan.simulate else nvidia_ml_py()
    driver = NvmlDriver(table, simulated=bool(plan.simulate), announce=announce)
    driver.open()
    driver.inventory()
    sweeps: dict[str, Callable[[], object]] = {
        "fast": partial(driver.sample, FAST),
        "everything": partial(driver.sample, EVERYTHING),
        "processes": driver.processes,
    }
    found: dict[str, int] = {}
    for name, sweep in sweeps.items():
        sweep()  # what is not supported is asked for only once
        before = calls
        sweep()
        found[name] = calls - before
    driver.close()
    return found


def _simulated(plan: SamplingPlan) -> NvmlTable:
    from stoker.agent.simulated.nvml import SimulatedNvml  # noqa: PLC0415
    from stoker.core.gpu_models import GpuModel, parse_simulate_spec  # noqa: PLC0415

    models: list[GpuModel] = []
    for spec in plan.simulate:
        count, model = parse_simulate_spec(spec)
        models += [model] * count
    return SimulatedNvml(models, node=NODE, seed=plan.seed)


def _source(plan: SamplingPlan) -> DriverSource:
    return SimulatedDriver(plan.simulate, NODE, plan.seed) if plan.simulate else RealDriver()


async def run(plan: SamplingPlan) -> None:
    """Sweep, and tell the parent what it took, or why it cannot be done."""
    host = DriverHost(_source(plan))
    running = asyncio.create_task(host.run())
    sweeping = asyncio.create_task(_Bench(plan, host).run())
    # The first ends only when it is cancelled, or fails.
    await asyncio.wait([running, sweeping], return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    try:
        report = await sweeping if sweeping.done() else None
    except DriverError as error:
        lacking = error.exit_code is ExitCode.MISSING
        say(Lacking(str(error)) if lacking else Failed(str(error)))
        return
    finally:
        sweeping.cancel()
        await asyncio.wait([running, sweeping])
    if report is None:
        running.result()
        return
    say(msgspec.structs.replace(report, calls=count_calls(plan)))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    uvloop.run(run(msgspec.json.decode(sys.argv[1], type=SamplingPlan)))
