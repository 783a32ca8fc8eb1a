"""The table of dcgm-exporter's fields that our facts can fill: names, types and units.

Names, types and units: DCGM 4.6 (dcgm_fields.h; the numbers are DCGM's identifiers) under the
names that dcgm-exporter 4.5.3-4.8.2 gives them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stoker.agent.facts import (
    BANK_AVAILABILITIES,
    CLOCK_EVENT_BITS,
    CORRECTABLE,
    UNCORRECTABLE,
    Fact,
)
from stoker.agent.metrics.exposition import FamilyKind

_MEGA = 1e6
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Told:
    """What one GPU or one MIG instance told."""

    facts: Mapping[Fact, float]
    by_label: Mapping[Fact, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of DCGM that our facts can fill; `value` gives it in DCGM's unit, None: not told."""

    number: int
    name: str
    kind: FamilyKind
    unit: str
    doc: str
    facts: tuple[Fact, ...]  # what it is made of
    value: Callable[[Told], float | None]
    is_integer: bool


_GAUGE, _COUNTER = FamilyKind.GAUGE, FamilyKind.COUNTER
_Value = Callable[[Told], float | None]


def _plain(
    number: int,
    name: str,
    fact: Fact,
    factor: float,
    unit: str,
    doc: str,
    *,
    kind: FamilyKind = _GAUGE,
    is_integer: bool = True,
) -> Field:
    def value(told: Told) -> float | None:
        found = told.facts.get(fact)
        return None if found is None else found * factor

    return Field(number, name, kind, unit, doc, (fact,), value, is_integer)


def _whole(number: int, name: str, fact: Fact, doc: str, *, kind: FamilyKind = _GAUGE) -> Field:
    return _plain(number, name, fact, 1, "number", doc, kind=kind)


def _ratio(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1, "0 to 1", doc, is_integer=False)


def _rate(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1, "bytes/s", doc)


def _watts(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1, "W", doc, is_integer=False)


def _celsius(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1, "°C", doc)


def _megahertz(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1 / _MEGA, "MHz", doc)


def _mebibytes(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 1 / _MIB, "MiB", doc)


def _percent(number: int, name: str, fact: Fact, doc: str) -> Field:
    return _plain(number, name, fact, 100, "%", doc)


def _of_label(
    number: int,
    name: str,
    fact: Fact,
    label: str,
    kind: FamilyKind,
    doc: str,
    *,
    unit: str = "number",
    factor: float = 1,
) -> Field:
    def value(told: Told) -> float | None:
        found = told.by_label.get(fact, {}).get(label)
        return None if found is None else found * factor

    return Field(number, name, kind, unit, doc, (fact,), value, is_integer=True)


def _over_labels(
    number: int,
    name: str,
    fact: Fact,
    fold: Callable[[Iterable[float]], float],
    unit: str,
    doc: str,
    *,
    kind: FamilyKind,
    factor: float = 1,
) -> Field:
    def value(told: Told) -> float | None:
        values = told.by_label.get(fact)
        return fold(values.values()) * factor if values else None

    return Field(number, name, kind, unit, doc, (fact,), value, is_integer=True)


def _bar1_free(told: Told) -> float | None:
    return _difference(told, Fact.BAR1_TOTAL_BYTES, Fact.BAR1_USED_BYTES)


def _difference(told: Told, whole: Fact, part: Fact) -> float | None:
    total, used = told.facts.get(whole), told.facts.get(part)
    return None if total is None or used is None else (total - used) / _MIB


def _used_share(told: Told) -> float | None:
    """Return what DCGM calls a percentage: the used part of what can be used, 0 to 1."""
    used, total = told.facts.get(Fact.MEMORY_USED_BYTES), told.facts.get(Fact.MEMORY_TOTAL_BYTES)
    reserved = told.facts.get(Fact.MEMORY_RESERVED_BYTES)
    if used is None or total is None or reserved is None or total <= reserved:
        return None
    return used / (total - reserved)


