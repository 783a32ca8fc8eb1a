"""What a node may hold, and which allocation a process belongs to."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from stoker.agent.events import ProcessesTaken
from stoker.agent.model import (
    COMPUTE_MILLI,
    AttributedProcess,
    HeldAllocation,
    Host,
    NumberedInventory,
    ProcessSeen,
    ProcessTable,
)
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import GpuIdentity
from stoker.core.units import format_bytes

# Allocations on one node. The aggregator's own limits are far below; this one keeps frames small.
HELD_MAX = 4096
# Linux tells when it booted in whole seconds, and when a process started in ticks since then.
STARTED_AT_ERROR_SECONDS = 1.0


def find_obstacle(
    wanted: HeldAllocation,
    held: Collection[HeldAllocation],
    inventory: NumberedInventory,
    mig: Iterable[GpuMigStatus] = (),
) -> str | None:
    """Return why `wanted` cannot be held beside what is `held`, naming the GPU; None if it can."""
    if len(held) >= HELD_MAX:
        return f"the node holds {len(held)} allocations, at most {HELD_MAX} are allowed"
    if not wanted.gpu_uuids:
        return "it names no GPU"
    if twice := _twice(wanted.gpu_uuids):
        return f"it names a GPU twice: {twice}"
    if twice := _twice(wanted.mig_device_uuids):
        return f"it names a MIG device twice: {twice}"
    if wanted.memory_bytes is not None and len(wanted.gpu_uuids) > 1:
        return f"a share is of one GPU, and it names {len(wanted.gpu_uuids)}"
    if wanted.compute_milli is not None and wanted.is_whole:
        return "a share of a GPU's compute comes with one of its memory, and it names none"
    withheld = (_why_withheld(each) for each in mig if each.gpu_uuid in wanted.gpu_uuids)
    obstacles = (_obstacle_on(uuid, wanted, held, inventory) for uuid in wanted.gpu_uuids)
    on_host = _obstacle_on_host(wanted, held, inventory.host)
    return next((each for each in (*withheld, *obstacles, on_host) if each), None)


def _why_withheld(status: GpuMigStatus) -> str | None:
    if not status.is_withheld:
        return None
    state, reason = status.state or "not known", f": {status.reason}" if status.reason else ""
    return f"{status.gpu_uuid} takes nothing new while its partitions (MIG) are {state}{reason}"


def _obstacle_on(
    uuid: str,
    wanted: HeldAllocation,
    held: Collection[HeldAllocation],
    inventory: NumberedInventory,
) -> str | None:
    gpu = inventory.gpu(uuid)
    if gpu is None:
        known = ", ".join(each.identity.uuid for each in inventory.gpus) or "none"
        return f"{uuid} is not on this node, which has {known}"
    neighbours = [each for each in held if uuid in each.gpu_uuids]
    for each in neighbours:
        if each.is_whole or wanted.is_whole:
            kind = "exclusively" if each.is_whole else "in part"
            return f"{uuid} is held {kind} by allocation {each.id} of {each.holder!r}"
    if wanted.mig_device_uuids:
        return _obstacle_among_mig(gpu, wanted, neighbours, inventory)
    if gpu.mig_enabled:
        return f"{uuid} is in MIG mode: only a MIG device of it can be held; {_mig_of(gpu)}"
    return None if wanted.is_whole else _obstacle_in_share(gpu, wanted, neighbours)


def _obstacle_in_share(
    gpu: GpuIdentity, wanted: HeldAllocation, neighbours: Collection[HeldAllocation]
) -> str | None:
    if partitioned := next((each for each in neighbours if each.mig_device_uuids), None):
        # It was held while MIG mode was on, which has been turned off under it.
        return f"{gpu.uuid} is held in part by allocation {partitioned.id}, a MIG device of it"
    bytes_wanted = wanted.memory_bytes or 0
    bytes_left = gpu.memory_total_bytes - sum(each.memory_bytes or 0 for each in neighbours)
    if bytes_wanted > bytes_left:
        return f"{gpu.uuid}: wanted {format_bytes(bytes_wanted)}, {format_bytes(bytes_left)} left"
    milli_wanted = wanted.compute_milli or 0
    milli_left = COMPUTE_MILLI - sum(each.compute_milli or 0 for each in neighbours)
    if milli_wanted > milli_left:
        return (
            f"{gpu.uuid}: wanted {milli_wanted / 10:g} % of its compute, {milli_left / 10:g} % left"
        )
    return None


def _obstacle_among_mig(
    gpu: GpuIdentity,
    wanted: HeldAllocation,
    neighbours: Collection[HeldAllocation],
    inventory: NumberedInventory,
) -> str | None:
    if not gpu.mig_enabled:
        names = ", ".join(wanted.mig_device_uuids)
        return f"{gpu.uuid} is not in MIG mode, so it does not have {names}"
    known = {each.uuid for uuid in wanted.gpu_uuids for each in inventory.mig_devices(uuid)}
    for uuid in wanted.mig_device_uuids:
        if uuid not in known:
            return f"{gpu.uuid} does not have {uuid}; {_mig_of(gpu)}"
    mine = {each.uuid: each for each in gpu.mig_devices if each.uuid in wanted.mig_device_uuids}
    if not mine:
        return f"{gpu.uuid} is in MIG mode, and it names no MIG device of it; {_mig_of(gpu)}"
    for each in neighbours:
        for uuid in each.mig_device_uuids:
            if uuid in mine:
                device = f"{uuid} ({mine[uuid].profile} of {gpu.uuid})"
                return f"{device} is held by allocation {each.id} of {each.holder!r}"
        if not each.mig_device_uuids:
            # It was held before MIG mode was turned on under it.
            return f"{gpu.uuid} is held in part by allocation {each.id} of {each.holder!r}"
    return None


def _mig_of(gpu: GpuIdentity) -> str:
    devices = ", ".join(f"{each.uuid} ({each.profile})" for each in gpu.mig_devices)
    return f"it has {devices or 'no MIG devices'}"


def _obstacle_on_host(
    wanted: HeldAllocation, held: Collection[HeldAllocation], host: Host | None
) -> str | None:
    """Return what the host lacks; of one that is not known nothing can be said."""
    if host is None:
        return None
    milli_left = max(0, host.cpu_milli - sum(each.cpu_milli for each in held))
    if wanted.cpu_milli > milli_left:
        return (
            f"the host: wanted {wanted.cpu_milli / 1000:g} CPUs, "
            f"{milli_left / 1000:g} of {host.cpu_milli / 1000:g} left"
        )
    bytes_left = max(0, host.memory_bytes - sum(each.host_memory_bytes for each in held))
    if wanted.host_memory_bytes > bytes_left:
        return (
            f"the host: wanted {format_bytes(wanted.host_memory_bytes)} of memory, "
            f"{format_bytes(bytes_left)} of {format_bytes(host.memory_bytes)} left"
        )
    return None


def _twice(names: Sequence[str]) -> str:
    """Return all of them when one is there twice; empty otherwise."""
    return ", ".join(names) if len(set(names)) < len(names) else ""


def mark_leaving(
    held: Mapping[str, HeldAllocation], leaving: Collection[str]
) -> tuple[HeldAllocation, ...]:
    """Return what is reported as held, with those marked that the node was told to let go of."""
    return tuple(
        replace(each, is_leaving=True) if id_ in leaving else each for id_, each in held.items()
    )


def verify_left(
    event: ProcessesTaken,
    held: Iterable[HeldAllocation],
    asked: Collection[str],
    readable: Collection[str] | None,
) -> frozenset[str]:
    """Return which of the allocations that were `asked` about were on GPUs that could be read.

    `readable`: the UUIDs of the GPUs that can be; None: nobody has told.
    """
    held = tuple(held)
    unread = set(event.unread_gpu_uuids)
    if event.has_unnamed_unread and readable is not None:
        # It may be any GPU that is not among those that can be read.
        unread |= {uuid for each in held for uuid in each.gpu_uuids}.difference(readable)
    return frozenset(
        each.id for each in held if each.id in asked and not unread & set(each.gpu_uuids)
    )


def attribute_all(
    processes: Iterable[ProcessSeen],
    held: Collection[HeldAllocation],
    inventory: NumberedInventory | None,
) -> tuple[AttributedProcess, ...]:
    """Return the processes, each with the allocation that it belongs to."""
    instances = gpu_instances(inventory)
    return tuple(AttributedProcess(each, attribute(each, held, instances)) for each in processes)


def table_of(
    event: ProcessesTaken, tenants: Collection[HeldAllocation], inventory: NumberedInventory | None
) -> ProcessTable:
    """Return what is told of a reading of processes."""
    return ProcessTable(
        event.started_at,
        attribute_all(event.processes, tenants, inventory),
        event.unread_gpu_uuids,
        event.assignments,
        event.assignments_unknown,
    )


def gpu_instances(inventory: NumberedInventory | None) -> Mapping[str, int]:
    """Return the GPU instance of each MIG device."""
    gpus = () if inventory is None else inventory.gpus
    return {
        device.uuid: device.gpu_instance_id for gpu in gpus for device in gpu.identity.mig_devices
    }


def attribute(
    process: ProcessSeen, held: Iterable[HeldAllocation], instances: Mapping[str, int]
) -> str:
    """Return the id of the allocation that the process belongs to, or "" when it is foreign.

    It belongs to the allocation that its environment names, if that one holds the GPU, or a MIG
    device of the GPU instance that it runs in (`instances`: that of each MIG device). Without such
    a name it belongs to the only tenant, if it started under that tenancy. A name that does not fit
    is foreign: it is what an earlier tenant left behind.
    """
    tenants = {
        each.id: each
        for each in held
        if process.gpu_uuid in each.gpu_uuids and _is_within(process, each, instances)
    }
    claimed = process.claimed_allocation_id
    if claimed is not None:
        return claimed if claimed in tenants else ""
    # Nothing tells shares apart, nor the compute instances of one GPU instance.
    alone = [each for each in tenants.values() if each.is_whole or each.mig_device_uuids]
    if len(alone) != 1 or process.started_at is None:
        return ""
    (tenant,) = alone
    is_during = process.started_at >= tenant.held_since - STARTED_AT_ERROR_SECONDS
    return tenant.id if is_during else ""


def _is_within(process: ProcessSeen, tenant: HeldAllocation, instances: Mapping[str, int]) -> bool:
    if not tenant.mig_device_uuids:
        return True
    mine = {instances.get(uuid) for uuid in tenant.mig_device_uuids} - {None}
    return process.gpu_instance_id in mine
