"""What the agent's own configuration declares about the partitions of its GPUs.

A file in mig-parted's format with the name of one of its configurations says it for boards and
indices; layouts of single GPUs win over the file, a UUID wins over an index, an index over "all":

    mig:
      file: /etc/stoker/mig.yaml
      config: mixed
      gpus:
        "0": 3g.40gb, 2x1g.10gb
        GPU-8f6a...: "off"
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from stoker.agent.partitions import GpuPartitions
from stoker.core.config import option
from stoker.core.errors import BadInput, shown
from stoker.core.mig.files import parse_mig_file, wanted_of
from stoker.core.mig.geometry import Wanted
from stoker.core.mig.reports import MigEntry

ALL = "all"
OFF = "off"  # MIG mode off
EMPTY = "empty"  # MIG mode on, and no instance
# A configuration is written by hand; what is larger is some other file.
FILE_BYTES_MAX = 1 << 20
# What is declared is called so where the file gives it no name.
OWN_NAME = "agent configuration"

_NONE: Mapping[str, str] = MappingProxyType({})
_DEVICE = re.compile(r"(?:(\d{1,2})x)?((?:\d+c\.)?\d+g\.\d+gb(?:[+-][a-z.]+)?)", re.ASCII)
_INDEX = re.compile(r"\d{1,3}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigConfig:
    """The partitions (MIG) that the GPUs of this node are to have."""

    file: Path | None = option(None, "File in mig-parted's format; needs mig.config.")
    config: str = option("", "The one of its configurations that this node is to have.")
    gpus: Mapping[str, str] = option(
        _NONE,
        "Layouts by GPU (index, UUID, or all), such as '3g.40gb, 2x1g.10gb', 'empty', or 'off'.",
    )


@dataclass(frozen=True, slots=True)
class Declaration:
    """What is declared, understood as far as that goes before the boards are known."""

    config: str  # its name, for people
    entries: tuple[MigEntry, ...] = ()
    gpus: tuple[tuple[str, Wanted], ...] = ()  # by index, UUID, or ALL

    @property
    def is_empty(self) -> bool:
        """Whether nothing is declared."""
        return not (self.entries or self.gpus)


def declare(written: MigConfig) -> Declaration:
    """Return what a configuration declares; raises BadInput that names the key and the value."""
    gpus = [(_checked_gpu(key), _parse(key, text)) for key, text in written.gpus.items()]
    names = [name for name, _ in gpus]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"mig.gpus: {twice} is given twice")
    entries = _entries(written)
    name = written.config or (OWN_NAME if gpus else "")
    return Declaration(name, entries, tuple(gpus))


def wanted_by(declared: Declaration, gpus: Sequence[GpuPartitions]) -> Mapping[str, Wanted]:
    """Return what is declared for which of these GPUs, by UUID; raises BadInput."""
    wanted = dict(wanted_of(declared.entries, gpus))
    own = dict(declared.gpus)
    for gpu in gpus:
        named = next((own[name] for name in (gpu.uuid, str(gpu.index), ALL) if name in own), None)
        if named is not None:
            wanted[gpu.uuid] = named
    return wanted


def _entries(written: MigConfig) -> tuple[MigEntry, ...]:
    file = written.file
    if file is None:
        if written.config:
            raise BadInput(f"mig.config: {shown(written.config)} is of no use without mig.file")
        return ()
    if not written.config:
        raise BadInput(f"mig.file: {file} is of no use without mig.config")
    configs = parse_mig_file(_read(file), f"mig.file: {file}").configs
    if written.config not in configs:
        known = ", ".join(sorted(configs)) or "none"
        raise BadInput(f"mig.config: {file} has no {shown(written.config)}; it has {known}")
    return configs[written.config]


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadInput(f"mig.file: {file} cannot be read: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise BadInput(f"mig.file: {file} is larger than {FILE_BYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"mig.file: {file} is not UTF-8 at byte {error.start}") from error


def _checked_gpu(key: str) -> str:
    if key == ALL or key.startswith("GPU-"):
        return key
    if not _INDEX.fullmatch(key):
        raise BadInput(f"mig.gpus: wanted an index, a UUID (GPU-...) or all, found {shown(key)}")
    return str(int(key))


def _parse(key: str, text: str) -> Wanted:
    """Return a layout as it is written: devices with commas or spaces between, OFF or EMPTY."""
    if text.strip() in {OFF, EMPTY}:
        return Wanted(is_enabled=text.strip() == EMPTY)
    counts: dict[str, int] = {}
    for part in re.split(r"[\s,]+", text.strip()):
        found = _DEVICE.fullmatch(part)
        if found is None or found[1] == "0":
            raise BadInput(
                f"mig.gpus: {key}: wanted {OFF}, {EMPTY}, or devices such as "
                f"'3g.40gb, 2x1g.10gb', found {shown(part)}"
            )
        counts[found[2]] = counts.get(found[2], 0) + int(found[1] or 1)
    return Wanted(is_enabled=True, devices=tuple(counts.items()))
