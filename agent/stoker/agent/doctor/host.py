"""Looks at the files of a host: bus, kernel module, library, device files, MIG's instances."""

import glob
import os
import pwd
from collections.abc import Mapping

from stoker.agent.doctor.observed import (
    BusFacts,
    DeviceFile,
    DevicesFacts,
    GpuInstance,
    HostFacts,
    InstancesFacts,
    LibraryFacts,
    ModuleFacts,
    PciDevice,
    User,
)
from stoker.agent.doctor.parse import file_version, has_module, loaded_modules, loader_folders
from stoker.agent.doctor.parse import module_version as parse_module_version
from stoker.agent.doctor.roots import Roots

MODULE_VERSION = "/proc/driver/nvidia/version"
LIBRARY = "libnvidia-ml.so.1"
_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")  # a VGA controller, a 3D controller
_SWITCH_CLASS = "0x0680"  # a bridge of another kind: NVSwitch
_NO_ANSWER = b"\xff\xff\xff\xff"  # what a bus reads where no device answers
_BUS = "/sys/bus/pci/devices"
_CAPABILITIES = "/proc/driver/nvidia/capabilities"
_ELF_32 = b"\x7fELF\x01"
# Where the loader looks last, by itself.
_LAST_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
# The character device 195:255 is nvidiactl (Documentation/admin-guide/devices.txt of Linux).
_CHAR_LINK = "/dev/char/195:255"


def host(roots: Roots, environ: Mapping[str, str], user: User | None = None) -> HostFacts:
    """Return where this is, and who looks."""
    return HostFacts(
        user=user or User(os.geteuid(), (os.getegid(), *os.getgroups()), user_name(os.geteuid())),
        kernel=(roots.text_or_none("/proc/sys/kernel/osrelease") or "").strip(),
        container=_container(roots, environ),
        has_systemd=roots.exists("/run/systemd/system"),
    )


def user_name(uid: int) -> str:
    """Return the name of a user, or the number where there is no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def bus(roots: Roots) -> BusFacts:
    """Return NVIDIA's devices on the PCI bus."""
    gpus: list[PciDevice] = []
    switches: list[PciDevice] = []
    for address in roots.names(_BUS):
        folder = f"{_BUS}/{address}"
        if (roots.text_or_none(f"{folder}/vendor") or "").strip() != _NVIDIA:
            continue
        kind = (roots.text_or_none(f"{folder}/class") or "").strip()
        if kind.startswith(_GPU_CLASSES):
            gpus.append(_device(roots, address))
        elif kind.startswith(_SWITCH_CLASS):
            switches.append(_device(roots, address))
    return BusFacts(tuple(gpus), tuple(switches))


def module(roots: Roots) -> ModuleFacts:
    """Return the kernel's part of the driver."""
    told = roots.text_or_none(MODULE_VERSION)
    version, is_open = (None, None) if told is None else parse_module_version(told)
    kernel = (roots.text_or_none("/proc/sys/kernel/osrelease") or "").strip()
    loaded = _text_if_readable(roots, "/proc/modules")
    known = _text_if_readable(roots, f"/lib/modules/{kernel}/modules.dep") if kernel else None
    return ModuleFacts(
        version=version,
        is_open=is_open,
        loaded=None if loaded is None else loaded_modules(loaded),
        is_built=None if known is None else has_module(known),
        has_modprobe=roots.program("nvidia-modprobe") is not None,
    )


def library(roots: Roots, environ: Mapping[str, str]) -> LibraryFacts:
    """Return the library that the dynamic loader finds."""
    folders = _folders(roots, environ)
    for folder in folders:
        path = f"{folder}/{LIBRARY}"
        target = roots.target(path)
        if target is None or _is_for_32_bits(roots, target):
            continue  # as the loader passes over it
        return LibraryFacts(path, file_version(target), tuple(folders))
    return LibraryFacts(None, None, tuple(folders))


def devices(roots: Roots) -> DevicesFacts:
    """Return the driver's files in /dev."""
    files: list[DeviceFile] = []
    for name in roots.names("/dev"):
        number = name.removeprefix("nvidia")
        if name == number or not (number.isdigit() or number in ("ctl", "-uvm", "-modeset")):
            continue
        status = roots.path(f"/dev/{name}").stat()
        mode = status.st_mode & 0o777
        files.append(DeviceFile(f"/dev/{name}", mode, status.st_uid, status.st_gid))
    return DevicesFacts(tuple(files), roots.exists(_CHAR_LINK))


def instances(roots: Roots) -> InstancesFacts:
    """Return MIG's GPU instances, each with the number of its compute instances."""
    found: list[GpuInstance] = []
    for gpu in _numbered(roots, _CAPABILITIES, "gpu"):
        mig = f"{_CAPABILITIES}/gpu{gpu}/mig"
        for instance in _numbered(roots, mig, "gi"):
            parts = _numbered(roots, f"{mig}/gi{instance}", "ci")
            found.append(GpuInstance(gpu, instance, len(parts)))
    return InstancesFacts(tuple(found))


def _device(roots: Roots, address: str) -> PciDevice:
    try:
        driver = os.path.basename(os.readlink(roots.path(f"{_BUS}/{address}/driver")))
    except OSError:
        driver = None  # no driver has it
    try:
        with roots.path(f"{_BUS}/{address}/config").open("rb") as file:
            head = file.read(len(_NO_ANSWER))
        answers = None if len(head) < len(_NO_ANSWER) else head != _NO_ANSWER
    except OSError:
        answers = None
    return PciDevice(address, driver, answers)


def _text_if_readable(roots: Roots, absolute: str) -> str | None:
    try:
        return roots.text_or_none(absolute)
    except OSError:
        return None


def _container(roots: Roots, environ: Mapping[str, str]) -> str:
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "kubernetes"
    if roots.exists("/.dockerenv"):
        return "docker"
    if roots.exists("/run/.containerenv"):
        return "podman"
    return environ.get("container", "")


def _folders(roots: Roots, environ: Mapping[str, str]) -> list[str]:
    named = [each for each in environ.get("LD_LIBRARY_PATH", "").split(":") if each.startswith("/")]
    folders, includes = loader_folders(roots.text_or_none("/etc/ld.so.conf") or "")
    for pattern in includes:
        absolute = pattern if pattern.startswith("/") else f"/etc/{pattern}"
        for path in sorted(glob.glob(str(roots.path(absolute)))):
            inside = "/" + os.path.relpath(path, roots.root)
            folders += loader_folders(roots.text_or_none(inside) or "")[0]
    return list(dict.fromkeys([*named, *folders, *_LAST_FOLDERS]))


def _is_for_32_bits(roots: Roots, path: str) -> bool:
    try:
        with roots.path(path).open("rb") as file:
            return file.read(len(_ELF_32)) == _ELF_32
    except OSError:
        return False


def _numbered(roots: Roots, folder: str, prefix: str) -> list[int]:
    numbers = (name.removeprefix(prefix) for name in roots.names(folder) if name.startswith(prefix))
    return sorted(int(number) for number in numbers if number.isdigit())
