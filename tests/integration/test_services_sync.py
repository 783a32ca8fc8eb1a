"""Serving and routing without an event loop, in threads beside an aggregator."""

import asyncio
import gc
import threading
import urllib.request
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.integration.aggregator_stage import Stage, serving
from tests.support.waiting import until, until_true

from stoker.client import (
    AllocationEnded,
    Fleet,
    InvalidRequest,
    NoEndpoint,
    Unreachable,
    connect,
    connect_async,
)
from stoker.client.routing import BACK_OFF_SECONDS_MAX

PATIENCE_SECONDS = 20.0


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage, stage.agent():
        yield stage


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(PATIENCE_SECONDS / 0.02)):
        if is_so():
            return
        pause.wait(0.02)
    raise AssertionError(f"waited in vain for {what}")


async def with_fleet(stage: Stage, story: Callable[[Fleet], None]) -> None:
    """Run a story in a thread of its own, with a client of this aggregator."""

    def run() -> None:
        with connect(stage.address) as fleet:
            story(fleet)

    await asyncio.to_thread(run)


async def test_replica_serves_and_is_called(stage: Stage) -> None:
    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with fleet.serve("tok", allocation, address="10.0.0.1:9000", capacity=8) as service:
            service.observe(operations=3, seconds=0.012, errors=1)
            with fleet.router("tok") as router:
                wait_for("the endpoint", lambda: len(router.endpoints) == 1)
                with router.call() as endpoint:
                    assert endpoint.address == "10.0.0.1:9000"
                endpoint = router.pick()
                router.done(endpoint, ok=True)
                wait_for("its part", lambda: service.standing is not None)

                def errors_told() -> bool:
                    (told,) = fleet.route("tok").endpoints
                    return told.error_ratio == pytest.approx(1 / 3)

                wait_for("what it observed", errors_told)
                (told,) = fleet.services()
                assert [each.capacity for each in told.endpoints] == [8]
        wait_for("its leave", lambda: fleet.services() == ())
        with pytest.raises(NoEndpoint), fleet.router("tok") as router, router.call():
            pass

    await with_fleet(stage, story)


async def test_last_observations_are_told_at_the_end(stage: Stage) -> None:
    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with fleet.serve("tok", allocation, address="10.0.0.1:9000") as service:
            service.observe(7, 0.01)

    await with_fleet(stage, story)
    page = await asyncio.to_thread(metrics_of, stage)
    assert 'stoker_service_operations_total{gpu="0",node="n1",service="tok"} 7.0' in page


async def test_failed_call_leaves_the_endpoint_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All is over well within the moment for which it is left out, on any machine.
    monkeypatch.setattr("stoker.client.routing.BACK_OFF_FIRST_SECONDS", BACK_OFF_SECONDS_MAX)

    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with (
            fleet.serve("tok", allocation, address="10.0.0.1:1"),
            fleet.serve("tok", allocation, address="10.0.0.1:2"),
            fleet.router("tok") as router,
        ):
            wait_for("both", lambda: len(router.endpoints) == 2)
            with pytest.raises(ConnectionError), router.call() as bad:
                raise ConnectionError
            for _ in range(5):
                with router.call() as endpoint:
                    assert endpoint.address != bad.address
            # An exception that says nothing of the endpoint, for those who say so.
            with pytest.raises(KeyError), router.call(lambda error: False) as good:
                raise KeyError
            with router.call() as endpoint:
                assert endpoint.address == good.address

    await with_fleet(stage, story)


async def test_end_of_the_allocation_is_told(stage: Stage) -> None:
    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with fleet.serve("tok", allocation.id, address="10.0.0.1:9000") as service:
            fleet.release(allocation.id, wait=0)
            wait_for("the end", lambda: service.ended is not None)
            assert isinstance(service.ended, AllocationEnded)

    await with_fleet(stage, story)


async def test_what_cannot_be_is_refused(stage: Stage) -> None:
    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with (
            pytest.raises(InvalidRequest, match="register.address"),
            fleet.serve("tok", allocation, address="nowhere"),
        ):
            pass
        router = fleet.router("no such name")
        with pytest.raises(InvalidRequest, match="service: must be letters"):
            router.ready()

    await with_fleet(stage, story)


def test_without_an_aggregator_it_says_so() -> None:
    with connect("127.0.0.1:1", patience=0.2) as fleet:
        with (
            pytest.raises(Unreachable, match="127.0.0.1:1"),
            fleet.serve("tok", "a-1", address="10.0.0.1:9000"),
        ):
            pass
        with pytest.raises(Unreachable, match="127.0.0.1:1"), fleet.router("tok"):
            pass


def test_client_that_is_closed_says_so() -> None:
    """In the caller's thread, that is; and nothing is left in one of its own."""
    fleet = connect("127.0.0.1:1")
    fleet.close()
    with (
        pytest.raises(Unreachable, match="the client of .* is closed"),
        fleet.serve("tok", "a-1", address="10.0.0.1:9000"),
    ):
        pass
    with pytest.raises(Unreachable, match="the client of .* is closed"), fleet.router("tok"):
        pass


async def test_replica_whose_client_is_closed_is_told(stage: Stage) -> None:
    def story(fleet: Fleet) -> None:
        allocation = fleet.request(gpus=1, holder="ann")
        with fleet.serve("tok", allocation, address="10.0.0.1:9000") as service:
            fleet.close()
            wait_for("the end", lambda: service.ended is not None)
            assert isinstance(service.ended, Unreachable)

    await with_fleet(stage, story)


def test_router_that_is_closed_is_kept_by_nobody() -> None:
    with connect("127.0.0.1:1") as fleet:
        router = fleet.router("tok")
        router.close()
        kept = weakref.ref(router)
        del router
        gc.collect()
        assert kept() is None


async def test_aggregator_that_comes_back_finds_replica_and_router(tmp_path: Path) -> None:
    """The thread of the replica is in the middle of its context all the while."""
    registered, over = threading.Event(), threading.Event()
    address = ""

    def story() -> None:
        with connect(address) as fleet:
            allocation = fleet.request(gpus=1, holder="ann")
            with (
                fleet.serve("tok", allocation, address="10.0.0.1:9000"),
                fleet.router("tok") as router,
            ):
                wait_for("the endpoint", lambda: len(router.endpoints) == 1)
                registered.set()
                wait_for("the loss", lambda: router.trouble is not None)
                router.done(router.pick())
                wait_for("the return", lambda: router.trouble is None)
                router.done(router.pick())
                assert over.wait(PATIENCE_SECONDS)

    async with serving(tmp_path) as stage, stage.agent():
        address, listen = stage.address, stage.aggregator.address
        running = asyncio.create_task(asyncio.to_thread(story))
        await until_true("the registration", registered.is_set)
    async with serving(tmp_path, listen=listen) as again, connect_async(again.address) as fleet:

        async def is_back() -> bool:
            return bool((await fleet.route("tok")).endpoints)

        try:
            await until("the replica", is_back)
        finally:
            over.set()
            await running


def metrics_of(stage: Stage) -> str:
    url = f"http://{stage.aggregator.metrics_address}/metrics"
    with urllib.request.urlopen(url) as page:
        text: bytes = page.read()
    return text.decode()
