"""A tap on the line between agents and an aggregator: passes every message on and keeps a copy."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
from grpc import aio

from stoker.v1 import agent_pb2, agent_pb2_grpc

_Heard = agent_pb2.AgentMessage
_Said = agent_pb2.AggregatorMessage


@dataclass(slots=True)
class Talk:
    """One stream: what was heard from the agent, and what the aggregator said."""

    heard: list[agent_pb2.AgentMessage] = field(default_factory=list[agent_pb2.AgentMessage])
    said: list[agent_pb2.AggregatorMessage] = field(
        default_factory=list[agent_pb2.AggregatorMessage]
    )

    @property
    def hello(self) -> agent_pb2.Hello:
        """How the agent began."""
        return self.heard[0].hello

    @property
    def welcome(self) -> agent_pb2.Welcome:
        """What the aggregator answered to that."""
        return self.said[0].welcome

    @property
    def is_welcomed(self) -> bool:
        """Whether there was an answer to the hello."""
        return bool(self.said)

    @property
    def frames(self) -> list[agent_pb2.Frame]:
        """The frames that the agent sent."""
        return [message.frame for message in self.heard if message.HasField("frame")]

    @property
    def acks(self) -> list[int]:
        """The sequence numbers up to which the aggregator took frames in."""
        return [message.ack.sequence for message in self.said if message.HasField("ack")]


class Tap(agent_pb2_grpc.AgentLinkServicer):
    """A server that agents dial in place of the aggregator at `upstream`."""

    def __init__(self, upstream: str) -> None:
        self.talks: list[Talk] = []
        self.address = ""  # once it listens
        self._upstream = upstream
        self._server = aio.server()

    async def __aenter__(self) -> Self:
        agent_pb2_grpc.add_AgentLinkServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._server.stop(grace=None)

    async def Connect(  # noqa: N802 - the name is the protocol's
        self,
        request_iterator: AsyncIterator[agent_pb2.AgentMessage],
        context: aio.ServicerContext[agent_pb2.AgentMessage, agent_pb2.AggregatorMessage],
    ) -> AsyncIterator[agent_pb2.AggregatorMessage]:
        """Pass one stream on."""
        talk = Talk()
        self.talks.append(talk)

        async def upward() -> AsyncIterator[agent_pb2.AgentMessage]:
            async for message in request_iterator:
                talk.heard.append(message)
                yield message

        # A pool of its own: a stream must not wait for the back-off of an earlier one.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with aio.insecure_channel(self._upstream, options=options) as channel:
            try:
                async for message in agent_pb2_grpc.AgentLinkStub(channel).Connect(upward()):
                    talk.said.append(message)
                    yield message
            except aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            except grpc.RpcError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
