"""Both clients against a Fleet service that can be slow, lose replies, restart and refuse.

Every story runs twice: with the sync client, and with the async one on a loop of its own.
"""

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Generator
from concurrent import futures
from typing import Any, cast

import pytest
from tests.support.blocking import Blocking
from tests.support.fleet_service import CUDA, ENDED, PATIENCE_SECONDS, Served

from stoker.client import (
    AllocationEnded,
    AllocationState,
    AsyncFleet,
    Fleet,
    InvalidRequest,
    NotFound,
    Refused,
    Unreachable,
    connect,
    connect_async,
)
from stoker.client.environment import host_boot_id


@pytest.fixture
def served() -> Generator[Served]:
    served = Served()
    yield served
    served.service.hang.clear()
    served.stop()


Connect = Callable[..., Fleet]


@pytest.fixture(params=["sync", "async"], name="client")
def connect_either_way(served: Served, request: pytest.FixtureRequest) -> Generator[Connect]:
    """Makes clients of the served fleet, of either kind."""
    made: list[Fleet] = []

    def make(timeout: float = PATIENCE_SECONDS, patience: float = PATIENCE_SECONDS) -> Fleet:
        if request.param == "sync":
            fleet = Fleet(served.address, timeout=timeout, patience=patience)
        else:
            fleet = cast("Fleet", Blocking(served.address, timeout, patience))
        made.append(fleet)
        return fleet

    yield make
    for each in made:
        each.close()


@pytest.fixture
def fleet(client: Connect) -> Fleet:
    return client()


def in_background(work: Callable[[], Any]) -> "futures.Future[Any]":
    return futures.ThreadPoolExecutor(1).submit(work)


# --- calls


def test_request_is_granted_with_what_was_asked(fleet: Fleet, served: Served) -> None:
    granted = fleet.request(memory="1GiB", ttl="10m", labels={"job": "7"}, holder="ci")
    assert granted.state is AllocationState.GRANTED
    (sent,) = served.service.called("Allocate")
    assert (sent.request.memory_bytes, sent.request.ttl_seconds) == (2**30, 600.0)
    assert (sent.request.holder, dict(sent.request.labels)) == ("ci", {"job": "7"})
    assert granted.request.memory_bytes == 2**30


def test_refusal_tells_each_node(fleet: Fleet) -> None:
    fleet.request()
    with pytest.raises(Refused, match="no node has it") as caught:
        fleet.request()
    (refusal,) = caught.value.refusals.nodes
    assert (refusal.node, refusal.filter, refusal.reason) == ("n1", "gpus_free", "0 of 1 is free")


def test_lost_reply_never_grants_twice(fleet: Fleet, served: Served) -> None:
    served.service.lost_replies = 2
    granted = fleet.request()
    assert list(served.service.allocations) == [granted.id]
    calls = served.service.called("Allocate")
    assert len(calls) == 3
    assert len({call.idempotency_key for call in calls}) == 1


def test_two_requests_are_two_wishes(fleet: Fleet, served: Served) -> None:
    fleet.release(fleet.request().id)
    fleet.request()
    keys = [call.idempotency_key for call in served.service.called("Allocate")]
    assert len(set(keys)) == 2


def test_without_a_key_nothing_is_sent_again(fleet: Fleet, served: Served) -> None:
    served.service.lost_replies = 1
    with pytest.raises(Unreachable, match="the reply got lost"):
        fleet.request(idempotency_key="")
    assert len(served.service.called("Allocate")) == 1


def test_what_states_a_wish_is_sent_again(fleet: Fleet, served: Served) -> None:
    granted = fleet.request()
    served.service.lost_replies = 2
    assert fleet.release(granted.id).state is AllocationState.ENDED
    served.service.lost_replies = 2
    assert fleet.cordon("n1", "fan is loud").cordoned == "fan is loud"
    assert len(served.service.called("Release")) == len(served.service.called("Cordon")) == 3
    served.service.lost_replies = 2
    assert fleet.drain("n1", "fan is loud").cordoned == "fan is loud"
    served.service.lost_replies = 2
    assert fleet.uncordon("n1").cordoned is None
    served.service.lost_replies = 2
    assert fleet.health().gpus_total == 1
    for method in ("Drain", "Uncordon", "ListHealth"):
        assert len(served.service.called(method)) == 3, method


