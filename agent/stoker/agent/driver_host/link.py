"""The agent's side of the driver host: asks it, gives up on it in time, and starts a fresh one.

    Starting ──▶ Running ──▶ Stopping ──▶ Failed ──▶ Starting ...
       │                      ▲  │  │ └──▶ Starting (renewal)
       └──────────────────────┘  │  └──▶ Unreaped ──▶ Failed or Released
                                 └──▶ Released ──▶ Starting (resume)

- A call into the driver that does not return in time condemns the host: it is asked to end, killed
  after a grace, and reaped. The kernel may hold a hung process beyond SIGKILL; until it is reaped
  no other is started, so at most one such process ever exists.
- A GPU on which a host hung or crashed becomes a suspect: the next host leaves it alone, so that
  the other GPUs are read again. From time to time a suspect is tried again, at growing intervals,
  because trying costs the other GPUs a few readings when it still hangs. So is DCGM, when a host
  hung in it.
- A GPU that was lost is seen again only by a fresh session: for its sake the host is renewed, at
  growing intervals too.
- A driver that cannot be used (library gone, module reloaded) ends the host too, because only a
  new process can load the library anew.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar, assert_never

import msgspec

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    DriverUnavailable,
    HostEnded,
    HostReleased,
    HostRenewed,
    HostUnavailable,
    InventoryChanged,
    Suspect,
)
from stoker.agent.driver_host.culprits import Culprits
from stoker.agent.driver_host.frames import (
    INVENTORY,
    OPENED,
    PROCESSES,
    READINGS,
    DriverSource,
    Request,
    Verb,
    from_failure,
    to_failure,
)
from stoker.agent.driver_host.process import (
    HostProcess,
    Late,
    ReadState,
    Spawn,
    spawn_host,
    state_of,
)
from stoker.agent.driver_host.states import (
    Failed,
    HostCounters,
    HostReport,
    HostState,
    Patience,
    Released,
    Running,
    Starting,
    Stopping,
    Unreaped,
    stuck,
    why_busy,
    with_hang,
)
from stoker.agent.driver_host.suspects import Key
from stoker.agent.driver_host.watch import Limits, Note, Overdue
from stoker.agent.facts import Rate
from stoker.agent.processes import wait
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading
from stoker.core.clock import Clock, SystemClock

T = TypeVar("T")

# A process that is asked or killed is looked at so often for what has changed meanwhile.
_STEP_SECONDS = 0.05
_UNREAPED_STEP_SECONDS = 0.25


class DriverHost:
    """The driver, as the agent asks it. `run` must be running for anything else to work."""

    def __init__(
        self,
        source: DriverSource,
        *,
        patience: Patience | None = None,
        clock: Clock | None = None,
        spawn: Spawn = spawn_host,
        read_state: ReadState = state_of,
    ) -> None:
        """Take what to open and how patient to be; nothing is started yet."""
        self._source = source
        self._patience = patience or Patience()
        self._clock = clock or SystemClock()
        self._spawn, self._read_state = spawn, read_state
        self._turn = asyncio.Lock()  # one question at a time
        self._changed = asyncio.Event()  # replaced with each change of state
        self._is_wanted = True
        self._state: HostState = Starting(None, self._clock.now())
        self._counters = HostCounters()
        self._is_profiling = True  # as the last reading was asked for
        self._host: HostProcess | None = None
        self._culprits = Culprits(
            retrial_seconds_min=self._patience.retrial_seconds_min,
            retrial_seconds_max=self._patience.retrial_seconds_max,
        )

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
        return tuple(self._culprits.suspects)

    @property
    def call(self) -> Note | None:
        """The call into the driver that is being made now, if any."""
        return self._host.note if self._host else None

    def describe(self) -> HostReport:
        """Return what an operator wants to know."""
        call = self.call
        return HostReport(
            state=self._state,
            is_wanted=self._is_wanted,
            function=call.function if call else None,
            gpu=self._culprits.name_of(call),
            suspects=self.suspects,
            awaited_gpus=self._culprits.awaited_gpus,
            is_dcgm_left_alone=self._culprits.is_dcgm_left_alone,
        )

    async def run(self) -> None:
        """Keep a host alive until cancelled; then end it, within grace and kill time."""
        failures = 0
        ended: DriverError | None = None  # why the host before is no more
        try:
            while True:
                if not self._is_wanted:
                    self._become(Released(self._clock.now()))
                    failures, ended = 0, None
                    await self._changed.wait()
                    continue
                if isinstance(ended, HostRenewed):
                    self._count(renewals_total=1)
                elif ended is not None:
                    self._count(restarts_total=1)
                began = self._clock.monotonic()
                ended = await self._live()
                if isinstance(ended, HostReleased):
                    ended = None
                elif not isinstance(ended, HostRenewed):
                    lived = self._clock.monotonic() - began
                    failures = 1 if lived >= self._patience.settled_seconds else failures + 1
                    await self._pause(ended, failures)
        finally:
            if self._host is not None:
                await self._end(self._host, is_last=True)

    async def ready(self) -> Inventory:
        """Wait for a host that answers, without a deadline; raises why there is none."""
        await self._running()
        assert self._culprits.inventory is not None
        return self._culprits.inventory

    async def inventory(self) -> Inventory:
        """Find the GPUs anew. Raises DriverError."""
        async with self._asking() as host:
            return await self._find_gpus(host, self._patience.limits)

    async def sample(
        self, rates: tuple[Rate, ...] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        """Read facts of every GPU. One that is missing and known is a reading without facts.

        GPUs that came, went or changed their mode are found by the way. Raises DriverError when
        there is no reading at all: then every GPU's facts are absent.
        """
        self._is_profiling = profiling
        question = Request(Verb.SAMPLE, rates=rates, profiling=profiling)
        limits = self._patience.limits
        async with self._asking() as host:
            try:
                readings = await self._ask(host, question, READINGS, limits)
            except InventoryChanged:
                self._count(inventory_changes_total=1)
                await self._find_gpus(host, limits)
                readings = await self._ask(host, question, READINGS, limits)
        if self._culprits.absences.notice(readings, self._clock.monotonic()):
            self._notify()
        return self._culprits.completed(readings, self._clock.now())

    async def processes(self) -> ProcessesReading:
        """List who uses every GPU; of a missing one the users are unknown. Raises DriverError."""
        async with self._asking() as host:
            question = Request(Verb.PROCESSES)
            reading = await self._ask(host, question, PROCESSES, self._patience.limits)
        return replace(reading, failed_gpus=reading.failed_gpus + self._culprits.missing)

    async def release(self) -> None:
        """Let go of the devices and stay away.

        Returns or raises within a second: HostStuck when the kernel holds the host. The devices
        stay wanted free then, and are, as soon as the kernel lets go.
        """
        self._is_wanted = False
        self._notify()
        if self._host is not None:
            self._host.condemn(HostReleased("released on request"))
        while not isinstance(self._state, Released):
            if isinstance(self._state, Unreaped):
                raise stuck(self._state)
            await self._changed.wait()
            if self._is_wanted:
                raise HostUnavailable("it was resumed before it had let go")

    def resume(self) -> None:
        """Take the driver again."""
        self._is_wanted = True
        if isinstance(self._state, Released):
            self._become(Starting(None, self._clock.now()))
        else:
            self._notify()

    # --- asking

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[HostProcess]:
        """Have one's turn with a host that runs.

        A host that hangs meanwhile, or cannot use the driver, is condemned.
        """
        try:
            host = await self._take_turn()
            try:
                yield host
            except (DriverTimeout, DriverUnavailable) as error:
                host.condemn(error)
                raise
            finally:
                self._turn.release()
        except DriverError:
            self._count(failures_total=1)
            raise

    async def _take_turn(self) -> HostProcess:
        """Wait for the turn and for a host that runs, as long as a call may take.

        The time for the answer counts from then on: who waited long behind another question must
        not blame the host for it.
        """
        seconds = self._patience.call_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._turn.acquire()
                try:
                    return await self._running()
                except BaseException:
                    self._turn.release()
                    raise
        except TimeoutError:
            raise DriverTimeout(
                f"{why_busy(self._state, self.call)}; waited {seconds:g} s"
            ) from None

    async def _ask(
        self,
        host: HostProcess,
        question: Request,
        answers: msgspec.msgpack.Decoder[T],
        limits: Limits,
    ) -> T:
        try:
            return await host.ask(question, answers, limits)
        except Late as late:
            raise self._timed_out(late.overdue) from None

    async def _find_gpus(self, host: HostProcess, limits: Limits) -> Inventory:
        """Look for the GPUs anew, and take down who is who."""
        inventory = await self._look(host, (), limits)
        self._culprits.learn(inventory, self._clock.monotonic())
        self._notify()  # there may be one to wait for, or one less
        return inventory

    async def _look(self, host: HostProcess, tried: tuple[Key, ...], limits: Limits) -> Inventory:
        """Look for the GPUs anew, leaving alone the suspects that are not to be tried."""
        suspects = self._culprits.suspects
        suspects.distrust_numbers()
        inventory = None
        while inventory is None or suspects.misplaced_by(inventory):
            question = Request(Verb.INVENTORY, suspects=suspects.without(tried))
            inventory = await self._ask(host, question, INVENTORY, limits)
        return suspects.learn(inventory)

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
                    raise stuck(self._state)
                case Released():
                    raise HostReleased("released on request; `stoker agent resume` takes it again")
                case Starting() | Stopping():
                    await self._changed.wait()
                case _:
                    assert_never(self._state)

    # --- the life of one host

    async def _live(self) -> DriverError:
        """Start one host, keep it until it is condemned, end it; return what condemned it."""
        self._become(Starting(None, self._clock.now()))
        trial = self._culprits.trial(self._clock.monotonic())
        source = replace(self._source, without_dcgm=trial.without_dcgm)
        try:
            host = await HostProcess.begin(source, self._spawn)
        except OSError as error:
            return HostEnded(f"cannot be started: {error.strerror}", function=sys.executable)
        self._host = host
        self._count(starts_total=1)
        self._become(Starting(host.pid, self._clock.now()))
        try:
            await self._greet(host)
            self._culprits.conclude(trial, self._clock.monotonic())
            self._become(Running(host.pid, self._clock.now()))
            while not host.condemned.done():
                until_trial = self._culprits.seconds_until_trial(self._clock.monotonic())
                await self._change_or(host.condemned, until_trial)
                await self._retry(host)
                await self._renew(host)
        except DriverError as error:
            host.condemn(error)
        await self._end(host)
        self._blame_crash(host)
        return host.condemned.result()

    async def _greet(self, host: HostProcess) -> None:
        """Open the driver and find the GPUs; raises DriverError when that fails or takes long."""
        limits = self._patience.start_limits
        if not self._is_wanted:
            raise HostReleased("released while it was started")
        await self._ask(host, Request(Verb.OPEN), OPENED, limits)
        await self._find_gpus(host, limits)

    async def _retry(self, host: HostProcess) -> None:
        """Try the suspects whose time has come; one that is read again is none any more."""
        limits, culprits = self._patience.limits, self._culprits
        due = culprits.suspects.due(self._clock.monotonic())
        if not due or host.condemned.done():
            return
        async with self._turn:
            try:
                inventory = await self._look(host, due, limits)
                question = Request(Verb.SAMPLE, rates=tuple(Rate), profiling=self._is_profiling)
                readings = await self._ask(host, question, READINGS, limits)
            except DriverError as error:
                culprits.suspects.put_off(self._clock.monotonic())
                if not isinstance(error, InventoryChanged):
                    raise
                await self._find_gpus(host, limits)
            else:
                culprits.acquit(inventory, readings, self._clock.monotonic())

    async def _renew(self, host: HostProcess) -> None:
        """Give way to a fresh session when it is time to look for what was lost."""
        if not self._culprits.is_renewal_due(self._clock.monotonic()):
            return
        async with self._turn:  # no question is cut off
            host.condemn(HostRenewed("replaced by a fresh one, to look for what was lost"))
            self._become(Stopping(host.pid, self._clock.now()))

    async def _end(self, host: HostProcess, *, is_last: bool = False) -> None:
        """End the process and reap it; a last one that cannot be reaped is left to the kernel."""
        self._become(Stopping(host.pid, self._clock.now()))
        host.ask_to_end()
        if not await self._ends_when_asked(host):
            host.process.kill()
            self._count(kills_total=1)
            if await wait(host.process, self._patience.kill_seconds, self._clock) is None:
                self._count(unreaped_total=1)
                since = self._clock.now()
                self._become(self._unreaped(host, since))
                if is_last:
                    return
                while host.process.poll() is None:
                    await self._clock.sleep(_UNREAPED_STEP_SECONDS)
                    if (state := self._unreaped(host, since)) != self._state:
                        self._become(state)
        self._host = None

    async def _ends_when_asked(self, host: HostProcess) -> bool:
        """Wait for the end of the process; less long from when somebody waits for the devices.

        A clean end comes first even then: SIGKILL in the middle of a call has upset the firmware
        of real cards.
        """
        patience, began = self._patience, self._clock.monotonic()
        while True:
            grace = (
                patience.end_grace_seconds if self._is_wanted else patience.release_grace_seconds
            )
            left = began + grace - self._clock.monotonic()
            if await wait(host.process, min(left, _STEP_SECONDS), self._clock) is not None:
                return True
            if left <= 0:
                return False

    def _unreaped(self, host: HostProcess, since: float) -> Unreaped:
        note, letter = host.note, self._read_state(host.pid)
        function, gpu = note.function if note else None, self._culprits.name_of(note)
        return Unreaped(host.pid, since, letter, function, gpu)

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
        try:
            await self._change_or(sleeping, None)
        finally:
            sleeping.cancel()

    # --- blaming

    def _timed_out(self, overdue: Overdue) -> DriverTimeout:
        """Count it, suspect what hangs, and return the error that says so."""
        self._count(timeouts_total=1)
        note, found = overdue.note, overdue.found
        if note is None:
            return DriverTimeout(f"the driver host {found}")
        hangs = with_hang(self._counters.hangs_by_function, note.function)
        self._counters = replace(self._counters, hangs_by_function=hangs)
        blamed = replace(note, gpu_index=overdue.gpu_index)
        self._culprits.blame(blamed, found, self._clock.monotonic())
        return DriverTimeout(found, function=note.function, gpu=self._culprits.name_of(blamed))

    def _blame_crash(self, host: HostProcess) -> None:
        crash, note = host.crash, host.note
        if crash is None:
            return
        self._count(crashes_total=1)
        if note is not None:
            found = f"ended the driver host: {crash}"
            self._culprits.blame(note, found, self._clock.monotonic())

    # --- bookkeeping

    def _become(self, state: HostState) -> None:
        self._state = state
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change_or(self, future: "asyncio.Future[Any]", seconds: float | None) -> None:
        """Wait for a change, or for the future, or for so long."""
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait(
                [future, changing], timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changing.cancel()

    def _count(self, **more: int) -> None:
        counted = {name: getattr(self._counters, name) + number for name, number in more.items()}
        self._counters = replace(self._counters, **counted)
