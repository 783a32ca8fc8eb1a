"""What clients can do with allocations: ask, wait, keep alive, give back, and be told why not."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import (
    GIB,
    H100,
    Failure,
    JumpClock,
    Stage,
    failure_of,
    serving,
    wish,
)
from tests.support.pages import fetch_metrics, read_page, total
from tests.support.waiting import until, until_true

from stoker.v1 import fleet_pb2, placing_pb2, types_pb2

WAITING = types_pb2.ALLOCATION_STATE_WAITING
GRANTED = types_pb2.ALLOCATION_STATE_GRANTED
RELEASING = types_pb2.ALLOCATION_STATE_RELEASING
ENDED = types_pb2.ALLOCATION_STATE_ENDED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


async def test_a_whole_gpu_is_granted_with_an_environment_that_works(stage: Stage) -> None:
    async with stage.agent() as agent:
        call = stage.fleet.Allocate(wish(labels={"job": "train"}))
        granted = (await call).allocation
        assert granted.state == GRANTED
        assert granted.node == "n1"
        (device,) = granted.devices
        assert (device.model, device.memory_bytes, device.exclusive) == (H100, 80 * GIB, True)
        assert dict(granted.env) == {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": device.uuid,
            "NVIDIA_VISIBLE_DEVICES": device.uuid,
            "STOKER_ALLOCATION_ID": granted.id,
            "STOKER_NODE": "n1",
        }
        assert granted.expires_at == pytest.approx(granted.granted_at + 60)
        assert dict(granted.request.labels) == {"job": "train"}
        assert ("stoker-allocation-id", granted.id) in tuple(await call.initial_metadata())
        await until_true("the node to hold it", lambda: granted.id in agent.held)
        await stage.release(granted.id, wait=10)
        assert agent.held == {}


async def test_shares_of_one_gpu_lie_side_by_side_and_never_exceed_it(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        first = await stage.allocate(memory_bytes=50 * GIB)
        assert first.env["STOKER_MEMORY_LIMIT_BYTES"] == str(50 * GIB)
        assert (first.devices[0].memory_bytes, first.devices[0].exclusive) == (50 * GIB, False)
        await stage.allocate(memory_bytes=30 * GIB)
        refused = await failure_of(stage.fleet.Allocate(wish(memory_bytes=1)))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_refusal_tells_every_node_and_its_filter(stage: Stage) -> None:
    async with stage.agent("n1", 8), stage.agent("n2", 2):
        await stage.fleet.Cordon(fleet_pb2.CordonRequest(node="n2", reason="Xid 79"))
        await stage.allocate(gpus=8)
        refused = await failure_of(stage.fleet.Allocate(wish(gpus=1)))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "CANNOT_PLACE"
        assert refused.refusals is not None
        assert refused.refusals.nodes_total == 2
        found = {
            each.node: (each.filter, each.wanted, each.found) for each in refused.refusals.nodes
        }
        assert found["n1"] == ("gpus_free", "1", "0")
        assert found["n2"][0] == "cordoned"
        assert "Xid 79" in refused.sentence


async def test_gpu_that_others_use_is_not_granted_and_its_user_is_named(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        foreign = types_pb2.Process(
            pid=4711,
            user="eve",
            command="python mine.py",
            gpu_uuid="GPU-n1-0",
            memory_used_bytes=GIB,
        )
        await agent.say(processes=[foreign])

        async def look() -> bool:
            return len((await stage.nodes())["n1"].gpus[0].processes) == 1

        await until("the process to be listed", look)
        refused = await failure_of(stage.fleet.Allocate(wish()))
        assert "PID 4711 (eve, python mine.py)" in refused.sentence


async def test_repeated_call_returns_the_same_allocation(stage: Stage) -> None:
    async with stage.agent(gpus=2):
        calls = [stage.fleet.Allocate(wish(key="k1")) for _ in range(5)]
        ids = {(await call).allocation.id for call in calls}
        assert len(ids) == 1
        assert len(await stage.allocations()) == 1


async def test_key_of_another_request_is_refused(stage: Stage) -> None:
    async with stage.agent(gpus=2):
        first = await stage.allocate(key="k1")
        refused = await failure_of(stage.fleet.Allocate(wish(key="k1", gpus=2)))
        assert refused.code is grpc.StatusCode.ALREADY_EXISTS
        assert refused.reason == "KEY_REUSED"
        assert first.id in refused.sentence


async def test_waiting_request_is_granted_when_room_comes(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        first = await stage.allocate()
        waiting = await stage.queue()
        told = await stage.explain(waiting.id)
        assert not told.placeable
        assert told.allocation.state == WAITING
        assert told.allocation.queue_position == 1
        assert told.refusals.nodes[0].filter == "gpus_free"
        assert "has waited" in told.summary
        await stage.release(first.id)
        granted = await waiting.answer()
        assert (granted.id, granted.state) == (waiting.id, GRANTED)


async def test_requests_are_served_in_order_and_priority_goes_first(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        held = await stage.allocate()
        order: list[str] = []

        async def queue(holder: str, priority: int) -> None:
            waiting = await stage.queue(holder=holder, priority=priority)
            queued.append(holder)
            granted = await waiting.answer()
            order.append(holder)
            await stage.release(granted.id)

        queued: list[str] = []
        async with asyncio.TaskGroup() as tasks:
            for number, (holder, priority) in enumerate((("a", 0), ("b", 0), ("c", 5)), 1):
                tasks.create_task(queue(holder, priority))
                await until_true("its place in the queue", lambda n=number: len(queued) == n)  # type: ignore[misc]
            await stage.release(held.id)
        assert order == ["c", "a", "b"]


async def test_wait_that_is_over_is_refused_with_the_reason(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        await stage.allocate(ttl_seconds=3600.0)
        waiting = await stage.queue("k1", wait=30)
        stage.clock.jump(31)
        refused = await waiting.failure()
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.sentence.startswith("waited 31s in the queue")
        assert refused.refusals is not None
        assert [each.filter for each in refused.refusals.nodes] == ["gpus_free"]
        # A client that did not hear the answer asks again and hears the same.
        again = await failure_of(stage.fleet.Allocate(wish(key="k1", wait=30)))
        assert (again.code, again.sentence) == (refused.code, refused.sentence)


async def test_waiting_request_can_be_taken_back(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        await stage.allocate()
        waiting = await stage.queue()
        await stage.release(waiting.id)
        failed = await waiting.failure()
        assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED, "NOT_GRANTED")
        assert "cancelled" in failed.sentence


async def test_client_that_hangs_up_keeps_its_place_for_a_moment_only(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        held = await stage.allocate(ttl_seconds=3600.0)
        waiting = await stage.queue("k1")
        waiting.hang_up()
        again = await stage.queue("k1")
        assert again.id == waiting.id
        again.hang_up()
        # Nobody is on the line, so what becomes free is not granted to nobody.
        await stage.release(held.id, wait=10)
        assert (await stage.explain(waiting.id)).allocation.state == WAITING
        stage.clock.jump(11)
        await stage.becomes(waiting.id, ENDED)
        assert "its client went away" in (await stage.explain(waiting.id)).summary


async def test_keep_alive_extends_a_lease_by_its_ttl(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate(ttl_seconds=100.0)
        await stage.clock.elapse(90)
        call = stage.fleet.KeepAlive()
        await call.write(fleet_pb2.KeepAliveRequest(allocation_id=granted.id))
        answer = await call.read()
        assert isinstance(answer, fleet_pb2.KeepAliveResponse)
        assert answer.state == GRANTED
        assert answer.expires_at >= granted.expires_at + 90
        await stage.clock.elapse(90)
        assert (await stage.allocations())[granted.id].state == GRANTED
        await call.done_writing()
        await stage.clock.elapse(11)
        await stage.becomes(granted.id, ENDED)


async def test_lease_without_keep_alive_ends_at_its_ttl_and_not_before(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        granted = await stage.allocate(ttl_seconds=100.0)
        await stage.clock.elapse(99)
        await asyncio.sleep(0.2)  # two ticks of the control loop: it had the chance to err
        assert (await stage.allocations())[granted.id].state == GRANTED
        await stage.clock.elapse(1)
        await stage.becomes(granted.id, ENDED)
        assert (await stage.allocations())[granted.id].ended_reason.startswith("expired")
        assert agent.held == {}
        call = stage.fleet.KeepAlive()
        for id_ in (granted.id, "nobody"):
            await call.write(fleet_pb2.KeepAliveRequest(allocation_id=id_))
            answer = await call.read()
            assert isinstance(answer, fleet_pb2.KeepAliveResponse)
            assert (answer.state, answer.HasField("expires_at")) == (ENDED, False)
            assert answer.ended_reason
        call.cancel()


async def test_lease_outlives_a_standstill_of_the_aggregator(stage: Stage) -> None:
    """Whoever kept it alive meanwhile could not be heard."""
    async with stage.agent(gpus=1):
        granted = await stage.allocate(ttl_seconds=100.0)
        stage.clock.jump(1000)
        await asyncio.sleep(0.2)  # two ticks of the control loop: it had the chance to err
        assert (await stage.allocations())[granted.id].state == GRANTED
        await stage.clock.elapse(101)
        await stage.becomes(granted.id, ENDED)


async def test_devices_are_free_only_when_the_node_has_let_go(stage: Stage) -> None:
    async with stage.agent(gpus=1, is_lazy=True) as agent:
        granted = await stage.allocate()
        given_up = await stage.release(granted.id)
        assert given_up.state == RELEASING
        assert (await failure_of(stage.fleet.Allocate(wish()))).reason == "CANNOT_PLACE"
        await until_true("the drop", lambda: any(c.HasField("drop") for c in agent.commands))
        agent.is_lazy = False
        await agent.say(held=True)
        await stage.becomes(granted.id, ENDED)
        await stage.allocate()
        # What has ended stays as it was.
        assert (await stage.release(granted.id)).ended_reason == "released"


async def test_release_waits_no_longer_than_it_was_asked_to(stage: Stage) -> None:
    async with stage.agent(gpus=1, is_lazy=True):
        granted = await stage.allocate()
        call = asyncio.ensure_future(stage.release(granted.id, wait=20))
        await stage.becomes(granted.id, RELEASING)
        stage.clock.jump(21)
        assert (await call).state == RELEASING


async def test_node_that_refuses_ends_the_allocation(stage: Stage) -> None:
    async with stage.agent(gpus=1, refuses="the journal is full"):
        granted = await stage.allocate()
        await stage.becomes(granted.id, ENDED)
        ended = (await stage.allocations())[granted.id]
        assert ended.ended_reason == "refused by node n1: the journal is full"
        page = read_page(await fetch_metrics(str(stage.aggregator.metrics_address)))
        assert total(page, "stoker_allocation_holds_refused_total") == 1


async def test_explain_tells_where_a_request_would_go(stage: Stage) -> None:
    async with stage.agent():
        request = wish(gpus=2).request
        told = await stage.fleet.Explain(placing_pb2.ExplainRequest(request=request))
        assert (told.placeable, told.node) == (True, "n1")
        assert "n1" in told.summary
        assert await stage.allocations() == {}
        granted = await stage.allocate()
        assert "granted on node n1" in (await stage.explain(granted.id)).summary


async def test_explain_tells_what_waits_ahead(stage: Stage) -> None:
    async with stage.agent(gpus=2):
        await stage.allocate()
        ahead = await stage.queue(gpus=2)
        told = await stage.fleet.Explain(placing_pb2.ExplainRequest(request=wish().request))
        assert not told.placeable
        assert [each.filter for each in told.refusals.nodes] == ["queue"]
        assert told.refusals.ahead == 1
        ahead.hang_up()


async def test_cordoned_node_takes_nothing_new_and_keeps_what_it_has(stage: Stage) -> None:
    async with stage.agent() as agent:
        granted = await stage.allocate()
        answer = await stage.fleet.Cordon(fleet_pb2.CordonRequest(node="n1", reason="fans"))
        assert answer.node.cordoned == "fans"
        refused = await failure_of(stage.fleet.Allocate(wish()))
        assert "cordoned: fans" in refused.sentence
        assert (await stage.allocations())[granted.id].state == GRANTED
        await until_true("the node to hold it", lambda: granted.id in agent.held)
        opened = await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1"))
        assert not opened.node.HasField("cordoned")
        await stage.allocate()


async def read_to_end(
    call: "aio.UnaryStreamCall[fleet_pb2.WatchRequest, fleet_pb2.WatchResponse]",
) -> None:
    while await call.read() is not aio.EOF:
        pass


async def test_client_that_waits_is_told_when_the_aggregator_stops(tmp_path: Path) -> None:
    clock = JumpClock()
    async with serving(tmp_path, clock) as stage, stage.agent(gpus=1):
        await stage.allocate()
        waiting = await stage.queue()
        watching = stage.fleet.Watch(fleet_pb2.WatchRequest(resource_version=1))
        await watching.read()  # it is under way
        stage.aggregator.stop()
        failed = await waiting.failure()
        assert failed.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(aio.AioRpcError) as caught:
            await read_to_end(watching)
        assert Failure(caught.value).code is grpc.StatusCode.UNAVAILABLE
