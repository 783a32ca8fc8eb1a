"""The partitions of one life of a simulated agent: the real worker and keeper, on virtual time.

What stands in is what the worker acts upon: the root helper, the disk with the book, the driver
host, and the reader of processes.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from stoker.agent import events as e
from stoker.agent.driver import HostUnavailable
from stoker.agent.mig.declared import Declaration
from stoker.agent.mig.failures import StepFailed, StepsUnavailable
from stoker.agent.mig.in_the_way import ProcessToEnd
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.looking import UserLook
from stoker.agent.mig.operations import Book, GpuRecord
from stoker.agent.mig.worker import MigWorker
from stoker.agent.model import HeldAllocation, NodeView
from stoker.agent.owners import DeviceHolder
from stoker.agent.partitions import Activation, GpuPartitions, SetMode, Step
from stoker.agent.proctable import ProcTable
from stoker.core.errors import StokerError, StoreError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.testing.disk import Disk
from stoker.testing.machine import Machine
from stoker.testing.mig_cards import MigCards
from stoker.testing.mig_helper import MigHelper
from stoker.testing.mig_witness import MigWitness, nothing_new_is_held_on_a_withheld_gpu
from stoker.testing.process import Killed, Process
from stoker.testing.virtual_loop import VirtualLoop

# How long the agent waits until its driver host is gone.
RELEASE_SECONDS = 1.0
# A process that is told to end takes so long to do it.
ENDING_SECONDS = (0.1, 4.0)
STARTED_AT_ERROR_SECONDS = 1.0


class MigNode:
    """The partitions of one host, and what outlives its agents: cards, helper, book."""

    def __init__(
        self,
        agent: "NodeOfAgent",
        cards: MigCards,
        declaration: Declaration,
        helper: MigHelper,
        book: Disk[bytes],
        witness: MigWitness,
    ) -> None:
        self._agent = agent
        self.cards = cards
        self.declaration = declaration
        self.helper = helper
        self.book = book
        self.witness = witness

    @property
    def held(self) -> tuple[HeldAllocation, ...]:
        """What the node's journal holds."""
        return self._agent.held

    @property
    def gpus(self) -> tuple[str, ...]:
        """Its GPUs."""
        return tuple(gpu.uuid for gpu in self.cards.gpus)

    def noted(self, gpu_uuid: str) -> GpuRecord:
        """Return what is on the disk about a GPU."""
        return self.load().of(gpu_uuid)

    def resets(self, gpu_uuid: str) -> int:
        """Return how often a GPU was emptied by a reboot, or with its driver."""
        return self.cards.resets.get(gpu_uuid, 0)

    def lose_book(self, name: str) -> None:
        """Lose what is remembered of the GPUs."""
        self.book.durable.clear()
        self.witness.lose_book(name)

    def load(self) -> Book:
        """Return the book as it is on the disk."""
        durable = self.book.durable
        return msgspec.json.decode(durable[-1], type=Book) if durable else Book()


class NodeOfAgent(Protocol):
    """What the partitions need of the agent they are a part of."""

    machine: Machine

    @property
    def held(self) -> tuple[HeldAllocation, ...]: ...
    def view(self) -> NodeView: ...
    def happen(self, event: e.Event) -> None: ...
    def want_processes(self) -> None: ...
    def want_inventory(self) -> None: ...
    def once_saved(self, then: Callable[[], None]) -> None: ...
    def release_host(self) -> None: ...
    def resume_host(self) -> None: ...
    def is_let_go(self) -> bool: ...


