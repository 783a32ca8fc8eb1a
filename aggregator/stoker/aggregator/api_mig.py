"""The clients' door to how GPUs are partitioned (MIG): relayed to the node's agent, which decides.

Nothing of it is kept here: what a node does about its partitions it journals itself, and an
operation that it knows by its id is not begun again. So a call that failed on the way is made once
more, and changes nothing twice.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from stoker.aggregator import limits
from stoker.aggregator.failures import CallFailure, Context, not_found
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.relays import not_connected
from stoker.aggregator.wire_mig import check_ask
from stoker.v1 import mig_pb2

# Returns the agent's answer; raises CallFailure.
Relay = Callable[[str, mig_pb2.MigAsk], Awaitable[mig_pb2.MigAnswer]]


class MigService:
    """A part of the service `stoker.v1.Fleet`; raises CallFailure, Malformed or nothing."""

    def __init__(self, ledger: Ledger, relay: Relay) -> None:
        """`relay` asks the agent of a node on its stream."""
        self._fleet = ledger.fleet
        self._relay = relay

    def methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Return the methods by their names on the wire."""
        return {"Mig": self.mig}

    async def mig(self, message: mig_pb2.MigRequest, context: Context) -> mig_pb2.MigResponse:
        """Have a node plan, apply, undo or tell its partitions."""
        name = limits.dns_name(message.node, "node")
        check_ask(message.ask)
        if name not in self._fleet.nodes:
            raise not_found(f"node {name}")
        status = self._fleet.status(name)
        if status.session == 0:
            raise not_connected(name, status.disconnected_reason)
        answer = await self._relay(name, message.ask)
        if answer.refusal:
            raise CallFailure(
                grpc.StatusCode.FAILED_PRECONDITION, "MIG_REFUSED", f"{name}: {answer.refusal}"
            )
        return mig_pb2.MigResponse(report_json=answer.report_json)
