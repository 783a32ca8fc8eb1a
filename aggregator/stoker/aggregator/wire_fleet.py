"""Messages of the clients' door to values and back; raises Malformed with the field's path."""

from collections.abc import Iterable, Mapping

from stoker.aggregator import limits
from stoker.aggregator.fleet import INTERVALS_FRESH
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Assignment,
    Claim,
    Device,
    Gpu,
    GpuSample,
    MissingGpu,
    Node,
    NodeStatus,
    Process,
    ProcessTable,
    Refusal,
    Refusals,
    Request,
)
from stoker.aggregator.verdicts import Condition, GpuHealth
from stoker.aggregator.views import driver_problem
from stoker.aggregator.wire_health import (
    assignment_message,
    cordon_message,
    health_message,
    process_message,
)
from stoker.core.units import format_duration
from stoker.v1 import fleet_pb2, types_pb2

# More entries than a person reads; `nodes_total` says how many there were.
REFUSALS_MAX = 1_000

NOTHING_KNOWN: Mapping[str, Condition] = {}
_NO_PROCESSES = ProcessTable(0.0, ())

ALLOCATION_STATES = {
    AllocationState.WAITING: types_pb2.ALLOCATION_STATE_WAITING,
    AllocationState.GRANTED: types_pb2.ALLOCATION_STATE_GRANTED,
    AllocationState.RELEASING: types_pb2.ALLOCATION_STATE_RELEASING,
    AllocationState.ENDED: types_pb2.ALLOCATION_STATE_ENDED,
}


# --- what clients say


def read_request(message: types_pb2.Request) -> Request:
    """Return the request as a value."""
    memory_bytes = None
    if message.HasField("memory_bytes"):
        memory_bytes = limits.size(message.memory_bytes, "request.memory_bytes")
        if message.gpus > 1:
            raise Malformed(
                "request.gpus",
                f"a share (memory_bytes) is of one GPU, found gpus={message.gpus}; "
                "ask for whole GPUs without memory_bytes, or for one share at a time",
            )
    else:
        limits.number(message.gpus, "request.gpus", 1, limits.GPUS_MAX)
    return Request(
        gpus=max(1, message.gpus),
        holder=limits.text(message.holder, "request.holder", required=True),
        ttl_seconds=limits.number(
            message.ttl_seconds, "request.ttl_seconds", 1.0, limits.TTL_SECONDS_MAX
        ),
        memory_bytes=memory_bytes,
        model=limits.text(message.model, "request.model") or None,
        pool=limits.text(message.pool, "request.pool") or None,
        node=limits.dns_name(message.node, "request.node") if message.node else None,
        host_boot_id=limits.text(message.host_boot_id, "request.host_boot_id") or None,
        labels=limits.labels(message.labels, "request.labels"),
        priority=int(
            limits.number(
                message.priority, "request.priority", -limits.PRIORITY_MAX, limits.PRIORITY_MAX
            )
        ),
    )


def read_id(value: str, field: str) -> str:
    """Return the id of an allocation."""
    return limits.text(value, field, limits.ID_BYTES_MAX, required=True)


# --- what they are told


def environment(allocation: Allocation) -> dict[str, str]:
    """Return the variables that make a CUDA process see exactly the allocation's devices."""
    if not allocation.devices:
        return {}
    uuids = ",".join(device.uuid for device in allocation.devices)
    variables = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": uuids,
        "NVIDIA_VISIBLE_DEVICES": uuids,
        "STOKER_ALLOCATION_ID": allocation.id,
        "STOKER_NODE": allocation.node,
    }
    if allocation.request.memory_bytes is not None:
        variables["STOKER_MEMORY_LIMIT_BYTES"] = str(allocation.request.memory_bytes)
    return variables


def allocation_message(
    allocation: Allocation,
    expires_at: float | None = None,
    queue_position: int | None = None,
    *,
    is_held: bool = False,
) -> types_pb2.Allocation:
    """Return the allocation as a message."""
    return types_pb2.Allocation(
        id=allocation.id,
        state=ALLOCATION_STATES[allocation.state],
        node=allocation.node,
        devices=[_device(device) for device in allocation.devices],
        env=environment(allocation),
        expires_at=expires_at,
        request=_request(allocation.request),
        requested_at=allocation.requested_at,
        granted_at=allocation.granted_at,
        ended_at=allocation.ended_at,
        ended_reason=allocation.reason,
        queue_position=queue_position,
        resource_version=allocation.version,
        held_by_node=is_held,
    )


