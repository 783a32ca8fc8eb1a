"""The options that say what is asked for, shared by `alloc`, `why` and `place`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from stoker.client import Wish
from stoker.core.errors import BadInput

C = TypeVar("C", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--gpus",
        type=int,
        metavar="N",
        help="Whole GPUs, or with --mig devices, all on one node; 1 if unsaid.",
    ),
    click.option("--nodes", type=int, metavar="N", help="As many on each of N nodes, or nothing."),
    click.option("--memory", metavar="SIZE", help="A share of one GPU instead, such as 20GiB."),
    click.option("--compute", type=float, metavar="RATIO", help="And, or, of its compute: 0.25."),
    click.option(
        "--mig",
        metavar="PROFILE",
        help="MIG devices instead: 1g.10gb; any, with --memory or --compute.",
    ),
    click.option("--cpus", type=float, metavar="N", help="CPUs of the host, on each node."),
    click.option("--host-memory", metavar="SIZE", help="Memory of the host, on each node."),
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="NAME",
        help="Only GPUs of this model, such as H100-80GB; repeatable: any of them.",
    ),
    click.option("--gpu-memory", metavar="SIZE", help="Only GPUs with at least so much in all."),
    click.option("--compute-capability", metavar="X.Y", help="Only GPUs of at least this one."),
    click.option("--driver", metavar="VERSION", help="Only nodes with at least this driver."),
    click.option("--pool", metavar="NAME", help="Only nodes of this pool."),
    click.option("--node", metavar="NAME", help="Only this node."),
    click.option(
        "--node-label",
        "node_labels",
        multiple=True,
        metavar="KEY=VALUE",
        help="Only nodes with this label; repeatable.",
    ),
    click.option(
        "--topology",
        type=click.Choice(["numa", "nvlink"]),
        help="GPUs on one NUMA node, or all linked by NVLink, where that can be.",
    ),
    click.option(
        "--require-topology", is_flag=True, default=None, help="Nothing but --topology will do."
    ),
    click.option(
        "--same", "same_label", metavar="LABEL", help="All nodes of one rack, zone: a node label."
    ),
    click.option("--require-same", is_flag=True, default=None, help="Nothing but --same will do."),
    click.option("--service", metavar="NAME", help="What it is a replica of."),
    click.option(
        "--anti-affinity",
        metavar="gpu|node|LABEL",
        help="Never where another of the same service is.",
    ),
    click.option(
        "--spread", metavar="gpu|node|LABEL", help="Rather where fewest of the same service are."
    ),
    click.option("--near", metavar="SERVICE", help="Rather on a node where that service is."),
    click.option("--prefer-gpu", metavar="UUID", help="Rather this GPU."),
    click.option("--duration", metavar="DURATION", help="How long it is expected to be held."),
    click.option(
        "--movable", is_flag=True, default=None, help="Its holder agrees to be asked to move."
    ),
    click.option("--priority", type=int, metavar="N", help="Higher goes first in the queue."),
    click.option("--holder", metavar="NAME", help="Who asks; else user@host."),
)


# The options whose parameters are not called as they are.
_FLAGS = {"models": "--model", "node_labels": "--node-label", "same_label": "--same"}


def wish_options(command: C) -> C:
    """Add what may be asked for."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wish_of(options: dict[str, Any], labels: Sequence[str] = ()) -> Wish:
    """Return the wish that options say; what was not said is not in it. Raises BadInput."""
    wish = Wish()
    for name, value in options.items():
        if value == "" or (isinstance(value, tuple) and "" in value):
            # An unset variable of a shell is not to mean that anything will do.
            raise BadInput(
                f"{_FLAGS.get(name, '--' + name.replace('_', '-'))}: wanted a value, found none"
            )
    options = {
        **options,
        "model": options.get("models") or None,
        "node_labels": dict(
            _label(each, "--node-label") for each in options.get("node_labels") or ()
        )
        or None,
        "require_same_label": options.get("require_same"),
    }
    for name in Wish.__annotations__:
        if options.get(name) is not None:
            wish[name] = options[name]  # type: ignore[literal-required]
    if labels:
        wish["labels"] = dict(_label(each, "--label") for each in labels)
    return wish


def _label(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(f"{option}: wanted KEY=VALUE, found {text[:60]!r}")
    return key, value
