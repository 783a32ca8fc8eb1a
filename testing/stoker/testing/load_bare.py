"""A bare stream server: takes frames and acknowledges them, knows nothing; what gRPC alone costs.

Run as `python -m stoker.testing.load_bare FRAMES_PER_ACK`. It speaks enough of the agents' protocol
for the same load generator to drive it with the same messages as the aggregator.
"""

import os
from importlib.metadata import version

# As the aggregator waits for its sockets (see its `__main__`).
if version("grpcio").startswith("1.85."):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import sys
from collections.abc import AsyncIterator

import grpc
import uvloop

from stoker.testing.load import Listening, instructions, say
from stoker.v1 import agent_pb2, agent_pb2_grpc

# `read` returns a message or grpc.aio.EOF, which the types of grpc leave out.
_Context = grpc.aio.ServicerContext[object, agent_pb2.AggregatorMessage]


class _Bare(agent_pb2_grpc.AgentLinkServicer):
    def __init__(self, frames_per_ack: int) -> None:
        self._frames_per_ack = frames_per_ack

    # grpc.aio takes a coroutine that reads and writes as well as a generator, and it costs less;
    # the generated types know generators only.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterator[agent_pb2.AgentMessage],
        context: _Context,
    ) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pending = 0
        while isinstance(message := await context.read(), agent_pb2.AgentMessage):
            if message.HasField("hello"):
                welcome = agent_pb2.Welcome(protocol_version=message.hello.protocol_version)
                await context.write(agent_pb2.AggregatorMessage(welcome=welcome))
                continue
            pending += 1
            if pending >= self._frames_per_ack:
                pending = 0
                ack = agent_pb2.Ack(sequence=message.frame.sequence)
                await context.write(agent_pb2.AggregatorMessage(ack=ack))


async def serve(frames_per_ack: int) -> None:
    """Serve on a free port of the loopback until standard input ends."""
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentLinkServicer_to_server(_Bare(frames_per_ack), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(Listening(port))
    async for _ in instructions():
        pass
    await server.stop(grace=None)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
