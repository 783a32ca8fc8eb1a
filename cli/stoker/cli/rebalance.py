"""The verb that proposes moves, and asks the holders to make them: rebalance."""

import click

from stoker.cli import render_moves, screen
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import as_json, document
from stoker.core.units import parse_duration


@click.command()
@fleet_options
@click.option("--apply", "is_applied", is_flag=True, help="Ask the holders to move.")
@click.option(
    "--moves",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="At most so many moves.",
)
@click.option("--pool", metavar="POOL", help="Only within this pool.")
@click.option(
    "--answer",
    default="1m",
    show_default=True,
    metavar="DURATION",
    help="With --apply: how long the holders have to agree.",
)
@click.pass_obj
def rebalance(
    settings: Settings, is_applied: bool, moves: int, pool: str | None, answer: str
) -> None:
    """Show which movable allocations had better be elsewhere; with --apply ask their holders.

    Moves make room for what waits, cool hot GPUs down, and join what is free in fragments. Nothing
    moves without its holder: each is asked with its next keep-alive.
    """
    seconds = parse_duration(answer, "--answer")
    with settings.connect() as fleet:
        plan = fleet.rebalance(moves=moves, pool=pool, apply=is_applied, answer=seconds)
    if settings.json:
        print(as_json(document(plan)))
    else:
        screen.show(render_moves.plan(plan, is_applied=is_applied))
