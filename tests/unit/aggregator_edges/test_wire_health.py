"""Health, cordons and assignments as messages and back: what cannot be is named, words are cut."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Gpu, Node, NodeFacts, NodeStatus
from stoker.aggregator.processes import Assignment, Owner, Process, ProcessTable
from stoker.aggregator.verdicts import (
    Condition,
    GpuCordon,
    GpuHealth,
    HealthFault,
    RepairAction,
    Verdict,
)
from stoker.aggregator.wire import (
    read_frame,
)
from stoker.aggregator.wire_fleet import (
    node_message,
)
from stoker.v1 import agent_pb2, types_pb2

UUIDS = {1: "GPU-1", 2: "GPU-2"}
FACTS = NodeFacts("n1", "i", "b", "1", simulated=True, gpus=(Gpu("GPU-1", "H100", 0, 1 << 30),))
NODE = Node(FACTS, registered_at=1.0, version=1)


def test_health_cordons_and_what_others_hold_are_told() -> None:
    stored = GpuHealth("GPU-1", Verdict.UNHEALTHY, RepairAction.REBOOT, "xid", "Xid 79", 3.0)
    cordon = GpuCordon(50.0, "Xid 79", by_health=True)
    condition = Condition("GPU-1", "n1", health=stored, cordon=cordon)
    owner = Owner(pod_namespace="ml", pod_name="train-0", slurm_job="7")
    table = ProcessTable(
        1.0,
        (Process("GPU-1", 42, owner=owner),),
        assignments=(Assignment("GPU-1", "kubelet", "pod ml/train-0"),),
    )
    status = NodeStatus(session=1, processes=table)
    node = replace(NODE, cordoned="fans", drain_at=500.0)
    told = node_message(node, status, {}, 200.0, 100.0, {"GPU-1": condition})
    (gpu,) = told.gpus
    assert told.drain_at == 500.0
    assert gpu.health.verdict == types_pb2.GPU_VERDICT_UNHEALTHY
    assert (gpu.health.action, gpu.health.since) == (types_pb2.REPAIR_ACTION_REBOOT, 3.0)
    assert (gpu.cordon.reason, gpu.cordon.by_health, gpu.cordon.at) == ("Xid 79", True, 50.0)
    assert not gpu.cordon.HasField("drain_at")
    assert (gpu.assignments[0].by, gpu.assignments[0].holder) == ("kubelet", "pod ml/train-0")
    assert (gpu.processes[0].owner.pod_name, gpu.processes[0].owner.slurm_job) == ("train-0", "7")
    # What is told on this stream is newer than what the ledger has.
    status = replace(status, health={"GPU-1": replace(stored, reason="Xid 79, twice")})
    (gpu,) = node_message(node, status, {}, 200.0, 100.0, {"GPU-1": condition}).gpus
    assert gpu.health.reason == "Xid 79, twice"


def test_gpu_that_nobody_judged_has_no_health() -> None:
    (gpu,) = node_message(NODE, NodeStatus(), {}, None, 100.0).gpus
    assert not gpu.HasField("health")
    assert not gpu.HasField("cordon")


# --- health and assignments, as agents tell them


def health_frame() -> agent_pb2.Frame:
    frame = agent_pb2.Frame(sequence=1)
    gpu = frame.health.gpus.add(
        uuid="GPU-1",
        verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
        action=types_pb2.REPAIR_ACTION_RESET_GPU,
        check="xid",
        reason="Xid 79",
        since=3.0,
    )
    gpu.faults.add(
        check="xid",
        code="79",
        verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
        action=types_pb2.REPAIR_ACTION_RESET_GPU,
        reason="Xid 79",
        since=3.0,
        last_at=4.0,
        count=2,
    )
    frame.health.gpus.add(
        uuid="GPU-2",
        verdict=types_pb2.GPU_VERDICT_HEALTHY,
        action=types_pb2.REPAIR_ACTION_NONE,
    )
    frame.processes.assignments.add(gpu_uuid="GPU-1", by="slurm", holder="Slurm job 7")
    return frame


def test_health_is_read_whole() -> None:
    frame = read_frame(health_frame(), UUIDS, 100.0)
    xid = HealthFault(
        *("xid", "79", Verdict.UNHEALTHY, RepairAction.RESET_GPU, "Xid 79", 3.0, 4.0, 2)
    )
    assert frame.health == (
        GpuHealth(
            *("GPU-1", Verdict.UNHEALTHY, RepairAction.RESET_GPU, "xid", "Xid 79", 3.0, (xid,))
        ),
        GpuHealth("GPU-2", Verdict.HEALTHY),
    )
    assert frame.processes is not None
    assert frame.processes.assignments == (Assignment("GPU-1", "slurm", "Slurm job 7"),)
    assert read_frame(agent_pb2.Frame(sequence=1), UUIDS, 100.0).health is None


def test_words_of_health_are_cut_at_what_is_shown() -> None:
    message = health_frame()
    message.health.gpus[0].reason = "x" * 5000
    message.processes.assignments[0].holder = "y" * 5000
    message.processes.assignments_unknown = "z" * 5000
    message.processes.processes.add(pid=1).owner.pod_name = "p" * 5000
    frame = read_frame(message, UUIDS, 100.0)
    assert frame.health is not None
    assert frame.processes is not None
    owner = frame.processes.processes[0].owner
    assert owner is not None
    assert len(frame.health[0].reason) == limits.REASON_BYTES_MAX
    assert len(frame.processes.assignments[0].holder) == limits.TEXT_BYTES_MAX
    assert len(frame.processes.assignments_unknown) == limits.REASON_BYTES_MAX
    assert len(owner.pod_name) == limits.TEXT_BYTES_MAX


def _too_many_gpus(frame: agent_pb2.Frame) -> None:
    frame.health.gpus.extend([frame.health.gpus[0]] * limits.JUDGED_GPUS_MAX)


def _too_many_faults(frame: agent_pb2.Frame) -> None:
    gpu = frame.health.gpus[0]
    gpu.faults.extend([gpu.faults[0]] * limits.FAULTS_PER_GPU_MAX)


def _too_many_assignments(frame: agent_pb2.Frame) -> None:
    table = frame.processes
    table.assignments.extend([table.assignments[0]] * limits.ASSIGNMENTS_MAX)


def _twice(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[1].uuid = "GPU-1"


def _no_verdict(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[0].verdict = types_pb2.GPU_VERDICT_UNSPECIFIED


def _no_action_of_a_fault(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[0].faults[0].action = types_pb2.REPAIR_ACTION_UNSPECIFIED


def _endless(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[0].since = float("inf")


def _nameless(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[0].uuid = ""


def _unprintable(frame: agent_pb2.Frame) -> None:
    frame.health.gpus[0].check = "xid\n"


def _of_no_gpu(frame: agent_pb2.Frame) -> None:
    frame.processes.assignments[0].gpu_uuid = ""


@pytest.mark.parametrize(
    ("spoil", "field", "problem"),
    [
        (_too_many_gpus, "frame.health.gpus", "at most"),
        (_too_many_faults, "frame.health.gpus[0].faults", "at most 64, found 65"),
        (_too_many_assignments, "frame.processes.assignments", "at most 4096, found 4097"),
        (_twice, "frame.health.gpus[].uuid", "there twice"),
        (_no_verdict, "frame.health.gpus[0].verdict", "0 is none of healthy"),
        (_no_action_of_a_fault, "frame.health.gpus[0].faults[0].action", "0 is none of none"),
        (_endless, "frame.health.gpus[0].since", "finite"),
        (_nameless, "frame.health.gpus[0].uuid", "empty"),
        (_unprintable, "frame.health.gpus[0].check", "printable"),
        (_of_no_gpu, "frame.processes.assignments[0].gpu_uuid", "empty"),
    ],
)
def test_health_that_cannot_be_is_named(
    spoil: Callable[[agent_pb2.Frame], None], field: str, problem: str
) -> None:
    message = health_frame()
    spoil(message)
    with pytest.raises(Malformed) as malformed:
        read_frame(message, UUIDS, 100.0)
    assert malformed.value.field == field
    assert problem in malformed.value.problem
