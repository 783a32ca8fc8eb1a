"""The verbs that explain: `why` something waits, and `place --dry-run`, what would come of it."""

import time
from typing import Any

import click

from stoker.cli import render_why, screen
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.suppositions import GRAMMAR, parse_supposition
from stoker.cli.text import as_json, document
from stoker.cli.wishes import wish_of, wish_options
from stoker.client import Explanation
from stoker.core.errors import ExitCode


@click.command()
@fleet_options
@wish_options
@click.argument("allocation_id", metavar="[ID]", required=False)
@click.pass_obj
def why(settings: Settings, /, allocation_id: str | None, **options: Any) -> ExitCode:
    """Explain why allocation ID waits, or what would come of a request now.

    Says what stands in the way, the smallest change that would place it now, and what is ahead of
    it in the queue. A request is described by the options of `alloc`; nothing is allocated. Ends
    with 3 when the request cannot be placed now.
    """
    wish = wish_of(options)
    if allocation_id and wish:
        raise click.UsageError(f"wanted an ID or a request, found {allocation_id} and options")
    if not allocation_id and not wish:
        raise click.UsageError("wanted the ID of an allocation, or a request such as --gpus 2")
    with settings.connect() as fleet:
        found = fleet.explain(allocation_id) if allocation_id else fleet.explain_request(**wish)
    _show(settings, found)
    return ExitCode.OK if allocation_id or found.placeable else ExitCode.REFUSED


@click.command()
@fleet_options
@wish_options
@click.option("--dry-run", is_flag=True, help="Only say where it would go. Required.")
@click.option(
    "--what-if",
    "what_if",
    multiple=True,
    metavar="CHANGE",
    help=f"Suppose a change of the fleet first; repeatable, in order: {GRAMMAR}.",
)
@click.pass_obj
def place(
    settings: Settings, /, dry_run: bool, what_if: tuple[str, ...], **options: Any
) -> ExitCode:
    """Say where a request would go now, or if the fleet were another; nothing is allocated.

    \b
    stoker place --dry-run --gpus 8 --what-if "add 8xH100-80GB"
    stoker place --dry-run --gpus 2 --what-if "remove n3" --what-if "uncordon n1"

    Ends with 3 when it could not be placed.
    """
    if not dry_run:
        raise click.UsageError("place only tells: say --dry-run, or use `stoker alloc`")
    supposed = [parse_supposition(each) for each in what_if]
    with settings.connect() as fleet:
        found = fleet.explain_request(what_if=supposed, **wish_of(options))
    _show(settings, found)
    return ExitCode.OK if found.placeable else ExitCode.REFUSED


def _show(settings: Settings, found: Explanation) -> None:
    if settings.json:
        print(as_json(document(found)))
    else:
        screen.show(render_why.explanation(found, time.time()))
