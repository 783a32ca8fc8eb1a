"""Lines of the kernel's log become what they say about a GPU.

NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python3, GPU has fallen off the bus.
NVRM: Xid (0000:03:00): 31, Ch 0000000a, ...                   (drivers of long ago)
NVRM: Xid (PCI:0000:3b:00 GPU-I:05): 94, pid='<unknown>', ...  (of a MIG instance)
NVRM: Xid (PCI:0000:04:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 09 (0x004505c6 0x00000000 ...)
NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node ...)
NVRM: GPU at PCI:0000:3b:00: GPU-6a1f...                       (whose the next lines are)
NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.
NVRM: The NVIDIA GPU 0000:3b:00.0
NVRM: (PCI ID: 10de:2330) installed in this system has
NVRM: fallen off the bus and is not responding to commands.
NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x26:0x56:1474)
NVRM: loading NVIDIA UNIX x86_64 Kernel Module  535.129.03  ...
nvidia 0000:3b:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), type=Transaction Layer
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from stoker.agent.health.xids import (
    FALLEN_OFF_THE_BUS,
    NONFATAL,
    NVLINK5,
    RECOVERY_ACTION_CHANGED,
    RECOVERY_ACTIONS,
)

# Of a longer line the rest says nothing that is judged.
LINE_CHARACTERS_MAX = 1000
TEXT_CHARACTERS_MAX = 200
# Addresses whose UUID the log has told; a server has fewer GPUs.
NAMED_MAX = 64
# So many lines after its first the last of a message of several lines is still taken for its own.
LINES_APART_MAX = 8

PciAddress = tuple[int, int, int]  # domain, bus, device

_ADDRESS = r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(?:\.[0-7])?"
_UUID = r"GPU-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_DRIVER = "NVRM:"
_FIND_ADDRESS = re.compile(_ADDRESS)
_FIND_UUID = re.compile(_UUID)
_XID = re.compile(r"NVRM: Xid \(([^()]{1,128})\): (\d{1,5})\b(?:, ?(.*))?", re.DOTALL)
_PROCESS = re.compile(r"pid='?([^',]{1,16})'?, name=([^,]{1,64}), ?")
_UNIT = re.compile(
    r"([A-Z][A-Z0-9_]{1,31})(?:/[A-Z0-9_]{1,31})?\s+(Non-?fatal|Fatal)\b", re.IGNORECASE
)
_LINK = re.compile(r"\bLink (\d{1,3})\b")
_WORDS = re.compile(r"[(\[](0x[0-9a-fA-F]{1,8})")
_RECOVERY = re.compile(r"\bto 0x([0-9a-fA-F]{1,8})")
_NAMED = re.compile(rf"NVRM: GPU at (?:PCI:)?({_ADDRESS}): ({_UUID})")
_FALLEN = re.compile(r"fallen off the bus", re.IGNORECASE)
_FALLEN_BEGINS = re.compile(rf"NVRM: The NVIDIA GPU ({_ADDRESS})")
_INIT_FAILED = re.compile(r"RmInitAdapter failed")
_LOADED = re.compile(r"NVRM: loading NVIDIA UNIX\b.*?Kernel Module")
_AER = re.compile(
    rf"[\w-]+ ({_ADDRESS}): (?:AER: )?PCIe Bus Error: severity=(Uncorrect\S*)([^,]*)", re.IGNORECASE
)

# Bits 20 to 25 of the first word of an NVLink5 error say why; the others say where.
_REASON_SHIFT, _REASON_MASK = 20, 0x3F


class Happening(StrEnum):
    """What a line tells."""

    XID = "xid"
    FALLEN_OFF = "fallen_off"  # in words, without the Xid
    INIT_FAILED = "init_failed"
    PCIE_FATAL = "pcie_fatal"
    PCIE_NONFATAL = "pcie_nonfatal"
    DRIVER_LOADED = "driver_loaded"  # of all GPUs


@dataclass(frozen=True, slots=True)
class Told:
    """What one line, or several that belong together, told."""

    happening: Happening
    address: PciAddress | None = None
    uuid: str | None = None  # where the log names it
    number: int = 0  # of an Xid
    code: str = ""  # of an Xid: its number, and what else tells its kind
    text: str = ""  # what the log says, fit to be shown


def parse_address(text: str) -> PciAddress | None:
    """Return the PCI address in a text: "00000000:3B:00.0", "PCI:0000:3b:00"; None: there is none.

    The function is left out: all of a GPU's are its own.
    """
    found = _FIND_ADDRESS.search(text)
    if found is None:
        return None
    domain, bus, device = found[0].split(".")[0].split(":")
    return (int(domain, 16), int(bus, 16), int(device, 16))


class KernelLogReader:
    """Takes lines in their order; remembers what a message of several lines began with."""

    def __init__(self) -> None:
        self._named: dict[PciAddress, str] = {}
        self._falling: PciAddress | None = None  # the address in the first of several lines
        self._falling_lines = 0  # since then

    @property
    def is_amid(self) -> bool:
        """Whether a message has begun of which the last line is still to come."""
        return self._falling is not None

    def read(self, line: str) -> Told | None:
        """Return what the line tells of a GPU, once all lines of its message were taken.

        Only how a line begins says who speaks: what others print may quote a user's words, as
        overlayfs does with the options of a mount.
        """
        text = line.lstrip()[:LINE_CHARACTERS_MAX]
        if self._falling is not None:
            self._falling_lines += 1
            if self._falling_lines > LINES_APART_MAX:
                self._falling = None
        if aer := _AER.match(text):
            is_fatal = "(fatal)" in aer[3].lower()
            kind = Happening.PCIE_FATAL if is_fatal else Happening.PCIE_NONFATAL
            return self._told(kind, aer[1], text)
        if not text.startswith(_DRIVER):
            return None
        if xid := _XID.match(text):
            return self._xid(xid)
        if named := _NAMED.match(text):
            self._name(named)
            return None
        if _LOADED.match(text):
            return Told(Happening.DRIVER_LOADED)
        if _INIT_FAILED.search(text):
            return self._told(Happening.INIT_FAILED, text, text)
        return self._fallen(text)

    def _name(self, named: re.Match[str]) -> None:
        address = parse_address(named[1])
        if address is not None and (address in self._named or len(self._named) < NAMED_MAX):
            self._named[address] = named[2]

    def _fallen(self, text: str) -> Told | None:
        begins = _FALLEN_BEGINS.match(text)
        if begins:
            self._falling, self._falling_lines = parse_address(begins[1]), 0
        if not _FALLEN.search(text):
            return None
        where = parse_address(text) or self._falling
        self._falling = None
        return self._told(Happening.FALLEN_OFF, text, "GPU has fallen off the bus", where)

    def _xid(self, found: re.Match[str]) -> Told:
        number, rest = int(found[2]), found[3] or ""
        told = _PROCESS.match(rest)
        message = rest[told.end() :] if told else rest
        text = shown(message.strip().removesuffix("."))
        if told:
            text = f"{text} (pid {shown(told[1])}, {shown(told[2])})"
        code, text = _detailed(number, message, text)
        return self._told(Happening.XID, found[1], text, number=number, code=code)

    def _told(
        self,
        happening: Happening,
        where: str,
        text: str,
        address: PciAddress | None = None,
        *,
        number: int = 0,
        code: str = "",
    ) -> Told:
        address = address or parse_address(where)
        uuid = _FIND_UUID.search(where)
        name = uuid[0] if uuid else None
        if name is None and address is not None:
            name = self._named.get(address)
        if happening is Happening.FALLEN_OFF:
            number, code = FALLEN_OFF_THE_BUS, str(FALLEN_OFF_THE_BUS)
        return Told(happening, address, name, number, code, shown(text))


def shown(text: str) -> str:
    """Return a line of the log fit for a page or a terminal: one line, printable, not long."""
    plain = "".join(sign if sign.isprintable() else " " for sign in text)
    short = " ".join(plain.split())
    return short if len(short) <= TEXT_CHARACTERS_MAX else short[: TEXT_CHARACTERS_MAX - 3] + "..."


def _detailed(number: int, message: str, text: str) -> tuple[str, str]:
    """Return the code of an Xid, with what the log tells of its kind, and the text about it."""
    if number == RECOVERY_ACTION_CHANGED:
        changed = _RECOVERY.search(message)
        action = RECOVERY_ACTIONS.get(int(changed[1], 16)) if changed else None
        return (f"{number}.{action.code}" if action else str(number)), text
    unit = _UNIT.match(message.lstrip()) if number in NVLINK5 else None
    if unit is None:
        return str(number), text
    code = f"{number}.{unit[1].upper()}"
    if unit[2].lower() != "fatal":
        code += f".{NONFATAL}"
    words = _WORDS.search(message)
    if words:
        reason = int(words[1], 16) >> _REASON_SHIFT & _REASON_MASK
        link = _LINK.search(message)
        where = f"link {int(link[1])}, " if link else ""
        text = f"{where}reason {reason}: {text}"
    return code, text
