"""`stoker agent run` and `stoker aggregator run`: become the daemon, options and all."""

import os
import sys
from typing import Any, NoReturn

import click

from stoker.cli.settings import Settings

# Whatever follows is the daemon's to read, --help as well.
_PASS_ON: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@click.group()
def aggregator() -> None:
    """Run the aggregator."""


@click.command("run", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run_agent(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Run the agent of this host; `stoker agent run --help` lists its options."""
    address = [] if settings.address is None else ["--aggregator", settings.address]
    _become("stoker.agent", *address, *arguments)


@aggregator.command("run", context_settings=_PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run_aggregator(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Run the aggregator; `stoker aggregator run --help` lists its options."""
    if settings.address is not None:
        raise click.UsageError("--address: an aggregator is told --listen HOST:PORT instead")
    _become("stoker.aggregator", *arguments)


def _become(module: str, *arguments: str) -> NoReturn:
    sys.stdout.flush()
    # -P: a file in the current folder must not take the place of a module.
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
