"""The agents' door: hello and resume, frames in order, acknowledgements, rivals, nonsense."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import (
    GIB,
    READING,
    Failure,
    JumpClock,
    Stage,
    TinyAgent,
    make_sample,
    serving,
)
from tests.support.pages import fetch_metrics, read_page
from tests.support.waiting import until, until_true

from stoker.v1 import agent_pb2, agent_pb2_grpc, fleet_pb2, types_pb2

READY = fleet_pb2.NODE_STATE_READY
STALE = fleet_pb2.NODE_STATE_STALE
DISCONNECTED = fleet_pb2.NODE_STATE_DISCONNECTED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


async def node_of(stage: Stage) -> fleet_pb2.Node:
    (node,) = (await stage.nodes()).values()
    return node


async def in_state(stage: Stage, state: "fleet_pb2.NodeState.ValueType") -> fleet_pb2.Node:
    async def look() -> fleet_pb2.Node | None:
        node = await node_of(stage)
        return node if node.state == state else None

    return await until("the node's state", look)


async def test_node_is_listed_with_what_its_agent_says(stage: Stage) -> None:
    async with stage.agent(gpus=2, interval=10.0):
        node = await node_of(stage)
        assert (node.name, node.state, node.state_reason) == ("n1", READY, "")
        assert (node.simulated, node.boot_id, node.agent_version) == (True, "boot of n1", "0.1")
        assert (node.driver_version, node.cuda_version) == ("570", "12.8")
        assert node.last_sample_at == pytest.approx(stage.clock.now(), abs=30)
        gpu = node.gpus[1]
        assert (gpu.uuid, gpu.index, gpu.memory_total_bytes) == ("GPU-n1-1", 1, 80 * GIB)
        assert (gpu.memory_used_bytes, gpu.temperature_celsius) == (GIB, 60.0)
        assert gpu.HasField("power_watts")
        assert not gpu.HasField("energy_joules"), "what was not read is absent"


async def test_values_of_a_silent_node_are_absent_and_it_takes_nothing(stage: Stage) -> None:
    async with stage.agent(gpus=1, interval=10.0) as agent:
        stage.clock.jump(31)
        node = await node_of(stage)
        assert node.state == STALE
        assert "beyond three intervals" in node.state_reason
        assert not node.gpus[0].HasField("memory_used_bytes")
        with pytest.raises(aio.AioRpcError) as caught:
            await stage.allocate()
        assert "newest sample" in Failure(caught.value).sentence
        await agent.say(samples=True)
        await in_state(stage, READY)
        await stage.allocate()
    node = await in_state(stage, DISCONNECTED)
    assert node.state_reason


async def test_node_without_its_driver_is_not_ready_and_says_why(stage: Stage) -> None:
    async with stage.agent() as agent:
        frame = agent_pb2.Frame(sequence=99, monotonic_seconds=time.monotonic())
        frame.driver.state = agent_pb2.DRIVER_STATE_BLOCKED
        frame.driver.reason = "nvmlDeviceGetMemoryInfo has not returned for 5 s"
        await agent.send(frame)
        node = await in_state(stage, STALE)
        assert node.state_reason == f"driver blocked: {frame.driver.reason}"


async def test_frames_are_taken_in_once_and_gaps_are_counted(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        seen = agent.sequence
        for sequence in (seen, seen + 1, seen + 1, seen + 5):
            frame = agent_pb2.Frame(sequence=sequence, monotonic_seconds=time.monotonic())
            frame.held.SetInParent()  # is acknowledged soon
            await agent.send(frame)
        await until_true("the last acknowledgement", lambda: agent.acked == seen + 5)
        page = await metrics_of(stage)
        assert page["stoker_frames_repeated_total"] == 2
        assert page["stoker_frames_gap_total"] == 3


async def test_agent_resumes_where_it_was_acknowledged(stage: Stage) -> None:
    async with stage.agent() as agent:
        acked = agent.acked
    again = TinyAgent()
    async with again.connected(stage.channel):
        assert again.welcome is not None
        assert (again.welcome.protocol_version, again.welcome.aggregator_version) == (1, "9.9")
        assert again.welcome.acked_sequence == acked
    with_lost_journal = TinyAgent(incarnation="another")
    async with with_lost_journal.connected(stage.channel):
        assert with_lost_journal.welcome is not None
        assert with_lost_journal.welcome.acked_sequence == 0


async def test_aggregator_that_was_restarted_knows_no_sequence(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent() as agent:
        assert agent.acked > 0
    async with serving(tmp_path) as stage:
        again = TinyAgent()
        async with again.connected(stage.channel):
            assert again.welcome is not None
            assert again.welcome.acked_sequence == 0


async def test_hello_that_says_nothing_new_is_not_written_down(stage: Stage) -> None:
    async with stage.agent():
        before = await version_of(stage)
    async with stage.agent(sequence=10):
        assert await version_of(stage) == before
    async with stage.agent(gpus=7, sequence=20):
        assert await version_of(stage) == before + 1


async def test_new_inventory_in_a_frame_is_registered_before_its_samples(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        frame = agent_pb2.Frame(sequence=agent.sequence + 1, monotonic_seconds=time.monotonic())
        frame.inventory.driver_version = "580"
        frame.inventory.gpus.append(
            agent_pb2.Gpu(number=7, uuid="GPU-new", model="T4", memory_total_bytes=GIB)
        )
        frame.samples.append(make_sample(7))
        await agent.send(frame)

        async def look() -> bool:
            node = await node_of(stage)
            return node.driver_version == "580" and node.gpus[0].HasField("temperature_celsius")

        await until("the new GPU", look)


async def test_agent_whose_driver_is_silent_keeps_its_known_gpus(stage: Stage) -> None:
    async with stage.agent(gpus=2):
        pass
    starting = TinyAgent(gpus=2)
    hello = starting.hello()
    hello.ClearField("inventory")
    call = agent_pb2_grpc.AgentLinkStub(stage.channel).Connect()
    await call.write(agent_pb2.AgentMessage(hello=hello))
    assert isinstance(await call.read(), agent_pb2.AggregatorMessage)
    assert len((await node_of(stage)).gpus) == 2
    call.cancel()


async def test_age_of_a_sample_is_told_by_monotonic_clocks(stage: Stage) -> None:
    """The node's wall clock is years off; a frame that lay in the outbox is as old as it is."""
    async with stage.agent(gpus=1, interval=10.0) as agent:
        late = agent_pb2.Frame(
            sequence=agent.sequence + 1, at=1.0, monotonic_seconds=agent.monotonic()
        )
        late.samples.append(make_sample(1))
        stage.clock.jump(25)  # so old it is when it comes, the interval being 10
        await agent.send(late)
        node = await in_state(stage, READY)
        assert stage.clock.now() - node.last_sample_at == pytest.approx(25, abs=5)


