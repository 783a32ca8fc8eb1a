"""The clients' door: the methods of the service `stoker.v1.Fleet`."""

import asyncio
import difflib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from itertools import chain
from typing import Any, Protocol, assert_never

import grpc

from stoker.aggregator import events as e
from stoker.aggregator import limits
from stoker.aggregator.answers import (
    NodeRow,
    allocation_row,
    allocation_rows,
    change_message,
    node_row,
)
from stoker.aggregator.api_explain import Explainer
from stoker.aggregator.api_mig import MigService, Relay
from stoker.aggregator.api_rebalance import RebalanceService
from stoker.aggregator.api_upkeep import UpkeepService
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import consider
from stoker.aggregator.failures import (
    CallFailure,
    Context,
    cannot_place,
    key_reused,
    not_found,
    not_granted,
    store_unavailable,
    version_too_old,
)
from stoker.aggregator.findings import Findings
from stoker.aggregator.leaving import leave_of
from stoker.aggregator.ledger import Ledger, WatchTooOld, WatchTooSlow
from stoker.aggregator.limits import Malformed
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import Allocation, AllocationState, Plan, Refusals, Request
from stoker.aggregator.moves import RebalanceOptions
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.rpc import received
from stoker.aggregator.wire_allocations import ALLOCATION_STATES
from stoker.aggregator.wire_mig import leave_message
from stoker.aggregator.wire_requests import read_id, read_request
from stoker.aggregator.wishes import (
    Allocate,
    KeyReused,
    Queued,
    Refused,
    Release,
    Reply,
    Settled,
    Unknown,
    Wish,
)
from stoker.core.clock import Clock
from stoker.core.errors import StoreError, shown
from stoker.core.gpu_models import MODELS
from stoker.core.model_names import names_match
from stoker.v1 import fleet_pb2, placing_pb2, types_pb2

ALLOCATION_ID_KEY = "stoker-allocation-id"  # of the initial metadata of Allocate
# A long list is made in slices, so that making it does not hold up the loop.
NODES_PER_SLICE = 50
ALLOCATIONS_PER_SLICE = 250


class Wishes(Protocol):
    """The control loop, as clients' calls see it."""

    async def wish(self, wish: Wish) -> Reply:
        """Return the reply once it is durable; raises StoreError."""
        ...

    async def settled(self, allocation_id: str) -> None:
        """Return once no commit is under way that ends this allocation's lease."""
        ...


