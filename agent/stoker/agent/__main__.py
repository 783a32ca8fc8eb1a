"""The command `stoker-agent`: reads its options, puts the agent together, and runs it."""

import os
from importlib.metadata import version

# Read by gRPC when it is loaded, so it stands before what loads it. The newer of its two ways to
# wait for sockets costs an agent an eighth of its CPU more (docs/benchmarks.md). Measured with
# 1.85; later ones do as they do.
if version("grpcio").startswith("1.85."):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")

import argparse
import asyncio
import contextlib
import json
import logging
import pwd
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from random import Random

import uvloop

from stoker.agent.attribution import kubernetes, slurm
from stoker.agent.attribution.resolver import Attribution
from stoker.agent.config import ENVIRONMENT_PREFIX, AgentConfig, Settings, load
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import DcgmEngine, DriverSource, RealDriver, SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Patience
from stoker.agent.host_facts import read_host, simulated_host
from stoker.agent.journal import Journal
from stoker.agent.local import LocalDoor
from stoker.agent.metrics.exporter import MetricsServer
from stoker.agent.mig.journal import MigJournal
from stoker.agent.mig.stepping import available_stepper
from stoker.agent.model import Host, NodeIdentity
from stoker.agent.privileged import Helper
from stoker.agent.proctable import ProcTable
from stoker.core.clock import SystemClock
from stoker.core.config import defaults_yaml
from stoker.core.daemons import DaemonParser, flags_of, set_up_logging
from stoker.core.errors import ExitCode, StokerError, StoreError
from stoker.core.gpu_models import parse_simulate_spec
from stoker.core.sdnotify import Notifier

# Where a running agent says how to reach it: {"pid", "node", "metrics", "socket"}.
RUNNING_NAME = "agent.json"
# How simulated GPUs are partitioned, which the card itself would remember.
MIG_STATE_NAME = "simulated-mig.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("stoker.agent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.print_defaults:
        sys.stdout.write(defaults_yaml(AgentConfig))
        return ExitCode.OK
    try:
        settings = load(options.config, os.environ, flags_of(options))
        set_up_logging(settings.log_level)
        uvloop.run(_run(settings))
    except StokerError as error:
        sys.stderr.write(f"stoker-agent: {error}\n")
        return error.exit_code
    return ExitCode.OK


async def _run(settings: Settings) -> None:
    with contextlib.ExitStack() as opened:
        journal = Journal.open(settings.data_dir)
        opened.callback(journal.close)
        door = LocalDoor.open(settings.socket)
        opened.callback(door.close)
        clock = SystemClock()
        patience = Patience(call_seconds=settings.call_timeout_seconds)
        helper = Helper(settings.helper_socket)
        agent = Agent(
            settings,
            _identity(settings),
            journal=journal,
            mig_journal=MigJournal(settings.data_dir),
            stepper=available_stepper(helper, _source(settings)),
            host=DriverHost(_source(settings), patience=patience, clock=clock),
            door=door,
            user=_user_name(),
            proctable=ProcTable(),
            helper=helper,
            attribution=_attribution(settings, helper),
            notifier=Notifier(),
            clock=clock,
            rng=Random(),
        )
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, agent.stop)
        server = MetricsServer(settings.metrics_listen, agent.snapshot, settings.metrics)
        running = settings.data_dir / RUNNING_NAME
        try:
            _announce(running, settings, server)
            await agent.run()
        finally:
            running.unlink(missing_ok=True)
            await asyncio.to_thread(server.close)
    _log.info("stopped")


def _user_name() -> str:
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # such as in a container that is run as a bare number
        return str(uid)


def _identity(settings: Settings) -> NodeIdentity:
    return NodeIdentity(
        node=settings.node,
        agent_version=version("stoker"),
        boot_id=_BOOT_ID.read_text(encoding="ascii").strip(),
        simulated=bool(settings.simulate),
        pool=settings.pool,
        labels=settings.labels,
        interval_seconds=settings.interval_seconds,
        process_id=uuid.uuid4().hex,
        host=_host(settings),
    )


def _host(settings: Settings) -> Host | None:
    if not settings.simulate:
        return read_host()
    return simulated_host(
        model for count, model in map(parse_simulate_spec, settings.simulate) for _ in range(count)
    )


def _source(settings: Settings) -> DriverSource:
    engine, interval = settings.dcgm, settings.interval_seconds
    dcgm = DcgmEngine(engine.address, engine.bindings, interval) if engine.address else None
    if not settings.simulate:
        return RealDriver(dcgm=dcgm)
    scenario = None if settings.scenario is None else str(settings.scenario)
    return SimulatedDriver(
        settings.simulate,
        settings.node,
        settings.seed,
        scenario,
        dcgm=dcgm,
        mig_state_path=str(settings.data_dir / MIG_STATE_NAME),
    )


def _attribution(settings: Settings, helper: Helper) -> Attribution:
    """Return who tells whose a process is; nobody else hands out simulated GPUs, unless told."""
    given, is_simulated = settings.pod_resources_socket, bool(settings.simulate)
    usual = None if is_simulated or settings.is_kubelet_ignored else kubernetes.SOCKET
    return Attribution(
        helper=helper,
        pod_resources=given or usual,
        is_pod_resources_required=given is not None,
        cgroup_root=None if is_simulated else slurm.CGROUPS,
    )


def _announce(path: Path, settings: Settings, server: MetricsServer) -> None:
    facts = {
        "pid": os.getpid(),
        "node": settings.node,
        "metrics": str(server.address),
        "socket": str(settings.socket),
    }
    fresh = path.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = DaemonParser(
        "stoker-agent",
        "Reads the GPUs of this host, holds what was granted on them, reports up.",
        ENVIRONMENT_PREFIX,
    )
    add = parser.add_argument
    add("--node", metavar="NAME", help="name of this node (default: the host name)")
    add("--aggregator", action="append", metavar="HOST:PORT", help="repeatable; tried in turn")
    add("--pool", metavar="NAME", help="the pool that this node belongs to")
    add("--label", action="append", dest="labels", metavar="KEY=VALUE", help="repeatable")
    add("--interval", dest="interval_seconds", metavar="DURATION", help="between two samples")
    add(
        "--processes-interval",
        dest="processes_interval_seconds",
        metavar="DURATION",
        help="between two readings of processes",
    )
    add(
        "--slow-interval",
        dest="slow_interval_seconds",
        metavar="DURATION",
        help="between two readings of what changes slowly or costs much",
    )
    add(
        "--call-timeout",
        dest="call_timeout_seconds",
        metavar="DURATION",
        help="after which a call into the driver counts as hung",
    )
    add("--socket", metavar="FILE", help="where `stoker agent` commands are answered")
    add("--helper-socket", metavar="FILE", help="where the root helper answers")
    add("--simulate", action="append", metavar="COUNTxMODEL", help="repeatable; such as 2xT4")
    add("--seed", metavar="NUMBER", help="which simulated node, of many that look alike")
    add("--scenario", metavar="FILE", help="what happens on the simulated GPUs (JSON)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
