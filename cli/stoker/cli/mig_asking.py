"""Whom `stoker mig` asks, and how it waits for an operation to be over."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from stoker.cli.agent_socket import socket_paths
from stoker.cli.mig_outcomes import is_settled
from stoker.cli.settings import Settings
from stoker.core import local
from stoker.core.errors import ExitCode, StokerError
from stoker.core.mig.reports import GpuMigFacts, MigAsk, MigReport

# How often the state of an operation is looked up.
LOOK_SECONDS = 0.5
# An agent that is restarted goes on with its operations; so long it may be away.
AWAY_SECONDS_MAX = 120.0

Ask = Callable[[MigAsk], MigReport]
Tell = Callable[[Sequence[GpuMigFacts]], None]
Away = Callable[[StokerError], None]


@contextmanager
def asking(settings: Settings, node: str | None, socket: Path | None) -> Generator[Ask]:
    """Give the agent to ask: this machine's by its socket, or a node's through the aggregator."""
    if node is None:
        if settings.address is not None:
            raise click.UsageError(
                "--address: without --node the agent of this machine is asked, see --socket"
            )
        paths = socket_paths(socket, os.environ)
        yield lambda ask: local.ask(paths, local.AskMig(ask), local.Mig).report
        return
    if socket is not None:
        raise click.UsageError("--socket: with --node the aggregator is asked, see --address")
    with settings.connect() as fleet:
        yield lambda ask: fleet.mig(node, ask)


def wait(
    ask: Ask,
    begun: MigReport,
    tell: Tell,
    away: Away,
    *,
    pause: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> MigReport:
    """Return how the GPUs of an operation are once it does nothing more.

    `tell` hears of each look, and `away` once of each time that the agent cannot be asked.
    GPUs of which nothing is told for long, the agent being there, are left out. Raises what keeps
    the agent from being asked, once it has been away for long.
    """
    planned = tuple(each.uuid for each in begun.plans)
    if not planned:
        return begun
    looking = MigAsk("status", gpus=planned)
    heard_at, is_heard = monotonic(), True
    while True:
        try:
            report = ask(looking)
        except StokerError as error:
            is_away = error.exit_code is ExitCode.UNREACHABLE
            if not is_away or monotonic() - heard_at > AWAY_SECONDS_MAX:
                raise
            if is_heard:
                away(error)
            is_heard = False
        else:
            is_heard = True
            tell(report.gpus)
            # An agent that has just started has yet to read its GPUs.
            is_complete = {each.uuid for each in report.gpus}.issuperset(planned)
            if is_complete:
                heard_at = monotonic()
            is_over = all(is_settled(each, begun.operation_id) for each in report.gpus)
            if is_over and (is_complete or monotonic() - heard_at > AWAY_SECONDS_MAX):
                return report
        pause(LOOK_SECONDS)
