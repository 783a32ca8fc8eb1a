"""What is remembered of a GPU becomes a verdict: a plain function of records and policy."""

from collections.abc import Iterable

from stoker.agent.health.checks import row_of
from stoker.agent.health.meanings import (
    ACTION_RANK,
    VERDICT_RANK,
    Ends,
    Meaning,
)
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.policy import Policy
from stoker.agent.health.xids import xid_source
from stoker.agent.verdicts import (
    Check,
    Ending,
    Fault,
    FaultRecord,
    GpuHealth,
    Life,
    RepairAction,
    Verdict,
)

_ADVICE = {
    RepairAction.NONE: "nothing is to be done about the GPU",
    RepairAction.RESTART_APP: "the program has to be started anew",
    RepairAction.DRAIN: "let work end, place none, and look at it",
    RepairAction.RESET_GPU: "the GPU needs a reset",
    RepairAction.REBOOT: "the host needs a reboot",
    RepairAction.RMA: "the hardware needs inspection",
}


def judge_fault(record: FaultRecord, policy: Policy) -> Fault | None:
    """Return a fault that lasts, judged; None: it is over, or of no effect by the policy."""
    if record.ended_at is not None:
        return None
    meaning = policy.meaning(record.check, record.code)
    if meaning.is_ignored:
        return None
    action = escalated(meaning.action, record.lives, policy.limits)
    tried = "" if action is meaning.action else f", as it came back after {_tried(record.lives)}"
    return Fault(
        check=record.check,
        code=record.code,
        verdict=meaning.verdict,
        action=action,
        reason=f"{record.detail}; {_why(record)}{_ADVICE[action]}{tried}",
        since=record.first_at,
        last_at=record.last_at,
        count=record.count,
    )


def judge_gpu(uuid: str, records: Iterable[FaultRecord], policy: Policy) -> GpuHealth:
    """Return the verdict on a GPU: that of its worst fault, and what mends all of them."""
    faults = [fault for each in records if (fault := judge_fault(each, policy)) is not None]
    if not faults:
        return GpuHealth(uuid, Verdict.HEALTHY)
    faults.sort(key=_badness)
    worst = faults[0]
    action = max((fault.action for fault in faults), key=ACTION_RANK.__getitem__)
    if worst.verdict is Verdict.HEALTHY:
        return GpuHealth(uuid, Verdict.HEALTHY, action, faults=tuple(faults))
    return GpuHealth(
        uuid, worst.verdict, action, worst.reason, worst.check, worst.since, tuple(faults)
    )


def escalated(action: RepairAction, lives: tuple[Life, ...], limits: HealthConfig) -> RepairAction:
    """Return what is to be done about a fault that came in these lives of its GPU."""
    if action not in (RepairAction.RESET_GPU, RepairAction.REBOOT):
        return action
    if len({life.boot_id for life in lives}) > limits.reboots_max:
        return RepairAction.RMA
    return RepairAction.REBOOT if len(lives) > limits.resets_max else action


def ends_with_life(meaning: Meaning, before: Life, after: Life) -> Ending | None:
    """Return how a new life of the GPU ends what came in the one before; None: it does not."""
    is_boot = before.boot_id != after.boot_id
    match meaning.ends:
        case Ends.RESET | Ends.QUIET | Ends.MEASURED:
            return Ending.REBOOT if is_boot else Ending.RESET
        case Ends.REBOOT:
            return Ending.REBOOT if is_boot else None
        case Ends.READING | Ends.NEVER:
            return None


def _badness(fault: Fault) -> tuple[int, int, float, str, str]:
    return (
        -VERDICT_RANK[fault.verdict],
        -ACTION_RANK[fault.action],
        fault.since,
        fault.check,
        fault.code,
    )


def _why(record: FaultRecord) -> str:
    if record.check is Check.XID:
        return f"{xid_source(record.code)}: "
    row = row_of(record.check, record.code)
    return f"{row.why}; " if row else ""


def _tried(lives: tuple[Life, ...]) -> str:
    boots = len({life.boot_id for life in lives}) - 1
    resets = len(lives) - 1 - boots
    parts = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((resets, "reset"), (boots, "reboot"))
        if count
    ]
    return " and ".join(parts)
