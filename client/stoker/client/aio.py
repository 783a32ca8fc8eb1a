"""The async client: typed calls over grpc.aio, and contexts that keep their allocations alive."""

import contextlib
import logging
import math
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from stoker.client import wire, wire_mig, wire_moves, wire_services
from stoker.client.channel import (
    LEAVE_SECONDS_MAX,
    RELEASE_WAIT_SECONDS,
    TIMEOUT_SECONDS,
    WATCH_SECONDS_MAX,
    channel_options,
)
from stoker.client.environment import (
    ContextVariables,
    default_holder,
    process_layers,
    resolve_address,
)
from stoker.client.errors import ClientError
from stoker.client.keepalive import still_granted
from stoker.client.lease import RELEASED, EndedCallback, Lease, granted, on_this_host, settle
from stoker.client.leaving import LeaveCallback
from stoker.client.model import (
    Allocation,
    Allocations,
    AllocationState,
    Change,
    Explanation,
    FleetHealth,
    KeptAlive,
    MovePlan,
    Node,
    Nodes,
    Request,
    WhatIf,
)
from stoker.client.moving_aio import AsyncMoveCallback, Keeper
from stoker.client.requesting import (
    KEPT_TTL_SECONDS,
    PLAIN_TTL_SECONDS,
    Wish,
    as_seconds,
    build_request,
)
from stoker.client.retrying import OF_SERVICES, Method, Seen, Tries
from stoker.client.services import Service, ServiceEndpoints, registration
from stoker.client.services_aio import AsyncRouter, serving
from stoker.core.clock import Clock, SystemClock
from stoker.core.mig.reports import MigAsk, MigReport

T = TypeVar("T")

_log = logging.getLogger(__name__)


def connect_async(
    address: str | None = None,
    *,
    timeout: float = TIMEOUT_SECONDS,
    patience: float | None = None,
) -> "AsyncFleet":
    """Return a client of the aggregator at `address`, $STOKER_ADDRESS or 127.0.0.1:7070.

    `timeout`: seconds in which a call must be answered, beyond what it waits on purpose.
    `patience`: seconds for which an aggregator that cannot be reached is tried again; as long as
    the timeout when left out. It connects with the first call. Raises InvalidRequest for a
    malformed address.
    """
    return AsyncFleet(resolve_address(address), timeout=timeout, patience=patience)


