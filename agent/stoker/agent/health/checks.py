"""The table of checks: what each looks at, what a fault of it means, and by whose judgement."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stoker.agent.health.meanings import (
    DOUBTFUL,
    NEEDS_REBOOT,
    Ends,
    Meaning,
)
from stoker.agent.verdicts import Check, RepairAction, Verdict

_BAD, _LESS = Verdict.UNHEALTHY, Verdict.DEGRADED

# PCIe replays per minute and lane that DCGM takes for the most of a sound link, by generation;
# those below 3 and above 5 follow from the same share of errors in what the link carries.
PCIE_REPLAYS_PER_MINUTE_AND_LANE: Mapping[int, float] = MappingProxyType(
    {1: 0.15, 2: 0.3, 3: 0.48, 4: 0.96, 5: 1.92, 6: 3.84}
)
NVLINK_CRC_WINDOW_SECONDS = 60.0

# Codes, where a check has faults of several kinds.
GPU_LOST, RESET_REQUIRED, INIT_FAILED = "gpu_lost", "reset_required", "init_failed"
PAGES_PENDING, PAGES_FULL, PAGES_UNCORRECTED = "pending", "full", "uncorrected"
PCIE_FATAL, PCIE_NONFATAL = "aer_fatal", "aer_nonfatal"
RECOVERY_CODES: Mapping[int, str] = MappingProxyType(
    {1: "reset", 2: "reboot", 3: "drain_p2p", 4: "drain_and_reset"}
)
RECOVERY_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault that a check can find."""

    check: Check
    finds: str  # when there is such a fault
    why: str  # what is wrong with that, after the finding in the same sentence
    meaning: Meaning
    source: str
    options: tuple[str, ...] = ()
    code: str = ""  # of faults of this kind; empty: of all that have no row of their own


def _until_read(verdict: Verdict, action: RepairAction) -> Meaning:
    return Meaning(verdict, action, Ends.READING)


def _measured(verdict: Verdict, action: RepairAction) -> Meaning:
    return Meaning(verdict, action, Ends.MEASURED)


_DRIVER_ASKS = "the driver itself asks for it"
_NVML = "NVML, nvmlDeviceGetFieldValues 230"

