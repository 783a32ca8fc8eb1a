"""The verbs for the agent of this machine: run it, ask it, have it let go of the driver."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from stoker.cli import render_agent, screen
from stoker.cli.agent_socket import VARIABLE, socket_paths
from stoker.cli.daemons import run_agent
from stoker.cli.doctor import doctor
from stoker.cli.gpus import checked_gpu
from stoker.cli.settings import Settings, json_option
from stoker.cli.text import as_json, document
from stoker.core import local
from stoker.core.errors import BadInput, ExitCode
from stoker.core.units import parse_duration

A = TypeVar("A", bound=msgspec.Struct)
C = TypeVar("C", bound=Callable[..., Any])


@click.group()
def agent() -> None:
    """Run the agent of this host, ask it, have it let go of the driver."""


@agent.group()
def profiling() -> None:
    """Leave the GPUs' hardware counters to a profiler, or take them back."""


agent.add_command(run_agent)
agent.add_command(doctor)


def socket_option(command: C) -> C:
    """Add --socket."""
    return click.option(
        "--socket",
        type=click.Path(path_type=Path, dir_okay=False, readable=False),
        metavar="PATH",
        help=f"Where the agent answers; else ${VARIABLE}, else where agents usually do.",
    )(command)


def for_option(command: C) -> C:
    """Add --for."""
    return click.option(
        "--for", "duration", metavar="DURATION", help="For so long, such as 10m; else for good."
    )(command)


@agent.command()
@json_option
@socket_option
@click.pass_obj
def status(settings: Settings, socket: Path | None) -> None:
    """Show how the agent is: driver, GPUs and their health, who uses them, the link.

    UNATTRIBUTED is memory in use that no process accounts for.
    """
    answer = _ask(settings, socket, local.AskStatus(), local.Status)
    _show(settings, answer, render_agent.status)


@agent.command()
@json_option
@socket_option
@for_option
@click.pass_obj
def release(settings: Settings, socket: Path | None, duration: str | None) -> int:
    """Have the agent let go of the driver: for an upgrade, a reset, a change of MIG.

    Returns once it has no handle open any more. Nothing is read and nothing is placed on this host
    until `stoker agent resume`, or until the time of --for is over; a restart of the agent does not
    change that. Allocations stay held, and what runs on the GPUs is left alone. Who else has device
    files of the driver open is named: they keep it loaded.
    """
    answer = _ask(settings, socket, local.AskRelease(_seconds(duration)), local.Released)
    _show(settings, answer, render_agent.released)
    return ExitCode.PENDING if answer.pending else ExitCode.OK


@agent.command()
@json_option
@socket_option
@click.pass_obj
def resume(settings: Settings, socket: Path | None) -> None:
    """Have the agent take the driver again."""
    answer = _ask(settings, socket, local.AskResume(), local.Resumed)
    _show(settings, answer, render_agent.resumed)


@agent.command("set-healthy")
@json_option
@socket_option
@click.argument("gpu", metavar="GPU")
@click.pass_obj
def set_healthy(settings: Settings, socket: Path | None, gpu: str) -> None:
    """Forget the faults of GPU, by its number or its UUID: it was mended, inspected or replaced.

    What is still so is found again at the next look.
    """
    request = local.AskSetHealthy(checked_gpu(gpu, "GPU"))
    answer = _ask(settings, socket, request, local.SetHealthy)
    _show(settings, answer, render_agent.set_healthy)


@profiling.command("pause")
@json_option
@socket_option
@for_option
@click.pass_obj
def pause_profiling(settings: Settings, socket: Path | None, duration: str | None) -> None:
    """Leave the hardware counters alone: a profiler needs them for itself.

    What they tell is absent meanwhile; all else is read. A restart of the agent ends it.
    """
    request = local.AskProfilingPause(_seconds(duration))
    _show(settings, _ask(settings, socket, request, local.Profiling), render_agent.profiling)


@profiling.command("resume")
@json_option
@socket_option
@click.pass_obj
def resume_profiling(settings: Settings, socket: Path | None) -> None:
    """Read the hardware counters again."""
    answer = _ask(settings, socket, local.AskProfilingResume(), local.Profiling)
    _show(settings, answer, render_agent.profiling)


def _ask(settings: Settings, socket: Path | None, request: local.Request, expected: type[A]) -> A:
    if settings.address is not None:
        raise click.UsageError("--address: the agent of this machine is asked, see --socket")
    return local.ask(socket_paths(socket, os.environ), request, expected)


def _seconds(duration: str | None) -> float | None:
    if duration is None:
        return None
    seconds = parse_duration(duration, "--for")
    if seconds <= 0:
        raise BadInput(f"--for: wanted more than no time, found {duration}")
    return seconds


def _show(settings: Settings, answer: A, rendered: Callable[[A], render_agent.Shown]) -> None:
    if settings.json:
        print(as_json(document(answer)))
    else:
        screen.show(rendered(answer))
