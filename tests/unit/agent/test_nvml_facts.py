"""What NVML's numbers mean: base units, and sentinels that are no numbers."""

from collections.abc import Callable
from typing import Any

import pytest

from stoker.agent.nvml_facts import (
    as_text,
    celsius,
    cuda_version,
    hertz,
    joules,
    memory_by_pid,
    memory_facts,
    only_node,
    ratio,
    utilization_facts,
    watts,
)

ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1


@pytest.mark.parametrize(
    ("convert", "raw", "base"),
    [
        (watts, 68_570, 68.57),
        (watts, 0, 0.0),
        (watts, ALL_ONES_32, None),
        (watts, None, None),
        (joules, 1_234_567_890, 1_234_567.89),
        (joules, ALL_ONES_64, None),
        (hertz, 1980, 1_980_000_000.0),
        (hertz, ALL_ONES_32, None),
        (ratio, 57, 0.57),
        (ratio, 0, 0.0),
        (ratio, 100, 1.0),
        (ratio, 101, None),
        (ratio, ALL_ONES_32, None),
        (celsius, 33, 33.0),
        (celsius, -5, -5.0),
        (celsius, ALL_ONES_32, None),
        (cuda_version, 12080, "12.8"),
        (cuda_version, 13000, "13.0"),
        (cuda_version, 11070, "11.7"),
        (cuda_version, 0, None),
        (cuda_version, None, None),
        (only_node, [0b1, 0], 0),
        (only_node, [0b10, 0], 1),
        (only_node, [0, 0b1], 64),
        (only_node, [0b11, 0], None),
        (only_node, [0, 0], None),
        (only_node, None, None),
        (as_text, "NVIDIA B200", "NVIDIA B200"),
        (as_text, b"Tesla T4", "Tesla T4"),
        (as_text, b"caf\xe9", "caf\ufffd"),
        (as_text, " ", None),
        (as_text, "", None),
        (as_text, None, None),
    ],
)
def test_units(convert: Callable[[Any], Any], raw: Any, base: Any) -> None:
    told = convert(raw)
    assert told == base
    assert type(told) is type(base)


class Struct:
    def __init__(self, **values: int | None) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("info", "told"),
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
    ],
)
def test_memory(info: dict[str, int], told: dict[str, int | None]) -> None:
    struct: Any = Struct(**info)
    assert memory_facts(struct) == {f"memory_{name}_bytes": told[name] for name in told}


def test_utilization() -> None:
    rates: Any = Struct(gpu=99, memory=ALL_ONES_32)
    assert utilization_facts(rates) == {
        "utilization_ratio": 0.99,
        "memory_utilization_ratio": None,
    }


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ([], {}),
        ([(7, 5), (8, 6)], {7: 5, 8: 6}),
        ([(7, 5), (7, 6)], {7: 11}),  # on two MIG instances
        ([(7, None)], {7: None}),
        ([(7, 5), (7, None), (7, 6)], {7: None}),  # a part of the sum is not the sum
        ([(7, ALL_ONES_64)], {7: None}),
    ],
)
def test_memory_of_processes(
    listed: list[tuple[int, int | None]], told: dict[int, int | None]
) -> None:
    processes: Any = [Struct(pid=pid, usedGpuMemory=used) for pid, used in listed]
    assert memory_by_pid(processes) == told
