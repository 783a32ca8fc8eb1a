"""What a simulated GPU shows of its load: memory, engines, clocks, power, heat, its PCIe link."""

# ruff: noqa: N802 (the names are the driver's own)

from collections.abc import Callable
from typing import Any

from stoker.agent.facts import CLOCK_EVENT_BITS, Fact
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import Device, SimulatedSession, of_card, of_device
from stoker.core.gpu_models import MIB

# Over which the load of a video engine is told; seen so on a card.
_ENGINE_PERIOD_MICROSECONDS = 100_000
_CONTEXT_BAR1_BYTES = 1 * MIB  # what the driver maps of an idle card
# States: the fastest, and that of a card whose memory clock went down.
_FASTEST_STATE, _IDLE_STATE = 0, 8


class GaugeFunctions(SimulatedSession):
    """Questions whose answers follow the load."""

    def nvmlDeviceGetMemoryInfo(self, device: Device, version: int | None = None, /) -> Any:
        return self._memory_v2(device) if version else self._memory(device)

    def _read_memory(self, device: Device, /) -> Any:
        total, used, reserved = _memory_of(device)
        memory = NVML.c_nvmlMemory_t()
        memory.total, memory.free = total, total - reserved - used
        memory.used = used + reserved  # as the first form counts
        return memory

    def _read_memory_v2(self, device: Device, /) -> Any:
        total, used, reserved = _memory_of(device)
        memory = NVML.c_nvmlMemory_v2_t()
        memory.version, memory.total, memory.reserved = NVML.nvmlMemory_v2, total, reserved
        memory.free, memory.used = total - reserved - used, used
        return memory

    _memory = of_device(_read_memory, "nvmlDeviceGetMemoryInfo")
    _memory_v2 = of_device(_read_memory_v2, "nvmlDeviceGetMemoryInfo_v2")

    @of_device
    def nvmlDeviceGetBAR1MemoryInfo(self, device: Device, /) -> Any:
        window = NVML.c_nvmlBAR1Memory_t()
        if isinstance(device, MigDevice):
            window.bar1Total = int(device.card.model.bar1_bytes * device.memory_share)
            window.bar1Used = 0
        else:
            window.bar1Total = device.model.bar1_bytes
            window.bar1Used = _CONTEXT_BAR1_BYTES
        window.bar1Free = window.bar1Total - window.bar1Used
        return window

    # Engines ----------------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetUtilizationRates(self, card: SimulatedCard, /) -> Any:
        fail_in_mig_mode(card)
        utilization = NVML.c_nvmlUtilization_t()
        utilization.gpu = round(card.utilization * 100)
        utilization.memory = round(card.memory_utilization * 100)
        return utilization

    @of_card
    def nvmlDeviceGetEncoderUtilization(self, card: SimulatedCard, /) -> list[int]:
        return _engine(card, card.work.encoder)

    @of_card
    def nvmlDeviceGetDecoderUtilization(self, card: SimulatedCard, /) -> list[int]:
        return _engine(card, card.work.decoder)

    @of_card
    def nvmlDeviceGetJpgUtilization(self, card: SimulatedCard, /) -> list[int]:
        return _engine(card, 0.0)

    @of_card
    def nvmlDeviceGetOfaUtilization(self, card: SimulatedCard, /) -> list[int]:
        return _engine(card, 0.0)

    # Clocks -----------------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetClockInfo(self, card: SimulatedCard, clock: int, /) -> int:
        return _megahertz(_CLOCKS, card, clock)

    @of_card
    def nvmlDeviceGetMaxClockInfo(self, card: SimulatedCard, clock: int, /) -> int:
        return _megahertz(_CLOCKS_MAX, card, clock)

    @of_card
    def nvmlDeviceGetPerformanceState(self, card: SimulatedCard, /) -> int:
        slowed = card.memory_clock_hertz < card.model.memory_clock_busy_hertz
        return _IDLE_STATE if slowed else _FASTEST_STATE

    @of_card
    def nvmlDeviceGetCurrentClocksEventReasons(self, card: SimulatedCard, /) -> int:
        return card.clock_event_reasons

    @of_card
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: SimulatedCard, /) -> int:
        return card.clock_event_reasons

    @of_card
    def nvmlDeviceGetSupportedClocksEventReasons(self, card: SimulatedCard, /) -> int:
        return sum(CLOCK_EVENT_BITS)

    @of_card
    def nvmlDeviceGetSupportedClocksThrottleReasons(self, card: SimulatedCard, /) -> int:
        return sum(CLOCK_EVENT_BITS)

    # Power and heat ---------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetPowerUsage(self, card: SimulatedCard, /) -> int:
        return round(card.power_watts * 1000)

    @of_card
    def nvmlDeviceGetTotalEnergyConsumption(self, card: SimulatedCard, /) -> int:
        return int(card.energy_joules * 1000)

    @of_card
    def nvmlDeviceGetEnforcedPowerLimit(self, card: SimulatedCard, /) -> int:
        return round(card.model.power_limit_watts * 1000)

    @of_card
    def nvmlDeviceGetPowerManagementLimit(self, card: SimulatedCard, /) -> int:
        return round(card.model.power_limit_watts * 1000)

    @of_card
    def nvmlDeviceGetPowerManagementDefaultLimit(self, card: SimulatedCard, /) -> int:
        return round(card.model.power_limit_watts * 1000)

    @of_card
    def nvmlDeviceGetPowerManagementLimitConstraints(self, card: SimulatedCard, /) -> list[int]:
        model = card.model
        return [round(model.power_limit_min_watts * 1000), round(model.power_limit_watts * 1000)]

    @of_card
    def nvmlDeviceGetTemperatureV(self, card: SimulatedCard, sensor: int, /) -> int:
        return _celsius(card, sensor)

    @of_card
    def nvmlDeviceGetTemperature(self, card: SimulatedCard, sensor: int, /) -> int:
        return _celsius(card, sensor)

    @of_card
    def nvmlDeviceGetTemperatureThreshold(self, card: SimulatedCard, threshold: int, /) -> int:
        # Not the preferred way from Ada on, and answered there too (driver 610 on Blackwell).
        if not 0 <= threshold < NVML.NVML_TEMPERATURE_THRESHOLD_COUNT:
            raise error("INVALID_ARGUMENT")
        model = card.model
        celsius = {
            NVML.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN: model.temperature_shutdown_celsius,
            NVML.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN: model.temperature_slowdown_celsius,
            NVML.NVML_TEMPERATURE_THRESHOLD_MEM_MAX: model.memory_temperature_max_celsius,
            NVML.NVML_TEMPERATURE_THRESHOLD_GPU_MAX: model.temperature_max_celsius,
        }.get(threshold)
        if celsius is None:
            raise error("NOT_SUPPORTED")
        return round(celsius)

    @of_card
    def nvmlDeviceGetMarginTemperature(self, card: SimulatedCard, /) -> int:
        if not card.model.has_temperature_margin:
            raise error("NOT_SUPPORTED")
        return round(card.model.temperature_max_celsius - card.celsius)

    # Every simulated board is cooled by the fans of its server. A scenario that answers these
    # functions makes a board with fans.

    @of_card
    def nvmlDeviceGetNumFans(self, card: SimulatedCard, /) -> int:
        raise error("NOT_SUPPORTED")

    @of_card
    def nvmlDeviceGetFanSpeed(self, card: SimulatedCard, /) -> int:
        raise error("NOT_SUPPORTED")

    @of_card
    def nvmlDeviceGetFanSpeed_v2(self, card: SimulatedCard, fan: int, /) -> int:
        raise error("NOT_SUPPORTED")

    # The PCIe link ----------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetCurrPcieLinkGeneration(self, card: SimulatedCard, /) -> int:
        return int(card.fact(Fact.PCIE_LINK_GENERATION, card.model.pcie_generation))

    @of_card
    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: SimulatedCard, /) -> int:
        return card.model.pcie_generation

    @of_card
    def nvmlDeviceGetGpuMaxPcieLinkGeneration(self, card: SimulatedCard, /) -> int:
        return card.model.pcie_generation

    @of_card
    def nvmlDeviceGetCurrPcieLinkWidth(self, card: SimulatedCard, /) -> int:
        return int(card.fact(Fact.PCIE_LINK_WIDTH, card.model.pcie_lanes))

    @of_card
    def nvmlDeviceGetMaxPcieLinkWidth(self, card: SimulatedCard, /) -> int:
        return card.model.pcie_lanes

    @of_card
    def nvmlDeviceGetPcieReplayCounter(self, card: SimulatedCard, /) -> int:
        return int(card.fact(Fact.PCIE_REPLAYS, 0))


