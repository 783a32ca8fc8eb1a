"""What stands between a call and its answer: the session, the scenario's faults, the cards' time.

The functions of the simulated driver are methods of the classes above this one. Each says by its
decorator what it is asked about: `of_system`, `of_card` (a whole GPU), or `of_device` (a GPU or
one of its MIG devices). By the time a method runs, nothing forbids the answer, and the cards are
as they are at this moment.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, assert_never, cast

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.drivers import DriverRelease, parse_release
from stoker.agent.simulated.instances import IDLE, MigDevice, Work, lay_out
from stoker.agent.simulated.library import SYMBOLS, error, missing
from stoker.agent.simulated.mig_state import OwnMigState, SharedMigState
from stoker.agent.simulated.partitioning import Partitioning
from stoker.agent.simulated.scenario import (
    EVERY_FUNCTION,
    NOTHING_HAPPENS,
    Answer,
    Fail,
    Fault,
    Field,
    Hang,
    Lose,
    Missing,
    Scenario,
    ScenarioFile,
    ScriptedProcess,
    Vanish,
    is_due,
    turns,
)
from stoker.agent.simulated.workloads import Workload, find_workloads, is_alive
from stoker.core.errors import BadInput
from stoker.core.gpu_models import GpuModel

# What a handle is: a whole GPU, or one device of a partitioned GPU.
Device = SimulatedCard | MigDevice

S = TypeVar("S", bound="SimulatedSession")
D = TypeVar("D", SimulatedCard, Device)
P = ParamSpec("P")
T = TypeVar("T")

USUAL_DRIVER = parse_release("580.105.08")

# A hanging call looks so often whether the fault was taken from the scenario.
_HANG_STEP_SECONDS = 0.02
# Lists asked for within so short a time come from one look at the machine's processes.
_SCAN_SECONDS = 0.2
_SETTLE_SECONDS = 0.05


def _complain_on_stderr(text: str) -> None:
    sys.stderr.write(f"simulated driver: {text}\n")


class SimulatedSession:
    """The node: its cards, the driver that is loaded, and what the scenario does to both."""

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
        mig_state: Path | None = None,
        is_root: bool | None = None,
    ) -> None:
        """Make the node; raises BadInput when the scenario cannot be read or names what is not.

        `mig_state` is the file in which all processes of the node keep how its GPUs are
        partitioned; None: this one keeps it for itself. `is_root` is whether the driver lets this
        process change that; None: when it is root. Raises BadInput for another file than that.
        """
        self._now, self._pause, self._proc, self._complain = now, pause, proc, complain
        self._cards = [
            SimulatedCard(model, node=node, index=index, seed=seed, now=now())
            for index, model in enumerate(models)
        ]
        self._file = scenario if isinstance(scenario, ScenarioFile) else None
        self._scenario = NOTHING_HAPPENS
        self._began_at = now()
        self._release = USUAL_DRIVER
        self._strikes: list[int] = []  # calls that each fault matched
        self._turns: list[float] = []  # seconds at which the cards' work changes, the next one last
        self._complaints: dict[str, str] = {}  # the last one, by what is wrong
        self._sessions = 0
        self._lost: set[int] = set()
        self._workloads: tuple[Workload, ...] = ()
        self._scanned_at = self._settled_at = float("-inf")
        self._is_plain = False  # nothing can forbid an answer
        self._is_root = is_root
        kept = OwnMigState() if mig_state is None else SharedMigState(mig_state)
        self._partitions = Partitioning(self._cards, kept, self._partition_changed)
        self._prepare()
        if self._file is not None:
            self._file.refresh()
            self._take(self._file.scenario, self._file.began_at)
        elif isinstance(scenario, Scenario):
            self.play(scenario)

    def _prepare(self) -> None:
        """Make anew what the functions keep between calls."""

    def play(self, scenario: Scenario) -> None:
        """Let this scenario begin now; raises BadInput when it names what is not there."""
        self._take(scenario, self._now())

    @property
    def uuids(self) -> tuple[str, ...]:
        """The UUIDs by index, lost and vanished ones too."""
        return tuple(card.uuid for card in self._cards)

    @property
    def release(self) -> DriverRelease:
        """The driver that is there, loaded or not."""
        return self._release

    @property
    def is_root(self) -> bool:
        """Whether the driver lets this process change how GPUs are partitioned."""
        return os.geteuid() == 0 if self._is_root is None else self._is_root

    def nvmlInit(self) -> None:  # noqa: N802
        self._refresh()
        self._fail_unless_there("nvmlInit")
        self._strike("nvmlInit", None)
        if self._sessions == 0:
            self._lost.clear()
            self._join()
        self._sessions += 1
        self._note_whether_plain()

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.admit("nvmlShutdown", None)
        self._sessions -= 1
        if self._sessions == 0:
            self._partitions.state.leave()
            self._prepare()  # what the functions kept ends with the last session
        self._note_whether_plain()

    # For the functions ------------------------------------------------------------------------

    def admit(
        self, function: str, device: Device | None, symbol: str | None = None
    ) -> Answer | None:
        """Let time and faults have their way; what the scenario answers instead, if anything.

        `symbol` is what the library is asked for where that depends on the arguments.
        Raises what the driver raises: no session, no driver, no such symbol, a lost GPU, a handle
        of a MIG device that is no more.
        """
        if self._file is not None:
            self._refresh()
        scripted: Answer | None = None
        if not self._is_plain:
            if self._sessions == 0:
                raise error("UNINITIALIZED")
            self._fail_unless_there(function, symbol)
            card = device.card if isinstance(device, MigDevice) else device
            scripted = self._strike(function, card)
        now = self._now()
        if self._partitions.state.is_shared:
            self._take_partitions(now)
        if not 0 <= now - self._settled_at < _SETTLE_SECONDS:
            self._settle(now)
        if isinstance(device, MigDevice) and device not in device.card.mig_devices:
            raise error("INVALID_ARGUMENT")
        return scripted

    def _visible(self) -> list[SimulatedCard]:
        gone = {
            fault.gpu
            for fault in self._scenario.faults
            if isinstance(fault, Vanish) and is_due(fault, self._seconds())
        }
        return [card for card in self._cards if card.index not in gone]

    def _seconds(self) -> float:
        return self._now() - self._began_at

    def _field_faults(self, card: SimulatedCard) -> Iterable[Field]:
        for number, fault in enumerate(self._scenario.faults):
            if isinstance(fault, Field) and self._matches(number, fault, fault.function, card):
                yield fault

    def _scripted_on(self, card: SimulatedCard, seconds: float) -> Iterable[ScriptedProcess]:
        for process in self._scenario.processes:
            if process.gpu == card.index and is_due(process, seconds):
                yield process

    def _working_on(self, uuid: str) -> Iterable[Workload]:
        return (workload for workload in self._workloads if uuid in workload.uuids)

    def _scan(self) -> None:
        """Look at the machine's processes, unless that was done just now."""
        now = self._now()
        if 0 <= now - self._scanned_at < _SCAN_SECONDS:
            return
        devices = [device.uuid for card in self._cards for device in card.mig_devices]
        self._workloads = find_workloads((*self.uuids, *devices), self._proc)
        self._scanned_at = now
        self._settle(now)

    # Faults -----------------------------------------------------------------------------------

    def _fail_unless_there(self, function: str, symbol: str | None = None) -> None:
        """Raise when the library or the kernel module cannot answer this function at all."""
        symbol = symbol or SYMBOLS.get(function, function)
        if self._release.lacks(symbol):
            raise missing(function)
        for number, fault in enumerate(self._scenario.faults):
            if (
                isinstance(fault, Missing)
                and fault.function in (function, symbol)
                and self._counts(number, fault)
            ):
                raise missing(function)
        if not self._scenario.driver_loaded:
            raise error("DRIVER_NOT_LOADED")

    def _strike(self, function: str, card: SimulatedCard | None) -> Answer | None:
        if card is not None and (card.index in self._lost or card not in self._visible()):
            raise error("GPU_IS_LOST")
        scripted: Answer | None = None
        for number, fault in enumerate(self._scenario.faults):
            if isinstance(fault, Field | Missing) or not self._matches(
                number, fault, function, card
            ):
                continue
            match fault:
                case Hang():
                    self._hang(fault)
                case Fail(error=name):
                    raise error(name)
                case Lose():
                    if card is not None:
                        self._lost.add(card.index)
                        raise error("GPU_IS_LOST")
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
        return self._counts(number, fault)

    def _counts(self, number: int, fault: Fault) -> bool:
        """Whether this call, which the fault is about, is one of those that it strikes."""
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

    # Time -------------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """Bring every card to this moment, through all that the scenario changes until then."""
        self._settled_at = now
        self._workloads = tuple(w for w in self._workloads if is_alive(w.pid, self._proc))
        seconds = now - self._began_at
        while self._turns and self._turns[-1] <= seconds:
            turn = self._turns.pop()
            if any(card.now <= self._began_at + turn for card in self._cards):
                self._reach(turn)
        self._reach(seconds)

    def _reach(self, seconds: float) -> None:
        """Let the cards work until then as they did, and from then on as the scenario says."""
        now = self._began_at + seconds
        scenario = self._scenario
        for card in self._cards:
            card.advance(now)
            if scenario.counters or card.told:
                card.told = {
                    (told.fact, told.label): told.value
                    for told in scenario.counters
                    if told.gpu == card.index and is_due(told, seconds)
                }
        if scenario.mig or scenario.resets:
            self._settle_partitions(seconds)
        for card in self._cards:
            if scenario.processes or self._workloads or card.work != IDLE:
                self._burden(card, seconds)

    def _burden(self, card: SimulatedCard, seconds: float) -> None:
        """Give the card, and its MIG devices, the work of the processes on them."""
        processes = [
            (p, Work(p.memory_bytes, p.utilization, p.encoder, p.decoder))
            for p in self._scripted_on(card, seconds)
        ]
        whole = IDLE
        if not card.mig_enabled:
            for _, work in processes:
                whole = whole.plus(work)
            for workload in self._working_on(card.uuid):
                whole = whole.plus(Work(workload.memory_bytes, workload.utilization))
        for device in card.mig_devices:
            mine = IDLE
            for process, work in processes:
                if device_of(card, process) is device:
                    mine = mine.plus(work)
            for workload in self._working_on(device.uuid):
                mine = mine.plus(Work(workload.memory_bytes, workload.utilization))
            device.work = mine.within(device.memory_bytes)
            whole = whole.plus(device.work, device.compute_share)
        card.carry(whole)

    # Partitions -------------------------------------------------------------------------------

    def _partition_changed(self, card: SimulatedCard, at: float) -> None:
        """Hear of a GPU whose MIG mode or instances are not as they were."""
        self._settled_at = float("-inf")  # who is on a device that was made has work on it
        if self._partitions.state.is_shared:
            self._scanned_at = float("-inf")  # who may be on one that another process made

    def _join(self) -> None:
        try:
            self._partitions.state.join()
        except BadInput as wrong:
            self._complain_of("partitions", str(wrong))
            raise error("UNKNOWN") from wrong

    def _take_partitions(self, now: float) -> None:
        """Take what other processes changed; a wrong file is complained about and not taken."""
        try:
            self._partitions.refresh(now)
            self._complaints.pop("partitions", None)
        except BadInput as wrong:
            self._complain_of("partitions", f"{wrong}; the partitions stay as they were")

    def _settle_partitions(self, seconds: float) -> None:
        try:
            self._partitions.settle(seconds)
        except BadInput as wrong:
            self._complain_of("partitions", f"{wrong}; the partitions stay as they were")

    # The scenario -----------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take a scenario file that changed; a wrong one is complained about and not taken."""
        if self._file is None:
            return
        try:
            if self._file.refresh():
                self._take(self._file.scenario, self._file.began_at)
                self._complaints.pop("scenario", None)
        except BadInput as wrong:
            self._complain_of("scenario", f"{wrong}; the scenario goes on as it was")

    def _complain_of(self, what: str, text: str) -> None:
        """Complain once of what stays wrong."""
        if self._complaints.get(what) != text:
            self._complaints[what] = text
            self._complain(text)

    def _take(self, scenario: Scenario, began_at: float) -> None:
        named = [process.gpu for process in scenario.processes]
        named += [mig.gpu for mig in scenario.mig]
        named += [reset.gpu for reset in scenario.resets]
        named += [event.gpu for event in scenario.events]
        named += [told.gpu for told in scenario.counters]
        named += [fault.gpu for fault in scenario.faults if fault.gpu is not None]
        for gpu in named:
            if not 0 <= gpu < len(self._cards):
                raise BadInput(f"scenario: there is no GPU {gpu}, only {len(self._cards)}")
        for fault in scenario.faults:
            if isinstance(fault, Fail | Field) and fault.error is not None:
                error(fault.error)
            if isinstance(fault, Missing) and fault.function == EVERY_FUNCTION:
                raise BadInput("scenario: a missing function has to be named")
        for mig in scenario.mig:
            lay_out(self._cards[mig.gpu].model, mig.devices)
        driver = scenario.driver
        release = USUAL_DRIVER if driver is None else parse_release(driver.version)
        if scenario.driver_loaded and not self._scenario.driver_loaded:
            for card in self._cards:
                card.reload()
        self._scenario, self._began_at, self._release = scenario, began_at, release
        self._strikes = [0] * len(scenario.faults)
        self._turns = turns(scenario)
        self._settled_at = float("-inf")
        self._note_whether_plain()
        self._partitions.play(scenario, began_at, self._now())

    def _note_whether_plain(self) -> None:
        self._is_plain = (
            self._sessions > 0
            and self._scenario.driver_loaded
            and not self._scenario.faults
            and not self._lost
            and self._release is USUAL_DRIVER
        )


