"""Every call into the driver has a deadline, and a question of many calls is no hang."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.driver_hosts import HASTY, PATIENCE, eventually, has_facts, is_in, running
from tests.support.scripted_host import FUNCTION, Script, log_of, scripted
from tests.support.waiting import until_true

from stoker.agent.driver import DriverTimeout
from stoker.agent.driver_host.frames import RealDriver
from stoker.agent.driver_host.states import Released, Running
from stoker.agent.facts import Fact

QUICK = replace(PATIENCE, call_seconds=0.3, end_grace_seconds=0.1, release_grace_seconds=0.1)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.json"
    Script().write(path)
    return path


async def test_a_sweep_of_slow_cards_may_take_longer_than_one_call(script: Path) -> None:
    async with running(RealDriver(), QUICK, scripted(script)) as host:
        await host.ready()
        Script(calls=10, call_seconds=0.05).write(script)
        began = time.monotonic()
        assert len(await host.sample()) == 2
        assert time.monotonic() - began > QUICK.call_seconds * 2
        assert (host.counters.timeouts_total, host.suspects) == (0, ())


async def test_a_sweep_without_end_is_blamed_on_the_card_that_takes_the_time(script: Path) -> None:
    async with running(RealDriver(), QUICK, scripted(script)) as host:
        await host.ready()
        Script(calls=100, call_seconds=0.1, slow_gpus=("b",)).write(script)
        with pytest.raises(DriverTimeout) as late:
            await host.sample()
        found = "took most of 3 s, and there was no end of it"
        assert str(late.value) == f"b: {FUNCTION}: {found}"
        assert [(each.uuid, each.found) for each in host.suspects] == [("b", f"{FUNCTION} {found}")]


async def test_a_hung_call_is_told_by_its_function(script: Path) -> None:
    async with running(RealDriver(), HASTY, scripted(script)) as host:
        await host.ready()
        Script(hang="nvmlSystemGetDriverVersion").write(script)
        with pytest.raises(DriverTimeout, match=r"^nvmlSystemGetDriverVersion: has not returned"):
            await host.sample()
        Script().write(script)
        assert len(await eventually(host.sample, lambda _: True)) == 2
        assert host.counters.hangs_by_function == {"nvmlSystemGetDriverVersion": 1}
        assert host.suspects == ()


async def test_dcgm_in_which_a_host_hung_is_left_alone_and_tried_again(script: Path) -> None:
    patience = replace(HASTY, retrial_seconds_min=0.5)
    async with running(RealDriver(), patience, scripted(script)) as host:
        await host.ready()
        assert [Fact.SM_ACTIVE_RATIO in each.facts for each in await host.sample()] == [True, True]
        Script(hang="dcgmGetLatestValues_v2").write(script)
        with pytest.raises(DriverTimeout, match="dcgmGetLatestValues_v2"):
            await host.sample()
        readings = await eventually(host.sample, lambda _: True)
        assert [Fact.SM_ACTIVE_RATIO in each.facts for each in readings] == [False, False]
        assert all(map(has_facts, readings))
        report = host.describe()
        assert (report.is_dcgm_left_alone, report.suspects) == (True, ())
        # Tried while it still hangs, it costs another host.
        await eventually(host.sample, lambda _: host.counters.timeouts_total == 2)
        Script().write(script)
        readings = await eventually(
            host.sample, lambda told: all(Fact.SM_ACTIVE_RATIO in each.facts for each in told)
        )
        assert len(readings) == 2
        assert not host.describe().is_dcgm_left_alone
        assert host.counters.renewals_total == 2


async def test_a_gpu_is_tried_again_without_the_counters_that_somebody_else_uses(
    script: Path,
) -> None:
    async with running(
        RealDriver(), replace(HASTY, retrial_seconds_min=0.2), scripted(script)
    ) as host:
        await host.ready()
        Script(call_seconds=60, slow_gpus=("b",)).write(script)
        with pytest.raises(DriverTimeout):
            await host.sample(profiling=False)
        Script().write(script)
        await until_true("the trial", lambda: host.suspects == ())
        assert log_of(script).read_text().splitlines() == [
            "fast without profiling",
            "fast slow without profiling",
        ]


async def test_a_sweep_is_left_at_the_next_call_when_the_devices_are_wanted_free(
    script: Path,
) -> None:
    async with running(RealDriver(), PATIENCE, scripted(script)) as host:
        await host.ready()
        Script(calls=1000, call_seconds=0.05).write(script)
        asking = asyncio.create_task(host.sample())
        await until_true("a sweep that takes 100 s", lambda: is_in(host, FUNCTION))
        await host.release()
        assert isinstance(host.state, Released)
        assert host.counters.kills_total == 0
        await asyncio.gather(asking, return_exceptions=True)


async def test_gpus_that_came_and_went_are_found_by_the_way(script: Path) -> None:
    async with running(RealDriver(), PATIENCE, scripted(script)) as host:
        first = await host.ready()
        Script(gpus=("b", "c", "d")).write(script)
        assert [reading.uuid for reading in await host.sample()] == ["b", "c", "d"]
        told = await host.ready()
        assert told is not first
        assert [gpu.uuid for gpu in told.gpus] == ["b", "c", "d"]
        assert (host.counters.starts_total, host.counters.failures_total) == (1, 0)
        assert host.counters.inventory_changes_total == 1
        assert host.describe().awaited_gpus == ("a",)


async def test_a_gpu_that_hangs_after_others_moved_up_is_blamed_by_its_new_place(
    script: Path,
) -> None:
    async with running(RealDriver(), HASTY, scripted(script)) as host:
        await host.ready()
        Script(gpus=("b", "c")).write(script)
        await host.sample()
        Script(gpus=("b", "c"), call_seconds=60, slow_gpus=("b",)).write(script)
        with pytest.raises(DriverTimeout):
            await host.sample()
        assert [(each.index, each.uuid) for each in host.suspects] == [(0, "b")]


async def test_what_an_operator_can_see(script: Path) -> None:
    async with running(RealDriver(), PATIENCE, scripted(script)) as host:
        await host.ready()
        Script(call_seconds=60, slow_gpus=("b",)).write(script)
        asking = asyncio.create_task(host.sample())
        await until_true("the call", lambda: host.describe().gpu == "b")
        report = host.describe()
        assert isinstance(report.state, Running)
        assert (report.is_wanted, report.function) == (True, FUNCTION)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
