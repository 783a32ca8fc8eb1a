"""Who has the GPUs, on both pages: processes with their owners, assignments, pods and jobs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from tests.support.pages import read_page
from tests.support.snapshots import (
    FULL,
    GIB,
    MIG_DEVICE,
    POD,
    TABLE,
    VIEW,
    dcgm_page,
    own_page,
    snapshot,
)

from stoker.agent.facts import Fact
from stoker.agent.metrics.gpu_rows import ASSIGNMENTS_MAX, PROCESSES_MAX
from stoker.agent.metrics.holders import program
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.model import AttributedProcess, ProcessSeen, ProcessTable
from stoker.agent.owners import AssignedBy, Assignment, Owner
from stoker.agent.telemetry import GpuTelemetry

MEMORY, INFO = "stoker_gpu_process_memory_used_bytes", "stoker_gpu_process_info"
ASSIGNED, ASSIGNMENT = "stoker_gpu_assigned", "stoker_gpu_assignment_info"
LEFT_OUT, KNOWN = "stoker_agent_series_left_out", "stoker_agent_assignments_known"
JOB = Owner(unit="slurmstepd.scope", slurm_job="77", slurm_step="0")
LABEL = re.compile(r'(\w+)="([^"]*)"')
HOLDER_LABELS = {"pod", "namespace", "container", "hpc_job"}


def table(
    *processes: ProcessSeen,
    assignments: Sequence[Assignment] = (),
    unknown: str = "",
    unread: Sequence[str] = (),
) -> ProcessTable:
    return ProcessTable(
        990.0,
        tuple(AttributedProcess(process, "") for process in processes),
        tuple(unread),
        tuple(assignments),
        unknown,
    )


def seen(
    pid: int, owner: Owner = POD, uuid: str = "GPU-0", memory: int | None = GIB
) -> ProcessSeen:
    return ProcessSeen(uuid, pid, memory_used_bytes=memory, owner=owner)


def with_table(processes: ProcessTable | None, monotonic: float = 101.0) -> Snapshot:
    return snapshot(replace(VIEW, processes=processes), monotonic)


def series(shown: Snapshot, name: str) -> list[dict[str, str]]:
    return [dict(labels) for labels in read_page(own_page(shown)).get(name, {})]


def left_out(shown: Snapshot) -> Mapping[str, float]:
    found = read_page(own_page(shown)).get(LEFT_OUT, {})
    return {dict(labels)["what"]: value for labels, value in found.items()}


def assigned(owner: Owner, uuid: str = "GPU-0", mig: str = "") -> Assignment:
    by = AssignedBy.SLURM if owner.slurm_job else AssignedBy.KUBELET
    return Assignment(uuid, by, owner.described(), mig, owner)


def pod(name: str) -> Owner:
    return Owner(pod_namespace="ml", pod_name=name)


def job(number: str) -> Owner:
    return Owner(slurm_job=number)


def test_a_process_is_told_with_its_owner_in_an_info_series() -> None:
    (first, second) = series(with_table(TABLE), INFO)
    known = {name: text for name, text in second.items() if text}
    assert known == {
        "node": "n1",
        "uuid": "GPU-0",
        "pid": "8",
        "unit": "kubelet.service",
        "pod": "train-0",
        "pod_uid": "7b1c",
        "namespace": "ml",
        "container": "trainer",
    }
    assert (first["user"], first["command"], first["allocation"]) == ("ann", "python3", "a")


def test_a_container_without_a_name_is_told_by_its_short_id() -> None:
    owner = Owner(container_id="0123456789abcdef", container_runtime="docker")
    (labels,) = series(with_table(table(seen(7, owner))), INFO)
    assert labels["container"] == "0123456789ab"


def test_memory_and_owner_of_a_process_join_by_gpu_and_pid() -> None:
    shown = with_table(table(seen(7), seen(8), seen(7, uuid="GPU-1")))
    memory, info = series(shown, MEMORY), series(shown, INFO)
    assert [set(labels) for labels in memory] == [{"node", "uuid", "pid"}] * 3
    keys = [{name: labels[name] for name in memory[0]} for labels in info]
    assert keys == memory


def test_memory_that_the_driver_does_not_tell_is_absent() -> None:
    shown = with_table(table(seen(7, memory=None)))
    assert (len(series(shown, INFO)), series(shown, MEMORY)) == (1, [])


@pytest.mark.parametrize(("second", "total"), [(2 * GIB, [3.0 * GIB]), (None, [])])
def test_a_process_on_several_mig_devices_of_a_gpu_is_one(
    second: int | None, total: list[float]
) -> None:
    shown = with_table(table(seen(7), seen(7, memory=second)))
    assert len(series(shown, INFO)) == 1
    assert list(read_page(own_page(shown)).get(MEMORY, {}).values()) == total


@pytest.mark.parametrize(
    ("processes", "monotonic"),
    [
        (None, 101.0),
        (table(seen(7), assignments=[assigned(job("1"))]), 105.01),
    ],
    ids=["they are not known", "they were read long ago"],
)
def test_without_a_fresh_reading_nobody_is_told(
    processes: ProcessTable | None, monotonic: float
) -> None:
    page = read_page(own_page(with_table(processes, monotonic)))
    assert {MEMORY, INFO, ASSIGNED, ASSIGNMENT, KNOWN, LEFT_OUT} & page.keys() == set()


def test_processes_of_a_gpu_that_could_not_be_read_are_not_told() -> None:
    shown = with_table(table(seen(7), seen(8, uuid="GPU-1"), unread=["GPU-1"]))
    assert [labels["pid"] for labels in series(shown, INFO)] == ["7"]


def test_a_process_that_is_gone_is_gone_with_the_next_reading() -> None:
    before, after = with_table(table(seen(7), seen(8))), with_table(table(seen(8)))
    assert [labels["pid"] for labels in series(before, INFO)] == ["7", "8"]
    assert [labels["pid"] for labels in series(after, INFO)] == ["8"]


def test_of_too_many_processes_those_with_the_most_memory_are_told_and_the_rest_is_counted() -> (
    None
):
    processes = [seen(pid, memory=pid) for pid in range(1, PROCESSES_MAX + 11)]
    shown = with_table(table(*processes, seen(9999, memory=None)))
    told = {int(labels["pid"]) for labels in series(shown, INFO)}
    assert told == set(range(11, PROCESSES_MAX + 11))
    assert left_out(shown) == {"processes": 11, "assignments": 0}
    assert left_out(with_table(table(seen(7)))) == {"processes": 0, "assignments": 0}


def test_of_too_many_assignments_the_rest_is_counted() -> None:
    many = [assigned(pod(f"train-{i}")) for i in range(ASSIGNMENTS_MAX + 3)]
    shown = with_table(table(assignments=many))
    assert len(series(shown, ASSIGNMENT)) == ASSIGNMENTS_MAX
    assert left_out(shown) == {"processes": 0, "assignments": 3}
    assert len(series(shown, ASSIGNED)) == 1


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("/usr/bin/python3 train.py --token=secret", "python3"),
        ("train", "train"),
        ("/opt/my program", "my"),
        ("[kworker/0:1]", "[kworker/0:1]"),
        ("(not visible here)", "(not visible here)"),
        ("", ""),
    ],
)
def test_a_command_is_told_without_what_may_be_secret(command: str, shown: str) -> None:
    assert program(command) == shown


def test_an_assigned_gpu_is_told_once_for_each_giver_and_its_holders_in_info() -> None:
    given = [
        assigned(pod("a"), mig="MIG-a"),
        assigned(pod("b"), mig="MIG-b"),
        assigned(pod("b"), mig="MIG-b"),  # told twice
        assigned(job("1234"), uuid="GPU-1"),
        assigned(pod("c"), uuid="GPU-of-another-time"),
    ]
    shown = with_table(table(assignments=given))
    assert {(labels["gpu"], labels["by"]) for labels in series(shown, ASSIGNED)} == {
        ("0", "kubelet"),
        ("1", "slurm"),
    }
    holders = [
        (each["uuid"], each.get("mig_uuid"), each["holder"]) for each in series(shown, ASSIGNMENT)
    ]
    assert sorted(holders) == [
        ("GPU-0", "MIG-a", "pod ml/a"),
        ("GPU-0", "MIG-b", "pod ml/b"),
        ("GPU-1", "", "Slurm job 1234"),
        ("GPU-of-another-time", "", "pod ml/c"),
    ]


@pytest.mark.parametrize(("reason", "is_known"), [("", 1.0), ("the kubelet refuses", 0.0)])
def test_whether_assignments_are_known_is_told(reason: str, is_known: float) -> None:
    page = read_page(own_page(with_table(table(unknown=reason))))
    assert list(page[KNOWN].values()) == [is_known]


# --- the page of dcgm-exporter's names


def holder_labels(shown: Snapshot) -> list[dict[str, str]]:
    """Return those labels of every line that only GPUs with a holder have."""
    lines = (line for line in dcgm_page(shown).splitlines() if not line.startswith("#"))
    found = (dict(LABEL.findall(line)) for line in lines)
    return [{name: each[name] for name in HOLDER_LABELS & each.keys()} for each in found]


OF_POD = {"pod": "train-0", "namespace": "ml", "container": "trainer"}
OTHER = replace(POD, pod_name="train-1", pod_uid="ff")
SIDECAR = replace(POD, container_name="exporter")


@pytest.mark.parametrize(
    ("processes", "labels"),
    [
        (table(), {}),
        (table(seen(7), seen(8)), OF_POD),
        (table(assignments=[assigned(POD)]), OF_POD),
        (table(seen(7), assignments=[assigned(POD)]), OF_POD),
        (table(seen(7), seen(8, Owner(unit="ssh.service"))), OF_POD),
        (table(seen(7), seen(8, OTHER)), {}),
        (table(seen(7), assignments=[assigned(OTHER)]), {}),
        (table(seen(7), seen(8, SIDECAR)), {"pod": "train-0", "namespace": "ml"}),
        (table(seen(7, Owner(pod_uid="7b1c", container_name="x"))), {}),
        (table(seen(7), seen(8, Owner(pod_uid="ff"))), {}),
        (table(seen(7, JOB)), {"hpc_job": "77"}),
        (table(assignments=[assigned(job("77"))]), {"hpc_job": "77"}),
        (table(seen(7, JOB), assignments=[assigned(job("78"))]), {}),
        (table(seen(7), seen(8, JOB)), {**OF_POD, "hpc_job": "77"}),
        (table(seen(7, uuid="GPU-1")), {}),
        (table(seen(7), unread=["GPU-0"]), {}),
        (table(seen(7), unknown="the kubelet does not answer"), {}),
        (None, {}),
    ],
    ids=[
        *("nobody", "processes of one pod", "a pod that is idle", "the same pod twice"),
        *("a pod and somebody else", "two pods", "a pod where another was assigned"),
        *("two containers of a pod", "a pod without a name", "one of two pods without"),
        *("processes of one job", "a job that is idle"),
        *("two jobs", "a pod and a job", "a pod on another GPU"),
        *("processes could not be read", "assignments are not known", "nothing is known"),
    ],
)
def test_a_gpu_has_the_labels_of_the_one_pod_and_the_one_job_that_has_it(
    processes: ProcessTable | None, labels: Mapping[str, str]
) -> None:
    view = replace(VIEW, processes=processes, telemetry=(FULL,))
    found = holder_labels(snapshot(view))
    assert found == [labels] * len(found)
    assert len(found) > 80


def test_a_mig_instance_has_the_labels_of_whom_it_was_assigned_to_and_the_whole_gpu_none() -> None:
    devices = tuple(
        replace(MIG_DEVICE, uuid=f"MIG-{i}", gpu_instance_id=i, facts={Fact.SM_ACTIVE_RATIO: 0.5})
        for i in (3, 5)
    )
    gpu = GpuTelemetry("GPU-0", 1000.0, {Fact.POWER_WATTS: 300.0}, {}, devices, {})
    processes = table(
        seen(7),
        assignments=[assigned(POD, mig="MIG-3"), assigned(job("9"), mig="MIG-5")],
    )
    shown = snapshot(replace(VIEW, processes=processes, telemetry=(gpu,)))
    lines = [line for line in dcgm_page(shown).splitlines() if not line.startswith("#")]
    instances = [dict(LABEL.findall(line)).get("GPU_I_ID") for line in lines]
    assert dict(zip(instances, holder_labels(shown), strict=True)) == {
        "3": OF_POD,
        "5": {"hpc_job": "9"},
        None: {},
    }


def test_labels_of_pods_come_last_in_order_of_their_names() -> None:
    shown = snapshot(replace(VIEW, processes=table(seen(7), seen(8, JOB)), telemetry=(FULL,)))
    line = dcgm_page(shown).splitlines()[2]
    assert ',DCGM_FI_DRIVER_VERSION="580.1",container="trainer",hpc_job="77",' in line
    assert ',namespace="ml",pod="train-0"} ' in line
