"""The verbs that keep a node or one GPU from new work, and let it back: cordon, drain, uncordon."""

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from stoker.cli.gpus import uuid_of
from stoker.cli.settings import Settings, fleet_options
from stoker.cli.text import as_json, document, one_line
from stoker.cli.wording import counted
from stoker.client import Fleet, Gpu, Node
from stoker.core.units import format_duration, parse_duration

C = TypeVar("C", bound=Callable[..., Any])


def gpu_option(command: C) -> C:
    """Add --gpu."""
    return click.option(
        "--gpu", metavar="INDEX|UUID", help="Only this GPU: its number on the node, or its UUID."
    )(command)


def reason_option(command: C) -> C:
    """Add --reason."""
    return click.option("--reason", required=True, metavar="TEXT", help="Shown in every refusal.")(
        command
    )


@click.command()
@fleet_options
@reason_option
@gpu_option
@click.argument("node")
@click.pass_obj
def cordon(settings: Settings, node: str, gpu: str | None, reason: str) -> None:
    """Let nothing new go to NODE, or to one GPU of it; what it holds stays."""
    with settings.connect() as fleet:
        uuid = _uuid(gpu, node, fleet)
        _print(settings, fleet.cordon(node, reason, uuid), uuid)


@click.command()
@fleet_options
@gpu_option
@click.argument("node")
@click.pass_obj
def uncordon(settings: Settings, node: str, gpu: str | None) -> None:
    """Let allocations go to NODE again, or to one GPU of it; ends a drain too.

    The cordon of a node and those of its GPUs are apart: each is ended by itself.
    """
    with settings.connect() as fleet:
        uuid = _uuid(gpu, node, fleet)
        _print(settings, fleet.uncordon(node, uuid), uuid)


@click.command()
@fleet_options
@reason_option
@gpu_option
@click.option(
    "--grace", metavar="DURATION", help="End what is still held after so long, such as 10m."
)
@click.argument("node")
@click.pass_obj
def drain(settings: Settings, node: str, gpu: str | None, reason: str, grace: str | None) -> None:
    """Cordon NODE, or one GPU of it, and wait for what it holds to end.

    With --grace what is still held then is ended, and its holder is told the reason. Returns at
    once; it is over when nothing is held any more, as `stoker status` shows.
    """
    seconds = None if grace is None else parse_duration(grace, "--grace")
    with settings.connect() as fleet:
        uuid = _uuid(gpu, node, fleet)
        answer = fleet.drain(node, reason, uuid, seconds)
    if settings.json:
        print(as_json(document(answer)))
    else:
        print(one_line(f"{_standing(answer, uuid)}; {_remaining(answer, uuid, time.time())}"))


def _uuid(gpu: str | None, node: str, fleet: Fleet) -> str | None:
    return None if gpu is None else uuid_of(gpu, node, fleet.nodes)


def _print(settings: Settings, node: Node, gpu_uuid: str | None) -> None:
    if settings.json:
        print(as_json(document(node)))
    else:
        print(one_line(_standing(node, gpu_uuid)))


def _standing(node: Node, gpu_uuid: str | None) -> str:
    """Return whether what was meant is cordoned, and what beside it still is."""
    of_node = _cordoned(node.name, node.cordoned)
    if gpu_uuid is None:
        beside = [_of_gpu(gpu) for gpu in node.gpus if gpu.cordon is not None]
        return "; ".join([of_node, *beside])
    meant = [_of_gpu(gpu, f" of {node.name}") for gpu in _meant(node, gpu_uuid)]
    beside = [] if node.cordoned is None else [of_node]
    return "; ".join([*(meant or [f"{gpu_uuid} is not on {node.name} now"]), *beside])


def _of_gpu(gpu: Gpu, where: str = "") -> str:
    return _cordoned(f"GPU {gpu.index}{where}", gpu.cordon.reason if gpu.cordon else None)


def _cordoned(what: str, reason: str | None) -> str:
    return f"{what} not cordoned" if reason is None else f"{what} cordoned: {reason}"


def _remaining(node: Node, gpu_uuid: str | None, now: float) -> str:
    """Return what a drain waits for, and until when."""
    meant = _meant(node, gpu_uuid)
    ids = dict.fromkeys(id_ for gpu in meant for id_ in gpu.allocation_ids)
    if not ids:
        return "nothing is held"
    drain_at = _drain_at(node, gpu_uuid, meant)
    ends = "waited for" if drain_at is None else f"ended in {_until(drain_at, now)}"
    return f"{counted(len(ids), 'allocation')} held, {ends}: {', '.join(ids)}"


def _drain_at(node: Node, gpu_uuid: str | None, meant: Iterable[Gpu]) -> float | None:
    if gpu_uuid is None:
        return node.drain_at
    return next((gpu.cordon.drain_at for gpu in meant if gpu.cordon is not None), None)


def _meant(node: Node, gpu_uuid: str | None) -> list[Gpu]:
    return [gpu for gpu in node.gpus if gpu_uuid in (None, gpu.uuid)]


def _until(at: float, now: float) -> str:
    return format_duration(max(0.0, at - now))
