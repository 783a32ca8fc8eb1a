"""Does what the keeper of partitions decides: saves, reads, steps, lets go of the driver, tells.

The keeper (`agent.mig.keeping`) is a state machine; this is its edge. Each action that takes time
is a task of its own, and its outcome is the event that answers it. Whatever opens the driver takes
turns, since one session of ours would make a GPU "in use" for another, and waits while somebody
has had the driver released.

    daemon ──notice──▶ ┌────────┐ ──events──▶ Keeper
    desk, link ─answer─▶ │ worker │ ◀─actions──
                         └────────┘ ──▶ book on disk, steps as root, driver host, NodeState
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, assert_never

from stoker.agent import events as node
from stoker.agent.driver import DriverError
from stoker.agent.mig import actions as a
from stoker.agent.mig import events as e
from stoker.agent.mig.declared import Declaration, wanted_by
from stoker.agent.mig.failures import FailureKind, StepFailed, StepsUnavailable
from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.looking import UserLook
from stoker.agent.mig.operations import Book, Declared
from stoker.agent.mig.reporting import (
    MigRefusal,
    all_facts,
    find_gpus,
    statuses_unread,
    still_withheld,
    wanted_by_ask,
)
from stoker.agent.mig.stepping import Stepper
from stoker.agent.model import DriverState, NodeView
from stoker.agent.partitions import GpuMigStatus, SetMode, Step
from stoker.agent.words import describe_release
from stoker.core.clock import Clock, SteadyClock
from stoker.core.errors import StokerError, StoreError
from stoker.core.mig.reports import GpuPlan, MigAsk, MigReport

# How long whoever asks waits; it is answered before the local socket's patience ends.
ANSWER_SECONDS = 12.0
# Between two attempts to read the partitions; doubled up to the longest.
RETRY_SECONDS_MIN = 2.0
RETRY_SECONDS_MAX = 60.0

_log = logging.getLogger(__name__)


# What a person can do about a step that nobody here may do.
PERMISSION_ADVICE = (
    "partitions are changed by root: have stoker-agent-helper run as root on this host, or the "
    "agent itself"
)


class Handles(Protocol):
    """The agent's own handles of the driver."""

    async def release(self) -> None:
        """Close them all; raises DriverError."""
        ...

    def resume(self) -> None:
        """Open them again, soon."""
        ...