_CLOCKS: dict[int, Callable[[SimulatedCard], float]] = {
    0: lambda card: card.sm_clock_hertz,  # graphics, the same domain
    1: lambda card: card.sm_clock_hertz,
    2: lambda card: card.memory_clock_hertz,
    3: lambda card: card.video_clock_hertz,
}
_CLOCKS_MAX: dict[int, Callable[[SimulatedCard], float]] = {
    0: lambda card: card.model.sm_clock_busy_hertz,
    1: lambda card: card.model.sm_clock_busy_hertz,
    2: lambda card: card.model.memory_clock_busy_hertz,
    3: lambda card: card.model.video_clock_busy_hertz,
}


def fail_in_mig_mode(card: SimulatedCard) -> None:
    """Raise what the driver answers when a partitioned GPU is asked for the load of the whole."""
    if card.mig_enabled:
        raise error("NOT_SUPPORTED")


def _memory_of(device: Device) -> tuple[int, int, int]:
    """Return total, used, reserved."""
    if isinstance(device, MigDevice):
        return device.memory_bytes, device.work.memory_bytes, 0
    model = device.model
    return model.memory_total_bytes, device.memory_used_bytes, model.memory_reserved_bytes


def _engine(card: SimulatedCard, load: float) -> list[int]:
    fail_in_mig_mode(card)
    return [round(load * 100), _ENGINE_PERIOD_MICROSECONDS]


def _megahertz(
    clocks: dict[int, Callable[[SimulatedCard], float]], card: SimulatedCard, clock: int
) -> int:
    if clock not in clocks:
        raise error("INVALID_ARGUMENT")
    return round(clocks[clock](card) / 1e6)


def _celsius(card: SimulatedCard, sensor: int) -> int:
    if sensor != NVML.NVML_TEMPERATURE_GPU:
        raise error("INVALID_ARGUMENT")
    return round(card.celsius)
