"""What the global options say; every verb takes them too, before or after its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:  # gRPC takes a fifth of a second to load, `stoker --help` none of it
    from stoker.client import AsyncFleet, Fleet

C = TypeVar("C", bound=Callable[..., Any])

# A person waits for the answer, so a connection that is refused is not tried again for long.
PATIENCE_SECONDS = 1.0


@dataclass(slots=True)
class Settings:
    """Filled while the command line is read; the later option wins."""

    address: str | None = None
    json: bool = False

    def connect(self) -> "Fleet":
        """Return a client of the aggregator that was named."""
        from stoker.client import connect

        return connect(self.address, patience=PATIENCE_SECONDS)

    def connect_async(self, patience_seconds: float = PATIENCE_SECONDS) -> "AsyncFleet":
        """Return an async client of the aggregator that was named."""
        from stoker.client import connect_async

        return connect_async(self.address, patience=patience_seconds)


def _note(context: click.Context, option: click.Parameter, value: object) -> None:
    if value is not None:
        setattr(context.ensure_object(Settings), str(option.name), value)


def json_option(command: C) -> C:
    """Add --json."""
    return click.option(
        "--json",
        is_flag=True,
        default=None,
        expose_value=False,
        callback=_note,
        is_eager=True,
        help="Print JSON, errors too.",
    )(command)


def fleet_options(command: C) -> C:
    """Add --address and --json."""
    address = click.option(
        "--address",
        metavar="HOST:PORT",
        expose_value=False,
        callback=_note,
        help="The aggregator; else $STOKER_ADDRESS, else 127.0.0.1:7070.",
    )
    return address(json_option(command))
