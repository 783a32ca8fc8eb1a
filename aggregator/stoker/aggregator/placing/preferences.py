"""How well a node meets what a request would like, where that is more than it must have."""

from collections.abc import Mapping

from stoker.aggregator.model import GpuTopology, Request
from stoker.aggregator.placing.devices import choose, gpus_for_part, gpus_of_service
from stoker.aggregator.placing.topology import satisfies
from stoker.aggregator.views import FleetView, NodeView

Tier = tuple[int, ...]  # the lesser the better


def has_preferences(request: Request) -> bool:
    """Whether nodes that fit may differ in what the request would like."""
    return (
        request.preferred_gpu_uuid is not None
        or _prefers_topology(request)
        or request.near_service is not None
        or _spreads(request)
    )


def tier(request: Request, node: NodeView, view: FleetView) -> Tier:
    """Return how well the node meets the preferences; for many nodes `Tiers` is faster."""
    return Tiers(request, view).of(node)


class Tiers:
    """How well nodes that fit meet one request's preferences, as the fleet is in `view`.

    In this order: the GPU that it names can be had; the GPUs can lie to each other as it would
    like; the service that it would be near is there; how many of its own service are in the same
    place already, be that the GPU, the node or the value of a label. A node without that label is
    in no place that could be told from others, and comes last.
    """

    def __init__(self, request: Request, view: FleetView) -> None:
        self._request = request
        self._view = view
        self._service = request.service
        spread = request.spread if request.service is not None else None
        # The node label to spread over; None: none is.
        self.label = spread if spread not in ("gpu", "node") else None
        self._on_value = self._count_by_label()

    def of(self, node: NodeView) -> Tier:
        """Return the node's tier."""
        if self.label is None:
            return self.fixed(node)
        value = (node.node.facts.labels or {}).get(self.label)
        return (*self.fixed(node), *self.crowd(value))

    def fixed(self, node: NodeView) -> Tier:
        """Return the node's tier but for how crowded its value of `label` is."""
        request = self._request
        found: list[int] = []
        if request.preferred_gpu_uuid is not None or _prefers_topology(request):
            devices = choose(request, node, self._view) or ()
            uuids = {device.uuid for device in devices}
            if request.preferred_gpu_uuid is not None:
                found.append(request.preferred_gpu_uuid not in uuids)
            if _prefers_topology(request):
                gpus = [gpu.gpu for gpu in node.gpus if gpu.gpu.uuid in uuids]
                found.append(not satisfies(gpus, request.gpu_topology))
        if request.near_service is not None:
            found.append(request.near_service not in node.services)
        if self._service is not None and request.spread == "node":
            found.append(len(node.services.get(self._service, ())))
        if self._service is not None and request.spread == "gpu" and not request.is_whole:
            own = gpus_of_service(request, node)
            fitting = gpus_for_part(request, node)
            found.append(min((own.get(gpu.gpu.uuid, 0) for gpu in fitting), default=0))
        return tuple(found)

    def crowd(self, value: str | None, more: int = 0) -> Tier:
        """Return how crowded that value of `label` is once `more` of the service are there."""
        if self.label is None:
            return ()
        return (1, 0) if value is None else (0, self._on_value.get(value, 0) + more)

    def _count_by_label(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        if self.label is None or self._service is None:
            return counts
        for node in self._view.nodes.values():
            here = len(node.services.get(self._service, ()))
            value = (node.node.facts.labels or {}).get(self.label)
            if here and value is not None:
                counts[value] = counts.get(value, 0) + here
        return counts


def _prefers_topology(request: Request) -> bool:
    is_open = request.gpu_topology is not GpuTopology.ANY and not request.gpu_topology_required
    return is_open and request.is_whole and request.gpus > 1


def _spreads(request: Request) -> bool:
    return request.spread is not None and request.service is not None
