"""An allocation after one more event of its life; `TRANSITIONS` says which may follow which."""

from collections.abc import Mapping
from dataclasses import replace

from stoker.aggregator import events as e
from stoker.aggregator.model import TRANSITIONS, Allocation, AllocationState, Claim


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
    if not 0 < len({device.uuid for device in event.devices}) == len(event.devices):
        raise InvalidTransition(f"{event}: no devices, or one twice")
    for device in event.devices:
        others = claims.get(device.uuid, ())
        if others and (device.exclusive or any(c.memory_bytes is None for c in others)):
            raise InvalidTransition(f"{event}: GPU {device.uuid} is taken by {others}")


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
        node=event.node,
        devices=event.devices,
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