class AsyncFleet:
    """The fleet behind one aggregator, for `async with` in one event loop.

    Every method raises a branch of ClientError: Unreachable without an answer in time,
    InvalidRequest, NotFound, and what it names itself.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = TIMEOUT_SECONDS,
        patience: float | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._patience = timeout if patience is None else patience
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._stub = wire.async_stub(self._channel)
        self._services = wire_services.async_stub(self._channel)
        self._routers: set[AsyncRouter] = set()
        self._allocating = wire.async_allocating(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up. What was allocated outside a context lives on until its TTL."""
        for router in tuple(self._routers):
            await router.close()
        await self._channel.close()

    # --- allocations

    async def request(
        self,
        *,
        wait: str | float = 0.0,
        idempotency_key: str | None = None,
        on_waiting: Callable[[str], None] | None = None,
        **wish: Unpack[Wish],
    ) -> Allocation:
        """Return what was wished for, granted; raises Refused when it cannot be placed.

        `wait`, a duration, is how long to wait in the queue; `on_waiting` is told the id under
        which it waits, again after an outage. A lost call is sent again under its key, so it
        never allocates twice. The allocation lives for its TTL, an hour when left out, unless it
        is kept alive.
        """
        asked = build_request(wish, holder=default_holder(), ttl_seconds=PLAIN_TTL_SECONDS)
        return await self.submit(
            asked, wait=wait, idempotency_key=idempotency_key, on_waiting=on_waiting
        )

    async def submit(
        self,
        request: Request,
        *,
        wait: str | float = 0.0,
        idempotency_key: str | None = None,
        on_waiting: Callable[[str], None] | None = None,
    ) -> Allocation:
        """Do what `request` does, for a request that is built already."""
        wait_seconds = as_seconds(wait, "wait")
        key = uuid.uuid4().hex if idempotency_key is None else idempotency_key
        tries = self._tries(self._timeout + wait_seconds)
        known_id: str | None = None

        async def heard(found: str) -> None:
            nonlocal known_id
            known_id = found
            tries.heard(self._clock.monotonic())
            if on_waiting is not None and await self._is_waiting(found):
                on_waiting(found)

        try:
            while True:
                left = tries.remaining_seconds(self._clock.monotonic()) - self._timeout
                call = wire.allocate(request, key, min(wait_seconds, max(0.0, left)))
                try:
                    return granted(await self._allocate_once(call, tries, heard))
                except grpc.RpcError as error:
                    await self._pause_or_raise(error, call, tries)
        except ClientError:
            raise
        except BaseException:  # cancelled, or the caller's `on_waiting` failed
            if known_id is not None:
                await self._give_up(known_id)
            raise

    async def _allocate_once(
        self,
        call: wire.Call[Allocation],
        tries: Tries,
        heard: Callable[[str], Awaitable[None]],
    ) -> Allocation:
        rpc = self._allocating(
            call.message, timeout=tries.remaining_seconds(self._clock.monotonic())
        )
        try:
            known_id = wire.allocation_id(await rpc.initial_metadata())
            if known_id is not None:
                await heard(known_id)
            return call.read([each async for each in rpc])
        finally:
            rpc.cancel()  # after an answer there is nothing to cancel

    async def _is_waiting(self, allocation_id: str) -> bool:
        """Whether it waits; the id of what is granted at once comes in the same way."""
        try:
            found = await self.explain(allocation_id)
        except ClientError:  # what keeps us from asking, the call that waits meets as well
            return False
        return found.allocation is not None and found.allocation.state is AllocationState.WAITING

    async def _give_up(self, known_id: str) -> None:
        """Leave the queue, or give back what was granted; else the aggregator sees us gone."""
        call = wire.release(known_id, "its client gave up", 0.0)
        with contextlib.suppress(ClientError):
            await self._answer(call, timeout=LEAVE_SECONDS_MAX)

    @contextlib.asynccontextmanager
    async def allocate(
        self,
        *,
        wait: str | float = 0.0,
        set_environment: bool = True,
        on_ended: EndedCallback | None = None,
        on_waiting: Callable[[str], None] | None = None,
        on_move: AsyncMoveCallback | None = None,
        on_leave: LeaveCallback | None = None,
        **wish: Unpack[Wish],
    ) -> AsyncGenerator[Lease]:
        """Hold what was wished for while the context lasts: kept alive, and given back at its end.

        Unless `set_environment` is false, the variables by which CUDA sees exactly these GPUs are
        set in this process while the context lasts, for its children; what is asked for is then
        restricted to this host. The TTL is a minute when left out: a process that dies loses its
        allocation after it. When the allocation ends underneath, `on_ended` is called, `ended` of
        the lease is set, and the end of the context raises AllocationEnded.

        With `on_move` the fleet may ask to move it elsewhere: `on_move(offer, None)` says whether,
        `on_move(offer, new)` is called once the new allocation is granted, carries the work over,
        and says whether it is there; until then both are held. Then `allocation` of the lease and
        the variables are those of the new one, and the old one is given back. False, or a failure,
        leaves everything as it was. It may be awaited; at the end of the context it is cancelled.

        `on_leave(reason, leave_by, is_evicting)` is called when its GPU is to be partitioned anew:
        the work should be saved and the context left by then (Unix seconds); with `is_evicting`
        the allocation is ended then. Without it, the log says so. It is called by the keep-alive
        and should return soon. `leave` of the lease tells the same.
        """
        asked = build_request(wish, holder=default_holder(), ttl_seconds=KEPT_TTL_SECONDS)
        if on_move is not None:
            asked = replace(asked, movable=True)
        if set_environment:
            asked = on_this_host(asked)
        lease = Lease(
            await self.submit(asked, wait=wait, on_waiting=on_waiting), on_ended, on_leave
        )
        variables = ContextVariables(process_layers, lease.env if set_environment else {})
        moved = variables.replace if set_environment else _leave_variables
        keeper = Keeper(self, lease, self._clock, on_move, moved)
        keeper.start()
        failed: BaseException | None = None
        try:
            yield lease
        except BaseException as error:
            failed = error
            raise
        finally:
            try:
                await keeper.settle()
            finally:
                variables.end()
                await keeper.stop()
            settle(lease, failed, await self._give_back(lease))

    async def _give_back(self, lease: Lease) -> ClientError | None:
        """Release what a context held; returns the error that kept it from that, for its end."""
        if lease.ended is not None:
            return None
        try:
            lease.released(await self.release(lease.id, reason=RELEASED))
        except ClientError as error:
            return error
        return None

    async def keep_alive(self, allocation_id: str) -> KeptAlive:
        """Extend an allocation by its TTL from now; raises AllocationEnded when it is over."""
        return still_granted(await self._answer(wire.keep_alive(allocation_id)))

    async def release(
        self,
        allocation_id: str,
        *,
        reason: str = RELEASED,
        wait: str | float = RELEASE_WAIT_SECONDS,
    ) -> Allocation:
        """Give an allocation back, or leave the queue; once more is as good as once.

        Waits, `wait` at most, until its node has let go: its state is then ended, else releasing.
        """
        return await self._answer(wire.release(allocation_id, reason, as_seconds(wait, "wait")))

    async def explain(self, allocation_id: str, *, what_if: Sequence[WhatIf] = ()) -> Explanation:
        """Return why a waiting allocation waits, if the fleet were as `what_if` supposes."""
        return await self._answer(wire.explain(allocation_id, what_if))

    async def explain_request(
        self, *, what_if: Sequence[WhatIf] = (), **wish: Unpack[Wish]
    ) -> Explanation:
        """Return what would come of a wish now, if the fleet were so; allocates nothing."""
        asked = build_request(wish, holder=default_holder(), ttl_seconds=PLAIN_TTL_SECONDS)
        return await self._answer(wire.explain(asked, what_if))

    async def answer_move(self, offer_id: str, *, accept: bool) -> Allocation | None:
        """Answer an offer to move; returns the new allocation, granted, or None when declined.

        The old one stays until it is released. Raises Refused when the place is gone by now, and
        NotFound when the offer has expired. `allocate` does all of this with `on_move`.
        """
        return await self._answer(wire_moves.answer_move(offer_id, accept=accept))

    async def rebalance(
        self,
        *,
        moves: int = 10,
        pool: str | None = None,
        apply: bool = False,
        answer: str | float | None = None,
    ) -> MovePlan:
        """Return at most so many moves that are worth their cost; with `apply` ask their holders.

        Holders have `answer`, a duration, to agree; a minute when left out.
        """
        answer_seconds = None if answer is None else as_seconds(answer, "answer")
        return await self._answer(wire_moves.rebalance(moves, pool, answer_seconds, apply=apply))

    # --- the fleet

    async def nodes(self) -> Nodes:
        """Return every node with its GPUs and their newest samples."""
        return await self._answer(wire.list_nodes())

    async def allocations(self, *, include_ended: bool = False) -> Allocations:
        """Return the allocations, on request also those that ended and are still remembered."""
        return await self._answer(wire.list_allocations(include_ended=include_ended))

    async def health(self, *, include_healthy: bool = False) -> FleetHealth:
        """Return the GPUs that are not well or cordoned, worst first, and what was noticed.

        On request also those with which nothing is wrong.
        """
        return await self._answer(wire.list_health(include_healthy=include_healthy))

    async def cordon(self, node: str, reason: str, gpu_uuid: str | None = None) -> Node:
        """Let nothing new go to the node, or to one GPU of it; what it holds stays.

        Refusals show the reason.
        """
        return await self._answer(wire.cordon(node, reason, gpu_uuid))

    async def uncordon(self, node: str, gpu_uuid: str | None = None) -> Node:
        """Let allocations go to the node again, or to one GPU of it. Ends a drain too.

        The cordon of a node and those of its GPUs are apart: each is ended by itself.
        """
        return await self._answer(wire.uncordon(node, gpu_uuid))

    async def drain(
        self,
        node: str,
        reason: str,
        gpu_uuid: str | None = None,
        grace_seconds: float | None = None,
    ) -> Node:
        """Cordon the node, or one GPU of it, and end what is still held after a grace.

        Without a grace it is waited for as long as it takes. Returns at once, with the node as it
        is then; the drain is over when its GPUs have no allocations any more.
        """
        grace = None if grace_seconds is None else as_seconds(grace_seconds, "grace_seconds")
        return await self._answer(wire.drain(node, reason, gpu_uuid, grace))

    async def mig(self, node: str, ask: MigAsk) -> MigReport:
        """Plan, apply, undo or tell a node's partitions (MIG), through its agent.

        Returns once the operation is written down there, not when it is done: `status` tells that.
        Sent again under the same operation id it changes nothing more; one is made up when there is
        none. Raises MigRefused with the agent's reason, and Unreachable for a node that is away.
        """
        return await self._answer(wire_mig.mig(node, ask))

    async def watch(self, resource_version: int = 0) -> AsyncGenerator[Change]:
        """Yield every durable change after `resource_version`, in order, for as long as it is read.

        0 begins with every object as it is now. After an outage it goes on where it was. Raises
        VersionTooOld when that is no longer kept: list, and watch from the version of the list.
        """
        seen = Seen(resource_version)
        tries = self._tries(math.inf)
        while True:
            call = wire.watch(seen.resume_from)
            rpc = self._stub.Watch(call.message, timeout=WATCH_SECONDS_MAX)
            try:
                async for message in rpc:
                    tries.heard(self._clock.monotonic())
                    change = call.read(message)
                    seen.note(change)
                    yield change
                lost: grpc.RpcError | None = None
            except grpc.RpcError as error:
                lost = error
            finally:
                rpc.cancel()
            await self._pause_or_raise(lost, call, tries)

    # --- services

    def serve(
        self,
        service: str,
        lease: Lease | Allocation | str,
        *,
        address: str,
        capacity: int | None = None,
    ) -> contextlib.AbstractAsyncContextManager[Service]:
        """Be an endpoint of `service` at `address` (HOST:PORT) while the context lasts.

        `lease`, or an allocation or its id, is what the replica runs in; `capacity` is how many
        calls it can work on at a time. What its operations take is told by `observe` or
        `operation` of the Service. It is registered anew after an outage of the aggregator; when
        the allocation has ended it is over, and `ended` of the Service says so.
        """
        return serving(
            self._services,
            registration(service, lease, address, capacity),
            self.address,
            patience=self._patience,
            clock=self._clock,
            rng=self._rng,
        )

    def router(self, service: str) -> AsyncRouter:
        """Return who says which endpoint of `service` the next call goes to, until closed."""
        router = AsyncRouter(
            self._services,
            service,
            self.address,
            patience=self._patience,
            rng=self._rng,
            closed=self._routers.discard,
        )
        self._routers.add(router)
        return router

    async def services(self) -> tuple[ServiceEndpoints, ...]:
        """Return every service with its endpoints, their weights and why."""
        return await self._answer(wire_services.list_services())

    async def route(self, service: str) -> ServiceEndpoints:
        """Return the endpoints of one service as they are now."""
        return await self._answer(wire_services.route(service))

    # --- calls

    async def _answer(self, call: wire.Call[T], timeout: float | None = None) -> T:
        tries = self._tries((self._timeout if timeout is None else timeout) + call.wait_seconds)
        stub: Any = self._services if call.method in OF_SERVICES else self._stub
        method: Callable[..., Any] = getattr(stub, call.method)
        while True:
            seconds = tries.remaining_seconds(self._clock.monotonic())
            try:
                rpc = method(call.message, timeout=seconds)
                answer = (
                    [each async for each in rpc] if call.method is Method.KEEP_ALIVE else await rpc
                )
                return call.read(answer)
            except grpc.RpcError as error:
                await self._pause_or_raise(error, call, tries)

    def _tries(self, seconds: float) -> Tries:
        now = self._clock.monotonic()
        return Tries(now, now + seconds, self._patience, self._rng)

    async def _pause_or_raise(
        self, lost: grpc.RpcError | None, call: wire.Call[Any], tries: Tries
    ) -> None:
        now = self._clock.monotonic()
        await self._clock.sleep(wire.pause_or_raise(lost, call, tries, now, self.address))


def _leave_variables(_variables: Mapping[str, str]) -> None:
    """Set no variables, as was asked for."""
