"""The verbs that look at the fleet or give back what it granted: status, health, release."""

import time
from typing import Any

import click

from stoker.cli import documents, render, render_health, screen
from stoker.cli.ordering import in_order
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import as_json, document, one_line
from stoker.client import AllocationState
from stoker.client.channel import RELEASE_WAIT_SECONDS
from stoker.client.environment import default_holder


@click.command()
@fleet_options
@click.option("--all", "include_ended", is_flag=True, help="Show ended allocations too.")
@click.pass_obj
def status(settings: Settings, include_ended: bool) -> None:
    """Show nodes, GPUs and allocations."""
    with settings.connect() as fleet:
        nodes = in_order(fleet.nodes())
        allocations = fleet.allocations(include_ended=include_ended).allocations
    if settings.json:
        print(as_json(documents.status(nodes, allocations)))
        return
    screen.show(render.status(nodes, allocations, fleet.address, time.time()))


@click.command()
@fleet_options
@click.option("--all", "include_healthy", is_flag=True, help="Show healthy GPUs too.")
@click.pass_obj
def health(settings: Settings, include_healthy: bool) -> None:
    """Show which GPUs are not well or cordoned, why, and what mends them.

    Then what the fleet noticed by comparing: a GPU or a slot that keeps failing (a lemon), a GPU
    that lags behind the others of its allocation (a straggler).
    """
    with settings.connect() as fleet:
        found = fleet.health(include_healthy=include_healthy)
    if settings.json:
        print(as_json(document(found)))
    else:
        screen.show(render_health.health(found, fleet.address, time.time()))


@click.command()
@fleet_options
@click.option("--reason", metavar="TEXT", help="Kept in the history; else who released it.")
@click.option(
    "--wait",
    default=f"{RELEASE_WAIT_SECONDS:g}s",
    show_default=True,
    metavar="DURATION",
    help="How long to wait for the node to let go.",
)
@click.argument("allocation_ids", metavar="ID...", nargs=-1, required=True)
@click.pass_obj
def release(
    settings: Settings, allocation_ids: tuple[str, ...], reason: str | None, wait: str
) -> None:
    """Give allocations back, or leave the queue."""
    said = reason or f"released by {default_holder()}"
    released: list[Any] = []
    with settings.connect() as fleet:
        for each in allocation_ids:
            answer = fleet.release(each, reason=said, wait=wait)
            released.append(documents.allocation(answer))
            if not settings.json:
                is_over = answer.state is AllocationState.ENDED
                found = "released" if is_over else f"{answer.state}: {answer.node} has not let go"
                print(f"{one_line(answer.id)} {one_line(found)}")
    if settings.json:
        print(as_json({"allocations": released}))
