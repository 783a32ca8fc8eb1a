"""Who uses a GPU's instances, and would be in the way of what is to become of them.

Named as somebody wants to read it at night: the allocation with its holder, the pod, the job, and
the process with its user. The processes of an allocation are told under the allocation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stoker.agent.model import AttributedProcess, HeldAllocation, ProcessSeen, ProcessTable
from stoker.agent.owners import AssignedBy, Assignment, DeviceHolder, Owner
from stoker.agent.partitions import GpuPartitions
from stoker.core.mig.reports import InTheWay

UserKind = Literal["allocation", "process", "pod", "job", "holder"]

# More processes of one pod, job or container than these are counted.
_SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class ProcessToEnd:
    """A process of nobody's allocation, told by PID and when it started: PIDs are used again."""

    pid: int
    started_at: float | None  # Unix seconds; None: it cannot be seen
    gpu_instance_id: int | None = None  # None: the whole GPU, several instances, or not told


@dataclass(frozen=True, slots=True)
class GpuUsers:
    """Who uses one GPU."""

    # By the ID of the GPU instance; none that is used by nobody.
    instances: Mapping[int, tuple[InTheWay, ...]] = field(
        default_factory=dict[int, tuple[InTheWay, ...]]
    )
    # In the way of whatever is done: they use the whole GPU, or which instance is not known.
    everywhere: tuple[InTheWay, ...] = ()
    # In the way of a change of mode: they have the GPU's device file open.
    holders: tuple[InTheWay, ...] = ()
    # Those that may be made to go, by who they are: all but the allocations, which the aggregator
    # ends. The holders' are in the second.
    foreign: tuple[ProcessToEnd, ...] = ()
    foreign_holders: tuple[ProcessToEnd, ...] = ()
    unknown: str = ""  # why it cannot be told who else is there; empty: nobody else is

    @property
    def anywhere(self) -> tuple[InTheWay, ...]:
        """Who may be on any instance."""
        unknown = (InTheWay("process", f"whoever else uses it: {self.unknown}", ()),)
        return (*self.everywhere, *(unknown if self.unknown else ()))


NOBODY_THERE = GpuUsers()


def users_of(
    gpu: GpuPartitions,
    table: ProcessTable | None,
    held: Iterable[HeldAllocation],
    devices: Mapping[str, int],
    holders: Iterable[DeviceHolder] = (),
    minor_number: int | None = None,
) -> GpuUsers:
    """Return who uses that GPU.

    `table`: None when the processes could not be read. `devices`: the GPU instance of each MIG
    device (`agent.holding.gpu_instances`), for where root's reading tells no UUIDs. `holders`: who
    has device files open, without the agent's own processes; `minor_number`: the N of /dev/nvidiaN.
    """
    scene = _Scene(gpu, devices)
    processes = () if table is None else table.processes
    here = [each for each in processes if each.process.gpu_uuid == gpu.uuid]
    mine = [each for each in held if gpu.uuid in each.gpu_uuids]
    ours = {each.id for each in mine}
    for allocation in mine:
        scene.add_allocation(allocation, here)
    foreign = [each.process for each in here if each.allocation_id not in ours]
    scene.add_processes(foreign)
    for assignment in () if table is None else table.assignments:
        if assignment.gpu_uuid == gpu.uuid:
            scene.add_assignment(assignment)
    seen = {each.process.pid for each in here}
    idle = [
        each
        for each in holders
        if each.pid not in seen and f"/dev/nvidia{minor_number}" in each.devices
    ]
    return GpuUsers(
        instances={id_: tuple(found) for id_, found in scene.instances.items()},
        everywhere=tuple(scene.everywhere),
        holders=tuple(_holder(each, gpu.uuid) for each in idle),
        foreign=tuple(
            ProcessToEnd(each.pid, each.started_at, each.gpu_instance_id) for each in foreign
        ),
        foreign_holders=tuple(ProcessToEnd(each.pid, each.started_at) for each in idle),
        unknown=_unknown(gpu.uuid, table),
    )


def _unknown(gpu_uuid: str, table: ProcessTable | None) -> str:
    if table is None or gpu_uuid in table.unread_gpu_uuids:
        return "its processes cannot be read"
    return table.assignments_unknown


