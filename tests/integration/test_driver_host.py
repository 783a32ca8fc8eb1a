"""The driver host as a process: it hangs, dies and is held, and the agent knows what is so."""

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.driver_hosts import (
    HANGING,
    HASTY,
    PATIENCE,
    Scene,
    eventually,
    hang,
    has_facts,
    is_gone,
    is_in,
    pid_of,
    proc,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.driver import DriverNotLoaded, DriverTimeout, HostEnded
from stoker.agent.driver_host.states import Failed


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "scenario.json")


async def test_a_node_is_read_through_its_host(scene: Scene) -> None:
    scene.faults(processes=[{"gpu": 1, "pid": 5_000_001, "name": "train", "memory": "2GiB"}])
    async with running(scene.source) as host:
        inventory = await host.ready()
        assert inventory.simulated
        assert [gpu.model for gpu in inventory.gpus] == ["NVIDIA H100 80GB HBM3"] * 4
        uuids = [gpu.uuid for gpu in inventory.gpus]
        assert [reading.uuid for reading in await host.sample()] == uuids
        users = await host.processes()
        assert [(p.uuid, p.pid, p.name) for p in users.processes] == [
            (uuids[1], 5_000_001, "train")
        ]
        assert (await host.inventory()).gpus == inventory.gpus
        assert host.counters.starts_total == 1
        assert host.counters.failures_total == 0


