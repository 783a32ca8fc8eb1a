"""Replicas of a service for tests and benches: real gRPC servers that take their time, and callers.

A replica works on so many calls at a time, others wait; how long one takes is always the same, or
drawn from an exponential distribution. `python -m stoker.testing.replicas PLAN` runs one as a
process of its own, which allocates its GPU and serves until its standard input ends.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import msgspec

from stoker.client import AsyncFleet, ClientError, Service, connect_async
from stoker.core.clock import Clock, SystemClock
from stoker.testing.load import Failed, Listening, instructions, say
from stoker.testing.replica_messages import ReplicaPlan

METHOD = "/stoker.testing.Replica/Call"
_SERVICE, _NAME = METHOD.strip("/").split("/")
# Channels of one process otherwise share a connection, and its back-off.
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
STOP_SECONDS = 0.2
# Until the nodes have told of their GPUs.
START_SECONDS_MAX = 30.0


class Replica:
    """What one replica does with a call; how slow it is may be changed meanwhile."""

    def __init__(
        self,
        seconds: float,
        slots: int,
        rng: Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`seconds` a call takes, on the mean where there is an `rng`."""
        self.seconds = seconds
        self.calls = 0  # that have come
        self.is_failing = False
        self.service: Service | None = None  # what observes, once it is an endpoint
        self.port = 0
        self._slots = asyncio.Semaphore(slots)
        self._rng = rng
        self._clock = clock or SystemClock()

    @property
    def address(self) -> str:
        """Where it can be called."""
        return f"127.0.0.1:{self.port}"

    async def answer(self, request: bytes, context: Any) -> bytes:
        """Work on one call."""
        self.calls += 1
        assert self.service is not None
        with self.service.operation():
            async with self._slots:
                if self.is_failing:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is not loaded")
                rng = self._rng
                await self._clock.sleep(rng.expovariate(1 / self.seconds) if rng else self.seconds)
        return request

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        """Listen on a free loopback port meanwhile."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        # As bytes: there is nothing to parse.
        handler: grpc.RpcMethodHandler[Any, Any]
        handler = grpc.unary_unary_rpc_method_handler(self.answer)
        generic = grpc.method_handlers_generic_handler(_SERVICE, {_NAME: handler})
        server.add_generic_rpc_handlers((generic,))
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield
        finally:
            await server.stop(STOP_SECONDS)

    @asynccontextmanager
    async def serving(
        self, fleet: AsyncFleet, name: str, allocation_id: str, capacity: int | None = None
    ) -> AsyncGenerator[None]:
        """Be an endpoint of a service meanwhile."""
        async with (
            self.listening(),
            fleet.serve(name, allocation_id, address=self.address, capacity=capacity) as service,
        ):
            self.service = service
            yield


class Channels:
    """Connections to replicas, one for each address."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def call(self, address: str, timeout: float) -> None:
        """Call the replica; raises grpc.RpcError."""
        channel: Any = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            self._channels[address] = channel
        await channel.unary_unary(METHOD)(b"", timeout=timeout)

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels.values():
            await channel.close()


async def run(plan: ReplicaPlan) -> None:
    """Allocate a GPU, and be an endpoint until the parent goes."""
    rng = Random(plan.seed) if plan.is_random else None
    replica = Replica(plan.seconds, plan.slots, rng)
    async with connect_async(plan.target) as fleet:
        try:
            async with (
                fleet.allocate(
                    wait=START_SECONDS_MAX,
                    gpus=1,
                    holder="bench",
                    service=plan.service,
                    set_environment=False,
                ) as lease,
                replica.serving(fleet, plan.service, lease.id),
            ):
                say(Listening(replica.port))
                async for _ in instructions():
                    pass
        except ClientError as error:
            say(Failed(str(error)))


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(msgspec.json.decode(sys.argv[1], type=ReplicaPlan)))