class MigWorker:
    """The partitions of this node's GPUs. `run` must be running for anything to be done."""

    def __init__(
        self,
        keeper: Keeper,
        book: Book,
        declaration: Declaration,
        *,
        stepper: Stepper,
        host: Handles,
        users: UserLook,
        view: Callable[[], NodeView],
        happen: Callable[[node.Event], None],
        save: Callable[[Book], Awaitable[None]],
        want_inventory: Callable[[], None],
        clock: Clock,
    ) -> None:
        """`save` returns when the book is on disk; `want_inventory` has the GPUs read anew."""
        self._keeper = keeper
        self._book = book
        self._declaration = declaration
        self._stepper = stepper
        self._host = host
        self._users = users
        self._view = view
        self._happen = happen
        self._save_book = save
        self._want_inventory = want_inventory
        self._clock = clock
        self._steady = SteadyClock(clock)  # a deadline does not move when the clock is set

        self._tasks = asyncio.TaskGroup()
        self._turn = asyncio.Lock()  # one session with the driver at a time
        self._news = asyncio.Event()  # replaced with each news
        self._is_running = False
        self._was_read = False  # the partitions, at least once
        self._error = "they are not read yet"  # why the last reading failed; empty: it did not
        self._retry_at = self._pause = 0.0  # of a reading that failed; monotonic
        self._configured: Mapping[str, Declared] = {}
        self._is_quiet = False
        self._waits = ""  # what holds up everything
        # The driver was gone: what it has forgotten is to be compared with what is declared again.
        self._is_doubtful = False
        self._inventory_read: object = None  # what the partitions were read for last
        self._outdated: dict[str, float] = {}  # changed then, and the inventory not read since
        self._statuses: tuple[GpuMigStatus, ...] = ()
        self._told: tuple[GpuMigStatus, ...] | None = None
        self._answers: dict[int, asyncio.Future[a.Answer]] = {}
        self._tickets = 0
        self.has_let_go = False  # of the driver, for a change of mode

    # --- what others tell

    def notice(self, event: node.Event) -> None:
        """Take note of what has happened to the node; nothing is begun in this call."""
        self._users.notice(event)
        match event:
            case node.InventoryRead(_, inventory):
                self._outdated = {
                    uuid: at for uuid, at in self._outdated.items() if at > inventory.at
                }
            case node.DriverChanged(_, status):
                self._is_doubtful = self._is_doubtful or status.state is DriverState.FAILED
            case node.ReleaseAsked() | node.ResumeAsked() | node.ReleaseTimePassed():
                pass
            case _:
                return
        self._tell_news()

    # --- what others ask

    async def answer(self, ask: MigAsk) -> MigReport:
        """Return what is asked for; raises StokerError with why it is refused."""
        if not self._is_running:
            raise MigRefusal(f"mig {ask.verb}: the agent is starting, or ending; ask again")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._answer(ask)
        except TimeoutError:
            held_up = self._waits or "the driver, or the disk, does not answer"
            raise MigRefusal(
                f"mig {ask.verb}: no answer within {ANSWER_SECONDS:g} s: {held_up}; "
                "`stoker mig status` tells whether it was begun"
            ) from None

    async def _answer(self, ask: MigAsk) -> MigReport:
        match ask.verb:
            case "status":
                plans: tuple[GpuPlan, ...] = ()
                about = find_gpus(ask.gpus, self._indices())
                operation = ask.operation_id
            case "plan":
                wanted = await self._prepare(ask)
                plans = tuple(self._keeper.plan(gpu, each.wanted) for gpu, each in wanted.items())
                about, operation = tuple(wanted), ask.operation_id
            case "apply":
                wanted = await self._prepare(ask)
                plans = tuple(self._keeper.plan(gpu, each.wanted) for gpu, each in wanted.items())
                operation = ask.operation_id or uuid.uuid4().hex
                drain, ticket = ask.drain_seconds, self._ticket()
                asked = e.ApplyAsked(ticket, operation, wanted, drain, ask.evict)
                await self._agreed(ticket, asked)
                about = tuple(wanted)
            case "undo":
                await self._refresh(ask)
                partitions = self._keeper.partitions()
                about = find_gpus(ask.gpus, {each.uuid: each.index for each in partitions})
                undone = about or tuple(each.uuid for each in self._keeper.facts() if each.undo)
                plans = tuple(map(self._keeper.plan_undo, undone))
                operation = ask.operation_id or uuid.uuid4().hex
                drain, ticket = ask.drain_seconds, self._ticket()
                await self._agreed(ticket, e.UndoAsked(ticket, operation, about, drain, ask.evict))
                about = undone
            case _:
                assert_never(ask.verb)
        view = self._view()
        told = self._now_told() if self._told is None else self._told
        facts = all_facts(self._keeper.facts(), view.inventory, told)
        return MigReport(
            node=view.identity.node,
            verb=ask.verb,
            config=ask.config or (self._declaration.config if not ask.entries else ""),
            operation_id=operation,
            plans=tuple(sorted(plans, key=lambda each: each.index)),
            gpus=tuple(each for each in facts if not about or each.uuid in about),
        )

    def _indices(self) -> Mapping[str, int]:
        inventory = self._view().inventory
        known = () if inventory is None else (each.identity for each in inventory.gpus)
        return {each.uuid: each.index for each in (*known, *self._keeper.partitions())}

    async def _prepare(self, ask: MigAsk) -> Mapping[str, Declared]:
        """Return what is asked of which GPU, by how they are now."""
        await self._refresh(ask)
        return wanted_by_ask(ask, self._declaration, self._keeper.partitions())

    async def _refresh(self, ask: MigAsk) -> None:
        """Look at partitions and users anew; while the driver is released, a plan goes without."""
        released = self._released()
        if released and ask.verb != "plan":
            raise MigRefusal(
                f"mig {ask.verb}: the driver is {released}; `stoker agent resume` takes it again"
            )
        if not released:
            await self._read_all()
        if self._error:
            raise MigRefusal(f"partitions cannot be told: {self._error}")
        gpus = tuple(each.uuid for each in self._keeper.partitions())
        if not released:
            self._hear(e.UsersSeen(await self._look_for_users(gpus)))

    async def _agreed(self, ticket: int, asked: e.ApplyAsked | e.UndoAsked) -> None:
        """Return when it is noted; raises MigRefusal."""
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._hear(asked)
            if refusal := (await answer).refusal:
                raise MigRefusal(refusal)
        finally:
            del self._answers[ticket]

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    # --- the loop

    async def run(self) -> None:
        """Keep the partitions until cancelled."""
        async with self._tasks:
            self._is_running = True
            try:
                self._hear(e.Loaded(self._book))
                while True:
                    news = self._news
                    self._tell()
                    await self._look()
                    self._tell()
                    await self._wait_for(news, self._seconds_left())
                    due = self._keeper.due
                    if due is not None and self._steady.now() >= due:
                        self._hear(e.Ticked())
            finally:
                self._is_running = False

    async def _look(self) -> None:
        """Read the partitions when they never were, or when the driver told of other GPUs."""
        inventory = self._view().inventory
        if inventory is None or self._released():
            return
        is_retry = bool(self._error) and self._clock.monotonic() >= self._retry_at
        if is_retry or inventory != self._inventory_read:
            await self._read_all()

    def _seconds_left(self) -> float | None:
        """Return when there is something to do at the latest; None: not before there is news."""
        waits: list[float] = []
        if self._keeper.due is not None:
            waits.append(self._keeper.due - self._steady.now())
        if self._error and self._inventory_read is not None and not self._released():
            waits.append(self._retry_at - self._clock.monotonic())
        return min(waits, default=None)

    async def _wait_for(self, news: asyncio.Event, seconds: float | None) -> None:
        waiting: list[asyncio.Future[Any]] = [asyncio.ensure_future(news.wait())]
        if seconds is not None:
            waiting.append(asyncio.ensure_future(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _hear(self, event: e.MigEvent) -> None:
        for action in self._keeper.handle(event, self._steady.now()):
            self._do(action)
        self._tell_news()  # it may be due at another time

    def _do(self, action: a.MigAction) -> None:
        match action:
            case a.Answer(ticket):
                asked = self._answers.get(ticket)
                if asked is not None and not asked.done():
                    asked.set_result(action)
            case a.Report():  # of those that changed; told is always of all
                self._take(self._keeper.statuses())
            case _:
                self._tasks.create_task(self._work(action), name=type(action).__name__)

    async def _work(
        self,
        action: a.Save
        | a.ReadPartitions
        | a.LookForUsers
        | a.DoStep
        | a.LetGoOfDriver
        | a.TakeDriver
        | a.EndProcesses,
    ) -> None:
        match action:
            case a.Save(ticket, book):
                self._hear(await self._save(ticket, book))
            case a.ReadPartitions(gpu):
                self._hear(await self._read(gpu))
            case a.LookForUsers(ticket, gpu):
                self._hear(e.UsersSeen(await self._look_for_users((gpu,)), ticket))
            case a.DoStep(gpu, step):
                self._hear(await self._step(gpu, step))
            case a.LetGoOfDriver():
                self._hear(await self._let_go())
            case a.TakeDriver():
                self._take_driver()
                self._hear(e.DriverTaken())
            case a.EndProcesses(gpu, processes):
                ends = [await self._end(gpu, each) for each in processes]
                self._hear(e.ProcessesEnded(gpu, tuple(filter(None, ends))))
            case _:
                assert_never(action)

    # --- the book

    async def _save(self, ticket: int, book: Book) -> e.Saved | e.SavingFailed:
        try:
            await self._save_book(book)
        except StoreError as error:
            _log.error("%s", error)
            return e.SavingFailed(ticket, str(error))
        return e.Saved(ticket)

    # --- the partitions

    async def _read_all(self) -> None:
        """Read all partitions; those of new GPUs are compared with what is declared for them."""
        async with self._turn:
            inventory = self._inventory_read = self._view().inventory
            # Where no card has MIG the driver is not opened once more to be told so.
            has_mig = inventory is None or any(
                each.identity.mig_enabled is not None for each in inventory.gpus
            )
            try:
                gpus = await self._stepper.read(None) if has_mig else ()
                wanted = wanted_by(self._declaration, gpus)
            except StokerError as error:
                self._take_unread(error)
                return
        self._error, self._pause = "", 0.0
        # Nothing is said in between: a GPU would look free that is not as it is declared to be.
        self._is_quiet = True
        if self._is_doubtful:
            self._is_doubtful = False
            self._hear(e.PartitionsRead(()))  # they were away, all of them
        self._hear(e.PartitionsRead(gpus))
        name = self._declaration.config
        configured = {gpu: Declared(each, name) for gpu, each in wanted.items()}
        if not self._was_read or not configured.items() <= self._configured.items():
            self._configured = {**self._configured, **configured}
            self._hear(e.Configured(self._configured))
        self._was_read, self._is_quiet = True, False

    def _take_unread(self, error: StokerError) -> None:
        self._hear(e.ReadingFailed("", str(error)))
        self._pause = min(RETRY_SECONDS_MAX, max(RETRY_SECONDS_MIN, 2 * self._pause))
        self._retry_at = self._clock.monotonic() + self._pause
        if self._error != str(error):
            _log.warning("partitions cannot be told: %s", error)
        self._error = str(error)

    async def _read(self, gpu: str) -> e.PartitionsRead | e.ReadingFailed:
        async with self._turn:
            await self._until_not_released()
            try:
                return e.PartitionsRead(await self._stepper.read(gpu), is_all=False)
            except (StepFailed, StepsUnavailable) as error:
                return e.ReadingFailed(gpu, str(error))

    async def _step(self, gpu: str, step: Step) -> e.StepDone | e.StepFailed:
        known = {each.uuid: each for each in self._keeper.partitions()}
        if gpu not in known:
            return e.StepFailed(gpu, FailureKind.NOT_FOUND, f"{gpu}: it is not there any more")
        async with self._turn:
            await self._until_not_released()
            try:
                if isinstance(step, SetMode):
                    return e.StepDone(gpu, await self._stepper.set_mode(gpu, step.is_enabled))
                await self._stepper.do(gpu, step, known[gpu])
            except StepFailed as error:
                return e.StepFailed(gpu, error.kind, _advised(error))
            except StepsUnavailable as error:
                return e.StepFailed(gpu, "unavailable", str(error))
        return e.StepDone(gpu)

    # --- the driver

    def _released(self) -> str:
        """Return who had the driver released, in words; empty: nobody."""
        view = self._view()
        return "" if view.release is None else describe_release(view.release, len(view.held))

    async def _until_not_released(self) -> None:
        """Wait while somebody wants no handle of the driver open, and say so meanwhile."""
        while released := self._released():
            self._waits = f"the driver is {released}"
            news = self._news.wait()
            self._tell()
            await news
        self._waits = ""

    async def _let_go(self) -> e.DriverLetGo | e.LettingGoFailed:
        if released := self._released():
            return e.LettingGoFailed(f"the driver is {released}")
        self.has_let_go = True
        try:
            await self._host.release()
        except DriverError as error:
            return e.LettingGoFailed(str(error))
        return e.DriverLetGo()

    def _take_driver(self) -> None:
        self.has_let_go = False
        if self._view().release is None:
            self._host.resume()

    # --- users

    async def _look_for_users(self, gpus: tuple[str, ...]) -> Mapping[str, GpuUsers]:
        """Return who uses these GPUs, by processes that are read after this call."""
        if released := self._released():
            return dict.fromkeys(gpus, GpuUsers(unknown=f"the driver is {released}"))
        partitions = self._keeper.partitions()
        return await self._users.look([each for each in partitions if each.uuid in gpus])

    async def _end(self, gpu: str, process: ProcessToEnd) -> str:
        """Have a process ended that is still the one that was seen; return why it is not gone."""
        ticks = self._users.ticks_of(process)
        if ticks is None:
            return ""
        if isinstance(ticks, str):
            return ticks
        try:
            is_gone = await self._stepper.end_holder(gpu, process.pid, ticks)
        except (StepFailed, StepsUnavailable) as error:
            return f"process {process.pid}: {error}"
        return "" if is_gone else f"process {process.pid} does not end"

    # --- telling

    def _take(self, gpus: tuple[GpuMigStatus, ...]) -> None:
        before = {each.gpu_uuid: each for each in self._statuses}
        for each in gpus:
            known = before.get(each.gpu_uuid, GpuMigStatus(each.gpu_uuid))
            if before and (each.changed_at, each.layout) != (known.changed_at, known.layout):
                self._outdated[each.gpu_uuid] = self._clock.now()
                self._want_inventory()
            if each.state is not None and each.state is not known.state:
                config = f" (configuration {each.config})" if each.config else ""
                reason = f": {each.reason}" if each.reason else ""
                _log.info("MIG of %s is %s%s%s", each.gpu_uuid, each.state, config, reason)
        self._statuses = gpus
        self._tell()

    def _now_told(self) -> tuple[GpuMigStatus, ...]:
        known = {each.gpu_uuid for each in self._statuses}
        why = self._error or "its partitions could not be read"
        unread = statuses_unread(self._view().inventory, known, self._declaration, why)
        return still_withheld(self._statuses, self._outdated, self._waits) + unread

    def _tell(self) -> None:
        """Tell the node's state what is different."""
        if self._is_quiet or not (self._was_read or self._view().inventory):
            return
        told = self._now_told()
        if told != self._told:
            self._told = told
            self._happen(node.MigChanged(self._clock.now(), told))


def _advised(error: StepFailed) -> str:
    """Return what went wrong, and what to do about it."""
    if error.kind is FailureKind.NO_PERMISSION:
        return f"{error}; {PERMISSION_ADVICE}"
    return str(error)
