"""Which endpoint the next call goes to: two are drawn, and the one with less on it is taken.

Endpoints are drawn in proportion to their published weight. The first stands while this client has
no call on it; else of two the one is taken that would have fewer calls of ours for its weight, this
call among them: power of two choices, with bins of different sizes (Mitzenmacher, IEEE TPDS 2001;
Wieder, SPAA 2007). The weight is half a second old and knows all callers, the count is fresh and
knows only ours; together a slow endpoint is felt at once. Without this call among them, a slow one
would be taken whenever it is idle for us, and callers are many.

An endpoint on which a call failed is left out for a moment, longer each time it fails again,
without waiting for the aggregator; when all are left out, the one is taken whose moment ends first.
While the aggregator is away, calls go on by what it said last.
"""

import concurrent.futures
import logging
import random
import threading
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import grpc

from stoker.client.errors import ClientError, NoEndpoint, Unreachable
from stoker.client.services import Endpoint, ServiceEndpoints

BACK_OFF_FIRST_SECONDS = 0.5
BACK_OFF_SECONDS_MAX = 10.0
# Each moment is this part of its length or more: callers must not come back all at once.
_BACK_OFF_RATIO_MIN = 0.5
_NAMED_MAX = 3  # endpoints that an error tells of
# Draws that may meet what was drawn already, or is left out; then it is looked through all.
_DRAWS_MAX = 4

