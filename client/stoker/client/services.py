"""Services as values, and what a replica tells of itself while it serves."""

import functools
import inspect
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from stoker.client.errors import ClientError, InvalidRequest
from stoker.client.lease import Lease
from stoker.client.model import Allocation
from stoker.core.latencies import BUCKETS, SECONDS_MAX, bucket_of

P = ParamSpec("P")
T = TypeVar("T")

# A sign of life is due so often.
SIGN_SECONDS = 0.5
# What can be told at a time. Beyond it, after an outage of days, the count begins anew.
OPERATIONS_MAX = 100_000_000
IN_FLIGHT_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a replica can be called, how much, and why so."""

    id: str
    address: str  # HOST:PORT
    weight: float  # its part of the service's calls, from 0 to 1
    reason: str  # why it has this weight
    allocation_id: str
    node: str
    gpu_uuids: tuple[str, ...]
    capacity: int | None = None  # calls at a time, as it says
    in_flight: float | None = None  # operations under way; this and the next smoothed over seconds
    latency_p50_seconds: float | None = None
    operations_per_second: float | None = None
    error_ratio: float | None = None
    utilization_ratio: float | None = None  # of its busiest GPU
    memory_used_ratio: float | None = None  # of its fullest GPU
    registered_at: float = 0.0  # on the aggregator's clock, Unix seconds
    seen_at: float = 0.0  # when it last gave a sign of life


@dataclass(frozen=True, slots=True)
class ServiceEndpoints:
    """A service and who serves it, at one instant."""

    service: str
    version: int  # rises with every change, within one epoch
    epoch: str  # of the aggregator's process
    settled: bool  # whether replicas have had the time to register since it started
    at: float  # on the aggregator's clock, Unix seconds
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """What a replica serves, where, and in which allocation."""

    service: str
    allocation_id: str
    address: str
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What was done since the last sign of life."""

    operations: int
    errors: int
    latency_counts: tuple[int, ...]
    latency_sum_seconds: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How an endpoint stands with callers."""

    weight: float
    reason: str


def registration(
    service: str, lease: Lease | Allocation | str, address: str, capacity: int | None
) -> Registration:
    """Return what is to be registered; raises InvalidRequest for what cannot be sent."""
    allocation_id = lease if isinstance(lease, str) else lease.id
    if capacity is not None and not 1 <= capacity <= IN_FLIGHT_MAX:
        raise InvalidRequest(f"capacity: wanted 1 to {IN_FLIGHT_MAX}, found {capacity}")
    return Registration(service, allocation_id, address, capacity)


class Service:
    """What a replica serves while its context lasts. Safe to use from any thread."""

    def __init__(self, registered: Registration) -> None:
        self.registration = registered
        self._lock = threading.Lock()
        self._operations = 0
        self._errors = 0
        self._counts = [0] * BUCKETS
        self._seconds = 0.0
        self._in_flight = 0
        self._standing: Standing | None = None
        self._ended: ClientError | None = None

    @property
    def name(self) -> str:
        """The service's name."""
        return self.registration.service

    @property
    def standing(self) -> Standing | None:
        """Which part of the calls it gets and why, as last heard; None: not heard yet."""
        return self._standing

    @property
    def ended(self) -> ClientError | None:
        """Why it is not an endpoint any more and will not be again; None: it is, or will be."""
        return self._ended

    def observe(self, operations: int = 1, seconds: float | None = None, errors: int = 0) -> None:
        """Count operations that have ended; `errors` of them failed.

        `seconds` is what each of them took, of a batch the time of the batch, at most a year; None:
        not known.
        """
        good = operations - errors
        if errors < 0 or good < 0 or (seconds is not None and not 0 <= seconds <= SECONDS_MAX):
            raise InvalidRequest(
                "observe: wanted operations >= errors >= 0 and seconds from 0 to a year, found "
                f"operations={operations}, errors={errors}, seconds={seconds}"
            )
        with self._lock:
            if self._operations + operations > OPERATIONS_MAX:
                self._clear()
            self._operations += min(operations, OPERATIONS_MAX)
            self._errors += min(errors, OPERATIONS_MAX)
            if seconds is not None and operations <= OPERATIONS_MAX:
                self._counts[bucket_of(seconds)] += good
                self._seconds += good * seconds

    @contextmanager
    def operation(self) -> Generator[None]:
        """Time one operation and count it while it runs; an exception makes it a failed one."""
        began = time.perf_counter()
        with self._lock:
            self._in_flight += 1
        failed = True
        try:
            yield
            failed = False
        finally:
            with self._lock:
                self._in_flight -= 1
            self.observe(1, time.perf_counter() - began, errors=int(failed))

    def timed(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return the function, or coroutine function, with every call of it an operation.

        Raises InvalidRequest for a generator function: its call is over before its work begins.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidRequest(
                f"timed: wanted a function or a coroutine function, found the generator function "
                f"{function.__qualname__}; use operation() within it"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self.operation():
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.operation():
                return function(*args, **kwargs)

        return called

    # --- for the stream

    def take(self) -> Observed:
        """Return what was done since the last time, and begin anew."""
        with self._lock:
            found = Observed(
                self._operations,
                self._errors,
                tuple(self._counts),
                self._seconds,
                min(self._in_flight, IN_FLIGHT_MAX),
            )
            self._clear()
            return found

    def put_back(self, untold: Observed) -> None:
        """Count again what could not be told."""
        with self._lock:
            if self._operations + untold.operations > OPERATIONS_MAX:
                return
            self._operations += untold.operations
            self._errors += untold.errors
            pairs = zip(self._counts, untold.latency_counts, strict=True)
            self._counts = [mine + other for mine, other in pairs]
            self._seconds += untold.latency_sum_seconds

    def stand(self, standing: Standing) -> None:
        """Note how it stands with callers."""
        self._standing = standing

    def end(self, error: ClientError) -> None:
        """Note that it is not an endpoint any more."""
        self._ended = error

    def _clear(self) -> None:
        self._operations = self._errors = 0
        self._counts = [0] * BUCKETS
        self._seconds = 0.0

    def __repr__(self) -> str:
        at = f"{self.name} at {self.registration.address}"
        if self._ended is not None:
            return f"<Service {at}, ended: {self._ended}>"
        told = self._standing
        return f"<Service {at}, {f'{told.weight:.0%} of the calls' if told else 'not heard yet'}>"
