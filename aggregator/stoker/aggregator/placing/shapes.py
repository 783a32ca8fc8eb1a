"""What of a request decides where it can go and how good a place is: its shape.

Who asks, for how long, with which labels and at which priority does not count here. Nor do the
constraints that name one node or look at other allocations: those are looked at apart, node by
node (`is_plain`).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from stoker.aggregator.model import COMPUTE_MILLI, Gpu, GpuTopology, Request


class Take(IntEnum):
    """What a request takes of a node, beside CPU and memory; the kernels know the numbers."""

    CPU = 0  # no GPU
    SHARE = 1
    WHOLE = 2
    MIG = 3


class Shape(NamedTuple):
    """The part of a request that decides; equal shapes have equal scores."""

    gpus: int
    memory_bytes: int | None
    compute_milli: int | None
    mig_profile: str | None
    cpu_milli: int
    host_memory_bytes: int
    models: tuple[str, ...]
    gpu_memory_min_bytes: int
    compute_capability_min: tuple[int, int] | None
    driver_version_min: tuple[int, ...] | None
    pool: str | None
    node_labels: tuple[tuple[str, str], ...]
    same_label: str | None  # of a gang that requires it

    @property
    def take(self) -> Take:
        """What it takes of a node."""
        if self.mig_profile is not None:
            return Take.MIG
        if self.gpus == 0:
            return Take.CPU
        is_share = self.memory_bytes is not None or self.compute_milli is not None
        return Take.SHARE if is_share else Take.WHOLE

    def sample(self) -> Request:
        """Return a request of this shape."""
        return Request(
            gpus=self.gpus,
            holder="",
            ttl_seconds=0.0,
            memory_bytes=self.memory_bytes,
            compute_milli=self.compute_milli,
            mig_profile=self.mig_profile,
            nodes=1 if self.same_label is None else 2,
            cpu_milli=self.cpu_milli,
            host_memory_bytes=self.host_memory_bytes,
            models=self.models,
            gpu_memory_min_bytes=self.gpu_memory_min_bytes,
            compute_capability_min=self.compute_capability_min,
            driver_version_min=self.driver_version_min,
            pool=self.pool,
            node_labels=dict(self.node_labels),
            same_label=self.same_label,
            same_label_required=self.same_label is not None,
        )


class Card(NamedTuple):
    """What GPUs have in common that the same requests can use."""

    model: str
    memory_total_bytes: int
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Size:
    """What a shape takes of one GPU of some card."""

    memory_bytes: int
    compute_milli: int
    milli: int  # the larger part of the two, for scores; 1000: all of it


def shape_of(request: Request) -> Shape:
    """Return the shape of the request."""
    labels = request.node_labels
    return Shape(
        request.gpus,
        request.memory_bytes,
        request.compute_milli,
        request.mig_profile,
        request.cpu_milli,
        request.host_memory_bytes,
        request.models,
        request.gpu_memory_min_bytes,
        request.compute_capability_min,
        request.driver_version_min,
        request.pool,
        tuple(sorted(labels.items())) if labels else (),
        request.same_label if request.same_label_required and request.nodes > 1 else None,
    )


def is_plain(request: Request) -> bool:
    """Whether nothing beside its shape counts: one node, any, without wishes about its GPUs."""
    return (
        request.nodes == 1
        and request.node is None
        and request.host_boot_id is None
        and request.gpu_topology is GpuTopology.ANY
        and request.anti_affinity is None
        and request.spread is None
        and request.near_service is None
        and request.preferred_gpu_uuid is None
    )


def card_of(gpu: Gpu) -> Card:
    """Return what the GPU has in common with others like it."""
    return Card(gpu.model, gpu.memory_total_bytes, gpu.compute_capability)


def size_of(shape: Shape, card: Card) -> Size:
    """Return what the shape takes of one GPU of that card."""
    total = card.memory_total_bytes
    if shape.take is not Take.SHARE:
        return Size(total, COMPUTE_MILLI, COMPUTE_MILLI)
    compute = shape.compute_milli or 0
    memory = shape.memory_bytes
    if memory is None:
        memory = total * compute // COMPUTE_MILLI
    part = -(-memory * COMPUTE_MILLI // total) if total else COMPUTE_MILLI
    return Size(memory, compute, min(COMPUTE_MILLI, max(1, compute, part)))


def label_names(shape: Shape) -> set[str]:
    """Return the node labels that the shape asks about."""
    names = {name for name, _ in shape.node_labels}
    return names if shape.same_label is None else names | {shape.same_label}
