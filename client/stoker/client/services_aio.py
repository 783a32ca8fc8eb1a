"""Serving and routing in an event loop: the streams of replicas and of their callers."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

import grpc

from stoker.client import wire_services
from stoker.client.channel import WATCH_SECONDS_MAX
from stoker.client.errors import ClientError, InvalidRequest, Unreachable
from stoker.client.retrying import is_retried, pause_seconds
from stoker.client.routing import IsFailure, Picker, is_failure
from stoker.client.services import SIGN_SECONDS, Endpoint, Registration, Service
from stoker.core.clock import Clock

# What the last sign of life and the goodbye have when a context ends.
_LEAVE_SECONDS = 1.0

_log = logging.getLogger(__name__)


@asynccontextmanager
async def serving(
    stub: Any,
    registration: Registration,
    address: str,
    *,
    patience: float,
    clock: Clock,
    rng: random.Random,
) -> AsyncGenerator[Service]:
    """Be an endpoint while the context lasts, across restarts of the aggregator at `address`.

    Raises what keeps it from being registered at all: Unreachable after `patience` seconds.
    """
    service = Service(registration)
    line = _Line(stub, service, address, clock, rng)
    running = asyncio.create_task(line.run())
    try:
        await line.registered(patience)
        yield service
    finally:
        line.leaving.set()
        try:
            await asyncio.wait({running}, timeout=_LEAVE_SECONDS)
        finally:
            await _end(running)


class _Line:
    """A replica's stream, begun anew for as long as its context lasts."""

    def __init__(
        self, stub: Any, service: Service, address: str, clock: Clock, rng: random.Random
    ) -> None:
        self._stub = stub
        self._service = service
        self._address = address
        self._clock = clock
        self._rng = rng
        self._call = wire_services.serve(service.registration)
        self._heard = asyncio.Event()  # it is registered, or never will be
        self._is_heard = False  # on the stream of now
        self._trouble: ClientError | None = None
        self.leaving = asyncio.Event()

    async def registered(self, patience: float) -> None:
        """Return once the aggregator knows of it; raises ClientError."""
        waiting = asyncio.create_task(self._heard.wait())
        sleeping = asyncio.create_task(self._clock.sleep(patience))
        try:
            await asyncio.wait({waiting, sleeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (waiting, sleeping):
                task.cancel()
        if self._service.ended is not None:
            raise self._service.ended
        if not self._heard.is_set():
            raise self._trouble or Unreachable(
                f"aggregator at {self._address} did not answer in time"
            )

    async def run(self) -> None:
        """Serve until told to leave, or until it is refused for good."""
        failures = 0
        while not self.leaving.is_set():
            was_heard = self._heard.is_set()
            self._is_heard = False
            try:
                await self._once()
                lost: grpc.RpcError | None = None
            except grpc.RpcError as error:
                lost = error
            except (grpc.aio.UsageError, asyncio.CancelledError):
                if _is_cancelled():
                    raise
                self._end(wire_services.closed(self._address), was_heard=was_heard)
                return
            if self.leaving.is_set():
                return
            failures = 1 if self._is_heard else failures + 1
            failed, self._trouble = wire_services.why_lost(lost, self._call, self._address)
            if not is_retried(self._call.method, failed.status, failed.reason, has_key=False):
                self._end(self._trouble, was_heard=was_heard)
                return
            if failures == 1 and was_heard:
                _log.warning("%r is not heard, trying again: %s", self._service, self._trouble)
            await self._pause(pause_seconds(failures, self._rng))

    def _end(self, error: ClientError, *, was_heard: bool) -> None:
        self._service.end(error)
        self._heard.set()
        if was_heard:
            _log.warning("%r is over", self._service)

    async def _once(self) -> None:
        rpc = self._stub.Serve()
        reading = asyncio.create_task(self._read(rpc))
        try:
            if await self._say(rpc, self._call.message):
                await self._converse(rpc, reading)
            await reading
        finally:
            rpc.cancel()
            reading.cancel()
            with suppress(asyncio.CancelledError, grpc.RpcError):
                await reading

    async def _converse(self, rpc: Any, reading: "asyncio.Task[None]") -> None:
        while not reading.done():
            leaving = self.leaving.is_set()
            observed = self._service.take()
            if not await self._say(rpc, wire_services.sign(observed)):
                self._service.put_back(observed)
                return
            if leaving:
                await rpc.done_writing()
                return
            await self._pause(SIGN_SECONDS, reading)

    async def _say(self, rpc: Any, message: Any) -> bool:
        """Send a message; whether the stream was there to take it. Why not, its reader learns."""
        try:
            await rpc.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError):
            return False
        return True

    async def _read(self, rpc: Any) -> None:
        async for answer in rpc:
            self._is_heard = True
            self._heard.set()
            standing = self._call.read(answer)
            if standing is not None:
                self._service.stand(standing)

    async def _pause(self, seconds: float, *others: "asyncio.Task[None]") -> None:
        """Wait so long, or until it is told to leave, or one of the others is done."""
        waits = [
            asyncio.create_task(self._clock.sleep(seconds)),
            asyncio.create_task(self.leaving.wait()),
        ]
        try:
            await asyncio.wait({*waits, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()


class AsyncRouter:
    """The endpoints of a service, followed as they change; says which the next call goes to.

    `pick`, `done` and the properties are quick and may be called from the loop's thread only.
    """

    def __init__(
        self,
        stub: Any,
        service: str,
        address: str,
        *,
        patience: float,
        rng: random.Random,
        closed: Callable[["AsyncRouter"], object],
    ) -> None:
        """Begin to follow them, in a running event loop; `closed` is told when that is over."""
        self._stub = stub
        self._call = wire_services.watch_endpoints(service)
        self._address = address
        self._patience = patience
        self._rng = rng
        self._closed = closed
        self._picker = Picker(service, rng)
        self._heard = asyncio.Event()
        self._following = asyncio.create_task(self._follow(), name=f"endpoints of {service}")

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Follow them no longer."""
        try:
            await _end(self._following)
        finally:
            self._closed(self)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints by which calls are dealt out now."""
        return self._picker.endpoints

    @property
    def trouble(self) -> ClientError | None:
        """Why the endpoints are not the newest: the aggregator is away. None: they are."""
        return self._picker.trouble

    async def ready(self) -> None:
        """Return once the aggregator has told of the service; raises what is in the way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._heard.wait()
        if not self._picker.has_heard:
            raise self._picker.trouble or Unreachable(
                f"aggregator at {self._address} did not answer in time"
            )

    def pick(self) -> Endpoint:
        """Return where the next call goes; give it back with `done`. Raises NoEndpoint."""
        return self._picker.pick(time.monotonic())

    def done(self, endpoint: Endpoint, *, ok: bool | None = True) -> None:
        """The call has ended: well, or so that the endpoint seems to be in trouble.

        None: not known. An endpoint in trouble is left out for a moment.
        """
        self._picker.done(endpoint, time.monotonic(), ok=ok)

    @asynccontextmanager
    async def call(self, failed: IsFailure = is_failure) -> AsyncGenerator[Endpoint]:
        """Pick an endpoint for the call that the context makes.

        An exception for which `failed` says so leaves the endpoint out for a moment; without it,
        every one but a gRPC status by which the replica has answered, or a call that was cancelled.
        """
        if not self._picker.has_heard:
            await self.ready()
        endpoint = self.pick()
        ok: bool | None = None
        try:
            yield endpoint
            ok = True
        except Exception as error:
            has_failed = failed(error)
            ok = None if has_failed is None else not has_failed
            raise
        finally:
            self.done(endpoint, ok=ok)

    async def _follow(self) -> None:
        failures = 0
        while True:
            try:
                rpc = self._stub.WatchEndpoints(self._call.message, timeout=WATCH_SECONDS_MAX)
                try:
                    async for message in rpc:
                        failures = 0
                        self._picker.update(self._call.read(message))
                        self._heard.set()
                finally:
                    rpc.cancel()
                lost: grpc.RpcError | None = None
            except grpc.RpcError as error:
                lost = error
            except (grpc.aio.UsageError, asyncio.CancelledError):
                if _is_cancelled():
                    raise
                self._picker.lose(wire_services.closed(self._address))
                self._heard.set()
                return
            failures += 1
            failed, trouble = wire_services.why_lost(lost, self._call, self._address)
            if failed.status != "DEADLINE_EXCEEDED":  # which ends a stream that is well
                self._picker.lose(trouble)
            if isinstance(trouble, InvalidRequest):
                self._heard.set()
                return
            await asyncio.sleep(pause_seconds(failures, self._rng))


def _is_cancelled() -> bool:
    """Whether this task is to end; else gRPC cancelled a call because its channel was closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel the task; raises what it failed with before."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
