"""Who serves what, how it fares, and which part of the calls it gets: events go in, views come out.

Volatile: it lives as long as the process. A few times a second all are reviewed: what the endpoints
say of themselves is compared with what the fleet says of their GPUs, and a service is published
anew when its set has changed or a weight has moved far.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

from stoker.aggregator.routing import Candidate, Load, Share, kept_steady, weigh
from stoker.aggregator.standings import Standing
from stoker.core.latencies import BUCKETS, quantile

# Sizes: one more is refused, and says so. A review takes some 30 us for each endpoint, so that the
# largest service holds up the loop for 30 ms, and all together keep a quarter of a core busy.
SERVICES_MAX = 1_000
ENDPOINTS_PER_SERVICE_MAX = 1_024
ENDPOINTS_MAX = 2_048
# Sums for Prometheus, of each service on each GPU; the oldest without an endpoint is forgotten.
TOTALS_MAX = 2 * ENDPOINTS_MAX

SIGN_SECONDS = 0.5  # a sign of life is due so often
# With a review every 0.25 s, calls end within 2 s after the last sign.
SILENCE_SECONDS = 1.5
GONE_SECONDS = 10.0  # then it is not waited for any more
# After the start, replicas have so long to register and agents to come back.
SETTLE_SECONDS = 10.0
# A review so long after the last one, of whichever service, tells that the process stood still:
# nobody could be heard meanwhile.
STANDSTILL_SECONDS = 1.0
# What was seen counts half after so long.
HALF_LIFE_SECONDS = 2.0
# Less than this part of an operation is left of what was seen: nothing is known any more.
_FORGOTTEN = 0.01
# Until so much was watched, a rate would be a guess.
_WATCHED_SECONDS_MIN = 0.1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One registration."""

    id: str
    service: str
    address: str
    allocation_id: str
    node: str
    gpu_uuids: tuple[str, ...]
    gpu: str  # its GPUs' indexes on the node, for labels: "0" or "0,1"
    capacity: int | None
    registered_at: float


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life: what was done since the last one."""

    operations: int
    errors: int
    latency_counts: tuple[int, ...]  # of `BUCKETS` buckets
    latency_sum_seconds: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class EndpointRegistered:
    """A replica can be called."""

    at: float
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class SignGiven:
    """A replica lives. Of one that has left it changes nothing."""

    at: float
    id: str
    sign: Sign


@dataclass(frozen=True, slots=True)
class EndpointLeft:
    """A replica's stream has ended. Of one that has left already it changes nothing."""

    at: float
    id: str


ServiceEvent = EndpointRegistered | SignGiven | EndpointLeft


@dataclass(frozen=True, slots=True)
class EndpointView:
    """An endpoint as callers see it."""

    endpoint: Endpoint
    share: Share
    load: Load
    operations_per_second: float | None
    seen_at: float


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A service as callers see it."""

    service: str
    version: int
    is_settled: bool
    at: float
    endpoints: tuple[EndpointView, ...]


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What a review found."""

    changed: tuple[str, ...]  # services that were published anew
    over: tuple[tuple[str, str], ...]  # endpoints whose allocation is, by id, and why
    silent: tuple[str, ...]  # endpoints that are not waited for any more, by id


@dataclass(slots=True)
class Totals:
    """What a service has done on one GPU, or set of GPUs, since the aggregator started."""

    operations: int = 0
    errors: int = 0
    latency_counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    latency_sum_seconds: float = 0.0

    def add(self, sign: Sign) -> None:
        """Count what a sign of life tells."""
        self.operations += sign.operations
        self.errors += sign.errors
        self.latency_sum_seconds += sign.latency_sum_seconds
        for number, count in enumerate(sign.latency_counts):
            self.latency_counts[number] += count

    def copy(self) -> "Totals":
        """Return what it is now, for another thread."""
        counts = list(self.latency_counts)
        return Totals(self.operations, self.errors, counts, self.latency_sum_seconds)


TotalsKey = tuple[str, str, str]  # service, node, GPUs


@dataclass(frozen=True, slots=True)
class ServicesPicture:
    """Every service at one instant, for the page for Prometheus."""

    totals: Mapping[TotalsKey, Totals]
    services: tuple[ServiceView, ...]