async def test_how_much_memory_an_idle_host_takes(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(scene.source) as host:
        await host.ready()
        for _ in range(50):
            await host.sample()
        kib = int(proc(host, "status").partition("VmRSS:")[2].split()[0])
        loaded = proc(host, "maps")
    with capsys.disabled():
        sys.stdout.write(f" driver host, simulated, idle: RSS {kib / 1024:.1f} MiB ")
    # Agent and host together have 80 MB; a host that imports what the agent does takes more.
    assert kib < 48 * 1024
    assert "grpc" not in loaded


async def test_a_gpu_that_hangs_is_left_alone_and_the_others_are_read(scene: Scene) -> None:
    async with running(scene.source, HASTY) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        first = pid_of(host)
        scene.faults(hang(2))
        with pytest.raises(DriverTimeout) as late:
            await host.sample()
        assert str(late.value) == (f"{uuids[2]}: {HANGING}: has not returned within 0.5 s")
        readings = await eventually(host.sample, lambda readings: len(readings) == 4)
        assert is_gone(first)
        by_uuid = {reading.uuid: reading for reading in readings}
        assert [has_facts(by_uuid[uuid]) for uuid in uuids] == [True, True, False, True]
        (failure,) = by_uuid[uuids[2]].failures
        assert (failure.fact, failure.error_kind) == ("gpu", "driver_timeout")
        assert f"left alone: {HANGING} has not returned" in failure.message
        assert [fault.uuid for fault in (await host.inventory()).missing] == [uuids[2]]
        assert [fault.uuid for fault in (await host.processes()).failed_gpus] == [uuids[2]]
        assert host.counters.timeouts_total >= 1
        assert host.counters.restarts_total >= 1


async def test_a_gpu_that_hung_is_tried_again_until_it_answers(scene: Scene) -> None:
    async with running(scene.source, replace(HASTY, retrial_seconds_min=0.2)) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        scene.faults(hang(2))
        await eventually(host.sample, lambda told: any(not has_facts(r) for r in told))
        # Tried again while it still hangs, it costs another host, and stays a suspect.
        before = host.counters.timeouts_total
        await until_true("another timeout", lambda: host.counters.timeouts_total > before)
        assert [suspect.uuid for suspect in host.suspects] == [uuids[2]]
        scene.mend()
        readings = await eventually(host.sample, lambda told: all(map(has_facts, told)))
        assert sorted(reading.uuid for reading in readings) == sorted(uuids)
        assert host.suspects == ()


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName"])
async def test_a_gpu_that_hangs_from_the_first_day_keeps_nobody_else_away(
    scene: Scene, function: str
) -> None:
    scene.faults(hang(1, function))
    async with running(
        scene.source, replace(PATIENCE, start_seconds=1, end_grace_seconds=0.1)
    ) as h:
        inventory = await eventually(h.ready, lambda _: True)
        assert [gpu.index for gpu in inventory.gpus] == [0, 2, 3]
        (missing,) = inventory.missing
        assert (missing.index, missing.error_kind) == (1, "driver_timeout")
        assert f"{function} has not returned within 1 s" in missing.message
        assert len([r for r in await h.sample() if has_facts(r)]) == 3


async def test_a_driver_that_hangs_as_a_whole_is_tried_until_it_answers(scene: Scene) -> None:
    scene.faults(hang(None, "nvmlInit"))
    patience = replace(PATIENCE, start_seconds=2, call_seconds=0.1, end_grace_seconds=0.1)
    async with running(scene.source, patience) as host:
        await until_true("the call that hangs", lambda: is_in(host, "nvmlInit"))
        with pytest.raises(DriverTimeout, match="is starting, in nvmlInit; waited"):
            await host.sample()
        await until_true("a restart", lambda: host.counters.restarts_total == 1)
        assert (host.counters.timeouts_total, host.suspects) == (1, ())
        scene.mend()
        assert len((await eventually(host.ready, lambda _: True)).gpus) == 4


async def test_a_list_of_processes_that_hangs_is_no_list(scene: Scene) -> None:
    async with running(scene.source, HASTY) as host:
        await host.ready()
        scene.faults(hang(0, "nvmlDeviceGetComputeRunningProcesses"))
        with pytest.raises(DriverTimeout, match="nvmlDeviceGetComputeRunningProcesses"):
            await host.processes()
        users = await eventually(host.processes, lambda _: True)
        assert [fault.index for fault in users.failed_gpus] == [0]


async def test_who_waits_behind_a_slow_question_does_not_blame_the_host(scene: Scene) -> None:
    async with running(scene.source, replace(PATIENCE, call_seconds=0.2)) as host:
        await host.ready()
        scene.faults(hang(0, "nvmlDeviceGetGraphicsRunningProcesses"))
        slow = asyncio.create_task(host.processes())
        await asyncio.sleep(0)
        with pytest.raises(DriverTimeout, match="busy with another question"):
            await host.sample()
        scene.mend()
        assert (await slow).failed_gpus == ()
        assert len(await host.sample()) == 4
        assert host.counters.starts_total == 1


async def test_a_lost_gpu_is_told_and_the_host_lives_on(scene: Scene) -> None:
    async with running(scene.source) as host:
        uuids = [gpu.uuid for gpu in (await host.ready()).gpus]
        scene.faults({"fault": "lose", "gpu": 3})
        readings = await host.sample()
        assert [r.failures[0].error_kind for r in readings if r.failures] == ["gpu_lost"]
        inventory = await host.inventory()
        assert [fault.uuid for fault in inventory.missing] == [uuids[3]]
        # It was found once, so it is known by name though it is not found any more.
        readings = await host.sample()
        assert {r.uuid for r in readings} == set(uuids)
        assert [r.uuid for r in readings if not has_facts(r)] == [uuids[3]]
        assert host.counters.starts_total == 1


async def test_a_module_that_is_unloaded_ends_the_host_and_a_loaded_one_brings_it_back(
    scene: Scene,
) -> None:
    async with running(scene.source) as host:
        await host.ready()
        scene.faults(driver_loaded=False)
        with pytest.raises(DriverNotLoaded):
            await host.sample()
        await until_true("a failure", lambda: isinstance(host.state, Failed))
        with pytest.raises(DriverNotLoaded):
            await host.ready()
        scene.mend()
        assert len(await eventually(host.sample, lambda _: True)) == 4
        assert host.counters.timeouts_total == 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_a_host_that_is_killed_is_replaced(scene: Scene, signum: int) -> None:
    async with running(scene.source) as host:
        await host.ready()
        killed = pid_of(host)
        os.kill(killed, signum)
        await until_true(
            "the end of the host",
            lambda: is_gone(killed),
        )
        assert len(await eventually(host.sample, lambda _: True)) == 4
        assert pid_of(host) != killed
        assert host.suspects == ()
        assert host.counters.restarts_total >= 1


async def test_a_gpu_on_which_the_host_crashes_is_left_alone(scene: Scene) -> None:
    async with running(scene.source) as host:
        await host.ready()
        scene.faults(hang(2))  # so that the crash surely comes in the middle of a call
        asking = asyncio.create_task(host.sample())
        await until_true("the call that hangs", lambda: is_in(host, HANGING))
        os.kill(pid_of(host), signal.SIGSEGV)
        with pytest.raises(HostEnded):
            await asking
        readings = await eventually(host.sample, lambda _: True)
        assert len([reading for reading in readings if has_facts(reading)]) == 3
        (suspect,) = host.suspects
        assert suspect.index == 2
        assert f"{HANGING} ended the driver host: Segmentation fault" in suspect.found