# The replica's answer to what was asked; another replica would give the same.
_ANSWERS = frozenset(
    {
        *("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED"),
        *("FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "UNAUTHENTICATED"),
    }
)

_log = logging.getLogger(__name__)

# None: it cannot be told.
IsFailure = Callable[[Exception], bool | None]


def is_failure(error: Exception) -> bool | None:
    """Whether an exception of a call says that its endpoint is in trouble: all but answers.

    None: the call was cancelled, nearly always by the caller itself, which tells nothing.
    """
    if isinstance(error, grpc.FutureCancelledError | concurrent.futures.CancelledError):
        return None
    if isinstance(error, grpc.RpcError):
        # An error that some wrapper made need not be a call.
        status: grpc.StatusCode | None = getattr(error, "code", lambda: None)()
        if status is grpc.StatusCode.CANCELLED:
            return None
        return status is None or status.name not in _ANSWERS
    return True


@dataclass(slots=True)
class _Track:
    """What this client itself knows of an address."""

    in_flight: int = 0
    failures: int = 0  # in a row
    out_until: float = 0.0  # monotonic seconds


class Picker:
    """The newest set of endpoints and our own calls on them. Safe to use from any thread.

    Times are seconds of any monotonic clock.
    """

    def __init__(self, service: str, rng: random.Random) -> None:
        self.service = service
        self._rng = rng
        self._lock = threading.Lock()
        self._told: ServiceEndpoints | None = None
        self._trouble: ClientError | None = None
        # Of the epoch before: kept until the new one has settled, unless it has spoken of them.
        self._carried: dict[str, Endpoint] = {}
        self._spoken_of: set[str] = set()
        self._endpoints: dict[str, Endpoint] = {}  # by address
        self._called: list[Endpoint] = []
        self._cumulative: list[float] = []  # their weights, each with those before it
        self._tracks: dict[str, _Track] = {}

    # --- what the aggregator says

    def update(self, told: ServiceEndpoints) -> None:
        """Take the newest set."""
        with self._lock:
            if self._trouble is not None and self._told is not None:
                _log.info("the endpoints of %s are told again", self.service)
            if self._told is not None and self._told.epoch != told.epoch:
                self._carried, self._spoken_of = dict(self._endpoints), set()
            self._told, self._trouble = told, None
            self._spoken_of.update(each.address for each in told.endpoints)
            kept: Mapping[str, Endpoint] = {} if told.settled else self._carried
            unspoken = {at: each for at, each in kept.items() if at not in self._spoken_of}
            known = {each.address: each for each in told.endpoints}
            self._endpoints = _joined(known, unspoken) if unspoken else known
            if told.settled:
                self._carried = {}
            self._called = [each for each in self._endpoints.values() if each.weight > 0]
            self._cumulative = list(accumulate(each.weight for each in self._called))
            for address in list(self._tracks):
                if address not in self._endpoints and not self._tracks[address].in_flight:
                    del self._tracks[address]

    def lose(self, trouble: ClientError) -> None:
        """The aggregator is away, or refuses to tell; what it said last goes on to hold."""
        with self._lock:
            if self._trouble is None and self._told is not None:
                _log.warning(
                    "the endpoints of %s are not told any more; calls go on to the %d known: %s",
                    self.service,
                    len(self._endpoints),
                    trouble,
                )
            self._trouble = trouble

    @property
    def trouble(self) -> ClientError | None:
        """Why the set is not the newest; None: it is, or nothing was heard yet."""
        return self._trouble

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints that are gone by now, those that are not called too."""
        with self._lock:
            return tuple(self._endpoints.values())

    @property
    def has_heard(self) -> bool:
        """Whether the aggregator has ever told of the service."""
        return self._told is not None

    # --- our calls

    def pick(self, now: float) -> Endpoint:
        """Return the endpoint for the next call, which counts as under way until `done`.

        Raises NoEndpoint when there is none to call, Unreachable or what else is in the way when
        nothing was ever heard.
        """
        with self._lock:
            if self._told is None:
                raise self._trouble or Unreachable(
                    f"service {self.service}: the aggregator has not told of its endpoints yet"
                )
            if not self._called:
                raise NoEndpoint(self._why_none())
            chosen = self._of_two(now) or min(
                self._called, key=lambda each: self._track(each.address).out_until
            )
            self._track(chosen.address).in_flight += 1
            return chosen

    def done(self, endpoint: Endpoint, now: float, *, ok: bool | None) -> None:
        """A call has ended: well, in trouble, or (None) in a way that tells nothing."""
        with self._lock:
            track = self._tracks.get(endpoint.address)
            if track is None or not track.in_flight:
                raise ValueError(f"{endpoint.address} has no call under way that was picked here")
            track.in_flight -= 1
            if ok:
                track.failures, track.out_until = 0, 0.0
            elif ok is not None and track.out_until <= now:
                # Those that were under way when it was left out tell nothing new.
                track.failures += 1
                longest = BACK_OFF_FIRST_SECONDS * 2.0 ** min(track.failures - 1, 30)
                moment = min(longest, BACK_OFF_SECONDS_MAX)
                track.out_until = now + moment * self._rng.uniform(_BACK_OFF_RATIO_MIN, 1.0)

    def in_flight(self, endpoint: Endpoint) -> int:
        """Return how many calls of ours are under way on an endpoint."""
        with self._lock:
            track = self._tracks.get(endpoint.address)
            return track.in_flight if track else 0

    def _track(self, address: str) -> _Track:
        return self._tracks.setdefault(address, _Track())

    def _of_two(self, now: float) -> Endpoint | None:
        """Return the better of two that are drawn; None: all are left out for the moment."""
        one = self._draw(now)
        # Idle endpoints are called by their weight.
        if one is None or not self._track(one.address).in_flight:
            return one
        other = self._draw(now, one)
        if other is not None and self._calls_for_weight(other) < self._calls_for_weight(one):
            return other
        return one

    def _draw(self, now: float, beside: Endpoint | None = None) -> Endpoint | None:
        """Return one that is not left out, by weight; None: there is none (`beside` that one)."""
        for _ in range(_DRAWS_MAX):  # nearly always the first draw does, whatever their number
            at = bisect(self._cumulative, self._rng.random() * self._cumulative[-1])
            drawn = self._called[min(at, len(self._called) - 1)]
            if drawn is not beside and self._track(drawn.address).out_until <= now:
                return drawn
        open_ = [
            each
            for each in self._called
            if each is not beside and self._track(each.address).out_until <= now
        ]
        if not open_:
            return None
        (drawn,) = self._rng.choices(open_, [each.weight for each in open_])
        return drawn

    def _calls_for_weight(self, endpoint: Endpoint) -> float:
        return (self._track(endpoint.address).in_flight + 1) / endpoint.weight

    def _why_none(self) -> str:
        known = list(self._endpoints.values())
        if not known:
            return f"service {self.service} has no endpoint"
        shown = [f"{each.address}: {each.reason}" for each in known[:_NAMED_MAX]]
        more = f"; {len(known) - _NAMED_MAX} more" if len(known) > _NAMED_MAX else ""
        text = f"service {self.service}: none of its {len(known)} endpoints can be called"
        return f"{text}: {'; '.join(shown)}{more}"


def _joined(told: Mapping[str, Endpoint], kept: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
    """Return both sets as one of which each has the part that its number of endpoints makes.

    The weights that are told make a whole without those that have not come back yet: taken as they
    are, the first to return would get the calls of all.
    """
    parts = [
        {at: each.weight for at, each in endpoints.items() if each.weight > 0}
        for endpoints in (kept, told)
    ]
    count = sum(len(part) for part in parts)
    weights = {
        at: weight / sum(part.values()) * len(part) / count
        for part in parts
        for at, weight in part.items()
    }
    both = {**kept, **told}
    return {at: replace(each, weight=weights.get(at, 0.0)) for at, each in both.items()}
