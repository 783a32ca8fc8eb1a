"""Wanted minus reported: what a node must be told so that it holds just what the ledger says."""

from collections.abc import Mapping

from stoker.aggregator.model import Allocation, AllocationState, Command, HeldAllocation


def difference(
    wanted: Mapping[str, Allocation],
    held: Mapping[str, HeldAllocation],
    sent: Mapping[str, Command],
    first_id: int,
    *,
    inventory_known: bool,
) -> tuple[Command, ...]:
    """Return the commands for one stream, numbered from `first_id`.

    `wanted`: what the node shall hold or let go of, granted and releasing; every releasing one is
    dropped, also one that was never held: see `has_let_go`. `held`: what the node last reported.
    `sent`: the last command per allocation on this stream; a stream is ordered and reliable, so
    what was sent is not sent again on it.

    Call it after the node's report was reconciled (`decisions.Round`), for what the node holds and
    the ledger does not know may be adopted there. What was not adopted is dropped, once the node
    has told which GPUs it has (`inventory_known`): before that, adoption could not be tried. A Hold
    waits for what is dropped from the same GPUs, which else would be the node's reason to refuse.
    """
    commands: list[Command] = []

    def add(allocation_id: str, hold: HeldAllocation | None, reason: str = "") -> None:
        commands.append(Command(first_id + len(commands), allocation_id, hold, reason))

    strays = {uuid for id_, one in held.items() if id_ not in wanted for uuid in one.gpu_uuids}
    for allocation in wanted.values():
        last = sent.get(allocation.id)
        if allocation.state is AllocationState.GRANTED:
            is_free = strays.isdisjoint(device.uuid for device in allocation.devices)
            if allocation.id not in held and last is None and is_free:
                add(allocation.id, to_hold(allocation))
        elif last is None or last.is_hold:
            add(allocation.id, None, allocation.reason)
    for id_ in held:
        last = sent.get(id_)
        if inventory_known and id_ not in wanted and (last is None or last.is_hold):
            add(id_, None, "the ledger does not grant it")
    return tuple(commands)


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


def to_hold(allocation: Allocation) -> HeldAllocation:
    """Return what the node shall hold for a granted allocation."""
    shares = [d.memory_bytes for d in allocation.devices if not d.exclusive]
    return HeldAllocation(
        id=allocation.id,
        gpu_uuids=tuple(device.uuid for device in allocation.devices),
        memory_bytes=shares[0] if shares else None,
        holder=allocation.request.holder,
        ttl_seconds=allocation.request.ttl_seconds,
        held_since=allocation.granted_at or allocation.requested_at,
    )
