"""The page of dcgm-exporter's names: the list of what that shows, and how values get there."""

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import Golden
from tests.support.snapshots import (
    BARE,
    FULL,
    GIB,
    MIG_DEVICE,
    VIEW,
    dcgm_page,
    eventful,
    snapshot,
    told,
)

from stoker.agent.config import HostnameLabel
from stoker.agent.facts import Fact
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.readings import MigDeviceReading
from stoker.agent.telemetry import GpuTelemetry, XidCount

MIB = 2**20
XID = "DCGM_FI_DEV_XID_ERRORS"
LABEL = re.compile(r'(\w+)="([^"]*)"')
# Name (after DCGM_FI_), type, our fact (with a label's value), what one of it counts there.
# The types are those of default-counters.csv, also of the lines that are commented out in it; of
# fields that it does not list, "gauge", as its documentation advises for what is no count.
LIST: tuple[tuple[str, str, Fact | tuple[Fact, str], float], ...] = (
    ("DEV_SM_CLOCK", "gauge", Fact.SM_CLOCK_HERTZ, 1e-6),
    ("DEV_MEM_CLOCK", "gauge", Fact.MEMORY_CLOCK_HERTZ, 1e-6),
    ("DEV_VIDEO_CLOCK", "gauge", Fact.VIDEO_CLOCK_HERTZ, 1e-6),
    ("DEV_MAX_SM_CLOCK", "gauge", Fact.SM_CLOCK_MAX_HERTZ, 1e-6),
    ("DEV_MAX_MEM_CLOCK", "gauge", Fact.MEMORY_CLOCK_MAX_HERTZ, 1e-6),
    ("DEV_MEMORY_TEMP", "gauge", Fact.MEMORY_TEMPERATURE_CELSIUS, 1),
    ("DEV_GPU_TEMP", "gauge", Fact.TEMPERATURE_CELSIUS, 1),
    ("DEV_GPU_MAX_OP_TEMP", "gauge", Fact.TEMPERATURE_OPERATING_MAX_CELSIUS, 1),
    ("DEV_MEM_MAX_OP_TEMP", "gauge", Fact.MEMORY_TEMPERATURE_MAX_CELSIUS, 1),
    ("DEV_GPU_TEMP_LIMIT", "gauge", Fact.TEMPERATURE_MARGIN_CELSIUS, 1),
    ("DEV_SLOWDOWN_TEMP", "gauge", Fact.TEMPERATURE_SLOWDOWN_CELSIUS, 1),
    ("DEV_SHUTDOWN_TEMP", "gauge", Fact.TEMPERATURE_SHUTDOWN_CELSIUS, 1),
    ("DEV_POWER_USAGE", "gauge", Fact.POWER_WATTS, 1),
    ("DEV_POWER_USAGE_INSTANT", "gauge", Fact.POWER_INSTANT_WATTS, 1),
    ("DEV_TOTAL_ENERGY_CONSUMPTION", "counter", Fact.ENERGY_JOULES, 1000),
    ("DEV_POWER_MGMT_LIMIT_MIN", "gauge", Fact.POWER_LIMIT_MIN_WATTS, 1),
    ("DEV_POWER_MGMT_LIMIT_MAX", "gauge", Fact.POWER_LIMIT_MAX_WATTS, 1),
    ("DEV_POWER_MGMT_LIMIT_DEF", "gauge", Fact.POWER_LIMIT_DEFAULT_WATTS, 1),
    ("DEV_ENFORCED_POWER_LIMIT", "gauge", Fact.POWER_LIMIT_WATTS, 1),
    ("DEV_PSTATE", "gauge", Fact.PERFORMANCE_STATE, 1),
    ("DEV_FAN_SPEED", "gauge", (Fact.FAN_SPEED_RATIO, "1"), 100),
    ("DEV_PCIE_REPLAY_COUNTER", "counter", Fact.PCIE_REPLAYS, 1),
    ("DEV_PCIE_MAX_LINK_GEN", "gauge", Fact.PCIE_LINK_GENERATION_MAX, 1),
    ("DEV_PCIE_MAX_LINK_WIDTH", "gauge", Fact.PCIE_LINK_WIDTH_MAX, 1),
    ("DEV_PCIE_LINK_GEN", "gauge", Fact.PCIE_LINK_GENERATION, 1),
    ("DEV_PCIE_LINK_WIDTH", "gauge", Fact.PCIE_LINK_WIDTH, 1),
    ("DEV_GPU_UTIL", "gauge", Fact.UTILIZATION_RATIO, 100),
    ("DEV_MEM_COPY_UTIL", "gauge", Fact.MEMORY_UTILIZATION_RATIO, 100),
    ("DEV_ENC_UTIL", "gauge", Fact.ENCODER_UTILIZATION_RATIO, 100),
    ("DEV_DEC_UTIL", "gauge", Fact.DECODER_UTILIZATION_RATIO, 100),
    ("DEV_POWER_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "sw_power_cap"), 1e9),
    ("DEV_THERMAL_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "thermal"), 1e9),
    ("DEV_SYNC_BOOST_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "sync_boost"), 1e9),
    ("DEV_BOARD_LIMIT_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "board_limit"), 1e9),
    ("DEV_LOW_UTIL_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "low_utilization"), 1e9),
    ("DEV_RELIABILITY_VIOLATION", "counter", (Fact.CLOCK_EVENT_SECONDS, "reliability"), 1e9),
    ("DEV_FB_TOTAL", "gauge", Fact.MEMORY_TOTAL_BYTES, 1 / MIB),
    ("DEV_FB_FREE", "gauge", Fact.MEMORY_FREE_BYTES, 1 / MIB),
    ("DEV_FB_USED", "gauge", Fact.MEMORY_USED_BYTES, 1 / MIB),
    ("DEV_FB_RESERVED", "gauge", Fact.MEMORY_RESERVED_BYTES, 1 / MIB),
    ("DEV_BAR1_TOTAL", "gauge", Fact.BAR1_TOTAL_BYTES, 1 / MIB),
    ("DEV_BAR1_USED", "gauge", Fact.BAR1_USED_BYTES, 1 / MIB),
    ("DEV_ECC_CURRENT", "gauge", Fact.ECC_ENABLED, 1),
    ("DEV_ECC_SBE_VOL_TOTAL", "counter", Fact.ECC_CORRECTED_VOLATILE_ERRORS, 1),
    ("DEV_ECC_DBE_VOL_TOTAL", "counter", Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, 1),
    ("DEV_ECC_SBE_AGG_TOTAL", "counter", Fact.ECC_CORRECTED_AGGREGATE_ERRORS, 1),
    ("DEV_ECC_DBE_AGG_TOTAL", "counter", Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS, 1),
    ("DEV_RETIRED_SBE", "counter", (Fact.RETIRED_PAGES, "correctable"), 1),
    ("DEV_RETIRED_DBE", "counter", (Fact.RETIRED_PAGES, "uncorrectable"), 1),
    ("DEV_RETIRED_PENDING", "counter", Fact.RETIRED_PAGES_PENDING, 1),
    ("DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", (Fact.REMAPPED_ROWS, "uncorrectable"), 1),
    ("DEV_CORRECTABLE_REMAPPED_ROWS", "counter", (Fact.REMAPPED_ROWS, "correctable"), 1),
    ("DEV_ROW_REMAP_FAILURE", "gauge", Fact.REMAPPED_ROWS_FAILED, 1),
    ("DEV_ROW_REMAP_PENDING", "gauge", Fact.REMAPPED_ROWS_PENDING, 1),
    ("DEV_BANKS_REMAP_ROWS_AVAIL_MAX", "gauge", (Fact.ROW_REMAP_BANKS, "max"), 1),
    ("DEV_BANKS_REMAP_ROWS_AVAIL_HIGH", "gauge", (Fact.ROW_REMAP_BANKS, "high"), 1),
    ("DEV_BANKS_REMAP_ROWS_AVAIL_PARTIAL", "gauge", (Fact.ROW_REMAP_BANKS, "partial"), 1),
    ("DEV_BANKS_REMAP_ROWS_AVAIL_LOW", "gauge", (Fact.ROW_REMAP_BANKS, "low"), 1),
    ("DEV_BANKS_REMAP_ROWS_AVAIL_NONE", "gauge", (Fact.ROW_REMAP_BANKS, "none"), 1),
    ("DEV_COMPUTE_MODE", "gauge", Fact.COMPUTE_MODE, 1),
    ("DEV_PERSISTENCE_MODE", "gauge", Fact.PERSISTENCE_MODE, 1),
    ("DEV_MIG_MODE", "gauge", Fact.MIG_MODE, 1),
    ("PROF_GR_ENGINE_ACTIVE", "gauge", Fact.GRAPHICS_ENGINE_ACTIVE_RATIO, 1),
    ("PROF_SM_ACTIVE", "gauge", Fact.SM_ACTIVE_RATIO, 1),
    ("PROF_SM_OCCUPANCY", "gauge", Fact.SM_OCCUPANCY_RATIO, 1),
    ("PROF_PIPE_TENSOR_ACTIVE", "gauge", Fact.TENSOR_ACTIVE_RATIO, 1),
    ("PROF_DRAM_ACTIVE", "gauge", Fact.MEMORY_BANDWIDTH_RATIO, 1),
    ("PROF_PIPE_FP64_ACTIVE", "gauge", Fact.FP64_ACTIVE_RATIO, 1),
    ("PROF_PIPE_FP32_ACTIVE", "gauge", Fact.FP32_ACTIVE_RATIO, 1),
    ("PROF_PIPE_FP16_ACTIVE", "gauge", Fact.FP16_ACTIVE_RATIO, 1),
    ("PROF_PIPE_TENSOR_IMMA_ACTIVE", "gauge", Fact.TENSOR_INTEGER_ACTIVE_RATIO, 1),
    ("PROF_PIPE_TENSOR_HMMA_ACTIVE", "gauge", Fact.TENSOR_HALF_ACTIVE_RATIO, 1),
    ("PROF_PIPE_TENSOR_DFMA_ACTIVE", "gauge", Fact.TENSOR_DOUBLE_ACTIVE_RATIO, 1),
    ("PROF_PIPE_INT_ACTIVE", "gauge", Fact.INTEGER_ACTIVE_RATIO, 1),
    ("PROF_PCIE_TX_BYTES", "gauge", Fact.PCIE_TRANSMIT_BYTES_PER_SECOND, 1),
    ("PROF_PCIE_RX_BYTES", "gauge", Fact.PCIE_RECEIVE_BYTES_PER_SECOND, 1),
    ("PROF_NVLINK_TX_BYTES", "gauge", Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND, 1),
    ("PROF_NVLINK_RX_BYTES", "gauge", Fact.NVLINK_RECEIVE_BYTES_PER_SECOND, 1),
)
# Fields that several facts make.
MADE = {
    "DCGM_FI_DEV_BAR1_FREE": "gauge",
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": "gauge",
    "DCGM_FI_DEV_FB_USED_PERCENT": "gauge",
    "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL": "counter",
    "DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL": "counter",
    "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL": "counter",
    "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL": "counter",
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": "counter",
    "DCGM_FI_DEV_XID_ERRORS": "gauge",
}
# In default-counters.csv and not commented out. Nobody here can tell the state of a vGPU licence.
DEFAULT = """
DEV_SM_CLOCK DEV_MEM_CLOCK DEV_MEMORY_TEMP DEV_GPU_TEMP DEV_POWER_USAGE DEV_TOTAL_ENERGY_CONSUMPTION
DEV_PCIE_REPLAY_COUNTER DEV_GPU_UTIL DEV_MEM_COPY_UTIL DEV_ENC_UTIL DEV_DEC_UTIL DEV_XID_ERRORS
DEV_FB_FREE DEV_FB_USED DEV_FB_RESERVED DEV_NVLINK_BANDWIDTH_TOTAL DEV_UNCORRECTABLE_REMAPPED_ROWS
DEV_CORRECTABLE_REMAPPED_ROWS DEV_ROW_REMAP_FAILURE PROF_GR_ENGINE_ACTIVE PROF_PIPE_TENSOR_ACTIVE
PROF_DRAM_ACTIVE PROF_PCIE_TX_BYTES PROF_PCIE_RX_BYTES
"""


def types(shown: Snapshot) -> Mapping[str, str]:
    """Return the type of every family, by its name as it is written."""
    lines = dcgm_page(shown).splitlines()
    return {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}


def samples(shown: Snapshot) -> list[tuple[str, dict[str, str], float]]:
    """Return what the lines say; the parser would add `_total` to the names of counters."""
    return [
        (line.partition("{")[0], dict(LABEL.findall(line)), float(line.rpartition(" ")[2]))
        for line in dcgm_page(shown).splitlines()
        if not line.startswith("#")
    ]


def values(shown: Snapshot, name: str) -> list[float]:
    return [value for found, _, value in samples(shown) if found == f"DCGM_FI_{name}"]


def telling(
    facts: Mapping[Fact, float] | None = None,
    by_label: Mapping[Fact, Mapping[str, float]] | None = None,
    *mig: MigDeviceReading,
) -> Snapshot:
    return told(GpuTelemetry("GPU-0", 1.0, facts or {}, by_label or {}, mig, {}))


def series(shown: Snapshot) -> set[tuple[str, str]]:
    """Return (name, GPU_I_ID) of every series."""
    return {
        (name.removeprefix("DCGM_FI_"), labels.get("GPU_I_ID", ""))
        for name, labels, _ in samples(shown)
    }


def test_the_whole_page(golden: Golden) -> None:
    golden("metrics/everything-dcgm.prom", dcgm_page(eventful()))


def test_names_and_types_are_those_of_the_list() -> None:
    assert types(eventful()) == {f"DCGM_FI_{name}": kind for name, kind, _, _ in LIST} | MADE
    assert {f"DCGM_FI_{name}" for name in DEFAULT.split()} <= types(eventful()).keys()


def test_the_page_parses_and_no_series_is_there_twice() -> None:
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(dcgm_page(eventful()))
        for sample in family.samples
    ]
    assert len(samples) == len(set(samples)) > len(LIST)


@pytest.mark.parametrize(("name", "kind", "fact", "factor"), LIST, ids=str)
def test_a_field_is_our_fact_in_its_unit(
    name: str, kind: str, fact: Fact | tuple[Fact, str], factor: float
) -> None:
    # So large that cutting off what is behind the point changes little.
    number = 3e15
    if isinstance(fact, tuple):
        shown = telling(None, {fact[0]: {fact[1]: number}})
    else:
        shown = telling({fact: number})
    assert values(shown, name) == [pytest.approx(number * factor, rel=1e-6)]


@pytest.mark.parametrize(
    ("facts", "name", "text"),
    [
        ({Fact.UTILIZATION_RATIO: 0.29}, "DEV_GPU_UTIL", "29"),
        ({Fact.UTILIZATION_RATIO: 0.57}, "DEV_GPU_UTIL", "57"),
        ({Fact.MEMORY_USED_BYTES: 3.0 * MIB - 1}, "DEV_FB_USED", "2"),
        ({Fact.ENERGY_JOULES: 123456789.012}, "DEV_TOTAL_ENERGY_CONSUMPTION", "123456789012"),
        ({Fact.POWER_WATTS: 65.5}, "DEV_POWER_USAGE", "65.500000"),
        ({Fact.SM_ACTIVE_RATIO: 0.25}, "PROF_SM_ACTIVE", "0.250000"),
        ({Fact.TEMPERATURE_MARGIN_CELSIUS: -3.0}, "DEV_GPU_TEMP_LIMIT", "-3"),
        (
            {
                Fact.MEMORY_TOTAL_BYTES: 5.0 * GIB,
                Fact.MEMORY_USED_BYTES: 1.0 * GIB,
                Fact.MEMORY_RESERVED_BYTES: 1.0 * GIB,
            },
            "DEV_FB_USED_PERCENT",
            "0.250000",
        ),
        (
            {
                Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND: 2048e3,
                Fact.NVLINK_RECEIVE_BYTES_PER_SECOND: 1024e3,
            },
            "DEV_NVLINK_BANDWIDTH_TOTAL",
            "3",
        ),
    ],
)
def test_values_are_written_as_there(facts: Mapping[Fact, float], name: str, text: str) -> None:
    line = next(
        line
        for line in dcgm_page(telling(facts)).splitlines()
        if line.startswith(f"DCGM_FI_{name}{{")
    )
    assert line.rpartition(" ")[2] == text


def test_the_reasons_are_bits_and_no_reason_is_0() -> None:
    name = "DEV_CLOCK_THROTTLE_REASONS"
    active = {"gpu_idle": 0.0, "sw_power_cap": 1.0, "hw_thermal_slowdown": 1.0}
    assert values(telling(None, {Fact.CLOCK_EVENT_ACTIVE: active}), name) == [0x4 | 0x40]
    idle = dict.fromkeys(active, 0.0)
    assert values(telling(None, {Fact.CLOCK_EVENT_ACTIVE: idle}), name) == [0]
    assert values(telling({Fact.POWER_WATTS: 1.0}), name) == []


def test_errors_of_links_are_added_up() -> None:
    errors = {Fact.NVLINK_REPLAY_ERRORS: {"0": 2.0, "1": 0.0, "17": 40.0}}
    assert values(telling(None, errors), "DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL") == [42]
    assert values(telling(), "DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL") == []


@pytest.mark.parametrize("spelling", HostnameLabel)
def test_labels_are_those_of_dcgm_exporter_in_its_order(spelling: HostnameLabel) -> None:
    page = dcgm_page(telling({Fact.POWER_WATTS: 1.0}), spelling)
    assert page.splitlines()[2] == (
        'DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-0",pci_bus_id="00000000:53:00.0",'
        f'device="nvidia0",modelName="NVIDIA H100 80GB HBM3",{spelling}="n1",'
        'DCGM_FI_DRIVER_VERSION="580.1"} 1.000000'
    )


def test_instances_carry_their_profile_and_number_before_the_host() -> None:
    device = MigDeviceReading("MIG-a", 9, 0, "2g.20gb", {Fact.SM_ACTIVE_RATIO: 0.5})
    page = dcgm_page(telling(None, None, device))
    assert page.splitlines()[2] == (
        'DCGM_FI_PROF_SM_ACTIVE{gpu="0",UUID="GPU-0",pci_bus_id="00000000:53:00.0",'
        'device="nvidia0",modelName="NVIDIA H100 80GB HBM3",GPU_I_PROFILE="2g.20gb",'
        'GPU_I_ID="9",Hostname="n1",DCGM_FI_DRIVER_VERSION="580.1"} 0.500000'
    )


def test_what_instances_tell_the_whole_gpu_does_not_tell_too() -> None:
    whole = {Fact.MEMORY_USED_BYTES: 9.0 * GIB, Fact.POWER_WATTS: 300.0}
    parts = [
        replace(MIG_DEVICE, uuid=f"MIG-{i}", gpu_instance_id=i, facts={Fact.MEMORY_USED_BYTES: GIB})
        for i in (3, 5)
    ]
    assert series(telling(whole, None, *parts)) == {
        ("DEV_FB_USED", "3"),
        ("DEV_FB_USED", "5"),
        ("DEV_POWER_USAGE", ""),
    }


def test_compute_instances_of_one_gpu_instance_are_one() -> None:
    parts = [
        replace(MIG_DEVICE, uuid=f"MIG-{i}", compute_instance_id=i, profile="1c.2g.20gb")
        for i in range(2)
    ]
    shown = telling(None, None, *parts)
    found = [labels for name, labels, _ in samples(shown) if name == "DCGM_FI_DEV_FB_USED"]
    assert [labels["GPU_I_PROFILE"] for labels in found] == ["2g.20gb"]


def test_the_last_xid_stands_there_with_its_code_even_when_the_gpu_is_not_read() -> None:
    counts = {31: XidCount(5, 900.0), 79: XidCount(1, 901.0), 13: XidCount(1, 850.0)}
    shown = snapshot(replace(VIEW, telemetry=(BARE,), xids={"GPU-0": counts}))
    line = next(line for line in dcgm_page(shown).splitlines() if line.startswith(XID))
    assert line.endswith(
        'DCGM_FI_DRIVER_VERSION="580.1",err_code="79",err_msg="GPU has fallen off the bus"} 79'
    )
    assert values(snapshot(), "DEV_XID_ERRORS") == []


def test_an_xid_that_nobody_knows_is_named_as_there() -> None:
    shown = snapshot(replace(VIEW, xids={"GPU-0": {999: XidCount(1, 1.0)}}))
    (labels,) = [labels for name, labels, _ in samples(shown) if name == XID]
    assert (labels["err_code"], labels["err_msg"]) == ("999", "Unknown Error")


@pytest.mark.parametrize(("monotonic", "is_shown"), [(103.0, True), (103.01, False)])
def test_values_are_shown_only_while_they_are_fresh(monotonic: float, is_shown: bool) -> None:
    assert bool(values(snapshot(monotonic=monotonic), "DEV_POWER_USAGE")) is is_shown


def test_a_fact_that_a_card_does_not_tell_is_absent() -> None:
    assert series(told(BARE)) == {("DEV_FB_USED", "")}


def test_everything_told_is_on_the_page() -> None:
    assert series(told(FULL)) == {
        (name.removeprefix("DCGM_FI_"), "") for name in types(eventful()) if "XID" not in name
    }
