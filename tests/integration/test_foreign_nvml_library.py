"""Any conforming libnvidia-ml.so.1 on LD_LIBRARY_PATH is the driver, as nvidia-ml-py finds it."""

import subprocess
from pathlib import Path

import pytest
from tests.support.driver_hosts import running

from stoker.agent.driver_frames import RealDriver
from stoker.agent.readings import GpuIdentity, GpuReading

SOURCE = Path(__file__).parent / "fake_nvml" / "nvml.c"
GIB = 2**30
FIRST, SECOND = (f"GPU-f0f0f0f0-0000-4000-8000-00000000000{n}" for n in (1, 2))

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library that was made from nvml.c."""
    folder = tmp_path_factory.mktemp("nvml")
    output = folder / "libnvidia-ml.so.1"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(output), str(SOURCE)], check=True)
    return folder


async def test_its_gpus_are_shown_and_what_it_cannot_tell_is_absent(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    async with running(RealDriver()) as host:
        inventory = await host.ready()
        readings = await host.sample()
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
        memory_total_bytes=24 * GIB,
        memory_used_bytes=3 * GIB,
        memory_free_bytes=21 * GIB,
        utilization_ratio=0.42,
        temperature_celsius=51.0,
        power_watts=123.456,
        failures=first.failures,
    )
    # A sentinel is counted; what does not exist in this library is only absent.
    assert [failure.fact for failure in first.failures] == ["memory_utilization_ratio"]
    assert (second.uuid, second.utilization_ratio, second.power_watts) == (SECOND, 0.0, 20.0)
    # It cannot list processes: who uses its GPUs is unknown, which is not nobody.
    assert users.processes == ()
    assert [fault.uuid for fault in users.failed_gpus] == [FIRST, SECOND]
    assert {fault.error_kind for fault in users.failed_gpus} == {"not_supported"}


async def test_it_is_let_go_on_release(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    async with running(RealDriver()) as host:
        await host.ready()
        await host.release()
        assert (host.counters.kills_total, host.counters.starts_total) == (0, 1)
        host.resume()
        assert len((await host.ready()).gpus) == 2
