"""Which GPU of a node a person means: by its number there, or by its UUID."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.core.errors import BadInput, shown

if TYPE_CHECKING:  # the verbs for the agent of this machine need no gRPC
    from stoker.client import Node, Nodes

UUID_PREFIX = "GPU-"
_DIGITS_MAX = 6  # no host has a GPU with a longer number


def checked_gpu(text: str, what: str) -> str:
    """Return what may name a GPU: its number on its node, or its UUID; raises BadInput."""
    if not _is_number(text) and not text.startswith(UUID_PREFIX):
        raise BadInput(
            f"{what}: wanted a GPU's number on its node or its UUID ({UUID_PREFIX}...), "
            f"found {shown(text)}"
        )
    return text


def uuid_of(text: str, node: str, list_nodes: "Callable[[], Nodes]") -> str:
    """Return the UUID of the GPU that `text` names; only a number has to be looked up.

    Raises BadInput for what can name none, NotFound for what the fleet does not have.
    """
    from stoker.client import NotFound

    if not _is_number(checked_gpu(text, "--gpu")):
        return text
    for each in list_nodes().nodes:
        if each.name == node:
            return _uuid_at(int(text), each)
    raise NotFound(f"node {shown(node)} is not known")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX


def _uuid_at(index: int, node: "Node") -> str:
    from stoker.client import NotFound

    uuids = [
        *(gpu.uuid for gpu in node.gpus if gpu.index == index),
        *(missing.uuid for missing in node.missing_gpus if missing.index == index),
    ]
    if not uuids:
        known = {gpu.index for gpu in node.gpus} | {each.index for each in node.missing_gpus}
        numbers = ", ".join(map(str, sorted(known))) or "none"
        raise NotFound(f"GPU {index} is not known on {node.name}; its GPUs: {numbers}")
    found = next(filter(None, uuids), None)
    if found is None:
        raise NotFound(
            f"GPU {index} of {node.name} was never read, so it has no UUID to be named by"
        )
    return found
