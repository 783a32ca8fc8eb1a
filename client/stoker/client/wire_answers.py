"""Answers of the aggregator as values; what was left out is None, a newer word is "unknown"."""

from collections.abc import Mapping

from stoker.client.leaving import LeaveRequest
from stoker.client.model import (
    Allocation,
    AllocationState,
    Change,
    Device,
    Explanation,
    Gpu,
    KeptAlive,
    MissingGpu,
    MoveOffer,
    Node,
    NodeState,
    Placement,
    Process,
    ProposedChange,
    Refusal,
    Refusals,
    RequestAhead,
)
from stoker.client.wire_health import assignment, cordon_of, given, health_of, owner_of
from stoker.client.wire_partitions import mig_of
from stoker.client.wire_requests import read_request
from stoker.v1 import fleet_pb2, mig_pb2, placing_pb2, types_pb2

_ALLOCATION_STATES: Mapping[int, AllocationState] = {
    types_pb2.ALLOCATION_STATE_WAITING: AllocationState.WAITING,
    types_pb2.ALLOCATION_STATE_GRANTED: AllocationState.GRANTED,
    types_pb2.ALLOCATION_STATE_RELEASING: AllocationState.RELEASING,
    types_pb2.ALLOCATION_STATE_ENDED: AllocationState.ENDED,
}
_NODE_STATES: Mapping[int, NodeState] = {
    fleet_pb2.NODE_STATE_READY: NodeState.READY,
    fleet_pb2.NODE_STATE_STALE: NodeState.STALE,
    fleet_pb2.NODE_STATE_DISCONNECTED: NodeState.DISCONNECTED,
}


def allocation(message: types_pb2.Allocation) -> Allocation:
    return Allocation(
        id=message.id,
        state=_ALLOCATION_STATES.get(message.state, AllocationState.UNKNOWN),
        node=message.node,
        devices=tuple(_device(each) for each in message.devices),
        env=dict(message.env),
        expires_at=given(message, "expires_at"),
        request=read_request(message.request),
        requested_at=message.requested_at,
        granted_at=given(message, "granted_at"),
        ended_at=given(message, "ended_at"),
        ended_reason=message.ended_reason,
        queue_position=given(message, "queue_position"),
        resource_version=message.resource_version,
        held_by_node=message.held_by_node,
        placements=tuple(placement(each) for each in message.placements),
    )


def placement(message: types_pb2.Placement) -> Placement:
    return Placement(
        message.node,
        tuple(_device(each) for each in message.devices),
        dict(message.env),
        message.held_by_node,
    )


def _device(message: types_pb2.Device) -> Device:
    return Device(
        uuid=message.uuid,
        model=message.model,
        index=message.index,
        memory_bytes=message.memory_bytes,
        exclusive=message.exclusive,
        compute_milli=given(message, "compute_milli"),
        mig_device_uuid=message.mig_device_uuid,
        mig_profile=message.mig_profile,
    )


def kept_alive(message: fleet_pb2.KeepAliveResponse) -> KeptAlive:
    return KeptAlive(
        message.allocation_id,
        _ALLOCATION_STATES.get(message.state, AllocationState.UNKNOWN),
        given(message, "expires_at"),
        message.ended_reason,
        _move_offer(message.move) if message.HasField("move") else None,
        _leave_request(message.leave) if message.HasField("leave") else None,
    )


def _leave_request(message: mig_pb2.LeaveRequest) -> LeaveRequest:
    return LeaveRequest(message.reason, message.leave_by, message.is_evicting)


def _move_offer(message: placing_pb2.MoveOffer) -> MoveOffer:
    return MoveOffer(
        message.id,
        message.allocation_id,
        tuple(placement(each) for each in message.placements),
        message.reason,
        message.expires_at,
    )


