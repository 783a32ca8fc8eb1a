"""What NVML's answers mean: a table of facts, each with the calls that tell it and its base unit.

Sentinels end here: all ones (0xFFFFFFFF, 2^64 - 1), utilizations above 100 % and memory larger
than the card mean "not told", so they become None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeGuard, TypeVar

from stoker.agent.nvml_table import Handle, MemoryInfo, NvmlTable, RunningProcess, UtilizationRates

T = TypeVar("T")

Facts = dict[str, float | int | None]  # by field of GpuReading
Form = tuple[str, Callable[[NvmlTable, Handle], Any]]  # a function's name and the call itself

# More than any board has, less than any sentinel.
_BYTES_MAX = 2**50
_MILLIWATTS_MAX = 10_000_000
_MILLIJOULES_MAX = 2**60
_MEGAHERTZ_MAX = 100_000
_CELSIUS_MIN, _CELSIUS_MAX = -60, 250


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """What one call tells: its forms, newest first, and what its answer means."""

    name: str
    forms: tuple[Form, ...]
    meaning: Callable[[Any], T]


def as_text(value: str | bytes | None) -> str | None:
    """Return text; older forms of nvidia-ml-py give bytes, and cards give empty text for none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return (value.strip() or None) if value else None


def watts(milliwatts: int | None) -> float | None:
    """Return watts, or None for what no board draws."""
    return milliwatts / 1e3 if _lies(milliwatts, 0, _MILLIWATTS_MAX) else None


def joules(millijoules: int | None) -> float | None:
    """Return joules, or None for what no board has used."""
    return millijoules / 1e3 if _lies(millijoules, 0, _MILLIJOULES_MAX) else None


def hertz(megahertz: int | None) -> float | None:
    """Return hertz, or None for what no clock reaches."""
    return megahertz * 1e6 if _lies(megahertz, 0, _MEGAHERTZ_MAX) else None


def ratio(percent: int | None) -> float | None:
    """Return a share of one, or None above a hundred percent."""
    return percent / 100 if _lies(percent, 0, 100) else None


def celsius(degrees: int | None) -> float | None:
    """Return the temperature, or None for what no chip survives."""
    return float(degrees) if _lies(degrees, _CELSIUS_MIN, _CELSIUS_MAX) else None


def cuda_version(packed: int | None) -> str | None:
    """Return "12.8" for 12080."""
    return None if not packed else f"{packed // 1000}.{packed % 1000 // 10}"


def only_node(words: Sequence[int] | None) -> int | None:
    """Return the number of the only bit set in an array of 64-bit words."""
    bits = sum(int(word) << (64 * place) for place, word in enumerate(words or ()))
    return bits.bit_length() - 1 if bits.bit_count() == 1 else None


def memory_facts(info: MemoryInfo) -> Facts:
    """Return bytes; a part that is larger than the whole is not told."""
    total = info.total if _lies(info.total, 1, _BYTES_MAX) else None

    def part(value: int) -> int | None:
        return value if total is not None and _lies(value, 0, total) else None

    facts: Facts = {
        "memory_total_bytes": total,
        "memory_used_bytes": part(info.used),
        "memory_free_bytes": part(info.free),
    }
    reserved: int | None = getattr(info, "reserved", None)  # the first form has no such field
    if reserved is not None:
        facts["memory_reserved_bytes"] = part(reserved)
    return facts


def utilization_facts(rates: UtilizationRates) -> Facts:
    """Return ratios."""
    return {
        "utilization_ratio": ratio(rates.gpu),
        "memory_utilization_ratio": ratio(rates.memory),
    }


def memory_by_pid(processes: Sequence[RunningProcess]) -> dict[int, int | None]:
    """Return bytes by PID; under MIG a process is listed once per instance that it uses."""
    found: dict[int, int | None] = {}
    for process in processes:
        used, before = process.usedGpuMemory, found.get(process.pid, 0)
        if before is None or not _lies(used, 0, _BYTES_MAX):
            found[process.pid] = None
        else:
            found[process.pid] = before + used
    return found


def _lies(value: int | None, least: int, most: int) -> TypeGuard[int]:
    return value is not None and least <= value <= most


def _form(function: str, *arguments: str) -> Form:
    """Return a call of `function` on a handle; further arguments are constants of the table."""

    def call(table: NvmlTable, gpu: Handle) -> Any:
        return getattr(table, function)(gpu, *(getattr(table, name) for name in arguments))

    return function, call


MEMORY = Fact(
    "memory_used_bytes",
    (
        (
            "nvmlDeviceGetMemoryInfo_v2",
            lambda table, gpu: table.nvmlDeviceGetMemoryInfo(gpu, table.nvmlMemory_v2),
        ),
        _form("nvmlDeviceGetMemoryInfo"),
    ),
    memory_facts,
)
FACTS: tuple[Fact[Facts], ...] = (
    MEMORY,
    Fact("utilization_ratio", (_form("nvmlDeviceGetUtilizationRates"),), utilization_facts),
    Fact(
        "temperature_celsius",
        (
            _form("nvmlDeviceGetTemperatureV", "NVML_TEMPERATURE_GPU"),
            _form("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
        ),
        lambda degrees: {"temperature_celsius": celsius(degrees)},
    ),
    Fact(
        "power_watts",
        (_form("nvmlDeviceGetPowerUsage"),),
        lambda milliwatts: {"power_watts": watts(milliwatts)},
    ),
    Fact(
        "energy_joules",
        (_form("nvmlDeviceGetTotalEnergyConsumption"),),
        lambda millijoules: {"energy_joules": joules(millijoules)},
    ),
    Fact(
        "sm_clock_hertz",
        (_form("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),),
        lambda megahertz: {"sm_clock_hertz": hertz(megahertz)},
    ),
    Fact(
        "memory_clock_hertz",
        (_form("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),),
        lambda megahertz: {"memory_clock_hertz": hertz(megahertz)},
    ),
)
COMPUTE_PROCESSES = Fact(
    "compute processes",
    (
        _form("nvmlDeviceGetComputeRunningProcesses"),
        _form("nvmlDeviceGetComputeRunningProcesses_v2"),
    ),
    memory_by_pid,
)
GRAPHICS_PROCESSES = Fact(
    "graphics processes",
    (
        _form("nvmlDeviceGetGraphicsRunningProcesses"),
        _form("nvmlDeviceGetGraphicsRunningProcesses_v2"),
    ),
    memory_by_pid,
)
