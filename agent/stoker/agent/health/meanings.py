"""What a fault means for its GPU: how bad it is, what mends it, and how it comes to an end."""

from dataclasses import dataclass
from enum import StrEnum

from stoker.agent.verdicts import RepairAction, Verdict


class Ends(StrEnum):
    """How a fault comes to an end; a person, or another card in the slot, ends each of them."""

    READING = "reading"  # by what the driver tells, in this life of the GPU or a later one
    MEASURED = "measured"  # by what is measured over time; a reset begins that anew
    QUIET = "quiet"  # by not coming again for some time, or by a reset
    RESET = "reset"  # by a reset of the GPU, or a boot of the host
    REBOOT = "reboot"  # by a boot of the host
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a fault means for its GPU."""

    verdict: Verdict
    action: RepairAction
    ends: Ends
    is_ignored: bool = False  # as if it had not been seen


IGNORED = Meaning(Verdict.HEALTHY, RepairAction.NONE, Ends.QUIET, is_ignored=True)
# The program met it, mostly by its own fault; others can use the GPU.
APPLICATION = Meaning(Verdict.HEALTHY, RepairAction.RESTART_APP, Ends.QUIET)
# The driver has dealt with it, or it is no fault at all.
NOTED = Meaning(Verdict.HEALTHY, RepairAction.NONE, Ends.QUIET)
# Nothing is wrong with the work that runs; somebody should know.
WORN = Meaning(Verdict.DEGRADED, RepairAction.NONE, Ends.QUIET)
# It is not known what it does to the next program.
DOUBTFUL = Meaning(Verdict.DEGRADED, RepairAction.DRAIN, Ends.QUIET)
NEEDS_RESET = Meaning(Verdict.UNHEALTHY, RepairAction.RESET_GPU, Ends.RESET)
NEEDS_REBOOT = Meaning(Verdict.UNHEALTHY, RepairAction.REBOOT, Ends.REBOOT)
# Hands are needed, and whoever has them must switch the host off.
NEEDS_HANDS = Meaning(Verdict.UNHEALTHY, RepairAction.RMA, Ends.REBOOT)
NEEDS_REPLACEMENT = Meaning(Verdict.UNHEALTHY, RepairAction.RMA, Ends.NEVER)

# What an Xid means that a person has set to an action.
BY_ACTION = {
    RepairAction.NONE: NOTED,
    RepairAction.RESTART_APP: APPLICATION,
    RepairAction.DRAIN: Meaning(Verdict.UNHEALTHY, RepairAction.DRAIN, Ends.QUIET),
    RepairAction.RESET_GPU: NEEDS_RESET,
    RepairAction.REBOOT: NEEDS_REBOOT,
    RepairAction.RMA: NEEDS_REPLACEMENT,
}

_VERDICTS = (Verdict.HEALTHY, Verdict.DEGRADED, Verdict.UNKNOWN, Verdict.UNHEALTHY)
VERDICT_RANK = {verdict: rank for rank, verdict in enumerate(_VERDICTS)}
ACTION_RANK = {action: rank for rank, action in enumerate(RepairAction)}
