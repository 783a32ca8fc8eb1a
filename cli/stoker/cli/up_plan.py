"""What `stoker up` starts and says, as values: nodes, command lines, targets, texts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.core.addresses import Address, parse_address
from stoker.core.errors import BadInput
from stoker.core.gpu_models import parse_simulate_spec

ANY_PORT = "127.0.0.1:0"
# Real processes, each with its Python.
NODES_MAX = 256


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    data_dir: Path
    listen: str
    aggregator_metrics_listen: str
    metrics_listen: str  # of the first node; the others take free ports
    log_level: str
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node to start."""

    name: str | None  # None: the agent takes the host's name
    simulate: str | None  # such as 8xH100-80GB; None: this machine's GPUs
    metrics_listen: str


def plan_nodes(
    simulate: Sequence[str], count: int | None, metrics_listen: str
) -> tuple[NodePlan, ...]:
    """Return the nodes: one for each spec, or `count` of the only one; without specs, this machine.

    Raises BadInput.
    """
    if not simulate:
        if count not in (None, 1):
            raise BadInput(
                f"--nodes {count}: this machine's GPUs are one node; --simulate SPEC makes more"
            )
        return (NodePlan(None, None, metrics_listen),)
    for spec in simulate:
        parse_simulate_spec(spec)
    if count is not None and len(simulate) > 1 and count != len(simulate):
        raise BadInput(f"--nodes {count}: --simulate is given {len(simulate)} times, once per node")
    specs = list(simulate) if count is None or len(simulate) > 1 else [simulate[0]] * count
    if len(specs) > NODES_MAX:
        raise BadInput(f"--nodes: wanted at most {NODES_MAX}, found {len(specs)}")
    return tuple(
        NodePlan(f"sim-{number}", spec, metrics_listen if number == 1 else ANY_PORT)
        for number, spec in enumerate(specs, 1)
    )


def aggregator_command(options: Options, folder: Path, listen: str, metrics: str) -> list[str]:
    """Return the command line of the aggregator."""
    return [
        *_python("stoker.aggregator"),
        *("--data-dir", str(folder), "--listen", listen, "--metrics-listen", metrics),
        *_common(options),
    ]


def default_up_dir(environ: Mapping[str, str]) -> Path:
    """Return where `stoker up` keeps its state unless it is told."""
    state = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or ".", ".local", "state")
    return Path(state, "stoker")


def agent_command(
    options: Options, node: NodePlan, folder: Path, aggregator: str, metrics: str
) -> list[str]:
    """Return the command line of an agent."""
    simulate = [] if node.simulate is None else ["--simulate", node.simulate]
    name = [] if node.name is None else ["--node", node.name]
    return [
        *_python("stoker.agent"),
        *("--data-dir", str(folder), "--aggregator", aggregator, "--metrics-listen", metrics),
        *name,
        *simulate,
        *_common(options),
    ]


def _python(module: str) -> list[str]:
    # -P: a file in the current folder must not take the place of a module.
    return [sys.executable, "-P", "-m", module]


def _common(options: Options) -> list[str]:
    return ["--log-level", options.log_level, *(["--insecure"] if options.insecure else [])]


def dialled(listen: str) -> str:
    """Return where this machine reaches what listens there: everywhere means on loopback too."""
    address = parse_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return str(Address(host, address.port))


def fallback_notice(kind: str, spec: str) -> str:
    """Return the first line of an `up` that found no NVML and simulates instead."""
    count, model = parse_simulate_spec(spec)
    found = {
        "library_missing": "no NVML library (libnvidia-ml.so.1) was found",
        "driver_not_loaded": "libnvidia-ml.so.1 was found, but the NVIDIA driver is not loaded",
    }
    what = found.get(kind, f"NVML cannot be used ({kind})")
    return f"{what}: the node shown is SIMULATED, {count} x {model.name}"


def prometheus_targets(aggregator: str, agents: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the document for Prometheus' file_sd: the aggregator and every agent by node."""
    targets = [{"targets": [aggregator], "labels": {"job": "stoker-aggregator"}}]
    for node, address in agents.items():
        labels = {"job": "stoker-agent", "node": node}
        targets.append({"targets": [address], "labels": labels})
    return targets


def ready_lines(
    program: str, address: str, nodes: Mapping[str, str], metrics: Sequence[str], targets: Path
) -> list[str]:
    """Return what is said when everything is up; `nodes` tells of each node what it has."""
    named = program if address == "127.0.0.1:7070" else f"{program} --address {address}"
    lines = [f"ready: aggregator at {address}, {len(nodes)} node{'s' * (len(nodes) != 1)}"]
    lines += [f"  {name}: {what}" for name, what in list(nodes.items())[:8]]
    if len(nodes) > 8:
        lines.append(f"  and {len(nodes) - 8} more")
    pages = zip(("aggregator", "first agent"), metrics, strict=False)
    lines += [f"  metrics of the {whose}: http://{each}/metrics" for whose, each in pages]
    lines += [
        f"  all of them, for Prometheus: {targets}",
        "try in another terminal:",
        f"  {named} status",
        f"  {named} alloc --gpus 1 -- printenv CUDA_VISIBLE_DEVICES",
        f"  {named} top",
    ]
    return lines
