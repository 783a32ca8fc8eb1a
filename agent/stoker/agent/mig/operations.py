"""What is being done about the partitions of a node's GPUs, as it outlives the agent.

One operation per GPU, the newest. It is noted before its first step and after each, with the layout
from before it, so that whoever starts next finds the way on or the way back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from stoker.agent.partitions import Target
from stoker.core.mig.geometry import MigState, Wanted

# Operations that a GPU remembers by their IDs, so that one which is asked for again is not begun
# again; older ones are forgotten.
KNOWN_MAX = 16

# Of an operation that did not begin on a GPU that an older one has left between two layouts.
LEFT_BEHIND = "going back failed too, in an operation before it, which has left it half-made"

# Nothing more is going to happen in these, unless the agent starts anew or is asked again.
FINAL_STATES = frozenset({MigState.SUCCESS, MigState.FAILED})
# Not a step was done yet: a newer operation may take its place.
UNBEGUN_STATES = frozenset({MigState.PENDING, MigState.DRAINING})


class Origin(StrEnum):
    """Why there is an operation."""

    ASKED = "asked"  # somebody applied a configuration
    UNDO = "undo"  # somebody asked for the layout before
    DECLARED = "declared"  # what is declared for the GPU was not in place when the agent started


class Direction(StrEnum):
    """Where an operation is going."""

    FORWARD = "forward"  # to its target
    BACK = "back"  # to the layout before it


@dataclass(frozen=True, slots=True)
class Declared:
    """What a GPU is to be whenever the agent starts."""

    wanted: Wanted
    config: str  # its name, for people


@dataclass(frozen=True, slots=True)
class Past:
    """How a GPU was before it was changed."""

    target: Target
    declared: Declared | None  # what was declared then


@dataclass(frozen=True, slots=True)
class Operation:
    """A GPU on its way to another layout, or the last such way. Times are Unix seconds."""

    id: str
    origin: Origin
    config: str
    wanted: Wanted
    state: MigState
    asked_at: float
    # What is to be declared once it has succeeded, and what was declared when it was asked for.
    declares: Declared | None
    declared_before: Declared | None
    reason: str = ""  # why it is in this state; empty: that says it all
    leave_by: float | None = None  # users may take so long; None: they are not asked to leave
    evict: bool = False  # who is not gone by then is made to go
    direction: Direction = Direction.FORWARD
    # Both None: not a step was begun. Decided once; an undo has its target from the start.
    target: Target | None = None
    before: Target | None = None
    steps_done: int = 0
    steps_total: int = 0
    # It failed, and so did the way back: the GPU has neither layout. The next start tries again.
    is_stuck: bool = False
    # The layout before an older operation that was stuck: where to go if this one does not begin.
    lost: Target | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more is going to happen, if the agent goes on running."""
        return self.state in FINAL_STATES

    @property
    def is_begun(self) -> bool:
        """Whether steps may have been done, so that the partitions may be neither old nor new."""
        return self.state not in UNBEGUN_STATES and not self.is_final

    def given_up(self, reason: str) -> "Operation":
        """Return it as failed before it had begun; what an older one left half-made stays so."""
        failed = replace(self, state=MigState.FAILED, reason=reason)
        if self.lost is None:
            return failed
        # The reason of the one before may be long past; what it has left is still there.
        if LEFT_BEHIND not in reason:
            reason = f"{reason}; {LEFT_BEHIND}"
        return replace(
            failed, reason=reason, direction=Direction.BACK, before=self.lost, is_stuck=True
        )

    @property
    def goal(self) -> Target | None:
        """Where it is going now."""
        return self.target if self.direction is Direction.FORWARD else self.before


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """What is remembered about one GPU."""

    declared: Declared | None = None
    # What the agent's own configuration last said: only when it says something else is it newer
    # than what was applied meanwhile.
    configured: Declared | None = None
    operation: Operation | None = None  # the newest
    undo: Past | None = None  # what was before the newest one that changed anything
    known: tuple[str, ...] = ()  # operations that were asked for, the newest last
    changed_at: float | None = None  # when the partitions were changed last (Unix seconds)

    def knows(self, operation_id: str) -> bool:
        """Whether that operation was asked for before."""
        return operation_id in self.known

    def before(self, now: Target) -> Past | None:
        """Return what an undo goes back to from how the GPU is now; None: to nothing.

        What was asked for and not begun is only taken back.
        """
        newest = self.operation
        if newest is None:
            return self.undo
        if newest.state in UNBEGUN_STATES and newest.origin is not Origin.DECLARED:
            return Past(now, self.declared)
        if newest.state is MigState.REBOOT_REQUIRED and newest.before is not None:
            return Past(newest.before, newest.declared_before)
        return self.undo

    def without_unbegun(self) -> "GpuRecord":
        """Return it without an operation that has touched nothing."""
        operation = self.operation
        if operation is None or operation.lost is None:
            return replace(self, operation=None)
        return replace(self, operation=operation.given_up(operation.reason))

    def asked(self, operation: Operation) -> "GpuRecord":
        """Return it with a new operation."""
        known = (*self.known, operation.id)[-KNOWN_MAX:]
        last = self.operation
        if last is not None:
            lost = last.before if last.is_stuck else None if last.is_final else last.lost
            operation = replace(operation, lost=lost)
        return replace(self, operation=operation, known=known)


@dataclass(frozen=True, slots=True)
class Book:
    """All that is remembered, by the UUID of the GPU; one value, written down whole."""

    gpus: Mapping[str, GpuRecord] = field(default_factory=dict[str, GpuRecord])

    def of(self, gpu_uuid: str) -> GpuRecord:
        """Return what is remembered of that GPU."""
        return self.gpus.get(gpu_uuid, GpuRecord())

    def noting(self, gpu_uuid: str, record: GpuRecord) -> "Book":
        """Return it with this about that GPU."""
        return Book({**self.gpus, gpu_uuid: record})
