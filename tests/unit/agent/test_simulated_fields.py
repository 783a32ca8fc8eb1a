"""Field values of simulated GPUs: each entry with its own error, type and value."""

from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.simulated_nodes import NVML, World, node, refused

from stoker.agent.facts import Fact
from stoker.agent.simulated.drivers import parse_release
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import (
    Fail,
    Field,
    Scenario,
    ScriptedDriver,
    ScriptedFact,
    ScriptedProcess,
)

ALL_LINKS = 2**32 - 1
NOT_SUPPORTED = NVML.NVML_ERROR_NOT_SUPPORTED
INVALID_ARGUMENT = NVML.NVML_ERROR_INVALID_ARGUMENT
_UNIONS = {0: "dVal", 1: "uiVal", 3: "ullVal", 5: "siVal"}

FieldId = int | tuple[int, int]


class Refused(int):
    """The driver's error in place of a value."""


def ask(nvml: SimulatedNvml, fields: Sequence[FieldId], index: int = 0) -> list[float | Refused]:
    """Return the values, read by their types as a reader does."""
    values = nvml.nvmlDeviceGetFieldValues(nvml.nvmlDeviceGetHandleByIndex(index), fields)
    assert [value.fieldId for value in values] == [
        field if isinstance(field, int) else field[0] for field in fields
    ]
    return [
        Refused(value.nvmlReturn)
        if value.nvmlReturn
        else getattr(value.value, _UNIONS[value.valueType])
        for value in values
    ]


