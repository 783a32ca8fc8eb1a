"""Calls go where they are answered: real gRPC replicas on loopback, the SDK on both sides."""

import asyncio
import gc
import re
import signal
import sys
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from tests.integration.aggregator_stage import Stage, serving
from tests.support.waiting import until, until_true

from stoker.client import (
    AllocationEnded,
    AsyncFleet,
    AsyncRouter,
    InvalidRequest,
    NoEndpoint,
    NotFound,
    Unreachable,
    connect_async,
)
from stoker.client.routing import BACK_OFF_SECONDS_MAX
from stoker.testing.load import Listening, decode_said
from stoker.testing.replica_messages import ReplicaPlan
from stoker.testing.replicas import Channels, Replica

FAST_SECONDS, STEADY_SECONDS, SLOW_SECONDS = 0.002, 0.02, 0.08
CALL_SECONDS_MAX = 2.0


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage, stage.agent():
        yield stage


@pytest.fixture
async def fleet(stage: Stage) -> AsyncIterator[AsyncFleet]:
    async with connect_async(stage.address) as fleet:
        yield fleet


@asynccontextmanager
async def replicas_of(
    fleet: AsyncFleet, count: int, name: str = "tok"
) -> AsyncGenerator[list[Replica]]:
    """So many replicas, each in an allocation of its own."""
    async with AsyncExitStack() as stack:
        replicas: list[Replica] = []
        for _ in range(count):
            allocation = await fleet.request(gpus=1, holder="ann")
            replica = Replica(FAST_SECONDS, slots=4)
            await stack.enter_async_context(replica.serving(fleet, name, allocation.id))
            replicas.append(replica)
        yield replicas


class Caller:
    """Calls the replicas, and counts where each call went."""

    def __init__(self, router: AsyncRouter) -> None:
        self.router = router
        self.went = Counter[str]()
        self.failed = Counter[str]()
        self._channels = Channels()

    async def call(self) -> None:
        with suppress(grpc.RpcError):
            async with self.router.call() as endpoint:
                self.went[endpoint.address] += 1
                try:
                    await self._channels.call(endpoint.address, CALL_SECONDS_MAX)
                except grpc.RpcError:
                    self.failed[endpoint.address] += 1
                    raise

    async def calls(self, count: int, at_a_time: int = 4) -> Counter[str]:
        """Make so many calls; return where they went."""
        before = Counter(self.went)
        left = iter(range(count))

        async def work() -> None:
            for _ in left:
                await self.call()

        await asyncio.gather(*(work() for _ in range(at_a_time)))
        return self.went - before

    async def close(self) -> None:
        await self._channels.close()


@asynccontextmanager
async def calling(fleet: AsyncFleet, endpoints: int) -> AsyncGenerator[Caller]:
    """A caller that has heard of so many endpoints."""
    async with fleet.router("tok") as router:
        await until_true("the endpoints", lambda: len(router.endpoints) == endpoints)
        caller = Caller(router)
        try:
            yield caller
        finally:
            await caller.close()


async def test_replicas_share_the_calls(fleet: AsyncFleet) -> None:
    async with replicas_of(fleet, 3) as replicas, calling(fleet, 3) as caller:
        for replica in replicas:
            # By far more than what a busy machine adds to one and not to the other.
            replica.seconds = STEADY_SECONDS
        went = await caller.calls(300, at_a_time=12)
        assert went.keys() == {each.address for each in replicas}
        assert min(went.values()) > 50
        assert not caller.failed


async def test_slowed_replica_loses_calls_and_gets_them_back(fleet: AsyncFleet) -> None:
    async with replicas_of(fleet, 3) as (slow, *_), calling(fleet, 3) as caller:
        slow.seconds = SLOW_SECONDS

        def weight_of_slow() -> float:
            return next(e.weight for e in caller.router.endpoints if e.address == slow.address)

        while weight_of_slow() > 0.15:  # a hang of the test ends with its time
            await caller.calls(30)
        went = await caller.calls(300)
        assert went[slow.address] < 0.2 * 300
        reason = next(e.reason for e in caller.router.endpoints if e.address == slow.address)
        assert "slower: a median of" in reason
        slow.seconds = FAST_SECONDS
        while weight_of_slow() < 0.25:
            await caller.calls(30)


