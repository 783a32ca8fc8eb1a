"""A GPU that was lost, or is new, is read without a restart of the agent."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.driver_hosts import (
    HASTY,
    PATIENCE,
    Scene,
    eventually,
    hang,
    has_facts,
    pid_of,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.driver_host.link import DriverHost

EAGER = replace(PATIENCE, retrial_seconds_min=0.3, retrial_seconds_max=0.6)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "scenario.json")


def lose(gpu: int) -> dict[str, Any]:
    return {"fault": "lose", "gpu": gpu}


async def test_a_lost_gpu_comes_back_with_a_fresh_session(scene: Scene) -> None:
    async with running(scene.source, EAGER) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        first = pid_of(host)
        scene.faults(lose(3))
        assert [r.uuid for r in await host.sample() if not has_facts(r)] == [uuids[3]]
        assert host.describe().awaited_gpus == (uuids[3],)
        # While it is gone the others are read, by one fresh session after the other.
        await until_true("a renewal in vain", lambda: host.counters.renewals_total == 1)
        assert [r.uuid for r in await host.sample() if not has_facts(r)] == [uuids[3]]
        assert [fault.uuid for fault in (await host.ready()).missing] == [uuids[3]]
        scene.mend()
        readings = await eventually(host.sample, lambda told: all(map(has_facts, told)))
        assert sorted(reading.uuid for reading in readings) == sorted(uuids)
        assert pid_of(host) != first
        assert host.describe().awaited_gpus == ()
        counters = host.counters
        assert counters.renewals_total == counters.starts_total - 1
        assert (counters.restarts_total, counters.failures_total, counters.kills_total) == (0, 0, 0)


async def test_a_lost_gpu_does_not_come_back_by_itself_before_its_time(scene: Scene) -> None:
    async with running(scene.source) as host:
        await host.ready()
        scene.faults(lose(3))
        await host.sample()
        scene.mend()
        assert len([r for r in await host.sample() if not has_facts(r)]) == 1
        assert host.counters.renewals_total == 0


async def test_a_gpu_that_was_lost_before_the_agent_came_is_found_later(scene: Scene) -> None:
    scene.faults(lose(1))
    async with running(scene.source, EAGER) as host:
        assert [gpu.index for gpu in (await host.ready()).gpus] == [0, 2, 3]
        assert host.describe().awaited_gpus == ("GPU 1",)
        scene.mend()
        await eventually(host.sample, lambda told: len(told) == 4)
        assert [gpu.index for gpu in (await host.ready()).gpus] == [0, 1, 2, 3]
        assert host.describe().awaited_gpus == ()


async def test_a_gpu_that_is_not_counted_any_more_comes_back(scene: Scene) -> None:
    async with running(scene.source, EAGER) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        scene.faults({"fault": "vanish", "gpu": 1})
        inventory = await host.inventory()
        assert [(gpu.index, gpu.uuid) for gpu in inventory.gpus] == [
            (0, uuids[0]),
            (1, uuids[2]),
            (2, uuids[3]),
        ]
        assert host.describe().awaited_gpus == (uuids[1],)
        scene.mend()
        await eventually(host.sample, lambda told: len(told) == 4)
        assert host.describe().awaited_gpus == ()


async def test_questions_wait_out_a_renewal(scene: Scene) -> None:
    async with running(scene.source, EAGER) as host:
        await host.ready()
        scene.faults(lose(3))
        await host.sample()

        async def ask_until_renewed(host: DriverHost) -> None:
            while host.counters.renewals_total < 2:
                assert len([r for r in await host.sample() if has_facts(r)]) == 3
                await asyncio.sleep(0.01)

        await asyncio.gather(ask_until_renewed(host), ask_until_renewed(host))
        assert host.counters.failures_total == 0


async def test_no_session_is_begun_for_a_lost_gpu_while_another_one_hangs(scene: Scene) -> None:
    patience = replace(HASTY, retrial_seconds_min=0.6, retrial_seconds_max=0.6)
    async with running(scene.source, patience) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        scene.faults(lose(3), hang(2))
        await eventually(host.sample, lambda told: len(told) == 4)
        # Trying the one that hangs brings fresh sessions, which find the lost one missing.
        await until_true("trials", lambda: host.counters.timeouts_total >= 3)
        assert host.counters.renewals_total == 0
        # A trial in vain ends in a session that finds the lost one, once it is there again.
        scene.faults(hang(2))
        await eventually(host.sample, lambda told: len([r for r in told if has_facts(r)]) == 3)
        assert [suspect.uuid for suspect in host.suspects] == [uuids[2]]
        assert host.counters.renewals_total == 0
        scene.mend()
        await eventually(host.sample, lambda told: len(told) == 4 and all(map(has_facts, told)))


async def test_a_gpu_that_hangs_when_it_is_looked_for_again_is_one_suspect(scene: Scene) -> None:
    async with running(scene.source, replace(HASTY, retrial_seconds_min=0.3)) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        scene.faults(hang(2))
        await eventually(host.sample, lambda told: len(told) == 4)
        scene.faults(hang(2, "nvmlDeviceGetHandleByIndex"))
        before = host.counters.timeouts_total
        await until_true("a trial in vain", lambda: host.counters.timeouts_total > before)
        readings = await eventually(host.sample, lambda told: len(told) == 4)
        assert {r.uuid for r in readings if not has_facts(r)} == {uuids[2]}
        assert [suspect.uuid for suspect in host.suspects] == [uuids[2]]


async def test_release_during_a_renewal_is_a_release(scene: Scene) -> None:
    async with running(scene.source, EAGER) as host:
        await host.ready()
        scene.faults(lose(3))
        await host.sample()
        await until_true("a renewal", lambda: host.counters.renewals_total == 1)
        await host.release()
        scene.mend()
        starts = host.counters.starts_total
        host.resume()
        assert len((await host.ready()).gpus) == 4  # the lost one is found by the way
        assert host.counters.starts_total == starts + 1
        assert host.describe().awaited_gpus == ()
