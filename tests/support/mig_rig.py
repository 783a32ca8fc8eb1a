"""A worker of partitions on simulated cards in this process, with a virtual clock and all its news.

The keeper, the book on disk, the node's state and the session with the (simulated) driver are the
agent's own. What stands in: the driver host, of which only is noted whether it has let go.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.node import READING, Node, inventory

from stoker.agent.driver import DriverError
from stoker.agent.events import (
    DriverChanged,
    Event,
    InventoryRead,
    MigChanged,
    ProcessesTaken,
    ProcessReadingBegun,
)
from stoker.agent.mig.declared import Declaration
from stoker.agent.mig.failures import StepsUnavailable
from stoker.agent.mig.journal import MigJournal
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.library import Library
from stoker.agent.mig.looking import UserLook
from stoker.agent.mig.operations import Book
from stoker.agent.mig.worker import MigWorker
from stoker.agent.model import ProcessSeen
from stoker.agent.owners import DeviceHolder
from stoker.agent.partitions import Activation, GpuMigStatus, GpuPartitions, Step
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import GpuIdentity, Inventory, MigDeviceIdentity
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.errors import StoreError
from stoker.core.gpu_models import parse_simulate_spec
from stoker.core.mig.geometry import MigState
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport, Verb
from stoker.testing.clock import VirtualClock

FINAL = frozenset({"success", "failed", "reboot-required"})


@dataclass
class InProcessStepper:
    """Does steps in this process; what a test says goes wrong, goes wrong."""

    table: SimulatedNvml
    steps: list[Step | bool] = field(default_factory=list[Step | bool])
    reads: int = 0
    unavailable: str = ""
    held_up: asyncio.Event | None = None  # steps, and readings, wait for it
    ended: list[int] = field(default_factory=list[int])

    async def read(self, uuid: str | None) -> tuple[GpuPartitions, ...]:
        await self._check()
        self.reads += 1
        with Library(self.table) as library:
            return library.read_all().gpus if uuid is None else (library.read(uuid),)

    async def set_mode(self, uuid: str, is_enabled: bool) -> Activation:
        await self._check()
        self.steps.append(is_enabled)
        with Library(self.table) as library:
            return library.set_mode(uuid, is_enabled=is_enabled)

    async def do(self, uuid: str, step: Step, actual: GpuPartitions) -> None:
        await self._check()
        self.steps.append(step)
        with Library(self.table) as library:
            library.do(uuid, step, actual)

    async def end_holder(self, uuid: str, pid: int, started_ticks: int) -> bool:
        self.ended.append(pid)
        return True

    async def _check(self) -> None:
        if self.held_up is not None:
            await self.held_up.wait()
        if self.unavailable:
            raise StepsUnavailable(self.unavailable)


@dataclass
class FakeHandles:
    """Whether the agent has handles of the driver open."""

    told: list[str] = field(default_factory=list[str])
    error: DriverError | None = None

    async def release(self) -> None:
        self.told.append("release")
        if self.error is not None:
            raise self.error

    def resume(self) -> None:
        self.told.append("resume")


class MigRig:
    """The worker and what is around it; `running` is the context in which it runs."""

    def __init__(
        self, folder: Path, spec: str = "1xH100-80GB", declaration: Declaration | None = None
    ) -> None:
        count, model = parse_simulate_spec(spec)
        self.clock = VirtualClock(1000.0)
        self.table = SimulatedNvml([model] * count, node="n", now=self.clock.now, is_root=True)
        self.stepper = InProcessStepper(self.table)
        self.handles = FakeHandles()
        self.journal = MigJournal(folder)
        self.declaration = declaration or Declaration("")
        self.node = Node(awaits_mig=True)
        self.node.happen(DriverChanged(self.node.now, READING))
        self.node.connect()
        self.processes: tuple[ProcessSeen, ...] = ()
        self.told: list[tuple[GpuMigStatus, ...]] = []
        self.disk_error: StoreError | None = None
        self.lives = 0
        self.worker = self._worker()

    @property
    def uuids(self) -> tuple[str, ...]:
        return self.table.uuids

    def _worker(self) -> MigWorker:
        self.lives += 1
        return MigWorker(
            Keeper(f"life-{self.lives}"),
            self.journal.load(),
            self.declaration,
            stepper=self.stepper,
            host=self.handles,
            users=UserLook(
                ProcTable(),
                own_pids=lambda: (),
                view=lambda: self.node.view,
                saved=self._saved,
                holders=self._holders,
                want_processes=self.read_processes,
            ),
            view=lambda: self.node.view,
            happen=self.happen,
            save=self._save,
            want_inventory=self._want_inventory,
            clock=self.clock,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[MigWorker]:
        """Let it run; then it is gone as by kill -9, and another one may follow."""
        self.worker = self._worker()
        task = asyncio.create_task(self.worker.run())
        try:
            await self.settle()
            yield self.worker
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    # --- what is around it

    def happen(self, event: Event) -> None:
        if isinstance(event, MigChanged):
            self.told.append(event.gpus)
        self.node.now = self.clock.now()
        self.node.happen(event)
        self.worker.notice(event)

    def read_processes(self) -> None:
        now = self.clock.now()
        self.happen(ProcessReadingBegun(now))
        self.happen(ProcessesTaken(now, now, self.processes))

    def read_inventory(self) -> None:
        self.happen(InventoryRead(self.clock.now(), self.inventory()))

    def inventory(self) -> Inventory:
        with Library(self.table) as library:
            partitions = {each.uuid: each for each in library.read_all().gpus}
        found: list[GpuIdentity] = []
        for index, uuid in enumerate(self.uuids):
            gpu = partitions.get(uuid)
            devices = () if gpu is None else gpu.instances
            found.append(
                GpuIdentity(
                    index=index,
                    uuid=uuid,
                    model="a card",
                    memory_total_bytes=80 * 2**30,
                    mig_enabled=None if gpu is None else gpu.is_enabled,
                    minor_number=index,
                    mig_devices=tuple(
                        MigDeviceIdentity(part.uuid, each.profile, 2**30, each.id, part.id)
                        for each in devices
                        for part in each.compute_instances
                    ),
                )
            )
        told = inventory()
        return Inventory(
            at=self.clock.now(),
            driver_version=told.driver_version,
            nvml_version=None,
            cuda_driver_version=None,
            simulated=True,
            gpus=tuple(found),
        )

    async def _save(self, book: Book) -> None:
        if self.disk_error is not None:
            raise self.disk_error
        self.journal.save(book)

    async def _saved(self) -> None:
        return None

    def _want_inventory(self) -> None:
        asyncio.get_running_loop().call_soon(self.read_inventory)

    async def _holders(self) -> tuple[DeviceHolder, ...]:
        return ()

    # --- what a test says and sees

    async def settle(self) -> None:
        """Let everything happen that can without time passing."""
        for _ in range(400):
            await asyncio.sleep(0)

    async def ask(self, verb: Verb, *devices: str, **more: object) -> MigReport:
        """Ask for these MIG devices ("2x1g.10gb") on every GPU; MIG off when none is named."""
        counts = dict(_counted(each) for each in devices)
        entries = (MigEntry(mig_enabled=bool(devices), mig_devices=counts),)
        ask = MigAsk(verb, entries=() if verb in {"undo", "status"} else entries, **more)  # type: ignore[arg-type]
        return await self.worker.answer(ask)

    async def apply(self, *devices: str, operation: str = "op", **more: object) -> MigReport:
        """Apply, and return how it ended without time passing."""
        await self.ask("apply", *devices, operation_id=operation, **more)
        await self.settle()
        return await self.status()

    async def status(self) -> MigReport:
        return await self.worker.answer(MigAsk("status"))

    def layout(self, gpu: int = 0) -> list[tuple[str, int]]:
        """What the card has: profiles and places; an instance without its device has a "!"."""
        with Library(self.table) as library:
            partitions = library.read(self.uuids[gpu])
        return [
            (each.profile + "!" * (not each.compute_instances), each.start)
            for each in partitions.instances
        ]

    def state(self, gpu: int = 0) -> MigState | None:
        """The state that was told last."""
        (told,) = (each for each in self.told[-1] if each.gpu_uuid == self.uuids[gpu])
        return told.state


def _counted(device: str) -> tuple[str, int]:
    count, times, name = device.partition("x")
    return (name, int(count)) if times else (device, 1)
