"""Nodes, GPUs and refusals as messages, for clients to see."""

from collections.abc import Iterable, Mapping

from stoker.aggregator.fleet import INTERVALS_FRESH
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import (
    Claim,
    Gpu,
    GpuSample,
    MissingGpu,
    Node,
    NodeStatus,
    Refusal,
    Refusals,
)
from stoker.aggregator.processes import Assignment, Process, ProcessTable
from stoker.aggregator.verdicts import Condition, GpuHealth
from stoker.aggregator.views import driver_problem
from stoker.aggregator.wire_health import (
    assignment_message,
    cordon_message,
    health_message,
    process_message,
)
from stoker.aggregator.wire_mig import gpu_mig_message
from stoker.core.units import format_duration
from stoker.v1 import fleet_pb2, types_pb2

# More entries than a person reads; `nodes_total` says how many there were.
REFUSALS_MAX = 1_000

NOTHING_KNOWN: Mapping[str, Condition] = {}
_NO_PROCESSES = ProcessTable(0.0, ())


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
            (status.mig or {}).get(gpu.uuid),
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


def _gpu(
    gpu: Gpu,
    sample: GpuSample | None,
    claims: tuple[Claim, ...],
    processes: Iterable[Process],
    assignments: Iterable[Assignment],
    health: GpuHealth | None,
    condition: Condition | None,
    mig: GpuMig | None,
) -> fleet_pb2.NodeGpu:
    message = fleet_pb2.NodeGpu(
        uuid=gpu.uuid,
        model=gpu.model,
        index=gpu.index,
        memory_total_bytes=gpu.memory_total_bytes,
        allocation_ids=dict.fromkeys(claim.allocation_id for claim in claims),
        processes=[process_message(process) for process in processes],
        pci_bus_id=gpu.pci_bus_id,
        health=health_message(health),
        cordon=cordon_message(condition.cordon if condition else None),
        assignments=[assignment_message(each) for each in assignments],
        mig_enabled=gpu.mig_enabled,
        mig_devices=_mig_devices(gpu, claims),
        mig=gpu_mig_message(mig),
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


def _mig_devices(gpu: Gpu, claims: tuple[Claim, ...]) -> list[fleet_pb2.NodeMigDevice]:
    holders = {claim.mig_device_uuid: claim.allocation_id for claim in claims}
    return [
        fleet_pb2.NodeMigDevice(
            uuid=each.uuid,
            profile=each.profile,
            memory_total_bytes=each.memory_total_bytes,
            allocation_id=holders.get(each.uuid, ""),
        )
        for each in gpu.mig_devices
    ]


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
