"""How often an allocation is kept alive, and what the answers mean."""

from stoker.client.errors import AllocationEnded
from stoker.client.model import AllocationState, KeptAlive

# A third of the TTL leaves two more tries; the bound is how late a client may learn of its loss.
INTERVAL_SECONDS_MAX = 20.0
TRIES_PER_TTL = 3
# A keep-alive that failed was already sent again while patience lasted; the next comes after this.
PAUSE_AFTER_LOSS_SECONDS = 1.0


def pause_seconds(ttl_seconds: float, *, arrived: bool) -> float:
    """Return the time from one keep-alive to the next."""
    interval = min(ttl_seconds / TRIES_PER_TTL, INTERVAL_SECONDS_MAX)
    return interval if arrived else min(interval, PAUSE_AFTER_LOSS_SECONDS)


def still_granted(kept: KeptAlive) -> KeptAlive:
    """Return the answer of a keep-alive; raises AllocationEnded when it is no longer ours."""
    if kept.state in (AllocationState.GRANTED, AllocationState.UNKNOWN):
        return kept
    raise AllocationEnded(kept.allocation_id, kept.state, kept.ended_reason)
