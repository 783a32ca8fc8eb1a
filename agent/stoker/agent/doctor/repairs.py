"""What a verdict of health is in Nagios' words, and what a person does about it."""

from collections.abc import Mapping, Sequence

from stoker.agent.doctor.findings import Status
from stoker.agent.verdicts import RepairAction, Verdict

_ADVICE: Mapping[RepairAction, str] = {
    RepairAction.NONE: "nothing is to be done now; look again if it comes back",
    RepairAction.RESTART_APP: "start the program that met it anew",
    RepairAction.DRAIN: "let its work end and place none on it, then look at what the check names",
    RepairAction.RESET_GPU: (
        "let its work end, then `stoker agent release`, `nvidia-smi --gpu-reset -i {names}`, "
        "`stoker agent resume`"
    ),
    RepairAction.REBOOT: "let the host's work end, then reboot",
    RepairAction.RMA: "take it out of service, have it inspected, and replace it",
}

_STATUS = {
    Verdict.HEALTHY: Status.OK,
    Verdict.DEGRADED: Status.WARNING,
    Verdict.UNHEALTHY: Status.CRITICAL,
    Verdict.UNKNOWN: Status.UNKNOWN,
}


def advice(action: RepairAction, names: Sequence[str]) -> str:
    """Return what to do about GPUs, each named as nvidia-smi takes it: index or PCI address."""
    who = ", ".join(f"GPU {name}" for name in names)
    return f"{who}: {_ADVICE[action].format(names=','.join(names))}"


def status_of(verdict: Verdict) -> Status:
    """Return how bad a verdict is for a host."""
    return _STATUS[verdict]
