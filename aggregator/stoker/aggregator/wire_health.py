"""Verdicts, cordons, owners and assignments as messages and back; raises Malformed with the path.

Words are cut at what is shown of them; what programs go by is refused when it cannot be.
"""

from collections.abc import Mapping
from typing import TypeVar

from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.processes import Assignment, Owner, Process, ProcessTable
from stoker.aggregator.verdicts import GpuCordon, GpuHealth, HealthFault, RepairAction, Verdict
from stoker.v1 import agent_pb2, fleet_pb2, types_pb2

T = TypeVar("T")

VERDICTS: Mapping[Verdict, types_pb2.GpuVerdict.ValueType] = {
    Verdict.HEALTHY: types_pb2.GPU_VERDICT_HEALTHY,
    Verdict.DEGRADED: types_pb2.GPU_VERDICT_DEGRADED,
    Verdict.UNHEALTHY: types_pb2.GPU_VERDICT_UNHEALTHY,
    Verdict.UNKNOWN: types_pb2.GPU_VERDICT_UNKNOWN,
}
ACTIONS: Mapping[RepairAction, types_pb2.RepairAction.ValueType] = {
    RepairAction.NONE: types_pb2.REPAIR_ACTION_NONE,
    RepairAction.RESTART_APP: types_pb2.REPAIR_ACTION_RESTART_APP,
    RepairAction.DRAIN: types_pb2.REPAIR_ACTION_DRAIN,
    RepairAction.RESET_GPU: types_pb2.REPAIR_ACTION_RESET_GPU,
    RepairAction.REBOOT: types_pb2.REPAIR_ACTION_REBOOT,
    RepairAction.RMA: types_pb2.REPAIR_ACTION_RMA,
}
_VERDICTS: Mapping[int, Verdict] = {number: verdict for verdict, number in VERDICTS.items()}
_ACTIONS: Mapping[int, RepairAction] = {number: action for action, number in ACTIONS.items()}
_BY_BYTES_MAX = 64  # "kubelet", "slurm"


# --- what agents say


def read_health(message: agent_pb2.NodeHealth) -> tuple[GpuHealth, ...]:
    """Return the verdicts on all GPUs of a node."""
    field = "frame.health.gpus"
    _check_count(len(message.gpus), limits.JUDGED_GPUS_MAX, field)
    told = tuple(_read_gpu(each, f"{field}[{i}]") for i, each in enumerate(message.gpus))
    limits.unique([each.uuid for each in told], f"{field}[].uuid")
    return told


def read_processes(message: agent_pb2.ProcessTable) -> ProcessTable:
    """Return who uses a node's GPUs, and what others have handed out of them."""
    field = "frame.processes.assignments"
    _check_count(len(message.assignments), limits.ASSIGNMENTS_MAX, field)
    return ProcessTable(
        started_at=limits.finite(message.started_at, "frame.processes.started_at"),
        processes=tuple(_read_process(process) for process in message.processes),
        unread_gpu_uuids=tuple(message.unread_gpu_uuids),
        assignments=tuple(
            _read_assignment(each, f"{field}[{i}]") for i, each in enumerate(message.assignments)
        ),
        assignments_unknown=message.assignments_unknown[: limits.REASON_BYTES_MAX],
    )


def _read_gpu(message: types_pb2.GpuHealth, field: str) -> GpuHealth:
    _check_count(len(message.faults), limits.FAULTS_PER_GPU_MAX, f"{field}.faults")
    since = limits.finite(message.since, f"{field}.since") if message.HasField("since") else None
    return GpuHealth(
        uuid=limits.text(message.uuid, f"{field}.uuid", limits.ID_BYTES_MAX, required=True),
        verdict=_one_of(_VERDICTS, message.verdict, f"{field}.verdict"),
        action=_one_of(_ACTIONS, message.action, f"{field}.action"),
        check=limits.text(message.check, f"{field}.check"),
        reason=message.reason[: limits.REASON_BYTES_MAX],
        since=since,
        faults=tuple(
            _read_fault(each, f"{field}.faults[{i}]") for i, each in enumerate(message.faults)
        ),
    )


def _read_fault(message: types_pb2.HealthFault, field: str) -> HealthFault:
    return HealthFault(
        check=limits.text(message.check, f"{field}.check", required=True),
        code=limits.text(message.code, f"{field}.code"),
        verdict=_one_of(_VERDICTS, message.verdict, f"{field}.verdict"),
        action=_one_of(_ACTIONS, message.action, f"{field}.action"),
        reason=message.reason[: limits.REASON_BYTES_MAX],
        since=limits.finite(message.since, f"{field}.since"),
        last_at=limits.finite(message.last_at, f"{field}.last_at"),
        count=message.count,
    )


