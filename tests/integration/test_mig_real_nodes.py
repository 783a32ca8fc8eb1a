"""Partitions of real agents, through a real aggregator; only the driver is simulated."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import aio
from tests.support.daemons import Stage
from tests.support.waiting import until

from stoker.client import AsyncFleet
from stoker.v1 import fleet_pb2, fleet_pb2_grpc, mig_pb2

# Others may not change partitions.
pytestmark = [pytest.mark.root, pytest.mark.slow]

BY_DEMAND = {"STOKER_AGGREGATOR_MIG_POOLS": "train=automatic wait=1s whole_gpus=1"}
QUICK = ("--pool", "train", "--interval", "0.2s", "--processes-interval", "0.5s")


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """An aggregator that cuts GPUs of pool `train` by demand."""
    async with Stage(tmp_path) as stage:
        await stage.aggregator(environment=BY_DEMAND).start()
        yield stage


@pytest.fixture
async def fleet(stage: Stage) -> AsyncIterator[AsyncFleet]:
    async with stage.fleet() as fleet:
        yield fleet


async def test_a_gpu_is_cut_for_who_waits_and_another_stays_whole(
    stage: Stage, fleet: AsyncFleet
) -> None:
    await stage.agent("n1", "2xH100-80GB", *QUICK).start()
    half = await fleet.request(mig="3g.40gb", wait="60s", pool="train")
    small = await fleet.request(mig="1g.10gb", wait="60s", pool="train")
    assert [each.mig_profile for each in (*half.devices, *small.devices)] == ["3g.40gb", "1g.10gb"]
    assert half.devices[0].uuid == small.devices[0].uuid, "beside what is in use"
    whole = await fleet.request(gpus=1, pool="train")
    assert whole.devices[0].uuid != half.devices[0].uuid


async def test_who_does_not_leave_is_released_and_the_gpu_partitioned(
    stage: Stage, fleet: AsyncFleet
) -> None:
    await stage.agent("n1", "1xH100-80GB", *QUICK).start()
    mine = await fleet.request(gpus=1, wait="20s", ttl="1h")
    half = mig_pb2.MigEntry(mig_enabled=True, mig_devices={"3g.40gb": 2})
    ask = mig_pb2.MigAsk(
        verb=mig_pb2.MIG_VERB_APPLY,
        operation_id="op-1",
        config="halves",
        entries=[half],
        drain_seconds=1.0,
        evict=True,
    )
    async with aio.insecure_channel(stage.address) as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        await stub.Mig(mig_pb2.MigRequest(node="n1", ask=ask))

        async def is_done() -> mig_pb2.GpuMig | None:
            (node,) = (await stub.ListNodes(fleet_pb2.ListNodesRequest())).nodes
            mig = node.gpus[0].mig
            assert mig.state != mig_pb2.MIG_STATE_FAILED, mig.reason
            return mig if mig.state == mig_pb2.MIG_STATE_SUCCESS else None

        done = await until("the layout", is_done)
    assert [(each.profile, each.start) for each in done.layout.instances] == [
        ("3g.40gb", 0),
        ("3g.40gb", 4),
    ]
    known = (await fleet.allocations(include_ended=True)).allocations
    ended = next(each for each in known if each.id == mine.id)
    assert ended.ended_reason == (
        "drained: GPU 0 is to be partitioned anew as MIG layout 'halves' (operation op-1)"
    )
    again = await fleet.request(mig="3g.40gb", gpus=2, wait="20s")
    assert len(again.devices) == 2
