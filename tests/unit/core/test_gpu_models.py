"""The catalogue of GPU models, and the text that asks for simulated ones."""

import re

import pytest

from stoker.core.errors import BadInput
from stoker.core.gpu_models import MODELS, GpuModel, find_model, parse_simulate_spec

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100-80GB", 8, "H100-80GB"),
        ("T4", 1, "T4"),
        ("1xL40S", 1, "L40S"),
        ("64xB200", 64, "B200"),
        (" 4 x a100-40gb ", 4, "A100-40GB"),
        ("2XH200-141GB", 2, "H200-141GB"),
        ("4xrtx-pro-6000", 4, "RTX-PRO-6000"),
    ],
)
def test_what_is_asked_for(text: str, count: int, name: str) -> None:
    assert parse_simulate_spec(text) == (count, MODELS[name])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8xH100", "'H100' is not known; the nearest is H100-80GB"),
        ("8xH100-80GiB", "the nearest is H100-80GB"),
        ("2xA100-80", "the nearest is A100-80GB"),
        ("1xH20", "the nearest is H200-141GB"),
        ("2xRTX", "the nearest is RTX-PRO-6000"),
        ("2xVoodoo2", "'Voodoo2' is not known; known are A100-40GB, A100-80GB"),
        ("0xT4", "asks for 0; a node has 1 to 64"),
        ("65xT4", "asks for 65"),
        ("999999999xT4", "asks for 999999999"),
        ("", "'' is not COUNTxMODEL"),
        ("8x", "'8x' is not known"),
        ("-1xT4", "'-1xT4' is not known"),
        ("8 H100-80GB", "is not COUNTxMODEL, such as 8xH100-80GB"),
        ("x" * 10_000, "xxx...'"),
    ],
)
def test_what_cannot_be_asked_for(text: str, told: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_simulate_spec(text)
    assert told in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "driver_name", "total_mib", "reserved_mib", "limit_watts"),
    [
        ("A100-40GB", "NVIDIA A100-SXM4-40GB", 40960, 518, 400),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", 81920, 518, 400),
        ("A30-24GB", "NVIDIA A30", 24576, 518, 165),
        ("H100-80GB", "NVIDIA H100 80GB HBM3", 81559, 480, 700),
        ("H100-94GB", "NVIDIA H100 NVL", 95830, 594, 400),
        ("H200-141GB", "NVIDIA H200", 143771, 600, 700),
        ("B200", "NVIDIA B200", 183359, 728, 1000),
        ("GB200", "NVIDIA GB200", 189471, 742, 1200),
        (
            *("RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
            *(97887, 636, 600),
        ),
        ("L40S", "NVIDIA L40S", 46068, 609, 350),
        ("T4", "Tesla T4", 15360, 448, 70),
    ],
)
def test_a_model_has_the_figures_of_the_real_card(
    name: str, driver_name: str, total_mib: int, reserved_mib: int, limit_watts: float
) -> None:
    model = find_model(name.lower())
    assert model.driver_name == driver_name
    assert model.memory_total_bytes == total_mib * MIB
    assert model.memory_reserved_bytes == reserved_mib * MIB
    assert model.power_limit_watts == limit_watts


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_model_is_believable(model: GpuModel) -> None:
    assert model.memory_reserved_bytes * 20 < model.memory_total_bytes
    assert 0 < model.power_idle_watts * 3 < model.power_limit_watts
    assert 20 <= model.temperature_idle_celsius < model.temperature_busy_celsius < 90
    assert 0 < model.sm_clock_idle_hertz < model.sm_clock_busy_hertz < 4e9
    assert 0 < model.memory_clock_idle_hertz <= model.memory_clock_busy_hertz < 20e9
    assert model.pci_device_id & 0xFFFF == 0x10DE
    assert re.fullmatch(
        r"[0-9]{3}-([0-9]G|[0-9]{2})[0-9]{3}-[A0-9]{4}-[0-9]{3}", model.board_part_number
    )
    assert 0 < model.video_clock_idle_hertz < model.video_clock_busy_hertz < 4e9
    assert 0 < model.power_limit_min_watts < model.power_limit_watts
    assert (
        model.temperature_busy_celsius
        < model.temperature_max_celsius
        < model.temperature_slowdown_celsius
        < model.temperature_shutdown_celsius
    )
    assert model.bar1_bytes & (model.bar1_bytes - 1) == 0
    assert model.pcie_generation in (3, 4, 5)
    assert (model.nvlink_count > 0) == (model.nvlink_bytes_per_second > 0)
    assert 4 <= model.host_cpus <= 40
    assert model.memory_total_bytes < model.host_memory_bytes <= 512 * 2**30


@pytest.mark.parametrize(
    ("name", "gpm", "margin", "average_power", "mig"),
    [
        ("A100-40GB", False, False, False, True),
        ("A100-80GB", False, False, False, True),
        ("A30-24GB", False, False, False, True),
        ("H100-80GB", True, True, True, True),
        ("H200-141GB", True, True, True, True),
        ("H100-94GB", True, True, True, True),
        ("B200", True, True, True, True),
        ("GB200", True, True, True, True),
        ("RTX-PRO-6000", True, True, True, True),
        ("L40S", False, True, True, False),
        ("T4", False, False, False, False),
    ],
)
def test_what_a_chip_can_tell(
    name: str, gpm: bool, margin: bool, average_power: bool, mig: bool
) -> None:
    model = MODELS[name]
    assert (model.has_gpm, model.has_temperature_margin) == (gpm, margin)
    assert (model.has_average_power, model.has_mig) == (average_power, mig)
