"""What each Xid means: a table, with where that judgement is from.

An Xid is an error that the driver reports in the kernel's log, and most of them as an event too.
Names and immediate actions are those of NVIDIA's "Xid Catalog" (docs.nvidia.com/deploy/xid-errors,
Ampere and later); numbers that it calls unused are those of its archive for older GPUs, or left
out. Where others judge otherwise, the row's note says whom we follow, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from stoker.agent.health.meanings import (
    APPLICATION,
    DOUBTFUL,
    NEEDS_HANDS,
    NEEDS_REBOOT,
    NEEDS_RESET,
    NOTED,
    WORN,
    Ends,
    Meaning,
)
from stoker.agent.verdicts import RepairAction, Verdict

# Rises with every change of what is in the table.
TABLE_VERSION = 1


class Source(StrEnum):
    """Where a judgement is from."""

    CATALOG = "NVIDIA Xid catalog"
    ARCHIVE = "NVIDIA Xid errors, older GPUs"
    MEMORY = "NVIDIA GPU memory error management"
    PLUGIN = "k8s-device-plugin, errors of applications"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Xid:
    """One row."""

    number: int
    name: str
    meaning: Meaning
    source: Source
    note: str = ""
    is_of_hardware: bool = False  # else of a program, or of the driver


# Which unit of an NVLink of the fifth generation, and how badly, stands in the kernel's log only.
NVLINK5 = range(144, 151)
RECOVERY_ACTION_CHANGED = 154
FALLEN_OFF_THE_BUS = 79
# Ends the code of an NVLink5 error that the driver calls "Nonfatal".
NONFATAL = "nonfatal"

_UNREPAIRED = Meaning(Verdict.DEGRADED, RepairAction.RMA, Ends.REBOOT)
_LESS_MEMORY = Meaning(Verdict.DEGRADED, RepairAction.DRAIN, Ends.REBOOT)
_LOST_VM = NEEDS_REBOOT


def _app(number: int, name: str, note: str = "", source: Source = Source.CATALOG) -> Xid:
    return Xid(number, name, APPLICATION, source, note)


def _noted(number: int, name: str, note: str = "", source: Source = Source.CATALOG) -> Xid:
    return Xid(number, name, NOTED, source, note)


def _hard(
    number: int, name: str, meaning: Meaning, note: str = "", source: Source = Source.CATALOG
) -> Xid:
    return Xid(number, name, meaning, source, note, is_of_hardware=True)


_SKIPPED = "k8s-device-plugin skips it too"
_SAME_AS_48 = "says more about an Xid 48, so it means the same"
_UNIT = "the kernel's log tells unit and severity; of the event alone neither is known"
_SILENT_CATALOG = "the catalog has no action for it; judged by its name"

_ROWS = (
    _app(8, "GPU stopped processing"),
    _app(11, "Invalid or corrupted push buffer stream"),
    _app(13, "Graphics Engine Exception", _SKIPPED),
    _noted(14, "Fake error, injected from user space"),
    Xid(16, "Display engine hung", DOUBTFUL, Source.ARCHIVE),
    _hard(18, "Bus mastering disabled in PCI Config Space", DOUBTFUL, "", Source.ARCHIVE),
    _app(25, "Invalid or illegal push buffer stream"),
    _app(31, "GPU memory page fault", _SKIPPED),
    _app(32, "Invalid or corrupted push buffer stream", "may be a bad PCIe link: see its replays"),
    _noted(37, "Driver firmware error"),
    _noted(38, "Driver firmware error"),
    _app(39, "Copy Engine Exception"),
    _app(40, "Copy Engine Exception"),
    _app(41, "Copy Engine Exception"),
    _app(
        43,
        "GPU stopped processing",
        "the catalog ignores it: the GPU stays healthy, the program has ended",
        Source.PLUGIN,
    ),
    _noted(44, "Graphics Engine fault during context switch"),
    _app(
        45,
        "Preemptive cleanup, due to previous errors",
        "ends a program, also one that was killed; what came before it is told by itself",
        Source.PLUGIN,
    ),
    Xid(46, "GPU stopped processing", NEEDS_RESET, Source.CATALOG),
    _hard(
        48,
        "Double Bit ECC Error",
        NEEDS_RESET,
        "reset once work has ended; NVIDIA's memory guide wants the reset on GPUs that remap rows "
        "as well",
        Source.MEMORY,
    ),
    _hard(54, "Auxiliary power is not connected to the GPU board", NEEDS_HANDS),
    Xid(56, "Display Engine error", NOTED, Source.ARCHIVE, "of the display alone"),
    _hard(57, "Error programming video memory interface", DOUBTFUL, "", Source.ARCHIVE),
    _hard(58, "Unstable video memory interface detected", DOUBTFUL, "", Source.ARCHIVE),
    _hard(59, "Internal micro-controller error", NEEDS_RESET, "as 62 since", Source.ARCHIVE),
    _app(60, "Video processor exception"),
    _hard(
        61,
        "Internal micro-controller breakpoint",
        NEEDS_RESET,
        "unused since Ampere; before, as 62",
        Source.ARCHIVE,
    ),
    _hard(62, "Internal micro-controller halt", NEEDS_RESET),
    _hard(
        63,
        "Memory row remapped, or page retired",
        NOTED,
        "gpud asks for a reboot at once; we follow NVIDIA, as the check of pending rows tells "
        "whether a reset is due",
    ),
    _hard(
        64,
        "Memory row could not be remapped, or page not retired",
        NEEDS_RESET,
        "gpud asks for a reboot",
    ),
    _app(65, "Video processor exception", "unused since Ampere", Source.ARCHIVE),
    _noted(66, "Illegal access by driver"),
    _noted(67, "Illegal access by driver"),
    _app(68, "NVDEC0 Exception", "k8s-device-plugin skips it too; gpud asks for a reboot"),
    _app(69, "Graphics Engine class error"),
    _app(70, "Copy Engine 3 error"),
    _app(71, "Copy Engine 4 error"),
    _app(72, "Copy Engine 5 error"),
    _hard(74, "NVLINK Error", NEEDS_RESET),
    _app(75, "Copy Engine 6 error"),
    _app(76, "Copy Engine 7 error"),
    _app(77, "Copy Engine 8 error"),
    _noted(78, "vGPU Start Error", "the driver of the guest does not fit that of the host"),
    _hard(
        79,
        "GPU has fallen off the bus",
        NEEDS_REBOOT,
        "found also where the log has the words and no number",
    ),
    _app(80, "Corrupted data sent to GPU"),
    _app(82, "NVJPG0 Error"),
    _app(83, "NVDEC1 Error"),
    _app(84, "NVDEC2 Error"),
    _app(85, "Copy Engine 9 error"),
    _app(86, "OFA Exception"),
    _app(88, "NVDEC3 Error"),
    _app(89, "NVDEC4 Error"),
    _hard(
        92,
        "High single-bit ECC error rate",
        WORN,
        "the catalog ignores it and asks to contact support; degraded, as the memory wears",
    ),
    _noted(93, "InfoROM wear limit exceeded", "a protection that was set on purpose"),
    _hard(
        94,
        "Contained memory error",
        APPLICATION,
        "one program is lost, others go on; what the memory itself needs, its own checks tell",
        Source.MEMORY,
    ),
    _hard(95, "Uncontained memory error", NEEDS_RESET, "", Source.MEMORY),
    *(_app(96 + i, f"NVDEC{5 + i} Error") for i in range(3)),
    *(_app(99 + i, f"NVJPG{1 + i} Error") for i in range(7)),
    _noted(106, "SMBPBI Test Message"),
    _noted(107, "SMBPBI Test Message Silent"),
    _noted(108, "NVLink remote translation error"),
    _app(
        109,
        "Context Switch Timeout Error",
        "the catalog resets; k8s-device-plugin skips it, and we too: it is most often a kernel "
        "that does not end, and where a reset is needed the driver says so (Xid 154)",
        Source.PLUGIN,
    ),
    _hard(110, "Security Fault Error", NEEDS_RESET),
    Xid(119, "GSP RPC Timeout", NEEDS_RESET, Source.CATALOG, "a reboot where resets do not help"),
    Xid(120, "GSP Error", NEEDS_RESET, Source.CATALOG, "a reboot where resets do not help"),
    _hard(121, "C2C Error", NOTED, "corrected; the link trains anew at the next reset"),
    *(_app(126 + i, f"Copy Engine {10 + i} error") for i in range(10)),
    _hard(136, "Link Training Failed", NEEDS_RESET),
    _app(137, "NVLink Privilege Error", "the catalog ignores it: an access by a program"),
    _app(139, "OFA1 Error"),
    _hard(140, "ECC Unrecovered Error", NEEDS_RESET),
    _noted(141, "CUDA Fast Path Error"),
    Xid(142, "NVENC3 Error", DOUBTFUL, Source.CATALOG, "the catalog asks to contact support"),
    _hard(143, "GPU Initialization Error", NEEDS_RESET),
    _hard(144, "NVLINK: SAW Error", DOUBTFUL, _UNIT),
    _hard(145, "NVLINK: RLW Error", DOUBTFUL, _UNIT),
    _hard(146, "NVLINK: TLW Error", DOUBTFUL, _UNIT),
    _hard(147, "NVLINK: TREX Error", NOTED, "nonfatal by the catalog"),
    _hard(148, "NVLINK: NVLPW_CTRL Error", NOTED, "nonfatal by the catalog"),
    _hard(149, "NVLINK: NETIR Error", DOUBTFUL, _UNIT),
    _hard(150, "NVLINK: MSE Error", DOUBTFUL, _UNIT),
    Xid(
        151,
        "Key rotation Error",
        _LOST_VM,
        Source.CATALOG,
        "the catalog restarts the virtual machine that owns the GPU: the host that we are on",
    ),
    _noted(152, "DLA SMMU Error"),
    _noted(153, "DLA timeout Error"),
    _noted(
        154,
        "GPU Recovery Action Changed",
        "the kernel's log tells to which; of the event alone the driver's own field is gone by",
    ),
    Xid(155, "NVLINK: SW Defined Error", NEEDS_RESET, Source.CATALOG),
    _hard(156, "Resource Retirement Event", NEEDS_RESET),
    _hard(
        157,
        "Resource Retirement Failure",
        _UNREPAIRED,
        "work can go on, and may meet it again: nothing is left to repair with",
    ),
    _hard(158, "GPU Fatal Timeout", NEEDS_RESET),
    _hard(159, "CHI Non-Data Error", DOUBTFUL, "the catalog resets where a vGPU is in use"),
    _noted(160, "Channel Retirement Event"),
    _noted(161, "Channel Retirement Failure"),
    _noted(162, "Power smoothing engaged again"),
    _noted(163, "Power smoothing disengaged"),
    _noted(164, "Power smoothing circuitry is near the end of its life"),
    _hard(165, "Power smoothing circuitry is at the end of its life", WORN),
    Xid(166, "Confidential traffic before the link was set up", DOUBTFUL, Source.OURS),
    _hard(167, "PCIe fatal timeout", NEEDS_RESET, _SILENT_CATALOG, Source.OURS),
    _hard(168, "Errors in the write protected region", _LESS_MEMORY, "seen without ECC only"),
    _hard(169, "Internal micro-controller halt (SEC2)", NEEDS_RESET, "as 62", Source.OURS),
    Xid(170, "Interrupt in confidential computing", DOUBTFUL, Source.OURS, _SILENT_CATALOG),
    _hard(171, "Uncorrectable DRAM error", NEEDS_RESET, _SAME_AS_48),
    _hard(172, "Uncorrectable SRAM error", NEEDS_RESET, _SAME_AS_48),
)

XIDS: Mapping[int, Xid] = MappingProxyType({row.number: row for row in _ROWS})

# A number that is not in the table was made after it: it may be anything. Work goes on, no more is
# placed where degraded GPUs are cordoned, and a day without it ends the doubt.
UNKNOWN_XID = DOUBTFUL


@dataclass(frozen=True, slots=True)
class SubCode:
    """What an Xid means when the kernel's log tells more than its number."""

    code: str  # as the faults have it
    text: str  # as the log has it
    meaning: Meaning


