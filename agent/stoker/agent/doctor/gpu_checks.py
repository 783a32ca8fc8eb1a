"""How each GPU is, as NVML tells at this moment: errors, MIG, persistence mode."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from stoker.agent.doctor.driver_checks import follows_driver
from stoker.agent.doctor.findings import Judged, Status, counted, listed, ok, several, warning
from stoker.agent.doctor.observed import (
    DriverFacts,
    HostFacts,
    InstancesFacts,
    Observed,
    ServicesFacts,
)
from stoker.agent.doctor.repairs import advice as advice_on
from stoker.agent.doctor.units import PERSISTENCED
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuIdentity, GpuReading
from stoker.agent.verdicts import RepairAction

# What the driver asks for by itself: nvmlDeviceGpuRecoveryAction_t.
_ASKS_RESET, _ASKS_REBOOT, _ASKS_DRAIN = (1, 4), 2, 3
_COOL = "check fans, filters, the room, and that the heat sink is seated"
_POWER = "check the power supplies and the cables of the board"
_SLOT = "reseat the card; try another slot or riser"


@dataclass(frozen=True, slots=True)
class Rule:
    """A fact that tells of a fault: when, how bad that is, and what to do."""

    fact: Fact
    status: Status
    says: Callable[[float], str | None]  # what is wrong, or None
    repair: RepairAction | str  # what mends it
    label: str | None = None  # of a fact with several values

    def mend(self, gpu: GpuIdentity) -> str:
        """Return what to do about that GPU."""
        if isinstance(self.repair, RepairAction):
            return advice_on(self.repair, [str(gpu.index)])
        return f"GPU {gpu.index}: {self.repair}"


@dataclass(frozen=True, slots=True)
class _Error:
    status: Status
    found: str
    mend: str
    gpu: int


def _if_any(text: str) -> Callable[[float], str | None]:
    return lambda value: text.format(count=int(value)) if value > 0 else None


# In the order of their gravity: the first advice of the page is that of the gravest.
RULES: tuple[Rule, ...] = (
    Rule(
        Fact.REMAPPED_ROWS_FAILED,
        Status.CRITICAL,
        _if_any("a memory row could not be replaced by a spare one"),
        RepairAction.RMA,
    ),
    Rule(
        Fact.RECOVERY_ACTION,
        Status.CRITICAL,
        lambda value: "the driver asks for a reboot" if value == _ASKS_REBOOT else None,
        RepairAction.REBOOT,
    ),
    Rule(
        Fact.RECOVERY_ACTION,
        Status.CRITICAL,
        lambda value: "the driver asks for a reset" if value in _ASKS_RESET else None,
        RepairAction.RESET_GPU,
    ),
    Rule(
        Fact.RECOVERY_ACTION,
        Status.CRITICAL,
        lambda value: "the driver asks that its work ends" if value == _ASKS_DRAIN else None,
        RepairAction.DRAIN,
    ),
    Rule(
        Fact.ECC_UNCORRECTED_VOLATILE_ERRORS,
        Status.WARNING,
        _if_any("{count} uncorrected memory errors since the driver was loaded"),
        RepairAction.RESET_GPU,
    ),
    Rule(
        Fact.REMAPPED_ROWS_PENDING,
        Status.WARNING,
        _if_any("a memory row is replaced at the next reset"),
        RepairAction.RESET_GPU,
    ),
    Rule(
        Fact.RETIRED_PAGES_PENDING,
        Status.WARNING,
        _if_any("a memory page is taken out of use at the next reset"),
        RepairAction.RESET_GPU,
    ),
    Rule(
        Fact.CLOCK_EVENT_ACTIVE,
        Status.WARNING,
        _if_any("it slows itself down for heat"),
        _COOL,
        label="hw_thermal_slowdown",
    ),
    Rule(
        Fact.CLOCK_EVENT_ACTIVE,
        Status.WARNING,
        _if_any("it is slowed down by the power brake"),
        _POWER,
        label="hw_power_brake_slowdown",
    ),
)


def check_errors(observed: Observed) -> Judged:
    """Does a GPU tell of errors?"""
    if (blocked := follows_driver(observed)) is not None:
        return blocked
    gpus = list(_read(observed))
    told = [
        _Error(rule.status, f"GPU {gpu.index}: {said}", rule.mend(gpu), gpu.index)
        for rule in RULES
        for gpu, reading in gpus
        if (said := _said(rule, reading))
    ]
    told += [
        _Error(Status.WARNING, f"GPU {gpu.index}: {said}", f"GPU {gpu.index}: {mend}", gpu.index)
        for gpu, reading in gpus
        for said, mend in (_narrow_link(reading), _dead_links(reading))
        if said
    ]
    if not told:
        return ok(f"none on {counted(len(gpus), 'GPU')}")
    # What mends the gravest error of a GPU mends the others as well, or comes before them.
    mends = {error.gpu: error.mend for error in reversed(told)}
    worst = max((error.status for error in told), key=lambda status: status.weight)
    advice = dict.fromkeys(mends[error.gpu] for error in told)
    return several(worst, [error.found for error in told], tuple(advice))


def check_mig(observed: Observed) -> Judged:
    """Is MIG as it was asked for, and can its instances be used?"""
    if (blocked := follows_driver(observed)) is not None:
        return blocked
    wrong: list[str] = []
    advice: dict[str, None] = {}
    on: list[int] = []
    listing = observed.instances
    instances = listing.instances if isinstance(listing, InstancesFacts) else ()
    for gpu, reading in _read(observed):
        mode, pending = _switch(reading, Fact.MIG_MODE), _switch(reading, Fact.MIG_MODE_PENDING)
        if mode is None:
            continue
        if mode:
            on.append(gpu.index)
        if pending is not None and pending != mode:
            words = {True: "on", False: "off"}
            wrong.append(
                f"GPU {gpu.index}: MIG is {words[mode]}, and {words[pending]} after a reset"
            )
            advice[advice_on(RepairAction.RESET_GPU, [str(gpu.index)])] = None
        if not mode:
            continue
        empty = [
            each.instance
            for each in instances
            if each.gpu == gpu.minor_number and not each.compute_instances
        ]
        if empty:
            named = ",".join(map(str, empty))
            wrong.append(f"GPU {gpu.index}: GPU instance {named} has no compute instance")
            advice[f"`nvidia-smi mig -cci -gi {named} -i {gpu.index}` makes it usable"] = None
        elif not reading.mig_devices:
            wrong.append(f"GPU {gpu.index}: MIG is on and has no device: nothing can use this GPU")
            advice["make instances (`nvidia-smi mig -cgi PROFILES -C`), or turn MIG off"] = None
    if wrong:
        return several(Status.WARNING, wrong, tuple(advice))
    return ok(f"on for {listed([f'GPU {index}' for index in on])}" if on else "off")


def check_persistence(observed: Observed) -> Judged:
    """Does the driver stay loaded while nobody uses the GPUs?"""
    if (blocked := follows_driver(observed)) is not None:
        return blocked
    told = {
        gpu.index: mode
        for gpu, reading in _read(observed)
        if (mode := _switch(reading, Fact.PERSISTENCE_MODE)) is not None
    }
    off = [f"GPU {index}" for index, mode in told.items() if not mode]
    if not told:
        return ok("not told by these GPUs")
    if not off:
        return ok(f"on for {counted(len(told), 'GPU')}")
    unit = (
        observed.services.unit(PERSISTENCED)
        if isinstance(observed.services, ServicesFacts)
        else None
    )
    state = "" if unit is None or unit.load == "not-found" else f"; {PERSISTENCED} is {unit.active}"
    is_inside = isinstance(observed.host, HostFacts) and observed.host.container
    return warning(
        f"off for {_all_or(off, told)}: the first call of each session takes seconds{state}",
        ("on the host: " if is_inside else "")
        + (
            f"`systemctl enable --now {PERSISTENCED}`; where it is not installed, "
            "`nvidia-smi -pm 1` after each boot"
        ),
    )


def _all_or(some: list[str], every: Mapping[int, bool]) -> str:
    return f"all {counted(len(every), 'GPU')}" if len(some) == len(every) > 1 else listed(some)


def _read(observed: Observed) -> Iterator[tuple[GpuIdentity, GpuReading]]:
    """Yield the GPUs that told something, in the driver's order."""
    driver = observed.driver
    assert isinstance(driver, DriverFacts)
    assert driver.inventory is not None
    readings: Mapping[str, GpuReading] = {
        reading.uuid: reading for reading in driver.readings if not reading.is_lost
    }
    for gpu in sorted(driver.inventory.gpus, key=lambda gpu: gpu.index):
        if gpu.uuid in readings:
            yield gpu, readings[gpu.uuid]


