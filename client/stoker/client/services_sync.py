"""Serving and routing without an event loop: the streams of replicas and of their callers."""

import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from stoker.client import wire_services
from stoker.client.channel import WATCH_SECONDS_MAX
from stoker.client.errors import ClientError, InvalidRequest, Unreachable
from stoker.client.retrying import is_retried, pause_seconds
from stoker.client.routing import IsFailure, Picker, is_failure
from stoker.client.services import SIGN_SECONDS, Endpoint, Registration, Service

# What the last sign of life and the goodbye have when a context ends.
_LEAVE_SECONDS = 1.0

_log = logging.getLogger(__name__)


@contextmanager
def serving(
    stub: Any, registration: Registration, address: str, *, patience: float, rng: random.Random
) -> Generator[Service]:
    """Be an endpoint while the context lasts, across restarts of the aggregator at `address`.

    Raises what keeps it from being registered at all: Unreachable after `patience` seconds.
    """
    service = Service(registration)
    line = _Line(stub, service, address, rng)
    thread = threading.Thread(target=line.run, name=f"stoker {service.name}", daemon=True)
    thread.start()
    try:
        line.registered(patience)
        yield service
    finally:
        line.leave()
        thread.join(_LEAVE_SECONDS)
        line.cut_off()
        thread.join()


class _Line:
    """A replica's stream, begun anew for as long as its context lasts."""

    def __init__(self, stub: Any, service: Service, address: str, rng: random.Random) -> None:
        self._stub = stub
        self._service = service
        self._address = address
        self._rng = rng
        self._call = wire_services.serve(service.registration)
        self._heard = threading.Event()  # it is registered, or never will be
        self._is_heard = False  # on the stream of now
        self._trouble: ClientError | None = None
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._rpc: Any = None
        self._quiet = threading.Event()  # the stream of now takes nothing more

    def registered(self, patience: float) -> None:
        """Return once the aggregator knows of it; raises ClientError."""
        was_heard = self._heard.wait(patience)
        if self._service.ended is not None:
            raise self._service.ended
        if not was_heard:
            raise self._trouble or Unreachable(
                f"aggregator at {self._address} did not answer in time"
            )

    def leave(self) -> None:
        """Have `run` return soon, the last sign of life sent."""
        with self._lock:
            self._leaving.set()
            self._quiet.set()

    def cut_off(self) -> None:
        """Have `run` return at once."""
        if self._rpc is not None:
            self._rpc.cancel()

    def run(self) -> None:
        """Serve until told to leave, or until it is refused for good."""
        failures = 0
        while not self._leaving.is_set():
            was_heard = self._heard.is_set()
            self._is_heard = False
            try:
                self._once()
                lost: grpc.RpcError | None = None
            except grpc.RpcError as error:
                lost = error
            except Unreachable as closed:
                self._end(closed, was_heard=was_heard)
                return
            if self._leaving.is_set():
                return
            failures = 1 if self._is_heard else failures + 1
            failed, self._trouble = wire_services.why_lost(lost, self._call, self._address)
            if not is_retried(self._call.method, failed.status, failed.reason, has_key=False):
                self._end(self._trouble, was_heard=was_heard)
                return
            if failures == 1 and was_heard:
                _log.warning("%r is not heard, trying again: %s", self._service, self._trouble)
            self._leaving.wait(pause_seconds(failures, self._rng))

    def _end(self, error: ClientError, *, was_heard: bool) -> None:
        self._service.end(error)
        self._heard.set()
        if was_heard:
            _log.warning("%r is over", self._service)

    def _once(self) -> None:
        """Serve until the stream ends; raises Unreachable when the client was closed."""
        quiet = threading.Event()
        with self._lock:
            if self._leaving.is_set():
                return
            self._quiet = quiet
            try:
                rpc = self._rpc = self._stub.Serve(self._messages(quiet))
            except ValueError as error:  # gRPC's, of a channel that is closed
                raise wire_services.closed(self._address) from error
        try:
            for answer in rpc:
                self._is_heard = True
                self._heard.set()
                standing = self._call.read(answer)
                if standing is not None:
                    self._service.stand(standing)
        finally:
            quiet.set()
            rpc.cancel()

    def _messages(self, quiet: threading.Event) -> Iterator[Any]:
        """Yield what one stream says; gRPC takes it in a thread of its own."""
        yield self._call.message
        while not quiet.wait(SIGN_SECONDS):
            yield wire_services.sign(self._service.take())
        if self._leaving.is_set():
            yield wire_services.sign(self._service.take())


class Router:
    """The endpoints of a service, followed as they change; says which the next call goes to.

    Any thread may use it.
    """

    def __init__(
        self,
        stub: Any,
        service: str,
        address: str,
        *,
        patience: float,
        rng: random.Random,
        closed: Callable[["Router"], object],
    ) -> None:
        """Begin to follow them; `closed` is told when that is over."""
        self._stub = stub
        self._call = wire_services.watch_endpoints(service)
        self._address = address
        self._patience = patience
        self._rng = rng
        self._closed = closed
        self._picker = Picker(service, rng)
        self._heard = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._rpc: Any = None
        name = f"stoker endpoints of {service}"
        self._following = threading.Thread(target=self._follow, name=name, daemon=True)
        self._following.start()

    def __enter__(self) -> Self:
        self.ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Follow them no longer."""
        with self._lock:
            self._closing.set()
            if self._rpc is not None:
                self._rpc.cancel()
        self._following.join()
        self._closed(self)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints by which calls are dealt out now."""
        return self._picker.endpoints

    @property
    def trouble(self) -> ClientError | None:
        """Why the endpoints are not the newest: the aggregator is away. None: they are."""
        return self._picker.trouble

    def ready(self) -> None:
        """Return once the aggregator has told of the service; raises what is in the way."""
        self._heard.wait(self._patience)
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

    @contextmanager
    def call(self, failed: IsFailure = is_failure) -> Generator[Endpoint]:
        """Pick an endpoint for the call that the context makes.

        An exception for which `failed` says so leaves the endpoint out for a moment; without it,
        every one but a gRPC status by which the replica has answered, or a call that was cancelled.
        """
        if not self._picker.has_heard:
            self.ready()
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

    def _follow(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                for message in self._begin():
                    failures = 0
                    self._picker.update(self._call.read(message))
                    self._heard.set()
                lost: grpc.RpcError | None = None
            except grpc.RpcError as error:
                lost = error
            except Unreachable as closed:
                self._picker.lose(closed)
                self._heard.set()
                return
            if self._closing.is_set():
                return
            failures += 1
            failed, trouble = wire_services.why_lost(lost, self._call, self._address)
            if failed.status != "DEADLINE_EXCEEDED":  # which ends a stream that is well
                self._picker.lose(trouble)
            if isinstance(trouble, InvalidRequest):
                self._heard.set()
                return
            self._closing.wait(pause_seconds(failures, self._rng))

    def _begin(self) -> Any:
        """Return a new stream; raises Unreachable when the client was closed."""
        with self._lock:
            if self._closing.is_set():
                return iter(())
            try:
                self._rpc = self._stub.WatchEndpoints(self._call.message, timeout=WATCH_SECONDS_MAX)
            except ValueError as error:  # gRPC's, of a channel that is closed
                raise wire_services.closed(self._address) from error
            return self._rpc
