"""How much of what is free can be used: the capacity of the fleet less its fragments.

The measure is that of fragmentation gradient descent (Weng et al., "Beware of Fragmentation",
USENIX ATC 2023), turned round. To one kind of request the free part of a GPU is of use when the
node could take the request now and the GPU a part of it; all other free capacity is a fragment. A
node's usable capacity is the mean of that over the kinds of request that the fleet has had, each
as often as it came. A move takes as much as it gives back, so what it gains in usable capacity is
exactly what it mends in fragmentation.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoker.aggregator.model import COMPUTE_MILLI, Allocation, Device, Request
from stoker.aggregator.placing.filters import could_ever_fit, matches_gpu, share_bytes_of
from stoker.aggregator.placing.shapes import shape_of
from stoker.aggregator.views import FleetView, GpuView, NodeView

GPU_MILLI = 1000  # one GPU's worth
# The most frequent kinds of request stand for all; beyond that a mean does not change any more.
KINDS_MAX = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request, and how many of it there were."""

    request: Request
    count: int


def kinds_of(allocations: Iterable[Allocation]) -> tuple[Kind, ...]:
    """Return the kinds of request among these, the most frequent first.

    Without MIG devices, which have room of their own, and without what takes no GPU.
    """
    first: dict[tuple[object, ...], Request] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for allocation in allocations:
        request = allocation.request
        if request.gpus == 0 or request.mig_profile is not None:
            continue
        key = _key(request)
        first.setdefault(key, request)
        counts[key] += 1
    # Equal counts stay in the order of arrival, so that the same fleet gives the same plan.
    return tuple(Kind(first[key], count) for key, count in counts.most_common(KINDS_MAX))


class Usable:
    """The measure, for one fleet and its kinds of request.

    What could ever go to a node is remembered: a node's GPUs must not change meanwhile.
    """

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self._kinds = kinds
        self._total = sum(kind.count for kind in kinds)
        self._open_to: dict[str, tuple[Kind, ...]] = {}

    def milli(self, node: NodeView, view: FleetView) -> float:
        """Return the node's usable capacity in thousandths of a GPU; 0 where nothing new goes."""
        is_fresh = view.now <= view.fresh_until.get(node.name, float("-inf"))
        if not self._total or node.node.cordoned is not None or node.problem or not is_fresh:
            return 0.0
        kinds = self._open_to.get(node.name)
        if kinds is None:
            kinds = self._open_to[node.name] = tuple(
                kind for kind in self._kinds if could_ever_fit(kind.request, node, view)
            )
        cards: dict[tuple[str, int, str], list[GpuView]] = {}
        for gpu in node.gpus:  # what is asked of a model is asked once
            facts = gpu.gpu
            card = (facts.model, facts.memory_total_bytes, facts.compute_capability)
            cards.setdefault(card, []).append(gpu)
        alike = list(cards.values())
        return sum(kind.count * _useful_milli(kind.request, node, alike) for kind in kinds) / (
            self._total
        )


def share_milli(device: Device, memory_total_bytes: int) -> int:
    """Return how much of its GPU a device is, in thousandths: of memory or compute, the larger."""
    if device.exclusive or memory_total_bytes <= 0:
        return GPU_MILLI
    of_memory = -(-device.memory_bytes * GPU_MILLI // memory_total_bytes)
    return min(GPU_MILLI, max(of_memory, device.compute_milli or 0))


def size_milli(allocation: Allocation, nodes: Mapping[str, NodeView]) -> int:
    """Return how many thousandths of a GPU an allocation holds."""
    total = 0
    for placement in allocation.placements:
        node = nodes.get(placement.node)
        memory = {gpu.gpu.uuid: gpu.gpu.memory_total_bytes for gpu in node.gpus} if node else {}
        total += sum(share_milli(each, memory.get(each.uuid, 0)) for each in placement.devices)
    return total


def _key(request: Request) -> tuple[object, ...]:
    """Return what decides where a request could go, and how much it takes there."""
    return (shape_of(request), request.node, request.host_boot_id)


def _useful_milli(request: Request, node: NodeView, alike: list[list[GpuView]]) -> int:
    """Return how much of the node is of use to the request, in thousandths of a GPU.

    `alike` are its GPUs, those of one kind together.
    """
    if node.cpu_free_milli is not None and node.cpu_free_milli < request.cpu_milli:
        return 0
    memory = node.host_memory_free_bytes
    if memory is not None and memory < request.host_memory_bytes:
        return 0
    groups = [gpus for gpus in alike if matches_gpu(request, gpus[0].gpu)]
    if request.is_share:
        return sum(_free_milli(gpu) for gpus in groups for gpu in gpus if _takes(gpu, request))
    free: Counter[str] = Counter()  # all of one request are of one model
    for gpus in groups:
        free[gpus[0].gpu.model] += sum(gpu.is_free for gpu in gpus)
    return GPU_MILLI * sum(count for count in free.values() if count >= request.gpus)


def _takes(gpu: GpuView, request: Request) -> bool:
    wanted = share_bytes_of(request, gpu)
    has_compute = gpu.compute_free_milli >= (request.compute_milli or 0)
    return 0 < wanted <= gpu.room_bytes and has_compute


def _free_milli(gpu: GpuView) -> int:
    if gpu.is_free:
        return GPU_MILLI
    of_memory = gpu.room_bytes * GPU_MILLI // gpu.gpu.memory_total_bytes
    return min(of_memory, gpu.compute_free_milli * GPU_MILLI // COMPUTE_MILLI)
