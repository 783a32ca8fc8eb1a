"""Reads who uses the GPUs, again and again: the driver tells the PIDs, /proc whose they are.

With an `Attribution` it also tells which unit, container, pod or Slurm job each one is part of, and
what of the GPUs others have handed out.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from stoker.agent.attribution.holders import describe_holders
from stoker.agent.attribution.pod_names import PodNames
from stoker.agent.attribution.resolver import Attributed, Attribution, Looked
from stoker.agent.driver import DriverError
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.events import (
    Event,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
)
from stoker.agent.model import CollectorStatus, NodeView, ProcessSeen
from stoker.agent.owners import NOBODY, DeviceHolder, Owner
from stoker.agent.privileged import Helper, HelperUnavailable, RawHolder
from stoker.agent.proctable import ProcessFacts, ProcTable
from stoker.agent.readings import ProcessReading
from stoker.core.clock import Clock

# How long looking up the processes on the GPUs may take.
LOOK_UP_SECONDS = 5.0
# How many look for holders at one time; more wait. Each look costs the helper one of its few
# connections, which the agent needs for what it asks itself, and a walk over all of /proc.
HOLDERS_ASKED_MAX = 4

T = TypeVar("T")

_log = logging.getLogger(__name__)


class TenantReader:
    """The loop that reads processes. `run` must be running for anything to be read."""

    def __init__(
        self,
        host: DriverHost,
        proctable: ProcTable,
        interval_seconds: float,
        *,
        view: Callable[[], NodeView],
        happen: Callable[[Event], None],
        clock: Clock,
        attribution: Attribution | None = None,
    ) -> None:
        """Take whom to ask and whom to tell. Without `attribution` no process has an owner.

        Nothing is said then of what others have handed out, as if there were nobody else.
        """
        self._host = host
        self._proctable = proctable
        self._attribution = attribution
        self._interval_seconds = interval_seconds
        self._view = view
        self._happen = happen
        self._clock = clock
        self._wanted = asyncio.Event()
        self._looking: asyncio.Future[_Found] | None = None
        self.status = CollectorStatus()

    def want(self) -> None:
        """Have a reading begin now, or right after the one that is under way."""
        self._wanted.set()

    async def run(self) -> None:
        """Read until cancelled; while the driver is released there is nobody to ask."""
        try:
            while True:
                self._wanted.clear()
                if self._view().release is None:
                    await self._read()
                else:
                    self.status = CollectorStatus(last_success_at=self.status.last_success_at)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_seconds):
                        await self._wanted.wait()
        finally:
            if self._attribution is not None:
                await self._attribution.close()

    async def _read(self) -> None:
        began = self._clock.monotonic()
        self._happen(ProcessReadingBegun(self._clock.now()))
        event = await self._taken()
        self._happen(event)
        succeeded = isinstance(event, ProcessesTaken)
        self.status = CollectorStatus(
            succeeded=succeeded,
            duration_seconds=self._clock.monotonic() - began,
            last_success_at=event.at if succeeded else self.status.last_success_at,
        )

    async def _taken(self) -> ProcessesTaken | ProcessReadingFailed:
        try:
            reading = await self._host.processes()
            async with asyncio.timeout(LOOK_UP_SECONDS):
                facts, looked = await self._look_up(reading.processes)
        except DriverError as error:
            return ProcessReadingFailed(self._clock.now(), str(error))
        except TimeoutError:
            reason = f"/proc has not told about the processes within {LOOK_UP_SECONDS:g} s"
            _log.warning("%s", reason)
            return ProcessReadingFailed(self._clock.now(), reason)
        told = await self._resolve(looked)
        faults = reading.failed_gpus
        return ProcessesTaken(
            at=self._clock.now(),
            started_at=reading.started_at,
            processes=tuple(
                see(
                    each,
                    facts[each.pid],
                    told.owner(each.pid, each.uuid),
                    told.claims.get(each.pid),
                )
                for each in reading.processes
            ),
            unread_gpu_uuids=tuple(each.uuid for each in faults if each.uuid is not None),
            has_unnamed_unread=any(each.uuid is None for each in faults),
            assignments=told.assignments,
            assignments_unknown=told.assignments_unknown,
        )

    async def _look_up(self, processes: Sequence[ProcessReading]) -> "_Found":
        """Ask /proc about the processes; at most one such look is under way."""
        if self._looking is None or self._looking.done():
            self._looking = in_thread(lambda: self._look(processes))
            return await asyncio.shield(self._looking)
        await asyncio.wait([self._looking])  # of an earlier reading: it tells about then
        return await self._look_up(processes)

    def _look(self, processes: Sequence[ProcessReading]) -> "_Found":
        facts = describe_all(processes, self._proctable)
        if self._attribution is None:
            return facts, None
        return facts, self._attribution.look(facts.values())

    async def _resolve(self, looked: Looked | None) -> Attributed:
        if self._attribution is None or looked is None:
            return Attributed({})
        view = self._view()
        return await self._attribution.resolve(looked, view.inventory, view.telemetry)


_Found = tuple[Mapping[int, ProcessFacts], Looked | None]


class HolderReader:
    """Tells people who has device files of the driver open, however many ask."""

    def __init__(self, helper: Helper, proctable: ProcTable) -> None:
        """Take who sees them, and who knows the names of users."""
        self._helper = helper
        self._proctable = proctable
        self._turns = asyncio.Semaphore(HOLDERS_ASKED_MAX)
        self._naming: asyncio.Future[tuple[DeviceHolder, ...]] | None = None

    async def read(self) -> tuple[DeviceHolder, ...]:
        """Return them as they are now; raises HelperUnavailable."""
        async with self._turns:
            raw = await self._helper.holders()
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS):
                return await self._named(raw)
        except TimeoutError as error:
            raise HelperUnavailable(
                "who has the driver's device files open cannot be told: the names of users and "
                f"pods have not come within {LOOK_UP_SECONDS:g} s"
            ) from error

    async def _named(self, raw: Sequence[RawHolder]) -> tuple[DeviceHolder, ...]:
        """Look up names; one such look is under way at most, as a directory server may hang."""
        while self._naming is not None and not self._naming.done():
            await asyncio.wait([self._naming])
        self._naming = in_thread(lambda: describe_holders(raw, self._proctable, PodNames()))
        return await asyncio.shield(self._naming)


def describe_all(
    processes: Iterable[ProcessReading], table: ProcTable
) -> Mapping[int, ProcessFacts]:
    """Return what /proc tells of each, by PID; a process on several GPUs is looked up once."""
    found: dict[int, ProcessFacts] = {}
    for process in processes:
        if process.pid not in found:
            found[process.pid] = table.describe(process)
    table.remember_only(found.keys())
    return found


def see_all(processes: Sequence[ProcessReading], table: ProcTable) -> tuple[ProcessSeen, ...]:
    """Return what is known of all without asking anybody whose they are."""
    facts = describe_all(processes, table)
    return tuple(see(process, facts[process.pid]) for process in processes)


def see(
    process: ProcessReading,
    facts: ProcessFacts,
    owner: Owner = NOBODY,
    claim: str | None = None,
) -> ProcessSeen:
    """Return what the driver and /proc together tell about a process, and whose it is.

    `claim`: the allocation that it names, where /proc does not tell that to this user.
    """
    return ProcessSeen(
        gpu_uuid=process.uuid,
        pid=process.pid,
        user=facts.user or "",
        command=facts.command,
        memory_used_bytes=process.memory_used_bytes,
        started_at=facts.started_at,
        claimed_allocation_id=claim if facts.allocation_id is None else facts.allocation_id,
        owner=owner,
        gpu_instance_id=process.gpu_instance_id,
    )


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run a function that may never return in a thread that keeps nothing from ending."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function())
        except Exception as error:  # noqa: BLE001 (it is raised where the future is awaited)
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="proc reader").start()
    return asyncio.wrap_future(result)
