"""What stands beside the driver: fabric manager, container engines, kernel log, root helper."""

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
    unseen,
    warning,
)
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    ContainersFacts,
    FabricFacts,
    HostFacts,
    LogLine,
    ModuleFacts,
    Observed,
    Unit,
    Unseen,
)
from stoker.agent.doctor.repairs import advice, status_of
from stoker.agent.doctor.units import FABRIC_MANAGER, HELPER
from stoker.agent.health.meanings import Meaning
from stoker.agent.health.policy import Policy
from stoker.agent.health.xids import xid_name
from stoker.agent.verdicts import Check

# What is older was met and mended, or is told by the GPU's state.
LOG_SECONDS = 86_400.0
_DETAILS_MAX = 8
_POLICY = Policy()


def check_fabric_manager(observed: Observed) -> Judged:
    """Where there are NVSwitches: does the fabric manager run, in the driver's version?"""
    bus = observed.bus
    if isinstance(bus, Unseen):
        return unseen(bus)
    if not bus.switches:
        return ok("not needed: no NVSwitch on the bus")
    if isinstance(observed.host, HostFacts) and observed.host.container:
        return unknown("not to be seen from within a container")
    fabric, services = observed.fabric, observed.services
    version = _driver_version(observed)
    if isinstance(fabric, FabricFacts) and fabric.path is None:
        return critical(
            "not installed, and NVSwitches need it: CUDA does not start",
            f"install nvidia-fabricmanager{f' {version}' if version else ''}, then "
            f"`systemctl enable --now {FABRIC_MANAGER}`",
        )
    installed = fabric.version if isinstance(fabric, FabricFacts) else None
    if version is not None and installed is not None and installed != version:
        return critical(
            f"fabric manager {installed}, kernel module {version}: it refuses to run",
            f"install nvidia-fabricmanager {version}, then `systemctl restart {FABRIC_MANAGER}`",
        )
    if isinstance(services, Unseen):
        return unseen(services)
    unit = services.unit(FABRIC_MANAGER)
    if unit is None or unit.load == "not-found":
        return unknown(f"installed, and systemd knows no {FABRIC_MANAGER}")
    if unit.active != "active":
        return critical(
            f"{_words(unit)}: CUDA does not start",
            f"`journalctl -u {FABRIC_MANAGER}` says why; then `systemctl restart {FABRIC_MANAGER}`",
        )
    return ok(f"{installed or 'of unknown version'}, runs")


def check_containers(observed: Observed) -> Judged:
    """Can containers be given GPUs, and do they keep them?"""
    if isinstance(observed.host, HostFacts) and observed.host.container:
        return ok(f"this is one ({observed.host.container}); look at the host for how it gets GPUs")
    containers = observed.containers
    if isinstance(containers, Unseen):
        return unseen(containers)
    if not containers.engines:
        return ok("no container engine is installed")
    if no_gpu(observed):
        return follows(Name.BUS, "no GPU to give to containers")
    return (
        _unequipped(containers)
        or _outdated(containers, _driver_version(observed))
        or _losing(observed, containers)
        or ok(_equipped(containers))
    )


def check_kernel_log(observed: Observed) -> Judged:
    """Has the kernel told of GPU faults lately?"""
    log = observed.kernel_log
    if isinstance(log, Unseen):
        return unseen(
            log, "look as root, or with the root helper beside the agent: `dmesg | grep -i xid`"
        )
    recent = [line for line in log.lines if log.now - line.at <= LOG_SECONDS]
    if not recent:
        older = f"; {counted(len(log.lines), 'older one')}" if log.lines else ""
        return ok(f"no Xid within a day{older} ({log.source})")
    graver = sorted(recent, key=lambda line: (-_status(line).weight, -line.at))
    counts: dict[str, int] = {}
    for line in graver:
        counts[_title(line)] = counts.get(_title(line), 0) + 1
    told = [f"{title} ({count}x)" if count > 1 else title for title, count in counts.items()]
    mends = dict.fromkeys(_advice(line) for line in graver if _status(line) is not Status.OK)
    details = tuple(_detail(line, log.now) for line in graver[:_DETAILS_MAX])
    return Judged(_status(graver[0]), f"within a day: {listed(told)}", tuple(mends), details)


