"""The parts of a bench put together: a server, generators of load, one window for all."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.cli.bench.children import Child, ChildFailed, Children, Usage
from stoker.cli.bench.figures import Used, merge_agents
from stoker.cli.bench.progress import Progress
from stoker.cli.bench.visibility import Look
from stoker.client import connect_async
from stoker.testing.load import (
    AgentsPlan,
    AgentsReport,
    ClientsPlan,
    ClientsReport,
    Connected,
    Listening,
    Measure,
)

# More agents than this in one process are late of themselves.
AGENTS_PER_GENERATOR_MAX = 1500
START_SECONDS_MAX = 30.0
# Until every node has told what it tells once (inventory, processes), and Python is warm.
WARM_UP_SECONDS = 2.0
# So many looks at the fleet, after there was time for a frame or two of every node.
LOOKS = 5
LOOKS_SECONDS_APART = 0.73  # not in step with sampling
LOOKS_SETTLE_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
# gRPC's older way to wait for sockets costs a client a third less CPU (gRPC 1.85, two cores): load
# that competes less with what is measured. What the server sees is the same.
GENERATOR_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client"}


@dataclass(frozen=True, slots=True)
class Server:
    """What is under load."""

    child: Child
    target: str  # host:port of its gRPC door
    metrics_url: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen in one window."""

    began_at: float  # Unix
    agents: tuple[AgentsReport, ...]
    clients: tuple[ClientsReport, ...]
    server: Used
    agents_used: Used
    clients_used: Used


class Rig:
    """Starts the processes of a bench and measures them together."""

    def __init__(self, children: Children, folder: Path, progress: Progress) -> None:
        self._children = children
        self._folder = folder
        self._progress = progress

    async def start_aggregator(self) -> Server:
        """Start the aggregator on an empty ledger and free ports; return it once it serves."""
        self._progress.tell("starting the aggregator")
        data_dir = self._folder / "data"
        child = await self._children.start(
            "the aggregator",
            "stoker.aggregator",
            ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", f"--data-dir={data_dir}"],
        )
        running = await _told(child, data_dir / "aggregator.json")
        return Server(child, running["listen"], f"http://{running['metrics']}/metrics")

    async def start_bare(self, frames_per_ack: int) -> Server:
        """Start a server that only acknowledges, that many frames at a time."""
        self._progress.tell("starting the bare server")
        child = await self._children.start(
            "the bare server", "stoker.testing.load_bare", [str(frames_per_ack)]
        )
        said = await child.hear()
        assert isinstance(said, Listening), said
        return Server(child, f"127.0.0.1:{said.port}")

    async def start_agents(
        self, target: str, *, nodes: int, gpus: int, hz: float, seed: int
    ) -> list[Child]:
        """Start the generators of `nodes` agents; return them once all agents are connected."""
        count = min(math.ceil(nodes / AGENTS_PER_GENERATOR_MAX), nodes)
        firsts = [nodes * each // count for each in range(count + 1)]
        children: list[Child] = []
        for first, end in itertools.pairwise(firsts):
            plan = AgentsPlan(target, first, end - first, nodes, gpus, hz, seed)
            name = f"the generator of agents {first} to {end - 1}"
            child = await self._start_generator(name, "stoker.testing.load_agents", plan)
            children.append(child)
            connected = 0
            while connected < end - first:
                said = await child.hear()
                assert isinstance(said, Connected), said
                connected = said.count
                self._progress.tell(f"connecting agents: {first + connected} of {nodes}")
        return children

    async def start_clients(self, plan: ClientsPlan) -> Child:
        """Start the clients; return them once they are connected."""
        child = await self._start_generator(
            "the generator of requests", "stoker.testing.load_clients", plan
        )
        said = await child.hear()
        assert isinstance(said, Connected), said
        return child

    async def _start_generator(self, name: str, module: str, plan: object) -> Child:
        argument = msgspec.json.encode(plan).decode()
        return await self._children.start(name, module, [argument], GENERATOR_ENVIRONMENT)

    async def measure(
        self,
        what: str,
        seconds: float,
        server: Server,
        agents: Sequence[Child],
        clients: Sequence[Child] = (),
    ) -> Measured:
        """Let all go on for `seconds`, after a warm-up, and return what each counted and used."""
        begins_at = time.monotonic() + WARM_UP_SECONDS
        window = Measure(begins_at, begins_at + seconds)
        for child in (*agents, *clients):
            child.tell(window)
        await self._progress.wait_until(window.begins_at, "warming up")
        began_at = time.time()
        groups = ((server.child,), agents, clients)
        before = [_usage(group) for group in groups]
        await self._progress.wait_until(window.ends_at, what)
        after = [_usage(group) for group in groups]
        wall_seconds = time.monotonic() - begins_at
        self._progress.tell("waiting for what is under way")
        said = await asyncio.gather(*(child.hear() for child in (*agents, *clients)))
        server_used, agents_used, clients_used = (
            Used(late.cpu_seconds - early.cpu_seconds, wall_seconds, late.rss_bytes)
            for early, late in zip(before, after, strict=True)
        )
        return Measured(
            began_at,
            tuple(each for each in said if isinstance(each, AgentsReport)),
            tuple(each for each in said if isinstance(each, ClientsReport)),
            server_used,
            agents_used,
            clients_used,
        )

    async def look(
        self, server: Server, agents: Sequence[Child]
    ) -> tuple[list[Look], AgentsReport]:
        """Ask as a client for the whole fleet a few times, while the agents go on.

        Returns what was shown, and what the agents sent meanwhile. Raises ClientError.
        """
        self._progress.tell("looking at what a client is shown")
        begins_at = time.monotonic()
        seconds = LOOKS_SETTLE_SECONDS + LOOKS * LOOKS_SECONDS_APART
        window = Measure(begins_at, begins_at + seconds, with_sends=True)
        for child in agents:
            child.tell(window)
        looks: list[Look] = []
        await asyncio.sleep(LOOKS_SETTLE_SECONDS)
        async with connect_async(server.target) as fleet:
            for _ in range(LOOKS):
                asked_at = time.monotonic()
                nodes = (await fleet.nodes()).nodes
                looks.append(Look(asked_at, {node.name: node.last_sample_at for node in nodes}))
                await asyncio.sleep(LOOKS_SECONDS_APART)
        said = await asyncio.gather(*(child.hear() for child in agents))
        return looks, merge_agents([each for each in said if isinstance(each, AgentsReport)])


def _usage(children: Sequence[Child]) -> Usage:
    used = [child.usage() for child in children]
    return Usage(sum(each.cpu_seconds for each in used), sum(each.rss_bytes for each in used))


async def _told(child: Child, path: Path) -> dict[str, str]:
    """Return what a daemon writes into that file once it serves; raises ChildFailed."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while (told := _read(path)) is None:
        child.check()
        if time.monotonic() >= deadline:
            raise ChildFailed(f"{child.name} does not serve after {START_SECONDS_MAX:g} s")
        await asyncio.sleep(_PAUSE_SECONDS)
    return told


def _read(path: Path) -> dict[str, str] | None:
    try:
        told: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return told