class MigLife:
    """One life; `process` is the agent's."""

    def __init__(self, node: MigNode, agent: NodeOfAgent, process: Process, starter: str) -> None:
        self.node = node
        self.keeper = Keeper(starter)
        self._agent = agent
        self._process = process
        self._life = process.life
        self._loop = VirtualLoop(process, process.around.report)
        users = _Users(
            ProcTable(),
            own_pids=lambda: (),
            view=agent.view,
            saved=self._saved,
            holders=self._holders,
            want_processes=lambda: self._shielded(agent.want_processes),
        )
        users.machine = agent.machine
        self.worker = MigWorker(
            self.keeper,
            node.load(),
            node.declaration,
            stepper=self,
            host=self,
            users=users,
            view=agent.view,
            happen=lambda event: self._shielded(lambda: agent.happen(event)),
            save=self._save,
            want_inventory=agent.want_inventory,
            clock=self,
        )

    def begin(self) -> None:
        """Start the worker."""
        self._loop.spawn(self.worker.run(), "partitions")

    def end(self) -> None:
        """End its tasks, once nothing of them is on the way any more."""
        self._process.around.scheduler.after(0.0, self._loop.dispose)

    def dispose(self) -> None:
        """End its tasks now."""
        self._loop.dispose()

    def ask(self, ask: MigAsk, answer: Callable[[MigReport | StokerError], None]) -> None:
        """Have the worker asked."""

        async def answered() -> None:
            try:
                found: MigReport | StokerError = await self.worker.answer(ask)
            except StokerError as error:
                found = error
            if self._is_alive():
                self._shielded(lambda: answer(found))

        self._loop.spawn(answered(), "answer")

    def notice(self, event: e.Event) -> None:
        """Tell the worker what has happened to the node."""
        self.worker.notice(event)
        if isinstance(event, e.MigChanged):
            for each in self.keeper.partitions():
                now = self.node.cards.partitions(each.uuid)
                self.node.witness.said(self._process.name, now, self.keeper.book.of(each.uuid))

    def look_at_hold(self, allocation: HeldAllocation) -> None:
        """Take in that the node is about to hold something new."""
        records = [(uuid, self.keeper.book.of(uuid)) for uuid in allocation.gpu_uuids]
        nothing_new_is_held_on_a_withheld_gpu(allocation, records)

    # --- the clock

    def now(self) -> float:
        return self._agent.machine.wall(self._process.now)

    def monotonic(self) -> float:
        return self._agent.machine.monotonic(self._process.now)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))

    # --- the helper

    async def read(self, uuid: str | None) -> tuple[GpuPartitions, ...]:
        found: tuple[GpuPartitions, ...] = await self._helped(
            lambda answer, is_wanted: self._helper.read(uuid, answer, is_wanted)
        )
        return found

    async def set_mode(self, uuid: str, is_enabled: bool) -> Activation:
        activation: Activation = await self._stepped(uuid, SetMode(is_enabled))
        return activation

    async def do(self, uuid: str, step: Step, actual: GpuPartitions) -> None:
        await self._stepped(uuid, step)

    async def end_holder(self, uuid: str, pid: int, started_ticks: int) -> bool:
        await asyncio.sleep(self._process.around.rng.uniform(*ENDING_SECONDS))
        if not self._is_alive():
            raise asyncio.CancelledError
        self._process.tell(f"ends process {pid} on {uuid}")
        self._agent.machine.end(pid)
        return True

    async def _stepped(self, uuid: str, step: Step) -> Any:
        if not self._helper.is_there:
            raise StepsUnavailable("no helper, and the agent is not root")
        operation = self.keeper.book.of(uuid).operation
        id_ = operation.id if operation else ""
        self._process.tell(f"does {step} for {id_}")
        return await self._helped(
            lambda answer, is_wanted: self._helper.step(uuid, id_, step, answer, is_wanted)
        )

    @property
    def _helper(self) -> MigHelper:
        return self.node.helper

    async def _helped(
        self, ask: Callable[[Callable[[object], None], Callable[[], bool]], None]
    ) -> Any:
        if not self._is_alive():
            raise asyncio.CancelledError
        future = self._loop.create_future()

        def answer(found: object) -> None:
            if self._is_alive() and not future.done():
                if self._process.around.is_fatal_point():
                    self._process.crash("agent: the helper has answered")
                else:
                    future.set_result(found)

        ask(answer, lambda: self._is_alive() and not future.done())
        found = await future
        if isinstance(found, StepFailed):
            self._process.tell(f"is refused: {found}")
            raise found
        return found

    # --- the book

    async def _save(self, book: Book) -> None:
        if not self._is_alive():
            raise asyncio.CancelledError
        future = self._loop.create_future()

        def answered(reason: str) -> None:
            if self._is_alive() and not future.done():
                future.set_result(reason)

        self.node.book.write(msgspec.json.encode(book), answered)
        if reason := await future:
            raise StoreError(f"mig.json: {reason}")

    # --- the driver host, and who uses what

    async def release(self) -> None:
        if not self._is_alive():
            raise asyncio.CancelledError
        self._agent.release_host()
        until = self._process.now + RELEASE_SECONDS
        while not self._agent.is_let_go():
            if self._process.now > until:
                raise HostUnavailable("the kernel holds the driver host")
            await asyncio.sleep(0.05)

    def resume(self) -> None:
        if self._is_alive():
            self._agent.resume_host()

    async def _saved(self) -> None:
        is_saved = asyncio.Event()
        self._agent.once_saved(is_saved.set)
        await is_saved.wait()

    async def _holders(self) -> tuple[DeviceHolder, ...]:
        return ()

    # --- life and death

    def _is_alive(self) -> bool:
        return self._process.is_up and self._process.life == self._life

    def _shielded(self, what: Callable[[], None]) -> None:
        """Do what may be the agent's last act, from within a task of this loop."""
        if not self._is_alive():
            return
        try:
            what()
        except Killed as killed:
            self._process.crash(str(killed))


class _Users(UserLook):
    """Knows processes by the simulated host."""

    machine: Machine

    def ticks_of(self, process: ProcessToEnd) -> int | str | None:
        found = self.machine.processes.get(process.pid)
        if found is None:
            return None
        seen_at, began = process.started_at, self.machine.wall(found.began)
        if seen_at is None or abs(began - seen_at) > STARTED_AT_ERROR_SECONDS:
            return f"process {process.pid} is another one than was seen on the GPU"
        return int(found.began * 100)
