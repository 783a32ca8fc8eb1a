"""`stoker services` over a real socket: tables, documents, and what is not there."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.aggregator_stage import Stage, serving
from tests.support.waiting import until

from stoker.aggregator.services import SETTLE_SECONDS
from stoker.client import connect_async


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage:
        await stage.clock.elapse(SETTLE_SECONDS)  # whatever the commands take, it has settled
        async with stage.agent():
            yield stage


async def stoker(stage: Stage, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = (sys.executable, "-m", "stoker.cli", "--address", stage.address, *arguments)
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False
    )


async def test_services_are_told(stage: Stage) -> None:
    async with connect_async(stage.address) as fleet:
        granted = await fleet.request(gpus=1, holder="ann")
        async with fleet.serve("tok", granted, address="10.0.0.1:9000", capacity=8):

            async def is_called() -> bool:
                return any(each.weight for each in (await fleet.route("tok")).endpoints)

            await until("a weight", is_called)
            table = await stoker(stage, "services")
            whole = await stoker(stage, "services", "--json")
            one = await stoker(stage, "services", "tok", "--json")
    assert (table.returncode, table.stderr) == (0, "")
    assert table.stdout.startswith(f"{stage.address}: 1 service; 1 endpoint, 1 called\n")
    assert "tok      10.0.0.1:9000  100 %" in table.stdout
    (service,) = json.loads(whole.stdout)["services"]
    assert (service["service"], service["settled"]) == ("tok", True)
    (endpoint,) = service["endpoints"]
    assert (endpoint["address"], endpoint["weight"]) == ("10.0.0.1:9000", 1.0)
    assert endpoint["reason"] == "as well as its peers"
    assert endpoint["capacity"] == 8
    assert endpoint["latency_p50_seconds"] is None
    (same,) = json.loads(one.stdout)["services"]
    assert same["endpoints"][0]["id"] == endpoint["id"]


async def test_fleet_without_services_is_told(stage: Stage) -> None:
    table = await stoker(stage, "services")
    assert table.stdout == f"{stage.address}: 0 services; 0 endpoints, 0 called\n"
    assert json.loads((await stoker(stage, "services", "--json")).stdout) == {"services": []}


async def test_service_that_nobody_serves_is_not_found(stage: Stage) -> None:
    done = await stoker(stage, "services", "nobody")
    assert (done.returncode, done.stderr) == (6, "stoker: service nobody has no endpoint\n")
    done = await stoker(stage, "services", "no such name")
    assert done.returncode == 2
    assert "service: must be letters" in done.stderr
