"""What outsiders saw of partitions being changed, and what has to hold at each step and each word,
one function per promise; its docstring is it.

Old layouts are noted here from the card itself, at an operation's first step, and wishes from
whoever wished: what the agent remembers of both is not asked.
"""

from collections import Counter
from collections.abc import Collection
from typing import Protocol

from stoker.agent.mig.comparing import is_as_wanted, target_of
from stoker.agent.mig.operations import GpuRecord, Operation
from stoker.agent.model import HeldAllocation
from stoker.agent.partitions import GpuPartitions, SetMode, Step, Target
from stoker.core.mig.geometry import MigState, Wanted
from stoker.testing.broken import Broken


def what_is_held_is_not_destroyed(
    step: Step, before: GpuPartitions, ended: Collection[str], held: Collection[HeldAllocation]
) -> None:
    """An instance that an allocation uses which the node holds is never destroyed, nor the mode of
    its GPU changed: also who is made to go has been let go of before. Of a MIG device that went
    with a reboot nothing is left to use.
    """
    there = {part.uuid for each in before.instances for part in each.compute_instances}
    going = there if isinstance(step, SetMode) else set(ended)
    for each in held:
        is_whole_gpu = before.uuid in each.gpu_uuids and not each.mig_device_uuids
        is_hit = is_whole_gpu and isinstance(step, SetMode)
        if is_hit or not going.isdisjoint(each.mig_device_uuids):
            raise Broken(what_is_held_is_not_destroyed, step=step, gpu=before.uuid, held=each)


def no_operation_runs_twice(operation_id: str, is_over: bool, step: Step) -> None:
    """An operation whose end was noted on the disk, and that is not stuck, does no step any more,
    however often it is asked for.
    """
    if is_over:
        raise Broken(no_operation_runs_twice, operation=operation_id, step=step)


def what_is_done_was_noted(operation_id: str, known: GpuRecord, step: Step) -> None:
    """Before the first step of an operation the way there and the way back are on the disk."""
    operation = known.operation
    if operation is None or operation.id != operation_id or operation.before is None:
        raise Broken(what_is_done_was_noted, operation=operation_id, noted=operation, step=step)


def a_final_word_is_true(
    operation: Operation, wanted: Wanted, old: Target | None, gpu: GpuPartitions
) -> None:
    """When an operation has succeeded the GPU is as was wished, when it has failed it is as before
    its first step, with nothing half made; unless the reason says that going back failed too.
    """
    if operation.state is MigState.SUCCESS:
        is_true = is_as_wanted(gpu, wanted)
    elif old is None or operation.is_stuck:
        is_true = True
    else:
        is_half_made = any(not each.compute_instances for each in gpu.instances)
        is_true = target_of(gpu) == old and not is_half_made
    if not is_true:
        raise Broken(
            a_final_word_is_true, operation=operation, wanted=wanted, old=old, gpu=gpu.instances
        )


def nothing_new_is_held_on_a_withheld_gpu(
    allocation: HeldAllocation, records: Collection[tuple[str, GpuRecord]]
) -> None:
    """A node takes nothing new on a GPU with an operation that is not over."""
    for uuid, record in records:
        operation = record.operation
        if uuid in allocation.gpu_uuids and operation is not None and not operation.is_final:
            raise Broken(
                nothing_new_is_held_on_a_withheld_gpu, allocation=allocation, operation=operation
            )


class WitnessedNode(Protocol):
    """What a witness may look at of a node."""

    @property
    def held(self) -> tuple[HeldAllocation, ...]:
        """What its journal holds."""
        ...

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that can be partitioned."""
        ...

    def noted(self, gpu_uuid: str) -> GpuRecord:
        """Return what is on its disk about a GPU."""
        ...

    def resets(self, gpu_uuid: str) -> int:
        """Return how often the card was emptied without a step."""
        ...


class MigWitness:
    """Sees every step of every node; changes nothing."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.wished: dict[tuple[str, str], Wanted] = {}  # operation, GPU -> what was wished
        self.destroyed: set[str] = set()  # MIG devices that a step has ended
        self.lost_books: set[str] = set()  # GPUs of which nobody remembers how they were
        self._nodes: dict[str, WitnessedNode] = {}
        # Of an operation on a GPU: the layout before its first step, and how often the card had
        # been emptied when it was asked for.
        self._old: dict[tuple[str, str], Target] = {}
        self._resets: dict[tuple[str, str], int] = {}
        self._told: dict[str, tuple[str, MigState]] = {}  # GPU -> operation and its end
        self._over: set[tuple[str, str]] = set()  # operation, GPU: its end was on the disk

    def meet(self, name: str, node: WitnessedNode) -> None:
        """Take in a node."""
        self._nodes[name] = node

    def step_done(
        self,
        node: str,
        operation_id: str,
        step: Step,
        before: GpuPartitions,
        after: GpuPartitions,
        ended: tuple[str, ...],
    ) -> None:
        """Take in that the driver has done a step, whoever hears of it."""
        uuid, seen = before.uuid, self._nodes[node]
        self.counts["MIG steps"] += 1
        noted = seen.noted(uuid)
        self._look_at_end(uuid, noted)
        no_operation_runs_twice(operation_id, (operation_id, uuid) in self._over, step)
        if noted != GpuRecord() or uuid not in self.lost_books:
            what_is_done_was_noted(operation_id, noted, step)
        if before.is_enabled != after.is_enabled or not isinstance(step, SetMode):
            what_is_held_is_not_destroyed(step, before, ended, seen.held)
        self.destroyed.update(ended)
        if (operation_id, uuid) not in self._old:
            operation = noted.operation
            # It never began, and mends what an older one has left half-made.
            is_mending = operation is not None and operation.target is None
            mended = operation.lost if operation is not None and is_mending else None
            self._old[operation_id, uuid] = mended or target_of(before)

    def said(self, node: str, gpu: GpuPartitions, record: GpuRecord) -> None:
        """Take in what an agent says of a GPU."""
        operation, uuid = record.operation, gpu.uuid
        resets = self._nodes[node].resets(uuid)
        self._look_at_end(uuid, self._nodes[node].noted(uuid))
        if operation is not None:
            self._resets.setdefault((operation.id, uuid), resets)
        if operation is None or not operation.is_final:
            self._told.pop(uuid, None)
            return
        word = (operation.id, operation.state)
        if self._told.get(uuid) == word:
            return
        self._told[uuid] = word
        self.counts[f"MIG {operation.origin} {operation.state}"] += 1
        old = self._old.get((operation.id, uuid))
        if operation.is_stuck:
            self.counts["MIG stuck"] += 1
        if resets != self._resets.get((operation.id, uuid), resets):
            return  # the card was emptied under it
        if operation.steps_done == 0 and old is None and operation.state is MigState.FAILED:
            return
        wanted = self.wished.get((operation.id, uuid), operation.wanted)
        a_final_word_is_true(operation, wanted, old, gpu)

    def _look_at_end(self, uuid: str, noted: GpuRecord) -> None:
        operation = noted.operation
        if operation is not None and operation.is_final and not operation.is_stuck:
            self._over.add((operation.id, uuid))

    def lose_book(self, node: str) -> None:
        """Take in that a node has lost what it remembered of its GPUs."""
        for uuid in self._nodes[node].gpus:
            self.lost_books.add(uuid)
            self._told.pop(uuid, None)
        self._over = {each for each in self._over if each[1] not in self._nodes[node].gpus}
