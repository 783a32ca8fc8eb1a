"""The services' door: the methods of `stoker.v1.Services`, and the loop that reviews them."""

import asyncio
import functools
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc

from stoker.aggregator.failures import CallFailure, Context, not_found
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.limits import ID_BYTES_MAX, Malformed, text
from stoker.aggregator.model import Allocation, AllocationState
from stoker.aggregator.routing import Share
from stoker.aggregator.rpc import received
from stoker.aggregator.services import (
    GONE_SECONDS,
    SIGN_SECONDS,
    SILENCE_SECONDS,
    Endpoint,
    EndpointLeft,
    EndpointRegistered,
    Reviewed,
    Services,
    ServicesPicture,
    SignGiven,
)
from stoker.aggregator.standings import Standing, stand
from stoker.aggregator.wire_services import (
    read_address,
    read_capacity,
    read_service,
    read_sign,
    service_message,
    standing_message,
)
from stoker.core.clock import Clock
from stoker.core.errors import shown
from stoker.v1 import services_pb2

# How often weights and standings are looked at.
REVIEW_SECONDS = 0.25
# A stream that says nothing at first is ended.
REGISTER_SECONDS = 10.0
# A long list is made in slices, so that making it does not hold up the loop.
SERVICES_PER_SLICE = 20