class _Scene:
    """The users of one GPU, as they are found."""

    def __init__(self, gpu: GpuPartitions, inventory: Mapping[str, int]) -> None:
        self._gpu = gpu
        devices = [
            (part.uuid, each.id) for each in gpu.instances for part in each.compute_instances
        ]
        self._devices = {uuid: instance for uuid, instance in devices if uuid}
        # Otherwise a device that is not among them may be one whose UUID was not told.
        self._are_all_told = len(self._devices) == len(devices)
        if not self._are_all_told:
            self._devices = {**inventory, **self._devices}
        self.instances: dict[int, list[InTheWay]] = {}
        self.everywhere: list[InTheWay] = []

    def add_allocation(self, held: HeldAllocation, processes: Sequence[AttributedProcess]) -> None:
        """Note an allocation, with its processes; they are where it is."""
        count = sum(each.allocation_id == held.id for each in processes)
        told = "no process" if not count else f"{count} process{'es' if count > 1 else ''}"
        name = f"allocation {held.id} ({held.holder}, {told})"
        uuids = held.mig_device_uuids or (self._gpu.uuid,)
        mine = tuple(uuid for uuid in uuids if uuid in self._devices)
        for uuid in mine:
            self._add(
                self._devices[uuid], InTheWay("allocation", name, mine, allocation_id=held.id)
            )
        # A device that is no longer there is in nobody's way: after a reboot the layout is made
        # anew, and who held a part of it has lost that in any case.
        if not mine and not (held.mig_device_uuids and self._are_all_told):
            gpu = (self._gpu.uuid,)
            self._add(None, InTheWay("allocation", name, gpu, allocation_id=held.id))

    def add_processes(self, processes: Iterable[ProcessSeen]) -> None:
        """Note processes that are of no allocation; those of a pod, job or container together."""
        groups: dict[tuple[int | None, str], list[ProcessSeen]] = {}
        for each in processes:
            whose = _group(each.owner) or f"process {each.pid}"
            groups.setdefault((each.gpu_instance_id, whose), []).append(each)
        for (instance, whose), group in groups.items():
            first = group[0]
            if _group(first.owner):
                shown = ", ".join(_person(each) for each in group[:_SHOWN_MAX])
                more = f" and {len(group) - _SHOWN_MAX} more" if len(group) > _SHOWN_MAX else ""
                name = f"{whose}: process{'es' if len(group) > 1 else ''} {shown}{more}"
            else:
                name = f"process {_person(first)}"
            pid = first.pid if len(group) == 1 else None
            uuids = self._uuids(instance)
            self._add(instance, InTheWay(_kind(first.owner), name, uuids, pid=pid))

    def add_assignment(self, assignment: Assignment) -> None:
        """Note what somebody else has handed out, unless its processes tell it already."""
        uuid = assignment.mig_device_uuid
        if uuid and uuid not in self._devices and self._are_all_told:
            return  # a device that is no longer there
        instance = self._devices.get(uuid)
        there = self.everywhere if instance is None else self.instances.get(instance, [])
        if any(each.name.startswith(f"{assignment.holder}: ") for each in there):
            return
        kind: UserKind = "pod" if assignment.by is AssignedBy.KUBELET else "job"
        user = InTheWay(kind, f"{assignment.holder}: no process", (uuid or self._gpu.uuid,))
        self._add(instance, user)

    def _add(self, instance: int | None, user: InTheWay) -> None:
        is_there = any(each.id == instance for each in self._gpu.instances)
        if instance is None or not is_there:
            place = self.everywhere
        else:
            place = self.instances.setdefault(instance, [])
        if user not in place:
            place.append(user)

    def _uuids(self, instance: int | None) -> tuple[str, ...]:
        found = tuple(
            part.uuid
            for each in self._gpu.instances
            for part in each.compute_instances
            if each.id == instance and part.uuid
        )
        return found or (self._gpu.uuid,)


def _group(owner: Owner) -> str:
    """Return what a process is told under, beside its PID; empty: nothing but itself."""
    is_alone = not (owner.pod_name or owner.pod_uid or owner.slurm_job or owner.container_id)
    return "" if is_alone else owner.described()


def _kind(owner: Owner) -> UserKind:
    if owner.pod_name or owner.pod_uid:
        return "pod"
    return "job" if owner.slurm_job else "process"


def _person(process: ProcessSeen | DeviceHolder) -> str:
    """Return "4711 (python, bob)", with the unit that it is of if nothing tells more."""
    unit = "" if _group(process.owner) else process.owner.described()
    known = ", ".join(each for each in (process.command, process.user, unit) if each)
    return f"{process.pid} ({known or 'whose it is cannot be seen'})"


def _holder(holder: DeviceHolder, gpu_uuid: str) -> InTheWay:
    whose = f"{group}: " if (group := _group(holder.owner)) else ""
    name = f"{whose}process {_person(holder)}, which has the GPU open"
    return InTheWay("holder", name, (gpu_uuid,), pid=holder.pid)
