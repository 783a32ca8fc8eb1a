"""The clients' door to the upkeep of nodes and GPUs: cordon, drain, un-cordon, and how they are."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from stoker.aggregator import limits
from stoker.aggregator.answers import node_row
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.failures import Context, not_found
from stoker.aggregator.findings import Findings
from stoker.aggregator.health_report import finding_message, gpu_rows
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.wishes import Cordon, Drain, Reply, Uncordon, Unknown, Wish
from stoker.core.clock import Clock
from stoker.v1 import fleet_pb2

# A long list is made in slices, so that making it does not hold up the loop.
GPUS_PER_SLICE = 400


class UpkeepService:
    """A part of the service `stoker.v1.Fleet`; raises CallFailure, Malformed or nothing."""

    def __init__(
        self,
        ledger: Ledger,
        wish: Callable[[Wish], Awaitable[Reply]],
        clock: Clock,
        policy: CordonPolicy,
        findings: Findings,
    ) -> None:
        """`wish` returns the reply once it is durable; raises CallFailure."""
        self._fleet = ledger.fleet
        self._wish = wish
        self._clock = clock
        self._policy = policy
        self._findings = findings

    def methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Return the methods by their names on the wire."""
        return {
            "Cordon": self.cordon,
            "Uncordon": self.uncordon,
            "Drain": self.drain,
            "ListHealth": self.list_health,
        }

    async def cordon(
        self, message: fleet_pb2.CordonRequest, context: Context
    ) -> fleet_pb2.CordonResponse:
        """Place nothing more on a node, or on one GPU of it."""
        name, uuid, reason = _where(message), _gpu(message), _reason(message)
        return fleet_pb2.CordonResponse(node=await self._settle(Cordon(name, reason, uuid)))

    async def uncordon(
        self, message: fleet_pb2.UncordonRequest, context: Context
    ) -> fleet_pb2.UncordonResponse:
        """Place on a node, or on one GPU of it, again."""
        wish = Uncordon(_where(message), _gpu(message))
        return fleet_pb2.UncordonResponse(node=await self._settle(wish))

    async def drain(
        self, message: fleet_pb2.DrainRequest, context: Context
    ) -> fleet_pb2.DrainResponse:
        """Cordon, and end what is still held after a grace."""
        name, uuid, reason = _where(message), _gpu(message), _reason(message)
        grace = None
        if message.HasField("grace_seconds"):
            grace = limits.number(
                message.grace_seconds, "grace_seconds", 0.0, limits.DRAIN_SECONDS_MAX
            )
        return fleet_pb2.DrainResponse(node=await self._settle(Drain(name, reason, uuid, grace)))

    async def list_health(
        self, message: fleet_pb2.ListHealthRequest, context: Context
    ) -> fleet_pb2.ListHealthResponse:
        """Return which GPUs are not well, what is done about them, and what was noticed."""
        fleet, now = self._fleet, self._clock.now()
        findings = self._findings.found(fleet, now)
        total = len(fleet.homes)
        answer = fleet_pb2.ListHealthResponse(
            findings=[finding_message(each) for each in findings],
            gpus_total=total,
            cordoned_by_health=len(fleet.conditions.cordoned_by_health),
            cordoned_by_health_max=self._policy.limit(total),
            resource_version=fleet.version,
        )
        rows = gpu_rows(fleet, self._policy, now, include_healthy=message.include_healthy)
        for start in range(0, len(rows), GPUS_PER_SLICE):
            answer.gpus.extend(row.message() for row in rows[start : start + GPUS_PER_SLICE])
            await asyncio.sleep(0)
        return answer

    async def _settle(self, wish: Cordon | Drain | Uncordon) -> fleet_pb2.Node:
        """Have the wish done; return its node as it is then."""
        reply = await self._wish(wish)
        if isinstance(reply, Unknown):
            raise not_found(reply.what, reply.known)
        return node_row(self._fleet, self._fleet.nodes[wish.node]).message(self._clock.now())


_Request = fleet_pb2.CordonRequest | fleet_pb2.UncordonRequest | fleet_pb2.DrainRequest


def _where(message: _Request) -> str:
    return limits.dns_name(message.node, "node")


def _gpu(message: _Request) -> str:
    return limits.text(message.gpu_uuid, "gpu_uuid", limits.ID_BYTES_MAX)


def _reason(message: fleet_pb2.CordonRequest | fleet_pb2.DrainRequest) -> str:
    return limits.text(message.reason, "reason", limits.REASON_BYTES_MAX, required=True)
