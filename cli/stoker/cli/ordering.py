"""The order in which people look for things: gpu-2 stands before gpu-10."""

import re
from dataclasses import replace

from stoker.client import Nodes

_NUMBER = re.compile(r"(\d+)", re.ASCII)


def in_order(nodes: Nodes) -> Nodes:
    """Return the nodes by name, the GPUs of each by number."""
    ordered = [
        replace(node, gpus=tuple(sorted(node.gpus, key=lambda gpu: gpu.index)))
        for node in sorted(nodes.nodes, key=lambda node: name_key(node.name))
    ]
    return replace(nodes, nodes=tuple(ordered))


def name_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return what sorts names with their numbers as numbers."""
    return tuple(
        (int(part), "") if position % 2 else (0, part)
        for position, part in enumerate(_NUMBER.split(name))
    )
