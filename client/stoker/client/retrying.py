"""Which failed calls are sent again, and after what pause.

A call is sent again only where a second execution changes nothing: the reads; Release, Cordon,
Uncordon and Drain, which state what shall be (the grace of a drain counts from the last time);
KeepAlive; AnswerMove, since an offer is granted once; Serve, by which a replica is registered anew;
Mig, whose changes carry an operation id; and Allocate because it carries an idempotency key.
What an aggregator that is being restarted makes of a call is UNAVAILABLE or, when it was told to
stop meanwhile, CANCELLED. Every other status is an answer, and asking again would give the same.
"""

from collections.abc import Mapping
from enum import StrEnum
from random import Random

from stoker.client.model import Change

FIRST_PAUSE_SECONDS = 0.05
PAUSE_SECONDS_MAX = 2.0
# Each pause is this part of its length or more: clients of one outage must not return at once.
_PAUSE_RATIO_MIN = 0.5


class Method(StrEnum):
    """The calls of the services Fleet and Services."""

    ALLOCATE = "Allocate"
    KEEP_ALIVE = "KeepAlive"
    RELEASE = "Release"
    EXPLAIN = "Explain"
    LIST_NODES = "ListNodes"
    LIST_ALLOCATIONS = "ListAllocations"
    WATCH = "Watch"
    CORDON = "Cordon"
    UNCORDON = "Uncordon"
    DRAIN = "Drain"
    LIST_HEALTH = "ListHealth"
    REBALANCE = "Rebalance"
    ANSWER_MOVE = "AnswerMove"
    MIG = "Mig"
    SERVE = "Serve"
    ROUTE = "Route"
    WATCH_ENDPOINTS = "WatchEndpoints"
    LIST_SERVICES = "ListServices"


_LOST = frozenset({"UNAVAILABLE", "CANCELLED"})

# The names of the gRPC statuses after which a method is called again.
RETRIED: Mapping[Method, frozenset[str]] = {
    Method.ALLOCATE: _LOST,  # only with its key, see `is_retried`
    Method.KEEP_ALIVE: _LOST,
    Method.RELEASE: _LOST,
    Method.EXPLAIN: _LOST,
    Method.LIST_NODES: _LOST,
    Method.LIST_ALLOCATIONS: _LOST,
    # Its deadline ends a stream that is well; it goes on from the last version.
    Method.WATCH: _LOST | {"DEADLINE_EXCEEDED"},
    Method.CORDON: _LOST,
    Method.UNCORDON: _LOST,
    Method.DRAIN: _LOST,
    Method.LIST_HEALTH: _LOST,
    Method.REBALANCE: frozenset(),  # applied once more it asks further holders
    Method.ANSWER_MOVE: _LOST,
    Method.MIG: _LOST,
    Method.SERVE: _LOST,
    Method.ROUTE: _LOST,
    Method.WATCH_ENDPOINTS: _LOST | {"DEADLINE_EXCEEDED"},
    Method.LIST_SERVICES: _LOST,
}

# Those of the service `stoker.v1.Services`.
OF_SERVICES = frozenset({Method.SERVE, Method.ROUTE, Method.WATCH_ENDPOINTS, Method.LIST_SERVICES})


# The aggregator's own words for "ask again"; with another one it has answered.
_ASK_AGAIN = frozenset({"STOPPING", "WATCH_TOO_SLOW", "SILENT"})


def is_retried(method: Method, status: str, reason: str, *, has_key: bool) -> bool:
    """Whether a call that failed with `status` is sent again.

    `reason`: what the aggregator itself calls it; empty when it did not speak.
    `has_key`: the call carries an idempotency key.
    """
    if method is Method.ALLOCATE and not has_key:
        return False
    return status in RETRIED[method] if not reason else reason in _ASK_AGAIN


def pause_seconds(failures: int, rng: Random) -> float:
    """Return how long to wait after the `failures`-th failure in a row (1 is the first)."""
    longest = min(PAUSE_SECONDS_MAX, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 30))
    return longest * rng.uniform(_PAUSE_RATIO_MIN, 1.0)


class Tries:
    """One call's way through failures, until its deadline or until patience ends.

    Times are seconds of any monotonic clock.
    """

    def __init__(self, now: float, deadline: float, patience_seconds: float, rng: Random) -> None:
        """`patience_seconds`: how long an outage may last before it is the caller's turn."""
        self._deadline = deadline
        self._patience_seconds = patience_seconds
        self._rng = rng
        self._failures = 0
        self._outage_since = now

    def remaining_seconds(self, now: float) -> float:
        """Return the time left for the next try; more than zero, so that it is a valid deadline."""
        return max(0.001, self._deadline - now)

    def heard(self, now: float) -> None:
        """The aggregator has shown itself in this try: the next failure begins a new outage."""
        self._failures = 0
        self._outage_since = now

    def pause_after_failure(self, now: float) -> float | None:
        """Return the seconds to wait before the next try; None: give up."""
        self._failures += 1
        pause = pause_seconds(self._failures, self._rng)
        until = min(self._deadline, self._outage_since + self._patience_seconds)
        return pause if now + pause < until else None


# What a watch from 0 calls the objects as they are.
PRESENT = "Present"


class Seen:
    """How far a watch has come, so that after an outage it goes on without a gap."""

    def __init__(self, resource_version: int) -> None:
        self.resume_from = resource_version

    def note(self, change: Change) -> None:
        # Before the first change, the objects as they are may not all have come: from 0 again.
        if change.event != PRESENT:
            self.resume_from = change.resource_version