class _Line:
    """One replica's stream."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.ending: CallFailure | None = None
        self.told: Share | None = None

    def end(self, failure: CallFailure) -> None:
        """Let the stream end with this status."""
        self.ending = self.ending or failure
        self.wake.set()


class RoutingService:
    """The service; every method raises CallFailure, Malformed or nothing. `run` must be running."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._services = Services(clock.now())
        self._is_settled = False
        self._epoch = secrets.token_hex(8)
        self._lines: dict[str, _Line] = {}
        self._news: dict[str, asyncio.Event] = {}  # of services that somebody watches
        self._watchers: dict[str, int] = {}
        # The newest message of each service that is watched: all who watch get the same.
        self._messages: dict[str, services_pb2.WatchEndpointsResponse] = {}
        self._closing: CallFailure | None = None

    def methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Return the methods by their names on the wire."""
        return {
            "Serve": self.serve,
            "Route": self.route,
            "WatchEndpoints": self.watch_endpoints,
            "ListServices": self.list_services,
        }

    def picture(self) -> ServicesPicture:
        """Return what was done where, and every service: values for the thread of a scrape."""
        now, services = self._clock.now(), self._services
        views = tuple(services.view(name, now) for name in services.names())
        return ServicesPicture(services.totals(), views)

    async def run(self) -> None:
        """Review the services until cancelled."""
        while True:
            await self._clock.sleep(REVIEW_SECONDS)
            await self._review()

    def close(self, failure: CallFailure) -> None:
        """End every replica's stream with this status, and every one that comes."""
        self._closing = failure
        for line in self._lines.values():
            line.end(failure)
        for news in self._news.values():
            news.set()

    # --- the calls

    async def route(
        self, message: services_pb2.RouteRequest, context: Context
    ) -> services_pb2.RouteResponse:
        """Return the endpoints of a service as they are now."""
        name = read_service(message.service, "service")
        view = self._services.view(name, self._clock.now())
        return services_pb2.RouteResponse(service=service_message(view, self._epoch))

    async def list_services(
        self, message: services_pb2.ListServicesRequest, context: Context
    ) -> services_pb2.ListServicesResponse:
        """Return every service with its endpoints."""
        now = self._clock.now()
        answer = services_pb2.ListServicesResponse()
        for number, name in enumerate(self._services.names()):
            view = self._services.view(name, now)
            if view.endpoints:  # the first of a service shows with the next review
                answer.services.append(service_message(view, self._epoch))
            if number % SERVICES_PER_SLICE == 0:
                await asyncio.sleep(0)
        return answer

    async def watch_endpoints(
        self, message: services_pb2.WatchEndpointsRequest, context: Context
    ) -> None:
        """Stream the endpoints of a service: as they are, then whenever they have changed.

        A reader that is slow misses what was overtaken: every message is the whole set.
        """
        name = read_service(message.service, "service")
        self._watchers[name] = self._watchers.get(name, 0) + 1
        try:
            while self._closing is None:
                news = self._news.setdefault(name, asyncio.Event())
                await context.write(self._message(name))
                await news.wait()
            raise self._closing
        finally:
            self._watchers[name] -= 1
            if not self._watchers[name]:
                del self._watchers[name]
                self._news.pop(name, None)
                self._messages.pop(name, None)

    async def serve(self, context: Context) -> None:
        """Hold one replica's stream for as long as it lives."""
        if self._closing is not None:
            raise self._closing
        endpoint = await self._register(context)
        line = self._lines[endpoint.id] = _Line()
        if self._closing is not None:  # since it began
            line.end(self._closing)
        try:
            registered = services_pb2.EndpointRegistered(
                endpoint_id=endpoint.id,
                interval_seconds=SIGN_SECONDS,
                silence_seconds=SILENCE_SECONDS,
            )
            # Before anything can go wrong: gRPC cannot end a call whose first write was cancelled.
            await context.write(services_pb2.ServeResponse(registered=registered))
            await self._converse(endpoint, line, context)
        finally:
            del self._lines[endpoint.id]
            self._services.handle(EndpointLeft(self._clock.now(), endpoint.id))

    # --- a replica's stream

    async def _register(self, context: Context) -> Endpoint:
        try:
            async with asyncio.timeout(REGISTER_SECONDS):
                message = await received(context)
        except TimeoutError:
            sentence = f"nothing was registered within {REGISTER_SECONDS:g} s"
            raise _failure("DEADLINE_EXCEEDED", "SILENT", sentence) from None
        if not isinstance(message, services_pb2.ServeRequest) or not message.HasField("register"):
            raise Malformed("register", "must be the first message of a stream")
        endpoint = self._read(message.register)
        old = self._services.at_address(endpoint.service, endpoint.address)
        if old is not None:
            sentence = f"{endpoint.address} was registered for {endpoint.service} again"
            self._lines[old].end(_failure("ABORTED", "SUPERSEDED", sentence))
            self._services.handle(EndpointLeft(endpoint.registered_at, old))
        if why := self._services.no_room_for(endpoint.service):
            raise _failure("RESOURCE_EXHAUSTED", "TOO_MANY", why)
        self._services.handle(EndpointRegistered(endpoint.registered_at, endpoint))
        return endpoint

    def _read(self, message: services_pb2.RegisterEndpoint) -> Endpoint:
        service = read_service(message.service, "register.service")
        address, capacity = read_address(message.address), read_capacity(message)
        id_ = text(message.allocation_id, "register.allocation_id", ID_BYTES_MAX, required=True)
        allocation = self._fleet.allocations.get(id_)
        if allocation is None:
            raise not_found(f"allocation {shown(id_)}")
        _check(allocation, service)
        devices = [each for placement in allocation.placements for each in placement.devices]
        indexes = sorted({device.index for device in allocation.placements[0].devices})
        return Endpoint(
            id=secrets.token_hex(8),
            service=service,
            address=address,
            allocation_id=allocation.id,
            node=allocation.node,
            gpu_uuids=tuple(dict.fromkeys(device.uuid for device in devices)),
            gpu=",".join(str(index) for index in indexes),
            capacity=capacity,
            registered_at=self._clock.now(),
        )

    async def _converse(self, endpoint: Endpoint, line: _Line, context: Context) -> None:
        """Read and write until the replica ends the stream; raises what else ends it."""
        ended: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._write(endpoint, line, context))
                await self._listen(endpoint, context)
                writing.cancel()
        except* (CallFailure, Malformed) as several:
            ended = several.exceptions[0]
        if ended is not None:
            raise ended

    async def _listen(self, endpoint: Endpoint, context: Context) -> None:
        while (message := await received(context)) is not None:
            if not isinstance(message, services_pb2.ServeRequest) or not message.HasField("sign"):
                raise Malformed("message", "must be a sign of life after the registration")
            sign = read_sign(message.sign)
            self._services.handle(SignGiven(self._clock.now(), endpoint.id, sign))

    async def _write(self, endpoint: Endpoint, line: _Line, context: Context) -> None:
        while True:
            await line.wake.wait()
            line.wake.clear()
            if line.ending is not None:
                raise line.ending
            share = self._services.share(endpoint.id)
            if share is not None and share != line.told:
                line.told = share
                await context.write(standing_message(share))

    # --- reviewing

    async def _review(self) -> None:
        now = self._clock.now()
        is_settled = self._services.is_settled(now)
        for name in self._services.due(now):
            # Others have had the loop in between.
            self._take(self._review_one(name, self._clock.now(), is_settled=is_settled))
            await asyncio.sleep(0)
        if is_settled != self._is_settled:
            self._is_settled = is_settled
            # Whoever watches what nobody serves waits for this, too.
            self._tell(list(self._watchers))

    def _review_one(self, name: str, now: float, *, is_settled: bool) -> Reviewed:
        # A gang has many GPUs, and may have as many endpoints.
        @functools.cache
        def standing_of(allocation_id: str) -> Standing:
            return stand(self._fleet, allocation_id, now, is_settled=is_settled)

        return self._services.review((name,), now, standing_of)

    def _take(self, found: Reviewed) -> None:
        """Do what follows from a review."""
        for id_, why in found.over:
            self._lines[id_].end(_failure("FAILED_PRECONDITION", "NOT_GRANTED", why))
        for id_ in found.silent:
            sentence = f"no sign of life for {GONE_SECONDS:g} s"
            self._lines[id_].end(_failure("DEADLINE_EXCEEDED", "SILENT", sentence))
        self._tell(found.changed)
        for service in found.changed:
            for id_ in self._services.endpoint_ids(service):
                self._lines[id_].wake.set()

    def _tell(self, services: Iterable[str]) -> None:
        """Have those that watch these services told anew."""
        for service in services:
            self._messages.pop(service, None)
            if service in self._news:
                self._news.pop(service).set()

    def _message(self, service: str) -> services_pb2.WatchEndpointsResponse:
        known = self._messages.get(service)
        if known is None:
            view = self._services.view(service, self._clock.now())
            whole = service_message(view, self._epoch)
            known = services_pb2.WatchEndpointsResponse(service=whole)
            self._messages[service] = known
        return known


def _check(allocation: Allocation, service: str) -> None:
    if allocation.state is not AllocationState.GRANTED:
        why = f": {allocation.reason}" if allocation.reason else ""
        sentence = f"allocation {allocation.id} is {allocation.state}{why}"
        raise _failure("FAILED_PRECONDITION", "NOT_GRANTED", sentence)
    meant = allocation.request.service
    if meant is not None and meant != service:
        found = f"allocation {allocation.id} is of service {meant}, found {shown(service)}"
        raise Malformed("register.service", found)


def _failure(status: str, reason: str, sentence: str) -> CallFailure:
    return CallFailure(grpc.StatusCode[status], reason, sentence)
