"""Requests as messages and back."""

from collections.abc import Mapping

from stoker.client import errors
from stoker.client.model import GpuTopology, Request
from stoker.client.wire_health import given
from stoker.v1 import types_pb2

_TOPOLOGIES: Mapping[int, GpuTopology] = {
    types_pb2.GPU_TOPOLOGY_UNSPECIFIED: GpuTopology.ANY,
    types_pb2.GPU_TOPOLOGY_NUMA: GpuTopology.NUMA,
    types_pb2.GPU_TOPOLOGY_NVLINK: GpuTopology.NVLINK,
}
_NUMBERS = {
    GpuTopology.ANY: types_pb2.GPU_TOPOLOGY_UNSPECIFIED,
    GpuTopology.NUMA: types_pb2.GPU_TOPOLOGY_NUMA,
    GpuTopology.NVLINK: types_pb2.GPU_TOPOLOGY_NVLINK,
}


def request_message(request: Request) -> types_pb2.Request:
    """Return the request as a message; raises InvalidRequest for what no field can carry."""
    if request.gpu_topology not in _NUMBERS:
        raise errors.InvalidRequest(f"gpu_topology: {request.gpu_topology} cannot be asked for")
    try:
        return types_pb2.Request(
            gpus=request.gpus,
            memory_bytes=request.memory_bytes,
            compute_milli=request.compute_milli,
            mig_profile=sendable(request.mig_profile, "mig_profile"),
            nodes=request.nodes if request.nodes != 1 else 0,
            holder=sendable(request.holder, "holder"),
            ttl_seconds=request.ttl_seconds,
            cpu_milli=request.cpu_milli,
            host_memory_bytes=request.host_memory_bytes,
            models=[sendable(model, "model") for model in request.models],
            gpu_memory_min_bytes=request.gpu_memory_min_bytes,
            compute_capability_min=sendable(request.compute_capability_min, "compute_capability"),
            driver_version_min=sendable(request.driver_version_min, "driver_version"),
            pool=sendable(request.pool, "pool"),
            node=sendable(request.node, "node"),
            host_boot_id=sendable(request.host_boot_id, "host_boot_id"),
            node_labels=_labels(request.node_labels, "node_labels"),
            gpu_topology=_NUMBERS[request.gpu_topology],
            gpu_topology_required=request.gpu_topology_required,
            same_label=sendable(request.same_label, "same_label"),
            same_label_required=request.same_label_required,
            service=sendable(request.service, "service"),
            anti_affinity=sendable(request.anti_affinity, "anti_affinity"),
            spread=sendable(request.spread, "spread"),
            near_service=sendable(request.near_service, "near_service"),
            preferred_gpu_uuid=sendable(request.preferred_gpu_uuid, "preferred_gpu_uuid"),
            duration_seconds=request.duration_seconds,
            movable=request.movable,
            labels=_labels(request.labels, "labels"),
            priority=request.priority,
        )
    except ValueError as error:  # a number that its field cannot carry
        raise errors.InvalidRequest(f"request: {error}") from error


def read_request(message: types_pb2.Request) -> Request:
    """Return the request that an answer carries."""
    return Request(
        gpus=message.gpus,
        holder=message.holder,
        ttl_seconds=message.ttl_seconds,
        memory_bytes=given(message, "memory_bytes"),
        compute_milli=given(message, "compute_milli"),
        mig_profile=message.mig_profile,
        nodes=max(1, message.nodes),
        cpu_milli=message.cpu_milli,
        host_memory_bytes=message.host_memory_bytes,
        models=tuple(message.models),
        gpu_memory_min_bytes=message.gpu_memory_min_bytes,
        compute_capability_min=message.compute_capability_min,
        driver_version_min=message.driver_version_min,
        pool=message.pool,
        node=message.node,
        host_boot_id=message.host_boot_id,
        node_labels=dict(message.node_labels) or None,
        gpu_topology=_TOPOLOGIES.get(message.gpu_topology, GpuTopology.UNKNOWN),
        gpu_topology_required=message.gpu_topology_required,
        same_label=message.same_label,
        same_label_required=message.same_label_required,
        service=message.service,
        anti_affinity=message.anti_affinity,
        spread=message.spread,
        near_service=message.near_service,
        preferred_gpu_uuid=message.preferred_gpu_uuid,
        duration_seconds=given(message, "duration_seconds"),
        movable=message.movable,
        labels=dict(message.labels) or None,
        priority=message.priority,
    )


def sendable(value: str, what: str) -> str:
    """Return text that can be sent; a shell hands over bytes that are no UTF-8 as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidRequest(f"{what}: wanted UTF-8, found {value[:60]!r}") from error
    return value


def _labels(labels: Mapping[str, str] | None, what: str) -> dict[str, str]:
    return {sendable(key, what): sendable(value, what) for key, value in (labels or {}).items()}
