"""What a node may hold, and which allocation a process belongs to."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from stoker.agent.events import ProcessesTaken
from stoker.agent.model import (
    AttributedProcess,
    HeldAllocation,
    NumberedInventory,
    ProcessSeen,
)
from stoker.core.units import format_bytes

# Allocations on one node. The aggregator's own limits are far below; this one keeps frames small.
HELD_MAX = 4096
# Linux tells when it booted in whole seconds, and when a process started in ticks since then.
STARTED_AT_ERROR_SECONDS = 1.0


def find_obstacle(
    wanted: HeldAllocation, held: Collection[HeldAllocation], inventory: NumberedInventory
) -> str | None:
    """Return why `wanted` cannot be held beside what is `held`, naming the GPU; None if it can."""
    if len(held) >= HELD_MAX:
        return f"the node holds {len(held)} allocations, at most {HELD_MAX} are allowed"
    if not wanted.gpu_uuids:
        return "it names no GPU"
    if len(set(wanted.gpu_uuids)) < len(wanted.gpu_uuids):
        return f"it names a GPU twice: {', '.join(wanted.gpu_uuids)}"
    if wanted.memory_bytes is not None and len(wanted.gpu_uuids) > 1:
        return f"a share is of one GPU, and it names {len(wanted.gpu_uuids)}"
    obstacles = (_obstacle_on(uuid, wanted, held, inventory) for uuid in wanted.gpu_uuids)
    return next((each for each in obstacles if each is not None), None)


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
        if each.memory_bytes is None or wanted.memory_bytes is None:
            kind = "exclusively" if each.memory_bytes is None else "in part"
            return f"{uuid} is held {kind} by allocation {each.id} of {each.holder!r}"
    if wanted.memory_bytes is not None:
        free = gpu.memory_total_bytes - sum(each.memory_bytes or 0 for each in neighbours)
        if wanted.memory_bytes > free:
            return f"{uuid}: wanted {format_bytes(wanted.memory_bytes)}, {format_bytes(free)} left"
    return None


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
    processes: Iterable[ProcessSeen], held: Collection[HeldAllocation]
) -> tuple[AttributedProcess, ...]:
    """Return the processes, each with the allocation that it belongs to."""
    return tuple(AttributedProcess(each, attribute(each, held)) for each in processes)


def attribute(process: ProcessSeen, held: Iterable[HeldAllocation]) -> str:
    """Return the id of the allocation that the process belongs to, or "" when it is foreign.

    It belongs to the allocation that its environment names, if that one holds the GPU. Without
    such a name it belongs to the only tenant of the GPU, if it started under that tenancy. A name
    that does not fit is foreign: it is what an earlier tenant left behind.
    """
    tenants = {each.id: each for each in held if process.gpu_uuid in each.gpu_uuids}
    claimed = process.claimed_allocation_id
    if claimed is not None:
        return claimed if claimed in tenants else ""
    for tenant in tenants.values():
        began = process.started_at
        if tenant.memory_bytes is None and began is not None:
            is_during = began >= tenant.held_since - STARTED_AT_ERROR_SECONDS
            return tenant.id if is_during else ""
    return ""
