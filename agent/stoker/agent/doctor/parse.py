"""Texts of a host become values: what the kernel, systemd, engines and NVIDIA's tools write."""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from stoker.agent.doctor.observed import CdiSpec, Unit
from stoker.agent.helper.records import parse_record

# A version of NVIDIA's driver: "580.95.05", "550.135".
_VERSION = re.compile(r"\b(\d{3,}\.\d{1,3}(?:\.\d{1,3})?)\b")
_MODULES = ("nvidia", "nvidia_uvm", "nvidia_modeset", "nvidia_drm", "nouveau")


class _DaemonJson(msgspec.Struct, frozen=True):
    """The part of Docker's daemon.json that is read."""

    runtimes: dict[str, Any] = {}


def module_version(text: str) -> tuple[str | None, bool]:
    """Return the version in /proc/driver/nvidia/version, and whether the modules are the open ones.

    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (...)", or
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC 2025".
    """
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    _, _, rest = line.partition("Kernel Module")
    found = _VERSION.search(rest)
    return (found[1] if found else None), "Open Kernel Module" in line


def loaded_modules(text: str) -> tuple[str, ...]:
    """Return which of the modules that matter to GPUs /proc/modules lists as live."""
    live = {fields[0] for fields in map(str.split, text.splitlines()) if "Live" in fields}
    return tuple(name for name in _MODULES if name in live)


def has_module(modules_dep: str) -> bool:
    """Return whether modules.dep knows a module `nvidia`, whatever it is compressed with."""
    names = (line.partition(":")[0].rpartition("/")[2] for line in modules_dep.splitlines())
    return any(name.partition(".")[0] == "nvidia" for name in names)


def file_version(name: str) -> str | None:
    """Return the version in the name of a library: "libnvidia-ml.so.580.95.05"."""
    found = _VERSION.search(name.partition(".so.")[2])
    return found[1] if found else None


def tool_version(text: str) -> str | None:
    """Return the version that a tool prints: "Fabric Manager version is : 580.95.05"."""
    found = _VERSION.search(text)
    return found[1] if found else None


def loader_folders(text: str) -> tuple[list[str], list[str]]:
    """Return the folders and the included patterns of an ld.so.conf."""
    folders: list[str] = []
    includes: list[str] = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["include"]:
            includes += words[1:]
        elif words and words[0].startswith("/"):
            folders.append(words[0])
    return folders, includes


def units(text: str) -> tuple[Unit, ...]:
    """Return what `systemctl show` tells of units: blocks of KEY=VALUE, an empty line between."""
    found: list[Unit] = []
    for block in text.split("\n\n"):
        told = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in told:
            load, active, sub = (told.get(f"{key}State", "") for key in ("Load", "Active", "Sub"))
            found.append(Unit(told["Id"], load, active, sub, told.get("Result", "")))
    return tuple(found)


def has_docker_runtime(text: str) -> bool:
    """Return whether Docker's daemon.json names NVIDIA's runtime; raises ValueError."""
    found = msgspec.json.decode(text or "{}", type=_DaemonJson)
    return "nvidia" in json.dumps(found.runtimes)


def has_toml_runtime(text: str) -> bool:
    """Return whether the TOML of containerd or CRI-O has a runtime `nvidia`; raises ValueError."""
    return any("nvidia" in name for name in _runtimes(tomllib.loads(text)))


def cdi_spec(path: str, text: str) -> CdiSpec | None:
    """Return a CDI specification of NVIDIA's GPUs, or None when it is of something else."""
    if "nvidia.com/gpu" not in text:
        return None
    named = re.findall(r"/lib(?:cuda|nvidia-ml)\.so\.(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return CdiSpec(path, tuple(sorted(set(named))))


def kmsg_records(text: str) -> Iterable[tuple[float, str]]:
    """Yield seconds since boot and text of each record of the kernel, as /dev/kmsg has them."""
    for line in text.encode().split(b"\n"):
        record = parse_record(line)
        if record is not None:
            yield record.microseconds / 1e6, record.text


def short_address(pci_bus_id: str) -> str:
    """Return an address as the kernel writes it: "0000:53:00.0" for "00000000:53:00.0"."""
    domain, _, rest = pci_bus_id.casefold().partition(":")
    return f"{domain[-4:]}:{rest}"


def _runtimes(found: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names in every table `runtimes`, wherever it stands: versions differ in that."""
    for name, value in found.items():
        if isinstance(value, dict):
            if name == "runtimes":
                yield from value
            yield from _runtimes(value)  # pyright: ignore[reportUnknownArgumentType]