async def test_another_agent_under_a_live_name_is_refused(stage: Stage) -> None:
    async with stage.agent():
        rival = TinyAgent(incarnation="another journal", process_id="another")
        async with rival.connected(stage.channel):
            assert rival.ended is not None
            assert rival.ended.code() is grpc.StatusCode.ALREADY_EXISTS
            assert "n1" in (rival.ended.details() or "")
        assert (await node_of(stage)).state == READY


async def test_twin_from_the_same_image_is_refused_while_the_first_speaks(stage: Stage) -> None:
    async with stage.agent() as agent:
        twin = TinyAgent(process_id="another")

        async def speak() -> None:
            while True:
                await agent.say(samples=True)
                await asyncio.sleep(0.01)

        speaking = asyncio.create_task(speak())
        async with twin.connected(stage.channel):
            assert twin.ended is not None
            assert twin.ended.code() is grpc.StatusCode.ALREADY_EXISTS
        speaking.cancel()


async def test_restarted_agent_takes_over_from_a_line_that_is_silent(stage: Stage) -> None:
    async with stage.agent(interval=0.01) as agent:
        restarted = TinyAgent(process_id="another", interval=0.01)
        async with restarted.connected(stage.channel):
            assert restarted.welcome is not None
            await until_true("the end of the former line", lambda: agent.ended is not None)
            assert agent.ended is not None
            assert agent.ended.code() is grpc.StatusCode.ABORTED


async def test_agent_that_dials_again_replaces_its_own_stream(stage: Stage) -> None:
    async with stage.agent() as agent:
        again = TinyAgent(sequence=agent.sequence)
        async with again.connected(stage.channel):
            assert again.welcome is not None
            await until_true("the end of the former line", lambda: agent.ended is not None)
            await again.say(driver=READING, processes=[], samples=True)
            await in_state(stage, READY)


async def test_node_that_holds_what_nobody_granted_is_told_to_drop_it(stage: Stage) -> None:
    held = agent_pb2.HeldAllocation(
        id="stray", gpu_uuids=["GPU-gone"], holder="bob", ttl_seconds=60.0, held_since=1.0
    )
    async with stage.agent(held={"stray": held}) as agent:
        await until_true("the drop", lambda: agent.held == {})
        (command,) = agent.commands
        assert command.drop.allocation_id == "stray"


async def test_node_that_holds_what_the_ledger_lost_is_believed(stage: Stage) -> None:
    held = agent_pb2.HeldAllocation(
        id="kept", gpu_uuids=["GPU-n1-0"], holder="bob", ttl_seconds=60.0, held_since=1.0
    )
    async with stage.agent(held={"kept": held}, gpus=1):

        async def look() -> bool:
            return "kept" in await stage.allocations()

        await until("the adoption", look)
        adopted = (await stage.allocations())["kept"]
        assert adopted.state == types_pb2.ALLOCATION_STATE_GRANTED
        assert (adopted.request.holder, adopted.held_by_node) == ("bob", True)


def hello(change: Callable[[agent_pb2.Hello], object]) -> agent_pb2.AgentMessage:
    message = TinyAgent().hello()
    change(message)
    return agent_pb2.AgentMessage(hello=message)


