"""Explain for clients: why something waits or what would come of a request, also if things changed.

Where the place is found at once the answer is, too. Otherwise every node is asked, and what would
help is looked for: at ten thousand nodes that takes about a second, so it is done in a thread, one
question at a time, on the fleet as it was when it was asked.
"""

import asyncio
from collections.abc import Callable
from typing import assert_never

from stoker.aggregator.explaining import Question, answer, ask
from stoker.aggregator.failures import not_found
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Allocation, AllocationState, Request
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.queueing import Hosts
from stoker.aggregator.tenancy import still_with
from stoker.aggregator.views import name_nodes
from stoker.aggregator.wire_explain import explanation_message, read_what_ifs
from stoker.aggregator.wire_requests import read_id
from stoker.core.clock import Clock
from stoker.core.units import format_duration
from stoker.v1 import placing_pb2, types_pb2


class Explainer:
    """Answers questions; every method raises CallFailure, Malformed or nothing."""

    def __init__(
        self,
        fleet: Fleet,
        clock: Clock,
        read_request: Callable[[types_pb2.Request], Request],
        check_model: Callable[[str, str], None],
        message_of: Callable[[Allocation], types_pb2.Allocation],
        placer: Placer | None = None,
    ) -> None:
        """`check_model` raises Malformed for a path and a name that nobody knows.

        `placer` is the control loop's: it says where a request would really go.
        """
        self._fleet = fleet
        self._clock = clock
        self._read_request = read_request
        self._check_model = check_model
        self._message_of = message_of
        self._placer = placer
        # Clients that wait ask again and again: however many, they take one thread's time.
        self._answering = asyncio.Lock()
        self._hosts = Hosts()

    async def explain(self, message: placing_pb2.ExplainRequest) -> placing_pb2.ExplainResponse:
        """Tell why a waiting allocation waits, or where a request would go."""
        match message.WhichOneof("subject"):
            case "allocation_id":
                id_ = read_id(message.allocation_id, "allocation_id")
                allocation = self._fleet.allocations.get(id_)
                if allocation is None:
                    raise not_found(f"allocation {id_}")
                return await self._of_allocation(allocation, message)
            case "request":
                return await self._of_request(self._read_request(message.request), message)
            case _:
                raise Malformed("subject", "must be an allocation_id or a request")

    async def _of_request(
        self, request: Request, message: placing_pb2.ExplainRequest, until: str | None = None
    ) -> placing_pb2.ExplainResponse:
        view = self._fleet.view(self._clock.now())
        supposed = read_what_ifs(message.what_if, view, self._check_model)

        def asked() -> Question:
            now = self._clock.now()
            return ask(request, self._fleet, now, until, supposed, self._placer, self._hosts)

        question = asked()
        if question.plan is None:
            async with self._answering:
                question = asked()  # of the fleet as it is by now
                return explanation_message(await asyncio.to_thread(answer, question))
        return explanation_message(answer(question))

    async def _of_allocation(
        self, allocation: Allocation, message: placing_pb2.ExplainRequest
    ) -> placing_pb2.ExplainResponse:
        if message.what_if and allocation.state is not AllocationState.WAITING:
            raise Malformed(
                "what_if", f"allocation {allocation.id} does not wait, it is {allocation.state}"
            )
        now = self._clock.now()
        match allocation.state:
            case AllocationState.WAITING:
                told = await self._of_request(allocation.request, message, until=allocation.id)
                waited = format_duration(now - allocation.requested_at)
                told.summary = f"has waited {waited}: {told.summary}"
            case AllocationState.GRANTED:
                since = format_duration(now - (allocation.granted_at or now))
                told = placing_pb2.ExplainResponse(
                    node=allocation.node,
                    summary=f"granted on {name_nodes(allocation.nodes)} {since} ago",
                )
            case AllocationState.RELEASING:
                nodes = still_with(self._fleet, allocation) or allocation.nodes
                have = "have" if len(nodes) > 1 else "has"
                told = placing_pb2.ExplainResponse(
                    node=allocation.node,
                    summary=f"given up ({allocation.reason}); {name_nodes(nodes)} {have} not "
                    "confirmed yet to have let go",
                )
            case AllocationState.ENDED:
                told = placing_pb2.ExplainResponse(summary=f"ended: {allocation.reason}")
            case _:
                assert_never(allocation.state)
        told.allocation.CopyFrom(self._message_of(allocation))
        return told