ROWS = (
    Row(
        Check.ECC_UNCORRECTED,
        "uncorrected memory errors since the driver was loaded",
        "memory is repaired at a reset only",
        _until_read(_BAD, RepairAction.RESET_GPU),
        "DCGM health watch; NVIDIA GPU memory error management",
        ("ecc_uncorrected_errors_max",),
    ),
    Row(
        Check.ECC_CORRECTED,
        "corrected memory errors come fast over the window",
        "memory wears out",
        _measured(_LESS, RepairAction.NONE),
        "ours; the number is DCGM's, which calls it a dummy",
        ("ecc_corrected_errors_per_minute_max", "window_seconds"),
    ),
    Row(
        Check.ROW_REMAP_PENDING,
        "a memory row waits to be replaced",
        "that happens at the next reset; work can go on until then",
        _until_read(_LESS, RepairAction.RESET_GPU),
        "NVIDIA GPU memory error management (gpud and DCGM's diagnostics are stricter: they fail)",
    ),
    Row(
        Check.ROW_REMAP_FAILED,
        "a memory row could not be replaced",
        "the GPU has no spare rows left there",
        _until_read(_BAD, RepairAction.RMA),
        "NVIDIA GPU memory error management; gpud; DCGM",
    ),
    Row(
        Check.RETIRED_PAGES,
        "a memory page waits to be taken out of use",
        "that happens at the next reset; work can go on until then",
        _until_read(_LESS, RepairAction.RESET_GPU),
        "NVIDIA dynamic page retirement; DCGM",
        code=PAGES_PENDING,
    ),
    Row(
        Check.RETIRED_PAGES,
        "as many memory pages out of use as the driver has room for",
        "the next bad page cannot be taken out of use",
        _until_read(_BAD, RepairAction.RMA),
        "DCGM's limit of 63; NVIDIA dynamic page retirement",
        ("retired_pages_max",),
        PAGES_FULL,
    ),
    Row(
        Check.RETIRED_PAGES,
        "many memory pages out of use after uncorrected errors",
        "memory wears out",
        _until_read(_LESS, RepairAction.RMA),
        "DCGM's soft limit of 15; NVIDIA dynamic page retirement",
        ("retired_pages_uncorrected_max",),
        PAGES_UNCORRECTED,
    ),
    Row(
        Check.NVLINK_DOWN,
        "a link is down that was up since the reset, or that the model has while others are up",
        "work on several GPUs fails, or waits for it",
        _until_read(_BAD, RepairAction.RESET_GPU),
        "DCGM health watch (fails); gpud",
        ("nvlink_down_seconds", "nvlink_up_seconds"),
    ),
    Row(
        Check.NVLINK_ERRORS,
        "a link recovers, or has replays or CRC errors faster than it should",
        "it is slow, and may go down",
        _measured(_LESS, RepairAction.RESET_GPU),
        "DCGM health watch: any recovery, 100 CRC errors per second; for replays ours",
        (
            "nvlink_recoveries_max",
            "nvlink_replays_per_minute_max",
            "nvlink_crc_errors_per_second_max",
            "window_seconds",
        ),
    ),
    Row(
        Check.PCIE_REPLAYS,
        "PCIe packets are sent again more often than on a sound link",
        "the card, the slot or a riser has a bad contact",
        _measured(_LESS, RepairAction.DRAIN),
        "DCGM's limits by generation and lane",
        ("pcie_replays_limit_ratio", "window_seconds"),
    ),
    Row(
        Check.PCIE_LINK,
        "under load, the link has fewer lanes or a lower generation than card and slot can have",
        "it was not trained as it should be",
        _until_read(_LESS, RepairAction.REBOOT),
        "NVML's current and highest link; the time is ours",
        ("pcie_link_seconds", "pcie_link_utilization_ratio_min"),
    ),
    Row(
        Check.PCIE_LINK,
        "the kernel tells of a fatal PCIe error of the GPU",
        "the link was lost",
        NEEDS_REBOOT,
        "PCI Express, advanced error reporting",
        code=PCIE_FATAL,
    ),
    Row(
        Check.PCIE_LINK,
        "the kernel tells of an uncorrected PCIe error of the GPU that was not fatal",
        "a transfer was lost",
        DOUBTFUL,
        "PCI Express, advanced error reporting",
        ("xid_doubt_seconds",),
        PCIE_NONFATAL,
    ),
    Row(
        Check.THERMAL,
        "hot for a share of the window",
        "cooling does not keep up",
        _measured(_LESS, RepairAction.DRAIN),
        "NVML's slowdown threshold and clock event reasons; the shares are ours",
        ("thermal_share_max", "thermal_share_end", "window_seconds"),
    ),
    Row(
        Check.HW_SLOWDOWN,
        "slowed down by hardware for a share of the window",
        "heat or power is beyond what the board may have",
        _measured(_LESS, RepairAction.DRAIN),
        "gpud",
        ("hw_slowdown_share_max", "hw_slowdown_share_end", "window_seconds"),
    ),
    Row(
        Check.POWER_BRAKE,
        "slowed down by the power supply for a share of the window",
        "the host has too little power for its GPUs",
        _measured(_LESS, RepairAction.DRAIN),
        "gpud",
        ("power_brake_share_max", "power_brake_share_end", "window_seconds"),
    ),
    Row(
        Check.RECOVERY_ACTION,
        "the driver asks for a reset",
        _DRIVER_ASKS,
        _until_read(_BAD, RepairAction.RESET_GPU),
        _NVML,
        code="reset",
    ),
    Row(
        Check.RECOVERY_ACTION,
        "the driver asks for a reboot",
        _DRIVER_ASKS,
        _until_read(_BAD, RepairAction.REBOOT),
        _NVML,
        code="reboot",
    ),
    Row(
        Check.RECOVERY_ACTION,
        "the driver asks to drain peer-to-peer traffic",
        _DRIVER_ASKS,
        _until_read(_BAD, RepairAction.DRAIN),
        _NVML,
        code="drain_p2p",
    ),
    Row(
        Check.RECOVERY_ACTION,
        "the driver asks to drain and reset",
        _DRIVER_ASKS,
        _until_read(_BAD, RepairAction.RESET_GPU),
        _NVML,
        code="drain_and_reset",
    ),
    Row(
        Check.RECOVERY_ACTION,
        "the driver asks for something that this version does not know",
        _DRIVER_ASKS,
        _until_read(_BAD, RepairAction.DRAIN),
        "ours",
        code=RECOVERY_OTHER,
    ),
    Row(
        Check.GPU_LOST,
        "the driver says that the GPU is lost",
        "only a reboot brings it back",
        _until_read(_BAD, RepairAction.REBOOT),
        "NVML_ERROR_GPU_IS_LOST; NVSentinel",
        code=GPU_LOST,
    ),
    Row(
        Check.GPU_LOST,
        "the driver says that the GPU needs a reset",
        "it does not work before a reset",
        _until_read(_BAD, RepairAction.RESET_GPU),
        "NVML_ERROR_RESET_REQUIRED",
        code=RESET_REQUIRED,
    ),
    Row(
        Check.GPU_LOST,
        "the kernel tells that the driver could not initialize the GPU, and it is not read since",
        "it does not work before that",
        _until_read(_BAD, RepairAction.REBOOT),
        "NVIDIA driver (RmInitAdapter)",
        code=INIT_FAILED,
    ),
    Row(
        Check.GPU_MISSING,
        "a GPU that was there when all were is not counted any more",
        "it is gone from its slot, or off the bus",
        _until_read(_BAD, RepairAction.REBOOT),
        "ours; gpud and NVSentinel compare with a number of GPUs",
    ),
    Row(
        Check.STALE,
        "a GPU is not read for some time",
        "nothing is known of it now",
        _until_read(Verdict.UNKNOWN, RepairAction.NONE),
        "ours",
        ("stale_seconds",),
    ),
    Row(
        Check.PERSISTENCE,
        "persistence mode is off",
        "without users the driver is unloaded, the next one waits for it, and counters are lost",
        _until_read(_LESS, RepairAction.NONE),
        "NVIDIA driver persistence; gpud",
    ),
)

_BY_KIND = {(row.check, row.code): row for row in ROWS}


def row_of(check: Check, code: str) -> Row | None:
    """Return the row of a fault; None: of an Xid, which has a table of its own."""
    return _BY_KIND.get((check, code)) or _BY_KIND.get((check, ""))