# Field, and what an idle board answers: an A100-40GB, an H100, an L40S, a T4.
IDLE: list[tuple[FieldId, tuple[Any, ...]]] = [
    (NVML.NVML_FI_DEV_ECC_CURRENT, (1, 1, 1, 1)),
    (NVML.NVML_FI_DEV_ECC_DBE_VOL_TOTAL, (0, 0, 0, 0)),
    (NVML.NVML_FI_DEV_RETIRED_DBE, (None, None, None, 0)),
    (NVML.NVML_FI_DEV_RETIRED_PENDING, (None, None, None, 0)),
    (NVML.NVML_FI_DEV_REMAPPED_UNC, (0, 0, 0, None)),
    (NVML.NVML_FI_DEV_REMAPPED_FAILURE, (0, 0, 0, None)),
    (NVML.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL, (0, 0, None, None)),
    (NVML.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, (25781, 26562, None, None)),
    (NVML.NVML_FI_DEV_NVLINK_SPEED_MBPS_L11, (25781, 26562, None, None)),
    ((NVML.NVML_FI_DEV_NVLINK_GET_SPEED, 11), (25781, 26562, None, None)),
    ((NVML.NVML_FI_DEV_NVLINK_GET_STATE, 3), (1, 1, None, None)),
    ((NVML.NVML_FI_DEV_NVLINK_GET_VERSION, 3), (4, 6, None, None)),
    (NVML.NVML_FI_DEV_NVLINK_LINK_COUNT, (12, 18, None, None)),
    (NVML.NVML_FI_DEV_PCIE_REPLAY_COUNTER, (0, 0, 0, 0)),
    (NVML.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, (0, 0, 0, None)),
    (NVML.NVML_FI_DEV_POWER_MIN_LIMIT, (100_000, 200_000, 100_000, 60_000)),
    (NVML.NVML_FI_DEV_POWER_CURRENT_LIMIT, (400_000, 700_000, 350_000, 70_000)),
    (NVML.NVML_FI_DEV_TEMPERATURE_SHUTDOWN_TLIMIT, (None, -8, -5, None)),
    (NVML.NVML_FI_DEV_TEMPERATURE_SLOWDOWN_TLIMIT, (None, -2, -2, None)),
    (NVML.NVML_FI_DEV_TEMPERATURE_GPU_MAX_TLIMIT, (None, 0, 0, None)),
    (NVML.NVML_FI_DEV_TEMPERATURE_MEM_MAX_TLIMIT, (None, 0, None, None)),
    (NVML.NVML_FI_DEV_IS_RESETLESS_MIG_SUPPORTED, (0, 1, 0, 0)),
    (NVML.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, (0, 0, 0, 0)),
    (NVML.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP, (0, 0, 0, 0)),
    (NVML.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN, (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("field", "answers"), IDLE)
def test_an_idle_board_tells(field: FieldId, answers: tuple[Any, ...]) -> None:
    boards = ("A100-40GB", "H100-80GB", "L40S", "T4")
    found = {board: ask(node(World(), 1, board), [field])[0] for board in boards}
    expected = [NOT_SUPPORTED if answer is None else answer for answer in answers]
    assert found == dict(zip(boards, expected, strict=True))
    refusals = [isinstance(found[board], Refused) for board in boards]
    assert refusals == [answer is None for answer in answers]


def test_one_field_that_is_refused_leaves_the_others() -> None:
    found = ask(
        node(World(), 1, "T4"),
        [
            NVML.NVML_FI_DEV_MEMORY_TEMP,
            NVML.NVML_FI_DEV_POWER_INSTANT,
            NVML.NVML_FI_DEV_RESET_STATUS,
            NVML.NVML_FI_MAX + 5,
        ],
    )
    assert [value for value in found if isinstance(value, Refused)] == [
        NOT_SUPPORTED,
        NVML.NVML_ERROR_DEPRECATED,
        NOT_SUPPORTED,
    ]
    assert found[1] == pytest.approx(10_000, rel=0.03)


def test_no_field_is_no_question() -> None:
    with refused("INVALID_ARGUMENT"):
        ask(node(World(), 1), [])


def test_power_and_memory_temperature_where_the_boards_that_were_seen_tell_them() -> None:
    told = {
        board: ask(node(World(), 1, board), [185, 186, 82])
        for board in ("A100-40GB", "H100-80GB", "L40S", "T4")
    }
    assert [isinstance(told[board][0], Refused) for board in told] == [True, False, False, True]
    assert [isinstance(told[board][2], Refused) for board in told] == [False, False, True, True]
    assert told["H100-80GB"][0] == told["H100-80GB"][1] == pytest.approx(68_600, rel=0.02)
    assert told["H100-80GB"][2] == pytest.approx(37, abs=3)


def test_counters_follow_the_load() -> None:
    world = World()
    work = ScriptedProcess(gpu=0, pid=5_000_001, utilization=0.5)
    nvml = node(world, 2, scenario=Scenario(processes=(work,)))
    fields = [
        NVML.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
        NVML.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
        (NVML.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 3),
        (NVML.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS),
        (NVML.NVML_FI_DEV_NVLINK_THROUGHPUT_RAW_TX, 3),
    ]
    world.now += 1
    before = [ask(nvml, fields, index) for index in (0, 1)]
    world.now += 100
    after = [ask(nvml, fields, index) for index in (0, 1)]
    busy, idle = (
        [late - early for early, late in zip(*both, strict=True)]
        for both in zip(before, after, strict=True)
    )
    assert busy[0] == pytest.approx(100 * 1000 * 359, rel=0.05)
    assert busy[1] == pytest.approx(100 * 0.5 * 0.03 * 63e9, rel=0.05)
    assert busy[2] == pytest.approx(100 * 0.5 * 0.20 * 26562e6 / 1024, rel=0.05)
    assert busy[3] == pytest.approx(18 * busy[2], rel=1e-6)
    assert busy[4] > busy[2]
    assert idle[1:] == [0, 0, 0, 0]


def test_links_tell_their_own_errors_and_their_sum() -> None:
    counters = tuple(
        ScriptedFact(gpu=0, fact=Fact.NVLINK_CRC_FLIT_ERRORS, label=link, value=value)
        for link, value in (("2", 3), ("7", 4))
    )
    nvml = node(World(), 1, "A100-40GB", scenario=Scenario(counters=counters))
    found = ask(
        nvml,
        [
            NVML.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_L2,
            NVML.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_L7,
            NVML.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_L8,
            NVML.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL,
            (NVML.NVML_FI_DEV_NVLINK_ERROR_DL_CRC, 7),
            (NVML.NVML_FI_DEV_NVLINK_ERROR_DL_CRC, 12),
        ],
    )
    assert found == [3, 4, 0, 7, 4, INVALID_ARGUMENT]


def test_time_held_down_is_counted_by_its_reason() -> None:
    world = World()
    told = ScriptedFact(
        gpu=0,
        fact=Fact.CLOCK_EVENT_ACTIVE,
        label="hw_thermal_slowdown",
        value=1,
        from_seconds=10,
        until_seconds=40,
    )
    nvml = node(world, 1, "T4", scenario=Scenario(counters=(told,)))
    for _ in range(60):
        world.now += 1
        nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(0))
    held, braked = ask(nvml, [270, 271])
    assert held == pytest.approx(30e9, abs=1e9)
    assert braked == 0


# Faults ---------------------------------------------------------------------------------------


def test_a_field_can_be_a_sentinel_or_an_error_on_one_gpu() -> None:
    faults = (
        Field(gpu=1, field=82, value=0xFFFFFFFF),
        Field(gpu=1, field=83, error="UNKNOWN"),
        Field(gpu=1, field=193, value=-40),
        Field(gpu=1, field=138, scope=3, value=2**64 - 1),
        Field(gpu=1, field=186, value=1.5),
    )
    nvml = node(World(), 2, scenario=Scenario(faults=faults))
    fields: list[FieldId] = [82, 83, 193, (138, 3), (138, 4), 186]
    spoilt = [0xFFFFFFFF, NVML.NVML_ERROR_UNKNOWN, -40, 2**64 - 1, 0, 1.5]
    assert ask(nvml, fields, 1) == spoilt
    assert ask(nvml, fields, 0)[2:5] == [-8, 0, 0]


def test_a_field_fault_strikes_only_some_calls() -> None:
    fault = Field(field=94, value=9, after_calls=1, calls=1)
    nvml = node(World(), 1, scenario=Scenario(faults=(fault,)))
    assert [ask(nvml, [94, 1]) for _ in range(3)] == [[0, 1], [9, 1], [0, 1]]


def test_the_whole_call_can_fail() -> None:
    fault = Fail(gpu=1, function="nvmlDeviceGetFieldValues", error="TIMEOUT")
    nvml = node(World(), 2, scenario=Scenario(faults=(fault,)))
    assert ask(nvml, [1], 0) == [1]
    with refused("TIMEOUT"):
        ask(nvml, [1], 1)


# Older drivers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("470.57.02", {82, 83, 145}),
        ("535.104.05", {82, 83, 145, 166, 186, 196}),
        ("550.54.15", {82, 83, 145, 166, 186, 196, 198}),
        ("570.148.08", {82, 83, 145, 166, 186, 196, 198, 230}),
        ("580.105.08", {82, 83, 145, 166, 186, 196, 198, 230, 271}),
        ("590.44.01", {82, 83, 145, 166, 186, 196, 198, 230, 271}),
    ],
)
def test_an_older_driver_knows_fewer_fields(version: str, known: set[int]) -> None:
    fields = [82, 83, 145, 166, 186, 196, 198, 230, 271]
    nvml = node(World(), 1, scenario=Scenario(driver=ScriptedDriver(version)))
    found = dict(zip(fields, ask(nvml, fields), strict=True))
    assert {field for field in fields if not isinstance(found[field], Refused)} == known
    assert all(found[field] == NOT_SUPPORTED for field in set(fields) - known)


def test_fields_of_throttling_had_other_numbers_in_r575() -> None:
    assert [parse_release("575.51.02").current_field(field) for field in (251, 253, 269)] == [
        269,
        271,
        None,
    ]
    assert [parse_release("580.65.06").current_field(field) for field in (252, 271)] == [270, None]
    assert [parse_release("580.82.07").current_field(field) for field in (251, 269)] == [251, 269]
    assert [parse_release("570.10.01").current_field(field) for field in (251, 250)] == [None, 250]
