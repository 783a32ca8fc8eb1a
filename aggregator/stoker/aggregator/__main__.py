"""The command `stoker-aggregator`: reads its options, puts the aggregator together, and runs it."""

import os
from importlib.metadata import version

# Read by gRPC when it is loaded, so it stands before what loads it. The newer of its two ways to
# wait for sockets hands every message through more threads: 15 switches of thread per frame against
# 8, and half as much CPU again (docs/benchmarks.md). Measured with 1.85; later ones do as they do.
if version("grpcio").startswith("1.85."):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Sequence

import uvloop

from stoker.aggregator.config import (
    ENVIRONMENT_PREFIX,
    AggregatorConfig,
    Settings,
    load,
)
from stoker.aggregator.server import Aggregator
from stoker.core.clock import SteadyClock
from stoker.core.config import defaults_yaml
from stoker.core.daemons import COLLECTOR_THRESHOLDS, DaemonParser, flags_of, set_up_logging
from stoker.core.errors import ExitCode, StokerError
from stoker.core.sdnotify import Notifier

# The writer's thread wants the interpreter for a moment at each step of a commit; a busy loop would
# let it wait five milliseconds every time.
_SWITCH_SECONDS = 0.001

_log = logging.getLogger("stoker.aggregator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the aggregator until SIGTERM or SIGINT; return the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.print_defaults:
        sys.stdout.write(defaults_yaml(AggregatorConfig))
        return ExitCode.OK
    try:
        settings = load(options.config, os.environ, flags_of(options))
        set_up_logging(settings.log_level)
        gc.freeze()  # modules stay
        gc.set_threshold(*COLLECTOR_THRESHOLDS)
        sys.setswitchinterval(_SWITCH_SECONDS)
        uvloop.run(run(settings))
    except StokerError as error:
        sys.stderr.write(f"stoker-aggregator: {error}\n")
        return error.exit_code
    return ExitCode.OK


async def run(settings: Settings) -> None:
    """Run an aggregator until SIGTERM or SIGINT; raises StokerError."""
    aggregator = Aggregator(
        settings, version=version("stoker"), clock=SteadyClock(), notifier=Notifier()
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, aggregator.stop)
    await aggregator.run()
    _log.info("stopped")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = DaemonParser(
        "stoker-aggregator",
        "Knows the fleet, grants its GPUs, keeps the ledger, exports metrics.",
        ENVIRONMENT_PREFIX,
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="where agents and clients dial")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
