"""Messages about health as values: verdicts, faults, cordons, owners, findings."""

from collections.abc import Mapping
from typing import Any

from stoker.client.model import (
    Assignment,
    Finding,
    FleetHealth,
    GpuCondition,
    GpuCordon,
    GpuHealth,
    GpuVerdict,
    HealthFault,
    Owner,
    RepairAction,
)
from stoker.v1 import fleet_pb2, types_pb2

VERDICTS: Mapping[int, GpuVerdict] = {
    types_pb2.GPU_VERDICT_HEALTHY: GpuVerdict.HEALTHY,
    types_pb2.GPU_VERDICT_DEGRADED: GpuVerdict.DEGRADED,
    types_pb2.GPU_VERDICT_UNHEALTHY: GpuVerdict.UNHEALTHY,
    types_pb2.GPU_VERDICT_UNKNOWN: GpuVerdict.UNKNOWN,
}
ACTIONS: Mapping[int, RepairAction] = {
    types_pb2.REPAIR_ACTION_NONE: RepairAction.NONE,
    types_pb2.REPAIR_ACTION_RESTART_APP: RepairAction.RESTART_APP,
    types_pb2.REPAIR_ACTION_DRAIN: RepairAction.DRAIN,
    types_pb2.REPAIR_ACTION_RESET_GPU: RepairAction.RESET_GPU,
    types_pb2.REPAIR_ACTION_REBOOT: RepairAction.REBOOT,
    types_pb2.REPAIR_ACTION_RMA: RepairAction.RMA,
}


def fleet_health(message: fleet_pb2.ListHealthResponse) -> FleetHealth:
    return FleetHealth(
        gpus=tuple(_condition(each) for each in message.gpus),
        findings=tuple(_finding(each) for each in message.findings),
        gpus_total=message.gpus_total,
        cordoned_by_health=message.cordoned_by_health,
        cordoned_by_health_max=message.cordoned_by_health_max,
        resource_version=message.resource_version,
    )


def health_of(holder: fleet_pb2.NodeGpu | fleet_pb2.GpuCondition) -> GpuHealth | None:
    """Return what is said of a GPU's health; None: nothing."""
    if not holder.HasField("health"):
        return None
    message = holder.health
    return GpuHealth(
        uuid=message.uuid,
        verdict=_verdict(message.verdict),
        action=_action(message.action),
        check=message.check,
        reason=message.reason,
        since=given(message, "since"),
        faults=tuple(_fault(each) for each in message.faults),
    )


def cordon_of(holder: fleet_pb2.NodeGpu | fleet_pb2.GpuCondition) -> GpuCordon | None:
    """Return the GPU's own cordon; None: it has none."""
    if not holder.HasField("cordon"):
        return None
    message = holder.cordon
    return GpuCordon(message.reason, message.by_health, message.at, given(message, "drain_at"))


def owner_of(process: types_pb2.Process) -> Owner | None:
    """Return what a process is part of; None: nothing is known of it."""
    if not process.HasField("owner"):
        return None
    message = process.owner
    return Owner(
        unit=message.unit,
        container_id=message.container_id,
        container_runtime=message.container_runtime,
        container_name=message.container_name,
        pod_uid=message.pod_uid,
        pod_namespace=message.pod_namespace,
        pod_name=message.pod_name,
        slurm_job=message.slurm_job,
        slurm_step=message.slurm_step,
    )


def assignment(message: types_pb2.Assignment) -> Assignment:
    return Assignment(message.gpu_uuid, message.by, message.holder, message.mig_device_uuid)


def given(message: Any, field: str) -> Any:
    """Return an optional field, None when the sender left it out."""
    return getattr(message, field) if message.HasField(field) else None


def _condition(message: fleet_pb2.GpuCondition) -> GpuCondition:
    return GpuCondition(
        node=message.node,
        uuid=message.uuid,
        index=message.index,
        model=message.model,
        pci_bus_id=message.pci_bus_id,
        health=health_of(message),
        cordon=cordon_of(message),
        cordon_withheld=message.cordon_withheld,
        allocation_ids=tuple(message.allocation_ids),
    )


def _fault(message: types_pb2.HealthFault) -> HealthFault:
    return HealthFault(
        check=message.check,
        code=message.code,
        verdict=_verdict(message.verdict),
        action=_action(message.action),
        reason=message.reason,
        since=message.since,
        last_at=message.last_at,
        count=message.count,
    )


def _finding(message: fleet_pb2.Finding) -> Finding:
    return Finding(
        kind=message.kind,
        node=message.node,
        gpu_uuid=message.gpu_uuid,
        pci_bus_id=message.pci_bus_id,
        reason=message.reason,
        since=message.since,
        allocation_id=message.allocation_id,
    )


def _verdict(number: int) -> GpuVerdict:
    return VERDICTS.get(number, GpuVerdict.UNKNOWN)


def _action(number: int) -> RepairAction:
    return ACTIONS.get(number, RepairAction.UNKNOWN)
