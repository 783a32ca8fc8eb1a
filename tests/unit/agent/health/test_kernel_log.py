"""Lines of the kernel's log: every form that drivers have, what it says, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.health.kernel_log import (
    LINE_CHARACTERS_MAX,
    LINES_APART_MAX,
    NAMED_MAX,
    TEXT_CHARACTERS_MAX,
    Happening,
    KernelLogReader,
    Told,
    parse_address,
)

UUID = "GPU-6a1f2b3c-1234-5678-9abc-0123456789ab"
WHERE = (0, 0x3B, 0)


def xid(number: int, text: str = "", code: str = "", where: tuple[int, int, int] = WHERE) -> Told:
    return Told(Happening.XID, where, None, number, code or str(number), text)


def fallen(uuid: str | None = None, where: tuple[int, int, int] | None = WHERE) -> Told:
    return Told(Happening.FALLEN_OFF, where, uuid, 79, "79", "GPU has fallen off the bus")


# name, line, what it tells
ONE_LINE: list[tuple[str, str, Told | None]] = [
    (
        "with process",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python3, GPU has fallen off the bus.",
        xid(79, "GPU has fallen off the bus (pid 1234, python3)"),
    ),
    (
        "without process",
        "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
        xid(79, "GPU has fallen off the bus"),
    ),
    (
        "process unknown, quoted",
        (
            "NVRM: Xid (PCI:0000:3b:00): 119, pid='<unknown>', name=<unknown>, Timeout after 6s of "
            "waiting for RPC response from GPU1 GSP!"
        ),
        xid(
            119,
            "Timeout after 6s of waiting for RPC response from GPU1 GSP! "
            "(pid <unknown>, <unknown>)",
        ),
    ),
    (
        "process with odd name",
        "NVRM: Xid (PCI:0000:3b:00): 119, pid=1582259, name=nvc:[driver], Timeout",
        xid(119, "Timeout (pid 1582259, nvc:[driver])"),
    ),
    (
        "no PCI before the address, as old drivers write",
        "NVRM: Xid (0000:3b:00): 14, Channel 00000001",
        xid(14, "Channel 00000001"),
    ),
    ("with function", "NVRM: Xid (PCI:0000:3b:00.0): 31, Ch 0000000a", xid(31, "Ch 0000000a")),
    ("long domain", "NVRM: Xid (PCI:00000000:3B:00.0): 31, Ch 1", xid(31, "Ch 1")),
    (
        "domain that is not 0",
        "NVRM: Xid (PCI:0018:01:00): 13, Graphics Exception",
        xid(13, "Graphics Exception", where=(0x18, 1, 0)),
    ),
    (
        "of a MIG instance",
        "NVRM: Xid (PCI:0000:3b:00 GPU-I:05): 94, pid=789012, name=process, Contained",
        xid(94, "Contained (pid 789012, process)"),
    ),
    (
        "GPU by its UUID",
        f"NVRM: Xid ({UUID}): 48, DBE",
        Told(Happening.XID, None, UUID, 48, "48", "DBE"),
    ),
    ("number alone", "NVRM: Xid (PCI:0000:3b:00): 45", xid(45)),
    (
        "after a prefix of the journal: the kernel's own records have none",
        "kernel: [16450076.435595] NVRM: Xid (PCI:0000:3b:00): 94, Contained ECC error.",
        None,
    ),
    (
        "NVLink5, nonfatal",
        (
            "NVRM: Xid (PCI:0000:3b:00): 145, RLW_REMAP Nonfatal XC1 i0 Link 10 "
            "(0x00000004 0x00000040 0x00000000)"
        ),
        xid(
            145,
            "link 10, reason 0: RLW_REMAP Nonfatal XC1 i0 Link 10 "
            "(0x00000004 0x00000040 0x00000000)",
            "145.RLW_REMAP.nonfatal",
        ),
    ),
    (
        "NVLink5, fatal, with reason in bits 20 to 25",
        (
            "NVRM: Xid (PCI:0000:3b:00): 149, NETIR_LINK_EVT  Fatal   XC0 i0 Link 08 "
            "(0x004505c6 0x00000000)"
        ),
        xid(
            149,
            "link 8, reason 4: NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000)",
            "149.NETIR_LINK_EVT",
        ),
    ),
    (
        "NVLink5, two names of a unit, with process",
        (
            "NVRM: Xid (PCI:0000:3b:00): 149, pid=7, name=a, NETIR_LINK_EVT/NETIR_LINK_DOWN Fatal "
            "XC 1 i 2 Link 01 [0x0000000a]"
        ),
        xid(
            149,
            "link 1, reason 0: NETIR_LINK_EVT/NETIR_LINK_DOWN Fatal XC 1 i 2 Link 01 "
            "[0x0000000a] (pid 7, a)",
            "149.NETIR_LINK_EVT",
        ),
    ),
    (
        "NVLink5, without what it is about",
        "NVRM: Xid (PCI:0000:3b:00): 144, something new",
        xid(144, "something new"),
    ),
    (
        "recovery action",
        (
            "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 "
            "(Node Reboot Required)"
        ),
        xid(
            154,
            "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)",
            "154.REBOOT",
        ),
    ),
    (
        "recovery action of which nothing is known",
        "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 to 0x9 (New)",
        xid(154, "GPU recovery action changed from 0x0 to 0x9 (New)"),
    ),
    (
        "fallen off, no number",
        "NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.",
        fallen(),
    ),
    (
        "fallen off, no number, GPU named beside",
        f"NVRM: GPU at PCI:0000:3b:00: {UUID} has fallen off the bus.",
        None,  # it names the GPU; the words come in a line of their own
    ),
    (
        "fallen off, one record of several lines",
        (
            "NVRM: The NVIDIA GPU 0000:3b:00.0\nNVRM: (PCI ID: 10de:26b5) installed in this system "
            "has\nNVRM: fallen off the bus and is not responding to commands."
        ),
        fallen(),
    ),
    (
        "fallen off, all in one line",
        (
            "NVRM: The NVIDIA GPU 0000:3b:00.0 (PCI ID: 10de:2330) installed in this system has "
            "fallen off the bus and is not responding to commands."
        ),
        fallen(),
    ),
    (
        "cannot be initialized",
        "NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x26:0x56:1474)",
        Told(
            Happening.INIT_FAILED,
            WHERE,
            text="NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x26:0x56:1474)",
        ),
    ),
    (
        "driver loaded",
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
        Told(Happening.DRIVER_LOADED),
    ),
    (
        "driver loaded, open kernel module",
        "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
        Told(Happening.DRIVER_LOADED),
    ),
    (
        "PCIe error, fatal",
        (
            "nvidia 0000:3b:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), type=Transaction "
            "Layer, (Receiver ID)"
        ),
        Told(
            Happening.PCIE_FATAL,
            WHERE,
            text="nvidia 0000:3b:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), "
            "type=Transaction Layer, (Receiver ID)",
        ),
    ),
    (
        "PCIe error, not fatal, as newer kernels write",
        "nvidia 0000:3b:00.0: AER: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Data",
        Told(
            Happening.PCIE_NONFATAL,
            WHERE,
            text="nvidia 0000:3b:00.0: AER: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), "
            "type=Data",
        ),
    ),
    (
        "PCIe error, corrected: the driver's counter of replays tells",
        "nvidia 0000:3b:00.0: PCIe Bus Error: severity=Corrected, type=Data Link Layer",
        None,
    ),
    ("Xid without a number", "NVRM: Xid error: xyz, invalid data", None),
    ("something else of the driver", "NVRM: GPU0 nvAssertFailedNoLog: Assertion failed", None),
    ("a bus of another kind", "usb 1-1: device has fallen off the bus", None),
    (
        "Xid in the words of a user, who may mount as root of a namespace of his own",
        "overlayfs: failed to resolve 'NVRM: Xid (PCI:0000:3b:00): 79, fallen off the bus': -2",
        None,
    ),
    (
        "Xid in the words of a user, on a line of its own",
        "overlayfs: failed to resolve '\nNVRM: Xid (PCI:0000:3b:00): 79, fallen off the bus': -2",
        None,
    ),
    (
        "driver loaded in the words of a user",
        'overlayfs: unrecognized mount option "NVRM: loading NVIDIA UNIX Kernel Module"',
        None,
    ),
    (
        "PCIe error in the words of a user",
        "overlayfs: failed: 'nvidia 0000:3b:00.0: PCIe Bus Error: severity=Uncorrected (Fatal)'",
        None,
    ),
    ("nothing", "", None),
]


@pytest.mark.parametrize(
    ("line", "told"), [row[1:] for row in ONE_LINE], ids=[r[0] for r in ONE_LINE]
)
def test_line(line: str, told: Told | None) -> None:
    assert KernelLogReader().read(line) == told


def test_message_of_several_lines_is_told_with_its_last() -> None:
    reader = KernelLogReader()
    assert reader.read("NVRM: The NVIDIA GPU 0000:3b:00.0") is None
    assert reader.read("NVRM: (PCI ID: 10de:26b5) installed in this system has") is None
    assert reader.read("NVRM: fallen off the bus and is not responding to commands.") == fallen()
    # What comes after it is not about that GPU any more.
    assert reader.read("NVRM: fallen off the bus and so on") == fallen(where=None)


def test_message_that_never_ends_is_given_up() -> None:
    reader = KernelLogReader()
    reader.read("NVRM: The NVIDIA GPU 0000:3b:00.0")
    for _ in range(LINES_APART_MAX):
        reader.read("usb 1-1: new device")
    assert reader.read("NVRM: fallen off the bus and is not responding to") == fallen(where=None)


def test_line_before_names_the_gpu_of_the_next() -> None:
    reader = KernelLogReader()
    assert reader.read(f"NVRM: GPU at PCI:0000:3b:00: {UUID}") is None
    assert reader.read("NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.") == fallen(UUID)


def test_names_are_remembered_up_to_a_bound() -> None:
    reader = KernelLogReader()
    for bus in range(NAMED_MAX + 1):
        reader.read(f"NVRM: GPU at PCI:0000:{bus:02x}:00: {UUID}")
    line = "NVRM: Xid (PCI:0000:{:02x}:00): 45"
    first, beyond = (reader.read(line.format(bus)) for bus in (0, NAMED_MAX))
    assert first is not None
    assert beyond is not None
    assert (first.uuid, beyond.uuid) == (UUID, None)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:53:00.0", (0, 0x53, 0)),
        ("0000:53:00.0", (0, 0x53, 0)),
        ("PCI:0000:53:00", (0, 0x53, 0)),
        ("00000001:0A:1F.0", (1, 10, 31)),
        ("10de:2330", None),
        ("", None),
    ],
)
def test_address(text: str, address: tuple[int, int, int] | None) -> None:
    assert parse_address(text) == address


_PIECES = st.sampled_from(
    [
        *("NVRM: ", "Xid ", "(PCI:0000:3b:00)", ": ", "145, ", "79, ", "154, ", "RLW_CTRL "),
        *("Fatal ", "Nonfatal ", "Link 03 ", "(0xffffffff ", "pid=1, name=a, ", "to 0xffffffff "),
        *("GPU at PCI:0000:3b:00: ", UUID, " fallen off the bus", "The NVIDIA GPU 0000:3b:00.0"),
        *("RmInitAdapter failed!", "PCIe Bus Error: severity=Uncorrected", "\n", "\x1b[31m", "("),
    ]
)


@given(st.lists(st.one_of(_PIECES, st.text(max_size=20)), max_size=12).map("".join))
def test_any_text_is_read_or_left(line: str) -> None:
    told = KernelLogReader().read(line)
    if told is not None:
        assert told.text.isprintable() or not told.text
        assert len(told.text) <= TEXT_CHARACTERS_MAX


def test_line_of_any_length_costs_the_same() -> None:
    line = "NVRM: Xid (PCI:0000:3b:00): 13, " + "x" * 10_000_000
    told = KernelLogReader().read(line)
    assert told is not None
    assert len(told.text) == TEXT_CHARACTERS_MAX
    assert LINE_CHARACTERS_MAX < 10_000_000
