"""The aggregator's side of one call: what grpc.aio's context is to a method, over a simulated
stream.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from stoker.aggregator.failures import CallFailure
from stoker.aggregator.limits import Malformed
from stoker.testing.calls import CONNECT, failure_packet, packet, read_packet
from stoker.testing.calls import Failed as FailedCall
from stoker.testing.network import End
from stoker.testing.virtual_loop import VirtualLoop
from stoker.v1 import agent_pb2, fleet_pb2, mig_pb2, placing_pb2, types_pb2

if TYPE_CHECKING:
    from stoker.testing.aggregator_process import AggregatorProcess

# What each method is asked with, and whether it takes a stream of that.
METHODS: dict[str, tuple[type[Message], bool]] = {
    CONNECT: (agent_pb2.AgentMessage, True),
    "Allocate": (fleet_pb2.AllocateRequest, False),
    "KeepAlive": (fleet_pb2.KeepAliveRequest, True),
    "Release": (fleet_pb2.ReleaseRequest, False),
    "Cordon": (fleet_pb2.CordonRequest, False),
    "Uncordon": (fleet_pb2.UncordonRequest, False),
    "Rebalance": (placing_pb2.RebalanceRequest, False),
    "AnswerMove": (placing_pb2.AnswerMoveRequest, False),
    "Mig": (mig_pb2.MigRequest, False),
}

Method = Callable[..., Awaitable[Message | None]]

# The call in whose task one is.
current: ContextVar["ServedCall"] = ContextVar("current")


class ServedCall:
    """One call; it implements what production methods use of `grpc.aio.ServicerContext`."""

    def __init__(
        self, process: "AggregatorProcess", loop: VirtualLoop, end: End, name: str, method: Method
    ) -> None:
        self.hello: agent_pb2.Hello | None = None  # the last that was read
        self.frame: agent_pb2.Frame | None = None  # the last that was read
        self._process = process
        self._end = end
        self._kind, self._takes_stream = METHODS[name]
        self._inbox: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._task = loop.spawn(self._serve(method), name)
        take = process.guarded(self._take)

        def arrive(data: bytes) -> None:
            if end.is_open and process.is_up:
                process.arrived(name, data)
            take(data)

        end.on_message = arrive
        end.on_end = process.guarded(self._cancel)

    # --- what methods use

    def peer(self) -> str:
        """Return who calls."""
        return self._end.peer

    async def read(self) -> Message:
        """Return the next message; when the stream breaks the task is cancelled."""
        while not self._inbox:
            self._arrived.clear()
            await self._arrived.wait()
        message = self._inbox.popleft()
        if isinstance(message, agent_pb2.AgentMessage):
            if message.HasField("hello"):
                self.hello = message.hello
            else:
                self.frame = message.frame
        return message

    async def write(self, message: Message) -> None:
        """Send a message."""
        self._send(message)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Send what nobody here looks at."""

    # --- the call

    def _take(self, data: bytes) -> None:
        if self._end.is_open:
            said = read_packet(self._kind, data)
            assert not isinstance(said, FailedCall), f"a caller sent a status: {said}"
            if isinstance(said.message, fleet_pb2.ReleaseRequest):
                self._process.witness.release_asked(said.message.allocation_id)
            self._inbox.append(said.message)
            self._arrived.set()

    def _cancel(self, reason: str) -> None:
        for message in self._inbox:
            if isinstance(message, fleet_pb2.KeepAliveRequest):
                self._process.witness.keep_alive_lost(message.allocation_id)
        self._task.cancel(reason)

    async def _serve(self, method: Method) -> None:
        current.set(self)
        try:
            if self._takes_stream:
                await method(self)
            else:
                answer = await method(await self.read(), self)
                assert answer is not None, f"{method} gave no answer"
                self._send(answer)
        except CallFailure as failure:
            self._end.send(failure_packet(f"{failure.reason}: {failure.sentence}"))
        except Malformed as error:
            self._end.send(failure_packet(f"INVALID_REQUEST: {error}"))
        finally:
            self._end.close()

    def _send(self, message: Message) -> None:
        match message:
            case fleet_pb2.AllocateResponse() | placing_pb2.AnswerMoveResponse():
                given = message.allocation
                if given.state == types_pb2.ALLOCATION_STATE_GRANTED:
                    self._process.promise(given.id, given.expires_at)
            case fleet_pb2.KeepAliveResponse():
                if message.state == types_pb2.ALLOCATION_STATE_GRANTED:
                    self._process.promise(message.allocation_id, message.expires_at)
            case agent_pb2.AggregatorMessage():
                if message.HasField("ack") and self.hello is not None:
                    frame = self.frame or agent_pb2.Frame()
                    self._process.acknowledge(self.hello.node, message.ack.sequence, frame)
            case _:
                pass
        self._end.send(packet(message, self._process.wall_offset))
