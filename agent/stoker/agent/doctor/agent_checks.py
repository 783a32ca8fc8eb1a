"""How the agent of this host is, and what it says of the GPUs."""

from typing import TYPE_CHECKING

from stoker.agent.doctor.driver_checks import no_gpu
from stoker.agent.doctor.findings import (
    Judged,
    Status,
    counted,
    critical,
    follows,
    listed,
    ok,
    unknown,
    warning,
)
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    DriverFacts,
    HelperFacts,
    Holder,
    Observed,
    ServicesFacts,
    Unseen,
)
from stoker.agent.doctor.repairs import advice, status_of
from stoker.agent.doctor.units import AGENT
from stoker.agent.verdicts import RepairAction, Verdict
from stoker.core.units import format_bytes, format_duration

if TYPE_CHECKING:
    from stoker.core.local import GpuFacts, HolderFacts
    from stoker.core.local import Status as AgentStatus

# A sample that is older: sampling has stopped, whatever the interval (60 s is the longest).
STALE_SECONDS = 90.0
_START = f"`systemctl enable --now {AGENT}`, or `stoker agent run`"


def check_agent(observed: Observed) -> Judged:
    """Does the agent run, and does it read the driver?"""
    agent = observed.agent
    if isinstance(agent, Unseen):
        return _silent(agent.why) if agent.why != "not looked at" else unknown(agent.why)
    status = agent.status
    if status is None:
        if agent.is_there:
            return _silent(agent.why)
        if no_gpu(observed):
            return follows(Name.BUS, "does not run, and there is no GPU to read")
        return _absent(observed, agent)
    if status.release is not None or status.driver.state == "released":
        return _released(status)
    if status.driver.state in ("blocked", "failed"):
        found = f"driver {status.driver.state}: {status.driver.reason}"
        return Judged(Status.CRITICAL, found, because_of=Name.DRIVER)
    age = status.last_success_age_seconds
    if status.driver.state == "starting":
        return warning(f"starting{_for(status)}", "wait; if it goes on, its driver host hangs")
    if age is None or age > STALE_SECONDS:
        last = "never" if age is None else f"{format_duration(age)} ago"
        return critical(f"reads nothing: the last sample was {last}", "`stoker agent status`")
    if status.release_unsaved:
        return warning(
            f"cannot write its journal: {status.release_unsaved}", "make room on its disk"
        )
    simulated = ", SIMULATED" if status.simulated else ""
    read = sum(gpu.is_read for gpu in status.gpus)
    count = counted(len(status.gpus), "GPU")
    return ok(f"stoker {status.version} reads {read} of {count}{simulated}")


def check_health(observed: Observed) -> Judged:
    """What does the agent say of each GPU?"""
    status = _status(observed)
    if isinstance(status, Judged):
        return status
    if status.release is not None:
        return follows(Name.AGENT, "no GPU is judged while the driver is released")
    bad = [gpu for gpu in status.gpus if gpu.verdict != Verdict.HEALTHY]
    if not bad:
        return ok(f"{counted(len(status.gpus), 'GPU')} healthy")
    bad.sort(key=lambda gpu: (-status_of(Verdict(gpu.verdict)).weight, gpu.index))
    worst = status_of(Verdict(bad[0].verdict))
    counts: dict[str, int] = {}
    for gpu in bad:
        counts[gpu.verdict] = counts.get(gpu.verdict, 0) + 1
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    actions = sorted({RepairAction(gpu.action) for gpu in bad}, key=_gravity, reverse=True)
    mends = tuple(
        advice(action, [str(gpu.index) for gpu in bad if gpu.action == action])
        for action in actions
        if action is not RepairAction.NONE
    )
    details = tuple(line for gpu in bad for line in _why(gpu))
    judged = f"{found} of {counted(len(status.gpus), 'GPU')}"
    if worst is Status.UNKNOWN and status.driver.state != "reading":
        return follows(Name.AGENT, judged)
    return Judged(worst, judged, mends, details)


def check_aggregator(observed: Observed) -> Judged:
    """Is the agent connected, so that the fleet knows this host?"""
    status = _status(observed)
    if isinstance(status, Judged):
        return status
    link = status.link
    to = listed(list(link.aggregators))
    if link.is_connected:
        lost = f", {link.frames_dropped} frames were dropped" if link.frames_dropped else ""
        return ok(f"connected to {to}{lost}")
    return warning(
        f"not connected to {to}: nothing is placed on this host",
        f"`stoker status --address {link.aggregators[0] if link.aggregators else 'HOST:PORT'}` "
        "from here says whether it can be reached; then the agent's log says why it is not let in",
    )