def explanation(message: placing_pb2.ExplainResponse) -> Explanation:
    return Explanation(
        placeable=message.placeable,
        node=message.node,
        summary=message.summary,
        refusals=refusals(message.refusals) if message.HasField("refusals") else None,
        allocation=allocation(message.allocation) if message.HasField("allocation") else None,
        placements=tuple(placement(each) for each in message.placements),
        choice=message.choice,
        change=_proposed(message.change) if message.HasField("change") else None,
        ahead=tuple(
            RequestAhead(
                each.allocation_id, each.holder, each.wanted, each.priority, each.requested_at
            )
            for each in message.ahead
        ),
    )


def _proposed(message: placing_pb2.ProposedChange) -> ProposedChange:
    return ProposedChange(
        kind=message.kind,
        summary=message.summary,
        request=read_request(message.request) if message.HasField("request") else None,
        node=message.node,
        gpu_uuids=tuple(message.gpu_uuids),
        allocation_ids=tuple(message.allocation_ids),
        placements=tuple(placement(each) for each in message.placements),
    )


def refusals(message: types_pb2.Refusals) -> Refusals:
    return Refusals(
        summary=message.summary,
        nodes=tuple(
            Refusal(each.node, each.filter, each.reason, each.wanted, each.found)
            for each in message.nodes
        ),
        nodes_total=message.nodes_total,
        ahead=message.ahead,
    )


def node(message: fleet_pb2.Node) -> Node:
    return Node(
        name=message.name,
        state=_NODE_STATES.get(message.state, NodeState.UNKNOWN),
        state_reason=message.state_reason,
        simulated=message.simulated,
        cordoned=given(message, "cordoned"),
        pool=message.pool,
        labels=dict(message.labels),
        boot_id=message.boot_id,
        agent_version=message.agent_version,
        driver_version=message.driver_version,
        cuda_version=message.cuda_version,
        interval_seconds=message.interval_seconds,
        last_sample_at=given(message, "last_sample_at"),
        gpus=tuple(_gpu(each) for each in message.gpus),
        missing_gpus=tuple(
            MissingGpu(each.index, each.uuid, each.error_kind, each.reason)
            for each in message.missing_gpus
        ),
        drain_at=given(message, "drain_at"),
        assignments_unknown=message.assignments_unknown,
    )


def _gpu(message: fleet_pb2.NodeGpu) -> Gpu:
    return Gpu(
        uuid=message.uuid,
        model=message.model,
        index=message.index,
        pci_bus_id=message.pci_bus_id,
        memory_total_bytes=message.memory_total_bytes,
        memory_used_bytes=given(message, "memory_used_bytes"),
        utilization_ratio=given(message, "utilization_ratio"),
        memory_utilization_ratio=given(message, "memory_utilization_ratio"),
        temperature_celsius=given(message, "temperature_celsius"),
        power_watts=given(message, "power_watts"),
        energy_joules=given(message, "energy_joules"),
        sm_clock_hertz=given(message, "sm_clock_hertz"),
        memory_clock_hertz=given(message, "memory_clock_hertz"),
        last_sample_at=given(message, "last_sample_at"),
        allocation_ids=tuple(message.allocation_ids),
        processes=tuple(_process(each) for each in message.processes),
        health=health_of(message),
        cordon=cordon_of(message),
        assignments=tuple(assignment(each) for each in message.assignments),
        mig=mig_of(message),
    )


def _process(message: types_pb2.Process) -> Process:
    return Process(
        pid=message.pid,
        user=message.user,
        command=message.command,
        memory_used_bytes=given(message, "memory_used_bytes"),
        allocation_id=message.allocation_id,
        started_at=given(message, "started_at"),
        owner=owner_of(message),
    )


def change(message: fleet_pb2.WatchResponse) -> Change:
    match message.WhichOneof("object"):
        case "allocation":
            changed: Allocation | Node | None = allocation(message.allocation)
        case "node":
            changed = node(message.node)
        case None:
            changed = None
    return Change(message.resource_version, message.at, message.event, changed)
