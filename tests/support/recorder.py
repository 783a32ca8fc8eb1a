"""A door for agents that grants nothing: it keeps what it hears and says what a test tells it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
from grpc import aio
from tests.support.waiting import until, until_true

from stoker.v1 import agent_pb2, agent_pb2_grpc, mig_pb2


@dataclass(slots=True)
class Stream:
    """One stream of one agent."""

    hello: agent_pb2.Hello
    frames: list[agent_pb2.Frame] = field(default_factory=list[agent_pb2.Frame])
    to_say: asyncio.Queue[agent_pb2.AggregatorMessage] = field(
        default_factory=asyncio.Queue[agent_pb2.AggregatorMessage]
    )
    mig_answers: dict[int, mig_pb2.MigAnswer] = field(default_factory=dict[int, mig_pb2.MigAnswer])
    mig_relays: int = 0
    commands: int = 0
    is_over: bool = False

    def hold(
        self, id_: str, *uuids: str, memory: int | None = None, mig_devices: Sequence[str] = ()
    ) -> None:
        """Tell the agent to hold."""
        allocation = agent_pb2.HeldAllocation(
            id=id_,
            gpu_uuids=uuids,
            memory_bytes=memory,
            holder="ann",
            ttl_seconds=60.0,
            mig_device_uuids=mig_devices,
        )
        self.command(agent_pb2.Command(hold=agent_pb2.Hold(allocation=allocation)))

    def drop(self, id_: str) -> None:
        """Tell the agent to let go."""
        self.command(agent_pb2.Command(drop=agent_pb2.Drop(allocation_id=id_, reason="released")))

    def command(self, command: agent_pb2.Command) -> None:
        """Say a command, which gets its number here."""
        self.commands += 1
        command.id = self.commands
        self.to_say.put_nowait(agent_pb2.AggregatorMessage(command=command))

    async def ask_mig(self, ask: mig_pb2.MigAsk) -> mig_pb2.MigAnswer:
        """Relay a question about partitions, and return the answer."""
        self.mig_relays += 1
        relay = mig_pb2.MigRelay(id=self.mig_relays, ask=ask)
        self.to_say.put_nowait(agent_pb2.AggregatorMessage(mig=relay))

        async def look() -> mig_pb2.MigAnswer | None:
            return self.mig_answers.get(relay.id)

        return await until(f"an answer to relay {relay.id}", look)

    @property
    def mig(self) -> dict[str, mig_pb2.GpuMig]:
        """The partitions that it told of last, by the UUID of the GPU."""
        told = (frame.mig for frame in reversed(self.frames) if frame.HasField("mig"))
        return {gpu.gpu_uuid: gpu for gpu in next(told, mig_pb2.NodeMig()).gpus}

    @property
    def told(self) -> agent_pb2.Frame | None:
        """The last frame that said what is held."""
        return next((frame for frame in reversed(self.frames) if frame.HasField("held")), None)

    @property
    def held(self) -> set[str] | None:
        """What it said; None: nothing yet."""
        return None if self.told is None else {each.id for each in self.told.held.allocations}

    async def holds(self, *ids: str) -> agent_pb2.Frame:
        """Wait until the agent says that it holds exactly these, and return that frame."""
        await until_true(f"{ids} to be held", lambda: self.held == set(ids))
        assert self.told is not None
        return self.told

    async def frame_with(self, part: str) -> agent_pb2.Frame:
        """Wait for a frame that has this field, from now on."""
        seen = len(self.frames)

        async def look() -> agent_pb2.Frame | None:
            fresh = self.frames[seen:]
            return next((f for f in fresh if any(d.name == part for d, _ in f.ListFields())), None)

        return await until(f"a frame with {part}", look)


class Recorder(agent_pb2_grpc.AgentLinkServicer):
    """Takes agents in. It counts frames as an aggregator does; `forget` makes it a new one."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.port = 0
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.is_acking = True
        self._taken: dict[str, int] = {}  # the highest number, by incarnation
        self._server: aio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Know no frame any more."""
        self._taken.clear()

    async def start(self) -> None:
        """Listen, at the address of before if there is one."""
        self._server = aio.server()
        agent_pb2_grpc.add_AgentLinkServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Hang up on everybody."""
        assert self._server is not None
        await self._server.stop(grace=None)
        await until_true("the streams to end", lambda: all(s.is_over for s in self.streams))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        await self._server.stop(grace=None)

    async def stream(self, number: int = 1) -> Stream:
        """Wait for the stream of that number, counted from 1, to have said a frame."""

        def is_there() -> bool:
            return len(self.streams) >= number and bool(self.streams[number - 1].frames)

        await until_true(f"stream {number}", is_there)
        return self.streams[number - 1]

    async def Connect(  # noqa: N802 (the protocol's name)
        self,
        request_iterator: AsyncIterator[agent_pb2.AgentMessage],
        context: aio.ServicerContext[agent_pb2.AgentMessage, agent_pb2.AggregatorMessage],
    ) -> AsyncIterator[agent_pb2.AggregatorMessage]:
        """Serve one stream."""
        first = await anext(aiter(request_iterator))
        if self.refusal is not None:
            await context.abort(*self.refusal)
        stream = Stream(first.hello)
        self.streams.append(stream)
        taken = self._taken.get(first.hello.incarnation, 0)
        yield agent_pb2.AggregatorMessage(
            welcome=agent_pb2.Welcome(
                protocol_version=1, aggregator_version="test", acked_sequence=taken
            )
        )
        hearing = asyncio.create_task(self._hear(stream, request_iterator))
        try:
            while True:
                yield await stream.to_say.get()
        finally:
            hearing.cancel()
            stream.is_over = True

    async def _hear(self, stream: Stream, messages: AsyncIterator[agent_pb2.AgentMessage]) -> None:
        async for message in messages:
            if message.HasField("mig"):
                stream.mig_answers[message.mig.id] = message.mig
                continue
            frame = message.frame
            stream.frames.append(frame)
            self._taken[stream.hello.incarnation] = frame.sequence
            if self.is_acking:
                ack = agent_pb2.Ack(sequence=frame.sequence)
                stream.to_say.put_nowait(agent_pb2.AggregatorMessage(ack=ack))
