"""Reads every GPU on the beat, and tells the service manager that the beat goes on.

A turn of the loop ends in bounded time, whatever the driver does: `WATCHDOG=1` follows each one,
because starting the agent anew would not mend a driver. `READY=1` comes with the first sample, or
once it is known that there will be none for now; `STATUS=` says which.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, assert_never

from stoker.agent.driver import DriverError, DriverTimeout, HostReleased, HostRenewed
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import (
    Failed,
    HostState,
    Released,
    Running,
    Starting,
    Stopping,
    Unreaped,
)
from stoker.agent.events import (
    DriverChanged,
    Event,
    InventoryRead,
    ReleaseTimePassed,
    SampleTaken,
    SamplingFailed,
)
from stoker.agent.facts import Rate
from stoker.agent.metrics.snapshot import Durations
from stoker.agent.model import CollectorStatus, DriverState, DriverStatus, NodeView
from stoker.agent.readings import Inventory
from stoker.agent.words import describe_release, summarize
from stoker.core.clock import Clock

# How long is waited for the driver's first word before it is said that it does not answer: at the
# start, because a library that is missing is found out at once, and then no aggregator need hear
# of this node; and after a release, because opening a driver takes its time.
FIRST_WORD_SECONDS = 3.0

_BAD = frozenset({DriverState.BLOCKED, DriverState.FAILED, DriverState.RELEASED})

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Tells the service manager."""

    def __call__(self, **state: str) -> None:
        """Tell such as READY="1"."""
        ...


class Sampler:
    """The sampling loop. `run` must be running for anything to be read."""

    def __init__(
        self,
        host: DriverHost,
        *,
        interval_seconds: float,
        slow_interval_seconds: float,
        view: Callable[[], NodeView],
        happen: Callable[[Event], None],
        tell: Tell,
        clock: Clock,
    ) -> None:
        self._host = host
        self._interval_seconds = interval_seconds
        self._slow_interval_seconds = slow_interval_seconds
        self._view = view
        self._happen = happen
        self._tell = tell
        self._clock = clock
        self._inventory: Inventory | None = None
        self._is_inventory_wanted = False
        self._error: DriverError | None = None  # why the last tick failed
        self._slow_due = -math.inf  # monotonic
        self._profiling_paused_until = -math.inf  # monotonic
        self._is_ready = False
        self._was_released = False
        self._statuses: Mapping[str, CollectorStatus] = {}  # replaced: other threads read it
        self.durations = Durations()
        self.driver_since: float | None = None  # when its state became what it is, Unix seconds

    @property
    def statuses(self) -> Mapping[str, CollectorStatus]:
        """How the newest reading of each kind went: "fast", "slow", "inventory"."""
        return self._statuses

    # --- what others ask for

    def want_inventory(self) -> None:
        """Ask the driver anew which GPUs there are, with the next tick."""
        self._is_inventory_wanted = True

    def pause_profiling(self, seconds: float | None) -> None:
        """Leave the hardware counters to somebody else, for so long or until it is resumed."""
        seconds = math.inf if seconds is None else seconds
        self._profiling_paused_until = self._clock.monotonic() + seconds

    def resume_profiling(self) -> None:
        """Read the hardware counters again."""
        self._profiling_paused_until = -math.inf

    @property
    def profiling_pause_seconds(self) -> float:
        """For how long the hardware counters are left alone still; 0: they are read."""
        return max(0.0, self._profiling_paused_until - self._clock.monotonic())

    # --- the loop

    async def run(self) -> None:
        """Sample until cancelled."""
        due = self._clock.monotonic()
        while True:
            await self._turn()
            self._tell_how_it_is()
            due = next_tick(due, self._clock.monotonic(), self._interval_seconds)
            await self._clock.sleep(due - self._clock.monotonic())

    async def first_word(self) -> DriverError | None:
        """Wait for the driver's first word; return the error if it was one."""
        try:
            async with asyncio.timeout(FIRST_WORD_SECONDS):
                inventory = await self._host.ready()
        except TimeoutError:
            _log.warning("the driver has not answered within %g s", FIRST_WORD_SECONDS)
            return None
        except DriverError as error:
            # Let go of for a while it is no news: whoever had that done has said so.
            if self._view().release is None and not isinstance(error, HostReleased):
                _log.warning("the driver cannot be read: %s", error)
            return error
        _log.info("the driver answers: %d GPUs", len(inventory.gpus))
        self._learn(inventory)
        return None

    def note_driver(self) -> None:
        """Tell the state how the driver is, if that has changed."""
        view = self._view()
        release = view.release
        released = None if release is None else describe_release(release, len(view.held))
        restarts = self._host.counters.restarts_total
        status = describe_driver(self._host.state, self._error, restarts, released)
        if self.driver_since is None or status.state is not view.driver.state:
            self.driver_since = self._clock.now()
        if status != view.driver:
            self._happen(DriverChanged(self._clock.now(), status))

    async def _turn(self) -> None:
        if self._view().release is not None:
            self._happen(ReleaseTimePassed(self._clock.now()))
        if self._view().release is not None:
            self._stand_by()
            return
        if self._was_released:
            self._was_released = False
            await self.first_word()
        await self._sample()

    def _stand_by(self) -> None:
        """Read nothing: the driver is released."""
        self._was_released, self._error, self._slow_due = True, None, -math.inf
        self._statuses = {
            reader: CollectorStatus(last_success_at=status.last_success_at)
            for reader, status in self._statuses.items()
        }
        self.note_driver()

    async def _sample(self) -> None:
        began = self._clock.monotonic()
        # Half a tick early is in time: a slow turn comes with the tick that is nearest.
        is_slow = began >= self._slow_due - self._interval_seconds / 2
        rates = (Rate.FAST, Rate.SLOW) if is_slow else (Rate.FAST,)
        try:
            readings = await self._host.sample(rates, profiling=not self.profiling_pause_seconds)
            await self._note_inventory()
        except DriverError as error:
            if self._view().release is not None or isinstance(error, HostReleased):
                self._was_released = True  # let go of meanwhile: no failure
                return
            self._note(began, rates, succeeded=False)
            # Fast facts first when it reads again, the slow ones with the tick after.
            self._slow_due = self._clock.monotonic() + 2 * self._interval_seconds
            self._fail(error)
            return
        self.durations = self.durations.with_one(self._clock.monotonic() - began)
        self._error = None
        self.note_driver()
        before = self._view().samples_total
        self._happen(SampleTaken(self._clock.now(), readings))
        self._note(began, rates, succeeded=self._view().samples_total > before)
        if is_slow:
            self._slow_due = began + self._slow_interval_seconds

    def _fail(self, error: DriverError) -> None:
        last, self._error = self._error, error
        if last is None or last.kind != error.kind:
            _log.warning("sampling failed: %s", error)
        self.note_driver()
        self._happen(SamplingFailed(self._clock.now(), error.kind, str(error)))

    async def _note_inventory(self) -> None:
        """Tell the state which GPUs there are, when the driver host has learnt it anew."""
        if self._is_inventory_wanted:
            self._is_inventory_wanted = False
            began, succeeded = self._clock.monotonic(), False
            try:
                self._learn(await self._host.inventory())
                succeeded = True
            finally:
                self._note(began, ("inventory",), succeeded=succeeded)
        elif isinstance(self._host.state, Running):
            self._learn(await self._host.ready())

    def _learn(self, inventory: Inventory) -> None:
        if inventory is not self._inventory:
            self._inventory = inventory
            for fault in inventory.missing:
                who = f"GPU {fault.index}" + (f" ({fault.uuid})" if fault.uuid else "")
                _log.warning("%s cannot be read: %s", who, fault.message)
            status = CollectorStatus(succeeded=True, last_success_at=self._clock.now())
            self._statuses = {**self._statuses, "inventory": status}
            self._happen(InventoryRead(self._clock.now(), inventory))
            self._slow_due = -math.inf  # what was known of the GPUs before may be of others

    def _note(self, began: float, readers: Sequence[str], *, succeeded: bool) -> None:
        for reader in readers:
            before = self._statuses.get(reader, CollectorStatus())
            status = CollectorStatus(
                succeeded=succeeded,
                duration_seconds=self._clock.monotonic() - began,
                last_success_at=self._clock.now() if succeeded else before.last_success_at,
            )
            self._statuses = {**self._statuses, reader: status}

    # --- the service manager

    def _tell_how_it_is(self) -> None:
        view = self._view()
        is_known = view.samples_total > 0 or view.driver.state in _BAD or bool(view.unread)
        ready = {"READY": "1"} if is_known and not self._is_ready else {}
        self._is_ready = self._is_ready or is_known
        self._tell(**ready, WATCHDOG="1", STATUS=summarize(view))


