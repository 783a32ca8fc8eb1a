"""Partitions of GPUs through the aggregator: asked about, answered, refused, cut off midway."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import (
    H100,
    READING,
    Failure,
    Stage,
    TinyAgent,
    failure_of,
    serving,
    wish,
)
from tests.support.waiting import until, until_true

from stoker.aggregator.cuts import PartitioningOptions
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.relays import ANSWER_SECONDS
from stoker.aggregator.wire_mig import gpu_mig_message
from stoker.core.mig.boards import board_of
from stoker.v1 import agent_pb2, fleet_pb2, mig_pb2, types_pb2

HALF = mig_pb2.MigEntry(mig_enabled=True, mig_devices={"3g.40gb": 2})
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
UNAVAILABLE, REFUSED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION
ENDED = types_pb2.ALLOCATION_STATE_ENDED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncGenerator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


def request(node: str = "n1", **fields: Any) -> mig_pb2.MigRequest:
    """A wish to partition a node, right but for `fields`."""
    right: dict[str, Any] = {
        "verb": mig_pb2.MIG_VERB_APPLY,
        "operation_id": "op-1",
        "entries": [HALF],
    }
    right["entries"] = [HALF]
    return mig_pb2.MigRequest(node=node, ask=mig_pb2.MigAsk(**(right | fields)))


def call(stage: Stage, message: mig_pb2.MigRequest) -> "asyncio.Task[mig_pb2.MigResponse]":
    async def answered() -> mig_pb2.MigResponse:
        return await stage.fleet.Mig(message)

    return asyncio.create_task(answered())


async def refused(calling: "asyncio.Task[mig_pb2.MigResponse]") -> Failure:
    return await failure_of(calling)


class Asked:
    """An agent that keeps the questions that reach it, and answers when it is told to."""

    def __init__(self, agent: TinyAgent) -> None:
        self.relays: list[mig_pb2.MigRelay] = []
        self._agent = agent
        agent.on_relay = self.relays.append

    async def next(self) -> mig_pb2.MigRelay:
        await until_true("a question", lambda: bool(self.relays))
        return self.relays.pop(0)

    async def answer(self, id_: int, report: str = "", refusal: str = "") -> None:
        answer = mig_pb2.MigAnswer(id=id_, report_json=report, refusal=refusal)
        await self._agent.write(agent_pb2.AgentMessage(mig=answer))


async def test_a_wish_goes_to_the_agent_and_its_report_comes_back(stage: Stage) -> None:
    async with stage.agent() as agent:
        asked = Asked(agent)
        calling = call(stage, request(config="half", gpus=["0"], drain_seconds=60.0, evict=True))
        relay = await asked.next()
        assert relay.ask == request(config="half", gpus=["0"], drain_seconds=60.0, evict=True).ask
        await asked.answer(relay.id, '{"node": "n1"}')
        assert (await calling).report_json == '{"node": "n1"}'


async def test_answers_find_who_asked_in_whatever_order_they_come(stage: Stage) -> None:
    async with stage.agent() as agent:
        asked = Asked(agent)
        calls = {name: call(stage, request(operation_id=name)) for name in ("a", "b", "c")}
        ids = {relay.ask.operation_id: relay.id for relay in [await asked.next() for _ in calls]}
        for name in ("c", "a", "b"):
            await asked.answer(ids[name], f'"{name}"')
        assert {name: (await each).report_json for name, each in calls.items()} == {
            name: f'"{name}"' for name in calls
        }


async def test_an_agents_refusal_is_told_with_its_reason(stage: Stage) -> None:
    async with stage.agent() as agent:
        asked = Asked(agent)
        calling = call(stage, request())
        await asked.answer((await asked.next()).id, refusal="process 4711 (python, bob) is on it")
        failure = await refused(calling)
        assert (failure.code, failure.reason) == (REFUSED, "MIG_REFUSED")
        assert failure.sentence == "n1: process 4711 (python, bob) is on it"


async def test_nobody_is_asked_who_is_not_there(stage: Stage) -> None:
    failure = await refused(call(stage, request("nowhere")))
    assert (failure.code, failure.reason) == (NOT_FOUND, "NOT_FOUND")
    async with stage.agent():
        pass
    await until("the end of the stream", lambda: _is_gone(stage, "n1"))
    failure = await refused(call(stage, request()))
    assert (failure.code, failure.reason) == (UNAVAILABLE, "NOT_CONNECTED")
    assert "node n1 is not connected: " in failure.sentence


async def _is_gone(stage: Stage, node: str) -> bool:
    state = (await stage.nodes())[node].state
    return state == fleet_pb2.NODE_STATE_DISCONNECTED


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("node", request("n 1")),
        ("ask.verb", request(verb=mig_pb2.MIG_VERB_UNSPECIFIED)),
        ("ask.operation_id", request(operation_id="")),
        ("ask.entries", request(entries=[])),
    ],
)
async def test_what_cannot_be_asked_is_named_and_no_agent_hears_of_it(
    stage: Stage, field: str, wrong: mig_pb2.MigRequest
) -> None:
    async with stage.agent() as agent:
        asked = Asked(agent)
        failure = await refused(call(stage, wrong))
        assert (failure.code, failure.fields) == (INVALID, [field])
        calling = call(stage, request(operation_id="next"))
        relay = await asked.next()
        assert relay.ask.operation_id == "next"
        await asked.answer(relay.id, "{}")
        await calling


async def test_a_stream_that_ends_meanwhile_is_told_and_the_wish_can_be_repeated(
    stage: Stage,
) -> None:
    async with stage.agent(sequence=0) as agent:
        calling = call(stage, request())
        await Asked(agent).next()
    failure = await refused(calling)
    assert (failure.code, failure.reason) == (UNAVAILABLE, "NOT_CONNECTED")
    async with stage.agent(sequence=1) as agent:
        asked = Asked(agent)
        calling = call(stage, request())
        relay = await asked.next()
        assert relay.ask.operation_id == "op-1"
        await asked.answer(relay.id, "{}")
        assert (await calling).report_json == "{}"


async def test_an_agent_that_does_not_answer_is_not_waited_for_and_may_answer_late(
    stage: Stage,
) -> None:
    async with stage.agent() as agent:
        asked = Asked(agent)
        calling = call(stage, request())
        late = await asked.next()
        stage.clock.jump(ANSWER_SECONDS)
        failure = await refused(calling)
        assert (failure.code, failure.reason) == (UNAVAILABLE, "NO_ANSWER")
        await asked.answer(late.id, "{}")
        calling = call(stage, request())
        await asked.answer((await asked.next()).id, '"in time"')
        assert (await calling).report_json == '"in time"'


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("mig.id", mig_pb2.MigAnswer(id=7, report_json="{}")),
        ("mig.id", mig_pb2.MigAnswer(report_json="{}")),
        ("mig: must be either", mig_pb2.MigAnswer(id=1)),
        ("mig: must be either", mig_pb2.MigAnswer(id=1, report_json="{}", refusal="no")),
    ],
    ids=["never asked", "no question", "nothing", "both"],
)
async def test_an_answer_that_cannot_be_ends_the_stream(
    stage: Stage, said: str, answer: mig_pb2.MigAnswer
) -> None:
    async with stage.agent() as agent:
        calling = call(stage, request())
        await Asked(agent).next()
        await agent.write(agent_pb2.AgentMessage(mig=answer))
        assert (await refused(calling)).code is UNAVAILABLE
        await until_true("the end of the stream", lambda: agent.ended is not None)
        assert agent.ended is not None
        assert agent.ended.code() is INVALID
        assert said in (agent.ended.details() or "")


# --- what agents tell of their partitions


def cleared(agent: TinyAgent, leave_by: float | None = None, **fields: Any) -> mig_pb2.GpuMig:
    """The agent's first GPU, which is being cleared."""
    draining: dict[str, Any] = {
        "state": mig_pb2.MIG_STATE_DRAINING,
        "reason": "1 allocation is in the way",
        "config": "half",
        "operation_id": "op-1",
        "is_withheld": True,
        "leave_by": leave_by,
    }
    return mig_pb2.GpuMig(gpu_uuid=agent.gpus[0].uuid, **(draining | fields))


