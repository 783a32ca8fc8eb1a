"""kill -9 of a client: its allocation is there until the TTL is over, and gone after it."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.support.daemons import Daemon, Stage, free_nodes, python_module
from tests.support.waiting import until

from stoker.client import Allocation, AllocationState, AsyncFleet

TTL_SECONDS = 3.0

WITH_THE_SDK = f"""
import time, stoker.client
with stoker.client.connect() as fleet, fleet.allocate(gpus=1, holder="doomed", ttl={TTL_SECONDS}):
    time.sleep(1000)
"""

CLIENTS = {
    "the SDK's context": [sys.executable, "-c", WITH_THE_SDK],
    "stoker alloc -- COMMAND": [
        *python_module("stoker.cli"),
        *("alloc", "--gpus", "1", "--holder", "doomed", "--ttl", f"{TTL_SECONDS:g}s"),
        *("--", "sleep", "1000"),
    ],
}


async def the_doomed(fleet: AsyncFleet) -> Allocation | None:
    found = (await fleet.allocations(include_ended=True)).allocations
    return next((each for each in found if each.request.holder == "doomed"), None)


async def the_ended(fleet: AsyncFleet) -> Allocation | None:
    found = await the_doomed(fleet)
    return found if found is not None and found.state is AllocationState.ENDED else None


@pytest.mark.parametrize("client", CLIENTS)
async def test_allocation_outlives_its_client_until_the_ttl(client: str, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        await stage.aggregator().start()
        await stage.agent("node-a", "1xT4").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            environment = {"STOKER_ADDRESS": stage.address}
            process = stage.other(
                Daemon("client", CLIENTS[client], tmp_path, "nowhere", environment)
            )
            process.spawn()

            async def is_kept_alive() -> bool:
                """Once it was kept alive, it expires later than one TTL after the grant."""
                assert process.is_running, process.log
                found = await the_doomed(fleet)
                if found is None or found.expires_at is None or found.granted_at is None:
                    return False
                return found.expires_at > found.granted_at + TTL_SECONDS

            await until("a keep-alive", is_kept_alive)
            children = psutil.Process(process.process.pid).children(recursive=True)
            process.kill()
            for child in children:
                child.kill()
            left = await the_doomed(fleet)
            assert left is not None
            assert left.state is AllocationState.GRANTED
            assert left.expires_at is not None

            ended = await until("the TTL to end it", lambda: the_ended(fleet))
            assert ended.ended_reason.startswith("expired")
            assert ended.ended_at is not None
            # Not before: nobody has kept it alive since.
            assert ended.ended_at >= left.expires_at
            # And the GPU is the next one's.
            await fleet.request(gpus=1, holder="next")


async def test_killed_aggregator_ends_no_lease_early(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        aggregator = stage.aggregator()
        await aggregator.start()
        await stage.agent("node-a", "1xT4").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            granted = await fleet.request(gpus=1, holder="doomed", ttl=TTL_SECONDS)
            aggregator.kill()
            restarted_at = time.time()
            await aggregator.start()
            left = await the_doomed(fleet)
            assert left is not None
            assert (left.id, left.state) == (granted.id, AllocationState.GRANTED)
            assert left.expires_at is not None
            assert left.expires_at >= restarted_at + TTL_SECONDS
            ended = await until("the TTL to end it", lambda: the_ended(fleet))
            assert ended.ended_at is not None
            assert ended.ended_at >= left.expires_at
