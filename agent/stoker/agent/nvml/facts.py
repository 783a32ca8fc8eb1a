"""What each call tells about a GPU: a table of questions, each with its forms and what it means.

A question has forms, newest first: drivers and cards differ in which one they have. What many
cards tell in one call (the fields) stands in `nvml.fields`; questions there are what is asked of a
driver that does not have the field.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from stoker.agent.driver import DriverError, NotAvailable
from stoker.agent.facts import (
    BANK_AVAILABILITIES,
    CLOCK_EVENT_BITS,
    CORRECTABLE,
    UNCORRECTABLE,
    Fact,
    Rate,
)
from stoker.agent.nvml.table import (
    ECC_AGGREGATE,
    ECC_VOLATILE,
    MEMORY_ERROR_CORRECTED,
    MEMORY_ERROR_UNCORRECTED,
    MEMORY_V2,
    TEMPERATURE_GPU,
    Bar1MemoryInfo,
    Clock,
    MemoryInfo,
    RowRemapperHistogram,
    Threshold,
    UtilizationRates,
)
from stoker.agent.nvml.units import (
    Meaning,
    celsius,
    count,
    count_32,
    fan_ratio,
    flag,
    hertz,
    joules,
    memory_part,
    memory_total,
    ratio,
    up_to,
    watts,
)
from stoker.agent.readings import Extent, ReadFailure


@dataclass(slots=True)
class Told:
    """What a device has told so far in this reading."""

    gpu: str  # its name in messages
    memory_max_bytes: int | None = None  # of the card, once that is known
    facts: dict[Fact, float] = field(default_factory=dict[Fact, float])
    by_label: dict[Fact, dict[str, float]] = field(default_factory=dict[Fact, dict[str, float]])
    extents: dict[Fact, Extent] = field(default_factory=dict[Fact, Extent])
    failures: dict[str, ReadFailure] = field(default_factory=dict[str, ReadFailure])

    def put(self, fact: Fact, value: float | None, label: str | None = None) -> None:
        """Take a value; None is an answer that means nothing, and counts as a failure."""
        if value is None:
            which = f"{fact} of {label}" if label else fact
            self.fail(fact, NotAvailable(f"{which} is not told", gpu=self.gpu))
        elif label is None:
            self.facts[fact] = value
        else:
            self.by_label.setdefault(fact, {})[label] = value

    def fail(self, fact: str, error: DriverError) -> None:
        """Take note of why a fact was not told; of several links or fans the first one speaks."""
        self.failures.setdefault(fact, ReadFailure(fact, error.kind, str(error)))


Tell = Callable[[Told, Any], None]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask: a function of the driver, and what follows the handle."""

    function: str
    arguments: tuple[int, ...] = ()
    wrapper: str | None = None  # nvidia-ml-py's name for it, where that is another

    @property
    def attribute(self) -> str:
        return self.wrapper or self.function


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What one call tells: its forms, newest first, and what its answer means."""

    facts: tuple[Fact, ...]  # named when it fails
    forms: tuple[Form, ...]
    tell: Tell
    # Of a GPU in MIG mode the driver does not know it, or tells the wrong thing.
    of_whole_gpu_only: bool = False


def _one(
    fact: Fact,
    meaning: Meaning,
    *forms: Form,
    label: str | None = None,
    of_whole_gpu_only: bool = False,
) -> Question:
    def tell(told: Told, answer: float) -> None:
        told.put(fact, meaning(answer), label)

    return Question((fact,), forms, tell, of_whole_gpu_only)


def _first(fact: Fact, function: str) -> Question:
    """Return a question about a video engine: its load, and how long that was measured."""

    def tell(told: Told, answer: Sequence[int]) -> None:
        told.put(fact, ratio(answer[0]))

    return Question((fact,), (Form(function),), tell, of_whole_gpu_only=True)


def _many(function: str, *facts: tuple[Fact, Meaning], **options: bool) -> Question:
    """Return a question whose answer is a list, one number for each fact."""

    def tell(told: Told, answer: Sequence[int]) -> None:
        for (fact, meaning), value in zip(facts, answer, strict=False):
            told.put(fact, meaning(value))

    return Question(tuple(fact for fact, _ in facts), (Form(function),), tell, **options)


def tell_memory(told: Told, info: MemoryInfo) -> None:
    """Take bytes; a part that is larger than the whole is not told."""
    total = memory_total(info.total, told.memory_max_bytes)
    told.put(Fact.MEMORY_TOTAL_BYTES, total)
    told.put(Fact.MEMORY_USED_BYTES, memory_part(info.used, total))
    told.put(Fact.MEMORY_FREE_BYTES, memory_part(info.free, total))
    reserved: int | None = getattr(info, "reserved", None)  # the first form has no such field
    if reserved is not None:
        told.put(Fact.MEMORY_RESERVED_BYTES, memory_part(reserved, total))


def tell_bar1(told: Told, info: Bar1MemoryInfo) -> None:
    """Take bytes."""
    total = memory_total(info.bar1Total)
    told.put(Fact.BAR1_TOTAL_BYTES, total)
    told.put(Fact.BAR1_USED_BYTES, memory_part(info.bar1Used, total))


def tell_utilization(told: Told, rates: UtilizationRates) -> None:
    """Take percent."""
    told.put(Fact.UTILIZATION_RATIO, ratio(rates.gpu))
    told.put(Fact.MEMORY_UTILIZATION_RATIO, ratio(rates.memory))


def tell_clock_events(told: Told, mask: int) -> None:
    """Take a mask of reasons."""
    if 0 <= mask < 2**32 - 1:
        told.by_label[Fact.CLOCK_EVENT_ACTIVE] = dict(_reasons(mask))
    else:
        told.put(Fact.CLOCK_EVENT_ACTIVE, None)


@lru_cache(maxsize=256)
def _reasons(mask: int) -> MappingProxyType[str, float]:
    return MappingProxyType(
        {reason: float(bool(mask & bit)) for bit, reason in CLOCK_EVENT_BITS.items()}
    )


def tell_row_remap_banks(told: Told, histogram: RowRemapperHistogram) -> None:
    """Take numbers of banks."""
    for availability in BANK_AVAILABILITIES:
        banks: int = getattr(histogram, availability)
        told.put(Fact.ROW_REMAP_BANKS, count_32(banks), availability)


def tell_ecc_mode(told: Told, modes: Sequence[int]) -> None:
    """Take the current mode and the one after the next reset, of which the first is told."""
    told.put(Fact.ECC_ENABLED, flag(modes[0]))


MEMORY = Question(
    (
        Fact.MEMORY_USED_BYTES,
        Fact.MEMORY_FREE_BYTES,
        Fact.MEMORY_TOTAL_BYTES,
        Fact.MEMORY_RESERVED_BYTES,
    ),
    (
        Form("nvmlDeviceGetMemoryInfo_v2", (MEMORY_V2,), "nvmlDeviceGetMemoryInfo"),
        Form("nvmlDeviceGetMemoryInfo"),
    ),
    tell_memory,
)


def _clock(fact: Fact, clock: Clock, function: str = "nvmlDeviceGetClockInfo") -> Question:
    return _one(fact, hertz, Form(function, (clock,)))


def _threshold(fact: Fact, threshold: Threshold) -> Question:
    return _one(fact, celsius, Form("nvmlDeviceGetTemperatureThreshold", (threshold,)))


QUESTIONS: MappingProxyType[Rate, tuple[Question, ...]] = MappingProxyType(
    {
        Rate.FAST: (
            MEMORY,
            Question(
                (Fact.UTILIZATION_RATIO, Fact.MEMORY_UTILIZATION_RATIO),
                (Form("nvmlDeviceGetUtilizationRates"),),
                tell_utilization,
                of_whole_gpu_only=True,
            ),
            _one(
                Fact.TEMPERATURE_CELSIUS,
                celsius,
                Form("nvmlDeviceGetTemperatureV", (TEMPERATURE_GPU,)),
                Form("nvmlDeviceGetTemperature", (TEMPERATURE_GPU,)),
            ),
            _clock(Fact.SM_CLOCK_HERTZ, Clock.SM),
            _clock(Fact.MEMORY_CLOCK_HERTZ, Clock.MEM),
            # 32 is the driver's word for "unknown".
            _one(Fact.PERFORMANCE_STATE, up_to(0, 15), Form("nvmlDeviceGetPerformanceState")),
            Question(
                (Fact.CLOCK_EVENT_ACTIVE,),
                (
                    Form("nvmlDeviceGetCurrentClocksEventReasons"),
                    Form("nvmlDeviceGetCurrentClocksThrottleReasons"),
                ),
                tell_clock_events,
            ),
        ),
        Rate.SLOW: (
            Question(
                (Fact.BAR1_USED_BYTES, Fact.BAR1_TOTAL_BYTES),
                (Form("nvmlDeviceGetBAR1MemoryInfo"),),
                tell_bar1,
            ),
            _first(Fact.ENCODER_UTILIZATION_RATIO, "nvmlDeviceGetEncoderUtilization"),
            _first(Fact.DECODER_UTILIZATION_RATIO, "nvmlDeviceGetDecoderUtilization"),
            _first(Fact.JPEG_UTILIZATION_RATIO, "nvmlDeviceGetJpgUtilization"),
            _first(Fact.OFA_UTILIZATION_RATIO, "nvmlDeviceGetOfaUtilization"),
            _clock(Fact.GRAPHICS_CLOCK_HERTZ, Clock.GRAPHICS),
            _clock(Fact.VIDEO_CLOCK_HERTZ, Clock.VIDEO),
            _clock(Fact.SM_CLOCK_MAX_HERTZ, Clock.SM, "nvmlDeviceGetMaxClockInfo"),
            _clock(Fact.MEMORY_CLOCK_MAX_HERTZ, Clock.MEM, "nvmlDeviceGetMaxClockInfo"),
            _one(Fact.TEMPERATURE_MARGIN_CELSIUS, celsius, Form("nvmlDeviceGetMarginTemperature")),
            # Newer cards also tell "T.Limits" (fields 193 to 196): distances from a limit that is
            # nowhere told, so no temperature can be made of them.
            _threshold(Fact.TEMPERATURE_SHUTDOWN_CELSIUS, Threshold.SHUTDOWN),
            _threshold(Fact.TEMPERATURE_SLOWDOWN_CELSIUS, Threshold.SLOWDOWN),
            _threshold(Fact.MEMORY_TEMPERATURE_MAX_CELSIUS, Threshold.MEM_MAX),
            _threshold(Fact.TEMPERATURE_OPERATING_MAX_CELSIUS, Threshold.GPU_MAX),
            _one(
                Fact.PCIE_LINK_GENERATION, up_to(1, 15), Form("nvmlDeviceGetCurrPcieLinkGeneration")
            ),
            _one(
                Fact.PCIE_LINK_GENERATION_MAX,
                up_to(1, 15),
                Form("nvmlDeviceGetMaxPcieLinkGeneration"),
            ),
            _one(Fact.PCIE_LINK_WIDTH, up_to(1, 64), Form("nvmlDeviceGetCurrPcieLinkWidth")),
            _one(Fact.PCIE_LINK_WIDTH_MAX, up_to(1, 64), Form("nvmlDeviceGetMaxPcieLinkWidth")),
            Question(
                (Fact.ROW_REMAP_BANKS,),
                (Form("nvmlDeviceGetRowRemapperHistogram"),),
                tell_row_remap_banks,
            ),
            _one(Fact.PERSISTENCE_MODE, flag, Form("nvmlDeviceGetPersistenceMode")),
            _one(Fact.COMPUTE_MODE, up_to(0, 3), Form("nvmlDeviceGetComputeMode")),
            _many("nvmlDeviceGetMigMode", (Fact.MIG_MODE, flag), (Fact.MIG_MODE_PENDING, flag)),
        ),
    }
)


def fan_questions(fans: int) -> tuple[Question, ...]:
    """Return the questions about so many fans."""
    return tuple(
        _one(
            Fact.FAN_SPEED_RATIO,
            fan_ratio,
            Form("nvmlDeviceGetFanSpeed_v2", (fan,)),
            # The first form knows one fan.
            *((Form("nvmlDeviceGetFanSpeed"),) if fans == 1 else ()),
            label=str(fan),
        )
        for fan in range(fans)
    )


# What a driver that does not have a field is asked instead.

POWER_USAGE = _one(Fact.POWER_WATTS, watts, Form("nvmlDeviceGetPowerUsage"))
TOTAL_ENERGY = _one(Fact.ENERGY_JOULES, joules, Form("nvmlDeviceGetTotalEnergyConsumption"))
ENFORCED_POWER_LIMIT = _one(Fact.POWER_LIMIT_WATTS, watts, Form("nvmlDeviceGetEnforcedPowerLimit"))
DEFAULT_POWER_LIMIT = _one(
    Fact.POWER_LIMIT_DEFAULT_WATTS, watts, Form("nvmlDeviceGetPowerManagementDefaultLimit")
)
POWER_LIMITS = _many(
    "nvmlDeviceGetPowerManagementLimitConstraints",
    (Fact.POWER_LIMIT_MIN_WATTS, watts),
    (Fact.POWER_LIMIT_MAX_WATTS, watts),
)
PCIE_REPLAYS = _one(Fact.PCIE_REPLAYS, count_32, Form("nvmlDeviceGetPcieReplayCounter"))
ECC_MODE = Question((Fact.ECC_ENABLED,), (Form("nvmlDeviceGetEccMode"),), tell_ecc_mode)


def _ecc_errors(fact: Fact, error_type: int, counter_type: int) -> Question:
    return _one(fact, count, Form("nvmlDeviceGetTotalEccErrors", (error_type, counter_type)))


ECC_CORRECTED_VOLATILE = _ecc_errors(
    Fact.ECC_CORRECTED_VOLATILE_ERRORS, MEMORY_ERROR_CORRECTED, ECC_VOLATILE
)
ECC_UNCORRECTED_VOLATILE = _ecc_errors(
    Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, MEMORY_ERROR_UNCORRECTED, ECC_VOLATILE
)
ECC_CORRECTED_AGGREGATE = _ecc_errors(
    Fact.ECC_CORRECTED_AGGREGATE_ERRORS, MEMORY_ERROR_CORRECTED, ECC_AGGREGATE
)
ECC_UNCORRECTED_AGGREGATE = _ecc_errors(
    Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS, MEMORY_ERROR_UNCORRECTED, ECC_AGGREGATE
)


def tell_remapped_rows(told: Told, answer: Sequence[int]) -> None:
    """Take correctable, uncorrectable, pending, failed."""
    correctable, uncorrectable, pending, failed = answer
    told.put(Fact.REMAPPED_ROWS, count_32(correctable), CORRECTABLE)
    told.put(Fact.REMAPPED_ROWS, count_32(uncorrectable), UNCORRECTABLE)
    told.put(Fact.REMAPPED_ROWS_PENDING, flag(pending))
    told.put(Fact.REMAPPED_ROWS_FAILED, flag(failed))


REMAPPED_ROWS = Question(
    (Fact.REMAPPED_ROWS, Fact.REMAPPED_ROWS_PENDING, Fact.REMAPPED_ROWS_FAILED),
    (Form("nvmlDeviceGetRemappedRows"),),
    tell_remapped_rows,
)


def link_state(link: int) -> Question:
    """Return the question whether a link is active."""
    form = Form("nvmlDeviceGetNvLinkState", (link,))
    return _one(Fact.NVLINK_UP, flag, form, label=str(link))


def link_errors(fact: Fact, link: int, counter: int) -> Question:
    """Return the question for one counter of a link."""
    form = Form("nvmlDeviceGetNvLinkErrorCounter", (link, counter))
    return _one(fact, count, form, label=str(link))
