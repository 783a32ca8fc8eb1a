"""A real card's series against nvidia-smi in one run; hardware counters under a known load."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.pages import Page, fetch_metrics, read_page
from tests.support.waiting import until

pytestmark = pytest.mark.gpu

_MIB = float(2**20)
# nvidia-smi's field -> the series, its unit in base units, and how far two moments may be apart:
# (share of the value, in base units). What never moves must be equal.
FIELDS: dict[str, tuple[str, float, float, float]] = {
    "memory.total": ("stoker_gpu_memory_total_bytes", _MIB, 0.0, 0.0),
    "memory.reserved": ("stoker_gpu_memory_reserved_bytes", _MIB, 0.0, _MIB),
    "memory.used": ("stoker_gpu_memory_used_bytes", _MIB, 0.02, 64 * _MIB),
    "memory.free": ("stoker_gpu_memory_free_bytes", _MIB, 0.02, 64 * _MIB),
    "utilization.gpu": ("stoker_gpu_utilization_ratio", 0.01, 0.0, 0.35),
    "utilization.memory": ("stoker_gpu_memory_utilization_ratio", 0.01, 0.0, 0.35),
    "temperature.gpu": ("stoker_gpu_temperature_celsius", 1.0, 0.0, 4.0),
    "temperature.memory": ("stoker_gpu_memory_temperature_celsius", 1.0, 0.0, 4.0),
    "power.draw.average": ("stoker_gpu_power_watts", 1.0, 0.2, 15.0),
    "power.draw.instant": ("stoker_gpu_power_instant_watts", 1.0, 0.4, 60.0),
    "power.limit": ("stoker_gpu_power_limit_watts", 1.0, 0.0, 0.01),
    "power.default_limit": ("stoker_gpu_power_limit_default_watts", 1.0, 0.0, 0.01),
    "power.min_limit": ("stoker_gpu_power_limit_min_watts", 1.0, 0.0, 0.01),
    "power.max_limit": ("stoker_gpu_power_limit_max_watts", 1.0, 0.0, 0.01),
    "clocks.sm": ("stoker_gpu_sm_clock_hertz", 1e6, 0.15, 2e8),
    "clocks.mem": ("stoker_gpu_memory_clock_hertz", 1e6, 0.0, 0.0),
    "clocks.gr": ("stoker_gpu_graphics_clock_hertz", 1e6, 0.15, 2e8),
    "clocks.video": ("stoker_gpu_video_clock_hertz", 1e6, 0.15, 2e8),
    "clocks.max.sm": ("stoker_gpu_sm_clock_max_hertz", 1e6, 0.0, 0.0),
    "clocks.max.mem": ("stoker_gpu_memory_clock_max_hertz", 1e6, 0.0, 0.0),
    "pcie.link.gen.gpucurrent": ("stoker_gpu_pcie_link_generation", 1.0, 0.0, 0.0),
    "pcie.link.gen.max": ("stoker_gpu_pcie_link_generation_max", 1.0, 0.0, 0.0),
    "pcie.link.width.current": ("stoker_gpu_pcie_link_width", 1.0, 0.0, 0.0),
    "pcie.link.width.max": ("stoker_gpu_pcie_link_width_max", 1.0, 0.0, 0.0),
    "ecc.errors.corrected.volatile.total": (
        "stoker_gpu_ecc_corrected_volatile_errors_total",
        1.0,
        0.0,
        0.0,
    ),
    "ecc.errors.uncorrected.volatile.total": (
        "stoker_gpu_ecc_uncorrected_volatile_errors_total",
        1.0,
        0.0,
        0.0,
    ),
    "ecc.errors.corrected.aggregate.total": (
        "stoker_gpu_ecc_corrected_aggregate_errors_total",
        1.0,
        0.0,
        0.0,
    ),
    "ecc.errors.uncorrected.aggregate.total": (
        "stoker_gpu_ecc_uncorrected_aggregate_errors_total",
        1.0,
        0.0,
        0.0,
    ),
}
UNTOLD = ("[N/A]", "[Not Supported]", "N/A", "[Requested functionality has been deprecated]")
# Keeps the tensor cores busy for so many seconds.
LOAD = """
import cupy, sys, time
a = cupy.ones((8192, 8192), dtype=cupy.float16)
until = time.monotonic() + float(sys.argv[1])
print("busy", flush=True)
while time.monotonic() < until:
    for _ in range(20):
        cupy.matmul(a, a)
    cupy.cuda.runtime.deviceSynchronize()
"""


def smi(*fields: str) -> dict[str, dict[str, str]]:
    """Return what nvidia-smi tells, by UUID and field."""
    names = ("uuid", *fields)
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in lines]
    return {row["uuid"]: row for row in rows}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The metrics door of an agent of this machine, which nobody else listens to."""
    command = [sys.executable, "-m", "stoker.agent", "--data-dir", str(tmp_path)]
    agent = subprocess.Popen([*command, "--metrics-listen", "127.0.0.1:0"])
    try:
        told = tmp_path / "agent.json"
        deadline = time.monotonic() + 60
        while not told.exists():
            assert agent.poll() is None, "the agent ended"
            assert time.monotonic() < deadline, "the agent has not said where it listens"
            time.sleep(0.1)
        yield str(json.loads(told.read_text())["metrics"])
    finally:
        agent.terminate()
        agent.wait(20)


async def page_of(address: str) -> Page:
    """Return the page once it has slow facts too."""

    async def look() -> Page | None:
        page = read_page(await fetch_metrics(address))
        return page if "stoker_gpu_power_limit_watts" in page else None

    return await until("a page with the power limit", look)


def by_uuid(page: Page, name: str) -> dict[str, float]:
    """Return a series' values by UUID."""
    return {dict(labels)["uuid"]: value for labels, value in page.get(name, {}).items()}


async def test_every_series_is_what_nvidia_smi_says(address: str) -> None:
    page = await page_of(address)
    told = smi(*FIELDS)
    wrong: list[str] = []
    for field, (series, unit, share, distance) in FIELDS.items():
        values = by_uuid(page, series)
        for uuid, row in told.items():
            text, value = row[field], values.get(uuid)
            if text in UNTOLD:
                if value is not None:
                    wrong.append(f"{uuid} {field}: nvidia-smi tells nothing, {series} {value}")
                continue
            wanted = float(text) * unit
            is_near = value is not None and math.isclose(
                value, wanted, rel_tol=share, abs_tol=distance
            )
            if not is_near:
                wrong.append(f"{uuid} {field}: nvidia-smi {wanted}, {series} {value}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def busy_card() -> Iterator[None]:
    """A matrix product on the first card for as long as the test lasts."""
    command = [sys.executable, "-c", LOAD, "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        assert load.stdout.readline().strip() == "busy"
        yield
        load.terminate()


@pytest.mark.usefixtures("busy_card")
async def test_hardware_counters_show_a_matrix_product(address: str) -> None:
    """On Hopper and later; earlier cards have them through DCGM only."""
    if min(float(row["compute_cap"]) for row in smi("compute_cap").values()) < 9.0:
        pytest.skip("no GPM before Hopper")

    async def look() -> Page | None:
        page = read_page(await fetch_metrics(address))
        active = by_uuid(page, "stoker_gpu_tensor_active_ratio")
        return page if max(active.values(), default=0.0) > 0.2 else None

    page = await until("busy tensor cores", look)
    assert max(by_uuid(page, "stoker_gpu_sm_active_ratio").values()) > 0.5
    assert max(by_uuid(page, "stoker_gpu_fp64_active_ratio").values(), default=0.0) < 0.1