class Services:
    """The table. Endpoints and services are in the order in which they came."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._reviewed_at = started_at
        self._was_settled = False
        self._is_turning = False  # in this round, from not settled to settled
        self._entries: dict[str, _Entry] = {}
        self._services: dict[str, dict[str, _Entry]] = {}
        self._published: dict[str, dict[str, Share]] = {}
        self._versions: dict[str, int] = {}
        self._version = 0
        self._gone: dict[str, None] = {}  # services whose last endpoint left since the last review
        self._totals: dict[TotalsKey, Totals] = {}

    # --- reading

    def is_settled(self, now: float) -> bool:
        """Whether replicas and agents have had the time to come back since the start."""
        return now >= self._started_at + SETTLE_SECONDS

    def no_room_for(self, service: str) -> str:
        """Return why no endpoint more can be taken; empty: it can."""
        if service not in self._services and len(self._services) >= SERVICES_MAX:
            return f"there are {SERVICES_MAX} services already"
        if len(self._services.get(service, ())) >= ENDPOINTS_PER_SERVICE_MAX:
            return f"service {service} has {ENDPOINTS_PER_SERVICE_MAX} endpoints already"
        if len(self._entries) >= ENDPOINTS_MAX:
            return f"there are {ENDPOINTS_MAX} endpoints already"
        return ""

    def at_address(self, service: str, address: str) -> str | None:
        """Return the endpoint of the service that has this address, by id."""
        for id_, entry in self._services.get(service, {}).items():
            if entry.endpoint.address == address:
                return id_
        return None

    def names(self) -> list[str]:
        """Return the services that have an endpoint, by name."""
        return sorted(self._services)

    def endpoint_ids(self, service: str) -> list[str]:
        """Return the endpoints of a service, by id."""
        return list(self._services.get(service, ()))

    def share(self, endpoint_id: str) -> Share | None:
        """Return the endpoint's published share; None: it has none yet, or has left."""
        entry = self._entries.get(endpoint_id)
        if entry is None:
            return None
        return self._published.get(entry.endpoint.service, {}).get(endpoint_id)

    def view(self, service: str, now: float) -> ServiceView:
        """Return the service as it was published, with the newest figures; empty: nobody serves."""
        shares = self._published.get(service, {})
        endpoints = tuple(
            EndpointView(
                entry.endpoint, shares[id_], entry.load(now), entry.rate(now), entry.seen_at
            )
            for id_, entry in self._services.get(service, {}).items()
            if id_ in shares
        )
        version = self._versions.get(service, self._version)
        return ServiceView(service, version, self.is_settled(now), now, endpoints)

    def totals(self) -> dict[TotalsKey, Totals]:
        """Return what every service has done where; a copy."""
        return {key: totals.copy() for key, totals in self._totals.items()}

    # --- the door

    def handle(self, event: ServiceEvent) -> None:
        """Take in what happened; it shows with the next review."""
        match event:
            case EndpointRegistered(at, endpoint):
                assert not self.no_room_for(endpoint.service), endpoint
                entry = self._entries[endpoint.id] = _Entry(endpoint, at)
                self._services.setdefault(endpoint.service, {})[endpoint.id] = entry
                self._gone.pop(endpoint.service, None)
            case SignGiven(at, id_, sign):
                known = self._entries.get(id_)
                if known is not None:
                    known.take(sign, at)
                    self._totals_of(known.endpoint).add(sign)
            case EndpointLeft(_, id_):
                left = self._entries.pop(id_, None)
                if left is not None:
                    self._leave(left.endpoint)
            case _:
                assert_never(event)

    def due(self, now: float) -> list[str]:
        """Begin a round of reviews: return the services, those too that have just gone."""
        self._forgive_standstill(now)
        settled = self.is_settled(now)
        self._is_turning, self._was_settled = settled != self._was_settled, settled
        gone, self._gone = list(self._gone), {}
        return [*gone, *self._services]

    def review(
        self, names: Iterable[str], now: float, stand: Callable[[str], Standing]
    ) -> Reviewed:
        """Publish these services where they have changed, in the round that `due` began.

        `stand` tells how an allocation's endpoint stands.
        """
        self._forgive_standstill(now)
        changed: list[str] = []
        over: list[tuple[str, str]] = []
        silent: list[str] = []
        for name in names:
            entries = self._services.get(name)
            if entries is None:
                if self._published.pop(name, None) is not None:
                    self._versions.pop(name, None)
                    changed.append(name)
                continue
            fresh = weigh([_candidate(each, now, stand) for each in entries.values()])
            over += [(id_, why) for id_, each in entries.items() if (why := each.standing.over)]
            silent += [id_ for id_, each in entries.items() if now - each.seen_at > GONE_SECONDS]
            published = self._published.get(name)
            is_same = published is not None and kept_steady(fresh, published)
            if self._is_turning or not is_same:
                self._published[name] = fresh
                changed.append(name)
        self._version += bool(changed)
        # What is gone has the version of the whole, which rises as well.
        self._versions |= {name: self._version for name in changed if name in self._services}
        return Reviewed(tuple(changed), tuple(over), tuple(silent))

    # --- helpers

    def _leave(self, endpoint: Endpoint) -> None:
        entries = self._services[endpoint.service]
        del entries[endpoint.id]
        if not entries:
            del self._services[endpoint.service]
            self._gone[endpoint.service] = None

    def _forgive_standstill(self, now: float) -> None:
        """Hold nothing against endpoints that they could not say, or said when it was later."""
        stood = now - self._reviewed_at
        self._reviewed_at = now
        self._started_at += min(0.0, stood)  # the clock was set back
        if stood > STANDSTILL_SECONDS or stood < 0:
            for entry in self._entries.values():
                entry.seen_at = min(now, entry.seen_at + max(0.0, stood))

    def _totals_of(self, endpoint: Endpoint) -> Totals:
        key = (endpoint.service, endpoint.node, endpoint.gpu)
        if key not in self._totals:
            if len(self._totals) >= TOTALS_MAX:
                self._forget_totals()
            self._totals[key] = Totals()
        return self._totals[key]

    def _forget_totals(self) -> None:
        """Forget the oldest sums that no endpoint adds to; there are some, for there are more."""
        live = set(_keys(self._entries.values()))
        del self._totals[next(key for key in self._totals if key not in live)]


