"""The turn of one GPU: looks who uses it, then does step after step until it is where it should be.

    reading ─▶ looking ─┬▶ (somebody is in the way) ─▶ ending ─▶ looking ─▶ over, to come again
                        └▶ saving ─▶ stepping ─▶ reading ─▶ saving ─▶ ... ─▶ over

What is noted before each step is enough to go on after a crash; a step that fails turns the way
back to the layout before.
"""

from dataclasses import replace
from enum import Enum, auto

from stoker.agent.mig import actions as do
from stoker.agent.mig import events as on
from stoker.agent.mig.choosing import Refusal, admit, choose, disturbed_instances
from stoker.agent.mig.comparing import target_of
from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd
from stoker.agent.mig.notes import Notes, Waiting
from stoker.agent.mig.operations import Direction, Operation, Origin, Past
from stoker.agent.mig.plan_report import how_it_is, in_words
from stoker.agent.mig.steps import is_there, needs_reset, next_steps, obstacle, sentence
from stoker.agent.partitions import Activation, GpuPartitions, SetMode, Step, Target
from stoker.core.mig.geometry import MigState

# While somebody is in the way, how often is looked whether they still are.
LOOK_AGAIN_SECONDS = 5.0
# How long whoever is made to go may take to be gone: the aggregator ends allocations, the agent
# processes, which are given a while to end in order.
EVICTION_SECONDS = 60.0
# A reading of partitions that fails is tried so often, so long apart, before it is given up.
READINGS_MAX = 3
READ_AGAIN_SECONDS = 2.0
# Steps in one direction. The longest way has some thirty; more of them lead nowhere.
STEPS_MAX = 64

# The states in which steps are being done, by direction.
_MOVING = {Direction.FORWARD: MigState.APPLYING, Direction.BACK: MigState.ROLLING_BACK}

_WHY_NOT = {
    Activation.DONE: "",
    Activation.IN_USE: ": somebody has the GPU open",
    Activation.RESET_REQUIRED: ": the GPU cannot be reset from here",
}


class _Phase(Enum):
    """What is waited for."""

    READING = auto()
    PAUSING = auto()  # before it is read again
    LOOKING = auto()
    ENDING = auto()  # of processes
    SAVING = auto()
    LETTING_GO = auto()
    STEPPING = auto()
    TAKING = auto()
    NOTHING = auto()  # the turn is over