def check_memory(observed: Observed) -> Judged:
    """Is memory in use that no process accounts for?"""
    status = _status(observed)
    if isinstance(status, Judged):
        return status
    if status.release is not None:
        return follows(Name.AGENT, "not known while the driver is released")
    held = [
        (gpu, gpu.memory_unattributed_bytes) for gpu in status.gpus if gpu.memory_unattributed_bytes
    ]
    partitioned = _partitioned(observed)
    unknown_of = [gpu for gpu in status.gpus if gpu.memory_unattributed_bytes is None]
    untold = [f"GPU {gpu.index}" for gpu in unknown_of if gpu.uuid not in partitioned]
    if held:
        total = sum(size or 0 for _, size in held)
        details = [f"GPU {gpu.index}: {format_bytes(size or 0)}" for gpu, size in held]
        details += _holders(observed, status)
        return warning(
            f"{format_bytes(total)} on {listed([f'GPU {gpu.index}' for gpu, _ in held])} "
            "held by nobody",
            "find who has it: `fuser -v /dev/nvidia*` as root lists processes that the driver does "
            "not; end them",
            "where there is none, the driver has lost track of it: reset the GPU",
            details=tuple(details),
        )
    if untold:
        return unknown(f"the agent cannot tell of {listed(untold)}")
    without = "; of GPUs in MIG mode it cannot be told" if unknown_of else ""
    return ok(f"every MiB has an owner{without}")


def _partitioned(observed: Observed) -> set[str]:
    """Return the GPUs in MIG mode: of them the driver does not tell who has which memory."""
    driver = observed.driver
    if not isinstance(driver, DriverFacts) or driver.inventory is None:
        return set()
    return {gpu.uuid for gpu in driver.inventory.gpus if gpu.mig_enabled}


def _status(observed: Observed) -> "AgentStatus | Judged":
    """Return what the agent tells, or that nothing is known because it does not."""
    agent = observed.agent
    if isinstance(agent, AgentFacts) and agent.status is not None:
        return agent.status
    return follows(Name.AGENT, "the agent does not answer")


def _silent(why: str) -> Judged:
    return critical(
        f"there, and does not answer: {why}",
        f"`journalctl -u {AGENT}` says what it does; then `systemctl restart {AGENT}`",
    )


def _absent(observed: Observed, agent: AgentFacts) -> Judged:
    services = observed.services
    unit = services.unit(AGENT) if isinstance(services, ServicesFacts) else None
    if unit is not None and unit.active == "active":
        return critical(
            f"{AGENT} is active, and {agent.why}",
            "name its socket: --socket PATH, as its option `socket` has it",
        )
    if unit is not None and unit.load == "loaded":
        result = f" ({unit.result})" if unit.result not in ("", "success") else ""
        return critical(
            f"does not run: {AGENT} is {unit.active}{result}",
            f"`journalctl -u {AGENT}` says why; then `systemctl restart {AGENT}`",
        )
    return critical(f"does not run: {agent.why}", _START)


def _released(status: "AgentStatus") -> Judged:
    release = status.release
    by = "" if release is None else f" by {release.by}"
    until = "until it is resumed"
    if release is not None and release.until is not None:
        until = f"for {format_duration(max(0.0, release.until - status.at))} more"
    return warning(
        f"the driver is released{by}, {until}",
        "`stoker agent resume` once whatever it was released for is done",
    )


def _for(status: "AgentStatus") -> str:
    since = status.driver.since
    lasted = "" if since is None else f" for {format_duration(status.at - since)}"
    call = status.driver.call
    return f"{lasted}, in {call.function}" if call else lasted


def _why(gpu: "GpuFacts") -> tuple[str, ...]:
    told = gpu.faults or ((gpu.reason,) if gpu.reason else ())
    return tuple(f"GPU {gpu.index} {gpu.verdict}: {each}" for each in told)


def _holders(observed: Observed, status: "AgentStatus") -> list[str]:
    """Return who has device files open and is not among the processes that the driver lists."""
    owners = {each.pid: each.owner for each in status.users.holders}
    told: dict[int, HolderFacts | Holder] = {each.pid: each for each in status.users.holders}
    if isinstance(observed.helper, HelperFacts):
        told |= {each.pid: each for each in observed.helper.holders}
    known = {each.pid for each in status.users.processes} | {status.driver.host_pid}
    lines: list[str] = []
    for pid, each in sorted(told.items()):
        if pid not in known:
            owner = f", {owners[pid]}" if owners.get(pid) else ""
            lines.append(
                f"PID {pid} ({each.user}{owner}) has {listed(each.devices)}: {each.command}"
            )
    return lines


def _gravity(action: RepairAction) -> int:
    return list(RepairAction).index(action)