def test_one_gpu_is_kept_from_use_and_let_back(fleet: Fleet, served: Served) -> None:
    node = fleet.cordon("n1", "fan is loud", "GPU-1")
    assert node.cordoned is None
    assert node.gpus[0].cordon is not None
    assert (node.gpus[0].cordon.reason, node.gpus[0].cordon.drain_at) == ("fan is loud", None)
    drained = fleet.drain("n1", "to be replaced", "GPU-1", grace_seconds=600.0).gpus[0].cordon
    assert drained is not None
    assert drained.drain_at is not None
    (sent,) = served.service.called("Drain")
    assert (sent.gpu_uuid, sent.grace_seconds) == ("GPU-1", 600.0)
    assert fleet.uncordon("n1", "GPU-1").gpus[0].cordon is None


def test_drain_without_a_grace_has_no_end(fleet: Fleet, served: Served) -> None:
    assert fleet.drain("n1", "to be replaced").drain_at is None
    fleet.drain("n1", "to be replaced", grace_seconds=0.0)
    waits, ends = served.service.called("Drain")
    assert (waits.HasField("grace_seconds"), ends.HasField("grace_seconds")) == (False, True)


def test_grace_is_seconds(fleet: Fleet, served: Served) -> None:
    for grace in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="grace_seconds: wanted seconds"):
            fleet.drain("n1", "to be replaced", grace_seconds=grace)
    assert served.service.called("Drain") == []


def test_health_asks_for_the_healthy_ones_only_where_told(fleet: Fleet, served: Served) -> None:
    fleet.health()
    fleet.health(include_healthy=True)
    assert [each.include_healthy for each in served.service.called("ListHealth")] == [False, True]


def test_every_other_call_arrives(fleet: Fleet) -> None:
    granted = fleet.request()
    assert [node.name for node in fleet.nodes().nodes] == ["n1"]
    assert [each.id for each in fleet.allocations().allocations] == [granted.id]
    assert fleet.keep_alive(granted.id).state is AllocationState.GRANTED
    assert fleet.explain(granted.id).allocation == granted
    assert fleet.explain_request(gpus=2).placeable
    assert fleet.uncordon("n1").cordoned is None


async def test_address_comes_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_ADDRESS", served.address)
    async with connect_async() as async_fleet:
        assert (await async_fleet.nodes()).resource_version == 7
    with connect() as fleet:
        assert fleet.nodes().resource_version == 7
    with pytest.raises(InvalidRequest, match="address"):
        connect("no address")


def test_what_is_not_known_is_not_found(fleet: Fleet) -> None:
    with pytest.raises(NotFound, match="it is not known"):
        fleet.release("nobody")


def test_nobody_there_is_unreachable(client: Connect, served: Served) -> None:
    served.stop()
    with pytest.raises(Unreachable, match=served.address):
        client(patience=0.2).nodes()


def test_no_answer_in_time_is_unreachable(client: Connect, served: Served) -> None:
    served.service.hang.set()
    with pytest.raises(Unreachable, match="did not answer in time"):
        client(timeout=0.3).nodes()


def test_call_survives_a_restart(fleet: Fleet, served: Served) -> None:
    fleet.nodes()
    served.stop()
    answer = in_background(fleet.nodes)
    served.start()
    assert answer.result(PATIENCE_SECONDS).resource_version == 7


def test_watch_goes_on_without_a_gap(fleet: Fleet, served: Served) -> None:
    changes = fleet.watch(40)
    versions = [change.resource_version for change in itertools.islice(changes, 5)]
    changes.close()
    assert versions == [41, 42, 43, 44, 45]
    assert [each.resource_version for each in served.service.called("Watch")][:3] == [40, 42, 44]


# --- waiting


def test_waiting_is_told_and_ends_with_a_grant(fleet: Fleet, served: Served) -> None:
    first = fleet.request()
    told: list[str] = []

    def give_back(allocation_id: str) -> None:
        told.append(allocation_id)
        served.service.end(first.id, "released")

    second = fleet.request(wait="1h", on_waiting=give_back)
    assert told == [second.id]
    (_, sent) = served.service.called("Allocate")
    assert sent.wait_seconds == pytest.approx(3600.0, abs=60.0)


def test_what_is_granted_at_once_never_waited(fleet: Fleet) -> None:
    told: list[str] = []
    fleet.request(wait="1h", on_waiting=told.append)
    assert told == []


