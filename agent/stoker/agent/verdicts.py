"""What is known of a GPU's health: faults with their history, and the verdict that follows.

Verdicts are a function of history: a fault is remembered as what was seen and when (`FaultRecord`,
durable), never as a verdict. So a restart, or another policy, judges the same past anew.

A life of a GPU is the time between two repairs of the kind that clears the driver's state: a boot
of its host, or a reset. A fault that comes back in life after life is not mended by what was tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

# Lives that a fault's record remembers; more say nothing further.
LIVES_MAX = 8


class Verdict(StrEnum):
    """Whether work should run on a GPU."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"  # works, with less than it should have, or not for long
    UNHEALTHY = "unhealthy"  # no work should be placed on it
    UNKNOWN = "unknown"  # it is not read now, and nothing worse is known of it


class RepairAction(StrEnum):
    """What is to be done about a GPU; each includes those before it."""

    NONE = "none"
    RESTART_APP = "restart_app"  # the program that met the fault
    DRAIN = "drain"  # let work end, place none; then look at what the reason names
    RESET_GPU = "reset_gpu"
    REBOOT = "reboot"
    RMA = "rma"  # inspect the hardware; replace it if that finds what the reason names


class Check(StrEnum):
    """What is looked at; each can be switched off by its name."""

    XID = "xid"  # code: the number, with the unit of an NVLink5 sub-code: "145.RLW_REMAP"
    ECC_UNCORRECTED = "ecc_uncorrected"
    ECC_CORRECTED = "ecc_corrected"
    ROW_REMAP_PENDING = "row_remap_pending"
    ROW_REMAP_FAILED = "row_remap_failed"
    RETIRED_PAGES = "retired_pages"
    NVLINK_DOWN = "nvlink_down"  # code: the link
    NVLINK_ERRORS = "nvlink_errors"  # code: the link
    PCIE_REPLAYS = "pcie_replays"
    PCIE_LINK = "pcie_link"
    THERMAL = "thermal"
    HW_SLOWDOWN = "hw_slowdown"
    POWER_BRAKE = "power_brake"
    RECOVERY_ACTION = "recovery_action"  # what the driver itself asks for
    GPU_LOST = "gpu_lost"
    GPU_MISSING = "gpu_missing"
    STALE = "stale"
    PERSISTENCE = "persistence"


class Ending(StrEnum):
    """Why a fault is over."""

    RECOVERED = "recovered"
    RESET = "reset"
    REBOOT = "reboot"
    FORGIVEN = "forgiven"  # by a person
    REPLACED = "replaced"  # another card is in its slot


@dataclass(frozen=True, slots=True)
class Life:
    """Between two repairs: which boot of the host, and after how many resets in it."""

    boot_id: str
    resets: int = 0


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One fault of one GPU, as often as it came: what was seen, not what it means. Unix seconds."""

    uuid: str
    check: Check
    code: str  # which of its kind; empty: there is one
    detail: str  # one sentence: what was found last
    first_at: float  # since it lasts, or lasted the last time
    last_at: float
    count: int  # over all its lives
    lives: tuple[Life, ...]  # in which it came, oldest first, at most LIVES_MAX
    ended_at: float | None = None  # None: it lasts
    ending: Ending | None = None
    # Of the GPU when it was seen last: a counter that is lower since tells of a reset meanwhile.
    energy_joules: float | None = None

    @property
    def key(self) -> "FaultKey":
        """What tells it from the GPU's other faults."""
        return (self.uuid, self.check, self.code)


FaultKey = tuple[str, Check, str]


@dataclass(frozen=True, slots=True)
class ExpectedGpu:
    """A GPU that the node had when its inventory was last whole."""

    uuid: str
    index: int
    pci_bus_id: str | None
    model: str


@dataclass(frozen=True, slots=True)
class KernelLogPosition:
    """Up to where the kernel's log was read: its numbers rise within one boot."""

    boot_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class History:
    """All that health must not forget."""

    faults: Mapping[FaultKey, FaultRecord] = field(default_factory=dict[FaultKey, FaultRecord])
    lives: Mapping[str, Life] = field(default_factory=dict[str, Life])  # by UUID
    expected: tuple[ExpectedGpu, ...] = ()
    kernel_log: KernelLogPosition | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that lasts, judged."""

    check: Check
    code: str
    verdict: Verdict
    action: RepairAction
    reason: str  # one sentence for a person: what was found, and by which rule that is bad
    since: float
    last_at: float
    count: int


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The verdict on one GPU: the worst of its faults, and what mends them all."""

    uuid: str
    verdict: Verdict
    action: RepairAction = RepairAction.NONE
    reason: str = ""  # of the worst; empty: healthy
    check: Check | None = None
    since: float | None = None  # since when it is judged so
    faults: tuple[Fault, ...] = ()  # worst first


@dataclass(frozen=True, slots=True)
class KernelLine:
    """A record of the kernel's log that may be about a GPU."""

    sequence: int  # rises within one boot
    at: float  # Unix seconds
    text: str


@dataclass(frozen=True, slots=True)
class KernelLogStatus:
    """Whether the kernel's log is followed; it tells of faults that NVML keeps to itself."""

    is_followed: bool = False
    source: str = ""  # "helper" or "direct"
    reason: str = "it was not looked for yet"  # why not
