"""Any conforming libnvidia-ml.so.1 on LD_LIBRARY_PATH is the driver, as nvidia-ml-py finds it."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.driver_hosts import running
from tests.support.nvml_library import build_full, build_small, counting, environment

from stoker.agent.driver_host.frames import RealDriver
from stoker.agent.facts import FACTS, Fact, Rate
from stoker.agent.readings import GpuIdentity, GpuReading, NvlinkPeer

GIB = 2**30
FIRST, SECOND = (f"GPU-f0f0f0f0-0000-4000-8000-00000000000{n}" for n in (1, 2))
EVERYTHING = (Rate.FAST, Rate.SLOW)
# An SXM board has no fan of its own, and a card since Ampere remaps rows in place of pages.
NOT_ON_HOPPER = {
    Fact.FAN_SPEED_RATIO,
    Fact.RETIRED_PAGES,
    Fact.RETIRED_PAGES_PENDING,
}

pytestmark = pytest.mark.compiler


def give(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library that lacks much."""
    return build_small(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library that answers what monitors ask."""
    return build_full(tmp_path_factory.mktemp("nvml"))


async def test_its_gpus_are_shown_and_what_it_cannot_tell_is_absent(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(small))
    async with running(RealDriver()) as host:
        inventory = await host.ready()
        readings = await host.sample(EVERYTHING)
        users = await host.processes()
    assert not inventory.simulated
    assert inventory.driver_version is None
    assert inventory.gpus == tuple(
        GpuIdentity(index, uuid, "Foreign Accelerator 24G", 24 * GIB)
        for index, uuid in enumerate((FIRST, SECOND))
    )
    assert [reading.at for reading in readings] == sorted(reading.at for reading in readings)
    first, second = readings
    assert first == GpuReading(
        uuid=FIRST,
        at=first.at,
        rates=EVERYTHING,
        facts={
            Fact.MEMORY_TOTAL_BYTES: 24 * GIB,
            Fact.MEMORY_USED_BYTES: 3 * GIB,
            Fact.MEMORY_FREE_BYTES: 21 * GIB,
            Fact.UTILIZATION_RATIO: 0.42,
            Fact.TEMPERATURE_CELSIUS: 51.0,
            Fact.POWER_WATTS: 123.456,
        },
        failures=first.failures,
    )
    # A sentinel is counted; what does not exist in this library is only absent.
    assert [failure.fact for failure in first.failures] == [Fact.MEMORY_UTILIZATION_RATIO]
    assert second.uuid == SECOND
    assert second.facts[Fact.UTILIZATION_RATIO] == 0.0
    assert second.facts[Fact.POWER_WATTS] == 20.0
    # It cannot list processes: who uses its GPUs is unknown, which is not nobody.
    assert users.processes == ()
    assert [fault.uuid for fault in users.failed_gpus] == [FIRST, SECOND]
    assert {fault.error_kind for fault in users.failed_gpus} == {"not_supported"}


async def test_it_is_let_go_on_release(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(small))
    async with running(RealDriver()) as host:
        await host.ready()
        await host.release()
        assert (host.counters.kills_total, host.counters.starts_total) == (0, 1)
        host.resume()
        assert len((await host.ready()).gpus) == 2


def told(reading: GpuReading) -> set[Fact]:
    return {*reading.facts, *reading.by_label}


async def test_a_library_that_knows_everything_is_asked_everything(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, dict(environment(full, gpus=2, pids=[os.getpid(), os.getppid()])))
    async with running(RealDriver()) as host:
        inventory = await host.ready()
        await host.sample(EVERYTHING)
        await asyncio.sleep(0.2)  # the hardware counters tell about the time between two readings
        readings: Sequence[GpuReading] = await host.sample(EVERYTHING)
        users = await host.processes()
    assert [gpu.model for gpu in inventory.gpus] == ["NVIDIA H100 80GB HBM3"] * 2
    assert inventory.driver_version == "580.95.05"
    assert [(gpu.nvlink_peers, gpu.nvswitch_links) for gpu in inventory.gpus] == [
        ((NvlinkPeer(SECOND, 4),), 14),
        ((NvlinkPeer(FIRST, 4),), 14),
    ]
    for reading in readings:
        assert reading.failures == ()
        assert set(FACTS) - told(reading) == NOT_ON_HOPPER
        assert set(reading.by_label[Fact.NVLINK_UP]) == {str(link) for link in range(18)}
        assert reading.facts[Fact.POWER_LIMIT_WATTS] == 700.0
        assert reading.facts[Fact.ENERGY_JOULES] > 0
    pids = {(each.uuid, each.pid, each.memory_used_bytes) for each in users.processes}
    assert pids == {
        (uuid, pid, 4 * GIB) for uuid in (FIRST, SECOND) for pid in (os.getpid(), os.getppid())
    }


async def test_what_a_library_made_for_sampling_is_given_back(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counting(tmp_path / "page") as page:
        give(monkeypatch, dict(environment(full, page=page, gpus=3)))
        async with running(RealDriver()) as host:
            await host.sample()
            held = page.read().things
            await host.sample(EVERYTHING)
            await host.inventory()  # the GPUs are found anew
            await host.sample()
            assert held > 0
            assert page.read().things == held
            await host.release()
            assert page.read().things == 0
        assert page.read().calls > 0
