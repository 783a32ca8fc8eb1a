"""`stoker bench sampling`: what one sweep over the GPUs of a node costs."""

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.cli.bench.children import Children
from stoker.cli.bench.figures import Machine, Spread
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.progress import Progress
from stoker.core.errors import BadInput
from stoker.testing.load import Found, SamplingPlan, SamplingReport, Sweeping, SweepsReport

LIBRARY = "libnvidia-ml.so.1"
# The agent's usual rates: fast facts every second, slow ones every tenth, processes every fifth.
SLOW_PER_SECOND, PROCESSES_PER_SECOND = 0.1, 0.2


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What to measure."""

    simulate: tuple[str, ...]
    gpus: int | None  # how many there must be; None: as many as there are
    sweeps: int
    interval_seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class SweepFigures:
    """What one sweep of a kind takes."""

    host_cpu_seconds_per_sweep: float  # the driver host, with the library in it
    agent_cpu_seconds_per_sweep: float  # the line, the state, the frame
    wall_p50_seconds: float | None
    wall_p99_seconds: float | None
    calls_per_sweep: int  # into the library
    values_per_sweep: int

    @property
    def cpu_seconds_per_sweep(self) -> float:
        """What both processes use."""
        return self.host_cpu_seconds_per_sweep + self.agent_cpu_seconds_per_sweep


@dataclass(frozen=True, slots=True)
class SamplingFigures:
    """What sampling costs on one node."""

    source: str  # the library, or the simulated GPUs
    driver_version: str | None
    gpus: int
    sweeps: int  # of each kind
    interval_seconds: float
    fast: SweepFigures
    fast_and_slow: SweepFigures
    processes: SweepFigures
    cores_at_usual_rates: float
    series: int  # lines of the page for Prometheus
    page_bytes: int
    scrape_cpu_seconds: float
    frame_bytes: int
    host_rss_bytes: int
    agent_rss_bytes: int  # without what talks to the aggregator
    at: str  # when it began, UTC
    machine: Machine


async def measure_sampling(
    options: SamplingOptions, folder: Path, progress: Progress
) -> SamplingFigures:
    """Measure and report; raises ChildFailed, Missing without a driver, BadInput."""
    began_at = time.time()
    plan = SamplingPlan(options.simulate, options.sweeps, options.interval_seconds, options.seed)
    async with Children(folder) as children:
        progress.tell("starting the driver host")
        argument = msgspec.json.encode(plan).decode()
        child = await children.start("the sampling", "stoker.testing.load_sampling", [argument])
        found = await child.hear()
        assert isinstance(found, Found), found
        if options.gpus is not None and options.gpus != found.gpus:
            raise BadInput(f"--gpus: wanted {options.gpus}, found {found.gpus} that can be read")
        told = ""
        while isinstance(said := await child.hear(), Sweeping):
            if progress.is_live:
                progress.tell(f"{said.what}: {said.done} of {said.total} sweeps")
            elif told != said.what:
                progress.tell(f"{said.what}: {said.total} sweeps")
            told = said.what
        assert isinstance(said, SamplingReport), said
    return _figures(options, said, began_at, folder)


def _figures(
    options: SamplingOptions, said: SamplingReport, began_at: float, folder: Path
) -> SamplingFigures:
    fast = _sweep(said.fast, said.calls["fast"])
    everything = _sweep(said.everything, said.calls["everything"])
    processes = _sweep(said.processes, said.calls["processes"])
    slow_part = everything.cpu_seconds_per_sweep - fast.cpu_seconds_per_sweep
    return SamplingFigures(
        source=", ".join(f"simulated {each}" for each in options.simulate) or LIBRARY,
        driver_version=said.driver_version,
        gpus=said.gpus,
        sweeps=options.sweeps,
        interval_seconds=options.interval_seconds,
        fast=fast,
        fast_and_slow=everything,
        processes=processes,
        cores_at_usual_rates=fast.cpu_seconds_per_sweep
        + SLOW_PER_SECOND * slow_part
        + PROCESSES_PER_SECOND * processes.cpu_seconds_per_sweep,
        series=said.series,
        page_bytes=said.page_bytes,
        scrape_cpu_seconds=said.scrape_cpu_seconds,
        frame_bytes=said.frame_bytes,
        host_rss_bytes=said.host_rss_bytes,
        agent_rss_bytes=said.rss_bytes,
        at=utc_text(began_at),
        machine=describe_machine(folder),
    )


def _sweep(found: SweepsReport, calls: int) -> SweepFigures:
    wall = Spread.of_micros(found.wall_micros)
    return SweepFigures(
        host_cpu_seconds_per_sweep=found.host_cpu_seconds / found.sweeps,
        agent_cpu_seconds_per_sweep=found.agent_cpu_seconds / found.sweeps,
        wall_p50_seconds=wall.p50,
        wall_p99_seconds=wall.p99,
        calls_per_sweep=calls,
        values_per_sweep=found.told,
    )
