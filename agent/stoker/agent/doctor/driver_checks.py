"""Is there a GPU, and does its driver work: bus, kernel module, library, device files, NVML."""

from collections.abc import Sequence

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
    BusFacts,
    DeviceFile,
    DriverFacts,
    HostFacts,
    LibraryFacts,
    ModuleFacts,
    Observed,
    PciDevice,
    Trouble,
    Unseen,
    User,
    WhyNot,
)
from stoker.agent.doctor.parse import short_address
from stoker.agent.driver import DriverTimeout
from stoker.agent.readings import Inventory

# Drivers that give a whole GPU to a virtual machine: NVML of this host is not to count it.
_PASSED_THROUGH = ("vfio-pci", "pci-stub")
_NOUVEAU = (
    (
        "keep nouveau from loading: write `blacklist nouveau` and `options nouveau modeset=0` to "
        "/etc/modprobe.d/blacklist-nouveau.conf"
    ),
    "make the initial ramdisk anew (`update-initramfs -u`, or `dracut --force`), and reboot",
)
_LOAD_ANEW = (
    "end what uses the GPUs (`stoker agent release`; `fuser -v /dev/nvidia*` shows the rest)",
    (
        "load the new module: `modprobe -r nvidia_drm nvidia_modeset nvidia_uvm nvidia`, then "
        "`modprobe nvidia`; or reboot"
    ),
    "then `stoker agent resume`",
)
_FALLEN_OFF = (
    "let work on the other GPUs end, then reboot; power the host off and on if it is still gone",
    "if it comes back gone: reseat it, check its power cables and the slot, then replace it",
)
_DEVICE_FILES = "make them: `nvidia-modprobe -u -c N` for each GPU N, or `nvidia-smi` as root"


def no_gpu(observed: Observed) -> bool:
    """Whether this host has no GPU of NVIDIA's, and nothing says that it should have one."""
    module, bus = observed.module, observed.bus
    if not isinstance(bus, BusFacts) or bus.gpus:
        return False
    if isinstance(module, ModuleFacts) and module.is_loaded:
        return False
    return not _known_to_agent(observed)


def check_bus(observed: Observed) -> Judged:
    """Is every GPU on the PCI bus, and does it answer there?"""
    bus = observed.bus
    if isinstance(bus, Unseen):
        return unseen(bus)
    if no_gpu(observed):
        return unknown(
            "no NVIDIA GPU on this host",
            "if there should be one: `lspci -d 10de:` lists what the kernel sees; check its seat, "
            "its power, and the firmware's settings of the slot",
        )
    silent = [gpu.address for gpu in bus.gpus if gpu.answers is False]
    if silent:
        return critical(
            f"{listed(silent)} does not answer on the bus: it fell off",
            *_FALLEN_OFF,
            details=tuple(f"{address} reads as all ones" for address in silent),
        )
    known = _known_to_agent(observed)
    if known > len(bus.gpus):
        return critical(
            f"{counted(len(bus.gpus), 'GPU')} on the bus, and the agent knows of {known}",
            *_FALLEN_OFF,
        )
    if not bus.gpus:
        return critical("no NVIDIA GPU, and the kernel module for them is loaded", *_FALLEN_OFF)
    given = [gpu.address for gpu in bus.gpus if gpu.driver in _PASSED_THROUGH]
    found = counted(len(bus.gpus), "GPU")
    if bus.switches:
        found += f", {len(bus.switches)} NVSwitch" + "es" * (len(bus.switches) != 1)
    if given:
        found += f"; given to virtual machines: {listed(given)}"
    return ok(found)


