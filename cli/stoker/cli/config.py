"""`stoker config`: check a configuration before a daemon meets it, and show every default."""

import os
from pathlib import Path

import click

from stoker.cli.settings import Settings, json_option
from stoker.cli.text import as_json
from stoker.core.config import defaults_yaml
from stoker.core.errors import BadInput

DAEMONS = ("agent", "aggregator")


@click.group()
def config() -> None:
    """Check configurations, show defaults."""


@config.command()
@json_option
@click.option("--for", "daemon", type=click.Choice(DAEMONS), help="Whose it is.")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def check(settings: Settings, file: Path, daemon: str | None) -> None:
    """Check FILE, a configuration of the agent or the aggregator, as that daemon would."""
    whose = daemon or _daemon_of(file)
    # What this shell has in STOKER_* is not the daemon's, so only the file is looked at.
    environ = {"HOME": os.environ.get("HOME", "")}
    try:
        if whose == "agent":
            from stoker.agent.config import load as load_agent

            load_agent(file, environ, {})
        else:
            from stoker.aggregator.config import load as load_aggregator

            load_aggregator(file, environ, {})
    except BadInput as error:
        named = str(error).startswith(str(file))
        raise BadInput(str(error) if named else f"{file}: {error}") from error
    print(as_json({"file": str(file), "daemon": whose}) if settings.json else f"{file}: in order")


@config.command()
@click.argument("daemon", type=click.Choice(DAEMONS))
def defaults(daemon: str) -> None:
    """Print a file with every option of DAEMON, its meaning and its default."""
    if daemon == "agent":
        from stoker.agent.config import AgentConfig

        print(defaults_yaml(AgentConfig), end="")
    else:
        from stoker.aggregator.config import AggregatorConfig

        print(defaults_yaml(AggregatorConfig), end="")


def _daemon_of(file: Path) -> str:
    """Return the daemon that the file's name says: agent.yaml, my-aggregator.yml."""
    found = [each for each in DAEMONS if each in file.stem]
    if len(found) != 1:
        raise BadInput(f"{file}: whose configuration is it? say --for {' or --for '.join(DAEMONS)}")
    return found[0]
