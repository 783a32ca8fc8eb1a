"""Partitioning by demand: what waits has GPUs cut for it, once, and only where that was allowed."""

import asyncio
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from tests.unit.aggregator.builders import GIB, H100, Scene, make_facts, make_gpus, whole

from stoker.aggregator.cuts import PartitioningOptions
from stoker.aggregator.failures import CallFailure
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import AllocationState, Gpu, MigDevice
from stoker.aggregator.partitioner import (
    EVERY_SECONDS,
    REFUSED_SECONDS,
    UNDER_WAY_SECONDS,
    Partitioner,
)
from stoker.core.mig.boards import board_of
from stoker.core.mig.geometry import Layout, MigState, Placed
from stoker.testing.clock import VirtualClock
from stoker.v1 import mig_pb2

AUTOMATIC = PartitioningOptions(is_automatic=True, dwell_seconds=600.0, hysteresis_seconds=30.0)
HALF = Placed(4, 4, "3g.40gb")


@dataclass
class Nodes:
    """The agents: they keep what they are asked, and refuse when they are told to."""

    asked: list[tuple[str, mig_pb2.MigAsk]] = field(
        default_factory=list[tuple[str, mig_pb2.MigAsk]]
    )
    refusal: str = ""
    is_lost: bool = False

    async def ask(self, node: str, ask: mig_pb2.MigAsk) -> mig_pb2.MigAnswer:
        self.asked.append((node, ask))
        if self.is_lost:
            raise CallFailure(grpc.StatusCode.UNAVAILABLE, "NOT_CONNECTED", "n1 is gone")
        return mig_pb2.MigAnswer(
            id=1, refusal=self.refusal, report_json="" if self.refusal else "{}"
        )


class Stage:
    """A node of pool `train` with H100s in MIG mode that are not cut, and the loop."""

    def __init__(self, gpus: int = 1, options: PartitioningOptions = AUTOMATIC) -> None:
        cards = tuple(replace(gpu, mig_enabled=True) for gpu in make_gpus("n1", gpus))
        self.scene = Scene(make_facts(gpus=cards, pool="train"))
        self.nodes = Nodes()
        self.meters = Meters()
        self.clock = VirtualClock()
        self.scene.now = self.clock.now()
        self.scene.sample()
        self.loop = Partitioner(
            *(self.scene.fleet, self.nodes.ask, self.meters, self.clock), {"train": options}
        )
        for card in cards:
            self.tell(card.uuid)

    def tell(self, uuid: str = "n1-0", **fields: Any) -> None:
        """The node tells of one GPU; of the others it tells what it told before."""
        board = board_of(0, H100)
        assert board is not None
        told = dict(self.scene.fleet.status("n1").mig or {})
        before = told.get(uuid, GpuMig(uuid, layout=(), geometry=board.geometry))
        told[uuid] = replace(before, **fields)
        self.scene.frame("n1", mig=told)

    def is_cut(self, *placed: Placed, uuid: str = "n1-0") -> None:
        """The newest operation is over, and the GPU is cut so."""
        _, ask = self.nodes.asked[-1]
        devices = {HALF: MigDevice("MIG-half", "3g.40gb", 40 * GIB, 2, 0)}
        mine = tuple(devices[each] for each in placed)
        gpus = self.scene.gpus_of("n1")

        def now(gpu: Gpu) -> Gpu:
            return replace(gpu, mig_devices=mine) if gpu.uuid == uuid else gpu

        self.scene.change_facts("n1", gpus=tuple(now(gpu) for gpu in gpus))
        layout: Layout = placed
        self.tell(
            uuid,
            state=MigState.SUCCESS,
            operation_id=ask.operation_id,
            is_withheld=False,
            layout=layout,
            changed_at=self.scene.now,
        )

    async def later(self, seconds: float) -> None:
        """Time passes, the nodes go on sampling, and the loop looks."""
        self.scene.later(seconds)
        await self.clock.advance(seconds)
        self.scene.sample()
        await self.loop.look()

    def outcomes(self) -> dict[str, float | None]:
        registry: CollectorRegistry = self.meters.registry
        name = "stoker_partitions_by_demand_total"
        outcomes = ("begun", "refused")
        return {each: registry.get_sample_value(name, {"outcome": each}) for each in outcomes}


HALF_A_GPU = whole(mig_profile="3g.40gb", ttl_seconds=1e6)


