"""A simulated disk: writes take time, one after the other, and a crash keeps what was synced and
little more.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from stoker.testing.scheduler import Scheduler

T = TypeVar("T")

# An fsync on a good disk, and on one in trouble.
SYNC_SECONDS = (0.0003, 0.004)
SLOW_SYNC_SECONDS = (0.05, 4.0)
# Between the sync and the moment at which the writer learns of it: room for a crash.
ANSWER_SECONDS = 0.0001

FULL = "no space left on device"


@dataclass(slots=True)
class Medium:
    """What files of one disk have in common."""

    is_full: bool = False
    is_slow: bool = False


class Disk(Generic[T]):
    """Keeps batches, each whole or not at all, in the order in which they were written."""

    def __init__(
        self, scheduler: Scheduler, rng: Random, *, beside: "Disk[bytes] | None" = None
    ) -> None:
        """`beside`: another file on the same disk."""
        self.durable: list[T] = []
        self.medium: Medium = Medium() if beside is None else beside.medium
        self.syncs = 0
        self._scheduler = scheduler
        self._rng = rng
        self._pending: deque[tuple[T, Callable[[str], None]]] = deque()
        self._life = 0  # rises at a crash: what was begun before is not finished

    @property
    def is_full(self) -> bool:
        """Whether there is no room."""
        return self.medium.is_full

    @is_full.setter
    def is_full(self, is_full: bool) -> None:
        self.medium.is_full = is_full

    @property
    def is_slow(self) -> bool:
        """Whether it takes its time."""
        return self.medium.is_slow

    @is_slow.setter
    def is_slow(self, is_slow: bool) -> None:
        self.medium.is_slow = is_slow

    def write(self, batch: T, answered: Callable[[str], None]) -> None:
        """Make `batch` durable, then call `answered` with "", or with the reason why it is not."""
        self._pending.append((batch, answered))
        if len(self._pending) == 1:
            self._begin()

    def mend(self) -> None:
        """Have room again, and be quick."""
        self.is_full = self.is_slow = False

    def crash(self) -> int:
        """Lose what is not synced, but for what the disk had already got; return how many batches
        it had.
        """
        self._life += 1
        kept = 0 if self.is_full else self._rng.randint(0, min(len(self._pending), 2))
        for _ in range(kept):
            self.durable.append(self._pending.popleft()[0])
        self._pending.clear()
        return kept

    def _begin(self) -> None:
        life = self._life
        seconds = self._rng.uniform(*(SLOW_SYNC_SECONDS if self.is_slow else SYNC_SECONDS))

        def finish() -> None:
            if self._life == life:
                self._finish()

        self._scheduler.after(seconds, finish)

    def _finish(self) -> None:
        batch, answered = self._pending.popleft()
        if self.is_full:
            reason = FULL
        else:
            reason = ""
            self.durable.append(batch)
            self.syncs += 1
        life = self._life

        def answer() -> None:
            if self._life == life:
                answered(reason)

        self._scheduler.after(ANSWER_SECONDS, answer)
        if self._pending:
            self._begin()
