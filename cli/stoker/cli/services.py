"""The verb that looks at services: who serves, which part of the calls each gets, and why."""

import click

from stoker.cli import render_services, screen
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import as_json, document
from stoker.client import NotFound


@click.command()
@fleet_options
@click.argument("name", metavar="[SERVICE]", required=False)
@click.pass_obj
def services(settings: Settings, name: str | None) -> None:
    """Show services and their endpoints: which part of the calls each gets, and why.

    With SERVICE, those of this one.
    """
    with settings.connect() as fleet:
        found = (fleet.route(name),) if name is not None else fleet.services()
    if name is not None and not found[0].endpoints:
        raise NotFound(f"service {name} has no endpoint")
    if settings.json:
        print(as_json({"services": [document(each) for each in found]}))
    else:
        screen.show(render_services.services(found, fleet.address))
