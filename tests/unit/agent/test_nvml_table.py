"""The numbers and memory layouts that stoker has of its own are those of nvidia-ml-py."""

import ctypes
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, get_type_hints

import pynvml  # type: ignore[import-untyped]
import pytest

from stoker.agent.facts import FACTS, Fact, Rate
from stoker.agent.nvml import table
from stoker.agent.nvml.facts import QUESTIONS, Question, fan_questions
from stoker.agent.nvml.fields import FIELDS, Field, fields_at, link_fields
from stoker.agent.nvml.gpm import METRICS

NVML: Any = pynvml


@pytest.mark.parametrize(
    ("numbers", "prefix", "suffix"),
    [
        (table.Code, "NVML_ERROR_", ""),
        (table.Clock, "NVML_CLOCK_", ""),
        (table.Threshold, "NVML_TEMPERATURE_THRESHOLD_", ""),
        (table.SamplesType, "NVML_", "_SAMPLES"),
        (table.ValueType, "NVML_VALUE_TYPE_", ""),
    ],
)
def test_numbers_of_an_enumeration(numbers: type[IntEnum], prefix: str, suffix: str) -> None:
    theirs = {
        number: getattr(NVML, f"{prefix}{number.name}{suffix}", None)
        for number in numbers
        if number.name != "SUCCESS"
    }
    assert theirs == {number: number.value for number in theirs}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (table.Code.SUCCESS, "NVML_SUCCESS"),
        (table.EventType.XID_CRITICAL_ERROR, "nvmlEventTypeXidCriticalError"),
        (table.EventType.MIG_CONFIG_CHANGE, "nvmlEventMigConfigChange"),
        (table.TEMPERATURE_GPU, "NVML_TEMPERATURE_GPU"),
        (table.AFFINITY_SCOPE_NODE, "NVML_AFFINITY_SCOPE_NODE"),
        (table.MEMORY_ERROR_CORRECTED, "NVML_MEMORY_ERROR_TYPE_CORRECTED"),
        (table.MEMORY_ERROR_UNCORRECTED, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED"),
        (table.ECC_VOLATILE, "NVML_VOLATILE_ECC"),
        (table.ECC_AGGREGATE, "NVML_AGGREGATE_ECC"),
        (table.NVLINK_ERROR_REPLAY, "NVML_NVLINK_ERROR_DL_REPLAY"),
        (table.NVLINK_ERROR_RECOVERY, "NVML_NVLINK_ERROR_DL_RECOVERY"),
        (table.NVLINK_ERROR_CRC_FLIT, "NVML_NVLINK_ERROR_DL_CRC_FLIT"),
        (table.NVLINK_ERROR_CRC_DATA, "NVML_NVLINK_ERROR_DL_CRC_DATA"),
        (table.NVLINK_MAX_LINKS, "NVML_NVLINK_MAX_LINKS"),
        (table.MEMORY_V2, "nvmlMemory_v2"),
        (table.GPM_METRICS_GET_VERSION, "NVML_GPM_METRICS_GET_VERSION"),
    ],
)
def test_numbers_that_stand_alone(ours: int | IntFlag, theirs: str) -> None:
    assert int(ours) == getattr(NVML, theirs)


@pytest.mark.parametrize(
    ("layout", "struct", "set_fields", "unpacked"),
    [
        (
            table.FIELD_VALUE,
            NVML.c_nvmlFieldValue_t,
            {"fieldId": 1, "scopeId": 2, "timestamp": 3, "latencyUsec": 4, "valueType": 5}
            | {"nvmlReturn": 6, "value": NVML.c_nvmlValue_t(ullVal=7)},
            (1, 2, 3, 4, 5, 6, 7),
        ),
        (
            table.SAMPLE,
            NVML.c_nvmlSample_t,
            {"timeStamp": 1, "sampleValue": NVML.c_nvmlValue_t(ullVal=2)},
            (1, 2),
        ),
        (
            table.GPM_METRIC,
            NVML.c_nvmlGpmMetric_t,
            {"metricId": 1, "nvmlReturn": 2, "value": 3.5},
            (1, 2, 3.5, 0, 0, 0),
        ),
    ],
)
def test_layouts(
    layout: Struct, struct: Any, set_fields: dict[str, Any], unpacked: tuple[float, ...]
) -> None:
    made = struct()
    for name, value in set_fields.items():
        setattr(made, name, value)
    assert ctypes.sizeof(struct) == layout.size
    assert layout.unpack_from(made) == unpacked


