"""A full disk: what cannot be written is refused, and it goes on when there is room again."""

from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from tests.support.daemons import Stage, free_nodes, ready_nodes
from tests.support.disks import fill, make_room, on_small_disk
from tests.support.raw import HEALTH, send
from tests.support.waiting import until

from stoker.client import Allocation, AllocationState, AsyncFleet, StoreUnavailable
from stoker.core.errors import ExitCode

pytestmark = pytest.mark.tmpfs


async def test_aggregator_does_not_start_on_a_full_disk(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        disk = on_small_disk(tmp_path / "aggregator", "64k", is_full=True)
        aggregator = stage.aggregator(prefix=disk)
        aggregator.spawn()
        assert await aggregator.ended() == ExitCode.STORE
        assert str(aggregator.data_dir) in aggregator.log
        assert "room" in aggregator.log or "space" in aggregator.log


async def test_agent_does_not_start_on_a_full_disk(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        disk = on_small_disk(tmp_path / "node-a", "64k", is_full=True)
        agent = stage.agent("node-a", "1xT4", prefix=disk)
        agent.spawn()
        assert await agent.ended() == ExitCode.STORE
        assert str(agent.data_dir) in agent.log
        assert "room" in agent.log or "space" in agent.log


async def test_aggregator_refuses_what_it_cannot_write_down(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        aggregator = stage.aggregator(prefix=on_small_disk(tmp_path / "aggregator", "2m"))
        await aggregator.start()
        await stage.agent("node-a", "4xT4").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            held = await fleet.request(gpus=1, holder="before")
            assert await is_serving(stage.address)
            fill(aggregator)
            granted = {held.id}
            with pytest.raises(StoreUnavailable, match=r"ledger\.sqlite3.*no room") as caught:
                await use_up(fleet, granted)
            assert caught.value.exit_code is ExitCode.STORE
            with pytest.raises(StoreUnavailable, match="no room"):
                await fleet.release(held.id)

            async def is_told() -> bool:
                return not await is_serving(stage.address)

            await until("the health to tell", is_told)
            # It goes on answering; what was acknowledged is there, what was refused is not.
            assert await live(fleet) == granted
            make_room(aggregator)
            await until("the health to tell", lambda: is_serving(stage.address))
            for id_ in sorted(granted):
                ended = await fleet.release(id_)
                assert ended.state is AllocationState.ENDED
            await fleet.request(gpus=4, holder="after")


async def test_agent_refuses_to_hold_what_it_cannot_write_down(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        await stage.aggregator().start()
        agent = stage.agent("node-a", "1xT4", prefix=on_small_disk(tmp_path / "node-a", "256k"))
        await agent.start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            fill(agent)
            held: list[Allocation] = []
            while (latest := await take_share(fleet)).state is AllocationState.GRANTED:
                held.append(latest)  # the last page of the journal had room for these
                assert len(held) < 100
            assert latest.state is AllocationState.ENDED
            assert "refused by node node-a" in latest.ended_reason
            assert "journal.jsonl: No space left on device" in latest.ended_reason
            # What it holds it goes on holding, and it goes on reporting.
            assert await live(fleet) == {each.id for each in held}
            await ready_nodes(fleet, 1)
            make_room(agent)
            assert (await take_share(fleet)).state is AllocationState.GRANTED
            for id_ in await live(fleet):
                ended = await fleet.release(id_)
                assert ended.state is AllocationState.ENDED


async def use_up(fleet: AsyncFleet, granted: set[str]) -> None:
    """Take GPUs and give them back until it is refused; `granted` is what was not given back."""
    for _ in range(1_000):
        allocation = await fleet.request(gpus=1, holder="greedy")
        granted.add(allocation.id)
        await fleet.release(allocation.id)
        granted.discard(allocation.id)


async def take_share(fleet: AsyncFleet) -> Allocation:
    """Return a new allocation once its node holds it or refused to."""
    granted = await fleet.request(memory="64MiB", holder="greedy")

    async def look() -> Allocation | None:
        listed = (await fleet.allocations(include_ended=True)).allocations
        (found,) = (each for each in listed if each.id == granted.id)
        is_over = found.state is AllocationState.ENDED
        return found if found.held_by_node or is_over else None

    return await until("the node's word", look)


async def live(fleet: AsyncFleet) -> set[str]:
    """The ids of what is granted."""
    listed = (await fleet.allocations()).allocations
    return {each.id for each in listed if each.state is AllocationState.GRANTED}


async def is_serving(address: str) -> bool:
    """Whether the health service of the aggregator at `address` says that it does its work."""
    answer: Any = health_pb2.HealthCheckResponse.FromString(
        await send(address, f"{HEALTH}Check", b"")
    )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