@dataclass(frozen=True, slots=True)
class Bad:
    """A frame that cannot be, and the field that the answer names."""

    field: str
    change: Callable[[agent_pb2.Frame], object]


def held(frame: agent_pb2.Frame, **fields: object) -> None:
    right = {"id": "a", "gpu_uuids": ["GPU-n1-0"], "ttl_seconds": 1.0}
    frame.held.allocations.add(**{**right, **fields})


def held_twice(frame: agent_pb2.Frame) -> None:
    held(frame)
    held(frame)


NAN = float("nan")
BAD_FRAMES = {
    "without a number": Bad("frame.sequence", lambda f: f.ClearField("sequence")),
    "reading that is no number": Bad(
        "frame.samples[0].power_watts", lambda f: f.samples.add(number=1, power_watts=NAN)
    ),
    "energy without end": Bad(
        "frame.samples[1].energy_joules",
        lambda f: f.samples.extend(
            [make_sample(1), agent_pb2.GpuSample(number=2, energy_joules=float("inf"))]
        ),
    ),
    "unknown driver state": Bad("frame.driver.state", lambda f: f.driver.SetInParent()),
    "allocation without an id": Bad("frame.held.allocations[0].id", lambda f: held(f, id="")),
    "allocation held twice": Bad("frame.held.allocations[].id", held_twice),
    "share of two GPUs": Bad(
        "frame.held.allocations[0].memory_bytes",
        lambda f: held(f, gpu_uuids=["a", "b"], memory_bytes=1),
    ),
    "share of nothing": Bad(
        "frame.held.allocations[0].memory_bytes", lambda f: held(f, memory_bytes=0)
    ),
    "no GPU": Bad("frame.held.allocations[0].gpu_uuids", lambda f: held(f, gpu_uuids=[])),
    "GPU twice": Bad("frame.held.allocations[0].gpu_uuids", lambda f: held(f, gpu_uuids=["a"] * 2)),
    "negative TTL": Bad(
        "frame.held.allocations[0].ttl_seconds", lambda f: held(f, ttl_seconds=-1.0)
    ),
    "number of two GPUs": Bad(
        "frame.inventory.gpus[].number",
        lambda f: f.inventory.gpus.extend(
            [agent_pb2.Gpu(number=1, uuid="a"), agent_pb2.Gpu(number=1, uuid="b")]
        ),
    ),
    "GPU without a UUID": Bad(
        "frame.inventory.gpus[0].uuid", lambda f: f.inventory.gpus.add(number=1)
    ),
    "too many GPUs": Bad(
        "frame.inventory.gpus",
        lambda f: f.inventory.gpus.extend(
            [agent_pb2.Gpu(number=n, uuid=str(n)) for n in range(65)]
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_malformed_frame_ends_the_stream_and_leaves_the_node(name: str, stage: Stage) -> None:
    bad = BAD_FRAMES[name]
    async with stage.agent(gpus=2) as agent:
        before = await version_of(stage)
        frame = agent_pb2.Frame(sequence=99, monotonic_seconds=time.monotonic())
        bad.change(frame)
        await agent.send(frame)
        await until_true("the end of the stream", lambda: agent.ended is not None)
        assert agent.ended is not None
        failure = Failure(agent.ended)
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.fields == [bad.field]
        node = await in_state(stage, DISCONNECTED)
        assert bad.field in node.state_reason
        assert await version_of(stage) == before


async def test_second_hello_on_a_stream_is_malformed(stage: Stage) -> None:
    call = agent_pb2_grpc.AgentLinkStub(stage.channel).Connect()
    for _ in range(2):
        await call.write(hello(lambda message: None))
    assert isinstance(await call.read(), agent_pb2.AggregatorMessage)
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert Failure(caught.value).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_stream_without_a_hello_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.sessions.HELLO_SECONDS", 0.05)
    async with serving(tmp_path, JumpClock()) as stage:
        call = agent_pb2_grpc.AgentLinkStub(stage.channel).Connect()
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert Failure(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_node_that_does_not_take_its_commands_is_cut_off_and_told_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.sessions.COMMANDS_QUEUED_MAX", 0)
    async with stage.agent(gpus=1) as agent:
        granted = await stage.allocate()
        await until_true("the end of the stream", lambda: agent.ended is not None)
        assert agent.ended is not None
        assert agent.ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        sequence = agent.sequence
    monkeypatch.undo()
    async with stage.agent(gpus=1, sequence=sequence) as again:
        await until_true("the hold", lambda: granted.id in again.held)


async def test_agents_are_told_when_the_aggregator_stops(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent() as agent:
        stage.aggregator.stop()
        await until_true("the end of the stream", lambda: agent.ended is not None)
        assert agent.ended is not None
        assert agent.ended.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in (agent.ended.details() or "")


async def version_of(stage: Stage) -> int:
    return (await stage.fleet.ListNodes(fleet_pb2.ListNodesRequest())).resource_version


async def metrics_of(stage: Stage) -> dict[str, float]:
    page = read_page(await fetch_metrics(str(stage.aggregator.metrics_address)))
    return {name: sum(values.values()) for name, values in page.items()}
