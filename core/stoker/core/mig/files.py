"""Reading and writing what is wanted of GPUs, in the file format of NVIDIA's mig-parted (v1).

    version: v1
    mig-configs:
      balanced:
        - device-filter: ["0x233010DE", "0x233110DE"]
          devices: [0, 1]
          mig-enabled: true
          mig-devices:
            1g.10gb: 2
            2g.20gb: 1
            3g.40gb: 1
        - devices: all
          mig-enabled: false

What mig-parted refuses is refused here, and a little more: a key that is given twice, a filter that
no device could match, and an index below zero would pass there without effect. Whether a GPU offers
a profile is not the file's matter: one file serves many kinds of GPUs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from stoker.core.errors import BadInput, shown
from stoker.core.mig.geometry import Wanted
from stoker.core.mig.reports import MigEntry

VERSION = "v1"

_ALL = "all"
# Device and vendor as the driver packs them; after a colon the same of the subsystem.
_FILTER = re.compile(r"(0[xX][0-9a-fA-F]{1,8})(?::(0[xX][0-9a-fA-F]{1,8}))?", re.ASCII)
_DEVICE = re.compile(
    r"(?:[0-9]{1,3}c\.)?[0-9]{1,3}g\.[0-9]{1,6}gb"
    r"(?:[+-][a-zA-Z](?:[a-zA-Z0-9.]*[a-zA-Z0-9])?(?:,[a-zA-Z](?:[a-zA-Z0-9.]*[a-zA-Z0-9])?)*)?",
    re.ASCII,
)
# What both YAML 1.1 and 1.2 read as text without quotes, but for the words below.
_BARE = re.compile(
    r"[a-zA-Z][a-zA-Z0-9]*(?:[._+-][a-zA-Z0-9]+)*|[0-9]+[cg]\.[a-zA-Z0-9.+-]+", re.ASCII
)
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
# What PyYAML raises for scalars that are not what they look like (2024-02-31), or are tagged as
# what they are not (!!bool maybe).
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)
_KEYS = ("device-filter", "devices", "mig-enabled", "mig-devices")


@dataclass(frozen=True, slots=True)
class MigFile:
    """The configurations of a file by name, each a list of entries of which later ones win."""

    configs: Mapping[str, tuple[MigEntry, ...]]


class Gpu(Protocol):
    """What of a GPU an entry chooses by."""

    @property
    def index(self) -> int: ...

    @property
    def pci_device_id(self) -> int: ...

    @property
    def uuid(self) -> str: ...


def parse_mig_file(text: str, name: str) -> MigFile:
    """Return the configurations of the file called `name`.

    Raises BadInput with the line, the path of the offending key, what is wanted there and what was
    found.
    """
    root = _compose(text, name)
    at = _Place(name, "", root)
    top = dict(at.entries())
    if (version := top.pop("version", None)) is None:
        raise at.wrong("a version", "none")
    if version.text() != VERSION:
        raise version.wrong(f"version {VERSION}", shown(version.text()))
    configs = top.pop("mig-configs", None)
    for unknown in top.values():
        raise unknown.wrong("version and mig-configs", "an unknown key")
    if configs is None:
        return MigFile({})
    found = {key: _config(place) for key, place in configs.entries()}
    if not found:
        raise configs.wrong("at least one configuration", "none")
    return MigFile(found)


def render_mig_file(file: MigFile) -> str:
    """Return the file's text; parsed again it is the same."""
    tree: dict[str, Any] = {"version": VERSION}
    if file.configs:
        tree["mig-configs"] = {
            name: [_tree_of(entry) for entry in entries] for name, entries in file.configs.items()
        }
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, indent=2, width=1000
    )


def wanted_of(entries: Sequence[MigEntry], gpus: Sequence[Gpu]) -> dict[str, Wanted]:
    """Return what is wanted of each GPU by its UUID; later entries win, others are not in it.

    Raises BadInput when an entry chooses by the subsystem of a board: it is not known of a GPU.
    """
    wanted: dict[str, Wanted] = {}
    for entry in entries:
        devices = sorted((name, count) for name, count in entry.mig_devices.items() if count)
        for gpu in gpus:
            if _is_about(entry, gpu):
                wanted[gpu.uuid] = Wanted(entry.mig_enabled, tuple(devices))
    return wanted


# --- reading


