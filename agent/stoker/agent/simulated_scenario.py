"""What shall happen on simulated GPUs: scripted processes and faults, as values or as a JSON file.

A file is looked at again whenever it changes, so a demonstration or a test breaks and mends a
running node by writing it (write beside it and rename: a half-written file is refused). A file
that is not there is the scenario in which nothing happens. Moments are seconds since the file was
written; in a scenario given as a value, seconds since the simulated driver was made.

    {"processes": [{"gpu": 1, "pid": 5000001, "name": "train", "memory": "20GiB",
                    "utilization": 0.9}],
     "faults": [{"fault": "hang", "gpu": 3, "function": "nvmlDeviceGetPowerUsage", "seconds": 2},
                {"fault": "fail", "function": "nvmlDeviceGetSerial", "error": "NOT_SUPPORTED"},
                {"fault": "answer", "gpu": 0, "function": "nvmlDeviceGetUtilizationRates",
                 "value": {"gpu": 4294967295}},
                {"fault": "lose", "gpu": 5, "from_seconds": 10},
                {"fault": "vanish", "gpu": 7}],
     "driver_loaded": true}

Choose PIDs above the kernel's largest (4194304), so that none is taken for a real process.
"""

import os
from pathlib import Path

import msgspec

from stoker.agent.readings import ProcessKind
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


Fault = Hang | Fail | Answer | Lose | Vanish


class ScriptedProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process that exists only for the simulated driver."""

    gpu: int
    pid: int
    name: str | None = None
    memory: str | int = 0  # "20GiB", or bytes
    utilization: float = 0.0
    kind: ProcessKind = "compute"
    memory_known: bool = True  # False: the driver lists the process and cannot tell its memory
    from_seconds: float = 0.0
    until_seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        """What it holds."""
        return self.memory if isinstance(self.memory, int) else parse_bytes(self.memory, "memory")


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is scripted."""

    processes: tuple[ScriptedProcess, ...] = ()
    faults: tuple[Fault, ...] = ()
    driver_loaded: bool = True


NOTHING_HAPPENS = Scenario()


def is_due(item: Fault | ScriptedProcess, seconds: float) -> bool:
    """Whether `seconds` into the scenario lie within the item's time."""
    return item.from_seconds <= seconds and (
        item.until_seconds is None or seconds < item.until_seconds
    )


def parse_scenario(text: bytes, where: str) -> Scenario:
    """Return the scenario that JSON text describes; raises BadInput that names place and key."""
    try:
        scenario = msgspec.json.decode(text, type=Scenario)
        for process in scenario.processes:
            if process.memory_bytes < 0 or not 0 <= process.utilization <= 1:
                raise BadInput(f"process {process.pid}: memory or utilization is out of range")
    except (msgspec.DecodeError, BadInput) as error:
        raise BadInput(f"{where}: {error}") from error
    return scenario


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
