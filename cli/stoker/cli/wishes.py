"""The options that say what is asked for, shared by `alloc` and `why`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from stoker.client import Wish
from stoker.core.errors import BadInput

C = TypeVar("C", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--gpus", type=int, metavar="N", help="Whole GPUs, all on one node; 1 if unsaid."),
    click.option("--memory", metavar="SIZE", help="A share of one GPU instead, such as 20GiB."),
    click.option("--model", metavar="NAME", help="Only GPUs of this model, such as H100-80GB."),
    click.option("--pool", metavar="NAME", help="Only nodes of this pool."),
    click.option("--node", metavar="NAME", help="Only this node."),
    click.option("--priority", type=int, metavar="N", help="Higher goes first in the queue."),
    click.option("--holder", metavar="NAME", help="Who asks; else user@host."),
)


def wish_options(command: C) -> C:
    """Add what may be asked for."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wish_of(options: dict[str, Any], labels: Sequence[str] = ()) -> Wish:
    """Return the wish that options say; what was not said is not in it. Raises BadInput."""
    wish = Wish()
    for name in Wish.__annotations__:
        if options.get(name) is not None:
            wish[name] = options[name]  # type: ignore[literal-required]
    if labels:
        wish["labels"] = dict(_label(each) for each in labels)
    return wish


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(f"--label: wanted KEY=VALUE, found {text[:60]!r}")
    return key, value
