"""What whole answers mean: structs and masks become facts, each part for itself."""

from typing import Any

import pytest

from stoker.agent.facts import CLOCK_EVENT_BITS, Fact
from stoker.agent.nvml.facts import (
    REMAPPED_ROWS,
    Told,
    fan_questions,
    tell_bar1,
    tell_clock_events,
    tell_memory,
    tell_row_remap_banks,
    tell_utilization,
)

ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1


class Struct:
    def __init__(self, **values: int | None) -> None:
        self.__dict__.update(values)


def untold(told: Told) -> set[str]:
    assert {failure.error_kind for failure in told.failures.values()} <= {"not_available"}
    return set(told.failures)


@pytest.mark.parametrize(
    ("info", "known"),
    [
        (
            {"total": 100, "used": 20, "free": 70, "reserved": 10},
            {"total": 100, "used": 20, "free": 70, "reserved": 10},
        ),
        ({"total": 100, "used": 30, "free": 70}, {"total": 100, "used": 30, "free": 70}),
        (
            {"total": 100, "used": ALL_ONES_64, "free": 70, "reserved": 101},
            {"total": 100, "used": None, "free": 70, "reserved": None},
        ),
        (
            {"total": ALL_ONES_64, "used": 20, "free": 70, "reserved": 10},
            {"total": None, "used": None, "free": None, "reserved": None},
        ),
        ({"total": 0, "used": 0, "free": 0}, {"total": None, "used": None, "free": None}),
        (
            {"total": 1001, "used": 0, "free": 0},  # more than the card has
            {"total": None, "used": None, "free": None},
        ),
    ],
)
def test_memory(info: dict[str, int], known: dict[str, int | None]) -> None:
    told = Told("GPU-1", memory_max_bytes=1000)
    tell_memory(told, Struct(**info))  # type: ignore[arg-type]
    facts = {Fact(f"memory_{name}_bytes"): value for name, value in known.items()}
    assert told.facts == {fact: value for fact, value in facts.items() if value is not None}
    assert untold(told) == {fact for fact, value in facts.items() if value is None}


def test_window_to_memory() -> None:
    told = Told("GPU-1")
    window: Any = Struct(bar1Total=100, bar1Used=ALL_ONES_64)
    tell_bar1(told, window)
    assert (told.facts, untold(told)) == ({Fact.BAR1_TOTAL_BYTES: 100}, {Fact.BAR1_USED_BYTES})


def test_utilization() -> None:
    told = Told("GPU-1")
    rates: Any = Struct(gpu=99, memory=ALL_ONES_32)
    tell_utilization(told, rates)
    assert told.facts == {Fact.UTILIZATION_RATIO: 0.99}
    assert untold(told) == {Fact.MEMORY_UTILIZATION_RATIO}


@pytest.mark.parametrize(
    ("mask", "active"),
    [
        (0, set[str]()),
        (0x1, {"gpu_idle"}),
        (0x4 | 0x40, {"sw_power_cap", "hw_thermal_slowdown"}),
        (0x200, set[str]()),  # a reason of older drivers that has no name here
    ],
)
def test_clock_events(mask: int, active: set[str]) -> None:
    told = Told("GPU-1")
    tell_clock_events(told, mask)
    reasons = told.by_label[Fact.CLOCK_EVENT_ACTIVE]
    assert reasons.keys() == set(CLOCK_EVENT_BITS.values())
    assert {reason for reason, is_active in reasons.items() if is_active} == active
    assert set(reasons.values()) <= {0.0, 1.0}


@pytest.mark.parametrize("mask", [ALL_ONES_32, ALL_ONES_64])
def test_a_mask_of_all_ones_is_not_every_reason_at_once(mask: int) -> None:
    told = Told("GPU-1")
    tell_clock_events(told, mask)
    assert (told.by_label, untold(told)) == ({}, {Fact.CLOCK_EVENT_ACTIVE})


def test_banks_by_spare_rows() -> None:
    told = Told("GPU-1")
    histogram: Any = Struct(max=640, high=3, partial=2, low=1, none=ALL_ONES_32)
    tell_row_remap_banks(told, histogram)
    assert told.by_label == {Fact.ROW_REMAP_BANKS: {"max": 640, "high": 3, "partial": 2, "low": 1}}
    (failure,) = told.failures.values()
    assert failure.message == "GPU-1: row_remap_banks of none is not told"


def test_remapped_rows() -> None:
    told = Told("GPU-1")
    REMAPPED_ROWS.tell(told, (1, 2, 1, 0))
    assert told.by_label == {Fact.REMAPPED_ROWS: {"correctable": 1, "uncorrectable": 2}}
    assert told.facts == {Fact.REMAPPED_ROWS_PENDING: 1, Fact.REMAPPED_ROWS_FAILED: 0}


@pytest.mark.parametrize(
    ("fans", "asked"),
    [
        (0, []),
        (
            1,
            [("nvmlDeviceGetFanSpeed_v2", (0,)), ("nvmlDeviceGetFanSpeed", ())],
        ),
        (2, [("nvmlDeviceGetFanSpeed_v2", (0,)), ("nvmlDeviceGetFanSpeed_v2", (1,))]),
    ],
)
def test_fans(fans: int, asked: list[tuple[str, tuple[int, ...]]]) -> None:
    questions = fan_questions(fans)
    forms = [(form.function, form.arguments) for each in questions for form in each.forms]
    assert forms == asked
    told = Told("GPU-1")
    for question in questions:
        question.tell(told, 42)
    assert told.by_label.get(Fact.FAN_SPEED_RATIO, {}) == {str(fan): 0.42 for fan in range(fans)}