# Xid 154, by the number that the recovery action has changed to.
RECOVERY_ACTIONS: Mapping[int, SubCode] = MappingProxyType(
    {
        0: SubCode("NONE", "None", NOTED),
        1: SubCode("RESET", "GPU Reset Required", NEEDS_RESET),
        2: SubCode("REBOOT", "Node Reboot Required", NEEDS_REBOOT),
        3: SubCode(
            "DRAIN_P2P", "Drain P2P", Meaning(Verdict.UNHEALTHY, RepairAction.DRAIN, Ends.RESET)
        ),
        4: SubCode("DRAIN_AND_RESET", "Drain and Reset", NEEDS_RESET),
    }
)
_BY_RECOVERY_CODE = {each.code: each.meaning for each in RECOVERY_ACTIONS.values()}

# Of NVLink5 errors. The catalog resets for all that are fatal and ignores all others, but for a few
# whose action an Xid 154 tells.
FATAL_NVLINK5 = NEEDS_RESET
NONFATAL_NVLINK5 = NOTED


def xid_meaning(code: str) -> Meaning:
    """Return what the Xid of that code means: "79", "145.RLW_REMAP", "154.REBOOT"."""
    number_text, _, rest = code.partition(".")
    number = int(number_text)
    if rest and number in NVLINK5:
        return NONFATAL_NVLINK5 if rest.endswith(f".{NONFATAL}") else FATAL_NVLINK5
    if rest and number == RECOVERY_ACTION_CHANGED:
        return _BY_RECOVERY_CODE.get(rest, UNKNOWN_XID)
    row = XIDS.get(number)
    return row.meaning if row else UNKNOWN_XID


def xid_name(number: int) -> str:
    """Return NVIDIA's name for it."""
    row = XIDS.get(number)
    return row.name if row else "not in the table"


def xid_source(code: str) -> str:
    """Return whose judgement `xid_meaning` is."""
    row = XIDS.get(int(code.partition(".")[0]))
    return row.source.value if row else "a number that is not in the table"
