"""`stoker bench allocate`: how fast GPUs are granted, durably, while a fleet sends its frames."""

import asyncio
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from stoker.aggregator.compiled import is_available
from stoker.aggregator.config import COMPILE_FROM_GPUS
from stoker.cli.bench.children import ChildFailed, Children
from stoker.cli.bench.figures import (
    AllocateReport,
    Spread,
    agents_objections,
    clients_objections,
    merge_agents,
)
from stoker.cli.bench.machine import describe_machine, time_disk, utc_text
from stoker.cli.bench.progress import Progress
from stoker.cli.bench.rig import Measured, Rig, Server
from stoker.testing.load import ClientsPlan

# A lease is held for so long on the mean, or shorter where the fleet is small for the rate: with a
# quarter of it taken, no request is refused for want of GPUs.
HOLD_SECONDS_MAX = 2.0
TAKEN_RATIO_MAX = 0.25
_COMMITS = "stoker_ledger_commits_total"
# The aggregator compiles its loops once per machine; what is measured is a fleet that goes on.
_COMPILED = "stoker_placement_compiled"
_COMPILED_SECONDS_MAX = 60.0
_LOOK_SECONDS = 0.5
_SCRAPE_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """What to measure."""

    nodes: int
    gpus: int
    hz: float
    rate: float
    seconds: float
    seed: int

    @property
    def hold_seconds_mean(self) -> float:
        """How long a lease is held."""
        # Little's law: leases at a time = rate x time of holding.
        return min(HOLD_SECONDS_MAX, TAKEN_RATIO_MAX * self.nodes * self.gpus / self.rate)


async def measure_allocation(
    options: AllocateOptions, folder: Path, progress: Progress
) -> AllocateReport:
    """Measure and report; raises ChildFailed."""
    progress.tell("timing the disk")
    fsync = Spread.of_micros(await asyncio.to_thread(time_disk, folder))
    async with Children(folder) as children:
        rig = Rig(children, folder, progress)
        server = await rig.start_aggregator()
        agents = await rig.start_agents(
            server.target, nodes=options.nodes, gpus=options.gpus, hz=options.hz, seed=options.seed
        )
        if options.nodes * options.gpus >= COMPILE_FROM_GPUS and is_available():
            progress.tell("waiting until placement is compiled")
            await _until_compiled(server)
        clients = await rig.start_clients(
            ClientsPlan(server.target, options.rate, options.hold_seconds_mean, options.seed)
        )
        before = await _metric(server, _COMMITS)
        measured = await rig.measure("measuring", options.seconds, server, agents, (clients,))
        after = await _metric(server, _COMMITS)
    return _report(options, folder, measured, after - before, fsync)


async def _until_compiled(server: Server) -> None:
    deadline = time.monotonic() + _COMPILED_SECONDS_MAX
    while not await _metric(server, _COMPILED):
        server.child.check()
        if time.monotonic() >= deadline:
            raise ChildFailed(f"placement is not compiled after {_COMPILED_SECONDS_MAX:g} s")
        await asyncio.sleep(_LOOK_SECONDS)


async def _metric(server: Server, wanted: str) -> int:
    """Return a count that the aggregator exports without labels."""
    assert server.metrics_url is not None
    page = await asyncio.to_thread(_scrape, server.metrics_url)
    for line in page.splitlines():
        name, _, value = line.partition(" ")
        if name == wanted:
            return int(float(value))
    raise ChildFailed(f"{server.child.name} does not export {wanted}")


def _scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_SCRAPE_SECONDS_MAX) as response:
        page: bytes = response.read()
    return page.decode()


def _report(
    options: AllocateOptions, folder: Path, measured: Measured, commits: int, fsync: Spread
) -> AllocateReport:
    agents = merge_agents(measured.agents)
    (clients,) = measured.clients
    grant = Spread.of_micros(clients.grant_micros)
    release = Spread.of_micros(clients.release_micros)
    objections = agents_objections(agents, options.nodes) + clients_objections(clients)
    return AllocateReport(
        nodes=options.nodes,
        gpus=options.gpus,
        hz=options.hz,
        rate=options.rate,
        seconds=options.seconds,
        hold_seconds_mean=options.hold_seconds_mean,
        connections=agents.connections,
        requests=clients.requests,
        granted=clients.granted,
        refused=clients.refused,
        errors=clients.errors,
        granted_twice=clients.granted_twice,
        achieved_per_second=clients.granted / options.seconds,
        grant_p50_seconds=grant.p50,
        grant_p90_seconds=grant.p90,
        grant_p99_seconds=grant.p99,
        grant_max_seconds=grant.max,
        release_p50_seconds=release.p50,
        release_p99_seconds=release.p99,
        commits=commits,
        fsync_p50_seconds=fsync.p50,
        fsync_p99_seconds=fsync.p99,
        frames_per_second=agents.frames_sent / options.seconds,
        frames_dropped=agents.frames_dropped + agents.frames_sent - agents.frames_acked,
        ack_p99_seconds=Spread.of_micros(agents.ack_micros).p99,
        aggregator_cores=measured.server.cores,
        aggregator_rss_bytes=measured.server.rss_bytes,
        generator_cores=measured.agents_used.cores + measured.clients_used.cores,
        generator_lag_p99_seconds=Spread.of_micros(agents.lag_micros).p99,
        client_lag_p99_seconds=Spread.of_micros(clients.lag_micros).p99,
        valid=not objections,
        invalid_reasons=tuple(objections),
        at=utc_text(measured.began_at),
        machine=describe_machine(folder),
    )
