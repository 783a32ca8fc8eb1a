"""Partitions in the answers of the aggregator as values."""

from collections.abc import Mapping

from stoker.client.partitions import GpuMig, MigInstance
from stoker.client.wire_health import given
from stoker.v1 import fleet_pb2, mig_pb2

_STATES: Mapping[int, str] = {
    mig_pb2.MIG_STATE_UNSPECIFIED: "",
    mig_pb2.MIG_STATE_PENDING: "pending",
    mig_pb2.MIG_STATE_DRAINING: "draining",
    mig_pb2.MIG_STATE_APPLYING: "applying",
    mig_pb2.MIG_STATE_ROLLING_BACK: "rolling-back",
    mig_pb2.MIG_STATE_REBOOT_REQUIRED: "reboot-required",
    mig_pb2.MIG_STATE_SUCCESS: "success",
    mig_pb2.MIG_STATE_FAILED: "failed",
}


def mig_of(message: fleet_pb2.NodeGpu) -> GpuMig | None:
    """Return how a GPU is partitioned; None: a card without MIG, or not told."""
    if not message.HasField("mig"):
        return None
    found = message.mig
    return GpuMig(
        state=_STATES.get(found.state, "unknown"),
        reason=found.reason,
        config=found.config,
        operation_id=found.operation_id,
        is_withheld=found.is_withheld,
        leave_by=given(found, "leave_by"),
        is_evicting=found.is_evicting,
        changed_at=given(found, "changed_at"),
        instances=tuple(
            MigInstance(each.profile, each.start, each.size, tuple(each.compute))
            for each in found.layout.instances
        )
        if found.HasField("layout")
        else None,
    )