def check_kernel_module(observed: Observed) -> Judged:
    """Is the kernel module loaded, and no other one that takes its place?"""
    module = observed.module
    if isinstance(module, Unseen):
        return unseen(module)
    if no_gpu(observed):
        return follows(Name.BUS, "not loaded, and there is no GPU to load it for")
    has_nouveau = module.loaded is not None and "nouveau" in module.loaded
    taken = [gpu.address for gpu in _gpus(observed) if gpu.driver == "nouveau"]
    if module.is_loaded is None:
        return unknown("not to be seen here: neither its version nor the list of modules")
    if not module.is_loaded:
        return _unloaded(observed, module, has_nouveau=has_nouveau)
    if taken:
        return critical(f"nouveau has {listed(taken)}", *_NOUVEAU)
    kind = "open" if module.is_open else "proprietary"
    found = f"{module.version} ({kind}) is loaded" if module.version else "loaded"
    unbound = [gpu.address for gpu in _gpus(observed) if gpu.driver is None]
    if unbound:
        return warning(
            f"{found}, and no driver has {listed(unbound)}",
            "`dmesg | grep NVRM` says why it was not taken: a card that this driver does not know "
            "(or that needs the open kernel modules), or one that failed to start",
        )
    is_without_uvm = module.loaded is not None and "nvidia_uvm" not in module.loaded
    if is_without_uvm and not module.has_modprobe:
        return warning(
            f"{found}, nvidia_uvm is not: CUDA cannot start",
            "`modprobe nvidia_uvm`, and install nvidia-modprobe, which does it when it is needed",
        )
    return ok(found)


def check_library(observed: Observed) -> Judged:
    """Is NVML's library there, and of the same version as the kernel module?"""
    library, module = observed.library, observed.module
    if isinstance(library, Unseen):
        return unseen(library)
    if library.path is None:
        return _no_library(observed, library)
    version = None if isinstance(module, Unseen) else module.version
    if library.version is None:
        return ok(f"{library.path}, whose name does not tell its version")
    if version is not None and version != library.version:
        return critical(
            f"library {library.version}, kernel module {version}: the driver was replaced and the "
            "old module is still loaded",
            *_LOAD_ANEW,
        )
    return ok(f"{library.version}, {library.path}")


def check_device_files(observed: Observed) -> Judged:
    """Are the files in /dev there, and may the agent's user open them?"""
    devices, module = observed.devices, observed.module
    if isinstance(devices, Unseen):
        return unseen(devices)
    if no_gpu(observed):
        return follows(Name.BUS, "no GPU on this host")
    if isinstance(module, ModuleFacts) and module.is_loaded is False:
        return follows(Name.KERNEL_MODULE, "the kernel module is not loaded")
    paths = {each.path for each in devices.files}
    numbered = [path for path in paths if path[len("/dev/nvidia") :].isdigit()]
    wanted = len([gpu for gpu in _gpus(observed) if gpu.driver == "nvidia"])
    lacking = [path for path in ("/dev/nvidiactl",) if path not in paths]
    if lacking or (len(numbered) < wanted and not _container(observed)):
        found = f"{listed(lacking)} is not there" if lacking else ""
        few = f"{len(numbered)} of {wanted} files /dev/nvidiaN are there"
        return critical(found or few, _DEVICE_FILES)
    refused = _refused(observed, devices.files)
    if refused is not None:
        return refused
    if "/dev/nvidia-uvm" not in paths:
        return warning("/dev/nvidia-uvm is not there: CUDA cannot start", _DEVICE_FILES)
    return ok(f"{counted(len(devices.files), 'file')}, open to {_whom(observed)}")


def check_driver(observed: Observed) -> Judged:
    """Does NVML answer?"""
    driver = observed.driver
    if isinstance(driver, Unseen):
        return (
            unseen(driver)
            if driver.why == "not looked at"
            else critical(f"hangs: {driver.why}", *_HUNG)
        )
    if driver.reason is not None:
        return _not_asked(observed, driver, driver.reason)
    if driver.stuck:
        return critical(f"hangs: {driver.stuck}", *_HUNG)
    trouble, inventory = driver.trouble, driver.inventory
    if inventory is None:
        assert trouble is not None
        return _trouble(observed, trouble)
    if trouble is not None:
        return critical(f"hangs: {_by_index(trouble, inventory)}", *_HUNG)
    version = inventory.driver_version or "of unknown version"
    count = counted(len(inventory.gpus) + len(inventory.missing), "GPU")
    return ok(f"{version} answers: {count}")


