"""`stoker up`: an aggregator and agents, of this machine or simulated, in one command."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stoker.aggregator.ports import check_free
from stoker.cli import up_plan
from stoker.cli.children import Child
from stoker.cli.settings import Settings, json_option
from stoker.cli.text import one_line
from stoker.cli.up_plan import NodePlan, Options
from stoker.client import AsyncFleet, ClientError, Node, NodeState
from stoker.client.errors import Unreachable
from stoker.core.addresses import parse_address
from stoker.core.clock import SystemClock
from stoker.core.errors import ExitCode, Missing, StoreError

# From an agent's start to its first sample at the aggregator: drivers take their time.
READY_SECONDS_MAX = 90.0
# Drivers that nothing keeps loaded take seconds for each card.
PROBE_SECONDS_MAX = 60.0
_LOOK_SECONDS = 0.2
TARGETS_NAME = "prometheus-targets.json"


@click.command()
@json_option
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where state is kept.")
@click.option(
    "--simulate",
    multiple=True,
    metavar="SPEC",
    help="Simulated GPUs instead of this machine's, such as 8xH100-80GB; repeat it for more nodes.",
)
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="So many simulated nodes.")
@click.option("--or-simulate", metavar="SPEC", help="Simulate where there is no NVML library.")
@click.option("--listen", default="127.0.0.1:7070", show_default=True, metavar="HOST:PORT")
@click.option(
    "--metrics-listen",
    default="127.0.0.1:9410",
    show_default=True,
    metavar="HOST:PORT",
    help="Of the first node; others take free ports.",
)
@click.option(
    "--aggregator-metrics-listen",
    default="127.0.0.1:9411",
    show_default=True,
    metavar="HOST:PORT",
)
@click.option("--insecure", is_flag=True, help="Allow to listen beyond this machine.")
@click.option("--log-level", default="warning", show_default=True, metavar="LEVEL")
@click.pass_obj
def up(
    settings: Settings,
    /,
    data_dir: Path | None,
    simulate: tuple[str, ...],
    nodes: int | None,
    or_simulate: str | None,
    **addresses: Any,
) -> int:
    """Bring up a fleet on this machine and keep it up until Ctrl-C.

    It starts an aggregator and the agent of this machine, or with --simulate an agent for each
    simulated node, and says "ready" when every node is. What crashes is started again.
    """
    if settings.address is not None:
        raise click.UsageError("--address: an aggregator is started, see --listen")
    options = Options(
        data_dir=(data_dir or up_plan.default_up_dir(os.environ)).absolute(), **addresses
    )
    notice = ""
    specs: Sequence[str] = simulate
    if not simulate:
        lacking = _find_lack()
        if lacking is not None:
            if or_simulate is None:
                raise Missing(lacking["text"])
            specs = (or_simulate,)
            notice = up_plan.fallback_notice(lacking["kind"], or_simulate)
    plan = up_plan.plan_nodes(specs, nodes, options.metrics_listen)
    for address, flag in (
        (options.listen, "--listen"),
        (options.aggregator_metrics_listen, "--aggregator-metrics-listen"),
        (options.metrics_listen, "--metrics-listen"),
    ):
        check_free(parse_address(address, flag), flag)
    if notice and not settings.json:
        print(notice, flush=True)
    return asyncio.run(Fleet(options, plan, is_json=settings.json, notice=notice).run())


def _find_lack() -> dict[str, Any] | None:
    """Return what this machine lacks for NVML to work; None: let the agent see for itself."""
    command = [sys.executable, "-P", "-m", "stoker.cli.probe"]
    probe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        output, _ = probe.communicate(timeout=PROBE_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        # Not waited for: a process that hangs in the driver may not even take a SIGKILL.
        probe.kill()
        return None
    if probe.returncode != 0:
        return None
    found: dict[str, Any] = json.loads(output)
    return found if found.get("is_missing") else None


class Fleet:
    """What is up. `run` returns when SIGINT or SIGTERM has come and everything has ended."""

    def __init__(
        self, options: Options, plan: Sequence[NodePlan], *, is_json: bool, notice: str
    ) -> None:
        self._options = options
        self._plan = plan
        self._is_json = is_json
        self._notice = notice
        self._clock = SystemClock()
        self._aggregator: Child | None = None
        self._agents: list[Child] = []

    async def run(self) -> int:
        """Bring everything up, keep it up, take it down."""
        stopped = asyncio.Event()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
        stopping = asyncio.create_task(stopped.wait())
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait({stopping, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # it ends only by an error
            _say("stopping")
        finally:
            stopping.cancel()
            work.cancel()
            await asyncio.wait({stopping, work})
            await self._take_down()
        return ExitCode.OK

    async def _work(self) -> None:
        try:
            (self._options.data_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = error.strerror
            raise StoreError(f"{self._options.data_dir}: cannot be made: {found}") from error
        listen, aggregator_metrics = await self._begin_aggregator()
        agents = dict(
            await asyncio.gather(*(self._begin_agent(node, listen) for node in self._plan))
        )
        targets = self._write_targets(aggregator_metrics, agents)
        nodes = await self._await_ready(listen, set(agents))
        self._announce(listen, nodes, [aggregator_metrics, *agents.values()], targets)
        children = [*self._agents, *([self._aggregator] if self._aggregator else [])]
        await asyncio.gather(*(child.keep_running() for child in children))

    async def _begin_aggregator(self) -> tuple[str, str]:
        """Start the aggregator; returns its address and that of its metrics."""
        options, folder = self._options, self._options.data_dir / "aggregator"
        command = up_plan.aggregator_command(
            options, folder, options.listen, options.aggregator_metrics_listen
        )
        child = Child(
            "aggregator", command, folder / "aggregator.json", clock=self._clock, say=_say
        )
        self._aggregator = child
        said = await child.begin()
        listen, metrics = str(said["listen"]), str(said["metrics"])
        # Started again, it takes the same ports: agents and clients know them.
        child.command = up_plan.aggregator_command(options, folder, listen, metrics)
        return up_plan.dialled(listen), up_plan.dialled(metrics)

    async def _begin_agent(self, node: NodePlan, aggregator: str) -> tuple[str, str]:
        """Start an agent; returns the name of its node and the address of its metrics."""
        options, folder = self._options, self._options.data_dir / "agents" / (node.name or "host")
        command = up_plan.agent_command(options, node, folder, aggregator, node.metrics_listen)
        name = f"agent {node.name}" if node.name else "agent"
        child = Child(name, command, folder / "agent.json", clock=self._clock, say=_say)
        self._agents.append(child)
        said = await child.begin()
        metrics = str(said["metrics"])
        child.command = up_plan.agent_command(options, node, folder, aggregator, metrics)
        return str(said["node"]), up_plan.dialled(metrics)

    def _write_targets(self, aggregator: str, agents: dict[str, str]) -> Path:
        path = self._options.data_dir / TARGETS_NAME
        fresh = path.with_suffix(".new")
        targets = up_plan.prometheus_targets(aggregator, agents)
        # Prometheus reads it whenever it changes, so it is never there by halves.
        fresh.write_text(json.dumps(targets, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
        return path

    async def _await_ready(self, address: str, names: set[str]) -> dict[str, Node]:
        """Return the nodes once all are ready; raises Unreachable, or ChildFailed."""
        deadline = self._clock.monotonic() + READY_SECONDS_MAX
        lacking = "no answer yet"
        async with AsyncFleet(address) as fleet:
            while self._clock.monotonic() < deadline:
                for child in (*self._agents, self._aggregator):
                    if child is not None:
                        child.check()
                try:
                    found = {node.name: node for node in (await fleet.nodes()).nodes}
                except ClientError as error:
                    lacking = str(error)
                else:
                    wanted = {name: found.get(name) for name in sorted(names)}
                    ready = {n: node for n, node in wanted.items() if node and _is_ready(node)}
                    if ready.keys() == names:
                        return ready
                    lacking = "; ".join(
                        _lack(n, node) for n, node in wanted.items() if n not in ready
                    )
                await self._clock.sleep(_LOOK_SECONDS)
        raise Unreachable(f"not ready after {READY_SECONDS_MAX:g} s: {lacking}")

    def _announce(
        self, address: str, nodes: dict[str, Node], metrics: list[str], targets: Path
    ) -> None:
        if self._is_json:
            ready = {
                "ready": True,
                "address": address,
                "notice": self._notice or None,
                "nodes": [{"name": n, "simulated": nodes[n].simulated} for n in nodes],
                "metrics": [f"http://{each}/metrics" for each in metrics],
                "data_dir": str(self._options.data_dir),
                "prometheus_targets": str(targets),
            }
            print(json.dumps(ready), flush=True)
            return
        described = {name: _describe(node) for name, node in nodes.items()}
        for line in up_plan.ready_lines(_program(), address, described, metrics, targets):
            print(one_line(line), flush=True)

    async def _take_down(self) -> None:
        """End the agents, then the aggregator, so that it sees them go."""
        await asyncio.gather(*(agent.stop() for agent in self._agents))
        if self._aggregator is not None:
            await self._aggregator.stop()


def _is_ready(node: Node) -> bool:
    return node.state is NodeState.READY


def _lack(name: str, node: Node | None) -> str:
    if node is None:
        return f"node {name} is not known"
    return f"node {name} is {node.state}: {node.state_reason}"


def _describe(node: Node) -> str:
    counts: dict[str, int] = {}
    for gpu in node.gpus:
        counts[gpu.model] = counts.get(gpu.model, 0) + 1
    gpus = ", ".join(f"{count} x {model}" for model, count in counts.items()) or "no GPUs"
    return f"{gpus}, SIMULATED" if node.simulated else gpus


def _program() -> str:
    """Return how to call this program from the current folder."""
    found = shutil.which("stoker")
    if found is not None and Path(found).resolve() == Path(sys.argv[0]).resolve():
        return "stoker"
    if os.access(sys.argv[0], os.X_OK):
        return os.path.relpath(sys.argv[0])
    return f"{sys.executable} -m stoker.cli"


def _say(text: str) -> None:
    print(f"stoker: {one_line(text)}", file=sys.stderr, flush=True)
