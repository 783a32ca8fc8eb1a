"""Who is in the way of a change of partitions, named as somebody wants to read it at night."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from tests.support.mig_memory import NOW, partitions

from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd, users_of
from stoker.agent.model import AttributedProcess, HeldAllocation, ProcessSeen, ProcessTable
from stoker.agent.owners import NOBODY, AssignedBy, Assignment, DeviceHolder, Owner
from stoker.agent.partitions import GpuPartitions
from stoker.core.mig.boards import A30_24GB
from stoker.core.mig.geometry import Placed

# GPU instances 1 and 2, their MIG devices MIG-0-1 and MIG-0-2.
GPU = partitions(A30_24GB, (Placed(0, 2, "2g.12gb"), Placed(2, 2, "2g.12gb")))
POD = Owner(
    pod_uid="u", pod_namespace="ml", pod_name="train-0", container_name="trainer", container_id="c"
)
JOB = Owner(slurm_job="1234", unit="slurmstepd.scope")
CONTAINER = Owner(container_id="0123456789abcdef", container_runtime="docker")
UNIT = Owner(unit="jupyter.service")


def process(
    pid: int = 4711,
    instance: int | None = 1,
    *,
    owner: Owner = NOBODY,
    user: str = "bob",
    command: str = "python",
    allocation: str = "",
    gpu: str = "GPU-0",
) -> AttributedProcess:
    seen = ProcessSeen(
        gpu, pid, user, command, started_at=NOW, owner=owner, gpu_instance_id=instance
    )
    return AttributedProcess(seen, allocation)


def table(*processes: AttributedProcess, assignments: tuple[Assignment, ...] = ()) -> ProcessTable:
    return ProcessTable(NOW, processes, (), assignments)


def held(id_: str = "3f2a", devices: tuple[str, ...] = (), gpu: str = "GPU-0") -> HeldAllocation:
    return HeldAllocation(id_, (gpu,), None, "alice", 60.0, NOW, mig_device_uuids=devices)


def named(users: GpuUsers) -> dict[int | str, list[str]]:
    """Return the names of all users, by instance."""
    found: dict[int | str, list[str]] = {
        id_: [each.name for each in users.instances[id_]] for id_ in users.instances
    }
    if users.anywhere:
        found["anywhere"] = [each.name for each in users.anywhere]
    return found


def look(
    processes: ProcessTable | None,
    *allocations: HeldAllocation,
    gpu: GpuPartitions = GPU,
    devices: Mapping[str, int] | None = None,
) -> GpuUsers:
    return users_of(gpu, processes, allocations, devices or {})


@pytest.mark.parametrize(
    ("requirement", "seen", "name", "kind"),
    [
        ("a process with its user", process(), "process 4711 (python, bob)", "process"),
        (
            "and the unit that it is of",
            process(owner=UNIT),
            "process 4711 (python, bob, unit jupyter.service)",
            "process",
        ),
        (
            "a process of which nothing can be seen",
            process(user="", command=""),
            "process 4711 (whose it is cannot be seen)",
            "process",
        ),
        (
            "the pod first",
            process(owner=POD),
            "pod ml/train-0 (container trainer): process 4711 (python, bob)",
            "pod",
        ),
        (
            "a pod whose name is not known",
            process(owner=Owner(pod_uid="u")),
            "pod with UID u: process 4711 (python, bob)",
            "pod",
        ),
        ("the job first", process(owner=JOB), "Slurm job 1234: process 4711 (python, bob)", "job"),
        (
            "the container first",
            process(owner=CONTAINER),
            "docker container 0123456789ab: process 4711 (python, bob)",
            "process",
        ),
    ],
)
def test_process_is_told_with_its_owner(
    requirement: str, seen: AttributedProcess, name: str, kind: str
) -> None:
    users = look(table(seen))
    ((user,),) = users.instances.values()
    assert (user.name, user.kind, user.pid, user.uuids) == (name, kind, 4711, ("MIG-0-1",))
    assert users.foreign == (ProcessToEnd(4711, NOW, 1),)


def test_processes_of_one_pod_are_told_together() -> None:
    pod = [process(pid, owner=POD) for pid in range(1, 7)]
    users = look(table(*pod, process(9, 2, owner=POD)))
    assert named(users) == {
        1: [
            (
                "pod ml/train-0 (container trainer): processes 1 (python, bob), 2 (python, bob), "
                "3 (python, bob) and 3 more"
            )
        ],
        2: ["pod ml/train-0 (container trainer): process 9 (python, bob)"],
    }
    assert len(users.foreign) == 7


def test_processes_of_an_allocation_are_told_under_it() -> None:
    users = look(
        table(process(1, 1, allocation="3f2a"), process(2, 1, allocation="3f2a"), process(3, 2)),
        held("3f2a", ("MIG-0-1",)),
    )
    assert named(users) == {
        1: ["allocation 3f2a (alice, 2 processes)"],
        2: ["process 3 (python, bob)"],
    }
    (user,) = users.instances[1]
    assert (user.kind, user.allocation_id, user.uuids) == ("allocation", "3f2a", ("MIG-0-1",))
    # The aggregator ends allocations: their processes are nobody's to end.
    assert users.foreign == (ProcessToEnd(3, NOW, 2),)


def test_allocation_is_in_the_way_while_it_is_idle_too() -> None:
    users = look(table(), held("3f2a", ("MIG-0-2",)))
    assert named(users) == {2: ["allocation 3f2a (alice, no process)"]}
    one = look(table(process(allocation="3f2a")), held("3f2a", ("MIG-0-1", "MIG-0-2")))
    assert named(one) == {
        1: ["allocation 3f2a (alice, 1 process)"],
        2: ["allocation 3f2a (alice, 1 process)"],
    }


def test_allocation_of_the_whole_gpu_is_in_the_way_everywhere() -> None:
    assert named(look(table(), held())) == {"anywhere": ["allocation 3f2a (alice, no process)"]}


def test_what_is_on_other_gpus_is_in_nobodys_way() -> None:
    assert look(table(process(gpu="GPU-1")), held(gpu="GPU-1")) == GpuUsers()


@pytest.mark.parametrize("instance", [None, 9])
def test_process_whose_instance_is_not_known_is_in_every_instances_way(
    instance: int | None,
) -> None:
    users = look(table(process(instance=instance)))
    assert named(users) == {"anywhere": ["process 4711 (python, bob)"]}
    assert users.everywhere[0].uuids == ("GPU-0",)


def test_device_that_is_no_longer_there_is_in_nobodys_way() -> None:
    """After a reboot the layout has to be made anew, and is held until then by its old names."""
    gone = Assignment("GPU-0", AssignedBy.KUBELET, "pod ml/old", "MIG-gone")
    assert look(table(assignments=(gone,)), held(devices=("MIG-gone",))) == GpuUsers()


def test_device_whose_uuid_root_was_not_told_is_found_in_the_inventory() -> None:
    untold = replace(
        GPU,
        instances=tuple(
            replace(
                each,
                compute_instances=tuple(replace(part, uuid="") for part in each.compute_instances),
            )
            for each in GPU.instances
        ),
    )
    one = held(devices=("MIG-0-2",))
    assert named(look(table(), one, gpu=untold, devices={"MIG-0-2": 2})) == {
        2: ["allocation 3f2a (alice, no process)"]
    }
    # Where nobody tells, it may be any of them.
    assert named(look(table(), one, gpu=untold)) == {
        "anywhere": ["allocation 3f2a (alice, no process)"]
    }


def test_what_somebody_else_has_handed_out_is_in_the_way_while_it_is_idle_too() -> None:
    pod = Assignment(
        "GPU-0", AssignedBy.KUBELET, "pod ml/train-0 (container trainer)", "MIG-0-1", POD
    )
    job = Assignment("GPU-0", AssignedBy.SLURM, "Slurm job 1234", owner=JOB)
    other = Assignment("GPU-1", AssignedBy.SLURM, "Slurm job 5")
    assert named(look(table(assignments=(pod, job, other)))) == {
        1: ["pod ml/train-0 (container trainer): no process"],
        "anywhere": ["Slurm job 1234: no process"],
    }
    # What its processes tell is not told twice.
    assert named(look(table(process(owner=POD), assignments=(pod,)))) == {
        1: ["pod ml/train-0 (container trainer): process 4711 (python, bob)"]
    }


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (None, "its processes cannot be read"),
        (ProcessTable(NOW, (), ("GPU-0",)), "its processes cannot be read"),
        (
            ProcessTable(NOW, (), (), (), "the kubelet does not answer"),
            "the kubelet does not answer",
        ),
    ],
)
def test_who_cannot_be_told_may_be_anywhere(seen: ProcessTable | None, why: str) -> None:
    assert named(look(seen)) == {"anywhere": [f"whoever else uses it: {why}"]}


def test_who_has_the_gpu_open_is_in_the_way_of_a_change_of_mode_only() -> None:
    holders = [
        DeviceHolder(9, "root", "nv-hostengine", ("/dev/nvidiactl", "/dev/nvidia3"), UNIT, NOW),
        DeviceHolder(10, "root", "other", ("/dev/nvidia1", "/dev/nvidia31")),
        DeviceHolder(4711, "bob", "python", ("/dev/nvidia3",)),  # known by what it runs
    ]
    users = users_of(GPU, table(process()), (), {}, holders, 3)
    assert named(users) == {1: ["process 4711 (python, bob)"]}
    (holder,) = users.holders
    assert holder.name == (
        "process 9 (nv-hostengine, root, unit jupyter.service), which has the GPU open"
    )
    assert (holder.kind, holder.pid) == ("holder", 9)
    assert users.foreign_holders == (ProcessToEnd(9, NOW),)
