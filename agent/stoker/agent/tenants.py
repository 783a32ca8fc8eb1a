"""Reads who uses the GPUs, again and again: the driver tells the PIDs, /proc whose they are."""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from stoker.agent.driver import DriverError
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.events import (
    Event,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
)
from stoker.agent.model import CollectorStatus, NodeView, ProcessSeen
from stoker.agent.proctable import ProcessFacts, ProcTable
from stoker.agent.readings import ProcessReading
from stoker.core.clock import Clock

# How long looking up the processes on the GPUs may take.
LOOK_UP_SECONDS = 5.0

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
    ) -> None:
        self._host = host
        self._proctable = proctable
        self._interval_seconds = interval_seconds
        self._view = view
        self._happen = happen
        self._clock = clock
        self._wanted = asyncio.Event()
        self._looking: asyncio.Future[tuple[ProcessSeen, ...]] | None = None
        self.status = CollectorStatus()

    def want(self) -> None:
        """Have a reading begin now, or right after the one that is under way."""
        self._wanted.set()

    async def run(self) -> None:
        """Read until cancelled; while the driver is released there is nobody to ask."""
        while True:
            self._wanted.clear()
            if self._view().release is None:
                await self._read()
            else:
                self.status = CollectorStatus(last_success_at=self.status.last_success_at)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_seconds):
                    await self._wanted.wait()

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
                seen = await self._look_up(reading.processes)
        except DriverError as error:
            return ProcessReadingFailed(self._clock.now(), str(error))
        except TimeoutError:
            reason = f"/proc has not told about the processes within {LOOK_UP_SECONDS:g} s"
            _log.warning("%s", reason)
            return ProcessReadingFailed(self._clock.now(), reason)
        faults = reading.failed_gpus
        return ProcessesTaken(
            at=self._clock.now(),
            started_at=reading.started_at,
            processes=seen,
            unread_gpu_uuids=tuple(each.uuid for each in faults if each.uuid is not None),
            has_unnamed_unread=any(each.uuid is None for each in faults),
        )

    async def _look_up(self, processes: Sequence[ProcessReading]) -> tuple[ProcessSeen, ...]:
        """Ask /proc about the processes; at most one such look is under way."""
        if self._looking is None or self._looking.done():
            self._looking = in_thread(lambda: see_all(processes, self._proctable))
            return await asyncio.shield(self._looking)
        await asyncio.wait([self._looking])  # of an earlier reading: it tells about then
        return await self._look_up(processes)


def see_all(processes: Sequence[ProcessReading], table: ProcTable) -> tuple[ProcessSeen, ...]:
    """Return what is known of all; a process on several GPUs is looked up once."""
    found: dict[int, ProcessFacts] = {}
    seen: list[ProcessSeen] = []
    for process in processes:
        facts = found.get(process.pid)
        if facts is None:
            facts = found[process.pid] = table.describe(process)
        seen.append(see(process, facts))
    return tuple(seen)


def see(process: ProcessReading, facts: ProcessFacts) -> ProcessSeen:
    """Return what the driver and /proc together tell about a process."""
    return ProcessSeen(
        gpu_uuid=process.uuid,
        pid=process.pid,
        user=facts.user or "",
        command=facts.command,
        memory_used_bytes=process.memory_used_bytes,
        started_at=facts.started_at,
        claimed_allocation_id=facts.allocation_id,
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
