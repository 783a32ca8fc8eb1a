"""`stoker bench`: measures the real daemons, all on this machine."""

import asyncio
import contextlib
import importlib.util
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stoker.cli.settings import Settings, json_option
from stoker.core.errors import BadInput, Missing
from stoker.core.gpu_models import GPUS_PER_NODE_MAX

if TYPE_CHECKING:
    from stoker.cli.bench.figures import AllocateReport, IngestReport
    from stoker.cli.bench.sampling import SamplingFigures

T = TypeVar("T")

# Of the daemons' extras; `stoker[cli]` alone has none of them.
_NEEDED = ("grpc_health", "prometheus_client", "psutil", "sqlite_utils", "uvloop")

NODES_MAX = 20_000
HZ_MAX = 100.0
SECONDS_MAX = 3600.0
RATE_MAX = 100_000.0
SWEEPS_MAX = 1_000_000
SWEEP_INTERVAL_SECONDS_MAX = 60.0


@click.group()
def bench() -> None:
    """Measure the real daemons, all on this machine.

    What is measured runs in processes apart from what loads it, so that what it uses is told apart
    from what they use. Progress goes to standard error.
    """
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise Missing(f"bench runs the daemons, and {', '.join(lacking)} is not here: stoker[all]")


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every bench has."""
    options: tuple[Callable[[Any], Any], ...] = (
        json_option,
        click.option(
            "--data-dir",
            type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
            help="Where to make the temporary folder with the ledger: a commit waits for its disk.",
        ),
        click.option("--seed", default=1, show_default=True, help="Of all that is random."),
        click.option("--seconds", default=20.0, show_default=True, help="How long to measure."),
        click.option(
            "--hz", default=1.0, show_default=True, help="Samples a second that a node sends."
        ),
        click.option("--gpus", default=8, show_default=True, help="GPUs of every node."),
        click.option("--nodes", default=1000, show_default=True, help="Agents."),
    )
    for option in options:
        command = option(command)
    return command


@bench.command()
@_common
@click.option(
    "--bare/--no-bare",
    default=True,
    show_default=True,
    help="Measure a server that only acknowledges too, to compare with.",
)
@click.pass_obj
def ingest(
    settings: Settings,
    nodes: int,
    gpus: int,
    hz: float,
    seconds: float,
    seed: int,
    data_dir: Path | None,
    *,
    bare: bool,
) -> None:
    """What it costs the aggregator to take in the frames of a fleet."""
    from stoker.cli.bench.ingestion import IngestOptions, measure_ingestion
    from stoker.cli.bench.progress import Progress

    _check_common(nodes, gpus, hz, seconds)
    options = IngestOptions(nodes, gpus, hz, seconds, bare, seed)
    progress = Progress()
    with _folder(data_dir) as folder, progress.shown():
        report = _run(measure_ingestion(options, folder, progress))
    _print(report, settings)


@bench.command()
@_common
@click.option("--rate", default=500.0, show_default=True, help="Requests a second.")
@click.pass_obj
def allocate(
    settings: Settings,
    nodes: int,
    gpus: int,
    hz: float,
    rate: float,
    seconds: float,
    seed: int,
    data_dir: Path | None,
) -> None:
    """How fast GPUs are granted, durably, while a fleet sends its frames.

    Requests arrive at random, whatever the answers do; each asks for one GPU, holds it for a short
    while and gives it back. A latency counts from when its request was due.
    """
    from stoker.cli.bench.allocation import AllocateOptions, measure_allocation
    from stoker.cli.bench.progress import Progress

    _check_common(nodes, gpus, hz, seconds)
    _check("--rate", rate, RATE_MAX)
    options = AllocateOptions(nodes, gpus, hz, rate, seconds, seed)
    progress = Progress()
    with _folder(data_dir) as folder, progress.shown():
        report = _run(measure_allocation(options, folder, progress))
    _print(report, settings)


@bench.command()
@json_option
@click.option(
    "--simulate",
    multiple=True,
    metavar="COUNTxMODEL",
    help="Simulated GPUs in place of the library's, such as 8xH100-80GB; repeatable.",
)
@click.option("--gpus", type=int, help="How many GPUs there must be; else nothing is reported.")
@click.option("--sweeps", default=100, show_default=True, help="Of each kind.")
@click.option(
    "--interval",
    default=0.25,
    show_default=True,
    help="Seconds between two sweeps; 0: back to back, where a driver has little that is new.",
)
@click.option("--seed", default=1, show_default=True, help="Of the simulated GPUs.")
@click.pass_obj
def sampling(
    settings: Settings,
    simulate: tuple[str, ...],
    gpus: int | None,
    sweeps: int,
    interval: float,
    seed: int,
) -> None:
    """What it costs the agent and its driver host to read the GPUs of a node.

    Sweeps the GPUs of the library that the dynamic loader finds (LD_LIBRARY_PATH), or simulated
    ones, through a real driver host: the facts of every sampling tick; these and the slow ones;
    the processes.
    """
    from stoker.cli.bench.progress import Progress
    from stoker.cli.bench.sampling import SamplingOptions, measure_sampling
    from stoker.core.gpu_models import parse_simulate_spec

    for spec in simulate:
        parse_simulate_spec(spec)
    if gpus is not None:
        _check("--gpus", gpus, GPUS_PER_NODE_MAX, minimum=1)
    _check("--sweeps", sweeps, SWEEPS_MAX, minimum=1)
    _check("--interval", interval, SWEEP_INTERVAL_SECONDS_MAX, minimum=0)
    options = SamplingOptions(simulate, gpus, sweeps, interval, seed)
    progress = Progress()
    with _folder(None) as folder, progress.shown():
        report = _run(measure_sampling(options, folder, progress))
    _print(report, settings)


def _check_common(nodes: int, gpus: int, hz: float, seconds: float) -> None:
    """Raise BadInput for what makes no sense, or is more than this machine allows."""
    from stoker.cli.bench.machine import allow_connections

    _check("--nodes", nodes, NODES_MAX, minimum=1)
    _check("--gpus", gpus, GPUS_PER_NODE_MAX, minimum=1)
    _check("--hz", hz, HZ_MAX)
    _check("--seconds", seconds, SECONDS_MAX)
    allow_connections(nodes)


def _check(name: str, value: float, maximum: float, minimum: float | None = None) -> None:
    at_least = f"at least {minimum:g}" if minimum is not None else "more than 0"
    is_enough = value >= minimum if minimum is not None else value > 0
    if not (is_enough and value <= maximum):  # NaN is neither
        raise BadInput(f"{name}: wanted {at_least} and at most {maximum:g}, found {value:g}")


@contextlib.contextmanager
def _folder(parent: Path | None) -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="stoker-bench-", dir=parent) as name:
        yield Path(name)


def _run(measuring: Coroutine[Any, Any, T]) -> T:
    """Return what comes of it; Ctrl-C and SIGTERM end it, and what it started, in order."""

    async def until_told_to_stop() -> T:
        task = asyncio.ensure_future(measuring)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(until_told_to_stop())
    except asyncio.CancelledError:
        # The conventional status of a process that was asked to end.
        sys.exit(128 + signal.SIGTERM)


def _print(report: "IngestReport | AllocateReport | SamplingFigures", settings: Settings) -> None:
    import msgspec

    from stoker.cli.bench.table import report_lines

    if settings.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        for line in report_lines(report):
            print(line)
