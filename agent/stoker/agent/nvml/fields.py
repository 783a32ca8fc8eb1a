"""The facts that nvmlDeviceGetFieldValues tells, many in one call: numbers, meanings, fall-backs.

A field that this card or driver does not have is left out of the next call; what is asked instead
stands beside it. Fields of an NVLink are asked for with the link as their scope. Drivers before
those had a number for every counter of every link instead (links 0 to 5, then 6 to 11), and
functions for one counter at a time before that.

Numbers are those of nvml.h (NVML_FI_DEV_...). Most keep their meaning for good; some moved once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType
from typing import Final, Union

from stoker.agent.facts import CORRECTABLE, UNCORRECTABLE, Fact, Rate
from stoker.agent.nvml import facts as questions
from stoker.agent.nvml.facts import Question, link_errors, link_state
from stoker.agent.nvml.table import (
    NVLINK_ERROR_CRC_DATA,
    NVLINK_ERROR_CRC_FLIT,
    NVLINK_ERROR_RECOVERY,
    NVLINK_ERROR_REPLAY,
    ValueType,
)
from stoker.agent.nvml.units import (
    Meaning,
    Release,
    celsius,
    count,
    count_32,
    flag,
    joules,
    kibibytes,
    link_is_up,
    megabytes_per_second,
    seconds,
    up_to,
    watts,
)

NVLINK_LINK_COUNT: Final = 91

_ALL_ONES_32, _ALL_ONES_64 = 2**32 - 1, 2**64 - 1
_DOUBLE = Struct("=d")


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """One field, what its value means, and what is asked where it does not exist."""

    number: int
    fact: Fact
    meaning: Meaning
    label: str | None = None
    scope: int = 0
    otherwise: Union["Field", Question, None] = None


FIELDS: MappingProxyType[Rate, tuple[Field, ...]] = MappingProxyType(
    {
        Rate.FAST: (
            Field(82, Fact.MEMORY_TEMPERATURE_CELSIUS, celsius),
            Field(83, Fact.ENERGY_JOULES, joules, otherwise=questions.TOTAL_ENERGY),
            # The mean of the last second; on cards that have no such mean (before Ampere, and
            # GA100) the function tells the sensor's last value.
            Field(185, Fact.POWER_WATTS, watts, otherwise=questions.POWER_USAGE),
            Field(186, Fact.POWER_INSTANT_WATTS, watts),
        ),
        Rate.SLOW: (
            Field(1, Fact.ECC_ENABLED, flag, otherwise=questions.ECC_MODE),
            Field(
                *(3, Fact.ECC_CORRECTED_VOLATILE_ERRORS, count),
                otherwise=questions.ECC_CORRECTED_VOLATILE,
            ),
            Field(
                *(4, Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, count),
                otherwise=questions.ECC_UNCORRECTED_VOLATILE,
            ),
            Field(
                *(5, Fact.ECC_CORRECTED_AGGREGATE_ERRORS, count),
                otherwise=questions.ECC_CORRECTED_AGGREGATE,
            ),
            Field(
                *(6, Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS, count),
                otherwise=questions.ECC_UNCORRECTED_AGGREGATE,
            ),
            Field(29, Fact.RETIRED_PAGES, count_32, CORRECTABLE),
            Field(30, Fact.RETIRED_PAGES, count_32, UNCORRECTABLE),
            Field(31, Fact.RETIRED_PAGES_PENDING, flag),
            Field(
                *(142, Fact.REMAPPED_ROWS, count_32, CORRECTABLE), otherwise=questions.REMAPPED_ROWS
            ),
            Field(
                *(143, Fact.REMAPPED_ROWS, count_32, UNCORRECTABLE),
                otherwise=questions.REMAPPED_ROWS,
            ),
            Field(144, Fact.REMAPPED_ROWS_PENDING, flag, otherwise=questions.REMAPPED_ROWS),
            Field(145, Fact.REMAPPED_ROWS_FAILED, flag, otherwise=questions.REMAPPED_ROWS),
            Field(230, Fact.RECOVERY_ACTION, up_to(0, 255)),
            Field(94, Fact.PCIE_REPLAYS, count_32, otherwise=questions.PCIE_REPLAYS),
            Field(197, Fact.PCIE_TRANSMIT_BYTES, count),
            Field(198, Fact.PCIE_RECEIVE_BYTES, count),
            Field(187, Fact.POWER_LIMIT_MIN_WATTS, watts, otherwise=questions.POWER_LIMITS),
            Field(188, Fact.POWER_LIMIT_MAX_WATTS, watts, otherwise=questions.POWER_LIMITS),
            Field(
                *(189, Fact.POWER_LIMIT_DEFAULT_WATTS, watts),
                otherwise=questions.DEFAULT_POWER_LIMIT,
            ),
            Field(190, Fact.POWER_LIMIT_WATTS, watts, otherwise=questions.ENFORCED_POWER_LIMIT),
            # Those that are bits of the clock event mask too bear the same names as there.
            Field(74, Fact.CLOCK_EVENT_SECONDS, seconds, "sw_power_cap"),
            Field(75, Fact.CLOCK_EVENT_SECONDS, seconds, "thermal"),
            Field(76, Fact.CLOCK_EVENT_SECONDS, seconds, "sync_boost"),
            Field(77, Fact.CLOCK_EVENT_SECONDS, seconds, "board_limit"),
            Field(78, Fact.CLOCK_EVENT_SECONDS, seconds, "low_utilization"),
            Field(79, Fact.CLOCK_EVENT_SECONDS, seconds, "reliability"),
        ),
    }
)

# These moved: R575 has them from 251 on, and R580.82 from 269 on, where R575 has settings of power
# smoothing. A driver whose release cannot be read is not asked: it would tell one for the other.
_SLOWDOWNS = ("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
_SLOWDOWNS_FROM: tuple[tuple[Release, int], ...] = (((580, 82), 269), ((575, 0), 251))

# The numbers of links 0 and 6 in the older layout; each is followed by the next five links.
_ERROR_FIELDS: tuple[tuple[Fact, int | None, tuple[int, int], int], ...] = (
    (Fact.NVLINK_CRC_FLIT_ERRORS, 163, (32, 96), NVLINK_ERROR_CRC_FLIT),
    (Fact.NVLINK_CRC_DATA_ERRORS, None, (39, 102), NVLINK_ERROR_CRC_DATA),
    (Fact.NVLINK_REPLAY_ERRORS, 161, (46, 108), NVLINK_ERROR_REPLAY),
    (Fact.NVLINK_RECOVERY_ERRORS, 162, (53, 114), NVLINK_ERROR_RECOVERY),
)


def fields_at(rate: Rate, release: Release | None) -> Iterator[Field]:
    """Give the fields that a driver of this release is asked for at this rate."""
    yield from FIELDS[rate]
    if rate is Rate.SLOW and release is not None:
        first = next((first for since, first in _SLOWDOWNS_FROM if release >= since), None)
        if first is not None:
            for number, reason in enumerate(_SLOWDOWNS, first):
                yield Field(number, Fact.CLOCK_EVENT_SECONDS, seconds, reason)


def link_fields(links: int) -> Iterator[Field | Question]:
    """Give what is asked about so many links: fields, and questions where there is none."""
    for link in range(links):
        yield link_state_field(link)
        yield _of_link(*(link, 164, Fact.NVLINK_BANDWIDTH_BYTES_PER_SECOND, megabytes_per_second))
        for fact, number, older, counter in _ERROR_FIELDS:
            before = _older(link, older, fact, count, link_errors(fact, link, counter))
            yield before if number is None else _of_link(link, number, fact, count, before)
        # Links of Blackwell count bytes instead.
        for fact, number, newer in (
            (Fact.NVLINK_TRANSMIT_BYTES, 138, 202),
            (Fact.NVLINK_RECEIVE_BYTES, 139, 204),
        ):
            yield _of_link(link, number, fact, kibibytes, _of_link(link, newer, fact, count))


def link_state_field(link: int) -> Field:
    """Return what is asked about the state of a link."""
    return _of_link(link, 165, Fact.NVLINK_UP, link_is_up, otherwise=link_state(link))


def _of_link(
    link: int,
    number: int,
    fact: Fact,
    meaning: Meaning,
    otherwise: Field | Question | None = None,
) -> Field:
    return Field(number, fact, meaning, str(link), link, otherwise)


def _older(
    link: int,
    numbers: tuple[int, int],
    fact: Fact,
    meaning: Meaning,
    otherwise: Question,
) -> Field | Question:
    """Return the older field of a link, which links after the twelfth do not have."""
    if link >= 12:
        return otherwise
    return Field(numbers[link // 6] + link % 6, fact, meaning, str(link), 0, otherwise)


def value_of(value_type: int, raw: int) -> float | None:
    """Return what the eight bytes of a value are by their type; all ones are none."""
    match value_type:
        case ValueType.UNSIGNED_INT:
            raw &= _ALL_ONES_32
            return None if raw == _ALL_ONES_32 else raw
        case ValueType.UNSIGNED_LONG | ValueType.UNSIGNED_LONG_LONG:
            return None if raw == _ALL_ONES_64 else raw
        case ValueType.DOUBLE:
            (double,) = _DOUBLE.unpack(raw.to_bytes(8, "little"))
            return float(double)
        case ValueType.SIGNED_LONG_LONG:
            return raw - 2**64 if raw >> 63 else raw
        case ValueType.SIGNED_INT:
            raw &= _ALL_ONES_32
            return raw - 2**32 if raw >> 31 else raw
        case ValueType.UNSIGNED_SHORT:
            return raw & 0xFFFF
        case _:
            return None  # a type that this program does not know
