"""The services' door, word by word: who may register, what is refused, what watchers are told."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import Failure, Stage, failure_of, serving
from tests.support.waiting import until, until_true

from stoker.aggregator.services import GONE_SECONDS, SETTLE_SECONDS, SILENCE_SECONDS
from stoker.v1 import fleet_pb2, services_pb2, services_pb2_grpc, types_pb2

NOT_GRANTED = grpc.StatusCode.FAILED_PRECONDITION
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Replica:
    """A replica that says what a test tells it to."""

    def __init__(self, stage: Stage, allocation_id: str, **fields: object) -> None:
        self.call: Any = services_pb2_grpc.ServicesStub(stage.channel).Serve()
        given: dict[str, Any] = {"service": "tok", "address": "10.0.0.1:9000", **fields}
        self._register = services_pb2.RegisterEndpoint(allocation_id=allocation_id, **given)

    async def registered(self) -> services_pb2.EndpointRegistered:
        await self.call.write(services_pb2.ServeRequest(register=self._register))
        return (await self.read()).registered

    async def sign(self, **fields: Any) -> None:
        message = services_pb2.SignOfLife(**fields)
        await self.call.write(services_pb2.ServeRequest(sign=message))

    async def read(self) -> services_pb2.ServeResponse:
        answer = await self.call.read()
        if isinstance(answer, services_pb2.ServeResponse):
            return answer
        raise EOFError  # the stream has ended; its status says why

    async def end(self) -> Failure:
        """Return what ends the stream."""
        while True:
            try:
                await self.read()
            except aio.AioRpcError as error:
                return Failure(error)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


async def route(stage: Stage, service: str = "tok") -> services_pb2.ServiceEndpoints:
    stub = services_pb2_grpc.ServicesStub(stage.channel)
    answer = await stub.Route(services_pb2.RouteRequest(service=service))
    return answer.service


async def weights(stage: Stage, service: str = "tok") -> dict[str, float]:
    return {each.address: each.weight for each in (await route(stage, service)).endpoints}


async def until_weights(stage: Stage, expected: dict[str, float]) -> None:
    async def look() -> bool:
        return await weights(stage) == expected

    await until(f"weights {expected}", look)


async def reason(stage: Stage, address: str) -> str:
    endpoints = (await route(stage)).endpoints
    return next(each.reason for each in endpoints if each.address == address)


async def test_endpoint_tells_and_is_told(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, granted.id, capacity=32)
        registered = await replica.registered()
        assert registered.endpoint_id
        assert registered.interval_seconds < registered.silence_seconds < 2.0
        counts = [0] * 16
        counts[3] = 8
        await replica.sign(
            operations=10, errors=2, latency_counts=counts, latency_sum_seconds=0.06, in_flight=3
        )
        standing = (await replica.read()).standing
        assert (standing.weight, standing.reason) == (1.0, "as well as its peers")

        async def told() -> services_pb2.Endpoint | None:
            (endpoint,) = (await route(stage)).endpoints
            return endpoint if endpoint.HasField("error_ratio") else None

        endpoint = await until("what it observed", told)
        assert endpoint.id == registered.endpoint_id
        assert endpoint.address == "10.0.0.1:9000"
        assert (endpoint.node, endpoint.allocation_id) == ("n1", granted.id)
        assert list(endpoint.gpu_uuids) == [granted.devices[0].uuid]
        assert endpoint.capacity == 32
        assert endpoint.in_flight == 3.0
        assert endpoint.error_ratio == pytest.approx(0.2)
        assert endpoint.latency_p50_seconds == pytest.approx(0.0075)
        assert endpoint.utilization_ratio == 0.5
        assert endpoint.memory_used_ratio == pytest.approx(1 / 80)
        await replica.call.done_writing()
        await until_weights(stage, {})


async def test_service_that_nobody_serves_has_no_endpoint(stage: Stage) -> None:
    found = await route(stage, "nobody")
    assert (found.service, list(found.endpoints)) == ("nobody", [])
    stub = services_pb2_grpc.ServicesStub(stage.channel)
    assert list((await stub.ListServices(services_pb2.ListServicesRequest())).services) == []


async def test_services_are_listed_by_name(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        replicas = [Replica(stage, granted.id, service=name) for name in ("b", "a")]
        for replica in replicas:
            await replica.registered()
        stub = services_pb2_grpc.ServicesStub(stage.channel)

        async def names() -> list[str]:
            answer = await stub.ListServices(services_pb2.ListServicesRequest())
            return [each.service for each in answer.services]

        async def look() -> bool:
            return await names() == ["a", "b"]

        await until("both services", look)


# What is asked for; the code; the reason; a word of the sentence; the field that is named.
REFUSED: dict[str, tuple[dict[str, Any], grpc.StatusCode, str, str, list[str]]] = {
    "no service": ({"service": ""}, INVALID, "INVALID_REQUEST", "empty", ["register.service"]),
    "a service with a space": (
        {"service": "my service"},
        INVALID,
        "INVALID_REQUEST",
        "'my service'",
        ["register.service"],
    ),
    "no address": ({"address": ""}, INVALID, "INVALID_REQUEST", "empty", ["register.address"]),
    "no port": (
        {"address": "10.0.0.1"},
        INVALID,
        "INVALID_REQUEST",
        "HOST:PORT, found '10.0.0.1'",
        ["register.address"],
    ),
    "port 0": (
        {"address": "10.0.0.1:0"},
        INVALID,
        "INVALID_REQUEST",
        "a port to call",
        ["register.address"],
    ),
    "no room at all": (
        {"capacity": 0},
        INVALID,
        "INVALID_REQUEST",
        "from 1 to",
        ["register.capacity"],
    ),
    "no allocation": (
        {"allocation_id": ""},
        INVALID,
        "INVALID_REQUEST",
        "empty",
        ["register.allocation_id"],
    ),
    "an unknown allocation": (
        {"allocation_id": "nobody"},
        grpc.StatusCode.NOT_FOUND,
        "NOT_FOUND",
        "allocation 'nobody' is not known",
        [],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_registration_is_refused_by_the_field(stage: Stage, name: str) -> None:
    asked, code, word, text, fields = REFUSED[name]
    async with stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, **{"allocation_id": granted.id, **asked})
        failure = await failure_of(replica.registered())
        assert (failure.code, failure.reason, failure.fields) == (code, word, fields)
        assert text in failure.sentence


async def test_allocation_of_another_service_is_refused(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate(service="other")
        failure = await failure_of(Replica(stage, granted.id).registered())
        assert (failure.code, failure.fields) == (INVALID, ["register.service"])
        assert "is of service other, found 'tok'" in failure.sentence
        await Replica(stage, granted.id, service="other").registered()


async def test_allocation_that_waits_cannot_serve(stage: Stage) -> None:
    async with stage.agent(gpus=1):
        await stage.allocate()
        waiting = await stage.queue()
        failure = await failure_of(Replica(stage, waiting.id).registered())
        assert (failure.code, failure.reason) == (NOT_GRANTED, "NOT_GRANTED")
        assert f"allocation {waiting.id} is waiting" in failure.sentence
        waiting.hang_up()


@pytest.mark.parametrize(
    ("sign", "field"),
    [
        ({"operations": 1, "errors": 2}, "sign.errors"),
        ({"operations": 1, "latency_counts": [1]}, "sign.latency_counts"),
        ({"operations": 1, "latency_counts": [1] * 16}, "sign.latency_counts"),
        ({"operations": 200_000_000}, "sign.operations"),
        ({"latency_sum_seconds": -1.0}, "sign.latency_sum_seconds"),
        ({"latency_sum_seconds": float("nan")}, "sign.latency_sum_seconds"),
        ({"latency_sum_seconds": 1e308}, "sign.latency_sum_seconds"),  # two would be no number
        ({"in_flight": 2_000_000}, "sign.in_flight"),
    ],
)
async def test_sign_of_life_that_cannot_be_ends_the_stream(
    stage: Stage, sign: dict[str, Any], field: str
) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, granted.id)
        await replica.registered()
        await replica.sign(**sign)
        failure = await replica.end()
        assert (failure.code, failure.fields) == (INVALID, [field])
        await until_weights(stage, {})


async def test_stream_begins_with_the_registration_and_has_one(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        first = Replica(stage, granted.id)
        await first.sign()
        assert (await first.end()).fields == ["register"]
        twice = Replica(stage, granted.id)
        await twice.registered()
        again = services_pb2.RegisterEndpoint(allocation_id=granted.id, service="tok")
        await twice.call.write(services_pb2.ServeRequest(register=again))
        assert (await twice.end()).fields == ["message"]


async def test_same_address_once_more_takes_the_place_of_the_first(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        old, new = Replica(stage, granted.id), Replica(stage, granted.id)
        before = await old.registered()
        after = await new.registered()
        assert before.endpoint_id != after.endpoint_id
        failure = await old.end()
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "SUPERSEDED")
        await until_weights(stage, {"10.0.0.1:9000": 1.0})
        assert [each.id for each in (await route(stage)).endpoints] == [after.endpoint_id]


async def test_one_more_than_there_can_be_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.services.ENDPOINTS_MAX", 1)
    async with stage.agent():
        granted = await stage.allocate()
        await Replica(stage, granted.id).registered()
        again = Replica(stage, granted.id)  # the same address, so not one more
        await again.registered()
        failure = await failure_of(Replica(stage, granted.id, address="10.0.0.2:1").registered())
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY")
        assert failure.sentence == "there are 1 endpoints already"
        again.call.cancel()


async def test_replica_that_says_nothing_is_not_waited_for(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, granted.id)
        await replica.registered()
        await until_weights(stage, {"10.0.0.1:9000": 1.0})
        await stage.clock.elapse(SILENCE_SECONDS + 1)
        await until_weights(stage, {"10.0.0.1:9000": 0.0})
        assert "silent" in await reason(stage, "10.0.0.1:9000")
        await stage.clock.elapse(GONE_SECONDS)
        failure = await replica.end()
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SILENT")
        await until_weights(stage, {})


async def test_end_of_the_allocation_ends_the_endpoint(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, granted.id)
        await replica.registered()
        await stage.release(granted.id)
        failure = await replica.end()
        assert (failure.code, failure.reason) == (NOT_GRANTED, "NOT_GRANTED")
        assert granted.id in failure.sentence
        await until_weights(stage, {})


ILL = types_pb2.GpuHealth(
    verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
    action=types_pb2.REPAIR_ACTION_REBOOT,
    check="xid",
    reason="Xid 79",
)


async def test_endpoint_of_a_gpu_that_is_not_well_gets_no_calls(stage: Stage) -> None:
    async with stage.agent() as agent:
        granted = await stage.allocate(gpus=1)
        other = await stage.allocate(gpus=1)
        one, two = "10.0.0.1:9000", "10.0.0.1:9001"
        both = {one: 0.5, two: 0.5}
        replicas = Replica(stage, granted.id), Replica(stage, other.id, address=two)
        for replica in replicas:
            await replica.registered()

        async def live() -> None:
            while True:
                for replica in replicas:
                    await replica.sign()
                await asyncio.sleep(0.2)

        living = asyncio.create_task(live())
        await until_weights(stage, both)
        uuid = granted.devices[0].uuid
        fleet = stage.fleet
        await fleet.Cordon(fleet_pb2.CordonRequest(node="n1", reason="fans", gpu_uuid=uuid))
        await until_weights(stage, {one: 0.0, two: 1.0})
        assert await reason(stage, one) == "GPU 0 of node n1 is cordoned: fans"
        await fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1", gpu_uuid=uuid))
        await until_weights(stage, both)
        ill = types_pb2.GpuHealth()
        ill.CopyFrom(ILL)
        ill.uuid = uuid
        await agent.say(ill={uuid: ill})
        await until_weights(stage, {one: 0.0, two: 1.0})
        assert "is unhealthy: Xid 79" in await reason(stage, one)
        living.cancel()


async def test_watcher_is_told_the_whole_set_whenever_it_changes(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        stub = services_pb2_grpc.ServicesStub(stage.channel)
        call: Any = stub.WatchEndpoints(services_pb2.WatchEndpointsRequest(service="tok"))
        seen: list[services_pb2.ServiceEndpoints] = []

        async def watch() -> None:
            async for message in call:
                seen.append(message.service)

        watching = asyncio.create_task(watch())
        await until_true("the first set", lambda: len(seen) == 1)
        assert list(seen[0].endpoints) == []
        replica = Replica(stage, granted.id)
        await replica.registered()
        await until_true("the endpoint", lambda: len(seen) == 2)
        assert [each.address for each in seen[1].endpoints] == ["10.0.0.1:9000"]
        replica.call.cancel()
        await until_true("its end", lambda: len(seen) == 3)
        assert list(seen[2].endpoints) == []
        versions = [each.version for each in seen]
        assert versions == sorted(set(versions))
        assert {each.epoch for each in seen} == {seen[0].epoch}
        # Whether a set that lacks somebody can be believed is told when that changes, too.
        assert not seen[2].settled
        await stage.clock.elapse(SETTLE_SECONDS)
        await until_true("the settled set", lambda: len(seen) == 4)
        assert seen[3].settled
        call.cancel()
        watching.cancel()


async def test_stop_tells_replicas_and_watchers(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, stage.agent():
        granted = await stage.allocate()
        replica = Replica(stage, granted.id)
        await replica.registered()
        stub = services_pb2_grpc.ServicesStub(stage.channel)
        watch: Any = stub.WatchEndpoints(services_pb2.WatchEndpointsRequest(service="tok"))
        await watch.read()
        stage.aggregator.stop()
        assert (await replica.end()).reason == "STOPPING"

        async def rest() -> None:
            while await watch.read() is not aio.EOF:
                pass

        assert (await failure_of(rest())).reason == "STOPPING"


@pytest.mark.parametrize("method", ["Route", "WatchEndpoints"])
async def test_service_name_is_checked(stage: Stage, method: str) -> None:
    channel: Any = stage.channel
    path = f"/stoker.v1.Services/{method}"
    sent = services_pb2.RouteRequest(service="a b").SerializeToString()
    if method == "Route":
        failure = await failure_of(channel.unary_unary(path)(sent))
    else:
        failure = await failure_of(channel.unary_stream(path)(sent).read())
    assert (failure.code, failure.fields) == (INVALID, ["service"])