class FleetService:
    """The service; every method raises CallFailure, Malformed or nothing."""

    def __init__(
        self,
        ledger: Ledger,
        wishes: Wishes,
        meters: Meters,
        clock: Clock,
        version: str,
        policy: CordonPolicy | None = None,
        findings: Findings | None = None,
        rebalance: RebalanceOptions | None = None,
        placer: Placer | None = None,
        *,
        relay: Relay,
    ) -> None:
        """`policy`, `findings` and `placer` are those that the control loop goes by.

        `relay` asks agents about their partitions.
        """
        self._mig = MigService(ledger, relay)
        self.rebalancing = RebalanceService(ledger, self._wish, clock, rebalance)
        self._upkeep = UpkeepService(
            ledger, self._wish, clock, policy or CordonPolicy(), findings or Findings()
        )
        self._ledger = ledger
        self._fleet = ledger.fleet
        self._wishes = wishes
        self._meters = meters
        self._clock = clock
        self._version = version
        self._explainer = Explainer(
            ledger.fleet, clock, self._read_request, self._check_model, self._message, placer
        )
        self._models: set[str] = set()  # of the fleet's GPUs; looked up anew for what it lacks

    def methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Return the methods by their names on the wire."""
        return {
            "Allocate": self.allocate,
            "KeepAlive": self.keep_alive,
            "Release": self.release,
            "Explain": self.explain,
            "ListNodes": self.list_nodes,
            "ListAllocations": self.list_allocations,
            "Watch": self.watch,
            **self._upkeep.methods(),
            **self.rebalancing.methods(),
            **self._mig.methods(),
        }

    # --- allocations

    async def allocate(
        self, message: fleet_pb2.AllocateRequest, context: Context
    ) -> fleet_pb2.AllocateResponse:
        """Grant the request, queue it, or refuse it."""
        try:
            wish = self._read_allocate(message)
        except Malformed:
            self._meters.requests.labels("invalid").inc()
            raise
        is_repeated = wish.idempotency_key in self._fleet.keys
        try:
            reply = await self._wish(wish)
        except CallFailure:
            self._meters.requests.labels("failed").inc()
            raise
        self._meters.requests.labels("repeated" if is_repeated else _outcome(reply)).inc()
        match reply:
            case Settled(id_):
                await context.send_initial_metadata(((ALLOCATION_ID_KEY, id_),))
                allocation = self._known(id_)
            case Queued(id_):
                # Before the grant, so that a client that is interrupted knows what it waited for.
                await context.send_initial_metadata(((ALLOCATION_ID_KEY, id_),))
                allocation = await self._wait_for_grant(id_)
            case Refused(refusals):
                raise cannot_place(refusals)
            case KeyReused(id_):
                raise key_reused(wish.idempotency_key, id_)
            case Unknown():
                raise AssertionError(f"{wish} was answered with {reply}")
            case _:
                assert_never(reply)
        if allocation.granted_at is None:
            raise self._waited_in_vain(allocation)
        return fleet_pb2.AllocateResponse(allocation=self._message(allocation))

    async def keep_alive(self, context: Context) -> None:
        """Extend what the client names, and tell what has become of it."""
        while (message := await received(context)) is not None:
            assert isinstance(message, fleet_pb2.KeepAliveRequest)
            id_ = read_id(message.allocation_id, "allocation_id")
            await self._wishes.settled(id_)  # or it would be promised what is just being ended
            self._ledger.note(e.KeptAlive(self._clock.now(), id_))
            known = self._fleet.allocations.get(id_)
            if known is None:
                answer = fleet_pb2.KeepAliveResponse(
                    allocation_id=id_,
                    state=types_pb2.ALLOCATION_STATE_ENDED,
                    ended_reason=f"allocation {id_} is not known",
                )
            else:
                answer = fleet_pb2.KeepAliveResponse(
                    allocation_id=id_,
                    state=ALLOCATION_STATES[known.state],
                    expires_at=self._fleet.expires_at(id_),
                    ended_reason=known.reason,
                    move=self.rebalancing.offer_to(id_),
                    leave=leave_message(leave_of(self._fleet, known)),
                )
            await context.write(answer)

    async def release(
        self, message: fleet_pb2.ReleaseRequest, context: Context
    ) -> fleet_pb2.ReleaseResponse:
        """Give an allocation up, and wait for its node to let go."""
        id_ = read_id(message.allocation_id, "allocation_id")
        reason = limits.text(message.reason, "reason", limits.REASON_BYTES_MAX) or "released"
        wait_seconds = limits.number(
            message.wait_seconds, "wait_seconds", 0.0, limits.RELEASE_WAIT_SECONDS_MAX
        )
        if isinstance(await self._wish(Release(id_, reason)), Unknown):
            raise not_found(f"allocation {id_}")
        if wait_seconds > 0:
            await self._within(wait_seconds, self._ledger.until(id_, _has_ended))
        return fleet_pb2.ReleaseResponse(allocation=self._message(self._known(id_)))

    async def list_allocations(
        self, message: fleet_pb2.ListAllocationsRequest, context: Context
    ) -> fleet_pb2.ListAllocationsResponse:
        """Return every allocation that lives, or that is remembered."""
        answer = fleet_pb2.ListAllocationsResponse(resource_version=self._fleet.version)
        rows = list(allocation_rows(self._fleet, include_ended=message.include_ended))
        for start in range(0, len(rows), ALLOCATIONS_PER_SLICE):
            part = rows[start : start + ALLOCATIONS_PER_SLICE]
            answer.allocations.extend(row.message() for row in part)
            await asyncio.sleep(0)
        return answer

    async def explain(
        self, message: placing_pb2.ExplainRequest, context: Context
    ) -> placing_pb2.ExplainResponse:
        """Tell why a waiting allocation waits, or where a request would go."""
        return await self._explainer.explain(message)

    # --- nodes

    async def list_nodes(
        self, message: fleet_pb2.ListNodesRequest, context: Context
    ) -> fleet_pb2.ListNodesResponse:
        """Return every node that the ledger knows, with what it reported last."""
        answer = fleet_pb2.ListNodesResponse(
            resource_version=self._fleet.version, aggregator_version=self._version
        )
        now = self._clock.now()
        rows = self._node_rows()
        for start in range(0, len(rows), NODES_PER_SLICE):
            part = rows[start : start + NODES_PER_SLICE]
            answer.nodes.extend(row.message(now) for row in part)
            await asyncio.sleep(0)
        return answer

    # --- both

    async def watch(self, message: fleet_pb2.WatchRequest, context: Context) -> None:
        """Stream every durable change; from version 0, everything as it is first."""
        after = message.resource_version
        present: Iterator[fleet_pb2.WatchResponse] = iter(())
        if after == 0:
            after = self._fleet.version
            present = self._present(after)
        # A client that has it knows from where on nothing escapes it.
        await context.send_initial_metadata(())
        for standing in present:
            await context.write(standing)
        try:
            async with aclosing(self._ledger.watch(after)) as changes:
                async for change in changes:
                    now = self._clock.now()
                    await context.write(change_message(self._fleet, change, now))
        except WatchTooOld as error:
            raise version_too_old(str(error)) from error
        except WatchTooSlow as error:
            raise CallFailure(grpc.StatusCode.ABORTED, "WATCH_TOO_SLOW", str(error)) from error
        except StoreError as error:
            raise store_unavailable(error) from error

    def _present(self, version: int) -> Iterator[fleet_pb2.WatchResponse]:
        """Return everything as it is now, `version`; messages are made as they are taken."""
        now = self._clock.now()
        nodes = self._node_rows()
        allocations = list(allocation_rows(self._fleet, include_ended=False))
        standing = partial(fleet_pb2.WatchResponse, resource_version=version, at=now)
        return chain(
            (standing(event="Present", node=each.message(now)) for each in nodes),
            (standing(event="Present", allocation=each.message()) for each in allocations),
        )

    # --- helpers

    async def _wish(self, wish: Wish) -> Reply:
        try:
            return await self._wishes.wish(wish)
        except StoreError as error:
            raise store_unavailable(error) from error

    def _read_allocate(self, message: fleet_pb2.AllocateRequest) -> Allocate:
        return Allocate(
            request=self._read_request(message.request),
            idempotency_key=limits.text(
                message.idempotency_key, "idempotency_key", limits.ID_BYTES_MAX
            ),
            wait_seconds=limits.number(
                message.wait_seconds, "wait_seconds", 0.0, limits.WAIT_SECONDS_MAX
            ),
        )

    def _read_request(self, message: types_pb2.Request) -> Request:
        request = read_request(message)
        for model in request.models:
            self._check_model("request.models", model)
        return request

    def _check_model(self, path: str, asked: str) -> None:
        """Refuse a model that neither the catalogue nor a GPU of the fleet has."""
        if any(names_match(asked, model.driver_name) for model in MODELS.values()):
            return
        if any(names_match(asked, name) for name in self._models):
            return
        nodes = self._fleet.nodes.values()
        self._models = {gpu.model for node in nodes for gpu in node.facts.gpus}
        if any(names_match(asked, name) for name in self._models):
            return
        known = {name.casefold(): name for name in (*MODELS, *self._models)}
        near = difflib.get_close_matches(asked.casefold(), known, n=1, cutoff=0.3)
        hint = f"; the nearest is {known[near[0]]}" if near else ""
        raise Malformed(
            path,
            f"{shown(asked)} is no model in the fleet or the catalogue{hint}; "
            f"the catalogue has {', '.join(MODELS)}",
        )

    async def _wait_for_grant(self, id_: str) -> Allocation:
        """Wait, on the line, until the allocation has left the queue."""
        self._ledger.note(e.WaiterAttached(self._clock.now(), id_))
        try:
            allocation = await self._ledger.until(id_, _has_left_queue)
        finally:
            self._ledger.note(e.WaiterDetached(self._clock.now(), id_))
        if allocation is None:
            raise not_found(f"allocation {id_}")
        return allocation

    def _waited_in_vain(self, allocation: Allocation) -> CallFailure:
        if allocation.reason.startswith("cancelled"):
            return not_granted(allocation.id, allocation.reason)
        answer = consider(allocation.request, self._fleet, self._clock.now())
        if isinstance(answer, Plan):  # something became free just after the wait was over
            answer = Refusals(allocation.reason, ())
        return cannot_place(answer, allocation.reason)

    def _known(self, id_: str) -> Allocation:
        allocation = self._fleet.allocations.get(id_)
        if allocation is None:
            raise not_found(f"allocation {id_}")
        return allocation

    def _message(self, allocation: Allocation) -> types_pb2.Allocation:
        return allocation_row(self._fleet, allocation).message()

    def _node_rows(self) -> list[NodeRow]:
        return [node_row(self._fleet, node) for node in self._fleet.nodes.values()]

    async def _within(self, seconds: float, waiting: Awaitable[object]) -> None:
        """Wait for `waiting`, at most so long."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._clock.sleep(seconds))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


def _has_ended(allocation: Allocation) -> bool:
    return allocation.state is AllocationState.ENDED


def _has_left_queue(allocation: Allocation) -> bool:
    return allocation.state is not AllocationState.WAITING


def _outcome(reply: Reply) -> str:
    match reply:
        case Settled():
            return "granted"
        case Queued():
            return "queued"
        case Refused():
            return "refused"
        case KeyReused() | Unknown():
            return "invalid"
        case _:
            assert_never(reply)