def check_gpus(observed: Observed) -> Judged:
    """Does the driver count and read every GPU that is on the bus?"""
    driver = observed.driver
    if (blocked := follows_driver(observed)) is not None:
        return blocked
    assert isinstance(driver, DriverFacts)
    inventory = driver.inventory
    assert inventory is not None
    wrong = [f"GPU {fault.index}: {fault.message}" for fault in inventory.missing]
    lost = {
        reading.uuid: next(each.message for each in reading.failures if each.fact == "gpu")
        for reading in driver.readings
        if reading.is_lost
    }
    wrong += [f"GPU {gpu.index}: {lost[gpu.uuid]}" for gpu in inventory.gpus if gpu.uuid in lost]
    on_bus = [gpu.address for gpu in _gpus(observed) if gpu.driver not in _PASSED_THROUGH]
    count = len(inventory.gpus) + len(inventory.missing)
    if count < len(on_bus) and not _container(observed):
        known = {short_address(gpu.pci_bus_id) for gpu in inventory.gpus if gpu.pci_bus_id}
        unknown_ones = [address for address in on_bus if address not in known]
        wrong += [f"{address} is on the bus, and the driver does not count it" for address in (
            unknown_ones if len(unknown_ones) == len(on_bus) - count else ()
        )]  # fmt: skip
        found = f"the driver counts {count} of {counted(len(on_bus), 'GPU')} on the bus"
        return critical(found, *_FALLEN_OFF, details=tuple(wrong))
    if wrong:
        found = f"{len(wrong)} of {counted(count, 'GPU')} cannot be read"
        return critical(found, *_UNREADABLE, details=tuple(wrong))
    return ok(f"{counted(count, 'GPU')}, all read")


def follows_driver(observed: Observed) -> Judged | None:
    """Return why nothing is known from NVML, or None when something is."""
    if no_gpu(observed):
        return follows(Name.BUS, "no GPU on this host")
    driver = observed.driver
    if isinstance(driver, Unseen):
        return follows(Name.DRIVER, "the driver did not answer")
    if driver.inventory is not None:
        return None
    return follows(Name.DRIVER, "the driver was not asked" if driver.why_not else "no answer")


_HUNG = (
    "let work end where it still does, and reboot: a hung driver is not mended otherwise",
    (
        "`dmesg | grep NVRM` may say which GPU hangs; without persistence mode the first look "
        "takes seconds for each GPU, and `--timeout 60s` waits for it"
    ),
)
_UNREADABLE = (
    "`stoker agent status` says how the agent judges it; a reset or a reboot mends most of it",
)


def _gpus(observed: Observed) -> Sequence[PciDevice]:
    return observed.bus.gpus if isinstance(observed.bus, BusFacts) else ()


def _container(observed: Observed) -> str:
    """Return which kind of container this is: it may have been given some GPUs of many."""
    return observed.host.container if isinstance(observed.host, HostFacts) else ""


def _known_to_agent(observed: Observed) -> int:
    """Return how many real GPUs the agent knows of."""
    agent = observed.agent
    if not isinstance(agent, AgentFacts) or agent.status is None or agent.status.simulated:
        return 0
    return len(agent.status.gpus)


def _unloaded(observed: Observed, module: ModuleFacts, *, has_nouveau: bool) -> Judged:
    kernel = observed.host.kernel if isinstance(observed.host, HostFacts) else ""
    if has_nouveau:
        return critical("nouveau is loaded in its place", *_NOUVEAU)
    if module.is_built is False:
        return critical(
            f"not loaded, and not built for this kernel ({kernel})",
            f"build it: `dkms autoinstall -k {kernel}` (needs that kernel's headers), or boot the "
            "kernel that it was built for; then `modprobe nvidia`",
        )
    return critical(
        "not loaded",
        "`modprobe nvidia`; where that fails, `dmesg | tail` says why: secure boot refuses a "
        "module that is not signed with a key it knows, or this driver does not know the card",
        *(() if module.is_built else ("no driver may be installed: install NVIDIA's",)),
    )


def _no_library(observed: Observed, library: LibraryFacts) -> Judged:
    if no_gpu(observed):
        return follows(Name.BUS, "not there, and no GPU to ask about")
    found = f"libnvidia-ml.so.1 is in none of {listed(list(library.folders), 3)}"
    if container := _container(observed):
        return critical(
            found,
            f"this is a container ({container}): run it with NVIDIA's runtime and "
            "NVIDIA_DRIVER_CAPABILITIES=utility, or give it the GPUs by CDI",
        )
    return critical(
        found,
        "install the driver's user-space libraries, of the version of the kernel module; then "
        "`ldconfig`",
    )


