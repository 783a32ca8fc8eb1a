"""The one pod and the one batch job that has a device: the labels that dcgm-exporter gives it.

A device that two pods share has no label of either: it would be told of one, and be true of both.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from stoker.agent.model import ProcessTable
from stoker.agent.owners import Owner


@dataclass(frozen=True, slots=True)
class Holder:
    """The one pod and the one job that has a device: the labels of dcgm-exporter; empty: none."""

    pod: str = ""
    namespace: str = ""
    container: str = ""
    job: str = ""

    @property
    def labels(self) -> Mapping[str, str]:
        """What is known, by dcgm-exporter's names of labels."""
        named = {
            "container": self.container,
            "hpc_job": self.job,
            "namespace": self.namespace,
            "pod": self.pod,
        }
        return {name: text for name, text in named.items() if text}


NOBODY_KNOWN = Holder()


def holder_of_gpu(table: ProcessTable | None, uuid: str) -> Holder:
    """Return who has a GPU that is not partitioned: it was assigned to it, or its processes run."""
    if table is None or table.assignments_unknown or uuid in table.unread_gpu_uuids:
        return NOBODY_KNOWN
    running = [each.process.owner for each in table.processes if each.process.gpu_uuid == uuid]
    return _only(running + [each.owner for each in table.assignments if each.gpu_uuid == uuid])


def holder_of_mig(table: ProcessTable | None, uuids: Iterable[str]) -> Holder:
    """Return who was assigned these MIG devices."""
    if table is None or table.assignments_unknown:
        return NOBODY_KNOWN
    wanted = set(uuids)
    return _only([each.owner for each in table.assignments if each.mig_device_uuid in wanted])


def _only(owners: Collection[Owner]) -> Holder:
    pods = {
        (owner.pod_namespace, owner.pod_name, owner.container_name)
        for owner in owners
        if owner.pod_name or owner.pod_uid  # one without a name is a pod too
    }
    jobs = {owner.slurm_job for owner in owners if owner.slurm_job}
    job = next(iter(jobs)) if len(jobs) == 1 else ""
    names = {(namespace, pod) for namespace, pod, _ in pods}
    if len(names) != 1:
        return Holder(job=job)
    ((namespace, pod),) = names
    if not pod:
        return Holder(job=job)
    containers = {container for _, _, container in pods if container}
    container = next(iter(containers)) if len(containers) == 1 else ""
    return Holder(pod, namespace, container, job)
