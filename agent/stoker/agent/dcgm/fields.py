"""What DCGM's profiling fields mean, which of them one chip can watch at once, and what is a value.

Fields go by number: DCGM renamed most of them in 4.6, the numbers stay. Sources: dcgm_fields.h,
dcgm_structs.h (metric groups) and dcgmvalue.py of DCGM 4.6, and DCGM's user guide ("Multiplexing
of Profiling Counters").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from stoker.agent.facts import Fact

# In the order in which they are wanted when not all of them can be watched together.
FIELDS: Mapping[int, Fact] = MappingProxyType(
    {
        1002: Fact.SM_ACTIVE_RATIO,
        1003: Fact.SM_OCCUPANCY_RATIO,
        1004: Fact.TENSOR_ACTIVE_RATIO,
        1001: Fact.GRAPHICS_ENGINE_ACTIVE_RATIO,
        1005: Fact.MEMORY_BANDWIDTH_RATIO,
        1009: Fact.PCIE_TRANSMIT_BYTES_PER_SECOND,
        1010: Fact.PCIE_RECEIVE_BYTES_PER_SECOND,
        1011: Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND,
        1012: Fact.NVLINK_RECEIVE_BYTES_PER_SECOND,
        1006: Fact.FP64_ACTIVE_RATIO,
        1007: Fact.FP32_ACTIVE_RATIO,
        1008: Fact.FP16_ACTIVE_RATIO,
        1014: Fact.TENSOR_HALF_ACTIVE_RATIO,
        1013: Fact.TENSOR_INTEGER_ACTIVE_RATIO,
        1015: Fact.TENSOR_DOUBLE_ACTIVE_RATIO,
        1016: Fact.INTEGER_ACTIVE_RATIO,
    }
)
# PCIe and NVLink belong to the whole GPU: their traffic is not told apart by MIG instance.
WHOLE_GPU_FIELDS = frozenset({1009, 1010, 1011, 1012})

# A reading is at most so many sampling intervals old.
INTERVALS_FRESH = 3.0

_INT64_BLANK = 0x7FFFFFFFFFFFFFF0
_DOUBLE_BLANK = 140737488355328.0  # 2 ** 47
_TEXT_BLANK = "<<<"
# Counters that are read one after the other may say a little more than all of the time.
_RATIO_MAX = 1.01

_RANK = {field: rank for rank, field in enumerate(FIELDS)}


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Fields that the hardware counts together.

    Of the groups with one `major` only one is counted at a time; groups of different `major` do
    not get in each other's way. DCGM would take turns among the former, so that each is counted
    for a part of the time only.
    """

    major: int
    minor: int
    fields: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The fields to watch, most wanted first, and those that the GPU has and that do not fit."""

    watched: tuple[int, ...]
    left_out: tuple[int, ...]


def select(groups: Iterable[MetricGroup]) -> Selection:
    """Return what can be watched all of the time: of each major the group most wanted."""
    best: dict[int, MetricGroup] = {}
    known: set[int] = set()
    for group in groups:
        known.update(group.fields)
        chosen = best.get(group.major)
        if chosen is None or _weight(group.fields) > _weight(chosen.fields):
            best[group.major] = group
    fitting = {field for group in best.values() for field in group.fields}
    return Selection(_by_rank(fitting), _by_rank(known - fitting))


def of_instance(fields: Iterable[int]) -> tuple[int, ...]:
    """Return those of the fields that a MIG instance has too."""
    return tuple(field for field in fields if field not in WHOLE_GPU_FIELDS)


def is_blank(value: float | str) -> bool:
    """Whether DCGM means "no value" by this; the kinds of blank differ only in the reason."""
    if isinstance(value, str):
        return value.startswith(_TEXT_BLANK)
    return value >= (_INT64_BLANK if isinstance(value, int) else _DOUBLE_BLANK)


def in_base_unit(field: int, value: float) -> float | None:
    """Return the fact that the value of a field tells; None: it is blank or cannot be true."""
    if is_blank(value):
        return None
    if field in WHOLE_GPU_FIELDS:
        return float(value) if value >= 0 else None
    return min(1.0, float(value)) if 0 <= value <= _RATIO_MAX else None


def is_fresh(measured_at: float, now: float, interval_seconds: float) -> bool:
    """Whether a value of that time may be told now; one from the future comes of a set clock."""
    return abs(now - measured_at) <= INTERVALS_FRESH * interval_seconds


def described(fields: Sequence[int]) -> str:
    """Return the fields by number and by fact, for people."""
    return ", ".join(f"{field} {FIELDS[field].value}" for field in fields)


def _weight(fields: Iterable[int]) -> int:
    """Return a number that a field raises more than all the less wanted ones together."""
    return sum(1 << (len(_RANK) - _RANK[field]) for field in set(fields) if field in _RANK)


def _by_rank(fields: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted((field for field in fields if field in _RANK), key=_RANK.__getitem__))