def _whom(observed: Observed) -> str:
    agent, host = observed.agent, observed.host
    if isinstance(agent, AgentFacts) and agent.user is not None:
        return f"the agent's user {agent.user.name}"
    return host.user.name if isinstance(host, HostFacts) else "nobody in particular"


def _refused(observed: Observed, files: Sequence[DeviceFile]) -> Judged | None:
    """Return whom the files refuse: the agent's user, or the one who looks."""
    agent, host = observed.agent, observed.host
    whose: list[tuple[User, str]] = []
    if isinstance(agent, AgentFacts) and agent.user is not None:
        whose.append((agent.user, f"the agent's user {agent.user.name}"))
    elif isinstance(host, HostFacts):
        whose.append((host.user, host.user.name))
    for user, name in whose:
        closed = [each.path for each in files if not each.admits(user)]
        if closed:
            modes = sorted({f"{each.mode:04o}" for each in files if each.path in closed})
            return critical(
                f"closed to {name} (mode {listed(modes)}): {listed(closed)}",
                f"open them: the driver's module options NVreg_DeviceFileMode, NVreg_DeviceFileGID "
                f"say who may (/proc/driver/nvidia/params shows them); or put {user.name} into the "
                "group of the files",
            )
    return None


def _not_asked(observed: Observed, driver: DriverFacts, reason: WhyNot) -> Judged:
    match reason:
        case WhyNot.UNLOADED:
            name = Name.BUS if no_gpu(observed) else Name.KERNEL_MODULE
            return follows(name, f"not asked: {driver.why_not}")
        case WhyNot.RELEASED | WhyNot.UNSAID | WhyNot.STARTING:
            return follows(Name.AGENT, f"not asked: {driver.why_not}")
        case WhyNot.HANGS:
            return critical(f"{driver.why_not}; it is not opened a second time", *_HUNG)
        case WhyNot.EARLIER:
            return critical(f"hangs: {driver.why_not}", *_HUNG)
        case WhyNot.BUSY:
            return unknown(f"not asked: {driver.why_not}", "look again once that has ended")
        case WhyNot.NO_LOCK:
            return unknown(f"not asked: {driver.why_not}", "run it where one can be written")


def _explained(observed: Observed) -> str | None:
    """Return the check that says why NVML cannot be opened, if one does."""
    checks = ((Name.LIBRARY, check_library), (Name.DEVICE_FILES, check_device_files))
    return next((name for name, check in checks if check(observed).status is Status.CRITICAL), None)


def _by_index(trouble: Trouble, inventory: Inventory) -> str:
    """Return what went wrong, with the GPU's index in place of its UUID."""
    places = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    places |= {fault.uuid: fault.index for fault in inventory.missing if fault.uuid}
    index = None if trouble.gpu is None else places.get(trouble.gpu)
    return trouble.text if index is None else trouble.text.replace(f"{trouble.gpu}", f"GPU {index}")


def _trouble(observed: Observed, trouble: Trouble) -> Judged:
    container = _container(observed)
    explained = _explained(observed)
    if explained is not None and trouble.kind != DriverTimeout.kind:
        return Judged(Status.CRITICAL, trouble.text, because_of=explained)
    match trouble.kind:
        case "library_mismatch":
            return critical(trouble.text, *_LOAD_ANEW)
        case "library_missing" if (
            isinstance(observed.library, LibraryFacts) and observed.library.path is None
        ):
            return follows(Name.LIBRARY, "no library to ask by")
        case "driver_not_loaded":
            return critical(trouble.text, "see the checks `kernel_module` and `device_files`")
        case "no_permission":
            return critical(trouble.text, "see the check `device_files`; ask as root")
        case "driver_timeout":
            return critical(f"hangs: {trouble.text}", *_HUNG)
        case _ if container:
            return critical(
                trouble.text,
                f"this container ({container}) has lost its GPUs, as `systemctl daemon-reload` on "
                "the host does: start it anew",
                "to keep it from coming back, see the check `containers` on the host",
            )
        case _:
            return critical(trouble.text, "`dmesg | grep NVRM` says what the kernel module met")
