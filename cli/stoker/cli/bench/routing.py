"""`stoker bench routing`: calls of a service of which one replica is slow, by policy."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.cli.bench.children import Child, Children
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.progress import Progress
from stoker.cli.bench.rig import GENERATOR_ENVIRONMENT, Rig, Server
from stoker.cli.bench.routing_figures import (
    Policies,
    PolicyFigures,
    RoutingReport,
    objections,
    p99_ratio,
    policy_figures,
)
from stoker.testing.load import Connected, Listening, Measure
from stoker.testing.replica_messages import CallsPlan, CallsReport, ReplicaPlan

SERVICE = "bench"
# Until weights have followed what was observed: some half-lives of it.
WARM_UP_SECONDS = 6.0
AGENT_HZ = 1.0


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """What to measure."""

    replicas: int
    slots: int
    call_seconds: float
    slow_factor: float
    rate: float
    seconds: float
    seed: int


async def measure_routing(
    options: RoutingOptions, folder: Path, progress: Progress
) -> RoutingReport:
    """Measure one policy after the other on the same replicas, and report; raises ChildFailed."""
    began_at = time.time()
    async with Children(folder) as children:
        rig = Rig(children, folder, progress)
        server = await rig.start_aggregator()
        # A node for each replica, so that each has GPUs with a load of their own.
        await rig.start_agents(
            server.target, nodes=options.replicas, gpus=1, hz=AGENT_HZ, seed=options.seed
        )
        progress.tell("starting the replicas")
        addresses = [
            await _start_replica(children, server, options, number)
            for number in range(options.replicas)
        ]
        figures: dict[str, PolicyFigures] = {}
        for policy in ("round_robin", "stoker"):
            report = await _measure(children, server, options, policy, progress)
            figures[policy] = policy_figures(report, addresses)
    return _report(options, folder, Policies(**figures), began_at)


async def _start_replica(
    children: Children, server: Server, options: RoutingOptions, number: int
) -> str:
    """Return where it is called, once it is an endpoint; the first is the slowed one."""
    slowness = options.slow_factor if number == 0 else 1.0
    plan = ReplicaPlan(
        server.target,
        SERVICE,
        options.call_seconds * slowness,
        options.slots,
        is_random=True,
        seed=options.seed + number,
    )
    child = await _start(children, f"replica {number}", "stoker.testing.replicas", plan)
    said = await child.hear()
    assert isinstance(said, Listening), said
    return f"127.0.0.1:{said.port}"


async def _measure(
    children: Children,
    server: Server,
    options: RoutingOptions,
    policy: str,
    progress: Progress,
) -> CallsReport:
    plan = CallsPlan(server.target, SERVICE, policy, options.rate, options.seed)
    child = await _start(children, "the callers", "stoker.testing.load_calls", plan)
    connected = await child.hear()
    assert isinstance(connected, Connected), connected
    begins_at = time.monotonic() + WARM_UP_SECONDS
    window = Measure(begins_at, begins_at + options.seconds)
    child.tell(window)
    await progress.wait_until(window.begins_at, f"warming up {policy}")
    await progress.wait_until(window.ends_at, f"measuring {policy}")
    progress.tell("waiting for what is under way")
    report = await child.hear()
    assert isinstance(report, CallsReport), report
    await child.stop()
    return report


async def _start(children: Children, name: str, module: str, plan: object) -> Child:
    argument = msgspec.json.encode(plan).decode()
    return await children.start(name, module, [argument], GENERATOR_ENVIRONMENT)


def _report(
    options: RoutingOptions, folder: Path, policies: Policies, began_at: float
) -> RoutingReport:
    found: Sequence[str] = [
        *objections("round robin", policies.round_robin),
        *objections("stoker", policies.stoker),
    ]
    return RoutingReport(
        replicas=options.replicas,
        slots=options.slots,
        call_seconds=options.call_seconds,
        slow_factor=options.slow_factor,
        rate=options.rate,
        seconds=options.seconds,
        policies=policies,
        p99_ratio=p99_ratio(policies),
        valid=not found,
        invalid_reasons=tuple(found),
        at=utc_text(began_at),
        machine=describe_machine(folder),
    )
