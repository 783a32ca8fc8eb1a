"""`stoker alloc`: get GPUs and print them, or run a command on them and give them back."""

import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import click

from stoker.cli import documents, render, screen
from stoker.cli.errands import Errand, SignalRouter
from stoker.cli.settings import PATIENCE_SECONDS, Settings, fleet_options
from stoker.cli.text import as_json, one_line
from stoker.cli.wishes import wish_of, wish_options
from stoker.client import AllocationEnded, AsyncFleet, ClientError, Wish
from stoker.client.environment import host_boot_id
from stoker.core.errors import BadInput, ExitCode
from stoker.core.units import format_duration

# `--wait` without a duration: as long as the aggregator lets anybody wait.
WAIT_LONG = "30d"
# How often the reason for waiting is looked up.
REASON_SECONDS = 2.0
# A request that waits outlives a restart of the aggregator.
WAITING_PATIENCE_SECONDS = 60.0


# The first word that is no option begins the command; what follows is the command's own.
@click.command(context_settings={"allow_interspersed_args": False})
@fleet_options
@wish_options
@click.option("--ttl", metavar="DURATION", help="Life without a keep-alive; 1h, with COMMAND 60s.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option(
    "--wait",
    is_flag=False,
    flag_value=WAIT_LONG,
    metavar="[DURATION]",
    help="Wait in the queue, as long as it takes if no duration is said.",
)
@click.option(
    "--leave-on-request",
    is_flag=True,
    help="Send COMMAND SIGTERM when the GPUs are wanted back; else only say so.",
)
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def alloc(
    settings: Settings,
    /,
    command: tuple[str, ...],
    labels: tuple[str, ...],
    wait: str | None,
    leave_on_request: bool,
    **options: Any,
) -> int:
    """Get GPUs and print them, or run COMMAND on them.

    With COMMAND only GPUs of this host are taken: it runs with the variables that show it exactly
    them, they are kept while it runs and given back when it ends, and its exit code is returned.
    Standard output is then the command's own. When the GPUs are wanted back, because they are to be
    partitioned anew, standard error says so.
    """
    wish = wish_of(options, labels)
    if not command:
        if leave_on_request:
            raise BadInput("--leave-on-request: there is no COMMAND to end")
        return asyncio.run(_interruptible(partial(_print_allocation, settings, wish, wait)))
    nodes = wish.get("nodes", 1)
    if nodes > 1:
        raise BadInput(f"--nodes {nodes}: COMMAND runs on this host only; leave it out")
    if shutil.which(command[0]) is None:
        raise BadInput(f"{command[0]}: no such command")
    run = partial(_run_command, settings, wish, wait, command, leave_on_request)
    return asyncio.run(_interruptible(run))


async def _interruptible(work: Callable[[SignalRouter], Coroutine[Any, Any, int]]) -> int:
    """Do the work; a signal that nobody else takes cancels it, and it gives back what it has."""
    caught: list[signal.Signals] = []

    def cancel(signum: signal.Signals) -> None:
        caught.append(signum)
        task.cancel()

    task = asyncio.ensure_future(work(SignalRouter(cancel)))
    try:
        return await task
    except asyncio.CancelledError:
        if not caught:
            raise
        return 128 + caught[0]


async def _print_allocation(
    settings: Settings, wish: Wish, wait: str | None, router: SignalRouter
) -> int:
    async with _connect(settings, wait) as fleet:
        narrator = Narrator(fleet)
        try:
            granted = await fleet.request(wait=wait or 0.0, on_waiting=narrator.waits, **wish)
        finally:
            narrator.stop()
    if settings.json:
        print(as_json(documents.allocation(granted)))
    else:
        screen.show(render.allocation(granted, time.time()))
    return ExitCode.OK


async def _run_command(
    settings: Settings,
    wish: Wish,
    wait: str | None,
    command: Sequence[str],
    leave_on_request: bool,
    router: SignalRouter,
) -> int:
    wish["host_boot_id"] = host_boot_id()
    errand, code = Errand(command), None

    def stop(ended: AllocationEnded) -> None:
        _say(f"{ended}; stopping {command[0]}")
        errand.stop()

    def leave(reason: str, leave_by: float, is_evicting: bool) -> None:
        within = format_duration(max(0.0, leave_by - time.time()))
        then = "; they are taken then" if is_evicting else ""
        _say(f"the GPUs are wanted back within {within}{then}: {reason}")
        if leave_on_request:
            _say(f"ending {command[0]}")
            errand.end()

    async with _connect(settings, wait) as fleet:
        narrator = Narrator(fleet)
        try:
            async with fleet.allocate(
                wait=wait or 0.0,
                set_environment=False,
                on_waiting=narrator.waits,
                on_ended=stop,
                on_leave=leave,
                **wish,
            ) as lease:
                narrator.stop()
                router.receiver = errand.forward
                try:
                    code = await errand.run(lease.env)
                finally:
                    router.receiver = None  # what follows is short, and gives the GPUs back
        except ClientError as error:
            if code is None:
                raise
            _say(f"{command[0]} has ended; {error}")
            # Its work may be lost even where it ended well.
            return code or error.exit_code
        finally:
            narrator.stop()
    assert code is not None, "a context that ends without an error has run its body"
    return code


def _connect(settings: Settings, wait: str | None) -> AsyncFleet:
    return settings.connect_async(WAITING_PATIENCE_SECONDS if wait else PATIENCE_SECONDS)


class Narrator:
    """Tells on stderr that a request waits, under which id, and why, whenever that changes."""

    def __init__(self, fleet: AsyncFleet) -> None:
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None

    def waits(self, allocation_id: str) -> None:
        """Begin to tell about this one; it may be said again after an outage."""
        if self._task is not None:
            return
        _say(f"waiting as {allocation_id}")
        self._task = asyncio.create_task(self._tell(allocation_id))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _tell(self, allocation_id: str) -> None:
        told = ""
        while True:
            try:
                found = await self._fleet.explain(allocation_id)
                # Not how long it has waited, which always changes.
                reason = found.refusals.summary if found.refusals else found.summary
            except ClientError as error:
                reason = str(error)
            if reason != told:
                _say(reason)
                told = reason
            await asyncio.sleep(REASON_SECONDS)


def _say(text: str) -> None:
    print(f"stoker: {one_line(text)}", file=sys.stderr, flush=True)
