"""A simulated GPU driver: the functions of nvidia-ml-py, with its structs and errors, on no GPU.

It behaves like the real thing where that matters: nothing works before `nvmlInit`, a lost GPU
stays lost on every call, counters restart with the driver, values have the driver's units. What
happens on it is either scripted (`simulated_scenario`) or done by real processes of this machine
that say they use it (`simulated_workloads`). How values move is told by `simulated_card`.
"""

# ruff: noqa: N802, N815 (the names are the driver's own)

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, assert_never, cast

import pynvml  # type: ignore[import-untyped]

from stoker.agent.readings import ProcessKind
from stoker.agent.simulated_card import SimulatedCard
from stoker.agent.simulated_scenario import (
    EVERY_FUNCTION,
    NOTHING_HAPPENS,
    Answer,
    Fail,
    Fault,
    Hang,
    Lose,
    Scenario,
    ScenarioFile,
    Vanish,
    is_due,
)
from stoker.agent.simulated_workloads import Workload, find_workloads, is_alive
from stoker.core.errors import BadInput
from stoker.core.gpu_models import GpuModel

T = TypeVar("T")

_NVML: Final[Any] = pynvml  # it has no annotations

DRIVER_VERSION = "580.105.08"
NVML_VERSION = "13.580.105.08"
CUDA_DRIVER_VERSION = 13000

# A hanging call looks so often whether the fault was taken from the scenario.
_HANG_STEP_SECONDS = 0.02
# Lists asked for within so short a time come from one look at the machine's processes.
_SCAN_SECONDS = 0.2
_SETTLE_SECONDS = 0.05
_NO_INSTANCE = 0xFFFFFFFF


def _complain_on_stderr(text: str) -> None:
    sys.stderr.write(f"simulated driver: {text}\n")