async def test_a_gpu_that_is_partitioned_anew_is_shown_and_not_granted(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        await agent.say(mig=[cleared(agent)])

        async def is_told() -> bool:
            return (await stage.nodes())["n1"].gpus[0].HasField("mig")

        await until("the partitions", is_told)
        (gpu,) = (await stage.nodes())["n1"].gpus
        assert (gpu.mig.state, gpu.mig.config) == (mig_pb2.MIG_STATE_DRAINING, "half")
        failure = await failure_of(stage.fleet.Allocate(wish()))
        assert failure.refusals is not None
        (refusal,) = failure.refusals.nodes
        assert refusal.filter == "mig_withheld"
        waiting = await stage.queue()
        done = cleared(agent, state=mig_pb2.MIG_STATE_SUCCESS, is_withheld=False)
        await agent.say(mig=[done])
        assert (await waiting.answer()).id == waiting.id


class Holding:
    """A client that keeps an allocation alive."""

    def __init__(self, stage: Stage, id_: str) -> None:
        self._id = id_
        self._call: aio.StreamStreamCall[Any, Any] = stage.fleet.KeepAlive()

    async def beat(self) -> fleet_pb2.KeepAliveResponse:
        await self._call.write(fleet_pb2.KeepAliveRequest(allocation_id=self._id))
        answer = await self._call.read()
        assert isinstance(answer, fleet_pb2.KeepAliveResponse)
        return answer


async def test_a_holder_is_asked_to_leave_and_is_made_to_when_the_time_is_over(
    stage: Stage,
) -> None:
    async with stage.agent(gpus=1) as agent:
        mine = await stage.allocate(ttl_seconds=3600.0)
        await until_true("the hold", lambda: mine.id in agent.held)
        holder = Holding(stage, mine.id)
        assert not (await holder.beat()).HasField("leave")
        leave_by = stage.clock.now() + 60.0
        asked = cleared(agent, leave_by, is_evicting=True, leaving_allocation_ids=[mine.id])
        await agent.say(mig=[asked])

        async def is_asked() -> bool:
            return (await holder.beat()).HasField("leave")

        await until("the request to leave", is_asked)
        leave = (await holder.beat()).leave
        assert leave.is_evicting
        assert leave.leave_by == pytest.approx(leave_by, abs=5.0)
        assert leave.reason == (
            "GPU 0 is to be partitioned anew as MIG layout 'half' (operation op-1) on node n1"
        )
        await stage.clock.elapse(66.0)
        await stage.becomes(mine.id, ENDED)
        told = (await stage.allocations())[mine.id]
        assert told.ended_reason == (
            "drained: GPU 0 is to be partitioned anew as MIG layout 'half' (operation op-1)"
        )
        assert not (await holder.beat()).HasField("leave")
        assert mine.id not in agent.held


# --- partitioning by demand


def as_cut(agent: TinyAgent, *instances: mig_pb2.MigInstance, **fields: Any) -> mig_pb2.GpuMig:
    """The agent's first GPU, an H100 that is cut so."""
    board = board_of(0, H100)
    assert board is not None
    told = GpuMig(agent.gpus[0].uuid, geometry=board.geometry, layout=())
    message = gpu_mig_message(told)
    assert message is not None
    message.layout.instances.extend(instances)
    message.MergeFrom(mig_pb2.GpuMig(**fields))
    return message


async def _pass_until_asked(stage: Stage, asked: Asked) -> None:
    async def is_asked() -> bool:
        await stage.clock.elapse(1.0)
        return bool(asked.relays)

    await until("a question for what waits", is_asked)


async def test_a_gpu_is_cut_for_what_waits_and_that_is_granted(tmp_path: Path) -> None:
    options = PartitioningOptions(is_automatic=True, hysteresis_seconds=1.0)
    async with (
        serving(tmp_path, partitioning={"": options}) as stage,
        stage.agent(gpus=1) as agent,
    ):
        asked = Asked(agent)
        (gpu,) = agent.gpus
        gpu.mig_enabled = True
        await agent.say(
            mig=[as_cut(agent)], inventory=True, samples=True, processes=[], driver=READING
        )
        waiting = await stage.queue(mig_profile="3g.40gb")
        await _pass_until_asked(stage, asked)
        relay = await asked.next()
        (entry,) = relay.ask.entries
        assert (dict(entry.mig_devices), list(relay.ask.gpus)) == ({"3g.40gb": 1}, [gpu.uuid])
        await asked.answer(relay.id, "{}")
        gpu.mig_devices.add(
            uuid="MIG-1", profile="3g.40gb", memory_total_bytes=40 << 30, gpu_instance_id=2
        )
        half = mig_pb2.MigInstance(profile="3g.40gb", start=4, size=4)
        done = as_cut(
            agent, half, state=mig_pb2.MIG_STATE_SUCCESS, operation_id=relay.ask.operation_id
        )
        await agent.say(mig=[done], inventory=True, samples=True, processes=[])
        granted = await waiting.answer()
        assert granted.devices[0].mig_device_uuid == "MIG-1"
