"""Requests as messages to values and back; raises Malformed with the field's path."""

import re

from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import COMPUTE_MILLI, MIG_ANY, GpuTopology, Request
from stoker.core.errors import shown
from stoker.v1 import types_pb2

TOPOLOGIES = {
    types_pb2.GPU_TOPOLOGY_UNSPECIFIED: GpuTopology.ANY,
    types_pb2.GPU_TOPOLOGY_NUMA: GpuTopology.NUMA,
    types_pb2.GPU_TOPOLOGY_NVLINK: GpuTopology.NVLINK,
}
_MESSAGES = {value: number for number, value in TOPOLOGIES.items()}

_CAPABILITY = re.compile(r"(\d{1,3})\.(\d{1,3})", re.ASCII)
_DRIVER = re.compile(r"\d{1,6}(?:\.\d{1,6}){0,3}", re.ASCII)
_MIG_PROFILE = re.compile(r"(?:\d+c\.)?\d+g\.\d+gb(?:[+-][a-z.]+)*", re.ASCII)


def read_request(message: types_pb2.Request) -> Request:
    """Return the request as a value."""
    compute_milli = None
    if message.HasField("compute_milli"):
        compute_milli = int(
            limits.number(message.compute_milli, "request.compute_milli", 1, COMPUTE_MILLI)
        )
    memory_bytes = None
    if message.HasField("memory_bytes"):
        memory_bytes = limits.size(message.memory_bytes, "request.memory_bytes")
    mig_profile = _mig_profile(message.mig_profile)
    if mig_profile not in (None, MIG_ANY) and compute_milli is not None:
        raise Malformed(
            "request.compute_milli",
            f"a MIG {mig_profile} has the compute of its profile; leave it out, or ask for "
            f"{MIG_ANY!r}",
        )
    _check_gpus(
        message,
        is_mig=mig_profile is not None,
        is_share=mig_profile is None and bool(memory_bytes or compute_milli),
    )
    service = limits.text(message.service, "request.service") or None
    for field, value in (("anti_affinity", message.anti_affinity), ("spread", message.spread)):
        if value and service is None:
            raise Malformed(f"request.{field}", "needs request.service: replicas of what?")
    return Request(
        gpus=max(1, message.gpus),
        holder=limits.text(message.holder, "request.holder", required=True),
        ttl_seconds=limits.number(
            message.ttl_seconds, "request.ttl_seconds", 1.0, limits.TTL_SECONDS_MAX
        ),
        memory_bytes=memory_bytes,
        compute_milli=compute_milli,
        mig_profile=mig_profile,
        nodes=max(1, message.nodes),
        cpu_milli=int(
            limits.number(message.cpu_milli, "request.cpu_milli", 0, limits.CPU_MILLI_MAX)
        ),
        host_memory_bytes=_size_or_zero(message.host_memory_bytes, "request.host_memory_bytes"),
        models=_models(message),
        gpu_memory_min_bytes=_size_or_zero(
            message.gpu_memory_min_bytes, "request.gpu_memory_min_bytes"
        ),
        compute_capability_min=_capability(message.compute_capability_min),
        driver_version_min=_driver(message.driver_version_min),
        pool=limits.text(message.pool, "request.pool") or None,
        node=limits.dns_name(message.node, "request.node") if message.node else None,
        host_boot_id=limits.text(message.host_boot_id, "request.host_boot_id") or None,
        node_labels=limits.labels(message.node_labels, "request.node_labels"),
        gpu_topology=_topology(message),
        gpu_topology_required=message.gpu_topology_required,
        same_label=_label_key(message.same_label, "request.same_label"),
        same_label_required=message.same_label_required,
        service=service,
        anti_affinity=_label_key(message.anti_affinity, "request.anti_affinity"),
        spread=_label_key(message.spread, "request.spread"),
        near_service=limits.text(message.near_service, "request.near_service") or None,
        preferred_gpu_uuid=limits.text(message.preferred_gpu_uuid, "request.preferred_gpu_uuid")
        or None,
        duration_seconds=limits.number(
            message.duration_seconds, "request.duration_seconds", 0.0, limits.TTL_SECONDS_MAX
        )
        if message.HasField("duration_seconds")
        else None,
        movable=message.movable,
        labels=limits.labels(message.labels, "request.labels"),
        priority=int(
            limits.number(
                message.priority, "request.priority", -limits.PRIORITY_MAX, limits.PRIORITY_MAX
            )
        ),
    )