def node_message(
    node: Node,
    status: NodeStatus,
    claims: Mapping[str, tuple[Claim, ...]],
    fresh_until: float | None,
    now: float,
    conditions: Mapping[str, Condition] = NOTHING_KNOWN,
) -> fleet_pb2.Node:
    """Return the node as a message; `claims` and `conditions` are by GPU UUID."""
    facts = node.facts
    state, reason = node_state(status, fresh_until, now)
    table = status.processes or _NO_PROCESSES
    processes: dict[str, list[Process]] = {}
    for process in table.processes:
        processes.setdefault(process.gpu_uuid, []).append(process)
    assignments: dict[str, list[Assignment]] = {}
    for assignment in table.assignments:
        assignments.setdefault(assignment.gpu_uuid, []).append(assignment)
    oldest = now - INTERVALS_FRESH * facts.interval_seconds
    samples = status.samples or {}
    gpus = [
        _gpu(
            gpu,
            fresh_sample(samples.get(gpu.uuid), oldest),
            claims.get(gpu.uuid, ()),
            processes.get(gpu.uuid, ()),
            assignments.get(gpu.uuid, ()),
            health_of(status, conditions.get(gpu.uuid), gpu.uuid),
            conditions.get(gpu.uuid),
        )
        for gpu in facts.gpus
    ]
    return fleet_pb2.Node(
        name=facts.name,
        state=state,
        state_reason=reason,
        simulated=facts.simulated,
        cordoned=node.cordoned,
        pool=facts.pool,
        labels=facts.labels,
        boot_id=facts.boot_id,
        agent_version=facts.agent_version,
        driver_version=facts.driver_version,
        gpus=gpus,
        last_sample_at=status.last_sample_at,
        interval_seconds=facts.interval_seconds,
        cuda_version=facts.cuda_version,
        missing_gpus=[_missing(each) for each in status.missing],
        drain_at=node.drain_at,
        assignments_unknown=table.assignments_unknown,
    )


def health_of(status: NodeStatus, condition: Condition | None, uuid: str) -> GpuHealth | None:
    """Return what the GPU's agent judged last: now, or as the ledger has it; None: nothing yet."""
    told = (status.health or {}).get(uuid)
    return told or (condition.health if condition else None)


def node_state(
    status: NodeStatus, fresh_until: float | None, now: float
) -> "tuple[fleet_pb2.NodeState.ValueType, str]":
    """Return the node's state and, unless it is ready, why it is not."""
    if status.session == 0:
        return fleet_pb2.NODE_STATE_DISCONNECTED, status.disconnected_reason
    problem = driver_problem(status.driver, status.driver_reason)
    if problem:
        return fleet_pb2.NODE_STATE_STALE, problem
    if fresh_until is None:
        return fleet_pb2.NODE_STATE_STALE, "no sample of its GPUs has arrived yet"
    if now > fresh_until:
        late = format_duration(now - fresh_until)
        return fleet_pb2.NODE_STATE_STALE, f"its newest sample is {late} beyond three intervals"
    return fleet_pb2.NODE_STATE_READY, ""


def fresh_sample(sample: GpuSample | None, oldest: float) -> GpuSample | None:
    """Return the sample unless it is too old or tells nothing: late is absent, never old."""
    if sample is None or sample.at < oldest or not sample.is_read:
        return None
    return sample


def refusals_message(refusals: Refusals, nodes_max: int = REFUSALS_MAX) -> types_pb2.Refusals:
    """Return the refusals as a message with at most `nodes_max` of them."""
    return types_pb2.Refusals(
        summary=refusals.summary,
        nodes=[_refusal(refusal) for refusal in refusals.nodes[:nodes_max]],
        nodes_total=len(refusals.nodes),
        ahead=refusals.ahead,
    )


# --- helpers


def _device(device: Device) -> types_pb2.Device:
    return types_pb2.Device(
        uuid=device.uuid,
        model=device.model,
        index=device.index,
        memory_bytes=device.memory_bytes,
        exclusive=device.exclusive,
    )


def _request(request: Request) -> types_pb2.Request:
    return types_pb2.Request(
        gpus=request.gpus,
        memory_bytes=request.memory_bytes,
        holder=request.holder,
        ttl_seconds=request.ttl_seconds,
        model=request.model or "",
        pool=request.pool or "",
        node=request.node or "",
        host_boot_id=request.host_boot_id or "",
        labels=request.labels,
        priority=request.priority,
    )


def _gpu(
    gpu: Gpu,
    sample: GpuSample | None,
    claims: tuple[Claim, ...],
    processes: Iterable[Process],
    assignments: Iterable[Assignment],
    health: GpuHealth | None,
    condition: Condition | None,
) -> fleet_pb2.NodeGpu:
    message = fleet_pb2.NodeGpu(
        uuid=gpu.uuid,
        model=gpu.model,
        index=gpu.index,
        memory_total_bytes=gpu.memory_total_bytes,
        allocation_ids=[claim.allocation_id for claim in claims],
        processes=[process_message(process) for process in processes],
        pci_bus_id=gpu.pci_bus_id,
        health=health_message(health),
        cordon=cordon_message(condition.cordon if condition else None),
        assignments=[assignment_message(each) for each in assignments],
    )
    if sample is not None:
        message.MergeFrom(
            fleet_pb2.NodeGpu(
                memory_used_bytes=sample.memory_used_bytes,
                utilization_ratio=sample.utilization_ratio,
                temperature_celsius=sample.temperature_celsius,
                power_watts=sample.power_watts,
                energy_joules=sample.energy_joules,
                sm_clock_hertz=sample.sm_clock_hertz,
                memory_clock_hertz=sample.memory_clock_hertz,
                memory_utilization_ratio=sample.memory_utilization_ratio,
                last_sample_at=sample.at,
            )
        )
    return message


def _missing(missing: MissingGpu) -> types_pb2.MissingGpu:
    return types_pb2.MissingGpu(
        index=missing.index,
        uuid=missing.uuid,
        error_kind=missing.error_kind,
        reason=missing.reason,
    )


def _refusal(refusal: Refusal) -> types_pb2.Refusal:
    return types_pb2.Refusal(
        node=refusal.node,
        filter=refusal.filter,
        reason=refusal.reason,
        wanted=refusal.wanted,
        found=refusal.found,
    )
