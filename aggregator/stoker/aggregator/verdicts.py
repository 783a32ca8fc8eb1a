"""What an agent judges of a GPU, and what the fleet does about it, as values.

The agents judge (a fold over what each saw); the aggregator keeps their verdicts, keeps GPUs from
use because of them, and remembers who failed when.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

# Which fault it is: the check that found it, and since when, on the node's clock.
FaultId = tuple[str, float | None]


class Verdict(StrEnum):
    """Whether work should run on a GPU; worst first."""

    UNHEALTHY = "unhealthy"  # no work should be placed on it
    UNKNOWN = "unknown"  # it is not read now, and nothing worse is known of it
    DEGRADED = "degraded"  # works, with less than it should have, or not for long
    HEALTHY = "healthy"


class RepairAction(StrEnum):
    """What is to be done about a GPU; each includes those before it."""

    NONE = "none"
    RESTART_APP = "restart_app"
    DRAIN = "drain"
    RESET_GPU = "reset_gpu"
    REBOOT = "reboot"
    RMA = "rma"


VERDICT_RANK = {verdict: rank for rank, verdict in enumerate(Verdict)}  # the worst is 0
ACTION_RANK = {action: rank for rank, action in enumerate(RepairAction)}  # the largest is last


@dataclass(frozen=True, slots=True)
class HealthFault:
    """A fault that lasts. Times are on the node's clock."""

    check: str  # stable for programs: "xid", "row_remap_failed", ...
    code: str  # which of its kind; empty: there is one
    verdict: Verdict
    action: RepairAction
    reason: str
    since: float
    last_at: float
    count: int


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The verdict on one GPU: the worst of its faults, and what mends them all."""

    uuid: str
    verdict: Verdict
    action: RepairAction = RepairAction.NONE
    check: str = ""  # of the worst fault; empty: healthy
    reason: str = ""
    since: float | None = None  # since when it is judged so, on the node's clock
    faults: tuple[HealthFault, ...] = ()  # worst first

    @property
    def fault(self) -> FaultId:
        """What tells what is wrong now from what was, or will be, wrong at another time."""
        return (self.check, self.since)

    @property
    def check_in_words(self) -> str:
        """The worst fault in a word or two: `xid 79`."""
        code = self.faults[0].code if self.faults and self.faults[0].check == self.check else ""
        return f"{self.check} {code}".strip().replace("_", " ")

    def says_the_same_as(self, other: "GpuHealth") -> bool:
        """Whether nothing but words and counts differ."""
        mine = (self.uuid, self.verdict, self.action, self.fault)
        return mine == (other.uuid, other.verdict, other.action, other.fault)


@dataclass(frozen=True, slots=True)
class GpuCordon:
    """Why no new allocation goes to a GPU. Times are on the aggregator's clock."""

    at: float
    reason: str
    by_health: bool  # otherwise an operator did it, and only an operator undoes it
    drain_at: float | None = None  # when what it still holds is released
    fault: FaultId | None = None  # for which it was done by health


@dataclass(frozen=True, slots=True)
class Condition:
    """What the ledger knows of the health of one GPU, wherever it is listed."""

    uuid: str
    node: str  # that told of it last, or in which it was cordoned
    slot: str = ""  # its PCI address when it was told; empty: not known
    health: GpuHealth | None = None  # None: nobody judged it yet
    changed_at: float = 0.0  # when that verdict came, on the aggregator's clock
    cordon: GpuCordon | None = None
    # The fault for which an operator does not want it cordoned by health.
    acknowledged: FaultId | None = None
    failed: FaultId | None = None  # the last fault that was counted as a failure
    # How often its verdict has changed in the hour that began then, on the aggregator's clock.
    changes: int = 0
    counted_since: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """What it is judged to be; a GPU that nobody judged is unknown."""
        return self.health.verdict if self.health is not None else Verdict.UNKNOWN

    @property
    def action(self) -> RepairAction:
        """What mends it."""
        return self.health.action if self.health is not None else RepairAction.NONE

    @property
    def is_notable(self) -> bool:
        """Whether something is wrong with it, or done about it."""
        is_ill = self.health is not None and self.health.verdict is not Verdict.HEALTHY
        return is_ill or self.cordon is not None

    def with_cordon(self, cordon: GpuCordon | None) -> "Condition":
        """Return the condition with this cordon, or with none."""
        return replace(self, cordon=cordon)


def by_severity(verdict: Verdict, action: RepairAction) -> tuple[int, int]:
    """Return a key that sorts the worst first."""
    return (VERDICT_RANK[verdict], -ACTION_RANK[action])