class SimulatedNvml:
    """The function table of a node with these GPUs; one node, name and seed give the same UUIDs."""

    NVMLError: type[Exception] = _NVML.NVMLError
    NVMLLibraryMismatchError: type[Exception] = _NVML.NVMLLibraryMismatchError
    NVML_TEMPERATURE_GPU: int = _NVML.NVML_TEMPERATURE_GPU
    NVML_CLOCK_SM: int = _NVML.NVML_CLOCK_SM
    NVML_CLOCK_MEM: int = _NVML.NVML_CLOCK_MEM
    NVML_AFFINITY_SCOPE_NODE: int = _NVML.NVML_AFFINITY_SCOPE_NODE
    nvmlMemory_v2: int = _NVML.nvmlMemory_v2

    def __init__(
        self,
        models: Sequence[GpuModel],
        *,
        node: str,
        seed: int = 0,
        scenario: Scenario | ScenarioFile = NOTHING_HAPPENS,
        now: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        proc: str = "/proc",
        complain: Callable[[str], None] = _complain_on_stderr,
    ) -> None:
        """Make the node; raises BadInput when the scenario cannot be read or names what is not."""
        self._now, self._pause, self._proc, self._complain = now, pause, proc, complain
        self._cards = [
            SimulatedCard(model, node=node, index=index, seed=seed, now=now())
            for index, model in enumerate(models)
        ]
        self._file = scenario if isinstance(scenario, ScenarioFile) else None
        self._scenario = NOTHING_HAPPENS
        self._began_at = now()
        self._strikes: list[int] = []  # calls that each fault matched
        self._complaint: str | None = None
        self._sessions = 0
        self._lost: set[int] = set()
        self._workloads: tuple[Workload, ...] = ()
        self._scanned_at = self._settled_at = float("-inf")
        if self._file is not None:
            self._file.refresh()
            self._take(self._file.scenario, self._file.began_at)
        elif isinstance(scenario, Scenario):
            self.play(scenario)

    def play(self, scenario: Scenario) -> None:
        """Let this scenario begin now; raises BadInput when it names a GPU or error that is not."""
        self._take(scenario, self._now())

    @property
    def uuids(self) -> tuple[str, ...]:
        """The UUIDs by index, lost and vanished ones too."""
        return tuple(card.uuid for card in self._cards)

    def nvmlInit(self) -> None:
        self._refresh()
        self._fail_unless_loaded()
        self._strike("nvmlInit", None)
        if self._sessions == 0:
            self._lost.clear()
        self._sessions += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self._sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._tell("nvmlSystemGetDriverVersion", lambda: DRIVER_VERSION)

    def nvmlSystemGetNVMLVersion(self) -> str:
        return self._tell("nvmlSystemGetNVMLVersion", lambda: NVML_VERSION)

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self._tell("nvmlSystemGetCudaDriverVersion", lambda: CUDA_DRIVER_VERSION)

    def nvmlSystemGetProcessName(self, pid: int, /) -> str:
        def name() -> str:
            named = {w.pid: w.name for w in self._workloads}
            named |= {p.pid: p.name for p in self._scenario.processes if p.name is not None}
            if pid not in named:
                raise _error("NOT_FOUND")
            return named[pid]

        return self._tell("nvmlSystemGetProcessName", name)

    def nvmlDeviceGetCount(self) -> int:
        return self._tell("nvmlDeviceGetCount", lambda: len(self._visible()))

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> SimulatedCard:
        self._enter("nvmlDeviceGetHandleByIndex")
        visible = self._visible()
        if not 0 <= index < len(visible):
            raise _error("INVALID_ARGUMENT")
        card = visible[index]
        # Its own fault can strike only now that it is known which card is meant.
        self._strike("nvmlDeviceGetHandleByIndex", card)
        return card

    def nvmlDeviceGetUUID(self, card: SimulatedCard, /) -> str:
        return self._read("nvmlDeviceGetUUID", card, lambda: card.uuid)

    def nvmlDeviceGetName(self, card: SimulatedCard, /) -> str:
        return self._read("nvmlDeviceGetName", card, lambda: card.model.driver_name)

    def nvmlDeviceGetSerial(self, card: SimulatedCard, /) -> str:
        return self._read("nvmlDeviceGetSerial", card, lambda: card.serial)

    def nvmlDeviceGetBoardPartNumber(self, card: SimulatedCard, /) -> str:
        return self._read(
            "nvmlDeviceGetBoardPartNumber", card, lambda: card.model.board_part_number
        )

    def nvmlDeviceGetVbiosVersion(self, card: SimulatedCard, /) -> str:
        return self._read("nvmlDeviceGetVbiosVersion", card, lambda: card.model.vbios_version)

    def nvmlDeviceGetMinorNumber(self, card: SimulatedCard, /) -> int:
        return self._read("nvmlDeviceGetMinorNumber", card, lambda: card.index)

    def nvmlDeviceGetCudaComputeCapability(self, card: SimulatedCard, /) -> tuple[int, int]:
        return self._read(
            "nvmlDeviceGetCudaComputeCapability", card, lambda: card.model.compute_capability
        )

    def nvmlDeviceGetEnforcedPowerLimit(self, card: SimulatedCard, /) -> int:
        return self._read(
            "nvmlDeviceGetEnforcedPowerLimit",
            card,
            lambda: round(card.model.power_limit_watts * 1000),
        )

    def nvmlDeviceGetMigMode(self, card: SimulatedCard, /) -> list[int]:
        def mode() -> list[int]:
            if not card.model.has_mig:
                raise _error("NOT_SUPPORTED")
            return [0, 0]

        return self._read("nvmlDeviceGetMigMode", card, mode)

    def nvmlDeviceGetMemoryAffinity(
        self, card: SimulatedCard, node_set_size: int, scope: int, /
    ) -> Sequence[int]:
        # Two sockets, half of the cards at each, as in most eight-GPU machines.
        node = 0 if card.index * 2 < len(self._cards) else 1
        words = [1 << node] + [0] * (node_set_size - 1)
        return self._read("nvmlDeviceGetMemoryAffinity", card, lambda: words)

    def nvmlDeviceGetPciInfo(self, card: SimulatedCard, /) -> Any:
        def info() -> Any:
            pci = _NVML.nvmlPciInfo_t()
            pci.busId, pci.busIdLegacy = card.pci_bus_id, card.pci_bus_id[4:]
            pci.domain, pci.bus, pci.device = 0, card.pci_bus_number, 0
            pci.pciDeviceId = card.model.pci_device_id
            pci.pciSubSystemId = card.model.pci_subsystem_id
            return pci

        return self._read("nvmlDeviceGetPciInfo", card, info)

    def nvmlDeviceGetMemoryInfo(self, card: SimulatedCard, version: int | None = None, /) -> Any:
        def info() -> Any:
            reserved, used = card.model.memory_reserved_bytes, card.memory_used_bytes
            memory = _NVML.c_nvmlMemory_v2_t() if version else _NVML.c_nvmlMemory_t()
            memory.total = card.model.memory_total_bytes
            memory.free = memory.total - reserved - used
            if version:
                memory.version, memory.reserved, memory.used = version, reserved, used
            else:
                memory.used = used + reserved  # as the first form counts
            return memory

        function = "nvmlDeviceGetMemoryInfo" + ("_v2" if version else "")
        return self._read(function, card, info)

    def nvmlDeviceGetUtilizationRates(self, card: SimulatedCard, /) -> Any:
        def rates() -> Any:
            utilization = _NVML.c_nvmlUtilization_t()
            utilization.gpu = round(card.utilization * 100)
            utilization.memory = round(card.memory_utilization * 100)
            return utilization

        return self._read("nvmlDeviceGetUtilizationRates", card, rates)

    def nvmlDeviceGetTemperatureV(self, card: SimulatedCard, sensor: int, /) -> int:
        return self._read("nvmlDeviceGetTemperatureV", card, lambda: _celsius(card, sensor))

    def nvmlDeviceGetTemperature(self, card: SimulatedCard, sensor: int, /) -> int:
        return self._read("nvmlDeviceGetTemperature", card, lambda: _celsius(card, sensor))

    def nvmlDeviceGetPowerUsage(self, card: SimulatedCard, /) -> int:
        return self._read("nvmlDeviceGetPowerUsage", card, lambda: round(card.power_watts * 1000))

    def nvmlDeviceGetTotalEnergyConsumption(self, card: SimulatedCard, /) -> int:
        return self._read(
            "nvmlDeviceGetTotalEnergyConsumption", card, lambda: int(card.energy_joules * 1000)
        )

    def nvmlDeviceGetClockInfo(self, card: SimulatedCard, clock: int, /) -> int:
        def megahertz() -> int:
            if clock == self.NVML_CLOCK_SM:
                return round(card.sm_clock_hertz / 1e6)
            if clock == self.NVML_CLOCK_MEM:
                return round(card.memory_clock_hertz / 1e6)
            raise _error("INVALID_ARGUMENT")

        return self._read("nvmlDeviceGetClockInfo", card, megahertz)

    def nvmlDeviceGetComputeRunningProcesses(self, card: SimulatedCard, /) -> list[Any]:
        return self._list("nvmlDeviceGetComputeRunningProcesses", card, "compute")

    def nvmlDeviceGetComputeRunningProcesses_v2(self, card: SimulatedCard, /) -> list[Any]:
        return self._list("nvmlDeviceGetComputeRunningProcesses_v2", card, "compute")

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: SimulatedCard, /) -> list[Any]:
        return self._list("nvmlDeviceGetGraphicsRunningProcesses", card, "graphics")

    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, card: SimulatedCard, /) -> list[Any]:
        return self._list("nvmlDeviceGetGraphicsRunningProcesses_v2", card, "graphics")

    def _list(self, function: str, card: SimulatedCard, kind: ProcessKind) -> list[Any]:
        def running() -> list[Any]:
            now = self._now()
            if not 0 <= now - self._scanned_at < _SCAN_SECONDS:
                self._workloads = find_workloads(self.uuids, self._proc)
                self._scanned_at = now
                self._settled_at = float("-inf")
            listed = [
                (p.pid, p.memory_bytes if p.memory_known else None)
                for p in self._scenario.processes
                if p.gpu == card.index and p.kind == kind and is_due(p, self._seconds())
            ]
            if kind == "compute":
                mine = (w for w in self._workloads if card.uuid in w.uuids)
                listed += [(w.pid, w.memory_bytes) for w in mine]
            return [
                _NVML.nvmlFriendlyObject(
                    {
                        "pid": pid,
                        "usedGpuMemory": used,
                        "gpuInstanceId": _NO_INSTANCE,
                        "computeInstanceId": _NO_INSTANCE,
                    }
                )
                for pid, used in listed
            ]

        return self._read(function, card, running)

    def _tell(self, function: str, answer: Callable[[], T]) -> T:
        """Answer a question that is about no card."""
        scripted = self._enter(function)
        return answer() if scripted is None else _scripted(scripted, answer)

    def _read(self, function: str, card: SimulatedCard, answer: Callable[[], T]) -> T:
        """Answer a question about a card, as it is now."""
        self._enter(function, about_a_card=True)
        scripted = self._strike(function, card)
        self._settle()
        return answer() if scripted is None else _scripted(scripted, answer)

    def _enter(self, function: str, *, about_a_card: bool = False) -> Answer | None:
        if self._sessions == 0:
            raise _error("UNINITIALIZED")
        self._refresh()
        self._fail_unless_loaded()
        return None if about_a_card else self._strike(function, None)

    def _strike(self, function: str, card: SimulatedCard | None) -> Answer | None:
        """Let the faults have their way; what they answer instead of the card, if anything."""
        if card is not None and (card.index in self._lost or card not in self._visible()):
            raise _error("GPU_IS_LOST")
        scripted: Answer | None = None
        for number, fault in enumerate(self._scenario.faults):
            if not self._matches(number, fault, function, card):
                continue
            match fault:
                case Hang():
                    self._hang(fault)
                case Fail(error=name):
                    raise _error(name)
                case Lose():
                    if card is not None:
                        self._lost.add(card.index)
                        raise _error("GPU_IS_LOST")
                case Answer():
                    scripted = fault
                case Vanish():
                    pass  # it acts through `_visible`
                case _:
                    assert_never(fault)
        return scripted

    def _matches(
        self, number: int, fault: Fault, function: str, card: SimulatedCard | None
    ) -> bool:
        if fault.function not in (EVERY_FUNCTION, function):
            return False
        if fault.gpu is not None and (card is None or card.index != fault.gpu):
            return False
        if not is_due(fault, self._seconds()):
            return False
        self._strikes[number] += 1
        strike = self._strikes[number] - fault.after_calls
        return strike > 0 and (fault.calls is None or strike <= fault.calls)

    def _hang(self, fault: Hang) -> None:
        began = self._now()
        while fault in self._scenario.faults:
            if fault.seconds is not None and self._now() - began >= fault.seconds:
                return
            self._pause(_HANG_STEP_SECONDS)
            self._refresh()

    def _visible(self) -> list[SimulatedCard]:
        gone = {
            fault.gpu
            for fault in self._scenario.faults
            if isinstance(fault, Vanish) and is_due(fault, self._seconds())
        }
        return [card for card in self._cards if card.index not in gone]

    def _fail_unless_loaded(self) -> None:
        if not self._scenario.driver_loaded:
            raise _error("DRIVER_NOT_LOADED")

    def _settle(self) -> None:
        """Bring every card to this moment, under the load of its processes."""
        now = self._now()
        if 0 <= now - self._settled_at < _SETTLE_SECONDS:
            return
        self._settled_at = now
        self._workloads = tuple(w for w in self._workloads if is_alive(w.pid, self._proc))
        for card in self._cards:
            users = [
                (p.memory_bytes, p.utilization)
                for p in self._scenario.processes
                if p.gpu == card.index and is_due(p, self._seconds())
            ]
            users += [
                (w.memory_bytes, w.utilization) for w in self._workloads if card.uuid in w.uuids
            ]
            card.advance(now)
            card.carry(
                memory_bytes=sum(memory for memory, _ in users),
                utilization=sum(utilization for _, utilization in users),
            )

    def _seconds(self) -> float:
        return self._now() - self._began_at

    def _refresh(self) -> None:
        """Take a scenario file that changed; a wrong one is complained about and not taken."""
        if self._file is None:
            return
        try:
            if self._file.refresh():
                self._take(self._file.scenario, self._file.began_at)
                self._complaint = None
        except BadInput as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._complain(f"{error}; the scenario goes on as it was")

    def _take(self, scenario: Scenario, began_at: float) -> None:
        for item in (*scenario.processes, *scenario.faults):
            if item.gpu is not None and not 0 <= item.gpu < len(self._cards):
                raise BadInput(f"scenario: there is no GPU {item.gpu}, only {len(self._cards)}")
            if isinstance(item, Fail):
                _error(item.error)
        self._scenario, self._began_at = scenario, began_at
        self._strikes = [0] * len(scenario.faults)
        self._settled_at = float("-inf")


def _scripted(fault: Answer, answer: Callable[[], T]) -> T:
    """Return what the scenario says in place of the answer, or in some fields of it."""
    if not isinstance(fault.value, dict):
        return cast("T", fault.value)
    struct = answer()
    for name, value in fault.value.items():
        setattr(struct, name, value)
    return struct


def _celsius(card: SimulatedCard, sensor: int) -> int:
    if sensor != _NVML.NVML_TEMPERATURE_GPU:
        raise _error("INVALID_ARGUMENT")
    return round(card.celsius)


def _error(name: str) -> Exception:
    """Return the driver's error of that name; raises BadInput when there is none."""
    code: int | None = getattr(_NVML, f"NVML_ERROR_{name}", None)
    if code is None:
        raise BadInput(f"scenario: {name!r} is no error of NVML, such as GPU_IS_LOST")
    error: Exception = _NVML.NVMLError(code)
    return error
