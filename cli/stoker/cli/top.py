"""`stoker top`: the GPUs of the fleet, live on a terminal, line by line elsewhere."""

import asyncio
import contextlib
import json
import os
import sys
import termios
import time
import tty
from collections.abc import Generator

import click
from rich.live import Live

from stoker.cli import documents, render, screen
from stoker.cli.ordering import in_order
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import Document
from stoker.client import AsyncFleet
from stoker.client.requesting import as_seconds
from stoker.core.errors import BadInput, ExitCode

INTERVAL_SECONDS_MIN = 0.1
# Headline, column names, "and N more".
_LINES_AROUND = 4
_QUIT = b"qQ\x03\x04"  # also Ctrl-C and Ctrl-D as keys


@click.command()
@fleet_options
@click.option("--interval", default="1s", show_default=True, metavar="DURATION")
@click.option("--iterations", type=click.IntRange(min=1), metavar="N", help="End after N looks.")
@click.pass_obj
def top(settings: Settings, interval: str, iterations: int | None) -> int:
    """Watch the GPUs of the fleet live; q ends it.

    Without a terminal it prints one table after another, with --json one line for each look.
    """
    seconds = as_seconds(interval, "--interval")
    if seconds < INTERVAL_SECONDS_MIN:
        raise BadInput(f"--interval: wanted at least {INTERVAL_SECONDS_MIN:g}s, found {interval}")
    if settings.json or not (sys.stdout.isatty() and sys.stdin.isatty()):
        return asyncio.run(_print(settings, seconds, iterations))
    return asyncio.run(_live(settings, seconds, iterations))


async def _print(settings: Settings, seconds: float, iterations: int | None) -> int:
    async with settings.connect_async() as fleet:
        done = 0
        while True:
            if settings.json:
                print(json.dumps(await _document(fleet)), flush=True)
            else:
                nodes = in_order(await fleet.nodes())
                screen.show(render.top(nodes, time.time(), None))
            done += 1
            if done == iterations:
                return ExitCode.OK
            await asyncio.sleep(seconds)


async def _document(fleet: AsyncFleet) -> Document:
    nodes = in_order(await fleet.nodes())
    return documents.status(nodes, (await fleet.allocations()).allocations)


async def _live(settings: Settings, seconds: float, iterations: int | None) -> int:
    console = screen.console()
    quit_wanted = asyncio.Event()
    async with settings.connect_async() as fleet:
        with (
            Live(console=console, screen=True, auto_refresh=False) as live,
            _keys(quit_wanted),
        ):
            done = 0
            while not quit_wanted.is_set() and done != iterations:
                rows = max(1, console.height - _LINES_AROUND)
                nodes = in_order(await fleet.nodes())
                live.update(render.top(nodes, time.time(), rows), refresh=True)
                done += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(quit_wanted.wait(), seconds)
    return ExitCode.OK


@contextlib.contextmanager
def _keys(quit_wanted: asyncio.Event) -> Generator[None]:
    """Read single keys from the terminal meanwhile."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    loop = asyncio.get_running_loop()

    def read() -> None:
        typed = os.read(keyboard, 64)
        if not typed or any(key in _QUIT for key in typed):
            quit_wanted.set()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
