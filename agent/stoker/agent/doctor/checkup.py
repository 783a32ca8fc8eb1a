"""The table of checks: what is asked, of which looks, by which rule, and where that is from."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from stoker.agent.doctor.agent_checks import (
    check_agent,
    check_aggregator,
    check_health,
    check_memory,
)
from stoker.agent.doctor.driver_checks import (
    check_bus,
    check_device_files,
    check_driver,
    check_gpus,
    check_kernel_module,
    check_library,
    no_gpu,
)
from stoker.agent.doctor.findings import Finding, Judged, Status
from stoker.agent.doctor.gpu_checks import check_errors, check_mig, check_persistence
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import Look, Observed
from stoker.agent.doctor.service_checks import (
    check_containers,
    check_fabric_manager,
    check_helper,
    check_kernel_log,
)

# Of what is wrong, the summary names the gravest.
_NAMED_MAX = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One question about a host."""

    name: Name
    judge: Callable[[Observed], Judged]
    looks: tuple[Look, ...]
    source: str

    @property
    def question(self) -> str:
        """What it asks, for people."""
        return (self.judge.__doc__ or "").strip().splitlines()[0]


# What all of them go by: where they are, whether there is a GPU at all.
_PLACE = (Look.HOST, Look.BUS, Look.MODULE, Look.AGENT)

CHECKS: tuple[Check, ...] = (
    Check(
        Name.BUS,
        check_bus,
        _PLACE,
        "PCI: a read that no device answers is all ones; Linux, sysfs-bus-pci",
    ),
    Check(
        Name.KERNEL_MODULE,
        check_kernel_module,
        _PLACE,
        "NVIDIA driver's README; CUDA Installation Guide for Linux, Disabling Nouveau",
    ),
    Check(
        Name.LIBRARY,
        check_library,
        (*_PLACE, Look.LIBRARY),
        "nvml.h, NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    ),
    Check(
        Name.DEVICE_FILES,
        check_device_files,
        (*_PLACE, Look.DEVICES),
        "NVIDIA driver's README, How and when are the NVIDIA device files created?",
    ),
    Check(
        Name.DRIVER,
        check_driver,
        (*_PLACE, Look.LIBRARY, Look.DRIVER),
        "nvml.h, nvmlInit",
    ),
    Check(
        Name.GPUS,
        check_gpus,
        (*_PLACE, Look.DRIVER),
        "nvml.h, nvmlDeviceGetCount and NVML_ERROR_GPU_IS_LOST",
    ),
    Check(
        Name.ERRORS,
        check_errors,
        (*_PLACE, Look.DRIVER),
        "NVIDIA GPU Memory Error Management; nvml.h",
    ),
    Check(
        Name.MIG,
        check_mig,
        (*_PLACE, Look.DRIVER, Look.INSTANCES),
        "NVIDIA MIG User Guide; nvml.h, nvmlDeviceGetMigMode",
    ),
    Check(
        Name.PERSISTENCE,
        check_persistence,
        (*_PLACE, Look.DRIVER, Look.SERVICES),
        "NVIDIA Driver Persistence",
    ),
    Check(
        Name.FABRIC_MANAGER,
        check_fabric_manager,
        (*_PLACE, Look.FABRIC, Look.SERVICES),
        "NVIDIA Fabric Manager User Guide",
    ),
    Check(
        Name.CONTAINERS,
        check_containers,
        (*_PLACE, Look.CONTAINERS, Look.DEVICES),
        "NVIDIA Container Toolkit: Installation, CDI, Troubleshooting",
    ),
    Check(
        Name.KERNEL_LOG,
        check_kernel_log,
        (*_PLACE, Look.KERNEL_LOG),
        "NVIDIA Xid Catalog; the agent's table of Xids",
    ),
    Check(
        Name.HELPER,
        check_helper,
        (*_PLACE, Look.HELPER),
        "stoker: what an agent without root needs it for",
    ),
    Check(
        Name.AGENT,
        check_agent,
        (*_PLACE, Look.SERVICES),
        "stoker: `stoker agent status`",
    ),
    Check(Name.HEALTH, check_health, _PLACE, "stoker: the agent's verdicts, from history"),
    Check(Name.AGGREGATOR, check_aggregator, _PLACE, "stoker: the agent's link"),
    Check(
        Name.MEMORY,
        check_memory,
        (*_PLACE, Look.HELPER, Look.DRIVER),
        "stoker: memory in use less that of all processes",
    ),
)


def chosen(only: Collection[Name], without: Collection[Name]) -> tuple[Check, ...]:
    """Return the checks of these names (all, where none is named) but for those left out."""
    return tuple(
        check for check in CHECKS if (not only or check.name in only) and check.name not in without
    )


def looks_of(checks: Sequence[Check]) -> tuple[Look, ...]:
    """Return the looks that the checks need."""
    needed = {look for check in checks for look in check.looks}
    return tuple(look for look in Look if look in needed)


def examine(observed: Observed, checks: Sequence[Check] = CHECKS) -> tuple[Finding, ...]:
    """Return what each check finds, in their order."""
    found: list[Finding] = []
    for check in checks:
        told = check.judge(observed)
        found.append(
            Finding(
                name=check.name,
                status=told.status,
                found=told.found,
                advice=told.advice,
                details=told.details,
                because_of=told.because_of,
                source=check.source,
            )
        )
    return tuple(found)


def worst(findings: Sequence[Finding]) -> Status:
    """Return the status of the whole."""
    return max(
        (finding.status for finding in findings),
        key=lambda status: status.weight,
        default=Status.UNKNOWN,
    )


def gravest_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return what is wrong, the gravest first; what only follows from something else comes last."""
    wrong = [finding for finding in findings if finding.status is not Status.OK]
    return tuple(
        sorted(wrong, key=lambda finding: (bool(finding.because_of), -finding.status.weight))
    )


def summarize(findings: Sequence[Finding], observed: Observed) -> str:
    """Return the line that Nagios shows: the status, how many checks say so, and which."""
    status, wrong = worst(findings), gravest_first(findings)
    if not findings:
        return "UNKNOWN: no check was made"
    if status is Status.OK:
        return f"OK: {_checks(len(findings))}"
    if status is Status.UNKNOWN and no_gpu(observed):
        return "UNKNOWN: no NVIDIA GPU on this host"
    such = [finding for finding in wrong if finding.status is status]
    named = [f"{each.name}: {each.found}" for each in such[:_NAMED_MAX]]
    if len(such) > _NAMED_MAX:
        named.append(f"and {len(such) - _NAMED_MAX} more")
    counts = [
        f"{count} {word}"
        for other, word in ((Status.WARNING, "warning"), (Status.UNKNOWN, "unknown"))
        if other is not status and (count := sum(each.status is other for each in wrong))
    ]
    also = f" ({', '.join(counts)})" if counts else ""
    found = f"{len(such)} of {_checks(len(findings))}{also}: {'; '.join(named)}"
    # Nagios takes what follows a bar for figures.
    return f"{status.name}: {found}".replace("|", "/")


def _checks(count: int) -> str:
    return f"{count} check" if count == 1 else f"{count} checks"