def _read_process(message: types_pb2.Process) -> Process:
    return Process(
        gpu_uuid=message.gpu_uuid,
        pid=message.pid,
        user=message.user[: limits.TEXT_BYTES_MAX],
        command=message.command[: limits.TEXT_BYTES_MAX],
        memory_used_bytes=(
            message.memory_used_bytes if message.HasField("memory_used_bytes") else None
        ),
        allocation_id=message.allocation_id,
        started_at=message.started_at if message.HasField("started_at") else None,
        owner=_read_owner(message.owner) if message.HasField("owner") else None,
        gpu_instance_id=message.gpu_instance_id if message.HasField("gpu_instance_id") else None,
    )


def _read_owner(message: types_pb2.Owner) -> Owner:
    most = limits.TEXT_BYTES_MAX
    return Owner(
        unit=message.unit[:most],
        container_id=message.container_id[:most],
        container_runtime=message.container_runtime[:most],
        container_name=message.container_name[:most],
        pod_uid=message.pod_uid[:most],
        pod_namespace=message.pod_namespace[:most],
        pod_name=message.pod_name[:most],
        slurm_job=message.slurm_job[:most],
        slurm_step=message.slurm_step[:most],
    )


def _read_assignment(message: types_pb2.Assignment, field: str) -> Assignment:
    most = limits.ID_BYTES_MAX
    return Assignment(
        gpu_uuid=limits.text(message.gpu_uuid, f"{field}.gpu_uuid", most, required=True),
        by=limits.text(message.by, f"{field}.by", _BY_BYTES_MAX, required=True),
        holder=message.holder[: limits.TEXT_BYTES_MAX],
        mig_device_uuid=limits.text(message.mig_device_uuid, f"{field}.mig_device_uuid", most),
    )


def _check_count(found: int, most: int, field: str) -> None:
    if found > most:
        raise Malformed(field, f"at most {most}, found {found}")


def _one_of(known: Mapping[int, T], number: int, field: str) -> T:
    value = known.get(number)
    if value is None:
        raise Malformed(field, f"{number} is none of {', '.join(map(str, known.values()))}")
    return value


# --- what clients are told


def health_message(health: GpuHealth | None) -> types_pb2.GpuHealth | None:
    """Return the verdict as a message; None when there is none."""
    if health is None:
        return None
    return types_pb2.GpuHealth(
        uuid=health.uuid,
        verdict=VERDICTS[health.verdict],
        action=ACTIONS[health.action],
        check=health.check,
        reason=health.reason,
        since=health.since,
        faults=[
            types_pb2.HealthFault(
                check=fault.check,
                code=fault.code,
                verdict=VERDICTS[fault.verdict],
                action=ACTIONS[fault.action],
                reason=fault.reason,
                since=fault.since,
                last_at=fault.last_at,
                count=fault.count,
            )
            for fault in health.faults
        ],
    )


def cordon_message(cordon: GpuCordon | None) -> fleet_pb2.GpuCordon | None:
    """Return the cordon as a message; None when there is none."""
    if cordon is None:
        return None
    return fleet_pb2.GpuCordon(
        reason=cordon.reason, by_health=cordon.by_health, at=cordon.at, drain_at=cordon.drain_at
    )


def assignment_message(assignment: Assignment) -> types_pb2.Assignment:
    """Return the assignment as a message."""
    return types_pb2.Assignment(
        gpu_uuid=assignment.gpu_uuid,
        by=assignment.by,
        holder=assignment.holder,
        mig_device_uuid=assignment.mig_device_uuid,
    )


def process_message(process: Process) -> types_pb2.Process:
    """Return the process as a message."""
    owner = process.owner
    return types_pb2.Process(
        pid=process.pid,
        user=process.user,
        command=process.command,
        memory_used_bytes=process.memory_used_bytes,
        allocation_id=process.allocation_id,
        started_at=process.started_at,
        gpu_uuid=process.gpu_uuid,
        owner=None if owner is None else _owner_message(owner),
    )


def _owner_message(owner: Owner) -> types_pb2.Owner:
    return types_pb2.Owner(
        unit=owner.unit,
        container_id=owner.container_id,
        container_runtime=owner.container_runtime,
        container_name=owner.container_name,
        pod_uid=owner.pod_uid,
        pod_namespace=owner.pod_namespace,
        pod_name=owner.pod_name,
        slurm_job=owner.slurm_job,
        slurm_step=owner.slurm_step,
    )
