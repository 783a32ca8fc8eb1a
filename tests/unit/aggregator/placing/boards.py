"""Boards as their vendors wire them, and nodes with such a board as placement sees them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.unit.aggregator.builders import GIB, H100, START, make_facts, make_samples

from stoker.aggregator.changelog import ChangeLog
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Claim,
    DriverState,
    Gpu,
    MigDevice,
    Node,
    NodeStatus,
    Placement,
    Request,
)
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.views import FleetView, NodeView, view_node

V100 = "Tesla V100-SXM2-32GB"
A40 = "NVIDIA A40"

# `nvidia-smi topo -m` of a DGX-1 with V100: two quads of four, and each GPU linked across.
CUBE_MESH = (
    (0, 1, 1, 2, 2, 0, 0, 0),
    (1, 0, 2, 1, 0, 2, 0, 0),
    (1, 2, 0, 2, 0, 0, 1, 0),
    (2, 1, 2, 0, 0, 0, 0, 1),
    (2, 0, 0, 0, 0, 1, 1, 2),
    (0, 2, 0, 0, 1, 0, 2, 1),
    (0, 0, 1, 0, 1, 2, 0, 2),
    (0, 0, 0, 1, 2, 1, 2, 0),
)


def wired(
    links: Sequence[Sequence[int]],
    numa: Sequence[int | None] | None = None,
    model: str = H100,
    node: str = "n1",
    switch_links: Sequence[int] | None = None,
) -> tuple[Gpu, ...]:
    """GPUs with so many links to each other, and to switches."""
    count = len(links)
    return tuple(
        Gpu(
            f"{node}-{i}",
            model,
            i,
            80 * GIB,
            number=i + 1,
            numa_node=None if numa is None else numa[i],
            nvlink_peers=tuple((f"{node}-{j}", links[i][j]) for j in range(count) if links[i][j]),
            nvswitch_links=0 if switch_links is None else switch_links[i],
        )
        for i in range(count)
    )


def unlinked(numa: Sequence[int | None], **fields: Any) -> tuple[Gpu, ...]:
    return wired([[0] * len(numa) for _ in numa], numa, **fields)


def dgx_h100(node: str = "n1") -> tuple[Gpu, ...]:
    """Eight GPUs behind NVSwitches, four at each socket."""
    return unlinked([0] * 4 + [1] * 4, node=node, switch_links=[18] * 8)


def dgx_v100(node: str = "n1") -> tuple[Gpu, ...]:
    return wired(CUBE_MESH, [0] * 4 + [1] * 4, V100, node)


def bridged_pairs(count: int = 8, node: str = "n1") -> tuple[Gpu, ...]:
    """PCIe cards, each two joined by bridges with four links."""
    links = [[4 if i // 2 == j // 2 and i != j else 0 for j in range(count)] for i in range(count)]
    return wired(links, [i * 2 // count for i in range(count)], A40, node)


def plain(node: str = "n1") -> tuple[Gpu, ...]:
    """Eight cards without NVLink, four at each socket."""
    return unlinked([0] * 4 + [1] * 4, node=node)


def view_of(
    gpus: Sequence[Gpu],
    taken: Iterable[int] = (),
    node: str = "n1",
    labels: Mapping[str, str] | None = None,
    tenants: Sequence[Allocation] = (),
    claims: Mapping[str, tuple[Claim, ...]] | None = None,
) -> NodeView:
    """A node where everything is well, with the GPUs at these places taken whole."""
    facts = replace(make_facts(node, tuple(gpus)), labels=labels, cpu_milli=64_000)
    status = NodeStatus(
        session=1,
        samples=make_samples(gpus),
        processes=ProcessTable(START, ()),
        driver=DriverState.READING,
    )
    all_claims = {gpus[place].uuid: (Claim("other", None),) for place in taken} | dict(claims or {})
    return view_node(Node(facts, START, 1), all_claims, status, {}, tenants)


def fleet_of(*nodes: NodeView, allocations: Sequence[Allocation] = ()) -> FleetView:
    """A fleet of these nodes, all fresh."""
    return FleetView(
        START,
        {node.name: node for node in nodes},
        {node.name: START + 60.0 for node in nodes},
        statuses={},
        allocations={each.id: each for each in allocations},
        log=ChangeLog(),
    )


def granted(id_: str, request: Request, *placements: Placement, at: float = START) -> Allocation:
    return Allocation(
        id_, AllocationState.GRANTED, request, at, 1, placements=placements, granted_at=at
    )


def partitioned(index: int, *profiles: tuple[str, int], node: str = "n1") -> Gpu:
    """A card in MIG mode with these profiles, each a GPU instance with one compute instance."""
    devices = tuple(
        MigDevice(f"MIG-{node}-{index}-{i}", profile, gib * GIB, i + 1, 0)
        for i, (profile, gib) in enumerate(profiles)
    )
    return Gpu(
        f"{node}-{index}",
        H100,
        index,
        80 * GIB,
        number=index + 1,
        mig_enabled=True,
        mig_devices=devices,
    )
