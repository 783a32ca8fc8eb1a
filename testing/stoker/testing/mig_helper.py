"""The root helper of a simulated host: one request about partitions after the other, each in its
time, whoever asked and whether they still live.

A helper is a process of its own: a step that it has begun is done though the agent was killed
meanwhile, and whoever reads next waits for it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.partitions import Activation, GpuPartitions, SetMode, Step
from stoker.testing.machine import Machine
from stoker.testing.mig_cards import MigCards
from stoker.testing.mig_witness import MigWitness
from stoker.testing.scheduler import Scheduler

READING_SECONDS = (0.01, 0.2)
STEP_SECONDS = (0.05, 0.8)
# What does not come back is given up.
HANG_SECONDS = 8.0


class Trouble(StrEnum):
    """What goes wrong with the next step."""

    REFUSED = "refused"  # it is not done
    UNTOLD = "untold"  # it is done, and nobody says so


@dataclass(slots=True)
class _Request:
    uuids: list[str]
    seconds: float
    work: Callable[[], object]
    answer: Callable[[object], None]
    is_wanted: Callable[[], bool]  # by somebody who lives


class MigHelper:
    """The helper of one host."""

    def __init__(
        self, machine: Machine, cards: MigCards, scheduler: Scheduler, rng: Random, said: MigWitness
    ) -> None:
        self.machine = machine
        self.cards = cards
        self.troubles: deque[Trouble] = deque()
        self.is_there = True  # otherwise nobody may do a step
        self._scheduler = scheduler
        self._rng = rng
        self._witness = said
        self._queue: deque[_Request] = deque()
        self._boot = 0

    def lose_power(self) -> None:
        """End with the host; what was asked is not answered."""
        self._boot += 1
        self._queue.clear()
        self.troubles.clear()

    def read(
        self, uuid: str | None, answer: Callable[[object], None], is_wanted: Callable[[], bool]
    ) -> None:
        """Answer the partitions of one GPU, or of all; or StepFailed."""
        seconds = self._rng.uniform(*READING_SECONDS)
        uuids = [gpu.uuid for gpu in self.cards.gpus] if uuid is None else [uuid]
        self._ask(uuids, seconds, lambda: self._read(uuid), answer, is_wanted)

    def step(
        self,
        uuid: str,
        operation_id: str,
        step: Step,
        answer: Callable[[object], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        """Answer the Activation of a change of mode, None of another step; or StepFailed."""

        def work() -> object:
            self._check(uuid)
            trouble = self.troubles.popleft() if self.troubles else None
            if trouble is Trouble.REFUSED:
                raise StepFailed(FailureKind.UNKNOWN, f"{uuid}: the driver says Unknown Error")
            done = self._do(uuid, operation_id, step)
            if trouble is Trouble.UNTOLD:
                raise StepFailed(FailureKind.INTERRUPTED, f"{uuid}: the helper ended")
            return done

        self._ask([uuid], self._rng.uniform(*STEP_SECONDS), work, answer, is_wanted)

    def _do(self, uuid: str, operation_id: str, step: Step) -> Activation | None:
        before = self.cards.partitions(uuid)
        ended = self.cards.devices_ended_by(uuid, step)
        if isinstance(step, SetMode):
            is_busy = not self._is_let_go or self.machine.is_used(uuid)
            done = self.cards.set_mode(uuid, step.is_enabled, is_busy=is_busy)
        else:
            self.cards.do(uuid, step, lambda instance: self.machine.is_used(uuid, instance))
            done = None
        after = self.cards.partitions(uuid)
        self._witness.step_done(self.machine.name, operation_id, step, before, after, ended)
        return done

    @property
    def _is_let_go(self) -> bool:
        """Whether no driver host has the devices open."""
        return self.machine.cards.unanswered_since is not None

    def _read(self, uuid: str | None) -> tuple[GpuPartitions, ...]:
        cards = self.machine.cards
        if uuid is not None:
            self._check(uuid)
            return (self.cards.partitions(uuid),)
        if not cards.is_loaded(self._scheduler.now):
            raise StepFailed(FailureKind.DRIVER_GONE, "the NVIDIA driver is not loaded")
        out = {*cards.lost, *cards.pulled}
        return tuple(
            self.cards.partitions(gpu.uuid) for gpu in self.cards.gpus if gpu.uuid not in out
        )

    def _check(self, uuid: str) -> None:
        cards = self.machine.cards
        if not cards.is_loaded(self._scheduler.now):
            raise StepFailed(FailureKind.DRIVER_GONE, "the NVIDIA driver is not loaded")
        if uuid in cards.lost or uuid in cards.pulled:
            raise StepFailed(FailureKind.GPU_LOST, f"{uuid}: it fell off the bus")

    # --- one after the other

    def _ask(
        self,
        uuids: list[str],
        seconds: float,
        work: Callable[[], object],
        answer: Callable[[object], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        def unless_it_hangs() -> object:
            if hung := self._hung(uuids):
                raise StepFailed(FailureKind.INTERRUPTED, f"{hung}: no answer")
            return work()

        self._queue.append(_Request(uuids, seconds, unless_it_hangs, answer, is_wanted))
        if len(self._queue) == 1:
            self._begin()

    def _begin(self) -> None:
        while self._queue and not self._queue[0].is_wanted():
            self._queue.popleft()  # its caller has hung up before it was begun
        if not self._queue:
            return
        boot, request = self._boot, self._queue[0]

        def finish() -> None:
            if boot != self._boot:
                return
            try:
                found = request.work()
            except StepFailed as error:
                found = error
            self._queue.popleft()
            request.answer(found)
            self._begin()

        is_hung = bool(self._hung(request.uuids))
        self._scheduler.after(HANG_SECONDS if is_hung else request.seconds, finish)

    def _hung(self, uuids: list[str]) -> str:
        """Return the first of these GPUs about which a call does not return."""
        cards, now = self.machine.cards, self._scheduler.now
        return next((uuid for uuid in uuids if cards.is_hung(uuid, now)), "")
