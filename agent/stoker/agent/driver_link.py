"""The agent's side of the driver host: asks it, gives up on it in time, and starts a fresh one.

    Starting ──▶ Running ──▶ Stopping ──▶ Failed ──▶ Starting ...
       │                      ▲  │  │
       └──────────────────────┘  │  └──▶ Unreaped ──▶ Failed
                                 └──▶ Released ──▶ Starting (resume)

- A question that is not answered in time condemns the host: it is asked to end, killed after a
  grace, and reaped. The kernel may hold a hung process beyond SIGKILL; until it is reaped no other
  is started, so at most one such process ever exists.
- A GPU on which a host hung or crashed becomes a suspect: the next host leaves it alone, so that
  the other GPUs are read again. From time to time a suspect is tried again, at growing intervals,
  because trying costs the other GPUs a few readings when it still hangs.
- A driver that cannot be used (library gone, module reloaded) ends the host too, because only a
  new process can load the library anew.
"""

import asyncio
import signal
import sys
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    DriverUnavailable,
    HostEnded,
    HostReleased,
    HostStuck,
    HostUnavailable,
    Suspect,
)
from stoker.agent.driver_frames import DriverSource, Note, Verb, from_failure, to_failure
from stoker.agent.driver_process import HostProcess, Spawn, spawn_host
from stoker.agent.driver_suspects import Suspects
from stoker.agent.processes import wait
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuFault,
    GpuReading,
    Inventory,
    ProcessesReading,
    ReadFailure,
)
from stoker.core.clock import Clock, SystemClock

T = TypeVar("T")

