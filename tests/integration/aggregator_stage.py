"""An aggregator on loopback ports in this process, an agent of few words, a clock that jumps."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio
from tests.support.waiting import until, until_true

from stoker.aggregator.config import Settings
from stoker.aggregator.cuts import PartitioningOptions
from stoker.aggregator.moves import RebalanceOptions
from stoker.aggregator.server import Aggregator, OpenStore
from stoker.aggregator.store import Store
from stoker.core.addresses import Address
from stoker.core.sdnotify import Notifier
from stoker.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    mig_pb2,
    placing_pb2,
    types_pb2,
)

GIB = 1 << 30
H100 = "NVIDIA H100 80GB HBM3"
# Of a clock that elapses: shorter than what counts as a standstill.
STRIDE_SECONDS = 0.25
TURNS_PER_STRIDE = 10
ANY_PORT = Address("127.0.0.1", 0)


class JumpClock:
    """The machine's clock, which a test may set forward: whoever sleeps till then wakes at once."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._jumped = asyncio.Event()

    def now(self) -> float:
        return time.time() + self._ahead

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    async def sleep(self, seconds: float) -> None:
        due = self.monotonic() + seconds
        while (left := due - self.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._jumped.wait()

    def jump(self, seconds: float) -> None:
        """Let so much time have passed."""
        self._ahead += seconds
        self._jumped.set()
        self._jumped.clear()

    async def elapse(self, seconds: float) -> None:
        """Let time pass for everybody, quickly: whoever sleeps wakes in between.

        After a jump the aggregator finds that it stood still, and prolongs every lease.
        """
        while seconds > 0:
            self.jump(min(seconds, STRIDE_SECONDS))
            seconds -= STRIDE_SECONDS
            for _ in range(TURNS_PER_STRIDE):
                await asyncio.sleep(0)


class Stage:
    """A running aggregator and a client's channel to it."""

    def __init__(self, aggregator: Aggregator, channel: aio.Channel, clock: JumpClock) -> None:
        self.aggregator = aggregator
        self.address = str(aggregator.address)
        self.channel = channel
        self.clock = clock
        self.fleet = fleet_pb2_grpc.FleetStub(channel)

    async def allocate(
        self, key: str = "", wait: float = 0.0, **fields: object
    ) -> types_pb2.Allocation:
        """Return what was granted for a request with these fields."""
        answer = await self.fleet.Allocate(wish(key, wait, **fields))
        return answer.allocation

    async def queue(self, key: str = "", wait: float = 600.0, **fields: object) -> "Waiting":
        """Ask with patience, and return once the place in the queue is known."""
        # As a stream: of a unary call asyncio's gRPC tells the metadata only with the answer.
        method = self.channel.unary_stream(
            "/stoker.v1.Fleet/Allocate",
            fleet_pb2.AllocateRequest.SerializeToString,
            fleet_pb2.AllocateResponse.FromString,
        )
        call = method(wish(key, wait, **fields))
        id_ = dict(await call.initial_metadata())["stoker-allocation-id"]
        assert isinstance(id_, str)
        return Waiting(id_, call)

    async def release(self, id_: str, wait: float = 0.0) -> types_pb2.Allocation:
        asked = fleet_pb2.ReleaseRequest(allocation_id=id_, wait_seconds=wait)
        return (await self.fleet.Release(asked)).allocation

    async def explain(self, id_: str) -> placing_pb2.ExplainResponse:
        return await self.fleet.Explain(placing_pb2.ExplainRequest(allocation_id=id_))

    async def nodes(self) -> dict[str, fleet_pb2.Node]:
        answer = await self.fleet.ListNodes(fleet_pb2.ListNodesRequest())
        return {node.name: node for node in answer.nodes}

    async def allocations(self, *, ended: bool = True) -> dict[str, types_pb2.Allocation]:
        asked = fleet_pb2.ListAllocationsRequest(include_ended=ended)
        answer = await self.fleet.ListAllocations(asked)
        return {allocation.id: allocation for allocation in answer.allocations}

    async def becomes(self, id_: str, state: "types_pb2.AllocationState.ValueType") -> None:
        """Return once the allocation is in that state."""

        async def look() -> bool:
            return (await self.allocations())[id_].state == state

        await until(f"{id_} to change", look)

    async def raw(self, method: str, data: bytes) -> bytes:
        """Send bytes as they are to a method of the fleet, and return the answer's."""
        path = f"/stoker.v1.Fleet/{method}"
        channel: Any = self.channel
        answer: bytes = await channel.unary_unary(path)(data)
        return answer

    @asynccontextmanager
    async def agent(
        self, node: str = "n1", gpus: int = 8, **options: object
    ) -> AsyncGenerator["TinyAgent"]:
        """A connected agent whose node is ready."""
        agent = TinyAgent(node, gpus, monotonic=self.clock.monotonic, **options)  # type: ignore[arg-type]
        async with agent.connected(self.channel):
            await agent.say(driver=READING, processes=[], samples=True, held=True)
            await until_true("the first acknowledgement", lambda: agent.acked > 0)
            yield agent


class Waiting:
    """A call that waits in the queue under this id."""

    def __init__(
        self, id_: str, call: "aio.UnaryStreamCall[Any, fleet_pb2.AllocateResponse]"
    ) -> None:
        self.id = id_
        self._call = call

    async def answer(self) -> types_pb2.Allocation:
        answer = await self._call.read()
        assert isinstance(answer, fleet_pb2.AllocateResponse)
        return answer.allocation

    async def failure(self) -> "Failure":
        return await failure_of(self.answer())

    def hang_up(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def serving(
    folder: Path,
    clock: JumpClock | None = None,
    open_store: OpenStore = Store,
    listen: Address = ANY_PORT,
    rebalance: RebalanceOptions | None = None,
    partitioning: Mapping[str, PartitioningOptions] | None = None,
) -> AsyncGenerator[Stage]:
    """An aggregator on the data in `folder`, and at the end an orderly stop."""
    clock = clock or JumpClock()
    moves = rebalance or RebalanceOptions()
    cuts = partitioning or {}
    settings = Settings(listen, ANY_PORT, folder, rebalance=moves, partitioning=cuts)
    aggregator = Aggregator(
        settings, version="9.9", clock=clock, notifier=Notifier({}), open_store=open_store
    )
    running = asyncio.create_task(aggregator.run())
    serving = asyncio.create_task(aggregator.is_serving.wait())
    await asyncio.wait([running, serving], return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    if running.done():
        running.result()
    try:
        async with aio.insecure_channel(str(aggregator.address), options=LOCAL) as channel:
            yield Stage(aggregator, channel, clock)
    finally:
        aggregator.stop()
        await running


# Channels of one process otherwise share a connection, and its back-off.
LOCAL = [("grpc.use_local_subchannel_pool", 1)]
READING = agent_pb2.DRIVER_STATE_READING


class TinyAgent:
    """Says hello, sends what it is told to send, and holds what it is told to hold, unless lazy."""

    def __init__(
        self,
        node: str = "n1",
        gpus: int = 8,
        *,
        incarnation: str = "",
        process_id: str = "",
        interval: float = 3600.0,  # so that no test depends on how quick it is
        held: Mapping[str, agent_pb2.HeldAllocation] | None = None,
        refuses: str = "",
        is_lazy: bool = False,
        sequence: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node = node
        self.gpus = [
            agent_pb2.Gpu(
                number=i + 1,
                uuid=f"GPU-{node}-{i}",
                model=H100,
                memory_total_bytes=80 * GIB,
                index=i,
                pci_bus_id=f"00000000:{i:02X}:00.0",
            )
            for i in range(gpus)
        ]
        self.incarnation = incarnation or f"journal of {node}"
        self.process_id = process_id or f"process of {node}"
        self.interval = interval
        self.held = dict(held or {})
        self.refuses = refuses
        self.is_lazy = is_lazy
        self.sequence = sequence
        self.monotonic = monotonic
        self.acks: list[int] = []
        self.welcome: agent_pb2.Welcome | None = None
        self.commands: list[agent_pb2.Command] = []
        self.ended: aio.AioRpcError | None = None
        self.on_relay: Callable[[mig_pb2.MigRelay], object] = lambda _: None
        self._call: aio.StreamStreamCall[agent_pb2.AgentMessage, agent_pb2.AggregatorMessage]

    @asynccontextmanager
    async def connected(self, channel: aio.Channel) -> AsyncGenerator[None]:
        """Hold a stream on which hello was said and the welcome has come."""
        self._call = agent_pb2_grpc.AgentLinkStub(channel).Connect()
        await self._call.write(agent_pb2.AgentMessage(hello=self.hello()))
        listening = asyncio.create_task(self._listen())
        try:
            await until_true("a welcome or an end", lambda: bool(self.welcome or self.ended))
            yield
        finally:
            listening.cancel()
            self._call.cancel()
            await asyncio.wait([listening])

    @property
    def acked(self) -> int:
        return self.acks[-1] if self.acks else 0

    def hello(self) -> agent_pb2.Hello:
        return agent_pb2.Hello(
            protocol_version=1,
            node=self.node,
            agent_version="0.1",
            incarnation=self.incarnation,
            first_sequence=self.sequence + 1,
            boot_id=f"boot of {self.node}",
            simulated=True,
            interval_seconds=self.interval,
            inventory=self.inventory(),
            held=agent_pb2.Held(allocations=self.held.values()),
            process_id=self.process_id,
            monotonic_seconds=self.monotonic(),
        )

    def inventory(self) -> agent_pb2.Inventory:
        return agent_pb2.Inventory(driver_version="570", cuda_version="12.8", gpus=self.gpus)

    async def say(
        self,
        *,
        samples: bool = False,
        held: bool = False,
        refusals: Mapping[str, str] | None = None,
        processes: Sequence[types_pb2.Process] | None = None,
        assignments: Sequence[types_pb2.Assignment] = (),
        driver: agent_pb2.DriverState.ValueType | None = None,
        ill: Mapping[str, types_pb2.GpuHealth] | None = None,
        mig: Sequence[mig_pb2.GpuMig] | None = None,
        inventory: bool = False,
    ) -> None:
        """Send the next frame; with `ill`, the verdicts on all GPUs: those by UUID, else well."""
        self.sequence += 1
        frame = agent_pb2.Frame(
            sequence=self.sequence, at=time.time(), monotonic_seconds=self.monotonic()
        )
        frame.commands_done = self.commands[-1].id if self.commands and not self.is_lazy else 0
        if samples:
            frame.samples.extend(make_sample(gpu.number) for gpu in self.gpus)
        if held:
            frame.held.allocations.extend(self.held.values())
            frame.held.SetInParent()
        for id_, reason in (refusals or {}).items():
            frame.refusals.add(allocation_id=id_, reason=reason)
        if processes is not None:
            frame.processes.started_at = time.time()
            frame.processes.processes.extend(processes)
            frame.processes.assignments.extend(assignments)
        if driver is not None:
            frame.driver.state = driver
        if ill is not None:
            well = {
                gpu.uuid: types_pb2.GpuHealth(
                    uuid=gpu.uuid,
                    verdict=types_pb2.GPU_VERDICT_HEALTHY,
                    action=types_pb2.REPAIR_ACTION_NONE,
                )
                for gpu in self.gpus
            }
            frame.health.gpus.extend((well | dict(ill)).values())
        if inventory:
            frame.inventory.CopyFrom(self.inventory())
        if mig is not None:
            frame.mig.gpus.extend(mig)
            frame.mig.SetInParent()
        await self.send(frame)

    async def send(self, frame: agent_pb2.Frame) -> None:
        """Send a frame as it is."""
        await self.write(agent_pb2.AgentMessage(frame=frame))

    async def write(self, message: agent_pb2.AgentMessage) -> None:
        """Send a message as it is."""
        await self._call.write(message)

    async def _listen(self) -> None:
        try:
            while isinstance(message := await self._call.read(), agent_pb2.AggregatorMessage):
                match message.WhichOneof("message"):
                    case "welcome":
                        self.welcome = message.welcome
                    case "ack":
                        self.acks.append(message.ack.sequence)
                    case "mig":
                        self.on_relay(message.mig)
                    case _:
                        await self._obey(message.command)
        except aio.AioRpcError as error:
            self.ended = error

    async def _obey(self, command: agent_pb2.Command) -> None:
        self.commands.append(command)
        if self.is_lazy:
            return
        if command.HasField("drop"):
            self.held.pop(command.drop.allocation_id, None)
            await self.say(held=True)
        elif self.refuses:
            await self.say(held=True, refusals={command.hold.allocation.id: self.refuses})
        else:
            self.held[command.hold.allocation.id] = command.hold.allocation
            await self.say(held=True)


def make_sample(number: int) -> agent_pb2.GpuSample:
    return agent_pb2.GpuSample(
        number=number,
        memory_used_bytes=GIB,
        memory_reserved_bytes=0,
        utilization_ratio=0.5,
        temperature_celsius=60.0,
        power_watts=300.0,
    )


def wish(key: str = "", wait: float = 0.0, **fields: object) -> fleet_pb2.AllocateRequest:
    """A right request, but for `fields`."""
    given = {"gpus": 1, "holder": "ann", "ttl_seconds": 60.0, **fields}
    request = types_pb2.Request(**given)  # type: ignore[arg-type]
    return fleet_pb2.AllocateRequest(request=request, idempotency_key=key, wait_seconds=wait)


class Failure:
    """What a call failed with: code, sentence, and the details of google.rpc."""

    def __init__(self, error: aio.AioRpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.sentence = error.details() or ""
        self.reason = ""
        self.fields: list[str] = []
        self.refusals: types_pb2.Refusals | None = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                assert isinstance(value, bytes)
                self._read(status_pb2.Status.FromString(value))

    def _read(self, status: status_pb2.Status) -> None:
        assert status.message == self.sentence
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        refusals = types_pb2.Refusals()
        for detail in status.details:
            if detail.Unpack(info):
                assert info.domain == "stoker"
                self.reason = info.reason
            elif detail.Unpack(request):
                self.fields = [each.field for each in request.field_violations]
            elif detail.Unpack(refusals):
                self.refusals = refusals


async def failure_of(call: Awaitable[object]) -> Failure:
    """Return what a call fails with; it is an error when it succeeds."""
    try:
        answer = await call
    except aio.AioRpcError as error:
        return Failure(error)
    raise AssertionError(f"it succeeded: {answer}")
