"""When the disk refuses: the caller is told, nothing is half-done, health says so, and it mends."""

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2  # type: ignore[import-untyped]
from tests.integration.aggregator_stage import (
    JumpClock,
    Stage,
    TinyAgent,
    failure_of,
    serving,
    wish,
)
from tests.support.waiting import until, until_true

from stoker.aggregator.store import OnCommit, Store
from stoker.core.errors import StoreFull
from stoker.v1 import fleet_pb2, types_pb2

GRANTED = types_pb2.ALLOCATION_STATE_GRANTED
ENDED = types_pb2.ALLOCATION_STATE_ENDED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "stoker.v1.Fleet", "stoker.v1.AgentLink", "stoker.v1.Services")


class Brittle(Store):
    """A store whose disk can be made to be full: SQLite itself says so."""

    def set_full(self, *, is_full: bool) -> None:
        (used,) = self._connection.execute("PRAGMA page_count").fetchone()
        # Below what is used nothing can be added; what is there can still be overwritten.
        self._connection.execute(f"PRAGMA max_page_count = {used if is_full else 1 << 30}")
        self.is_full = is_full

    is_full = False

    def commit(self, connection: sqlite3.Connection) -> None:
        if self.is_full:
            # As a full disk does it: at the end, when the pages go out.
            connection.execute("CREATE TABLE beyond (filler BLOB)")
        super().commit(connection)


@asynccontextmanager
async def brittle(folder: Path) -> AsyncGenerator[tuple[Stage, Brittle]]:
    stores: list[Brittle] = []

    def open_store(folder: Path, on_commit: OnCommit) -> Store:
        stores.append(Brittle(folder, on_commit))
        return stores[-1]

    async with serving(folder, JumpClock(), open_store) as stage:
        yield stage, stores[0]


async def health(stage: Stage, service: str = "") -> int:
    check = stage.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(service=service))
    status: int = answer.status
    return status


async def becomes(stage: Stage, status: int) -> None:
    async def look() -> bool:
        return [await health(stage, service) for service in SERVICES] == [status] * len(SERVICES)

    await until("the health to follow", look)


async def test_refused_wishes_leave_nothing_and_the_loop_goes_on(tmp_path: Path) -> None:
    async with brittle(tmp_path) as (stage, store), stage.agent(gpus=2):
        await becomes(stage, SERVING)
        kept = await stage.allocate(ttl_seconds=3600.0)
        store.set_full(is_full=True)
        for call in (
            stage.fleet.Allocate(wish(key="k1")),
            stage.fleet.Release(fleet_pb2.ReleaseRequest(allocation_id=kept.id)),
            stage.fleet.Cordon(fleet_pb2.CordonRequest(node="n1", reason="x")),
        ):
            failure = await failure_of(call)
            assert failure.code is grpc.StatusCode.UNAVAILABLE
            assert failure.reason == "STORE_UNAVAILABLE"
            assert "ledger.sqlite3: no room to write" in failure.sentence
        await becomes(stage, NOT_SERVING)
        (only,) = (await stage.allocations()).values()
        assert (only.id, only.state) == (kept.id, GRANTED)
        assert not (await stage.nodes())["n1"].HasField("cordoned")
        store.set_full(is_full=False)
        stage.clock.jump(2)  # until it looks again whether the disk takes writes
        await becomes(stage, SERVING)
        assert (await stage.allocate(key="k1")).state == GRANTED
    async with serving(tmp_path) as stage:
        assert len(await stage.allocations()) == 2


async def test_lease_that_runs_out_meanwhile_ends_when_the_disk_takes_it(tmp_path: Path) -> None:
    async with brittle(tmp_path) as (stage, store), stage.agent(gpus=1):
        granted = await stage.allocate(ttl_seconds=10.0)
        store.set_full(is_full=True)
        stage.clock.jump(11)
        await becomes(stage, NOT_SERVING)
        assert (await stage.allocations())[granted.id].state == GRANTED
        store.set_full(is_full=False)
        stage.clock.jump(2)
        await stage.becomes(granted.id, ENDED)


async def test_node_that_cannot_be_registered_is_sent_away(tmp_path: Path) -> None:
    async with brittle(tmp_path) as (stage, store):
        store.set_full(is_full=True)
        agent = TinyAgent()
        async with agent.connected(stage.channel):
            assert agent.welcome is None
            assert agent.ended is not None
            assert agent.ended.code() is grpc.StatusCode.UNAVAILABLE
            assert "no room to write" in (agent.ended.details() or "")
        assert await stage.nodes() == {}
        store.set_full(is_full=False)
        async with stage.agent():
            assert list(await stage.nodes()) == ["n1"]


async def test_frame_is_acknowledged_when_what_it_changes_is_on_disk(tmp_path: Path) -> None:
    async with brittle(tmp_path) as (stage, store), stage.agent(gpus=1, is_lazy=True) as agent:
        granted = await stage.allocate()
        await stage.release(granted.id)
        await until_true("both commands", lambda: len(agent.commands) == 2)
        acks = len(agent.acks)
        store.set_full(is_full=True)
        agent.is_lazy = False
        await agent.say(held=True)  # it has let go, which ends the allocation
        await becomes(stage, NOT_SERVING)
        # Long silence is a dead line to an agent, so it hears what it knows.
        stage.clock.jump(11)
        await until_true("a repeated acknowledgement", lambda: len(agent.acks) > acks)
        assert agent.acked < agent.sequence
        store.set_full(is_full=False)
        stage.clock.jump(2)
        await stage.becomes(granted.id, ENDED)
        await until_true("its acknowledgement", lambda: agent.acked == agent.sequence)


async def test_full_disk_at_the_start_is_said_at_once(tmp_path: Path) -> None:
    class FullFromTheStart(Store):
        def check_writable(self) -> None:
            raise StoreFull(f"{self.path}: no room to write")

    with pytest.raises(StoreFull):
        async with serving(tmp_path, open_store=FullFromTheStart):
            pass


async def test_health_of_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        with pytest.raises(aio.AioRpcError) as caught:
            await health(stage, "stoker.v1.Nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_is_streamed_until_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        await becomes(stage, SERVING)
        health = watched_health(stage, "stoker.v1.Fleet")
        assert await anext(health) == SERVING
        stage.aggregator.stop()
        assert await anext(health) == NOT_SERVING
        await health.aclose()


async def test_loop_that_does_not_come_round_is_not_serving(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        await becomes(stage, SERVING)
        health = watched_health(stage, "")
        assert await anext(health) == SERVING
        # To whoever watches the loop it looks as if nothing had happened for an hour.
        stage.clock.jump(3600)
        assert await anext(health) == NOT_SERVING
        assert await anext(health) == SERVING
        await health.aclose()


async def watched_health(stage: Stage, service: str) -> AsyncGenerator[int]:
    watch = stage.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    call = watch(health_pb2.HealthCheckRequest(service=service))
    try:
        while True:
            answer: Any = await call.read()
            yield answer.status
    finally:
        call.cancel()


async def test_services_can_be_listed_by_reflection(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        method = stage.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        call = method()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer: Any = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {*SERVICES[1:], "grpc.health.v1.Health"} <= names
        call.cancel()
