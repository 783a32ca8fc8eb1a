"""Looks for who uses GPUs, by a reading of processes that begins after it was asked for."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from stoker.agent import events as node
from stoker.agent.holding import STARTED_AT_ERROR_SECONDS, gpu_instances
from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd, users_of
from stoker.agent.model import NodeView
from stoker.agent.owners import DeviceHolder
from stoker.agent.partitions import GpuPartitions
from stoker.agent.procfs import parse_stat, read
from stoker.agent.proctable import ProcTable
from stoker.core.errors import StokerError

# How long a reading of processes may take that was asked for.
LOOK_SECONDS = 10.0
# How long what is about to be held may be on its way to the disk.
SETTLE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class UserLook:
    """Who uses the GPUs, as the readers of processes and of device files tell."""

    def __init__(
        self,
        proctable: ProcTable,
        *,
        own_pids: Callable[[], Collection[int | None]],
        view: Callable[[], NodeView],
        saved: Callable[[], Awaitable[None]],
        holders: Callable[[], Awaitable[tuple[DeviceHolder, ...]]],
        want_processes: Callable[[], None],
    ) -> None:
        """`own_pids`: of the agent and what it has started; `saved` returns when what is about to
        be held is noted; `holders` tells who has the driver's files open, or raises StokerError;
        `want_processes` has processes read anew.
        """
        self._own_pids = own_pids
        self._proctable = proctable
        self._view = view
        self._saved = saved
        self._holders = holders
        self._want_processes = want_processes
        self._begun = self._ended = 0  # readings of processes
        self._news = asyncio.Event()  # replaced with each reading that ends

    def notice(self, event: node.Event) -> None:
        """Take note of a reading of processes."""
        match event:
            case node.ProcessReadingBegun():
                self._begun += 1
            case node.ProcessesTaken() | node.ProcessReadingFailed():
                self._ended = self._begun
                self._news.set()
                self._news = asyncio.Event()
            case _:
                pass

    async def look(self, gpus: Sequence[GpuPartitions]) -> Mapping[str, GpuUsers]:
        """Return who uses these GPUs now, by UUID."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._saved()
            async with asyncio.timeout(LOOK_SECONDS):
                await self._reading()
        except TimeoutError:
            unknown = f"who uses it was not told within {LOOK_SECONDS:g} s"
            return {each.uuid: GpuUsers(unknown=unknown) for each in gpus}
        holders = await self._others_with_files()
        view = self._view()
        known = () if view.inventory is None else view.inventory.gpus
        minors = {each.identity.uuid: each.identity.minor_number for each in known}
        devices = gpu_instances(view.inventory)
        return {
            gpu.uuid: users_of(
                gpu, view.processes, view.held, devices, holders, minors.get(gpu.uuid)
            )
            for gpu in gpus
        }

    def ticks_of(self, process: ProcessToEnd) -> int | str | None:
        """Return when a process started, in the kernel's ticks, as it is named to be ended by.

        None: it is gone; a text: why it is not the one that was seen.
        """
        text = read(f"/proc/{process.pid}/stat")
        if not text or parse_stat(text).state == "Z":
            return None
        ticks, seen_at = parse_stat(text).started_ticks, process.started_at
        found_at = self._proctable.started_at(ticks)
        if seen_at is None or abs(found_at - seen_at) > STARTED_AT_ERROR_SECONDS:
            return f"process {process.pid} is another one than was seen on the GPU"
        return ticks

    async def _reading(self) -> None:
        wanted = self._begun + 1
        self._want_processes()
        while self._ended < wanted:
            await self._news.wait()

    async def _others_with_files(self) -> tuple[DeviceHolder, ...]:
        """Return who else has device files open; nobody where that cannot be seen.

        The driver itself says then that the GPU is in use, without a name.
        """
        try:
            found = await self._holders()
        except StokerError as error:
            _log.info("%s", error)
            return ()
        ours = self._own_pids()
        return tuple(each for each in found if each.pid not in ours)