def _said(rule: Rule, reading: GpuReading) -> str | None:
    if rule.label is None:
        value = reading.facts.get(rule.fact)
    else:
        value = reading.by_label.get(rule.fact, {}).get(rule.label)
    return None if value is None else rule.says(value)


def _narrow_link(reading: GpuReading) -> tuple[str, str]:
    # The generation falls while a GPU idles, the width does not.
    width, most = (
        reading.facts.get(fact) for fact in (Fact.PCIE_LINK_WIDTH, Fact.PCIE_LINK_WIDTH_MAX)
    )
    if width is None or most is None or width >= most:
        return "", ""
    return f"{int(width)} of {int(most)} PCIe lanes are in use", _SLOT


def _dead_links(reading: GpuReading) -> tuple[str, str]:
    links = reading.by_label.get(Fact.NVLINK_UP, {})
    down = sorted((link for link, is_up in links.items() if not is_up), key=int)
    if not down or len(down) == len(links):
        return "", ""  # none are connected where all are down
    named = listed(down)
    return (
        f"NVLink {named} is down",
        "`nvidia-smi nvlink -s` shows it; reboot, then inspect the board",
    )


def _switch(reading: GpuReading, fact: Fact) -> bool | None:
    value = reading.facts.get(fact)
    return None if value is None else bool(value)
