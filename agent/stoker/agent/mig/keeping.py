"""Brings the GPUs of a node to the partitions that are wanted of them, one GPU at a time.

A state machine without I/O, as `agent.state` is: events in (`agent.mig.events`), actions out
(`agent.mig.actions`). What it must not forget is in its `Book`.

    asked,      ┌─ look again ─┐                       ┌─────▶ reboot-required ─┐
    declared    ▼              │                       │       (the mode is in force)
      └──▶ pending, draining ──┴─ nobody in the way ─▶ applying ◀───────────────┘
                │                                      │      └──▶ success
                │ deadline                             │ a step fails
                ▼                                      ▼
              failed: nothing was touched          rolling-back ──▶ failed: the old layout
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from stoker.agent.mig import actions as do
from stoker.agent.mig import events as on
from stoker.agent.mig.asking import Noted, ask_to_apply, ask_to_undo, configure, restore_declared
from stoker.agent.mig.comparing import target_of
from stoker.agent.mig.notes import Notes
from stoker.agent.mig.operations import Book, Direction, GpuRecord, Origin
from stoker.agent.mig.plan_report import (
    facts_of,
    plan_of,
    plan_of_target,
    refused_plan,
    status_of,
)
from stoker.agent.mig.steps import needs_reset
from stoker.agent.mig.turns import Turn
from stoker.agent.partitions import GpuMigStatus, GpuPartitions
from stoker.core.mig.geometry import MigState, Wanted
from stoker.core.mig.reports import GpuMigFacts, GpuPlan

SAVE_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Question:
    """Somebody waits for an answer until what was noted is saved."""

    ticket: int
    noted: Noted
    before: Book


class Keeper:
    """What is done about the partitions of a node's GPUs. `now` is Unix seconds everywhere.

    `starter` is unique for every start of the agent: the operations that begin by themselves, from
    what is declared, are named after it.
    """

    def __init__(self, starter: str) -> None:
        self._starter = starter
        self._notes = Notes()
        self._ready: set[str] = set()  # GPUs that wait for their turn
        self._turn: Turn | None = None
        self._is_configured = False
        self._unchecked: set[str] = set()  # GPUs not yet compared with what is declared for them
        self._restored = 0  # operations begun for what is declared
        # What could not be noted down is tried again: a restart would find things as they were.
        self._save_again_at: float | None = None
        self._questions: dict[int, _Question] = {}  # by the ticket of the save
        self._reported: dict[str, GpuMigStatus] = {}

    def handle(self, event: on.MigEvent, now: float) -> tuple[do.MigAction, ...]:
        """Take in what happened; return what is to be done."""
        newest_save = self._notes.newest_save
        match event:
            case on.Loaded(book):
                self._load(book)
            case on.Configured(declared):
                self._configure(configure(self._notes.book, declared))
            case on.PartitionsRead():
                self._take_partitions(event)
            case on.ReadingFailed(gpu_uuid, reason):
                about = (gpu_uuid,) if gpu_uuid else self._notes.gpus
                self._notes.unread |= dict.fromkeys(about, reason)
            case on.UsersSeen():
                self._take_users(event)
            case on.ApplyAsked(ticket):
                noted = ask_to_apply(event, self._notes.book, self._notes.gpus, now)
                self._take_question(ticket, noted)
            case on.UndoAsked(ticket):
                noted = ask_to_undo(event, self._notes.book, self._notes.gpus, now)
                self._take_question(ticket, noted)
            case on.Saved(ticket):
                self._answer(ticket, "")
            case on.SavingFailed(ticket, reason):
                self._answer(ticket, f"it cannot be noted down: {reason}")
                if ticket == self._notes.newest_save:
                    self._save_again_at = now + SAVE_AGAIN_SECONDS
            case on.Ticked():
                if self._save_again_at is not None and now >= self._save_again_at:
                    self._notes.save()
                waiting = self._notes.waiting.items()
                self._ready |= {uuid for uuid, each in waiting if each.look_at <= now}
            case (
                on.StepDone()
                | on.StepFailed()
                | on.DriverLetGo()
                | on.LettingGoFailed()
                | on.DriverTaken()
                | on.ProcessesEnded()
            ):
                pass  # of whoever has its turn
            case _:
                assert_never(event)
        if self._turn is not None:
            self._turn.handle(event, now)
        self._schedule(now)
        if self._notes.newest_save != newest_save:
            self._save_again_at = None  # that one has all in it
        return self._flushed()

    # --- what others may know

    @property
    def due(self) -> float | None:
        """When `Ticked` is wanted at the latest (Unix seconds); None: not before another event."""
        waiting = self._notes.waiting.items()
        times = [each.look_at for uuid, each in waiting if not self._is_served(uuid)]
        if self._turn is not None and self._turn.due is not None:
            times.append(self._turn.due)
        if self._save_again_at is not None:
            times.append(self._save_again_at)
        return min(times, default=None)

    @property
    def book(self) -> Book:
        """All that is remembered, saved or not."""
        return self._notes.book

    @property
    def is_busy(self) -> bool:
        """Whether an operation is between its first and its last step."""
        operations = (each.operation for each in self._notes.book.gpus.values())
        return any(each is not None and each.is_begun for each in operations)

    def partitions(self) -> tuple[GpuPartitions, ...]:
        """Return the newest that was read of every GPU, by index."""
        return tuple(sorted(self._notes.gpus.values(), key=lambda each: each.index))

    def statuses(self) -> tuple[GpuMigStatus, ...]:
        """Return how every GPU is that was read or is remembered; as in `Report`."""
        return tuple(
            self._status(each) for each in sorted({*self._notes.gpus, *self._notes.book.gpus})
        )

    def facts(self, gpu_uuids: Iterable[str] = ()) -> tuple[GpuMigFacts, ...]:
        """Return how these GPUs are, by index, for `MigReport.gpus`; of all when none is named."""
        about = set(gpu_uuids) or set(self._notes.gpus)
        return tuple(
            facts_of(each, self._notes.book.of(each.uuid), self._notes.unread.get(each.uuid, ""))
            for each in self.partitions()
            if each.uuid in about
        )

    def plan(self, gpu_uuid: str, wanted: Wanted) -> GpuPlan:
        """Return what would be done, as the GPU and its users were seen last.

        The GPU is one of `partitions()`.
        """
        return plan_of(self._notes.gpus[gpu_uuid], wanted, self._notes.users_of(gpu_uuid))

    def plan_undo(self, gpu_uuid: str) -> GpuPlan:
        """Return what an undo would do; its refusal says so when there is nothing to undo."""
        gpu = self._notes.gpus[gpu_uuid]
        past = self._notes.book.of(gpu_uuid).before(target_of(gpu))
        if past is None:
            return refused_plan(gpu, "there is nothing to undo: its partitions were not changed")
        return plan_of_target(gpu, past.target, self._notes.users_of(gpu_uuid))

    # --- what happens

    def _load(self, book: Book) -> None:
        self._notes.book = book
        for uuid, record in book.gpus.items():
            operation = record.operation
            if operation is None or (operation.is_final and not operation.is_stuck):
                continue
            if operation.is_stuck:
                is_back = operation.direction is Direction.BACK
                state = MigState.ROLLING_BACK if is_back else MigState.APPLYING
                self._notes.note(uuid, replace(operation, state=state, is_stuck=False))
            self._ready.add(uuid)

    def _configure(self, book: Book) -> None:
        before = self._notes.book
        news = {uuid for uuid in book.gpus if book.of(uuid).declared != before.of(uuid).declared}
        self._unchecked |= news if self._is_configured else self._notes.gpus.keys()
        self._is_configured = True
        if book != before:
            self._notes.book = book
            self._notes.save()

    def _take_partitions(self, event: on.PartitionsRead) -> None:
        told = {each.uuid: each for each in event.gpus}
        known = self._notes.gpus
        self._unchecked |= told.keys() - known.keys()
        if event.is_all:
            # Whoever has its turn is read for itself: this may be from before its last step.
            if self._turn is not None:
                told[self._turn.gpu_uuid] = known[self._turn.gpu_uuid]
            known.clear()
        known |= told
        for uuid in told:
            self._notes.unread.pop(uuid, None)

    def _take_users(self, event: on.UsersSeen) -> None:
        before = self._notes.users
        changed = {uuid for uuid, each in event.users.items() if each != before.get(uuid)}
        self._notes.users = {**before, **event.users}
        if not event.ticket:  # otherwise it is what the turn has asked for
            self._ready |= set(changed & self._notes.waiting.keys())

    def _take_question(self, ticket: int, outcome: Noted | str) -> None:
        if isinstance(outcome, str) or not outcome.records:
            refusal = outcome if isinstance(outcome, str) else ""
            self._notes.actions.append(do.Answer(ticket, refusal))
            return
        before = self._notes.book
        for uuid, record in outcome.records.items():
            self._notes.note_record(uuid, record)
            self._notes.waiting.pop(uuid, None)
        self._questions[self._notes.save()] = _Question(ticket, outcome, before)

    def _answer(self, save_ticket: int, refusal: str) -> None:
        question = self._questions.pop(save_ticket, None)
        if question is None:
            return
        for uuid, record in question.noted.records.items():
            is_untouched = self._notes.book.of(uuid) == record
            if refusal and is_untouched:
                self._notes.note_record(uuid, question.before.of(uuid))
            self._ready.add(uuid)  # what there was before is to be gone on with, if anything
        self._notes.actions.append(do.Answer(question.ticket, refusal))

    # --- whose turn it is

    def _schedule(self, now: float) -> None:
        if self._is_configured:
            for uuid in sorted(self._unchecked & self._notes.gpus.keys()):
                self._check(uuid, self._notes.book.of(uuid), now)
        for uuid, gpu in self._notes.gpus.items():
            operation = self._notes.book.of(uuid).operation
            if operation is not None and operation.state is MigState.REBOOT_REQUIRED:
                goal = operation.goal
                assert goal is not None, operation
                if not needs_reset(gpu, goal):
                    self._ready.add(uuid)
        while self._turn is None or self._turn.is_over:
            able = [self._notes.gpus[uuid] for uuid in self._ready & self._notes.gpus.keys()]
            if not able:
                self._turn = None
                break
            uuid = min(able, key=lambda each: each.index).uuid
            self._ready.discard(uuid)
            self._turn = Turn(uuid, self._notes)

    def _check(self, uuid: str, record: GpuRecord, now: float) -> None:
        """Begin what is declared for a GPU and not in place, once nothing else is under way."""
        operation = record.operation
        if operation is not None and not operation.is_final:
            is_old = operation.origin is Origin.DECLARED and not operation.is_begun
            if not is_old or operation.declares == record.declared:
                return
            record = record.without_unbegun()
            self._notes.note_record(uuid, record)
            self._notes.waiting.pop(uuid, None)
        self._unchecked.discard(uuid)
        id_ = f"{self._starter}-{self._restored}"
        restored = restore_declared(record, self._notes.gpus[uuid], id_, now)
        if restored is not None:
            self._restored += 1
            self._notes.note_record(uuid, restored)
            self._notes.save()
            self._ready.add(uuid)

    def _is_served(self, uuid: str) -> bool:
        """Whether a GPU has its turn, or waits for it already."""
        return uuid in self._ready or (self._turn is not None and self._turn.gpu_uuid == uuid)

    def _status(self, uuid: str) -> GpuMigStatus:
        waiting = self._notes.waiting.get(uuid)
        leaving = waiting.in_the_way if waiting else ()
        record, gpu = self._notes.book.of(uuid), self._notes.gpus.get(uuid)
        status = status_of(uuid, record, gpu, leaving)
        # What is declared may be something else: nothing is given away before that is known.
        return status if self._is_configured else replace(status, is_withheld=True)

    def _flushed(self) -> tuple[do.MigAction, ...]:
        told = {each.gpu_uuid: each for each in self.statuses()}
        news = tuple(each for uuid, each in told.items() if self._reported.get(uuid) != each)
        self._reported = told
        actions, self._notes.actions = self._notes.actions, []
        return (*actions, *((do.Report(news),) if news else ()))
