"""Who has device files of the driver open: from what the root helper tells, to what people read."""

from collections.abc import Iterable
from dataclasses import replace

from stoker.agent.attribution.cgroups import parse_cgroup
from stoker.agent.attribution.pod_names import PodNames
from stoker.agent.owners import DeviceHolder
from stoker.agent.privileged import RawHolder
from stoker.agent.proctable import ProcTable


def describe_holders(
    raw: Iterable[RawHolder], table: ProcTable, names: PodNames | None = None
) -> tuple[DeviceHolder, ...]:
    """Return them with the names of their users and pods; may ask a directory server for those."""
    return tuple(_describe(each, table, names) for each in raw)


def _describe(raw: RawHolder, table: ProcTable, names: PodNames | None) -> DeviceHolder:
    place = parse_cgroup(raw.cgroup)
    owner = place.owner()
    if place.pod_uid and names is not None:
        name = names.look_up(place.pod_uid, (each.id for each in place.containers))
        owner = replace(
            owner, pod_namespace=name.namespace, pod_name=name.pod, container_name=name.container
        )
    return DeviceHolder(
        pid=raw.pid,
        user=table.user_name(raw.uid),
        command=raw.command,
        devices=raw.devices,
        owner=owner,
        started_at=table.started_at(raw.started_ticks),
    )