def check_helper(observed: Observed) -> Judged:
    """Is the root helper there, where the agent needs it?"""
    helper, agent = observed.helper, observed.agent
    if isinstance(helper, Unseen):
        return unseen(helper)
    if isinstance(agent, AgentFacts) and agent.status is not None:
        blind = agent.status.blind
        if agent.user is not None and agent.user.uid == 0:
            return ok("not needed: the agent runs as root")
        if not blind:
            return ok("the agent sees all that there is to see")
        return warning(
            f"the agent cannot see {len(blind)} things",
            f"`systemctl enable --now {HELPER}`, or run the agent as root",
            details=blind,
        )
    if helper.is_there:
        return ok(f"answers at {helper.path}")
    return follows(Name.AGENT, helper.why.partition(": ")[2] or helper.why)


def _driver_version(observed: Observed) -> str | None:
    return observed.module.version if isinstance(observed.module, ModuleFacts) else None


def _words(unit: Unit) -> str:
    result = f" ({unit.result})" if unit.result not in ("", "success") else ""
    return f"{unit.active}{result}"


def _unequipped(containers: ContainersFacts) -> Judged | None:
    """Return which engines cannot give GPUs to containers."""
    if containers.specs:
        return None  # every engine of today takes what is described so
    without = [each.name for each in containers.engines if not each.has_runtime]
    unreadable = [
        each.config for each in containers.engines if each.config and each.has_runtime is None
    ]
    if unreadable:
        return unknown(f"not readable: {listed(unreadable)}")
    if not without:
        return None
    if containers.toolkit is None:
        return warning(
            f"{listed(without)} without NVIDIA's runtime: the container toolkit is not installed",
            "install nvidia-container-toolkit, then `nvidia-ctk runtime configure --runtime="
            f"{without[0]}` and restart {without[0]}",
        )
    how = [
        f"`nvidia-ctk runtime configure --runtime={name.replace('-', '')}`, then restart {name}"
        for name in without
        if name != "podman"
    ]
    return warning(
        f"neither NVIDIA's runtime nor a CDI description of the GPUs for {listed(without)}",
        *(how or ("`nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`",)),
    )


def _outdated(containers: ContainersFacts, version: str | None) -> Judged | None:
    """Return which descriptions are of another driver: containers fail to start with them."""
    if version is None:
        return None
    for spec in containers.specs:
        others = [each for each in spec.versions if each != version]
        if others:
            return warning(
                f"{spec.path} is of driver {listed(others)}, loaded is {version}",
                f"make it anew: `nvidia-ctk cdi generate --output={spec.path}`",
            )
    return None


def _losing(observed: Observed, containers: ContainersFacts) -> Judged | None:
    """Return whether containers lose their GPUs when systemd reloads its units."""
    devices, host = observed.devices, observed.host
    if isinstance(devices, Unseen) or devices.has_char_link or not devices.files:
        return None
    if containers.specs or not (isinstance(host, HostFacts) and host.has_systemd):
        return None
    return warning(
        "containers lose their GPUs at `systemctl daemon-reload`: /dev/char has no links to them",
        "`nvidia-ctk system create-dev-char-symlinks --create-all` after each boot, or give GPUs "
        "by CDI",
    )


def _equipped(containers: ContainersFacts) -> str:
    ways = [f"{each.name} by NVIDIA's runtime" for each in containers.engines if each.has_runtime]
    ways += [f"CDI ({each.path})" for each in containers.specs]
    return listed(ways)


def _meaning(line: LogLine) -> Meaning:
    return _POLICY.meaning(line.check, line.code)


def _status(line: LogLine) -> Status:
    return status_of(_meaning(line).verdict)


def _title(line: LogLine) -> str:
    if line.check is not Check.XID:
        return line.code.replace("_", " ")
    return f"Xid {line.code} {xid_name(int(line.code.partition('.')[0]))}"


def _advice(line: LogLine) -> str:
    return advice(_meaning(line).action, [f"{line.gpu}.0" if line.gpu else "of that line"])


def _detail(line: LogLine, now: float) -> str:
    minutes = max(0, round((now - line.at) / 60))
    ago = f"{minutes} min ago" if minutes < 120 else f"{minutes // 60} h ago"
    name = f"Xid {line.code}" if line.check is Check.XID else _title(line)
    return f"{ago}, {line.gpu or 'no GPU named'}: {name}: {line.text}"
