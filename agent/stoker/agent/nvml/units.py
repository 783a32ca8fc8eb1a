"""What NVML's numbers mean: base units, and the values that look like numbers and are none.

Sentinels end here: all ones (0xFFFFFFFF, 2^64 - 1), shares above 100 %, temperatures that no chip
survives and memory larger than the card mean "not told", so they become None.
"""

import re
from collections.abc import Callable, Sequence
from typing import Final

Meaning = Callable[[float], float | None]  # of one number that the driver told
Release = tuple[int, int]  # of a driver: (580, 105)

# More than any board has, less than any sentinel.
_BYTES_MAX = 2**50
_COUNT_MAX = 2**62
_MILLIWATTS_MAX = 10_000_000
_MILLIJOULES_MAX = 2**60
_MEGAHERTZ_MAX = 100_000
_MEGABYTES_PER_SECOND_MAX = 10_000_000
_CELSIUS_MIN, _CELSIUS_MAX = -60, 250
# How DCGM writes "blank" in 32 bits, and with what reason.
_BLANKS_32 = range(0x7FFFFFF0, 0x80000000)
# A fan may run faster than its product's noise limit, which is what 100 % means.
_FAN_PERCENT_MAX = 250
# Hardware counters of two samples are not read at one instant, so a busy unit may pass 100 %.
_COUNTED_PERCENT_MAX = 102

KIBIBYTE: Final = 1024
MEBIBYTE: Final = 1024 * 1024


def as_text(value: str | bytes | None) -> str | None:
    """Return text; older forms of nvidia-ml-py give bytes, and cards give empty text for none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return (value.strip() or None) if value else None


def watts(milliwatts: float | None) -> float | None:
    """Return watts, or None for what no board draws."""
    if milliwatts is None or not 0 <= milliwatts <= _MILLIWATTS_MAX:
        return None
    return milliwatts / 1e3


def joules(millijoules: float) -> float | None:
    """Return joules, or None for what no board has used."""
    return millijoules / 1e3 if 0 <= millijoules <= _MILLIJOULES_MAX else None


def hertz(megahertz: float) -> float | None:
    """Return hertz, or None for what no clock reaches."""
    return megahertz * 1e6 if 0 <= megahertz <= _MEGAHERTZ_MAX else None


def ratio(percent: float) -> float | None:
    """Return a share of one, or None above a hundred percent."""
    return percent / 100 if 0 <= percent <= 100 else None


def fan_ratio(percent: float) -> float | None:
    """Return a share of one, which a fan may exceed."""
    return percent / 100 if 0 <= percent <= _FAN_PERCENT_MAX else None


def counted_ratio(percent: float) -> float | None:
    """Return a share of one as hardware counters tell it; NaN is no share."""
    return min(percent / 100, 1.0) if 0 <= percent <= _COUNTED_PERCENT_MAX else None


def counted_bytes(mebibytes: float) -> float | None:
    """Return bytes (per second), or None for what no link carries."""
    return mebibytes * MEBIBYTE if 0 <= mebibytes <= _MEGABYTES_PER_SECOND_MAX else None


def celsius(degrees: float) -> float | None:
    """Return the temperature, or None for what no chip survives."""
    return float(degrees) if _CELSIUS_MIN <= degrees <= _CELSIUS_MAX else None


def seconds(nanoseconds: float) -> float | None:
    """Return seconds."""
    return nanoseconds / 1e9 if 0 <= nanoseconds <= _COUNT_MAX else None


def count(value: float) -> float | None:
    """Return a counter of 64 bits."""
    return value if 0 <= value <= _COUNT_MAX else None


def count_32(value: float) -> float | None:
    """Return a number of things, of which there are never as many as 32 bits can say."""
    return value if 0 <= value < 2**32 - 1 and value not in _BLANKS_32 else None


def kibibytes(value: float) -> float | None:
    """Return bytes."""
    return value * KIBIBYTE if 0 <= value <= _COUNT_MAX // KIBIBYTE else None


def megabytes_per_second(value: float) -> float | None:
    """Return bytes per second."""
    return value * 1e6 if 0 <= value <= _MEGABYTES_PER_SECOND_MAX else None


def flag(value: float) -> float | None:
    """Return 1 or 0, or None for what is neither."""
    return value if value in (0, 1) else None


def up_to(least: int, most: int) -> Meaning:
    """Return a meaning for numbers of this range."""

    def meaning(value: float) -> float | None:
        return value if least <= value <= most else None

    return meaning


def link_is_up(state: float) -> float | None:
    """Return 1 for a link that is active or asleep, 0 for one that is not or carries no traffic."""
    return {0: 0, 1: 1, 2: 1, 3: 0}.get(int(state))


def memory_part(value: int, total: int | None) -> int | None:
    """Return bytes, or None for a part that is larger than the whole."""
    return value if total is not None and 0 <= value <= total else None


def memory_total(value: int, most: int | None = None) -> int | None:
    """Return bytes, or None for what no card has, or not this one."""
    return value if 1 <= value <= (most or _BYTES_MAX) else None


def process_memory(value: int | None) -> int | None:
    """Return bytes, or None for what no process holds."""
    return value if value is not None and 0 <= value <= _BYTES_MAX else None


def release_of(driver_version: str | None) -> Release | None:
    """Return (580, 105) for "580.105.08"; None for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", driver_version or "", re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))


def cuda_version(packed: int | None) -> str | None:
    """Return "12.8" for 12080."""
    return None if not packed else f"{packed // 1000}.{packed % 1000 // 10}"


def only_node(words: Sequence[int] | None) -> int | None:
    """Return the number of the only bit set in an array of 64-bit words."""
    bits = sum(int(word) << (64 * place) for place, word in enumerate(words or ()))
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None
