"""The command `stoker-agent`: reads its options, puts the agent together, and runs it."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random

import uvloop

from stoker.agent.config import ENVIRONMENT_PREFIX, AgentConfig, Settings, load
from stoker.agent.daemon import Agent
from stoker.agent.driver_frames import DriverSource, RealDriver, SimulatedDriver
from stoker.agent.driver_link import DriverHost
from stoker.agent.exporter import MetricsServer
from stoker.agent.journal import Journal
from stoker.agent.model import NodeIdentity
from stoker.agent.proctable import ProcTable
from stoker.core.clock import SystemClock
from stoker.core.config import defaults_yaml
from stoker.core.daemons import DaemonParser, flags_of, set_up_logging
from stoker.core.errors import ExitCode, StokerError, StoreError
from stoker.core.sdnotify import Notifier

# Where a running agent says how to reach it: {"pid", "node", "metrics"}.
RUNNING_NAME = "agent.json"
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
    journal = Journal.open(settings.data_dir)
    try:
        clock = SystemClock()
        agent = Agent(
            settings,
            _identity(settings),
            journal=journal,
            host=DriverHost(_source(settings), clock=clock),
            proctable=ProcTable(),
            notifier=Notifier(),
            clock=clock,
            rng=Random(),
        )
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, agent.stop)
        server = MetricsServer(settings.metrics_listen, agent.snapshot)
        running = settings.data_dir / RUNNING_NAME
        try:
            _announce(running, settings, server)
            await agent.run()
        finally:
            running.unlink(missing_ok=True)
            await asyncio.to_thread(server.close)
    finally:
        journal.close()
    _log.info("stopped")


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
    )


def _source(settings: Settings) -> DriverSource:
    if not settings.simulate:
        return RealDriver()
    scenario = None if settings.scenario is None else str(settings.scenario)
    return SimulatedDriver(settings.simulate, settings.node, settings.seed, scenario)


def _announce(path: Path, settings: Settings, server: MetricsServer) -> None:
    facts = {"pid": os.getpid(), "node": settings.node, "metrics": str(server.address)}
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
    add("--simulate", action="append", metavar="COUNTxMODEL", help="repeatable; such as 2xT4")
    add("--seed", metavar="NUMBER", help="which simulated node, of many that look alike")
    add("--scenario", metavar="FILE", help="what happens on the simulated GPUs (JSON)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