def test_waiting_survives_a_restart(client: Connect, served: Served) -> None:
    service = served.service
    first = client().request()
    second = in_background(lambda: client().request(wait="1h"))
    service.until("the request to wait", lambda: len(service.allocations) == 2)
    served.stop()
    served.start()
    service.until("it to come again", lambda: len(service.called("Allocate")) == 3)
    service.end(first.id, "released")
    assert second.result(PATIENCE_SECONDS).state is AllocationState.GRANTED
    assert len(service.allocations) == 2


def test_who_gives_up_leaves_the_queue(fleet: Fleet, served: Served) -> None:
    fleet.request()

    def give_up(_: str) -> None:
        raise KeyError("the caller's own error")

    with pytest.raises(KeyError):
        fleet.request(wait="1h", on_waiting=give_up)
    (release,) = served.service.called("Release")
    assert served.service.allocations[release.allocation_id].state == ENDED


async def test_cancelled_task_leaves_the_queue(served: Served) -> None:
    waits = asyncio.Event()
    async with AsyncFleet(served.address) as fleet:
        await fleet.request()
        task = asyncio.create_task(fleet.request(wait="1h", on_waiting=lambda _: waits.set()))
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (release,) = served.service.called("Release")
    assert served.service.allocations[release.allocation_id].state == ENDED


# --- contexts


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUDA, raising=False)


def test_context_sets_the_environment_and_gives_back(fleet: Fleet, served: Served) -> None:
    with fleet.allocate(gpus=1) as lease:
        assert os.environ[CUDA] == lease.env[CUDA] == f"GPU-of-{lease.id}"
        (sent,) = served.service.called("Allocate")
        # What sets variables of this process is for this host, and ends soon after this process.
        assert sent.request.host_boot_id == host_boot_id()
        assert sent.request.ttl_seconds == 60.0
    assert CUDA not in os.environ
    assert served.service.allocations[lease.id].ended_reason == "released"


def test_context_gives_back_after_an_error(fleet: Fleet, served: Served) -> None:
    with pytest.raises(ZeroDivisionError), fleet.allocate() as lease:
        raise ZeroDivisionError
    assert CUDA not in os.environ
    assert served.service.allocations[lease.id].state == ENDED


def test_context_without_environment_takes_any_host(fleet: Fleet, served: Served) -> None:
    with fleet.allocate(set_environment=False):
        assert CUDA not in os.environ
    (sent,) = served.service.called("Allocate")
    assert sent.request.host_boot_id == ""


def test_context_keeps_its_allocation_alive(fleet: Fleet, served: Served) -> None:
    with fleet.allocate(ttl=0.15) as lease:
        served.service.until("keep-alives", lambda: len(served.service.called("KeepAlive")) >= 3)
        assert lease.ended is None
    kept = len(served.service.called("KeepAlive"))
    fleet.nodes()
    assert len(served.service.called("KeepAlive")) == kept


def test_keep_alive_outlives_a_restart(fleet: Fleet, served: Served) -> None:
    service = served.service
    with fleet.allocate(ttl=0.15) as lease:
        served.stop()
        before = len(service.called("KeepAlive"))
        served.start()
        service.until("a keep-alive", lambda: len(service.called("KeepAlive")) > before)
        assert lease.ended is None


def test_end_underneath_is_told_and_raised(fleet: Fleet, served: Served) -> None:
    told: list[AllocationEnded] = []
    ended = threading.Event()

    def note(error: AllocationEnded) -> None:
        told.append(error)
        ended.set()

    def lose_it() -> None:
        with fleet.allocate(ttl=0.15, on_ended=note) as lease:
            served.service.end(lease.id, "expired: no keep-alive")
            assert ended.wait(PATIENCE_SECONDS)
            assert lease.ended is told[0]

    with pytest.raises(AllocationEnded, match="expired: no keep-alive"):
        lose_it()
    assert len(told) == 1
    assert CUDA not in os.environ


def test_end_that_only_the_release_learns_of_is_raised(fleet: Fleet, served: Served) -> None:
    with pytest.raises(AllocationEnded, match="refused by node"), fleet.allocate() as lease:
        served.service.end(lease.id, "refused by node n1")


def test_error_of_the_body_is_not_hidden(fleet: Fleet, served: Served) -> None:
    def lose_it_and_fail() -> None:
        with fleet.allocate() as lease:
            served.service.end(lease.id, "expired")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        lose_it_and_fail()
    assert caught.value.__notes__ == ["stoker: allocation a1 is ended: expired"]
