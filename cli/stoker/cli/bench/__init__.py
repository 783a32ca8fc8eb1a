"""`stoker bench`: measures the real daemons, all on this machine."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from stoker.cli.settings import Settings, json_option
from stoker.core.errors import BadInput, Missing
from stoker.core.gpu_models import GPUS_PER_NODE_MAX

if TYPE_CHECKING:
    from stoker.cli.bench.balance import BalanceReport
    from stoker.cli.bench.figures import AllocateReport, IngestReport
    from stoker.cli.bench.mig_figures import MigReport
    from stoker.cli.bench.placement_figures import PlacementReport
    from stoker.cli.bench.routing_figures import RoutingReport
    from stoker.cli.bench.sampling import SamplingFigures

    Report: TypeAlias = (
        AllocateReport
        | BalanceReport
        | IngestReport
        | MigReport
        | PlacementReport
        | RoutingReport
        | SamplingFigures
    )

T = TypeVar("T")

# Of the daemons' extras; `stoker[cli]` alone has none of them.
_NEEDED = (
    *("grpc_health", "highspy", "numpy", "prometheus_client", "psutil", "sqlite_utils", "uvloop"),
)

NODES_MAX = 20_000
HZ_MAX = 100.0
SECONDS_MAX = 3600.0
RATE_MAX = 100_000.0
SWEEPS_MAX = 1_000_000
SWEEP_INTERVAL_SECONDS_MAX = 60.0
REPLICAS_MAX = 64
SLOTS_MAX = 1024
CALL_SECONDS_MAX = 1.0
SLOW_MAX = 1000.0
COPIES_MAX = 100
JOBS_MAX = 1024
SHARED_NODES_MAX = 1000
VIRTUAL_SECONDS_MAX = 86_400.0
MIG_SEEDS_MAX = 1000
MIG_GPUS_MAX = 100_000
MIG_REQUESTS_MAX = 10_000_000


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


@bench.command()
@json_option
@click.option(
    "--nodes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of a fleet, in the columns of the openb trace; needs --tasks.",
)
@click.option(
    "--tasks",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of what is asked for; without both, small fleets and tasks made by seed.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Whom to play; repeatable; all, and else: the published ones and ours.",
)
@click.option("--seeds", default="42-51", show_default=True, metavar="A-B", help="Runs of each.")
@click.option(
    "--protocol",
    type=click.Choice(["fgd", "timed"]),
    default="fgd",
    show_default=True,
    help="Arrivals alone, in random order, as published; or by the times in the file.",
)
@click.option("--copies", default=1, show_default=True, help="Every node and task so many times.")
@click.option("--learn", is_flag=True, help="Policies learn what tasks are like as they arrive.")
@click.option("--bound", is_flag=True, help="Find what no policy can exceed, too.")
@click.option("--jobs", type=int, help="Processes; else one for each core.")
@click.pass_obj
def placement(
    settings: Settings,
    nodes: Path | None,
    tasks: Path | None,
    policies: tuple[str, ...],
    seeds: str,
    protocol: str,
    copies: int,
    jobs: int | None,
    *,
    learn: bool,
    bound: bool,
) -> None:
    """How full a fleet can be when requests are placed by a policy.

    Plays a workload through what decides in production: request, placement, admission, grant.
    """
    from stoker.cli.bench.placement import (
        PlacementOptions,
        check_policies,
        measure_placement,
        parse_seeds,
    )
    from stoker.cli.bench.progress import Progress

    is_timed = protocol == "timed"
    if (nodes is None) != (tasks is None):
        given, lacking = ("--nodes", "--tasks") if tasks is None else ("--tasks", "--nodes")
        raise BadInput(f"{given}: wanted {lacking} beside it, found it alone")
    if bound and is_timed:
        raise BadInput("--bound: wanted --protocol fgd: there is no bound on departures")
    _check("--copies", copies, COPIES_MAX, minimum=1)
    cores = len(os.sched_getaffinity(0))
    _check("--jobs", cores if jobs is None else jobs, JOBS_MAX, minimum=1)
    options = PlacementOptions(
        nodes=nodes,
        tasks=tasks,
        policies=check_policies(policies),
        seeds=parse_seeds(seeds),
        is_timed=is_timed,
        copies=copies,
        is_learning=learn,
        bound=bound,
        jobs=cores if jobs is None else jobs,
    )
    progress = Progress()
    with _folder(None) as folder, progress.shown():
        report = _run(measure_placement(options, folder, progress))
    _print(report, settings)


@bench.command()
@json_option
@click.option(
    "--load",
    default="0.7,0.85,1.0,1.3",
    show_default=True,
    metavar="A,B",
    help="Memory slices asked for at any time, as a part of those there are.",
)
@click.option(
    "--mix",
    default="uniform,skew-small,skew-big,bimodal",
    show_default=True,
    metavar="A,B",
    help="How often each profile is asked for.",
)
@click.option("--seeds", default=5, show_default=True, help="Runs of each, with seeds from 0 on.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Whom to play; repeatable; else all.",
)
@click.option("--moves", is_flag=True, help="Play ours with moves for who fits nowhere, as well.")
@click.option("--gpus", default=100, show_default=True, help="Of seven slices each.")
@click.option("--requests", default=60_000, show_default=True, help="Of a run, after its warm-up.")
@click.option("--jobs", type=int, help="Processes; else one for each core.")
@click.pass_obj
def mig(
    settings: Settings,
    load: str,
    mix: str,
    seeds: int,
    policies: tuple[str, ...],
    gpus: int,
    requests: int,
    jobs: int | None,
    *,
    moves: bool,
) -> None:
    """How many GPU instances (MIG) find a place as they come and go, by policy.

    Plays requests for profiles through what places them in production, and beside it the
    reference: free migration of everything at every request.
    """
    from stoker.cli.bench.mig import measure_mig, mig_options
    from stoker.cli.bench.progress import Progress

    _check("--seeds", seeds, MIG_SEEDS_MAX, minimum=1)
    _check("--gpus", gpus, MIG_GPUS_MAX, minimum=1)
    _check("--requests", requests, MIG_REQUESTS_MAX, minimum=1)
    cores = len(os.sched_getaffinity(0))
    _check("--jobs", cores if jobs is None else jobs, JOBS_MAX, minimum=1)
    options = mig_options(load, mix, seeds, policies, gpus, requests, jobs or cores, moves=moves)
    progress = Progress()
    with _folder(None) as folder, progress.shown():
        report = _run(measure_mig(options, folder, progress))
    _print(report, settings)


@bench.command()
@json_option
@click.option("--replicas", default=3, show_default=True, help="Of the service; one is slowed.")
@click.option("--slots", default=4, show_default=True, help="Calls that each works on at a time.")
@click.option(
    "--call-seconds", default=0.02, show_default=True, help="That a call takes, on the mean."
)
@click.option(
    "--slow", default=5.0, show_default=True, help="How much longer the slowed replica takes."
)
@click.option("--rate", default=100.0, show_default=True, help="Calls a second.")
@click.option("--seconds", default=20.0, show_default=True, help="How long to measure a policy.")
@click.option("--seed", default=1, show_default=True, help="Of all that is random.")
@click.pass_obj
def routing(
    settings: Settings,
    replicas: int,
    slots: int,
    call_seconds: float,
    slow: float,
    rate: float,
    seconds: float,
    seed: int,
) -> None:
    """How calls of a service fare of which one replica is slow: round robin, and the SDK's router.

    The replicas are real gRPC servers, each a process that is an endpoint in an allocation of its
    own. Calls arrive at random, whatever the answers do; a latency counts from when its call was
    due.
    """
    from stoker.cli.bench.progress import Progress
    from stoker.cli.bench.routing import RoutingOptions, measure_routing

    _check("--replicas", replicas, REPLICAS_MAX, minimum=2)
    _check("--slots", slots, SLOTS_MAX, minimum=1)
    _check("--call-seconds", call_seconds, CALL_SECONDS_MAX)
    _check("--slow", slow, SLOW_MAX, minimum=1)
    _check("--rate", rate, RATE_MAX)
    _check("--seconds", seconds, SECONDS_MAX)
    options = RoutingOptions(replicas, slots, call_seconds, slow, rate, seconds, seed)
    progress = Progress()
    with _folder(None) as folder, progress.shown():
        report = _run(measure_routing(options, folder, progress))
    _print(report, settings)


@bench.command()
@json_option
@click.option("--nodes", default=8, show_default=True, help="Simulated ones.")
@click.option("--gpus", default=8, show_default=True, help="GPUs of every node.")
@click.option("--seeds", default="1-5", show_default=True, metavar="A-B", help="Runs of each.")
@click.option(
    "--seconds", default=1200.0, show_default=True, help="Virtual time to measure in, a run."
)
@click.option(
    "--warm-up", default=600.0, show_default=True, help="Virtual time before that, in seconds."
)
@click.pass_obj
def balance(
    settings: Settings, nodes: int, gpus: int, seeds: str, seconds: float, warm_up: float
) -> None:
    """How even the load of shared GPUs is, by policy, when replicas come in bursts.

    Nodes are simulated in virtual time; what decides is what decides in production.
    """
    from stoker.cli.bench.balance import measure_balance
    from stoker.cli.bench.placement import parse_seeds
    from stoker.cli.bench.progress import Progress
    from stoker.testing.balancing.playing import Course

    _check("--nodes", nodes, SHARED_NODES_MAX, minimum=1)
    _check("--gpus", gpus, GPUS_PER_NODE_MAX, minimum=1)
    _check("--seconds", seconds, VIRTUAL_SECONDS_MAX, minimum=1)
    _check("--warm-up", warm_up, VIRTUAL_SECONDS_MAX, minimum=0)
    course = Course(nodes, gpus, warm_up, seconds)
    progress = Progress()
    with _folder(None) as folder, progress.shown():
        report = _run(measure_balance(course, parse_seeds(seeds), folder, progress))
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


def _print(report: "Report", settings: Settings) -> None:
    import msgspec

    from stoker.cli.bench.balance import BalanceReport, balance_lines
    from stoker.cli.bench.mig_figures import MigReport, mig_lines
    from stoker.cli.bench.placement_figures import PlacementReport
    from stoker.cli.bench.placement_table import placement_lines
    from stoker.cli.bench.table import report_lines

    if settings.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
        return
    match report:
        case PlacementReport():
            lines = placement_lines(report)
        case BalanceReport():
            lines = balance_lines(report)
        case MigReport():
            lines = mig_lines(report)
        case _:
            lines = report_lines(report)
    for line in lines:
        print(line)