def device_of(card: SimulatedCard, process: ScriptedProcess) -> MigDevice | None:
    """Return the MIG device that a scripted process is on; None for one that is not there."""
    devices = card.mig_devices
    if process.mig_start is not None:
        devices = tuple(each for each in devices if each.place.start == process.mig_start)
    return devices[process.mig_device] if process.mig_device < len(devices) else None


def of_system(answer: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Make a function that is about no GPU."""
    function = answer.__name__

    @wraps(answer)
    def call(self: S, /, *arguments: P.args, **_: P.kwargs) -> T:
        scripted = self.admit(function, None)
        return told(scripted, lambda: answer(self, *arguments, **_))

    return call


def of_card(
    answer: Callable[Concatenate[S, SimulatedCard, P], T],
    function: str | None = None,
    symbol: str | None = None,
) -> Callable[Concatenate[S, SimulatedCard, P], T]:
    """Make a function that a MIG device does not support, of the name by which faults know it.

    It is missing where the library lacks `symbol`, as nvidia-ml-py names that it calls.
    """
    return _asking(answer, function or answer.__name__, symbol, of_mig=False)


def of_device(
    answer: Callable[Concatenate[S, Device, P], T],
    function: str | None = None,
) -> Callable[Concatenate[S, Device, P], T]:
    """Make a function that a MIG device answers too."""
    return _asking(answer, function or answer.__name__, None, of_mig=True)


def _asking(
    answer: Callable[Concatenate[S, D, P], T], function: str, symbol: str | None, *, of_mig: bool
) -> Callable[Concatenate[S, D, P], T]:
    @wraps(answer)
    def call(self: S, device: D, /, *arguments: P.args, **_: P.kwargs) -> T:
        scripted = self.admit(function, device, symbol)
        if not of_mig and isinstance(device, MigDevice):
            raise error("NOT_SUPPORTED")
        if scripted is None:
            return answer(self, device, *arguments, **_)
        return told(scripted, lambda: answer(self, device, *arguments, **_))

    return call


def told(fault: Answer | None, answer: Callable[[], T]) -> T:
    """Return what the scenario says in place of the answer, or in some fields of it."""
    if fault is None:
        return answer()
    if not isinstance(fault.value, dict):
        return cast("T", fault.value)
    struct: Any = answer()
    for name, value in fault.value.items():
        setattr(struct, name, value)
    return cast("T", struct)
