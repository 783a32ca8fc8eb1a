"""DCGM in the driver host's process: what it tells, and that it costs nothing but itself."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.daemons import Stage
from tests.support.driver_hosts import PATIENCE, eventually, pid_of, proc, running
from tests.support.pages import fetch_metrics, read_page
from tests.support.waiting import until, until_true

from stoker.agent.dcgm.fields import FIELDS
from stoker.agent.driver_host.frames import DcgmEngine, SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuReading
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import parse_simulate_spec
from stoker.testing.dcgm_engine import EngineGpu, FakeHostengine, write_bindings

DCGM_FACTS = frozenset(FIELDS.values())
Readings = tuple[GpuReading, ...]
_, T4 = parse_simulate_spec("1xT4")


@pytest.fixture
def engine() -> Iterator[FakeHostengine]:
    """A hostengine that knows its GPUs once they are known."""
    engine = FakeHostengine([])
    engine.value = lambda number, field: number if field >= 1009 else 0.125 * (number + 1)
    with engine:
        yield engine


def source(engine: FakeHostengine, bindings: Path, *specs: str) -> SimulatedDriver:
    return SimulatedDriver(
        specs or ("2xA100-80GB",), "n1", dcgm=DcgmEngine(engine.address, bindings, 0.5)
    )


@pytest.fixture
async def host(engine: FakeHostengine, tmp_path: Path) -> AsyncIterator[DriverHost]:
    async with running(source(engine, write_bindings(tmp_path / "bindings"))) as host:
        engine.gpus = [EngineGpu(gpu.uuid) for gpu in (await host.ready()).gpus]
        yield host


def told_by_dcgm(readings: Readings) -> list[frozenset[Fact]]:
    return [DCGM_FACTS.intersection(reading.facts) for reading in readings]


def has_dcgm(readings: Readings) -> bool:
    return all(told_by_dcgm(readings))


def has_failed(readings: Readings) -> bool:
    return all(any(f.fact == "dcgm" for f in reading.failures) for reading in readings)


async def paused(host: DriverHost) -> Readings:
    """A reading during a pause that DCGM has confirmed."""
    return await eventually(
        lambda: host.sample(profiling=False), lambda readings: not has_failed(readings)
    )


def stands_without(readings: Readings) -> bool:
    """NVML's facts are all there, DCGM's are not."""
    return all(
        Fact.POWER_WATTS in reading.facts and not reading.is_lost for reading in readings
    ) and not any(told_by_dcgm(readings))


async def test_hardware_counters_of_ampere_come_from_dcgm(
    host: DriverHost, engine: FakeHostengine
) -> None:
    readings = await eventually(host.sample, has_dcgm)
    assert told_by_dcgm(readings) == [DCGM_FACTS, DCGM_FACTS]
    assert [reading.facts[Fact.SM_ACTIVE_RATIO] for reading in readings] == [0.125, 0.25]
    assert all(Fact.POWER_WATTS in reading.facts for reading in readings)
    assert [reading.failures for reading in readings] == [(), ()]
    assert {number for _, number, _ in engine.watched} == {0, 1}


async def test_a_gpu_that_nvml_tells_of_is_left_to_nvml(
    engine: FakeHostengine, tmp_path: Path
) -> None:
    bindings = write_bindings(tmp_path / "bindings")
    async with running(source(engine, bindings, "1xA100-80GB", "1xH100-80GB")) as host:
        engine.gpus = [EngineGpu(gpu.uuid) for gpu in (await host.ready()).gpus]
        await eventually(host.sample, has_dcgm)
        assert {number for _, number, _ in engine.watched} == {0}


async def test_the_instances_of_a_divided_gpu_are_told_apart(
    engine: FakeHostengine, tmp_path: Path
) -> None:
    scenario = tmp_path / "scenario.json"
    scenario.write_text(json.dumps({"mig": [{"gpu": 0, "devices": ["3g.40gb", "1g.10gb"]}]}))
    bindings = write_bindings(tmp_path / "bindings")
    divided = replace(source(engine, bindings, "1xA100-80GB"), scenario_path=str(scenario))

    def has_instances(readings: Readings) -> bool:
        return all(DCGM_FACTS.intersection(device.facts) for device in readings[0].mig_devices)

    async with running(divided) as host:
        (gpu,) = (await host.ready()).gpus
        (reading,) = await host.sample()
        numbers = tuple(device.gpu_instance_id for device in reading.mig_devices)
        assert len(set(numbers)) == 2
        engine.gpus = [EngineGpu(gpu.uuid, instances=numbers)]
        (reading,) = await eventually(host.sample, has_instances)
    assert [device.facts[Fact.SM_ACTIVE_RATIO] for device in reading.mig_devices] == [
        0.125 * (number + 1) for number in numbers
    ]
    # Traffic is the GPU's alone.
    assert Fact.PCIE_TRANSMIT_BYTES_PER_SECOND in reading.facts
    assert all(
        Fact.PCIE_TRANSMIT_BYTES_PER_SECOND not in device.facts for device in reading.mig_devices
    )


async def test_profiling_is_paused_and_resumed(host: DriverHost, engine: FakeHostengine) -> None:
    await eventually(host.sample, has_dcgm)
    readings = await paused(host)
    assert stands_without(readings)
    assert [reading.failures for reading in readings] == [(), ()]
    assert engine.is_paused
    await eventually(host.sample, has_dcgm)
    assert not engine.is_paused


async def test_a_pause_ends_with_the_driver_host(host: DriverHost, engine: FakeHostengine) -> None:
    await eventually(host.sample, has_dcgm)
    await paused(host)
    assert engine.is_paused
    await host.release()
    assert not engine.is_paused
    await until_true("its watches to go", lambda: not engine.watched)


async def test_a_hostengine_that_is_killed_and_comes_back(
    host: DriverHost, engine: FakeHostengine
) -> None:
    await eventually(host.sample, has_dcgm)
    pid = pid_of(host)
    engine.stop()
    readings = await host.sample()
    assert stands_without(readings)
    assert has_failed(readings)
    engine.start()
    await eventually(host.sample, has_dcgm)
    assert pid_of(host) == pid
    assert host.counters.failures_total == 0


async def test_a_hostengine_that_hangs_costs_dcgms_facts_only(
    host: DriverHost, engine: FakeHostengine
) -> None:
    await eventually(host.sample, has_dcgm)
    pid = pid_of(host)
    engine.hang()
    for _ in range(5):
        readings = await host.sample()
        assert stands_without(readings)
        assert has_failed(readings)
    engine.answering.set()
    await eventually(host.sample, has_dcgm)
    assert pid_of(host) == pid
    assert host.counters.failures_total == 0


async def test_another_profiler_has_the_counters(host: DriverHost, engine: FakeHostengine) -> None:
    engine.has_other_profiler = True
    readings = await eventually(host.sample, has_failed)
    assert stands_without(readings)
    (failure,) = readings[0].failures
    assert failure.error_kind == "not_available"
    assert failure.message.startswith(f"{readings[0].uuid}: dcgmWatchFields: ")
    engine.has_other_profiler = False
    await eventually(host.sample, has_dcgm)


async def test_a_folder_without_bindings_is_one_line(
    engine: FakeHostengine, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(source(engine, tmp_path)) as host:
        readings = await eventually(host.sample, has_failed)
        assert stands_without(readings)
        await host.sample()
        pid = pid_of(host)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"driver host {pid}: dcgm: dcgm.bindings: {tmp_path} has no dcgm_agent.py; "
        "datacenter-gpu-manager-4-core installs it"
    )


async def test_bindings_that_stop_the_whole_process_are_found_out(
    engine: FakeHostengine, tmp_path: Path
) -> None:
    bindings = tmp_path / "bindings"
    bindings.mkdir()
    # As the loading of a library from a file system that is gone: it keeps the interpreter.
    (bindings / "dcgm_agent.py").write_text("import ctypes\nctypes.PyDLL(None).sleep(3600)\n")
    hasty = replace(PATIENCE, call_seconds=0.5, end_grace_seconds=0.1)
    async with running(source(engine, bindings), hasty) as host:
        await host.ready()
        first = pid_of(host)
        readings = await eventually(
            host.sample, lambda readings: pid_of(host) != first and len(readings) == 2
        )
        assert stands_without(readings)
        assert host.suspects == ()
        assert "--without-dcgm" in proc(host, "cmdline").split("\0")


async def test_the_page_of_an_agent_has_what_dcgm_tells(
    engine: FakeHostengine, tmp_path: Path
) -> None:
    engine.gpus = [EngineGpu(uuid) for uuid in SimulatedNvml([T4], node="n1").uuids]
    environment = {
        "STOKER_AGENT_DCGM_ADDRESS": engine.address,
        "STOKER_AGENT_DCGM_BINDINGS": str(write_bindings(tmp_path / "bindings")),
    }
    async with Stage(tmp_path) as stage:
        agent = stage.agent("n1", "1xT4", environment=environment)
        told = await agent.start()

        async def ratios() -> dict[str, float] | None:
            page = read_page(await fetch_metrics(told["metrics"]))
            series = page.get("stoker_gpu_sm_active_ratio", {})
            return {dict(labels)["uuid"]: value for labels, value in series.items()} or None

        assert await until("DCGM's facts on the page", ratios) == {engine.gpus[0].uuid: 0.125}
