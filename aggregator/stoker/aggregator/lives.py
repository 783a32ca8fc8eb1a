"""An allocation after one more event of its life; `TRANSITIONS` says which may follow which."""

from collections.abc import Mapping
from dataclasses import replace

from stoker.aggregator import events as e
from stoker.aggregator.model import TRANSITIONS, Allocation, AllocationState, Claim, Device


class InvalidTransition(Exception):
    """A durable event that the tables do not allow: a bug, told with the whole story."""


def require(before: Allocation | None, to: AllocationState, event: e.DurableEvent) -> None:
    """Raise InvalidTransition unless `event` may take the allocation from what it was there."""
    state = before.state if before else None
    if type(event).__name__ not in TRANSITIONS[state].get(to, ()):
        raise InvalidTransition(f"{event}: {state} cannot become {to}; it was {before}")


def require_free(
    event: e.AllocationGranted | e.AllocationAdopted, claims: Mapping[str, tuple[Claim, ...]]
) -> None:
    """Raise InvalidTransition unless nobody's claims stand against the event's devices."""
    nodes = [placement.node for placement in event.placements]
    devices = [device for placement in event.placements for device in placement.devices]
    uuids = {device.mig_device_uuid or device.uuid for device in devices}
    if not 0 < len(set(nodes)) == len(nodes) or len(uuids) < len(devices):
        raise InvalidTransition(f"{event}: no node, or one twice, or a device twice")
    if len(nodes) != event.request.nodes:
        raise InvalidTransition(f"{event}: a gang of {event.request.nodes} nodes on {len(nodes)}")
    if any(len(placement.devices) < event.request.gpus for placement in event.placements):
        raise InvalidTransition(f"{event}: fewer devices than asked for")
    for device in devices:
        others = claims.get(device.uuid, ())
        if any(excludes(claim_of(event.id, device), other) for other in others):
            raise InvalidTransition(f"{event}: GPU {device.uuid} is taken by {others}")


def claim_of(allocation_id: str, device: Device) -> Claim:
    """Return what the allocation takes of the device's GPU."""
    return Claim(
        allocation_id,
        None if device.exclusive else device.memory_bytes,
        device.compute_milli or 0,
        device.mig_device_uuid,
    )


def excludes(one: Claim, other: Claim) -> bool:
    """Whether no GPU can bear both: one of them is for all of it, or both for one MIG device."""
    if one.mig_device_uuid and other.mig_device_uuid:
        return one.mig_device_uuid == other.mig_device_uuid
    is_partitioned = bool(one.mig_device_uuid or other.mig_device_uuid)
    return is_partitioned or one.memory_bytes is None or other.memory_bytes is None


def requested(event: e.AllocationRequested, version: int) -> Allocation:
    """Return it as it enters the queue."""
    return Allocation(
        id=event.id,
        state=AllocationState.WAITING,
        request=event.request,
        requested_at=event.at,
        version=version,
        idempotency_key=event.idempotency_key,
        wait_until=event.wait_until,
    )


def granted(event: e.AllocationGranted | e.AllocationAdopted, version: int) -> Allocation:
    """Return it with its devices, whether it waited for them or not."""
    requested_at, key = event.at, ""
    if isinstance(event, e.AllocationGranted):
        requested_at, key = event.requested_at, event.idempotency_key
    return Allocation(
        id=event.id,
        state=AllocationState.GRANTED,
        request=event.request,
        requested_at=requested_at,
        version=version,
        idempotency_key=key,
        placements=event.placements,
        granted_at=event.at,
    )


def given_up(before: Allocation, event: e.AllocationReleasing, version: int) -> Allocation:
    """Return it as it is until its node has let go."""
    return replace(before, state=AllocationState.RELEASING, reason=event.reason, version=version)


def ended(before: Allocation, event: e.AllocationEnded, version: int) -> Allocation:
    """Return it as it is remembered."""
    return replace(
        before,
        state=AllocationState.ENDED,
        ended_at=event.at,
        reason=event.reason,
        version=version,
        wait_until=None,
    )
