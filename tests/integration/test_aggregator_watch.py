"""Watch: every durable change once and in order, from now, from a version, across a restart."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.integration.aggregator_stage import Failure, Stage, serving

from stoker.v1 import fleet_pb2, types_pb2

Watched = aio.UnaryStreamCall[fleet_pb2.WatchRequest, fleet_pb2.WatchResponse]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        yield stage


def watch(stage: Stage, version: int) -> "Watched":
    return stage.fleet.Watch(fleet_pb2.WatchRequest(resource_version=version))


async def take(call: "Watched", count: int) -> list[fleet_pb2.WatchResponse]:
    found: list[fleet_pb2.WatchResponse] = []
    while len(found) < count:
        change = await call.read()
        assert isinstance(change, fleet_pb2.WatchResponse)
        found.append(change)
    return found


def told(changes: list[fleet_pb2.WatchResponse]) -> list[tuple[int, str, str]]:
    """Version, event, and the id and state, or the name, of what it changed."""
    found: list[tuple[int, str, str]] = []
    for change in changes:
        if change.HasField("allocation"):
            state = types_pb2.AllocationState.Name(change.allocation.state)
            about = state.removeprefix("ALLOCATION_STATE_").lower()
        else:
            about = change.node.name
        found.append((change.resource_version, change.event, about))
    return found


STORY = [
    (1, "NodeRegistered", "n1"),
    (2, "AllocationGranted", "granted"),
    (3, "AllocationReleasing", "releasing"),
    (4, "AllocationEnded", "ended"),
    (5, "NodeCordoned", "n1"),
]


async def live_the_story(stage: Stage) -> None:
    async with stage.agent():
        granted = await stage.allocate()
        await stage.release(granted.id, wait=10)
        await stage.fleet.Cordon(fleet_pb2.CordonRequest(node="n1", reason="fans"))


async def test_changes_come_in_order_as_they_happen(stage: Stage) -> None:
    call = watch(stage, 0)
    await call.initial_metadata()  # it is heard: from here on nothing escapes it
    taking = asyncio.ensure_future(take(call, len(STORY)))
    await live_the_story(stage)
    changes = await taking
    assert told(changes) == STORY
    assert changes[1].at == changes[1].allocation.granted_at
    assert changes[-1].node.cordoned == "fans"
    call.cancel()


async def test_changes_after_a_version_are_told_first(stage: Stage) -> None:
    await live_the_story(stage)
    for version in (1, 3):
        call = watch(stage, version)
        assert told(await take(call, len(STORY) - version)) == STORY[version:]
        call.cancel()


async def test_from_nothing_everything_is_told_as_it_is(stage: Stage) -> None:
    await live_the_story(stage)
    call = watch(stage, 0)
    (present,) = await take(call, 1)
    assert (present.resource_version, present.event, present.node.name) == (5, "Present", "n1")
    await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1"))
    assert told(await take(call, 1)) == [(6, "NodeUncordoned", "n1")]
    call.cancel()


async def test_history_survives_a_restart(tmp_path: Path) -> None:
    """After an orderly stop nothing is replayed, so the changes come from the store."""
    async with serving(tmp_path) as stage:
        await live_the_story(stage)
    async with serving(tmp_path) as stage:
        call = watch(stage, 1)
        assert told(await take(call, 4)) == STORY[1:]
        await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1"))
        assert told(await take(call, 1)) == [(6, "NodeUncordoned", "n1")]
        call.cancel()


async def test_version_that_is_no_longer_kept_is_out_of_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.aggregator.store.EVENTS_KEPT", 2)
    for _ in range(2):  # each stop writes a snapshot; the second covers more than is kept
        async with serving(tmp_path) as stage:
            await live_the_story(stage)
            await stage.fleet.Uncordon(fleet_pb2.UncordonRequest(node="n1"))
    async with serving(tmp_path) as stage:
        for version, word in ((1, "too old"), (1_000, "not reached yet")):
            with pytest.raises(aio.AioRpcError) as caught:
                await take(watch(stage, version), 1)
            failure = Failure(caught.value)
            assert failure.code is grpc.StatusCode.OUT_OF_RANGE
            assert failure.reason == "VERSION_TOO_OLD"
            assert word in failure.sentence


async def test_lists_tell_the_version_to_watch_from(stage: Stage) -> None:
    await live_the_story(stage)
    nodes = await stage.fleet.ListNodes(fleet_pb2.ListNodesRequest())
    allocations = await stage.fleet.ListAllocations(
        fleet_pb2.ListAllocationsRequest(include_ended=True)
    )
    assert (nodes.resource_version, nodes.aggregator_version) == (5, "9.9")
    assert allocations.resource_version == 5
    assert [each.resource_version for each in allocations.allocations] == [4]
    living = await stage.fleet.ListAllocations(fleet_pb2.ListAllocationsRequest())
    assert list(living.allocations) == []