def _compose(text: str, name: str) -> yaml.Node:
    """Return the tree of nodes, which know their lines and keep repeated keys apart."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise BadInput(f"{name}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{name}: not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise BadInput(f"{name}: nested too deeply") from error
    if root is None:
        raise BadInput(f"{name}: the file is empty; wanted version and mig-configs")
    return root


@dataclass(frozen=True, slots=True)
class _Place:
    """A node of the file, and the way to it."""

    file: str
    path: str  # "mig-configs.balanced[0].devices"; empty: the whole file
    node: yaml.Node

    def wrong(self, wanted: str, found: str) -> BadInput:
        """Return the error that says so."""
        line = self.node.start_mark.line + 1
        where = f"{self.file}, line {line}" + (f": {self.path}" if self.path else "")
        return BadInput(f"{where}: wanted {wanted}, found {found}")

    def entries(self) -> Iterator[tuple[str, "_Place"]]:
        """Yield keys and what is at them."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong("keys with values", self.kind())
        pairs: list[tuple[yaml.Node, yaml.Node]] = self.node.value
        seen: set[str] = set()
        for key_node, node in pairs:
            key_place = _Place(self.file, self.path, key_node)
            key = key_place.text(is_key=True)
            place = _Place(self.file, f"{self.path}.{key}" if self.path else key, node)
            if key in seen:
                raise place.wrong("a key once", "it again")
            seen.add(key)
            yield key, place

    def items(self) -> "list[_Place]":
        """Return the items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("a list", self.kind())
        nodes: list[yaml.Node] = self.node.value
        return [_Place(self.file, f"{self.path}[{i}]", node) for i, node in enumerate(nodes)]

    def text(self, *, is_key: bool = False) -> str:
        """Return a text."""
        value = self.value()
        if not isinstance(value, str):
            raise self.wrong("a key that is text" if is_key else "text", self.kind())
        return value

    def count(self) -> int:
        """Return a number that is not below zero."""
        value = self.value()
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong("a whole number from 0", self.kind())
        return value

    def truth(self) -> bool:
        """Return true or false."""
        value = self.value()
        if not isinstance(value, bool):
            raise self.wrong("true or false", self.kind())
        return value

    def value(self) -> object:
        """Return the value of a scalar; None for everything else."""
        if not isinstance(self.node, yaml.ScalarNode):
            return None
        constructor: Any = yaml.constructor.SafeConstructor()
        try:
            return constructor.construct_object(self.node)
        except _UNREADABLE as error:
            raise self.wrong("a value that YAML knows", shown(self.node.value)) from error

    def kind(self) -> str:
        """Return in words what is here."""
        if isinstance(self.node, yaml.MappingNode):
            return "keys with values"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        return shown(str(self.node.value)) if self.node.value else "nothing"


def _config(place: _Place) -> tuple[MigEntry, ...]:
    items = place.items()
    if not items:
        raise place.wrong("at least one entry", "none")
    return tuple(_entry(item) for item in items)


def _entry(place: _Place) -> MigEntry:
    given = dict(place.entries())
    for key, unknown in given.items():
        if key not in _KEYS:
            raise unknown.wrong(f"one of {', '.join(_KEYS)}", "an unknown key")
    for key in ("devices", "mig-enabled"):
        if key not in given:
            raise place.wrong(key, "none")
    is_enabled = given["mig-enabled"].truth()
    devices: dict[str, int] = {}
    if "mig-devices" in given:
        devices = _mig_devices(given["mig-devices"])
        if devices and not is_enabled:
            raise given["mig-devices"].wrong("none, as mig-enabled is false", ", ".join(devices))
    elif is_enabled:
        raise place.wrong("mig-devices, as mig-enabled is true", "none")
    return MigEntry(
        mig_enabled=is_enabled,
        device_filter=_filters(given["device-filter"]) if "device-filter" in given else (),
        devices=_indices(given["devices"]),
        mig_devices=devices,
    )


def _filters(place: _Place) -> tuple[str, ...]:
    is_list = isinstance(place.node, yaml.SequenceNode)
    given = place.items() if is_list else [place]
    if not is_list and place.text() == "":  # as mig-parted reads it: every GPU
        return ()
    for item in given:
        if _FILTER.fullmatch(item.text()) is None:
            raise item.wrong('a PCI device and vendor ID such as "0x233010DE"', shown(item.text()))
    return tuple(item.text() for item in given)


def _indices(place: _Place) -> tuple[int, ...] | None:
    if isinstance(place.node, yaml.SequenceNode):
        return tuple(item.count() for item in place.items())
    if place.value() != _ALL:
        raise place.wrong(f"{_ALL}, or a list of indices", place.kind())
    return None


def _mig_devices(place: _Place) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, count in place.entries():
        if _DEVICE.fullmatch(name) is None:
            raise count.wrong("the name of a MIG device such as 1g.10gb", shown(name))
        found[name] = count.count()
    if found and not any(found.values()):
        raise place.wrong("at least one MIG device", "only counts of 0")
    return found


# --- writing


class _Flow(list[Any]):
    """A list that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes as mig-parted does, so that a person sees few differences."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Write what is the same twice: readers of Kubernetes' kind do not all know anchors."""
        return True


def _written_text(dumper: Any, text: str) -> yaml.Node:
    is_bare = _BARE.fullmatch(text) is not None and text.lower() not in _NOT_TEXT
    style = None if is_bare else '"'
    node: yaml.Node = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


def _written_flow(dumper: yaml.SafeDumper, items: _Flow) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _written_text)
_Dumper.add_representer(_Flow, _written_flow)


def _tree_of(entry: MigEntry) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    if entry.device_filter:
        one = len(entry.device_filter) == 1
        tree["device-filter"] = entry.device_filter[0] if one else _Flow(entry.device_filter)
    tree["devices"] = _ALL if entry.devices is None else _Flow(entry.devices)
    tree["mig-enabled"] = entry.mig_enabled
    tree["mig-devices"] = dict(entry.mig_devices)
    return tree


# --- choosing


def _is_about(entry: MigEntry, gpu: Gpu) -> bool:
    if entry.devices is not None and gpu.index not in entry.devices:
        return False
    return not entry.device_filter or any(_matches(text, gpu) for text in entry.device_filter)


def _matches(text: str, gpu: Gpu) -> bool:
    found = _FILTER.fullmatch(text)
    if found is None:
        raise BadInput(f"device-filter {shown(text)}: wanted an ID such as 0x233010DE")
    if int(found[1], 16) != gpu.pci_device_id:
        return False
    if found[2] is not None:
        raise BadInput(
            f"device-filter {text}: GPU {gpu.index} is a {found[1]}, and which subsystem it has is "
            "not known here; wanted the ID without it"
        )
    return True
