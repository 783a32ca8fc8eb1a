"""What shall happen on simulated GPUs: scripted processes and faults, as values or as a JSON file.

A file is looked at again whenever it changes, so a demonstration or a test breaks and mends a
running node by writing it (write beside it and rename: a half-written file is refused). A file
that is not there is the scenario in which nothing happens. Moments are seconds since the file was
written; in a scenario given as a value, seconds since the simulated driver was made. Whatever has
`from_seconds` and `until_seconds` lasts from the first to the second, or for good.

    {"processes": [{"gpu": 1, "pid": 5000001, "name": "train", "memory": "20GiB",
                    "utilization": 0.9},
                   {"gpu": 0, "pid": 5000002, "memory": "4GiB", "utilization": 0.5,
                    "mig_device": 1, "decoder": 0.3},
                   {"gpu": 4, "pid": 5000003, "memory": "4GiB", "mig_start": 4}],
     "faults": [{"fault": "hang", "gpu": 3, "function": "nvmlDeviceGetPowerUsage", "seconds": 2},
                {"fault": "fail", "function": "nvmlDeviceGetSerial", "error": "NOT_SUPPORTED"},
                {"fault": "answer", "gpu": 0, "function": "nvmlDeviceGetUtilizationRates",
                 "value": {"gpu": 4294967295}},
                {"fault": "field", "gpu": 0, "field": 82, "value": 4294967295},
                {"fault": "field", "field": 83, "error": "NOT_SUPPORTED"},
                {"fault": "missing", "function": "nvmlDeviceGetMarginTemperature"},
                {"fault": "lose", "gpu": 5, "from_seconds": 10},
                {"fault": "vanish", "gpu": 7}],
     "mig": [{"gpu": 0, "devices": ["3g.40gb", "2g.20gb", "1g.10gb"], "until_seconds": 60}],
     "resets": [{"gpu": 6, "at_seconds": 20}],
     "pass_through": true,
     "events": [{"gpu": 2, "xid": 79, "at_seconds": 3}],
     "counters": [{"gpu": 1, "fact": "ecc_uncorrected_volatile_errors", "value": 3},
                  {"gpu": 1, "fact": "nvlink_up", "label": "4", "value": 0},
                  {"gpu": 2, "fact": "clock_event_active", "label": "hw_thermal_slowdown",
                   "value": 1}],
     "driver": {"version": "470.57.02"},
     "driver_loaded": true}

A driver that is replaced while its old kernel module is loaded is a `fail` of every function:
{"fault": "fail", "error": "LIB_RM_VERSION_MISMATCH"}. A GPU whose MIG mode is on has an entry in
`mig`, with no devices where nothing is created yet; its devices keep their UUIDs as long as
profile, place and `from_seconds` do, and handles of devices that are no more are stale. A GPU that
`mig` names at all is the scenario's, and calls that would partition it are refused; all others are
partitioned by calls. Unloading the driver takes their instances too, and from Hopper on MIG mode.
An event is heard once by every event set that was registered for its GPU before its moment came; a
file that is written anew makes its events happen anew. `counters` names facts by
`stoker.agent.facts`.

Choose PIDs above the kernel's largest (4194304), so that none is taken for a real process.
"""

import os
from pathlib import Path

import msgspec

from stoker.agent.facts import FACTS, Fact
from stoker.agent.readings import ProcessKind
from stoker.agent.simulated.drivers import parse_release
from stoker.core.errors import BadInput
from stoker.core.units import parse_bytes

# A scenario is written by hand; what is larger is some other file.
FILE_BYTES_MAX = 1 << 20
EVERY_FUNCTION = "*"


class _Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="fault"):
    """When and where a fault strikes; what it does is its subclass."""

    gpu: int | None = None  # index; None: every GPU, and functions that are about no GPU
    function: str = EVERY_FUNCTION  # "nvmlDeviceGetPowerUsage"
    from_seconds: float = 0.0
    until_seconds: float | None = None  # None: for good
    after_calls: int = 0  # let so many matching calls pass first
    calls: int | None = None  # then strike so many; None: all