def test_where_metrics_begin() -> None:
    assert NVML.c_nvmlGpmMetricsGet_t.metrics.offset == table.GPM_METRICS_AT


def test_nvidia_ml_py_has_every_function_that_is_named() -> None:
    named = [name for name in vars(table.NvmlTable) if name.startswith("nvml")]
    assert len(named) > 70
    assert [name for name in named if not callable(getattr(NVML, name, None))] == []
    assert get_type_hints(table.NvmlTable)["NVMLError"] == type[Exception]


# The names of nvml.h for what each field and metric is taken for.
FIELD_NAMES: dict[Fact, str | tuple[str, ...]] = {
    Fact.MEMORY_TEMPERATURE_CELSIUS: "MEMORY_TEMP",
    Fact.ENERGY_JOULES: "TOTAL_ENERGY_CONSUMPTION",
    Fact.POWER_WATTS: "POWER_AVERAGE",
    Fact.POWER_INSTANT_WATTS: "POWER_INSTANT",
    Fact.ECC_ENABLED: "ECC_CURRENT",
    Fact.ECC_CORRECTED_VOLATILE_ERRORS: "ECC_SBE_VOL_TOTAL",
    Fact.ECC_UNCORRECTED_VOLATILE_ERRORS: "ECC_DBE_VOL_TOTAL",
    Fact.ECC_CORRECTED_AGGREGATE_ERRORS: "ECC_SBE_AGG_TOTAL",
    Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS: "ECC_DBE_AGG_TOTAL",
    Fact.RETIRED_PAGES: ("RETIRED_SBE", "RETIRED_DBE"),
    Fact.RETIRED_PAGES_PENDING: "RETIRED_PENDING",
    Fact.REMAPPED_ROWS: ("REMAPPED_COR", "REMAPPED_UNC"),
    Fact.REMAPPED_ROWS_PENDING: "REMAPPED_PENDING",
    Fact.REMAPPED_ROWS_FAILED: "REMAPPED_FAILURE",
    Fact.RECOVERY_ACTION: "GET_GPU_RECOVERY_ACTION",
    Fact.PCIE_REPLAYS: "PCIE_REPLAY_COUNTER",
    Fact.PCIE_TRANSMIT_BYTES: "PCIE_COUNT_TX_BYTES",
    Fact.PCIE_RECEIVE_BYTES: "PCIE_COUNT_RX_BYTES",
    Fact.POWER_LIMIT_MIN_WATTS: "POWER_MIN_LIMIT",
    Fact.POWER_LIMIT_MAX_WATTS: "POWER_MAX_LIMIT",
    Fact.POWER_LIMIT_DEFAULT_WATTS: "POWER_DEFAULT_LIMIT",
    Fact.POWER_LIMIT_WATTS: "POWER_CURRENT_LIMIT",
    Fact.CLOCK_EVENT_SECONDS: (
        *("PERF_POLICY_POWER", "PERF_POLICY_THERMAL", "PERF_POLICY_SYNC_BOOST"),
        *("PERF_POLICY_BOARD_LIMIT", "PERF_POLICY_LOW_UTILIZATION", "PERF_POLICY_RELIABILITY"),
        "CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN",
        "CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN",
        "CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN",
    ),
}
LINK_NAMES: dict[Fact, tuple[str, str]] = {
    Fact.NVLINK_CRC_FLIT_ERRORS: ("NVLINK_ERROR_DL_CRC", "NVLINK_CRC_FLIT_ERROR_COUNT_L"),
    Fact.NVLINK_REPLAY_ERRORS: ("NVLINK_ERROR_DL_REPLAY", "NVLINK_REPLAY_ERROR_COUNT_L"),
    Fact.NVLINK_RECOVERY_ERRORS: ("NVLINK_ERROR_DL_RECOVERY", "NVLINK_RECOVERY_ERROR_COUNT_L"),
}


def number(name: str) -> int:
    value: int = getattr(NVML, f"NVML_FI_DEV_{name}")
    return value


def test_fields_are_those_of_their_facts() -> None:
    read: dict[Fact, list[int]] = {}
    for fields in (fields_at(rate, (580, 105)) for rate in Rate):
        for field in fields:
            read.setdefault(field.fact, []).append(field.number)
    named = {
        fact: [number(name) for name in ((names,) if isinstance(names, str) else names)]
        for fact, names in FIELD_NAMES.items()
    }
    assert read == named