class _Entry:
    """An endpoint and what is known of it; what it tells is smoothed as it comes."""

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.endpoint = endpoint
        self.seen_at = now
        self.standing = Standing()
        self._operations = 0.0  # these four fade
        self._errors = 0.0
        self._counts = [0.0] * BUCKETS
        self._watched_seconds = 0.0
        self._in_flight: float | None = None
        self._taken_at = now
        self._utilization: float | None = None
        self._stood_at = now

    def take(self, sign: Sign, now: float) -> None:
        """Take in a sign of life."""
        kept = _kept(now - self._taken_at)
        # The first may tell of all that was done while nobody listened: it says what operations are
        # like, and not how many there are in half a second.
        is_first = self._in_flight is None
        part = 1 / max(1, sign.operations) if is_first else 1.0
        self._operations = kept * self._operations + part * sign.operations
        self._errors = kept * self._errors + part * sign.errors
        pairs = zip(self._counts, sign.latency_counts, strict=True)
        self._counts = [kept * old + part * new for old, new in pairs]
        self._watched_seconds = kept * self._watched_seconds + max(0.0, now - self._taken_at)
        before = sign.in_flight if self._in_flight is None else self._in_flight
        self._in_flight = kept * before + (1 - kept) * sign.in_flight
        self._taken_at = self.seen_at = now

    def stand(self, standing: Standing, now: float) -> None:
        """Take in what the fleet says."""
        self.standing = standing
        told, before = standing.utilization_ratio, self._utilization
        kept = _kept(now - self._stood_at)
        self._utilization = (
            told if told is None or before is None else kept * before + (1 - kept) * told
        )
        self._stood_at = now

    def load(self, now: float) -> Load:
        """Return how it fares."""
        fading = _kept(now - self._taken_at)
        seen = sum(self._counts) * fading
        return Load(
            utilization_ratio=self._utilization,
            memory_used_ratio=self.standing.memory_used_ratio,
            in_flight=self._in_flight,
            latency_p50_seconds=quantile(self._counts, 0.5) if seen > _FORGOTTEN else None,
            error_ratio=self._errors / self._operations
            if self._operations * fading > _FORGOTTEN
            else None,
        )

    def rate(self, now: float) -> float | None:
        """Return its operations a second in the last seconds."""
        if self._watched_seconds < _WATCHED_SECONDS_MIN:
            return None
        return self._operations / self._watched_seconds


def _candidate(entry: _Entry, now: float, stand: Callable[[str], Standing]) -> Candidate:
    entry.stand(stand(entry.endpoint.allocation_id), now)
    standing, quiet = entry.standing, now - entry.seen_at
    out = standing.over or standing.out
    if not out and quiet > SILENCE_SECONDS:
        out = f"silent for more than {SILENCE_SECONDS:g} s"
    return Candidate(entry.endpoint.id, entry.load(now), entry.endpoint.capacity, out)


def _kept(seconds: float) -> float:
    """Return which part of what was seen so long ago still counts."""
    return math.exp2(-max(0.0, seconds) / HALF_LIFE_SECONDS)


def _keys(entries: Iterable[_Entry]) -> Iterable[TotalsKey]:
    return ((each.endpoint.service, each.endpoint.node, each.endpoint.gpu) for each in entries)