class Hang(_Fault, frozen=True, tag="hang"):
    """The call does not return for some seconds, or until the fault is taken from the scenario."""

    seconds: float | None = None


class Fail(_Fault, frozen=True, tag="fail", kw_only=True):
    """The call fails with an error of the driver: "NOT_SUPPORTED" for NVML_ERROR_NOT_SUPPORTED."""

    error: str


class Answer(_Fault, frozen=True, tag="answer", kw_only=True):
    """The call returns a raw value in the driver's units: number, text, or fields of a struct."""

    value: int | str | dict[str, int | str]


class Lose(_Fault, frozen=True, tag="lose"):
    """The GPU falls off the bus: every call on its handle fails until the driver is opened anew."""


class Vanish(_Fault, frozen=True, tag="vanish"):
    """The GPU is not counted any more, the ones behind it move up, its old handle is lost."""


class Missing(_Fault, frozen=True, tag="missing", kw_only=True):
    """The library has no such function: that of nvidia-ml-py, or the symbol behind it."""


class Field(_Fault, frozen=True, tag="field", kw_only=True):
    """One value of nvmlDeviceGetFieldValues is raw, in the driver's units, or an error."""

    field: int  # NVML_FI_DEV_MEMORY_TEMP is 82
    scope: int | None = None  # a link; None: all
    value: int | float | None = None
    error: str | None = None
    function: str = "nvmlDeviceGetFieldValues"


Fault = Hang | Fail | Answer | Lose | Vanish | Missing | Field


class ScriptedProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process that exists only for the simulated driver."""

    gpu: int
    pid: int
    name: str | None = None
    memory: str | int = 0  # "20GiB", or bytes
    utilization: float = 0.0
    kind: ProcessKind = "compute"
    memory_known: bool = True  # False: the driver lists the process and cannot tell its memory
    mig_device: int = 0  # on a partitioned GPU: which of its devices, in the driver's order
    mig_start: int | None = None  # or which of those in the GPU instance at this memory slice
    encoder: float = 0.0
    decoder: float = 0.0
    from_seconds: float = 0.0
    until_seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        """What it holds."""
        return self.memory if isinstance(self.memory, int) else parse_bytes(self.memory, "memory")


class ScriptedMig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """MIG mode is on, with these devices; where several are due for a GPU, the last one counts."""

    gpu: int
    devices: tuple[str, ...] = ()  # "3g.40gb", or "1c.2g.20gb" for a part of a GPU instance
    from_seconds: float = 0.0
    until_seconds: float | None = None


class ScriptedReset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody resets a GPU: its instances are gone, and a pending MIG mode takes effect."""

    gpu: int
    at_seconds: float = 0.0


class ScriptedEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An Xid that the driver reports as an event."""

    gpu: int
    xid: int
    at_seconds: float = 0.0
    gpu_instance: int | None = None  # ID of the MIG instance that it is about


class ScriptedFact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A counter or state of a GPU that is not as it would be: errors, links, rows, reasons."""

    gpu: int
    fact: Fact
    value: float
    label: str = ""  # of facts with a label: the link, the cause, the reason
    from_seconds: float = 0.0
    until_seconds: float | None = None


class ScriptedDriver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another driver than the usual one: it lacks what drivers of its age lacked."""

    version: str


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is scripted."""

    processes: tuple[ScriptedProcess, ...] = ()
    faults: tuple[Fault, ...] = ()
    driver_loaded: bool = True
    mig: tuple[ScriptedMig, ...] = ()
    resets: tuple[ScriptedReset, ...] = ()
    pass_through: bool = False  # a virtual machine with the GPUs: it cannot reset them itself
    events: tuple[ScriptedEvent, ...] = ()
    counters: tuple[ScriptedFact, ...] = ()
    driver: ScriptedDriver | None = None


NOTHING_HAPPENS = Scenario()

