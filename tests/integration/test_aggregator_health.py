"""Health at the aggregator's doors: verdicts in, cordons and refusals out, drains, restarts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.integration.aggregator_stage import Stage, failure_of, serving, wish
from tests.support.waiting import until, until_true

from stoker.v1 import fleet_pb2, placing_pb2, types_pb2

GPU = "GPU-n1-3"
XID = types_pb2.GpuHealth(
    uuid=GPU,
    verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
    action=types_pb2.REPAIR_ACTION_REBOOT,
    check="xid",
    reason="Xid 79: the GPU has fallen off the bus",
    since=1.5,
    faults=[
        types_pb2.HealthFault(
            check="xid",
            code="79",
            verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
            action=types_pb2.REPAIR_ACTION_REBOOT,
            reason="Xid 79: the GPU has fallen off the bus",
            since=1.5,
            last_at=1.5,
            count=1,
        )
    ],
)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


async def health(stage: Stage, *, all_of_them: bool = False) -> fleet_pb2.ListHealthResponse:
    return await stage.fleet.ListHealth(fleet_pb2.ListHealthRequest(include_healthy=all_of_them))


async def cordons(stage: Stage) -> dict[str, str]:
    nodes = (await stage.nodes()).values()
    return {g.uuid: g.cordon.reason for n in nodes for g in n.gpus if g.HasField("cordon")}


async def cordoned(stage: Stage, *uuids: str) -> None:
    """Return once exactly these GPUs are cordoned."""

    async def look() -> bool:
        return (await cordons(stage)).keys() == set(uuids)

    await until(f"{uuids} to be cordoned", look)


async def test_unhealthy_gpu_is_cordoned_told_and_used_again(stage: Stage) -> None:
    async with stage.agent() as agent:
        await agent.say(ill={GPU: XID})
        await cordoned(stage, GPU)
        refused = await failure_of(stage.allocate(gpus=8))
        assert "GPU 3 is cordoned: Xid 79: the GPU has fallen off the bus (for " in refused.sentence
        assert refused.refusals is not None
        assert refused.refusals.nodes[0].filter == "gpus_cordoned"
        gpu = (await stage.nodes())["n1"].gpus[3]
        assert gpu.health == XID
        assert gpu.cordon.by_health
        told = await health(stage)
        (row,) = told.gpus
        assert (row.node, row.uuid, row.index, row.pci_bus_id, row.health) == (
            *("n1", GPU, 3, "00000000:03:00.0", XID),
        )
        assert (told.gpus_total, told.cordoned_by_health, told.cordoned_by_health_max) == (8, 1, 1)
        assert told.resource_version > 0
        assert len((await health(stage, all_of_them=True)).gpus) == 8
        await agent.say(ill={})
        await until("it to be well", lambda: _is_well(stage))
        assert (await cordons(stage)).keys() == {GPU}, "it may come back"
        await until_true("that to be on disk", lambda: agent.acked == agent.sequence)
        await stage.clock.elapse(61.0)
        await agent.say(samples=True)
        await cordoned(stage)
        assert len((await stage.allocate(gpus=8)).devices) == 8


async def _is_well(stage: Stage) -> bool:
    (row,) = (await health(stage)).gpus
    return row.health.verdict == types_pb2.GPU_VERDICT_HEALTHY


async def test_what_is_beyond_the_share_is_told_with_the_reason(stage: Stage) -> None:
    async with stage.agent() as agent:
        ill = {f"GPU-n1-{i}": _like(XID, f"GPU-n1-{i}") for i in (1, 2)}
        await agent.say(ill=ill)
        await cordoned(stage, "GPU-n1-1")
        withheld = {row.uuid: row.cordon_withheld for row in (await health(stage)).gpus}
        assert withheld["GPU-n1-1"] == ""
        assert withheld["GPU-n1-2"].startswith("1 of 8 GPUs are cordoned for their health already")


async def test_gpu_that_its_node_misses_is_listed(stage: Stage) -> None:
    async with stage.agent() as agent:
        await agent.say(ill={"GPU-gone": _like(XID, "GPU-gone")})

        async def look() -> bool:
            return [row.uuid for row in (await health(stage)).gpus] == ["GPU-gone"]

        await until("it to be listed", look)
        (row,) = (await health(stage)).gpus
        assert (row.node, row.model, row.HasField("cordon")) == ("n1", "", False)


async def test_restart_keeps_verdicts_and_cordons(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent() as agent:
        await agent.say(ill={GPU: XID})
        await cordoned(stage, GPU)
        await stage.fleet.Cordon(_cordon("fan is loud", "GPU-n1-0"))
        drain = fleet_pb2.DrainRequest(node="n1", reason="fans", grace_seconds=900.0)
        drain_at = (await stage.fleet.Drain(drain)).node.drain_at
        before = await health(stage)
    async with serving(tmp_path) as stage:
        after = await health(stage)
        assert after == before
        node = (await stage.nodes())["n1"]
        assert (node.cordoned, node.drain_at) == ("fans", drain_at)
        async with stage.agent(sequence=agent.sequence):
            assert (await cordons(stage)).keys() == {GPU, "GPU-n1-0"}


async def test_operator_cordons_and_uncordons_one_gpu(stage: Stage) -> None:
    async with stage.agent() as agent:
        answer = await stage.fleet.Cordon(_cordon("fan is loud", GPU))
        assert answer.node.gpus[3].cordon.reason == "fan is loud"
        assert not answer.node.gpus[3].cordon.by_health
        assert not answer.node.HasField("cordoned")
        assert len((await stage.allocate(gpus=7)).devices) == 7
        opened = await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1", gpu_uuid=GPU))
        assert not opened.node.gpus[3].HasField("cordon")
        # One by health, undone by a person, is not done again for the same fault.
        await agent.say(ill={GPU: XID})
        await cordoned(stage, GPU)
        await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1", gpu_uuid=GPU))
        (row,) = (await health(stage)).gpus
        assert row.cordon_withheld == "an operator has un-cordoned it knowing of this fault"


async def test_gpu_that_a_node_does_not_have_is_not_found(stage: Stage) -> None:
    async with stage.agent(gpus=2):
        for call in (
            stage.fleet.Cordon(_cordon("r", "GPU-x")),
            stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1", gpu_uuid="GPU-x")),
            stage.fleet.Drain(fleet_pb2.DrainRequest(node="n1", reason="r", gpu_uuid="GPU-x")),
        ):
            refused = await failure_of(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
            assert refused.sentence == (
                "GPU GPU-x of node n1 is not known: it has GPU-n1-0 (GPU 0), GPU-n1-1 (GPU 1)"
            )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (fleet_pb2.DrainRequest(node="n1"), "reason"),
        (fleet_pb2.DrainRequest(reason="r"), "node"),
        (fleet_pb2.DrainRequest(node="n1", reason="r", gpu_uuid="x" * 129), "gpu_uuid"),
        (fleet_pb2.DrainRequest(node="n1", reason="r", grace_seconds=-1.0), "grace_seconds"),
        (fleet_pb2.DrainRequest(node="n1", reason="r", grace_seconds=2.6e6), "grace_seconds"),
        (
            fleet_pb2.DrainRequest(node="n1", reason="r", grace_seconds=float("nan")),
            "grace_seconds",
        ),
    ],
)
async def test_drain_that_cannot_be_is_refused(
    stage: Stage, message: fleet_pb2.DrainRequest, field: str
) -> None:
    refused = await failure_of(stage.fleet.Drain(message))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_drain_ends_what_is_held_and_tells_its_holder(stage: Stage) -> None:
    async with stage.agent():
        mine = await stage.allocate(gpus=2, ttl_seconds=86_400.0)
        other = await stage.allocate(gpus=1, ttl_seconds=86_400.0)
        uuid = mine.devices[0].uuid
        drain = fleet_pb2.DrainRequest(node="n1", reason="hot", gpu_uuid=uuid, grace_seconds=300.0)
        answer = await stage.fleet.Drain(drain)
        assert answer.node.gpus[0].cordon.drain_at > answer.node.gpus[0].cordon.at + 299.0
        stage.clock.jump(301.0)
        await stage.becomes(mine.id, types_pb2.ALLOCATION_STATE_ENDED)
        allocations = await stage.allocations()
        assert allocations[mine.id].ended_reason == "drained: hot"
        assert allocations[other.id].state == types_pb2.ALLOCATION_STATE_GRANTED


async def test_gpu_that_others_have_handed_out_is_not_free(stage: Stage) -> None:
    held = types_pb2.Assignment(gpu_uuid=GPU, by="kubelet", holder="pod ml/train-0")
    async with stage.agent() as agent:
        await agent.say(processes=[], assignments=[held])
        await until("it to be told", lambda: _is_assigned(stage))
        assert list((await stage.nodes())["n1"].gpus[3].assignments) == [held]
        refused = await failure_of(stage.fleet.Allocate(wish(gpus=8)))
        assert "GPU 3 is handed out by kubelet: pod ml/train-0" in refused.sentence
        await agent.say(processes=[])
        await until("it to be free", lambda: _is_free(stage))


async def _is_assigned(stage: Stage) -> bool:
    return len((await stage.nodes())["n1"].gpus[3].assignments) > 0


async def _is_free(stage: Stage) -> bool:
    request = types_pb2.Request(gpus=8, holder="ann", ttl_seconds=60.0)
    asked = placing_pb2.ExplainRequest(request=request)
    return (await stage.fleet.Explain(asked)).placeable


async def test_watch_tells_of_verdicts_and_cordons_as_changes_of_the_node(stage: Stage) -> None:
    async with stage.agent(gpus=1) as agent:
        call = stage.fleet.Watch(fleet_pb2.WatchRequest(resource_version=1))
        await call.initial_metadata()
        await agent.say(ill={"GPU-n1-0": _like(XID, "GPU-n1-0")})
        seen: list[fleet_pb2.WatchResponse] = []
        async with asyncio.timeout(10):
            while len(seen) < 2:
                change = await call.read()
                assert isinstance(change, fleet_pb2.WatchResponse)
                seen.append(change)
        assert [(each.event, each.node.name) for each in seen] == [
            ("GpuHealthChanged", "n1"),
            ("GpuCordoned", "n1"),
        ]
        assert seen[1].node.gpus[0].cordon.by_health
        call.cancel()


async def test_frame_with_health_is_acknowledged_when_it_is_on_disk(stage: Stage) -> None:
    async with stage.agent() as agent:
        await agent.say(ill={GPU: XID})
        await until_true("it to be acknowledged", lambda: agent.acked == agent.sequence)
        assert (await health(stage)).gpus[0].health == XID


async def test_health_that_cannot_be_ends_the_stream(stage: Stage) -> None:
    async with stage.agent() as agent:
        await agent.say(ill={GPU: types_pb2.GpuHealth(uuid=GPU)})
        await until_true("the stream to end", lambda: agent.ended is not None)
        assert agent.ended is not None
        assert "frame.health.gpus[3].verdict" in (agent.ended.details() or "")


def _like(health: types_pb2.GpuHealth, uuid: str) -> types_pb2.GpuHealth:
    other = types_pb2.GpuHealth()
    other.CopyFrom(health)
    other.uuid = uuid
    return other


def _cordon(reason: str, uuid: str) -> fleet_pb2.CordonRequest:
    return fleet_pb2.CordonRequest(node="n1", reason=reason, gpu_uuid=uuid)