async def test_a_request_that_waits_long_enough_has_a_gpu_cut_for_it_and_gets_it() -> None:
    stage = Stage()
    waiting = stage.scene.wait(HALF_A_GPU)
    await stage.later(29.0)
    assert stage.nodes.asked == []
    await stage.later(1.0)
    ((node, ask),) = stage.nodes.asked
    assert (node, ask.verb, list(ask.gpus)) == ("n1", mig_pb2.MIG_VERB_APPLY, ["n1-0"])
    assert (ask.drain_seconds, ask.evict) == (0.0, False), "nobody is made to go"
    (entry,) = ask.entries
    assert (list(entry.devices), entry.mig_enabled, dict(entry.mig_devices)) == (
        [0],
        True,
        {"3g.40gb": 1},
    )
    stage.tell(state=MigState.APPLYING, operation_id=ask.operation_id, is_withheld=True)
    await stage.later(5.0)
    stage.is_cut(HALF)
    stage.scene.decide(serve=True)
    assert stage.scene.state(waiting.id) is AllocationState.GRANTED
    await stage.later(5.0)
    assert len(stage.nodes.asked) == 1
    assert stage.outcomes() == {"begun": 1.0, "refused": 0.0}


async def test_what_is_being_done_for_a_request_is_not_done_twice() -> None:
    stage = Stage(gpus=2)
    stage.scene.wait(HALF_A_GPU)
    await stage.later(30.0)
    await stage.later(5.0)  # before the node has told of it, and while it works
    ((_, ask),) = stage.nodes.asked
    uuid = ask.gpus[0]
    stage.tell(uuid, state=MigState.APPLYING, operation_id=ask.operation_id, is_withheld=True)
    await stage.later(5.0)
    assert len(stage.nodes.asked) == 1


async def test_what_failed_is_not_tried_again_on_the_same_gpu() -> None:
    stage = Stage()
    stage.scene.wait(HALF_A_GPU)
    await stage.later(30.0)
    ((_, ask),) = stage.nodes.asked
    stage.tell(state=MigState.FAILED, operation_id=ask.operation_id, reason="it is as it was")
    await stage.later(600.0)
    assert len(stage.nodes.asked) == 1


@pytest.mark.parametrize("how", ["it refuses", "it is lost"])
async def test_a_node_that_does_not_do_it_is_left_alone_for_a_while(how: str) -> None:
    stage = Stage()
    stage.nodes.refusal = "process 4711 has the GPU open" if how == "it refuses" else ""
    stage.nodes.is_lost = how == "it is lost"
    stage.scene.wait(HALF_A_GPU)
    await stage.later(30.0)
    await stage.later(REFUSED_SECONDS - 1.0)
    assert len(stage.nodes.asked) == 1
    await stage.later(1.0)
    first, second = (ask for _, ask in stage.nodes.asked)
    assert first == second, "the same operation, so that it is done once if it was begun"
    assert stage.outcomes() == {"begun": 0.0, "refused": 2.0}


async def test_an_operation_of_which_nothing_is_heard_is_asked_for_again() -> None:
    stage = Stage()
    stage.scene.wait(HALF_A_GPU)
    await stage.later(30.0)
    await stage.later(UNDER_WAY_SECONDS - 1.0)
    assert len(stage.nodes.asked) == 1
    await stage.later(1.0)
    assert len({ask.operation_id for _, ask in stage.nodes.asked}) == 1
    assert len(stage.nodes.asked) == 2


async def test_a_loop_that_was_begun_anew_asks_for_the_same_operation() -> None:
    operations: list[str] = []
    for _ in range(2):
        stage = Stage()
        stage.scene.wait(HALF_A_GPU)
        await stage.later(30.0)
        operations += [ask.operation_id for _, ask in stage.nodes.asked]
    first, second = operations
    assert first == second


async def test_what_is_only_proposed_is_told_once_and_not_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(options=replace(AUTOMATIC, is_automatic=False))
    waiting = stage.scene.wait(HALF_A_GPU)
    await stage.later(30.0)
    (told,) = [record.message for record in caplog.records if "proposed" in record.message]
    assert waiting.id in told
    assert "GPU 0 of node n1" in told
    assert stage.meters.registry.get_sample_value("stoker_partitions_proposed") == 1.0
    stage.scene.release(waiting.id)
    await stage.later(5.0)
    assert stage.nodes.asked == []
    assert stage.meters.registry.get_sample_value("stoker_partitions_proposed") == 0.0


async def test_a_gpu_that_somebody_else_has_partitioned_is_left_alone() -> None:
    stage = Stage()
    stage.scene.wait(HALF_A_GPU)
    stage.tell(is_withheld=True, state=MigState.DRAINING)
    await stage.later(30.0)
    assert stage.nodes.asked == []


async def test_without_pools_it_does_nothing_and_with_one_it_looks_every_few_seconds() -> None:
    stage = Stage()
    none = Partitioner(stage.scene.fleet, stage.nodes.ask, stage.meters, stage.clock, {})
    await none.run()
    stage.scene.wait(whole(mig_profile="3g.40gb", ttl_seconds=1e6))
    stage.scene.later(30.0)
    running = asyncio.create_task(stage.loop.run())
    await stage.clock.advance(30.0 + EVERY_SECONDS)
    running.cancel()
    await asyncio.wait([running])
    assert len(stage.nodes.asked) == 1