def chain(field: Field | Question | None) -> list[Field | Question]:
    found: list[Field | Question] = []
    while field is not None:
        found.append(field)
        field = field.otherwise if isinstance(field, Field) else None
    return found


@pytest.mark.parametrize("link", [0, 5, 6, 11, 12, 17])
def test_fields_of_a_link_are_those_of_its_facts(link: int) -> None:
    forms = {each[0].fact: each for each in of_link(link)}
    for fact, (newer, older) in LINK_NAMES.items():
        first, *rest = forms[fact]
        assert isinstance(first, Field)
        assert (first.number, first.scope) == (number(newer), link)
        assert len(rest) == (2 if link < 12 else 1)
        if link < 12:
            assert isinstance(rest[0], Field)
            assert (rest[0].number, rest[0].scope) == (number(f"{older}{link}"), 0)
        assert isinstance(rest[-1], Question)
    sent = forms[Fact.NVLINK_TRANSMIT_BYTES]
    assert [each.number for each in sent if isinstance(each, Field)] == [
        number("NVLINK_THROUGHPUT_DATA_TX"),
        number("NVLINK_COUNT_XMIT_BYTES"),
    ]
    received = forms[Fact.NVLINK_RECEIVE_BYTES]
    assert [each.number for each in received if isinstance(each, Field)] == [
        number("NVLINK_THROUGHPUT_DATA_RX"),
        number("NVLINK_COUNT_RCV_BYTES"),
    ]


def of_link(link: int) -> list[list[Any]]:
    asked = list(link_fields(18))
    each = len(asked) // 18
    return [
        chain(form) for form in asked[link * each : (link + 1) * each] if isinstance(form, Field)
    ]


@pytest.mark.parametrize(("links", "asked"), [(0, 0), (1, 8), (18, 144)])
def test_every_link_is_asked_about(links: int, asked: int) -> None:
    assert len(list(link_fields(links))) == asked


METRIC_NAMES = {
    Fact.GRAPHICS_ENGINE_ACTIVE_RATIO: "GRAPHICS_UTIL",
    Fact.SM_ACTIVE_RATIO: "SM_UTIL",
    Fact.SM_OCCUPANCY_RATIO: "SM_OCCUPANCY",
    Fact.INTEGER_ACTIVE_RATIO: "INTEGER_UTIL",
    Fact.TENSOR_ACTIVE_RATIO: "ANY_TENSOR_UTIL",
    Fact.TENSOR_HALF_ACTIVE_RATIO: "HMMA_TENSOR_UTIL",
    Fact.TENSOR_DOUBLE_ACTIVE_RATIO: "DMMA_TENSOR_UTIL",
    Fact.TENSOR_INTEGER_ACTIVE_RATIO: "IMMA_TENSOR_UTIL",
    Fact.MEMORY_BANDWIDTH_RATIO: "DRAM_BW_UTIL",
    Fact.FP64_ACTIVE_RATIO: "FP64_UTIL",
    Fact.FP32_ACTIVE_RATIO: "FP32_UTIL",
    Fact.FP16_ACTIVE_RATIO: "FP16_UTIL",
    Fact.PCIE_TRANSMIT_BYTES_PER_SECOND: "PCIE_TX_PER_SEC",
    Fact.PCIE_RECEIVE_BYTES_PER_SECOND: "PCIE_RX_PER_SEC",
    Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND: "NVLINK_TOTAL_TX_PER_SEC",
    Fact.NVLINK_RECEIVE_BYTES_PER_SECOND: "NVLINK_TOTAL_RX_PER_SEC",
}


def test_metrics_are_those_of_their_facts() -> None:
    theirs = {fact: getattr(NVML, f"NVML_GPM_METRIC_{name}") for fact, name in METRIC_NAMES.items()}
    assert {fact: metric for metric, fact, _ in METRICS} == theirs


def test_every_fact_is_asked_for_at_its_rate() -> None:
    asked = {rate: {f for q in QUESTIONS[rate] for f in q.facts} for rate in Rate}
    for rate in Rate:
        asked[rate] |= {field.fact for field in FIELDS[rate]}
    asked[Rate.FAST] |= {fact for _, fact, _ in METRICS}
    asked[Rate.SLOW] |= {fact for q in fan_questions(1) for fact in q.facts}
    for link in link_fields(1):
        asked[Rate.SLOW] |= {link.fact} if isinstance(link, Field) else set(link.facts)
    assert asked == {
        rate: {fact for fact, spec in FACTS.items() if spec.rate is rate} for rate in Rate
    }
