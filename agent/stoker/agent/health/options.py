"""What a person can set about health: which checks count, their limits, and single Xids."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stoker.core.config import option

_NO_XIDS: Mapping[str, str] = MappingProxyType({})
_DAY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """How GPUs are judged."""

    disabled: tuple[str, ...] = option((), "Checks that have no effect at all, by their names.")
    xids: Mapping[str, str] = option(
        _NO_XIDS,
        "What single Xids mean: NUMBER: ignore, or none, restart_app, drain, reset_gpu, reboot or "
        "rma.",
    )
    window_seconds: float = option(
        600.0,
        "Time over which errors and slowdowns are counted (gpud's for slowdowns).",
        minimum=60.0,
        maximum=_DAY_SECONDS,
    )
    stale_seconds: float = option(
        10.0,
        "Time without a reading after which a GPU's health is unknown; at least three ticks.",
        minimum=0.0,
        maximum=3600.0,
    )
    xid_quiet_seconds: float = option(
        600.0,
        "Time after which an Xid that leaves the GPU healthy is over.",
        minimum=1.0,
        maximum=30 * _DAY_SECONDS,
    )
    xid_doubt_seconds: float = option(
        _DAY_SECONDS,
        "Time after which an Xid that leaves the GPU in doubt, and does not come again, is over.",
        minimum=1.0,
        maximum=30 * _DAY_SECONDS,
    )
    remember_seconds: float = option(
        30 * _DAY_SECONDS,
        "Time after which a fault that is over, and stays away, is forgotten.",
        minimum=60.0,
        maximum=365 * _DAY_SECONDS,
    )
    resets_max: int = option(
        2, "Resets after which a fault that comes back asks for a reboot.", minimum=1, maximum=6
    )
    reboots_max: int = option(
        2,
        "Reboots after which a fault that comes back asks for inspection (as gpud).",
        minimum=1,
        maximum=6,
    )
    ecc_uncorrected_errors_max: int = option(
        0, "Uncorrected memory errors since the driver was loaded (DCGM: none).", minimum=0
    )
    ecc_corrected_errors_per_minute_max: float = option(
        10.0, "Corrected memory errors per minute (DCGM's number, a dummy there).", minimum=0.0
    )
    retired_pages_max: int = option(
        62, "Memory pages out of use, before Ampere (DCGM's limit is 63).", minimum=0
    )
    retired_pages_uncorrected_max: int = option(
        15,
        "Memory pages out of use after uncorrected errors, before Ampere (DCGM, NVIDIA).",
        minimum=0,
    )
    nvlink_down_seconds: float = option(
        20.0, "Time for which an NVLink has to be down.", minimum=0.0, maximum=3600.0
    )
    nvlink_up_seconds: float = option(
        60.0, "Time for which it has to be up again.", minimum=0.0, maximum=3600.0
    )
    nvlink_recoveries_max: int = option(
        0, "Recoveries of an NVLink in the window (DCGM: none).", minimum=0
    )
    nvlink_replays_per_minute_max: float = option(
        10.0, "Replays of an NVLink per minute (DCGM warns of each one).", minimum=0.0
    )
    nvlink_crc_errors_per_second_max: float = option(
        100.0, "CRC errors of an NVLink per second, over a minute (DCGM).", minimum=0.0
    )
    pcie_replays_limit_ratio: float = option(
        1.0, "PCIe replays as a share of DCGM's limit for the link's generation.", minimum=0.01
    )
    pcie_link_seconds: float = option(
        60.0,
        "Time for which the PCIe link of a busy GPU has to be slower or narrower than it can be.",
        minimum=0.0,
        maximum=3600.0,
    )
    pcie_link_utilization_ratio_min: float = option(
        0.5, "Load from which on a GPU should run its PCIe link fast.", minimum=0.0, maximum=1.0
    )
    thermal_share_max: float = option(
        0.1,
        "Share of the window at or above the slowdown temperature, or slowed down by heat.",
        minimum=0.001,
        maximum=1.0,
    )
    thermal_share_end: float = option(
        0.02, "Share of the window below which that is over.", minimum=0.0, maximum=1.0
    )
    hw_slowdown_share_max: float = option(
        0.6,
        "Share of the window with clocks halved by hardware (gpud's number).",
        minimum=0.001,
        maximum=1.0,
    )
    hw_slowdown_share_end: float = option(
        0.1, "Share of the window below which that is over.", minimum=0.0, maximum=1.0
    )
    power_brake_share_max: float = option(
        0.6,
        "Share of the window with clocks halved by the power supply (gpud's number).",
        minimum=0.001,
        maximum=1.0,
    )
    power_brake_share_end: float = option(
        0.1, "Share of the window below which that is over.", minimum=0.0, maximum=1.0
    )
