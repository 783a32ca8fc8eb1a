"""What can be told about a GPU: every fact with its unit, its kind, and how often it is read.

A fact's name is the name of its series without the prefix `stoker_gpu_` (and, for a counter,
without the suffix `_total`). Base units stand in the names. A fact that a card or driver does not
tell is not in a reading: never zero, never a sentinel.

Sources: NVML's reference (nvml.h of the CUDA 13 toolkit); DCGM's field identifiers for the
profiling facts, whose definitions GPM shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Rate(StrEnum):
    """How often a fact is read; by what it costs the driver, and how fast it changes."""

    FAST = "fast"  # with every sampling tick
    SLOW = "slow"  # every so many seconds


class Kind(StrEnum):
    """How a value behaves over time."""

    GAUGE = "gauge"
    COUNTER = "counter"  # grows; starts anew with the driver


class Fact(StrEnum):
    """One thing that a GPU can tell."""

    # --- memory
    MEMORY_TOTAL_BYTES = "memory_total_bytes"
    MEMORY_USED_BYTES = "memory_used_bytes"
    MEMORY_FREE_BYTES = "memory_free_bytes"
    MEMORY_RESERVED_BYTES = "memory_reserved_bytes"
    BAR1_TOTAL_BYTES = "bar1_total_bytes"
    BAR1_USED_BYTES = "bar1_used_bytes"
    # --- utilization
    UTILIZATION_RATIO = "utilization_ratio"
    MEMORY_UTILIZATION_RATIO = "memory_utilization_ratio"
    ENCODER_UTILIZATION_RATIO = "encoder_utilization_ratio"
    DECODER_UTILIZATION_RATIO = "decoder_utilization_ratio"
    JPEG_UTILIZATION_RATIO = "jpeg_utilization_ratio"
    OFA_UTILIZATION_RATIO = "ofa_utilization_ratio"
    # --- clocks
    SM_CLOCK_HERTZ = "sm_clock_hertz"
    MEMORY_CLOCK_HERTZ = "memory_clock_hertz"
    GRAPHICS_CLOCK_HERTZ = "graphics_clock_hertz"
    VIDEO_CLOCK_HERTZ = "video_clock_hertz"
    SM_CLOCK_MAX_HERTZ = "sm_clock_max_hertz"
    MEMORY_CLOCK_MAX_HERTZ = "memory_clock_max_hertz"
    PERFORMANCE_STATE = "performance_state"
    CLOCK_EVENT_ACTIVE = "clock_event_active"
    CLOCK_EVENT_SECONDS = "clock_event_seconds"
    # --- power
    POWER_WATTS = "power_watts"
    POWER_INSTANT_WATTS = "power_instant_watts"
    POWER_LIMIT_WATTS = "power_limit_watts"
    POWER_LIMIT_DEFAULT_WATTS = "power_limit_default_watts"
    POWER_LIMIT_MIN_WATTS = "power_limit_min_watts"
    POWER_LIMIT_MAX_WATTS = "power_limit_max_watts"
    ENERGY_JOULES = "energy_joules"
    # --- heat
    TEMPERATURE_CELSIUS = "temperature_celsius"
    MEMORY_TEMPERATURE_CELSIUS = "memory_temperature_celsius"
    TEMPERATURE_MARGIN_CELSIUS = "temperature_margin_celsius"
    TEMPERATURE_SLOWDOWN_CELSIUS = "temperature_slowdown_celsius"
    TEMPERATURE_SHUTDOWN_CELSIUS = "temperature_shutdown_celsius"
    TEMPERATURE_OPERATING_MAX_CELSIUS = "temperature_operating_max_celsius"
    MEMORY_TEMPERATURE_MAX_CELSIUS = "memory_temperature_max_celsius"
    FAN_SPEED_RATIO = "fan_speed_ratio"
    # --- PCIe
    PCIE_LINK_GENERATION = "pcie_link_generation"
    PCIE_LINK_GENERATION_MAX = "pcie_link_generation_max"
    PCIE_LINK_WIDTH = "pcie_link_width"
    PCIE_LINK_WIDTH_MAX = "pcie_link_width_max"
    PCIE_REPLAYS = "pcie_replays"
    PCIE_TRANSMIT_BYTES = "pcie_transmit_bytes"
    PCIE_RECEIVE_BYTES = "pcie_receive_bytes"
    # --- NVLink
    NVLINK_UP = "nvlink_up"
    NVLINK_BANDWIDTH_BYTES_PER_SECOND = "nvlink_bandwidth_bytes_per_second"
    NVLINK_CRC_FLIT_ERRORS = "nvlink_crc_flit_errors"
    NVLINK_CRC_DATA_ERRORS = "nvlink_crc_data_errors"
    NVLINK_REPLAY_ERRORS = "nvlink_replay_errors"
    NVLINK_RECOVERY_ERRORS = "nvlink_recovery_errors"
    NVLINK_TRANSMIT_BYTES = "nvlink_transmit_bytes"
    NVLINK_RECEIVE_BYTES = "nvlink_receive_bytes"
    # --- memory errors
    ECC_ENABLED = "ecc_enabled"
    ECC_CORRECTED_VOLATILE_ERRORS = "ecc_corrected_volatile_errors"
    ECC_UNCORRECTED_VOLATILE_ERRORS = "ecc_uncorrected_volatile_errors"
    ECC_CORRECTED_AGGREGATE_ERRORS = "ecc_corrected_aggregate_errors"
    ECC_UNCORRECTED_AGGREGATE_ERRORS = "ecc_uncorrected_aggregate_errors"
    REMAPPED_ROWS = "remapped_rows"
    REMAPPED_ROWS_PENDING = "remapped_rows_pending"
    REMAPPED_ROWS_FAILED = "remapped_rows_failed"
    ROW_REMAP_BANKS = "row_remap_banks"
    RETIRED_PAGES = "retired_pages"
    RETIRED_PAGES_PENDING = "retired_pages_pending"
    RECOVERY_ACTION = "recovery_action"
    # --- modes
    PERSISTENCE_MODE = "persistence_mode"
    COMPUTE_MODE = "compute_mode"
    MIG_MODE = "mig_mode"
    MIG_MODE_PENDING = "mig_mode_pending"
    # --- what the hardware counters tell: GPM (Hopper and later), or DCGM's profiling module
    GRAPHICS_ENGINE_ACTIVE_RATIO = "graphics_engine_active_ratio"
    SM_ACTIVE_RATIO = "sm_active_ratio"
    SM_OCCUPANCY_RATIO = "sm_occupancy_ratio"
    TENSOR_ACTIVE_RATIO = "tensor_active_ratio"
    TENSOR_HALF_ACTIVE_RATIO = "tensor_half_active_ratio"
    TENSOR_DOUBLE_ACTIVE_RATIO = "tensor_double_active_ratio"
    TENSOR_INTEGER_ACTIVE_RATIO = "tensor_integer_active_ratio"
    FP64_ACTIVE_RATIO = "fp64_active_ratio"
    FP32_ACTIVE_RATIO = "fp32_active_ratio"
    FP16_ACTIVE_RATIO = "fp16_active_ratio"
    INTEGER_ACTIVE_RATIO = "integer_active_ratio"
    MEMORY_BANDWIDTH_RATIO = "memory_bandwidth_ratio"
    PCIE_TRANSMIT_BYTES_PER_SECOND = "pcie_transmit_bytes_per_second"
    PCIE_RECEIVE_BYTES_PER_SECOND = "pcie_receive_bytes_per_second"
    NVLINK_TRANSMIT_BYTES_PER_SECOND = "nvlink_transmit_bytes_per_second"
    NVLINK_RECEIVE_BYTES_PER_SECOND = "nvlink_receive_bytes_per_second"


@dataclass(frozen=True, slots=True)
class FactSpec:
    """What a fact is; `label` names what tells its values apart where there are several."""

    rate: Rate
    kind: Kind
    doc: str  # one sentence, for people who read the page
    label: str | None = None


def _gauge(rate: Rate, doc: str, label: str | None = None) -> FactSpec:
    return FactSpec(rate, Kind.GAUGE, doc, label)


def _counter(rate: Rate, doc: str, label: str | None = None) -> FactSpec:
    return FactSpec(rate, Kind.COUNTER, doc, label)


_FAST, _SLOW = Rate.FAST, Rate.SLOW

FACTS: Mapping[Fact, FactSpec] = MappingProxyType(
    {
        Fact.MEMORY_TOTAL_BYTES: _gauge(_FAST, "All memory of the GPU."),
        Fact.MEMORY_USED_BYTES: _gauge(
            _FAST, "Memory in use, without what the driver keeps for itself."
        ),
        Fact.MEMORY_FREE_BYTES: _gauge(_FAST, "Memory not in use."),
        Fact.MEMORY_RESERVED_BYTES: _gauge(_FAST, "Memory that the driver keeps for itself."),
        Fact.BAR1_TOTAL_BYTES: _gauge(_SLOW, "Size of the window to memory that PCIe sees (BAR1)."),
        Fact.BAR1_USED_BYTES: _gauge(_SLOW, "Part of that window in use."),
        Fact.UTILIZATION_RATIO: _gauge(_FAST, "Share of time in which a kernel ran."),
        Fact.MEMORY_UTILIZATION_RATIO: _gauge(
            _FAST, "Share of time in which memory was read or written."
        ),
        Fact.ENCODER_UTILIZATION_RATIO: _gauge(_SLOW, "Load of the video encoder."),
        Fact.DECODER_UTILIZATION_RATIO: _gauge(_SLOW, "Load of the video decoder."),
        Fact.JPEG_UTILIZATION_RATIO: _gauge(_SLOW, "Load of the JPEG decoder."),
        Fact.OFA_UTILIZATION_RATIO: _gauge(_SLOW, "Load of the optical flow accelerator."),
        Fact.SM_CLOCK_HERTZ: _gauge(_FAST, "Clock of the SMs."),
        Fact.MEMORY_CLOCK_HERTZ: _gauge(_FAST, "Clock of the memory."),
        Fact.GRAPHICS_CLOCK_HERTZ: _gauge(_SLOW, "Clock of the graphics engine."),
        Fact.VIDEO_CLOCK_HERTZ: _gauge(_SLOW, "Clock of the video engines."),
        Fact.SM_CLOCK_MAX_HERTZ: _gauge(_SLOW, "Highest clock of the SMs."),
        Fact.MEMORY_CLOCK_MAX_HERTZ: _gauge(_SLOW, "Highest clock of the memory."),
        Fact.PERFORMANCE_STATE: _gauge(
            _FAST, "Performance state: 0 is the fastest, 15 the slowest."
        ),
        Fact.CLOCK_EVENT_ACTIVE: _gauge(
            _FAST, "Whether this holds the clocks down (or lets them idle) now.", "reason"
        ),
        Fact.CLOCK_EVENT_SECONDS: _counter(
            _SLOW, "Time for which this held the clocks down.", "reason"
        ),
        Fact.POWER_WATTS: _gauge(
            _FAST, "Power drawn by the board: the mean since the last reading where energy tells."
        ),
        Fact.POWER_INSTANT_WATTS: _gauge(_FAST, "Power drawn at this instant, by the sensor."),
        Fact.POWER_LIMIT_WATTS: _gauge(_SLOW, "Power limit in force."),
        Fact.POWER_LIMIT_DEFAULT_WATTS: _gauge(_SLOW, "Power limit that the board starts with."),
        Fact.POWER_LIMIT_MIN_WATTS: _gauge(_SLOW, "Lowest power limit that can be set."),
        Fact.POWER_LIMIT_MAX_WATTS: _gauge(_SLOW, "Highest power limit that can be set."),
        Fact.ENERGY_JOULES: _counter(_FAST, "Energy since the driver was loaded."),
        Fact.TEMPERATURE_CELSIUS: _gauge(_FAST, "Temperature of the GPU core."),
        Fact.MEMORY_TEMPERATURE_CELSIUS: _gauge(_FAST, "Temperature of the memory."),
        Fact.TEMPERATURE_MARGIN_CELSIUS: _gauge(
            _SLOW, "Degrees left until the GPU slows itself down."
        ),
        Fact.TEMPERATURE_SLOWDOWN_CELSIUS: _gauge(
            _SLOW, "Temperature at which the GPU slows itself down."
        ),
        Fact.TEMPERATURE_SHUTDOWN_CELSIUS: _gauge(
            _SLOW, "Temperature at which the GPU turns itself off."
        ),
        Fact.TEMPERATURE_OPERATING_MAX_CELSIUS: _gauge(
            _SLOW, "Highest temperature of regular operation."
        ),
        Fact.MEMORY_TEMPERATURE_MAX_CELSIUS: _gauge(
            _SLOW, "Highest temperature of the memory in regular operation."
        ),
        Fact.FAN_SPEED_RATIO: _gauge(_SLOW, "Wanted fan speed as a share of the highest.", "fan"),
        Fact.PCIE_LINK_GENERATION: _gauge(_SLOW, "PCIe generation that the link runs at."),
        Fact.PCIE_LINK_GENERATION_MAX: _gauge(
            _SLOW, "Highest PCIe generation that card and slot can run at."
        ),
        Fact.PCIE_LINK_WIDTH: _gauge(_SLOW, "PCIe lanes in use."),
        Fact.PCIE_LINK_WIDTH_MAX: _gauge(_SLOW, "Most PCIe lanes that card and slot can use."),
        Fact.PCIE_REPLAYS: _counter(_SLOW, "PCIe packets that had to be sent again."),
        Fact.PCIE_TRANSMIT_BYTES: _counter(
            _SLOW, "Bytes sent over PCIe; the driver's counter wraps around."
        ),
        Fact.PCIE_RECEIVE_BYTES: _counter(
            _SLOW, "Bytes received over PCIe; the driver's counter wraps around."
        ),
        Fact.NVLINK_UP: _gauge(_SLOW, "Whether the link is active.", "link"),
        Fact.NVLINK_BANDWIDTH_BYTES_PER_SECOND: _gauge(
            _SLOW, "What the link can carry in each direction.", "link"
        ),
        Fact.NVLINK_CRC_FLIT_ERRORS: _counter(_SLOW, "CRC errors of flow control.", "link"),
        Fact.NVLINK_CRC_DATA_ERRORS: _counter(_SLOW, "CRC errors of data.", "link"),
        Fact.NVLINK_REPLAY_ERRORS: _counter(_SLOW, "Replays of the link.", "link"),
        Fact.NVLINK_RECOVERY_ERRORS: _counter(_SLOW, "Recoveries of the link.", "link"),
        Fact.NVLINK_TRANSMIT_BYTES: _counter(_SLOW, "Payload sent over the link.", "link"),
        Fact.NVLINK_RECEIVE_BYTES: _counter(_SLOW, "Payload received over the link.", "link"),
        Fact.ECC_ENABLED: _gauge(_SLOW, "Whether memory errors are corrected (ECC)."),
        Fact.ECC_CORRECTED_VOLATILE_ERRORS: _counter(
            _SLOW, "Corrected memory errors since the driver was loaded."
        ),
        Fact.ECC_UNCORRECTED_VOLATILE_ERRORS: _counter(
            _SLOW, "Uncorrected memory errors since the driver was loaded."
        ),
        Fact.ECC_CORRECTED_AGGREGATE_ERRORS: _counter(
            _SLOW, "Corrected memory errors in the life of the board."
        ),
        Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS: _counter(
            _SLOW, "Uncorrected memory errors in the life of the board."
        ),
        Fact.REMAPPED_ROWS: _gauge(
            _SLOW, "Memory rows replaced by spare ones after errors of this kind.", "cause"
        ),
        Fact.REMAPPED_ROWS_PENDING: _gauge(_SLOW, "Whether a row is remapped at the next reset."),
        Fact.REMAPPED_ROWS_FAILED: _gauge(_SLOW, "Whether remapping a row has failed."),
        Fact.ROW_REMAP_BANKS: _gauge(
            _SLOW, "Memory banks with so many spare rows left.", "availability"
        ),
        Fact.RETIRED_PAGES: _gauge(_SLOW, "Memory pages taken out of use.", "cause"),
        Fact.RETIRED_PAGES_PENDING: _gauge(
            _SLOW, "Whether a page is taken out of use at the next reset."
        ),
        Fact.RECOVERY_ACTION: _gauge(
            _SLOW,
            "What the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 drain, 4 drain and reset.",
        ),
        Fact.PERSISTENCE_MODE: _gauge(_SLOW, "Whether the driver stays loaded without users."),
        Fact.COMPUTE_MODE: _gauge(
            _SLOW, "Who may make contexts: 0 everybody, 2 nobody, 3 one process."
        ),
        Fact.MIG_MODE: _gauge(_SLOW, "Whether the GPU is partitioned (MIG)."),
        Fact.MIG_MODE_PENDING: _gauge(_SLOW, "Whether it will be after the next reset."),
        Fact.GRAPHICS_ENGINE_ACTIVE_RATIO: _gauge(
            _FAST, "Share of time in which the graphics or compute engine was busy."
        ),
        Fact.SM_ACTIVE_RATIO: _gauge(_FAST, "Share of time with a warp on an SM, over all SMs."),
        Fact.SM_OCCUPANCY_RATIO: _gauge(_FAST, "Resident warps as a share of the most possible."),
        Fact.TENSOR_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of any tensor pipe."),
        Fact.TENSOR_HALF_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the HMMA tensor pipe."),
        Fact.TENSOR_DOUBLE_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the DMMA tensor pipe."),
        Fact.TENSOR_INTEGER_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the IMMA tensor pipe."),
        Fact.FP64_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the FP64 pipe."),
        Fact.FP32_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the FP32 pipe."),
        Fact.FP16_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the FP16 pipe."),
        Fact.INTEGER_ACTIVE_RATIO: _gauge(_FAST, "Share of cycles of the integer pipe."),
        Fact.MEMORY_BANDWIDTH_RATIO: _gauge(
            _FAST, "Memory traffic as a share of the most possible."
        ),
        Fact.PCIE_TRANSMIT_BYTES_PER_SECOND: _gauge(_FAST, "Traffic sent over PCIe."),
        Fact.PCIE_RECEIVE_BYTES_PER_SECOND: _gauge(_FAST, "Traffic received over PCIe."),
        Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND: _gauge(
            _FAST, "Traffic sent over all links together."
        ),
        Fact.NVLINK_RECEIVE_BYTES_PER_SECOND: _gauge(
            _FAST, "Traffic received over all links together."
        ),
    }
)

# `CLOCK_EVENT_ACTIVE` and `CLOCK_EVENT_SECONDS`, label `reason`: bits of
# nvmlClocksEventReasons, in nvidia-smi's words.
CLOCK_EVENT_BITS: Mapping[int, str] = MappingProxyType(
    {
        0x1: "gpu_idle",
        0x2: "applications_clocks_setting",
        0x4: "sw_power_cap",
        0x8: "hw_slowdown",
        0x10: "sync_boost",
        0x20: "sw_thermal_slowdown",
        0x40: "hw_thermal_slowdown",
        0x80: "hw_power_brake_slowdown",
        0x100: "display_clock_setting",
    }
)
# Of `REMAPPED_ROWS` and `RETIRED_PAGES`, label `cause`.
CORRECTABLE, UNCORRECTABLE = "correctable", "uncorrectable"
# Of `ROW_REMAP_BANKS`, label `availability`; the order of nvmlRowRemapperHistogramValues_t.
BANK_AVAILABILITIES = ("max", "high", "partial", "low", "none")


_BY_RATE = {
    rate: frozenset(fact for fact, spec in FACTS.items() if spec.rate is rate) for rate in Rate
}


def facts_at(rate: Rate) -> frozenset[Fact]:
    """Return the facts that are read at this rate."""
    return _BY_RATE[rate]