class Turn:
    """The turn of a GPU whose partitions were read before, and for which there is something to do.

    What is left in `notes.waiting` is to have another turn.
    """

    def __init__(self, gpu_uuid: str, notes: Notes) -> None:
        self.gpu_uuid = gpu_uuid
        self._notes = notes
        self._phase = _Phase.READING
        self._ticket = 0  # of the save, or the look, that is waited for
        self._paused_until = 0.0
        self._readings_failed = 0
        self._has_let_go = False  # of the driver
        self._has_ended = False  # processes; once in a turn
        self._is_mode_tried = False  # in this direction
        self._steps_done = 0  # in this direction
        # Done, as the driver says, and not yet seen to be; and what was left before it, with it.
        self._step: Step | None = None
        self._left: tuple[Step, ...] = ()
        self._activation: Activation | None = None
        self._now = 0.0  # when what happened last did (Unix seconds)
        self._read()

    @property
    def is_over(self) -> bool:
        """Whether another GPU may have its turn."""
        return self._phase is _Phase.NOTHING

    @property
    def due(self) -> float | None:
        """When a `Ticked` is wanted (Unix seconds)."""
        return self._paused_until if self._phase is _Phase.PAUSING else None

    def handle(self, event: on.MigEvent, now: float) -> None:
        """Take in what happened; what is not the awaited answer is of the past, or of others."""
        mine, self._now = self.gpu_uuid, now
        match (self._phase, event):
            case (_Phase.READING, on.PartitionsRead(gpus, is_all=False)):
                if any(each.uuid == mine for each in gpus):
                    self._go_on()
                else:
                    self._miss_reading("the driver does not tell of it any more")
            case (_Phase.READING, on.ReadingFailed(gpu_uuid, reason)) if gpu_uuid == mine:
                self._miss_reading(reason)
            case (_Phase.PAUSING, on.Ticked()) if now >= self._paused_until:
                self._read()
            case (_Phase.LOOKING, on.UsersSeen(users, ticket)) if ticket == self._ticket:
                self._decide(users.get(mine, GpuUsers(unknown="nobody has told who it is")))
            case (_Phase.ENDING, on.ProcessesEnded(gpu_uuid, failures)) if gpu_uuid == mine:
                if (waiting := self._notes.waiting.get(mine)) is not None:
                    waiting.unended = failures
                self._look()
            case (_Phase.SAVING, on.Saved(ticket)) if ticket == self._ticket:
                self._go_on_noted()
            case (_Phase.SAVING, on.SavingFailed(ticket, reason)) if ticket == self._ticket:
                self._go_on_unnoted(reason)
            case (_Phase.LETTING_GO, on.DriverLetGo()):
                self._step_on()
            case (_Phase.LETTING_GO, on.LettingGoFailed(reason)):
                self._turn_back(f"the agent cannot let go of the driver: {reason}")
            case (_Phase.STEPPING, on.StepDone(gpu_uuid, activation)) if gpu_uuid == mine:
                self._activation = activation
                self._read()
            case (_Phase.STEPPING, on.StepFailed(gpu_uuid, _, reason)) if gpu_uuid == mine:
                assert self._step is not None
                self._turn_back(f"to {sentence(self._step)} failed: {reason}")
            case (_Phase.TAKING, on.DriverTaken()):
                self._has_let_go = False
                if self._operation.state in _MOVING.values():
                    self._step_on()
                else:
                    self._phase = _Phase.NOTHING
            case _:
                pass

    @property
    def _gpu(self) -> GpuPartitions:
        return self._notes.gpus[self.gpu_uuid]

    @property
    def _operation(self) -> Operation:
        return self._notes.operation(self.gpu_uuid)

    @property
    def _is_pointless(self) -> bool:
        """Whether what there was to do was taken back meanwhile."""
        operation = self._notes.book.of(self.gpu_uuid).operation
        return operation is None or operation.is_final

    # --- reading

    def _read(self) -> None:
        self._phase = _Phase.READING
        self._notes.actions.append(do.ReadPartitions(self.gpu_uuid))

    def _miss_reading(self, reason: str) -> None:
        self._readings_failed += 1
        if self._readings_failed < READINGS_MAX:
            self._phase, self._paused_until = _Phase.PAUSING, self._now + READ_AGAIN_SECONDS
            return
        why = f"its partitions cannot be told: {reason}"
        if self._is_pointless:
            self._end()
        elif self._operation.is_begun:
            self._fail(f"{self._operation.reason or 'it was begun'}; {why}", is_stuck=True)
        else:
            self._fail(why)

    def _go_on(self) -> None:
        """Go on with partitions that were just read."""
        self._readings_failed = 0
        if self._is_pointless:
            self._end()
        elif not self._operation.is_begun:
            self._look()
        elif self._step is None:
            self._step_on()
        else:
            self._verify(self._step)

    # --- who is in the way

    def _look(self) -> None:
        self._phase, self._ticket = _Phase.LOOKING, self._notes.next_ticket()
        self._notes.actions.append(do.LookForUsers(self._ticket, self.gpu_uuid))

    def _decide(self, users: GpuUsers) -> None:
        """Begin, now that it is known who uses the GPU; or wait for them, or refuse."""
        if self._is_pointless:
            return self._end()
        operation = self._operation
        if operation.target is None:
            found = choose(self._gpu, operation.wanted, users)
        elif reason := obstacle(self._gpu, operation.target):
            found = Refusal(f"{self.gpu_uuid}: {reason}")
        else:
            found = admit(self._gpu, operation.target, users)
        if isinstance(found, Target):
            self._begin(found)
        elif found.target is None:
            self._fail(found.reason)
        else:
            self._wait(found, found.target, users)
        return None

    def _wait(self, refusal: Refusal, target: Target, users: GpuUsers) -> None:
        """Wait until whoever is in the way has left, as long as they may."""
        operation, leave_by, reason = self._operation, self._operation.leave_by, refusal.reason
        look_at = self._now + LOOK_AGAIN_SECONDS
        before = self._notes.waiting.get(self.gpu_uuid)
        unended = before.unended if before else ()
        is_declared = operation.origin is Origin.DECLARED
        if not is_declared and leave_by is None:
            return self._fail(reason)
        if leave_by is not None and self._now >= leave_by:
            if not operation.evict:
                return self._fail(f"it was not left in time: {reason}")
            if self._now >= leave_by + EVICTION_SECONDS:
                return self._fail("; ".join((f"not all could be made to go: {reason}", *unended)))
        elif leave_by is not None:
            look_at = min(look_at, leave_by)
        state = MigState.PENDING if is_declared else MigState.DRAINING
        self._notes.waiting[self.gpu_uuid] = Waiting(refusal.in_the_way, look_at, unended)
        if (operation.state, operation.reason) != (state, reason):
            self._notes.note(self.gpu_uuid, replace(operation, state=state, reason=reason))
            self._notes.save()
        to_end = (
            self._to_end(target, users) if leave_by is not None and self._now >= leave_by else ()
        )
        if not to_end or self._has_ended:
            return self._end()
        self._phase, self._has_ended = _Phase.ENDING, True
        self._notes.actions.append(do.EndProcesses(self.gpu_uuid, to_end))
        return None

    def _to_end(self, target: Target, users: GpuUsers) -> tuple[ProcessToEnd, ...]:
        if self._gpu.is_enabled != target.is_enabled:
            return (*users.foreign, *users.foreign_holders)
        going = {None, *disturbed_instances(self._gpu, target)}
        return tuple(each for each in users.foreign if each.gpu_instance_id in going)

    # --- steps

    def _begin(self, target: Target) -> None:
        self._notes.waiting.pop(self.gpu_uuid, None)
        operation = replace(
            self._operation,
            state=MigState.APPLYING,
            reason="",
            target=target,
            before=target_of(self._gpu),
            steps_total=len(next_steps(self._gpu, target)),
        )
        self._notes.note(self.gpu_uuid, operation)
        if is_there(self._gpu, target):
            self._succeed()
        else:
            self._save()

    def _save(self) -> None:
        self._phase, self._ticket = _Phase.SAVING, self._notes.save()

    def _go_on_noted(self) -> None:
        if self._operation.direction is Direction.BACK and not self._steps_done:
            self._read()  # the step that failed may have been done in part
        else:
            self._step_on()

    def _go_on_unnoted(self, reason: str) -> None:
        operation = self._operation
        if operation.direction is Direction.FORWARD and not operation.steps_done:
            self._fail(f"it cannot be noted down: {reason}")
        else:
            # What was noted first is enough: whoever starts next reads how the GPU is.
            self._go_on_noted()

    def _step_on(self) -> None:
        """Do the next step, from partitions that were just read; or come to an end."""
        operation, goal = self._operation, self._goal
        if operation.state is MigState.REBOOT_REQUIRED:
            state = _MOVING[operation.direction]
            operation = self._notes.note(self.gpu_uuid, replace(operation, state=state))
        if reason := obstacle(self._gpu, goal):
            return self._turn_back(reason)
        if not needs_reset(self._gpu, goal):
            self._left = next_steps(self._gpu, goal)
        elif self._is_mode_tried:
            return self._park()
        else:
            self._left = (SetMode(goal.is_enabled),)  # who had the GPU open may be gone by now
        if not self._left:
            is_back = operation.direction is Direction.BACK
            return self._fail_restored() if is_back else self._succeed()
        if self._steps_done == STEPS_MAX:
            return self._turn_back(f"{STEPS_MAX} steps were done, and there are more")
        step = self._left[0]
        if isinstance(step, SetMode) and not self._has_let_go:
            self._phase, self._has_let_go = _Phase.LETTING_GO, True
            self._notes.actions.append(do.LetGoOfDriver())
        elif self._has_let_go and not isinstance(step, SetMode):
            self._take_driver()
        else:
            self._phase, self._step, self._activation = _Phase.STEPPING, step, None
            self._notes.actions.append(do.DoStep(self.gpu_uuid, step))
        return None

    def _verify(self, step: Step) -> None:
        """Compare what the driver says it has done with what it has."""
        if isinstance(step, SetMode):
            self._is_mode_tried = True
            if needs_reset(self._gpu, self._goal):
                return self._park()
        left = next_steps(self._gpu, self._goal)
        if left == self._left:
            return self._turn_back(f"the driver did not {sentence(step)}{self._why_not}")
        self._step = None
        self._steps_done += 1
        done = self._operation.steps_done + 1
        operation = replace(self._operation, steps_done=done, steps_total=done + len(left))
        record = replace(
            self._notes.book.of(self.gpu_uuid), operation=operation, changed_at=self._now
        )
        self._notes.note_record(self.gpu_uuid, record)
        self._save()
        return None

    def _turn_back(self, reason: str) -> None:
        """Go back to the layout before; when that fails too, nothing more can be done."""
        operation = self._operation
        if operation.direction is Direction.BACK:
            how = f"going back failed too: {reason}; the GPU has {how_it_is(self._gpu)}"
            return self._fail(f"{operation.reason}; {how}", is_stuck=True)
        state = _MOVING[Direction.BACK]
        self._notes.note(
            self.gpu_uuid,
            replace(operation, state=state, direction=Direction.BACK, reason=reason),
        )
        self._step, self._is_mode_tried, self._steps_done = None, False, 0
        self._save()
        return None

    @property
    def _goal(self) -> Target:
        goal = self._operation.goal
        assert goal is not None, self._operation
        return goal

    @property
    def _why_not(self) -> str:
        return _WHY_NOT[self._activation] if self._activation else ""

    # --- ends

    def _park(self) -> None:
        """Wait for the reset or the reboot that brings the mode."""
        mode = "on" if self._goal.is_enabled else "off"
        reason = f"MIG mode {mode} is pending: reset the GPU, or reboot{self._why_not}"
        operation = replace(self._operation, state=MigState.REBOOT_REQUIRED, reason=reason)
        self._notes.note(self.gpu_uuid, operation)
        self._notes.save()
        self._end()

    def _succeed(self) -> None:
        operation, record = self._operation, self._notes.book.of(self.gpu_uuid)
        assert operation.before is not None, operation
        # What the configuration has said meanwhile is newer.
        is_newest = record.declared == operation.declared_before
        is_changed = operation.before != operation.target
        past = Past(operation.before, operation.declared_before)
        done = replace(
            record,
            operation=replace(operation, state=MigState.SUCCESS, reason=""),
            declared=operation.declares if is_newest else record.declared,
            undo=past if is_changed else record.undo,
            changed_at=self._now if is_changed else record.changed_at,
        )
        self._notes.note_record(self.gpu_uuid, done)
        self._notes.save()
        self._end()

    def _fail_restored(self) -> None:
        operation = self._operation
        assert operation.before is not None, operation
        how = "the GPU has its old layout again" if operation.steps_done else "nothing was changed"
        self._fail(f"{operation.reason}; {how}: {in_words(operation.before)}")

    def _fail(self, reason: str, *, is_stuck: bool = False) -> None:
        """Give up; `is_stuck`: the GPU is neither as before nor as wanted."""
        operation = self._operation
        if operation.is_begun:
            operation = replace(operation, state=MigState.FAILED, reason=reason, is_stuck=is_stuck)
        else:
            operation = operation.given_up(reason)
        self._notes.waiting.pop(self.gpu_uuid, None)
        self._notes.note(self.gpu_uuid, operation)
        self._notes.save()
        self._end()

    def _end(self) -> None:
        if self._has_let_go:
            self._take_driver()
        else:
            self._phase = _Phase.NOTHING

    def _take_driver(self) -> None:
        self._phase = _Phase.TAKING
        self._notes.actions.append(do.TakeDriver())
