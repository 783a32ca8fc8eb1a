"""Wanted minus reported: what a node must be told so that it holds just what the ledger says."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import Allocation, AllocationState, Command, Device, HeldAllocation


def difference(
    node: str,
    wanted: Mapping[str, Allocation],
    held: Mapping[str, HeldAllocation],
    sent: Mapping[str, Command],
    first_id: int,
    *,
    inventory_known: bool,
) -> tuple[Command, ...]:
    """Return the commands for the stream of `node`, numbered from `first_id`.

    `wanted`: what the node shall hold or let go of, granted and releasing; every releasing one is
    dropped, also one that was never held: see `has_let_go`. `held`: what the node last reported.
    `sent`: the last command per allocation on this stream; a stream is ordered and reliable, so
    what was sent is not sent again on it.

    Call it after the node's report was reconciled (`decisions.Round`), for what the node holds and
    the ledger does not know may be adopted there. What was not adopted is dropped, once the node
    has told which GPUs it has (`inventory_known`): before that, adoption could not be tried. A Hold
    waits for what is dropped from the same GPUs, and for CPUs and memory of the host that go with
    what is dropped, which else would be the node's reason to refuse.
    """
    commands: list[Command] = []

    def add(allocation_id: str, hold: HeldAllocation | None, reason: str = "") -> None:
        commands.append(Command(first_id + len(commands), allocation_id, hold, reason))

    strays = [one for id_, one in held.items() if id_ not in wanted]
    for allocation in wanted.values():
        devices = allocation.devices_on(node)
        last = sent.get(allocation.id)
        if allocation.state is AllocationState.GRANTED:
            # A Drop is of what the node held of it before it was granted: while it waited.
            is_told = last is not None and last.is_hold
            if allocation.id not in held and not is_told:
                hold = to_hold(allocation, devices)
                if not any(_is_in_the_way(stray, hold) for stray in strays):
                    add(allocation.id, hold)
        elif last is None or last.is_hold:
            add(allocation.id, None, allocation.reason)
    for id_ in held:
        last = sent.get(id_)
        if inventory_known and id_ not in wanted and (last is None or last.is_hold):
            add(id_, None, "the ledger does not grant it")
    return tuple(commands)


def _is_in_the_way(stray: HeldAllocation, wanted: HeldAllocation) -> bool:
    return (
        not set(stray.gpu_uuids).isdisjoint(wanted.gpu_uuids)
        or bool(stray.cpu_milli and wanted.cpu_milli)
        or bool(stray.host_memory_bytes and wanted.host_memory_bytes)
    )


def has_let_go(
    allocation_id: str,
    held: Mapping[str, HeldAllocation],
    sent: Mapping[str, Command],
    commands_done: int,
) -> bool:
    """Whether the node certainly does not hold the allocation, and has looked at its processes.

    Not to be in `held` is not enough: a Hold may be under way, and whoever was promised the GPUs
    may have used them although the node never held them. The Drop that was sent on this stream must
    be done: it is when processes were read after it, and told.
    """
    last = sent.get(allocation_id)
    is_dropped = last is not None and not last.is_hold and commands_done >= last.id
    return is_dropped and allocation_id not in held


def to_hold(allocation: Allocation, devices: Sequence[Device]) -> HeldAllocation:
    """Return what a node shall hold for a granted allocation: `devices`, its part of it."""
    # What several MIG devices have of memory is for each of them to tell.
    share = devices[0] if len(devices) == 1 and not devices[0].exclusive else None
    return HeldAllocation(
        id=allocation.id,
        gpu_uuids=tuple(dict.fromkeys(device.uuid for device in devices)),
        memory_bytes=share.memory_bytes if share else None,
        compute_milli=share.compute_milli if share else None,
        mig_device_uuids=tuple(d.mig_device_uuid for d in devices if d.mig_device_uuid),
        cpu_milli=allocation.request.cpu_milli,
        host_memory_bytes=allocation.request.host_memory_bytes,
        gang_nodes=len(allocation.placements),
        holder=allocation.request.holder,
        ttl_seconds=allocation.request.ttl_seconds,
        held_since=allocation.granted_at or allocation.requested_at,
    )