async def test_failing_replica_is_left_out_before_the_aggregator_knows(
    fleet: AsyncFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The calls are over well within the moment for which it is left out, on any machine.
    monkeypatch.setattr("stoker.client.routing.BACK_OFF_FIRST_SECONDS", BACK_OFF_SECONDS_MAX)
    async with replicas_of(fleet, 2) as (bad, good), calling(fleet, 2) as caller:
        bad.is_failing = True
        while not caller.failed:
            await caller.call()
        assert caller.failed == {bad.address: 1}
        assert await caller.calls(20, at_a_time=1) == {good.address: 20}


async def test_replica_that_leaves_gets_no_calls(fleet: AsyncFleet) -> None:
    async with replicas_of(fleet, 1) as (stays,), AsyncExitStack() as leaving:
        (leaves,) = await leaving.enter_async_context(replicas_of(fleet, 1))
        async with calling(fleet, 2) as caller:
            while not caller.went[leaves.address]:
                await caller.call()
            await leaving.aclose()
            await until_true("its end", lambda: len(caller.router.endpoints) == 1)
            assert await caller.calls(50) == {stays.address: 50}


async def two_seconds_later() -> None:
    """Two seconds, of which this process had some: a machine that lets all wait proves nothing."""
    for _ in range(40):
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_replica_that_ends_gets_no_calls_two_seconds_later(
    stage: Stage, fleet: AsyncFleet, sent: signal.Signals
) -> None:
    """The kernel ends a killed one's connections; of a stopped one only silence tells."""
    plan = ReplicaPlan(stage.address, "tok", FAST_SECONDS, 4, is_random=False, seed=1)
    async with replicas_of(fleet, 2) as replicas:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stoker.testing.replicas", msgspec.json.encode(plan).decode()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            said = decode_said(await process.stdout.readline())
            assert isinstance(said, Listening)
            doomed = f"127.0.0.1:{said.port}"
            async with calling(fleet, 3) as caller:
                while not caller.went[doomed]:
                    await caller.call()
                process.send_signal(sent)
                later = asyncio.create_task(two_seconds_later())
                while not later.done():
                    await caller.calls(20)
                assert caller.router.trouble is None  # so what it says is the newest
                assert doomed not in {e.address for e in caller.router.endpoints if e.weight}
                went = await caller.calls(200)
                assert went.keys() == {each.address for each in replicas}
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_endpoint_of_a_cordoned_gpu_gets_no_calls(stage: Stage, fleet: AsyncFleet) -> None:
    async with replicas_of(fleet, 2) as (one, two), calling(fleet, 2) as caller:
        endpoint = next(e for e in caller.router.endpoints if e.address == one.address)
        (uuid,) = endpoint.gpu_uuids
        await fleet.cordon("n1", "fans", uuid)
        await until_true(
            "the cordon", lambda: any(not each.weight for each in caller.router.endpoints)
        )
        assert await caller.calls(50) == {two.address: 50}
        await fleet.cordon("n1", "fans")
        await until_true(
            "the cordon of all", lambda: not any(each.weight for each in caller.router.endpoints)
        )
        with pytest.raises(NoEndpoint, match="none of its 2 endpoints can be called.*: fans"):
            caller.router.pick()


async def test_calls_go_on_while_the_aggregator_is_away_and_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Replicas come back by themselves; the router says that it does not know the newest."""
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        stage = await first.enter_async_context(serving(tmp_path))
        agent = await first.enter_async_context(stage.agent())
        fleet = await stack.enter_async_context(connect_async(stage.address))
        replicas = await stack.enter_async_context(replicas_of(fleet, 2))
        caller = await stack.enter_async_context(calling(fleet, 2))
        addresses = {each.address for each in replicas}
        await first.aclose()
        await until_true("the loss to be noted", lambda: caller.router.trouble is not None)
        assert isinstance(caller.router.trouble, Unreachable)
        assert (await caller.calls(50)).keys() == addresses
        assert "are not told any more; calls go on to the 2 known" in caplog.text
        async with serving(tmp_path, listen=stage.aggregator.address) as again:
            await until_true("news", lambda: caller.router.trouble is None)
            # Neither the replicas nor the agent have had the time to come back.
            assert (await caller.calls(50)).keys() == addresses

            async def registered() -> set[str]:
                return {each.address for each in (await fleet.route("tok")).endpoints}

            while await registered() != addresses:
                assert (await caller.calls(10)).keys() <= addresses
            async with again.agent(incarnation=agent.incarnation, held=agent.held):
                assert (await caller.calls(50)).keys() == addresses
            assert not caller.failed


# --- what cannot be


async def test_router_of_what_nobody_serves_says_so(fleet: AsyncFleet) -> None:
    async with fleet.router("nobody") as router:
        with pytest.raises(NoEndpoint, match="service nobody has no endpoint"):
            router.pick()


async def test_router_of_a_bad_name_says_so(fleet: AsyncFleet) -> None:
    router = fleet.router("no such name")
    with pytest.raises(InvalidRequest, match="service: must be letters"):
        await router.ready()
    with pytest.raises(InvalidRequest):
        router.pick()


async def test_router_without_an_aggregator_says_so() -> None:
    async with connect_async("127.0.0.1:1", patience=0.2) as fleet:
        router = fleet.router("tok")
        with pytest.raises(Unreachable, match="127.0.0.1:1"):
            await router.ready()


async def test_client_that_is_closed_says_so() -> None:
    fleet = connect_async("127.0.0.1:1")
    await fleet.close()
    with pytest.raises(Unreachable, match="the client of .* is closed"):
        async with fleet.serve("tok", "a-1", address="10.0.0.1:9000"):
            pass
    with pytest.raises(Unreachable, match="the client of .* is closed"):
        async with fleet.router("tok"):
            pass


async def test_replica_whose_client_is_closed_is_told(stage: Stage) -> None:
    fleet = connect_async(stage.address)
    allocation = await fleet.request(gpus=1, holder="ann")
    async with fleet.serve("tok", allocation, address="10.0.0.1:9000") as service:
        await fleet.close()
        await until_true("the end", lambda: service.ended is not None)
        assert isinstance(service.ended, Unreachable)


async def test_router_that_is_closed_is_kept_by_nobody() -> None:
    async with connect_async("127.0.0.1:1") as fleet:
        router = fleet.router("tok")
        await router.close()
        kept = weakref.ref(router)
        del router
        gc.collect()
        assert kept() is None


async def test_replica_without_an_aggregator_says_so() -> None:
    async with connect_async("127.0.0.1:1", patience=0.2) as fleet:
        with pytest.raises(Unreachable, match="127.0.0.1:1"):
            async with fleet.serve("tok", "a-1", address="10.0.0.1:9000"):
                pass


@pytest.mark.parametrize(
    ("service", "allocation_id", "address", "error", "said"),
    [
        ("to k", None, "10.0.0.1:9000", InvalidRequest, "register.service"),
        ("tok", None, "10.0.0.1", InvalidRequest, "register.address"),
        ("tok", "nobody", "10.0.0.1:9000", NotFound, "allocation 'nobody' is not known"),
    ],
)
async def test_replica_that_cannot_serve_is_told_why(
    fleet: AsyncFleet,
    service: str,
    allocation_id: str | None,
    address: str,
    error: type[Exception],
    said: str,
) -> None:
    id_ = allocation_id or (await fleet.request(gpus=1, holder="ann")).id
    with pytest.raises(error, match=said):
        async with fleet.serve(service, id_, address=address):
            pass


async def test_replica_whose_allocation_ends_is_told(fleet: AsyncFleet) -> None:
    allocation = await fleet.request(gpus=1, holder="ann")
    async with fleet.serve("tok", allocation, address="10.0.0.1:9000") as service:
        await until_true("its part of the calls", lambda: service.standing is not None)
        await fleet.release(allocation.id, wait=0)
        await until_true("the end", lambda: service.ended is not None)
        assert isinstance(service.ended, AllocationEnded)
        assert allocation.id in str(service.ended)


async def test_services_are_listed_with_their_weights(fleet: AsyncFleet) -> None:
    async with replicas_of(fleet, 2) as replicas, calling(fleet, 2):
        (service,) = await fleet.services()
        assert service.service == "tok"
        assert {e.address: e.weight for e in service.endpoints} == {
            each.address: 0.5 for each in replicas
        }


# --- the page


async def test_example_of_the_page_works(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    monkeypatch.setenv("STOKER_ADDRESS", stage.address)
    monkeypatch.setattr("stoker.client.lease.host_boot_id", lambda: "boot of n1")
    stop = asyncio.Event()
    serving_it = asyncio.create_task(names["replica"]("10.0.0.1:9000", stop))

    async def called() -> str | None:
        try:
            address: str = await names["caller"]()
            return address
        except NoEndpoint:
            return None

    service = "tokenizer"
    assert await until("the replica", called) == "10.0.0.1:9000"
    async with connect_async(stage.address) as fleet:

        async def observed() -> bool:
            (endpoint,) = (await fleet.route(service)).endpoints
            return endpoint.latency_p50_seconds is not None

        await until("what it observed", observed)
        stop.set()
        await serving_it
        assert (await fleet.route(service)).endpoints == ()
