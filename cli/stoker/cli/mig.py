"""The verbs for partitions (MIG) of a node's GPUs: plan, apply, undo, status, export."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import RenderableType

from stoker.cli import mig_export, render_mig, screen
from stoker.cli.agent import socket_option
from stoker.cli.gpus import checked_gpu
from stoker.cli.mig_asking import asking
from stoker.cli.mig_changes import Change, change_options
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import as_json, document, one_line
from stoker.core.config import FILE_BYTES_MAX
from stoker.core.errors import BadInput, ExitCode, shown
from stoker.core.mig.files import parse_mig_file, render_mig_file
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport

C = TypeVar("C", bound=Callable[..., Any])

_STDIN = "-"
_CONFIG = "current"  # what is exported is called so, as mig-parted's own export does


@click.group()
def mig() -> None:
    """Plan, apply and undo how a node's GPUs are partitioned (MIG).

    Without --node the agent of this machine is asked; with it, that node's, through the aggregator.
    """


# --- options


def where_options(command: C) -> C:
    """Add --node, --socket, and those of the fleet."""
    node = click.option("--node", metavar="NODE", help="Of this node, through the aggregator.")
    return fleet_options(node(socket_option(command)))


def gpu_option(command: C) -> C:
    """Add --gpu."""
    return click.option(
        "--gpu",
        "gpus",
        multiple=True,
        metavar="INDEX|UUID",
        help="Only this GPU: its number on the node, or its UUID; repeatable.",
    )(command)


def file_options(command: C) -> C:
    """Add FILE and --config."""
    config = click.option(
        "--config", metavar="NAME", help="Which of the file's configurations, where it has several."
    )
    return click.argument("file", metavar="[FILE]", required=False)(config(command))


# --- verbs


@mig.command()
@where_options
@gpu_option
@file_options
@click.pass_obj
def plan(
    settings: Settings,
    file: str | None,
    config: str | None,
    gpus: tuple[str, ...],
    node: str | None,
    socket: Path | None,
) -> int:
    """Show what applying a configuration of FILE would do; nothing is changed.

    FILE is in the format of mig-parted, "-" for standard input; without it, what the
    configuration of this machine's agent declares is meant. Of each GPU instance it is said
    whether it is kept (=), destroyed (-), created (+), or repaired (~), and who is in the way.
    Exit code 3 when it cannot be done at all, which is said with the reason.
    """
    name, entries = _configuration(file, config, node)
    with asking(settings, node, socket) as ask:
        report = ask(MigAsk("plan", config=name, entries=entries, gpus=_checked(gpus)))
    _show_plan(settings, report)
    return ExitCode.REFUSED if _is_refused(report) else ExitCode.OK


@mig.command()
@where_options
@gpu_option
@change_options
@file_options
@click.pass_obj
def apply(
    settings: Settings,
    /,
    file: str | None,
    config: str | None,
    gpus: tuple[str, ...],
    node: str | None,
    socket: Path | None,
    **how: Any,
) -> int:
    """Partition GPUs as a configuration of FILE says: show the plan, ask, do it, and wait.

    FILE is what `stoker mig plan` takes. Applied twice it changes nothing. Instances in use stay
    where any layout allows it. Who uses what has to go is asked to leave, nothing new is placed
    there, and after --drain nothing is changed unless --evict says so. Where a step fails, the
    layout before is restored. Ctrl-C ends the waiting, not the operation.

    Exit codes: 0 done, or nothing to do; 3 refused, or restored: the layout is as it was; 9 it
    takes effect with a reset of the GPU or a reboot; 1 anything else.
    """
    change = Change.of(settings, how, is_input_taken=file == _STDIN)
    name, entries = _configuration(file, config, node)
    named = _checked(gpus)
    with asking(settings, node, socket) as ask:
        planned = ask(MigAsk("plan", config=name, entries=entries, gpus=named))
        if _is_refused(planned) or not planned.plans:
            _show_plan(settings, planned)
            return ExitCode.REFUSED if planned.plans else ExitCode.OK
        if not settings.json:
            screen.show(render_mig.plan(planned))
            change.show_terms(planned)
        is_change = any(map(render_mig.changes_something, planned.plans))
        if is_change and not change.is_confirmed("Apply this plan?"):
            return ExitCode.REFUSED
        return change.carry_out(ask, change.ask("apply", named, name, entries))


@mig.command()
@where_options
@gpu_option
@change_options
@click.pass_obj
def undo(
    settings: Settings,
    /,
    gpus: tuple[str, ...],
    node: str | None,
    socket: Path | None,
    **how: Any,
) -> int:
    """Go back to the layout before the newest operation: show it, ask, do it, and wait.

    Users are treated, and the exit codes are, as `stoker mig apply` says.
    """
    change = Change.of(settings, how)
    with asking(settings, node, socket) as ask:
        before = ask(MigAsk("status", gpus=_checked(gpus)))
        undoable = tuple(gpu.uuid for gpu in before.gpus if gpu.undo)
        if not undoable:
            _show(settings, before, "nothing to undo: no operation is remembered")
            return ExitCode.OK
        if not settings.json:
            screen.show(render_mig.undo(before))
        if not change.is_confirmed("Undo this?"):
            return ExitCode.REFUSED
        return change.carry_out(ask, change.ask("undo", undoable))


@mig.command()
@where_options
@gpu_option
@click.pass_obj
def status(
    settings: Settings, gpus: tuple[str, ...], node: str | None, socket: Path | None
) -> None:
    """Show how the GPUs are partitioned, and how far each is on the way to what was applied."""
    with asking(settings, node, socket) as ask:
        report = ask(MigAsk("status", gpus=_checked(gpus)))
    _show(settings, report, render_mig.status(report, time.time()))


@mig.command()
@where_options
@gpu_option
@click.option(
    "--config", default=_CONFIG, show_default=True, metavar="NAME", help="What to call it."
)
@click.pass_obj
def export(
    settings: Settings, config: str, gpus: tuple[str, ...], node: str | None, socket: Path | None
) -> None:
    """Print what is there as a file that `stoker mig apply`, and mig-parted, make so again."""
    with asking(settings, node, socket) as ask:
        report = ask(MigAsk("status", gpus=_checked(gpus)))
    text = render_mig_file(mig_export.exported(report, config, is_whole=not gpus))
    for sentence in mig_export.lost(report):
        print(f"stoker: {one_line(sentence)}", file=sys.stderr)
    print(as_json(yaml.safe_load(text)) if settings.json else text.rstrip("\n"))


# --- what is asked


def _configuration(
    file: str | None, config: str | None, node: str | None
) -> tuple[str, tuple[MigEntry, ...]]:
    """Return the configuration that is meant, empty for the agent's own; raises BadInput."""
    if file is None:
        if config is not None:
            raise BadInput(f"--config: there is no FILE that could have {shown(config)}")
        if node is not None:
            raise BadInput("--node: wanted FILE too; without it the agent of this machine is meant")
        return "", ()
    name = "standard input" if file == _STDIN else file
    configs = parse_mig_file(_read(file), name).configs
    if config is None and len(configs) == 1:
        (config,) = configs
    known = ", ".join(map(one_line, configs)) or "none"
    if config is None:
        raise BadInput(f"--config: {name} has {len(configs)} configurations, name one of: {known}")
    if config not in configs:
        raise BadInput(f"--config: {name} has no configuration {shown(config)}; it has: {known}")
    return config, configs[config]


def _read(file: str) -> str:
    try:
        with click.open_file(file, "rb") as stream:
            data: bytes = stream.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise BadInput(f"{file}: longer than {FILE_BYTES_MAX} bytes: that is some other file")
        return data.decode()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error


def _checked(gpus: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(checked_gpu(each, "--gpu") for each in gpus)


# --- what is answered


def _is_refused(report: MigReport) -> bool:
    return any(each.refusal for each in report.plans)


def _show_plan(settings: Settings, report: MigReport) -> None:
    _show(settings, report, render_mig.plan(report))


def _show(settings: Settings, report: MigReport, rendered: RenderableType) -> None:
    if settings.json:
        print(as_json(document(report)))
    else:
        screen.show(rendered)