def request_message(request: Request) -> types_pb2.Request:
    """Return the request as a message."""
    capability, driver = request.compute_capability_min, request.driver_version_min
    return types_pb2.Request(
        gpus=request.gpus,
        memory_bytes=request.memory_bytes,
        compute_milli=request.compute_milli,
        mig_profile=request.mig_profile or "",
        nodes=request.nodes if request.nodes > 1 else 0,
        holder=request.holder,
        ttl_seconds=request.ttl_seconds,
        cpu_milli=request.cpu_milli,
        host_memory_bytes=request.host_memory_bytes,
        models=request.models,
        gpu_memory_min_bytes=request.gpu_memory_min_bytes,
        compute_capability_min=".".join(map(str, capability)) if capability else "",
        driver_version_min=".".join(map(str, driver)) if driver else "",
        pool=request.pool or "",
        node=request.node or "",
        host_boot_id=request.host_boot_id or "",
        node_labels=request.node_labels,
        gpu_topology=_MESSAGES[request.gpu_topology],
        gpu_topology_required=request.gpu_topology_required,
        same_label=request.same_label or "",
        same_label_required=request.same_label_required,
        service=request.service or "",
        anti_affinity=request.anti_affinity or "",
        spread=request.spread or "",
        near_service=request.near_service or "",
        preferred_gpu_uuid=request.preferred_gpu_uuid or "",
        duration_seconds=request.duration_seconds,
        movable=request.movable,
        labels=request.labels,
        priority=request.priority,
    )


def read_id(value: str, field: str) -> str:
    """Return the id of an allocation."""
    return limits.text(value, field, limits.ID_BYTES_MAX, required=True)


def _check_gpus(message: types_pb2.Request, *, is_mig: bool, is_share: bool) -> None:
    if not is_mig and not is_share:
        limits.number(message.gpus, "request.gpus", 1, limits.GPUS_MAX)
        limits.number(message.nodes, "request.nodes", 0, limits.GANG_NODES_MAX)
        return
    if is_mig:
        limits.number(message.gpus, "request.gpus", 0, limits.MIG_DEVICES_PER_REQUEST_MAX)
    elif message.gpus > 1:
        raise Malformed(
            "request.gpus",
            f"a share (memory_bytes, compute_milli) is of one GPU, found gpus={message.gpus}; "
            "ask for whole GPUs, or for one share at a time",
        )
    if message.nodes > 1:
        raise Malformed(
            "request.nodes",
            "a share (memory_bytes, compute_milli) is on one node, and so are MIG devices, "
            f"found nodes={message.nodes}; "
            "a gang is of whole GPUs",
        )


def _models(message: types_pb2.Request) -> tuple[str, ...]:
    if len(message.models) > limits.MODELS_MAX:
        raise Malformed(
            "request.models", f"at most {limits.MODELS_MAX}, found {len(message.models)}"
        )
    return tuple(
        limits.text(model, "request.models", required=True)
        for model in dict.fromkeys(message.models)
    )


def _size_or_zero(value: int, field: str) -> int:
    return limits.size(value, field) if value else 0


def _mig_profile(value: str) -> str | None:
    if not value:
        return None
    text = value.casefold()
    if text != MIG_ANY and _MIG_PROFILE.fullmatch(text) is None:
        raise Malformed(
            "request.mig_profile",
            f"must be a profile such as '1g.10gb', or {MIG_ANY!r}, found {shown(value)}",
        )
    return text


def _capability(value: str) -> tuple[int, int] | None:
    if not value:
        return None
    found = _CAPABILITY.fullmatch(value)
    if found is None:
        raise Malformed(
            "request.compute_capability_min", f"must be as in '8.0', found {shown(value)}"
        )
    return int(found[1]), int(found[2])


def _driver(value: str) -> tuple[int, ...] | None:
    if not value:
        return None
    if _DRIVER.fullmatch(value) is None:
        raise Malformed(
            "request.driver_version_min",
            f"must be as in '570' or '570.124.06', found {shown(value)}",
        )
    return tuple(int(part) for part in value.split("."))


def _topology(message: types_pb2.Request) -> GpuTopology:
    topology = TOPOLOGIES.get(message.gpu_topology)
    if topology is None:
        raise Malformed(
            "request.gpu_topology", f"{message.gpu_topology} is none that this release knows"
        )
    return topology


def _label_key(value: str, field: str) -> str | None:
    return limits.text(value, field, limits.LABEL_KEY_BYTES_MAX) or None
