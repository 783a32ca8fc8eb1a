"""What NVML's numbers mean: base units, and sentinels that are no numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from stoker.agent.nvml.units import (
    as_text,
    celsius,
    count,
    count_32,
    counted_bytes,
    counted_ratio,
    cuda_version,
    fan_ratio,
    flag,
    hertz,
    joules,
    kibibytes,
    link_is_up,
    megabytes_per_second,
    memory_part,
    memory_total,
    only_node,
    process_memory,
    ratio,
    seconds,
    up_to,
    watts,
)

ALL_ONES_32, ALL_ONES_64 = 2**32 - 1, 2**64 - 1


def part_of_ten(used: int) -> int | None:
    return memory_part(used, 10)


def part_of_unknown(used: int) -> int | None:
    return memory_part(used, None)


def total_of_card(total: int) -> int | None:
    return memory_total(total, 2**36)


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
        (celsius, -61, None),
        (celsius, 251, None),
        (fan_ratio, 30, 0.3),
        (fan_ratio, 110, 1.1),  # beyond the noise limit of the product, which is 100 %
        (fan_ratio, ALL_ONES_32, None),
        (counted_ratio, 57.5, 0.575),
        (counted_ratio, 100.4, 1.0),  # counters are not read at one instant
        (counted_ratio, 250.0, None),
        (counted_ratio, -1.0, None),
        (counted_ratio, math.nan, None),
        (counted_ratio, math.inf, None),
        (counted_bytes, 2.0, 2_097_152.0),
        (counted_bytes, math.nan, None),
        (counted_bytes, 1e30, None),
        (seconds, 1_500_000_000, 1.5),
        (seconds, ALL_ONES_64, None),
        (count, 2**40, 2**40),
        (count, ALL_ONES_64, None),
        (count, 0x7FFFFFFFFFFFFFF2, None),  # as DCGM writes "not supported"
        (count_32, 7, 7),
        (count_32, ALL_ONES_32, None),
        (count_32, 0x7FFFFFF0, None),
        (kibibytes, 3, 3072),
        (kibibytes, ALL_ONES_64, None),
        (megabytes_per_second, 26_562, 26_562_000_000.0),
        (megabytes_per_second, ALL_ONES_32, None),
        (flag, 0, 0),
        (flag, 1, 1),
        (flag, 2, None),
        (link_is_up, 0, 0),
        (link_is_up, 1, 1),
        (link_is_up, 2, 1),  # asleep
        (link_is_up, 3, 0),  # active, but traffic is disabled
        (link_is_up, 4, None),
        (up_to(0, 15), 15, 15),
        (up_to(0, 15), 32, None),
        (part_of_ten, 10, 10),
        (part_of_ten, 11, None),
        (part_of_unknown, 1, None),
        (memory_total, 2**36, 2**36),
        (memory_total, 0, None),
        (memory_total, ALL_ONES_64, None),
        (total_of_card, 2**36 + 1, None),
        (process_memory, 0, 0),
        (process_memory, ALL_ONES_64, None),
        (process_memory, None, None),
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