def next_tick(due: float, now: float, interval: float) -> float:
    """Return when the next tick is due after the one at `due`; missed ones are not made up for."""
    missed = max(0, math.floor((now - due) / interval))
    return due + (missed + 1) * interval


def describe_driver(
    state: HostState, error: DriverError | None, restarts: int, released: str | None = None
) -> DriverStatus:
    """Return what is told about the driver.

    `error`: why the last sampling tick failed, if so; `released`: what is said of the release that
    is in force, if one is.
    """
    if released is not None and not isinstance(state, Unreaped):
        pending = "" if isinstance(state, Released) else "being let go of: "
        return DriverStatus(DriverState.RELEASED, pending + released, restarts)
    match state:
        case Running():
            return DriverStatus(DriverState.READING, "", restarts)
        case Failed(error=cause):
            return DriverStatus(_failing(cause), str(cause), restarts)
        case Starting() | Stopping() | Released():
            if error is None:
                return DriverStatus(DriverState.STARTING, "", restarts)
            return DriverStatus(_failing(error), str(error), restarts)
        case Unreaped():
            wanted = f"; {released}" if released else ""
            return DriverStatus(DriverState.BLOCKED, state.reason + wanted, restarts)
        case _:
            assert_never(state)


def host_pid(state: HostState) -> int | None:
    """Return the PID of the driver host, while there is one."""
    match state:
        case Starting(pid=pid) | Running(pid=pid) | Stopping(pid=pid) | Unreaped(pid=pid):
            return pid
        case Failed() | Released():
            return None
        case _:
            assert_never(state)


def _failing(error: DriverError) -> DriverState:
    match error:
        case DriverTimeout():
            return DriverState.BLOCKED
        case HostRenewed():
            return DriverState.STARTING
        case _:
            return DriverState.FAILED