# How a process ends that stumbled inside of the library; killed from outside is another matter.
_CRASHES = frozenset(
    -number
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the driver host may take for what, and how soon it gets another chance."""

    start_seconds: float = 60.0  # without persistence mode nvmlInit takes seconds per GPU
    inventory_seconds: float = 10.0
    sample_seconds: float = 1.0
    processes_seconds: float = 2.0
    end_grace_seconds: float = 0.75  # between asking a host to end and killing it
    kill_seconds: float = 1.0  # after which a killed host counts as held by the kernel
    restart_seconds_min: float = 0.1  # doubled with each failure in a row
    restart_seconds_max: float = 30.0
    settled_seconds: float = 60.0  # a host that lived so long had no part in earlier failures
    retrial_seconds_min: float = 30.0  # of a suspect; doubled each time it hangs again
    retrial_seconds_max: float = 1800.0


@dataclass(frozen=True, slots=True)
class Starting:
    """A host is coming up; `pid` is None while there is not even a process."""

    pid: int | None
    since: float


@dataclass(frozen=True, slots=True)
class Running:
    """A host answers."""

    pid: int
    since: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """A host was asked to end, and is killed if it does not."""

    pid: int
    since: float


@dataclass(frozen=True, slots=True)
class Unreaped:
    """A host was killed and is held by the kernel: no other may start."""

    pid: int
    since: float


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no host; another one starts at `retry_at`."""

    error: DriverError
    retry_at: float


@dataclass(frozen=True, slots=True)
class Released:
    """There is no host, because somebody wants the devices free."""


HostState = Starting | Running | Stopping | Unreaped | Failed | Released


@dataclass(frozen=True, slots=True)
class HostCounters:
    """What happened since the agent started."""

    starts_total: int = 0
    restarts_total: int = 0  # starts after a failure, not after a release
    timeouts_total: int = 0  # questions that the driver did not answer in time
    failures_total: int = 0  # questions that were answered by an error, or could not be asked
    kills_total: int = 0  # hosts that did not end when asked


class DriverHost:
    """The driver, as the agent asks it. `run` must be running for anything else to work."""

    def __init__(
        self,
        source: DriverSource,
        *,
        patience: Patience | None = None,
        clock: Clock | None = None,
        spawn: Spawn = spawn_host,
    ) -> None:
        """Take what to open and how patient to be; nothing is started yet."""
        self._source = source
        self._patience = patience or Patience()
        self._clock = clock or SystemClock()
        self._spawn = spawn
        self._turn = asyncio.Lock()  # one question at a time
        self._changed = asyncio.Event()  # replaced with each change of state
        self._is_wanted = True
        self._state: HostState = Starting(None, self._clock.now())
        self._counters = HostCounters()
        self._host: HostProcess | None = None
        self._suspects = Suspects(
            retrial_seconds_min=self._patience.retrial_seconds_min,
            retrial_seconds_max=self._patience.retrial_seconds_max,
        )
        self._inventory: Inventory | None = None

    @property
    def state(self) -> HostState:
        """What the host is doing now."""
        return self._state

    @property
    def counters(self) -> HostCounters:
        """What happened so far."""
        return self._counters

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """The GPUs that are left alone because a host hung on them."""
        return tuple(self._suspects)

    @property
    def call(self) -> Note | None:
        """The call into the driver that is being made now, if any."""
        return self._host.note if self._host else None

    async def run(self) -> None:
        """Keep a host alive until cancelled; then end it, within grace and kill time."""
        failures = 0
        try:
            while True:
                if not self._is_wanted:
                    self._become(Released())
                    failures = 0
                    await self._change()
                    continue
                if failures:
                    self._count(restarts_total=1)
                began = self._clock.monotonic()
                error = await self._live()
                if not isinstance(error, HostReleased):
                    lived = self._clock.monotonic() - began
                    failures = 1 if lived >= self._patience.settled_seconds else failures + 1
                    await self._pause(error, failures)
        finally:
            if self._host is not None:
                await self._end(self._host, is_last=True)

    async def ready(self) -> Inventory:
        """Wait for a host that answers, without a deadline; raises why there is none."""
        await self._running()
        assert self._inventory is not None
        return self._inventory

    async def inventory(self) -> Inventory:
        """Find the GPUs anew. Raises DriverError."""
        seconds = self._patience.inventory_seconds
        return self._learn(await self._ask(Verb.INVENTORY, Inventory, seconds, self.suspects))

    async def sample(self) -> tuple[GpuReading, ...]:
        """Read every GPU. One that is missing and known is a reading without facts.

        Raises DriverError when there is no reading at all: then every GPU's facts are absent.
        """
        seconds = self._patience.sample_seconds
        readings = await self._ask(Verb.SAMPLE, tuple[GpuReading, ...], seconds)
        at = self._clock.now()
        absent = (
            GpuReading(fault.uuid, at, failures=(_whole_gpu(fault),))
            for fault in self._missing()
            if fault.uuid is not None
        )
        return (*readings, *absent)

    async def processes(self) -> ProcessesReading:
        """List who uses every GPU; of a missing one the users are unknown. Raises DriverError."""
        seconds = self._patience.processes_seconds
        reading = await self._ask(Verb.PROCESSES, ProcessesReading, seconds)
        return replace(reading, failed_gpus=reading.failed_gpus + self._missing())

    async def release(self) -> None:
        """Let go of the devices and stay away; raises HostStuck when the kernel holds the host."""
        self._is_wanted = False
        self._notify()
        if self._host is not None:
            self._host.condemn(HostReleased("released on request"))
        while not isinstance(self._state, Released):
            if isinstance(self._state, Unreaped):
                raise _stuck(self._state)
            await self._change()
            if self._is_wanted:
                raise HostUnavailable("it was resumed before it had let go")

    def resume(self) -> None:
        """Take the driver again."""
        self._is_wanted = True
        if isinstance(self._state, Released):
            self._become(Starting(None, self._clock.now()))

    async def _ask(
        self, verb: Verb, type_: type[T], seconds: float, suspects: tuple[Suspect, ...] = ()
    ) -> T:
        """Ask with a deadline; a host that misses it, or cannot use the driver, is condemned.

        The deadline counts anew when the turn has come: who waited long behind another question
        must not blame the host for it.
        """
        try:
            try:
                async with asyncio.timeout(seconds):
                    host = await self._running()
                    await self._turn.acquire()
            except TimeoutError:
                raise DriverTimeout(f"{self._why_busy()}; waited {seconds:g} s") from None
            try:
                return await self._ask_host(host, verb, type_, seconds, suspects)
            except (DriverTimeout, DriverUnavailable) as error:
                host.condemn(error)
                raise
            finally:
                self._turn.release()
        except DriverError:
            self._count(failures_total=1)
            raise

    async def _ask_host(
        self,
        host: HostProcess,
        verb: Verb,
        type_: type[T],
        seconds: float,
        suspects: tuple[Suspect, ...] = (),
    ) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await host.ask(verb, type_, suspects)
        except TimeoutError:
            raise self._timed_out(host.note, seconds) from None

    async def _running(self) -> HostProcess:
        """Return the host once it runs; raises when it will not run soon."""
        while True:
            match self._state:
                case Running():
                    assert self._host is not None
                    return self._host
                case Failed(error=error, retry_at=retry_at):
                    if isinstance(error, DriverUnavailable):
                        raise from_failure(to_failure(error))  # a traceback of its own
                    later = max(0.0, retry_at - self._clock.now())
                    raise HostUnavailable(f"no driver host for {later:.1f} s more, after: {error}")
                case Unreaped():
                    raise _stuck(self._state)
                case Released():
                    raise HostReleased("released on request; `stoker agent resume` takes it again")
                case Starting() | Stopping():
                    await self._change()
                case _:
                    assert_never(self._state)

    async def _live(self) -> DriverError:
        """Start one host, keep it until it is condemned, end it; return what condemned it."""
        self._become(Starting(None, self._clock.now()))
        try:
            host = await HostProcess.begin(self._source, self._spawn)
        except OSError as error:
            return HostEnded(f"cannot be started: {error.strerror}", function=sys.executable)
        self._host = host
        self._count(starts_total=1)
        self._become(Starting(host.pid, self._clock.now()))
        receiving = asyncio.create_task(host.receive())
        try:
            await self._greet(host)
            self._become(Running(host.pid, self._clock.now()))
            while not host.condemned.done():
                until_trial = self._suspects.seconds_until_due(self._clock.monotonic())
                await asyncio.wait([host.condemned], timeout=until_trial)
                await self._retry(host)
        except DriverError as error:
            host.condemn(error)
        finally:
            receiving.cancel()
        await self._end(host)
        note, code = host.note, host.process.returncode
        if code in _CRASHES and note is not None and note.gpu_index is not None:
            found = f"{note.function} ended the driver host: {signal.strsignal(-code)}"
            self._suspect(note.gpu_index, found)
        return host.condemned.result()

    async def _greet(self, host: HostProcess) -> None:
        """Open the driver and find the GPUs; raises DriverError when that fails or takes long."""
        seconds = self._patience.start_seconds
        if not self._is_wanted:
            raise HostReleased("released while it was started")
        await self._ask_host(host, Verb.OPEN, type(None), seconds)
        self._learn(await self._ask_host(host, Verb.INVENTORY, Inventory, seconds, self.suspects))

    async def _retry(self, host: HostProcess) -> None:
        """Try the suspects whose time has come; one that is read again is none any more."""
        patience, due = self._patience, self._suspects.due(self._clock.monotonic())
        if not due or host.condemned.done():
            return
        kept = self._suspects.without(due)
        try:
            async with self._turn:
                inventory = await self._ask_host(
                    host, Verb.INVENTORY, Inventory, patience.inventory_seconds, kept
                )
                await self._ask_host(
                    host, Verb.SAMPLE, tuple[GpuReading, ...], patience.sample_seconds
                )
        except DriverError:
            self._suspects.put_off(due, self._clock.monotonic())
            raise
        self._suspects.acquit(due)
        self._learn(inventory)

    async def _end(self, host: HostProcess, *, is_last: bool = False) -> None:
        """End the process and reap it; a last one that cannot be reaped is left to the kernel."""
        patience = self._patience
        self._become(Stopping(host.pid, self._clock.now()))
        await host.ask_to_end()
        if await wait(host.process, patience.end_grace_seconds, self._clock) is None:
            host.process.kill()
            self._count(kills_total=1)
            if await wait(host.process, patience.kill_seconds, self._clock) is None:
                self._become(Unreaped(host.pid, self._clock.now()))
                if is_last:
                    return
                await wait(host.process, float("inf"), self._clock)
        self._host = None

    async def _pause(self, error: DriverError, failures: int) -> None:
        """Wait before the next start, unless the devices are wanted free before or meanwhile."""
        patience = self._patience
        if not self._is_wanted:
            return
        pause = min(
            patience.restart_seconds_max, patience.restart_seconds_min * 2 ** (failures - 1)
        )
        self._become(Failed(error, self._clock.now() + pause))
        sleeping = asyncio.ensure_future(self._clock.sleep(pause))
        # Not `_change()`: as a task it would begin later, and miss a change until then.
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([sleeping, changing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            changing.cancel()

    def _timed_out(self, note: Note | None, seconds: float) -> DriverTimeout:
        """Count it, suspect the GPU whose call hangs, and return the error that says so."""
        self._count(timeouts_total=1)
        found = f"has not returned within {seconds:g} s"
        if note is None:
            return DriverTimeout(f"the driver host has not answered within {seconds:g} s")
        if note.gpu_index is None:
            return DriverTimeout(found, function=note.function)
        suspect = self._suspect(note.gpu_index, f"{note.function} {found}")
        gpu = suspect.uuid or f"GPU {suspect.index}"
        return DriverTimeout(found, function=note.function, gpu=gpu)

    def _suspect(self, index: int, found: str) -> Suspect:
        return self._suspects.exclude(index, found, self._clock.monotonic())

    def _learn(self, inventory: Inventory) -> Inventory:
        self._inventory = self._suspects.learn(inventory)
        return self._inventory

    def _missing(self) -> tuple[GpuFault, ...]:
        return self._inventory.missing if self._inventory else ()

    def _why_busy(self) -> str:
        match self._state:
            case Starting(pid=None):
                return "the driver host is not started yet"
            case Starting(pid=pid):
                within = f", in {self.call.function}" if self.call else ""
                return f"driver host {pid} is starting{within}"
            case Stopping(pid=pid):
                return f"driver host {pid} is being ended"
            case _:
                return "the driver host is busy with another question"

    def _become(self, state: HostState) -> None:
        self._state = state
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()

    def _count(self, **more: int) -> None:
        counted = {name: getattr(self._counters, name) + number for name, number in more.items()}
        self._counters = replace(self._counters, **counted)


def _whole_gpu(fault: GpuFault) -> ReadFailure:
    return ReadFailure(WHOLE_GPU, fault.error_kind, fault.message)


def _stuck(state: Unreaped) -> HostStuck:
    return HostStuck(
        f"driver host {state.pid} was killed and the kernel does not let it go: "
        "the driver holds it; no other is started until it is reaped"
    )