def _clock_events(told: Told) -> float | None:
    """Return the reasons as the driver's bits."""
    active = told.by_label.get(Fact.CLOCK_EVENT_ACTIVE)
    if active is None:
        return None
    return sum(bit for bit, reason in CLOCK_EVENT_BITS.items() if active.get(reason))


def _nvlink_rate(told: Told) -> float | None:
    """Return what DCGM makes of NVLink's counters, both directions: KiB/s divided by 1000."""
    sent = told.facts.get(Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND)
    received = told.facts.get(Fact.NVLINK_RECEIVE_BYTES_PER_SECOND)
    return None if sent is None or received is None else (sent + received) / 1024 / 1000


_P = "DCGM_FI_PROF_"
_D = "DCGM_FI_DEV_"
_LINK = _D + "NVLINK_"

FIELDS: tuple[Field, ...] = (
    _whole(65, _D + "COMPUTE_MODE", Fact.COMPUTE_MODE, "Who may make contexts, in NVML's numbers."),
    _whole(66, _D + "PERSISTENCE_MODE", Fact.PERSISTENCE_MODE, "Whether the driver stays loaded."),
    _whole(67, _D + "MIG_MODE", Fact.MIG_MODE, "Whether the GPU is partitioned."),
    _mebibytes(90, _D + "BAR1_TOTAL", Fact.BAR1_TOTAL_BYTES, "BAR1 window, whole (MiB)."),
    _mebibytes(92, _D + "BAR1_USED", Fact.BAR1_USED_BYTES, "BAR1 window, in use (MiB)."),
    Field(
        *(93, _D + "BAR1_FREE", _GAUGE, "MiB", "BAR1 window, not in use (MiB)."),
        facts=(Fact.BAR1_TOTAL_BYTES, Fact.BAR1_USED_BYTES),
        value=_bar1_free,
        is_integer=True,
    ),
    _megahertz(100, _D + "SM_CLOCK", Fact.SM_CLOCK_HERTZ, "Clock of the SMs (MHz)."),
    _megahertz(101, _D + "MEM_CLOCK", Fact.MEMORY_CLOCK_HERTZ, "Clock of the memory (MHz)."),
    _megahertz(
        102, _D + "VIDEO_CLOCK", Fact.VIDEO_CLOCK_HERTZ, "Clock of the video engines (MHz)."
    ),
    Field(
        *(112, _D + "CLOCK_THROTTLE_REASONS", _GAUGE, "bits"),
        "What holds the clocks down, as bits of nvmlClocksEventReasons.",
        facts=(Fact.CLOCK_EVENT_ACTIVE,),
        value=_clock_events,
        is_integer=True,
    ),
    _megahertz(113, _D + "MAX_SM_CLOCK", Fact.SM_CLOCK_MAX_HERTZ, "Highest SM clock (MHz)."),
    _megahertz(
        114, _D + "MAX_MEM_CLOCK", Fact.MEMORY_CLOCK_MAX_HERTZ, "Highest memory clock (MHz)."
    ),
    _celsius(
        140, _D + "MEMORY_TEMP", Fact.MEMORY_TEMPERATURE_CELSIUS, "Memory's temperature (°C)."
    ),
    _celsius(150, _D + "GPU_TEMP", Fact.TEMPERATURE_CELSIUS, "Core's temperature (°C)."),
    _celsius(
        *(151, _D + "MEM_MAX_OP_TEMP", Fact.MEMORY_TEMPERATURE_MAX_CELSIUS),
        "Highest temperature of the memory in regular operation (°C).",
    ),
    _celsius(
        *(152, _D + "GPU_MAX_OP_TEMP", Fact.TEMPERATURE_OPERATING_MAX_CELSIUS),
        "Highest temperature of the core in regular operation (°C).",
    ),
    _celsius(
        *(153, _D + "GPU_TEMP_LIMIT", Fact.TEMPERATURE_MARGIN_CELSIUS),
        "Degrees left until the GPU slows down (°C).",
    ),
    _watts(155, _D + "POWER_USAGE", Fact.POWER_WATTS, "Power drawn by the board (W)."),
    _plain(
        *(156, _D + "TOTAL_ENERGY_CONSUMPTION", Fact.ENERGY_JOULES, 1000, "mJ"),
        "Energy since the driver was loaded (mJ).",
        kind=_COUNTER,
    ),
    _watts(
        *(157, _D + "POWER_USAGE_INSTANT", Fact.POWER_INSTANT_WATTS),
        "Power drawn by the board at this instant (W).",
    ),
    _celsius(
        *(158, _D + "SLOWDOWN_TEMP", Fact.TEMPERATURE_SLOWDOWN_CELSIUS),
        "Temperature at which the GPU slows down (°C).",
    ),
    _celsius(
        *(159, _D + "SHUTDOWN_TEMP", Fact.TEMPERATURE_SHUTDOWN_CELSIUS),
        "Temperature at which the GPU turns itself off (°C).",
    ),
    _watts(161, _D + "POWER_MGMT_LIMIT_MIN", Fact.POWER_LIMIT_MIN_WATTS, "Lowest limit (W)."),
    _watts(162, _D + "POWER_MGMT_LIMIT_MAX", Fact.POWER_LIMIT_MAX_WATTS, "Highest limit (W)."),
    _watts(
        *(163, _D + "POWER_MGMT_LIMIT_DEF", Fact.POWER_LIMIT_DEFAULT_WATTS),
        "Limit that the board starts with (W).",
    ),
    _watts(164, _D + "ENFORCED_POWER_LIMIT", Fact.POWER_LIMIT_WATTS, "Limit in force (W)."),
    _whole(190, _D + "PSTATE", Fact.PERFORMANCE_STATE, "Performance state, 0 is the fastest."),
    _over_labels(
        *(191, _D + "FAN_SPEED", Fact.FAN_SPEED_RATIO, max, "%"),
        "Wanted speed of the fastest fan (%).",
        kind=_GAUGE,
        factor=100,
    ),
    _whole(
        *(202, _D + "PCIE_REPLAY_COUNTER", Fact.PCIE_REPLAYS),
        "PCIe packets that had to be sent again.",
        kind=_COUNTER,
    ),
    _percent(203, _D + "GPU_UTIL", Fact.UTILIZATION_RATIO, "Time in which a kernel ran (%)."),
    _percent(
        *(204, _D + "MEM_COPY_UTIL", Fact.MEMORY_UTILIZATION_RATIO),
        "Time in which memory was read or written (%).",
    ),
    _percent(206, _D + "ENC_UTIL", Fact.ENCODER_UTILIZATION_RATIO, "Load of the encoder (%)."),
    _percent(207, _D + "DEC_UTIL", Fact.DECODER_UTILIZATION_RATIO, "Load of the decoder (%)."),
    _whole(235, _D + "PCIE_MAX_LINK_GEN", Fact.PCIE_LINK_GENERATION_MAX, "Highest generation."),
    _whole(236, _D + "PCIE_MAX_LINK_WIDTH", Fact.PCIE_LINK_WIDTH_MAX, "Most PCIe lanes."),
    _whole(237, _D + "PCIE_LINK_GEN", Fact.PCIE_LINK_GENERATION, "PCIe generation in use."),
    _whole(238, _D + "PCIE_LINK_WIDTH", Fact.PCIE_LINK_WIDTH, "PCIe lanes in use."),
    *(
        _of_label(
            number,
            f"{_D}{name}_VIOLATION",
            Fact.CLOCK_EVENT_SECONDS,
            reason,
            _COUNTER,
            f"Time for which this held the clocks down (ns): {doc}.",
            unit="ns",
            factor=1e9,
        )
        for number, name, reason, doc in (
            (240, "POWER", "sw_power_cap", "power"),
            (241, "THERMAL", "thermal", "heat"),
            (242, "SYNC_BOOST", "sync_boost", "the slowest of a group"),
            (243, "BOARD_LIMIT", "board_limit", "the board's limit"),
            (244, "LOW_UTIL", "low_utilization", "little to do"),
            (245, "RELIABILITY", "reliability", "reliability"),
        )
    ),
    _mebibytes(250, _D + "FB_TOTAL", Fact.MEMORY_TOTAL_BYTES, "All memory (MiB)."),
    _mebibytes(251, _D + "FB_FREE", Fact.MEMORY_FREE_BYTES, "Memory not in use (MiB)."),
    _mebibytes(252, _D + "FB_USED", Fact.MEMORY_USED_BYTES, "Memory in use (MiB)."),
    _mebibytes(
        253, _D + "FB_RESERVED", Fact.MEMORY_RESERVED_BYTES, "Memory that the driver keeps (MiB)."
    ),
    Field(
        *(254, _D + "FB_USED_PERCENT", _GAUGE, "0 to 1"),
        "Memory in use as a share of what the driver does not keep (0 to 1).",
        facts=(Fact.MEMORY_USED_BYTES, Fact.MEMORY_TOTAL_BYTES, Fact.MEMORY_RESERVED_BYTES),
        value=_used_share,
        is_integer=False,
    ),
    _whole(300, _D + "ECC_CURRENT", Fact.ECC_ENABLED, "Whether memory errors are corrected."),
    _whole(
        *(310, _D + "ECC_SBE_VOL_TOTAL", Fact.ECC_CORRECTED_VOLATILE_ERRORS),
        "Corrected memory errors since the driver was loaded.",
        kind=_COUNTER,
    ),
    _whole(
        *(311, _D + "ECC_DBE_VOL_TOTAL", Fact.ECC_UNCORRECTED_VOLATILE_ERRORS),
        "Uncorrected memory errors since the driver was loaded.",
        kind=_COUNTER,
    ),
    _whole(
        *(312, _D + "ECC_SBE_AGG_TOTAL", Fact.ECC_CORRECTED_AGGREGATE_ERRORS),
        "Corrected memory errors in the life of the board.",
        kind=_COUNTER,
    ),
    _whole(
        *(313, _D + "ECC_DBE_AGG_TOTAL", Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS),
        "Uncorrected memory errors in the life of the board.",
        kind=_COUNTER,
    ),
    *(
        _of_label(
            385 + i,
            f"{_D}BANKS_REMAP_ROWS_AVAIL_{availability.upper()}",
            Fact.ROW_REMAP_BANKS,
            availability,
            _GAUGE,
            f"Memory banks with so many spare rows left: {availability}.",
        )
        for i, availability in enumerate(BANK_AVAILABILITIES)
    ),
    _of_label(
        *(390, _D + "RETIRED_SBE", Fact.RETIRED_PAGES, CORRECTABLE, _COUNTER),
        "Memory pages taken out of use after corrected errors.",
    ),
    _of_label(
        *(391, _D + "RETIRED_DBE", Fact.RETIRED_PAGES, UNCORRECTABLE, _COUNTER),
        "Memory pages taken out of use after an uncorrected error.",
    ),
    _whole(
        *(392, _D + "RETIRED_PENDING", Fact.RETIRED_PAGES_PENDING),
        "Whether a page is taken out of use at the next reset.",
        kind=_COUNTER,
    ),
    _of_label(
        *(393, _D + "UNCORRECTABLE_REMAPPED_ROWS", Fact.REMAPPED_ROWS, UNCORRECTABLE, _COUNTER),
        "Memory rows replaced after uncorrected errors.",
    ),
    _of_label(
        *(394, _D + "CORRECTABLE_REMAPPED_ROWS", Fact.REMAPPED_ROWS, CORRECTABLE, _COUNTER),
        "Memory rows replaced after corrected errors.",
    ),
    _whole(395, _D + "ROW_REMAP_FAILURE", Fact.REMAPPED_ROWS_FAILED, "Whether replacing failed."),
    _whole(
        *(396, _D + "ROW_REMAP_PENDING", Fact.REMAPPED_ROWS_PENDING),
        "Whether a row is replaced at the next reset.",
    ),
    *(
        _over_labels(
            *(number, f"{_LINK}{name}_ERROR_COUNT_TOTAL", fact, sum, "number"),
            f"{doc}, over all links.",
            kind=_COUNTER,
        )
        for number, name, fact, doc in (
            (409, "CRC_FLIT", Fact.NVLINK_CRC_FLIT_ERRORS, "CRC errors of flow control"),
            (419, "CRC_DATA", Fact.NVLINK_CRC_DATA_ERRORS, "CRC errors of data"),
            (429, "REPLAY", Fact.NVLINK_REPLAY_ERRORS, "Replays"),
            (439, "RECOVERY", Fact.NVLINK_RECOVERY_ERRORS, "Recoveries"),
        )
    ),
    Field(
        *(449, _LINK + "BANDWIDTH_TOTAL", _COUNTER, "MB/s"),
        "Traffic over all links in both directions (MB/s); a rate, though its type says counter.",
        facts=(Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND, Fact.NVLINK_RECEIVE_BYTES_PER_SECOND),
        value=_nvlink_rate,
        is_integer=True,
    ),
    _ratio(
        *(1001, _P + "GR_ENGINE_ACTIVE", Fact.GRAPHICS_ENGINE_ACTIVE_RATIO),
        "Time in which the graphics or compute engine was busy.",
    ),
    _ratio(1002, _P + "SM_ACTIVE", Fact.SM_ACTIVE_RATIO, "Time with a warp on an SM."),
    _ratio(1003, _P + "SM_OCCUPANCY", Fact.SM_OCCUPANCY_RATIO, "Resident warps of the possible."),
    _ratio(1004, _P + "PIPE_TENSOR_ACTIVE", Fact.TENSOR_ACTIVE_RATIO, "Cycles of tensor pipes."),
    _ratio(1005, _P + "DRAM_ACTIVE", Fact.MEMORY_BANDWIDTH_RATIO, "Cycles of memory traffic."),
    _ratio(1006, _P + "PIPE_FP64_ACTIVE", Fact.FP64_ACTIVE_RATIO, "Cycles of the FP64 pipe."),
    _ratio(1007, _P + "PIPE_FP32_ACTIVE", Fact.FP32_ACTIVE_RATIO, "Cycles of the FP32 pipe."),
    _ratio(1008, _P + "PIPE_FP16_ACTIVE", Fact.FP16_ACTIVE_RATIO, "Cycles of the FP16 pipe."),
    _rate(
        *(1009, _P + "PCIE_TX_BYTES", Fact.PCIE_TRANSMIT_BYTES_PER_SECOND),
        "Traffic sent over PCIe (bytes/s).",
    ),
    _rate(
        *(1010, _P + "PCIE_RX_BYTES", Fact.PCIE_RECEIVE_BYTES_PER_SECOND),
        "Traffic received over PCIe (bytes/s).",
    ),
    _rate(
        *(1011, _P + "NVLINK_TX_BYTES", Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND),
        "Traffic sent over NVLink (bytes/s).",
    ),
    _rate(
        *(1012, _P + "NVLINK_RX_BYTES", Fact.NVLINK_RECEIVE_BYTES_PER_SECOND),
        "Traffic received over NVLink (bytes/s).",
    ),
    _ratio(
        *(1013, _P + "PIPE_TENSOR_IMMA_ACTIVE", Fact.TENSOR_INTEGER_ACTIVE_RATIO),
        "Cycles of the IMMA tensor pipe.",
    ),
    _ratio(
        *(1014, _P + "PIPE_TENSOR_HMMA_ACTIVE", Fact.TENSOR_HALF_ACTIVE_RATIO),
        "Cycles of the HMMA tensor pipe.",
    ),
    _ratio(
        *(1015, _P + "PIPE_TENSOR_DFMA_ACTIVE", Fact.TENSOR_DOUBLE_ACTIVE_RATIO),
        "Cycles of the DMMA tensor pipe.",
    ),
    _ratio(1016, _P + "PIPE_INT_ACTIVE", Fact.INTEGER_ACTIVE_RATIO, "Cycles of the integer pipe."),
)
