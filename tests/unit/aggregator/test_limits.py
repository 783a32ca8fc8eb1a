"""What agents may say and what the aggregator takes: a frame that is refused ends every stream."""

import pytest

from stoker.agent.attribution import assignments
from stoker.agent.health import history
from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.wire_health import read_health, read_processes
from stoker.v1 import agent_pb2, types_pb2


def health(faults: int) -> agent_pb2.NodeHealth:
    """Return the verdict on a GPU of which so many links are down."""
    fault = types_pb2.HealthFault(
        check="nvlink_down",
        verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
        action=types_pb2.REPAIR_ACTION_RESET_GPU,
    )
    gpu = types_pb2.GpuHealth(
        uuid="GPU-1",
        verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
        action=types_pb2.REPAIR_ACTION_RESET_GPU,
        faults=[fault] * faults,
    )
    return agent_pb2.NodeHealth(gpus=[gpu])


def processes(handed_out: int) -> agent_pb2.ProcessTable:
    """Return a reading in which somebody else has handed out so many parts of a GPU."""
    one = types_pb2.Assignment(gpu_uuid="GPU-1", by="kubelet", holder="pod ml/train-0")
    return agent_pb2.ProcessTable(assignments=[one] * handed_out)


def test_as_many_faults_as_an_agent_keeps_are_taken() -> None:
    (gpu,) = read_health(health(history.FAULTS_PER_GPU_MAX))
    assert len(gpu.faults) == history.FAULTS_PER_GPU_MAX
    with pytest.raises(Malformed, match=r"gpus\[0\]\.faults: at most 64, found 65"):
        read_health(health(limits.FAULTS_PER_GPU_MAX + 1))


def test_as_many_assignments_as_an_agent_believes_are_taken() -> None:
    table = read_processes(processes(assignments.ASSIGNMENTS_MAX))
    assert len(table.assignments) == assignments.ASSIGNMENTS_MAX
    with pytest.raises(Malformed, match="assignments: at most 4096, found 4097"):
        read_processes(processes(limits.ASSIGNMENTS_MAX + 1))