# What `counters` can say: states and counters that follow from no load.
SCRIPTED_FACTS = frozenset(
    {
        Fact.ECC_CORRECTED_VOLATILE_ERRORS,
        Fact.ECC_UNCORRECTED_VOLATILE_ERRORS,
        Fact.ECC_CORRECTED_AGGREGATE_ERRORS,
        Fact.ECC_UNCORRECTED_AGGREGATE_ERRORS,
        Fact.REMAPPED_ROWS,
        Fact.REMAPPED_ROWS_PENDING,
        Fact.REMAPPED_ROWS_FAILED,
        Fact.ROW_REMAP_BANKS,
        Fact.RETIRED_PAGES,
        Fact.RETIRED_PAGES_PENDING,
        Fact.RECOVERY_ACTION,
        Fact.PCIE_REPLAYS,
        Fact.PCIE_LINK_GENERATION,
        Fact.PCIE_LINK_WIDTH,
        Fact.NVLINK_UP,
        Fact.NVLINK_CRC_FLIT_ERRORS,
        Fact.NVLINK_CRC_DATA_ERRORS,
        Fact.NVLINK_REPLAY_ERRORS,
        Fact.NVLINK_RECOVERY_ERRORS,
        Fact.CLOCK_EVENT_ACTIVE,
        Fact.PERSISTENCE_MODE,
        Fact.COMPUTE_MODE,
        Fact.MIG_MODE_PENDING,
    }
)

_Lasting = Fault | ScriptedProcess | ScriptedMig | ScriptedFact


def is_due(item: _Lasting, seconds: float) -> bool:
    """Whether `seconds` into the scenario lie within the item's time."""
    return item.from_seconds <= seconds and (
        item.until_seconds is None or seconds < item.until_seconds
    )


def turns(scenario: Scenario) -> list[float]:
    """Return the seconds at which cards begin or end to be otherwise, the first one last."""
    lasting: tuple[_Lasting, ...] = (*scenario.processes, *scenario.mig, *scenario.counters)
    begin = {item.from_seconds for item in lasting}
    end = {item.until_seconds for item in lasting if item.until_seconds is not None}
    once = {reset.at_seconds for reset in scenario.resets}
    return sorted(begin | end | once, reverse=True)


def parse_scenario(text: bytes, where: str) -> Scenario:
    """Return the scenario that JSON text describes; raises BadInput that names place and key."""
    try:
        scenario = msgspec.json.decode(text, type=Scenario)
        for process in scenario.processes:
            shares = (process.utilization, process.encoder, process.decoder)
            if process.memory_bytes < 0 or not all(0 <= share <= 1 for share in shares):
                raise BadInput(f"process {process.pid}: memory or utilization is out of range")
        for scripted in scenario.counters:
            _check_fact(scripted)
        if scenario.driver is not None:
            parse_release(scenario.driver.version)
    except (msgspec.DecodeError, BadInput) as error:
        raise BadInput(f"{where}: {error}") from error
    return scenario


def _check_fact(scripted: ScriptedFact) -> None:
    fact = scripted.fact
    if fact not in SCRIPTED_FACTS:
        raise BadInput(f"{fact.value} follows from the load and cannot be scripted")
    label = FACTS[fact].label
    if bool(label) != bool(scripted.label):
        wanted = f"needs a label, its {label}" if label else "has no label"
        raise BadInput(f"{fact.value} {wanted}")


class ScenarioFile:
    """A scenario that lives in a file and is read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self.scenario = NOTHING_HAPPENS
        self.began_at = 0.0  # Unix seconds: when the file was written

    def refresh(self) -> bool:
        """Read the file if it changed, and tell whether it did; raises BadInput when it is wrong.

        A wrong file is complained about once, and leaves the scenario as it was.
        """
        try:
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._seen:
                return False
            self._seen = seen
            if status.st_size > FILE_BYTES_MAX:
                raise BadInput(f"{self._path}: {status.st_size} bytes are no scenario")
            text = self._path.read_bytes()
        except FileNotFoundError:
            changed, self._seen = self._seen is not None, None
            self.scenario = NOTHING_HAPPENS
            return changed
        except OSError as error:
            raise BadInput(f"{self._path}: {error.strerror}") from error
        self.scenario = parse_scenario(text, str(self._path))
        self.began_at = status.st_mtime
        return True
