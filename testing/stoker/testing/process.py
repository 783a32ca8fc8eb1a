"""What every process of a simulated world is: it lives, may die at any point, and what it had begun
dies with it.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random
from typing import ParamSpec, Protocol

from stoker.testing.network import Network
from stoker.testing.scheduler import Scheduler
from stoker.testing.story import Story

P = ParamSpec("P")


class Killed(Exception):
    """The process died here, in the middle of what it did."""


class Surroundings(Protocol):
    """What a process finds around it: the parts of the world that are not its own."""

    scheduler: Scheduler
    network: Network
    rng: Random
    story: Story

    def is_fatal_point(self) -> bool:
        """Whether the process that has come to a named point of its work dies here."""
        ...

    def is_fatal_step(self) -> bool:
        """Whether the process that is about to take one more step dies before it."""
        ...

    def report(self, error: BaseException) -> None:
        """Take in an error that nobody expected: the run ends with it."""
        ...

    def mourn(self, process: "Process") -> None:
        """Take in that a process has died; some day it starts again."""
        ...


class Process(ABC):
    """A process with lives; a callable made in one life does nothing in the next."""

    def __init__(self, name: str, around: Surroundings) -> None:
        self.name = name
        self.around = around
        self.is_up = False
        self.life = 0
        self.stands_until = 0.0  # virtual seconds
        self._kept_back: deque[Callable[[], None]] = deque()  # in the order in which it came
        self._is_catching_up = False

    def start(self) -> None:
        """Begin a life."""
        assert not self.is_up, f"{self.name} runs already"
        self.is_up = True
        self.life += 1
        self.tell(f"starts, life {self.life}")
        self.guarded(self.begin)()

    def crash(self, why: str) -> None:
        """End this life at once."""
        if self.is_up:
            self.is_up = False
            self.stands_until = 0.0
            self._kept_back.clear()
            self.tell(f"dies: {why}")
            self.perish()
            self.around.mourn(self)

    def stand_still(self, seconds: float) -> None:
        """Do nothing for so long, as under SIGSTOP: what is due or arrives meanwhile waits."""
        if self.is_up:
            self.stands_until = max(self.stands_until, self.now + seconds)
            self.tell(f"stands still for {seconds:.1f} s")

    @property
    def stands_still(self) -> bool:
        """Whether it is stopped now, or has not yet caught up with what came meanwhile."""
        return self.now < self.stands_until or bool(self._kept_back)

    def keep_back(self, what: Callable[[], None]) -> None:
        """Do `what` when the process goes on, after all that was kept back before."""
        self._kept_back.append(what)
        if len(self._kept_back) == 1:
            self.around.scheduler.at(self.stands_until, partial(self._go_on, self.life))

    def _go_on(self, life: int) -> None:
        if self.life != life or not self._kept_back:
            return  # it has died
        if self.now >= self.stands_until:
            what = self._kept_back.popleft()
            self._is_catching_up = True  # what belongs to this happens with it
            what()
            self._is_catching_up = False
        if self._kept_back:
            self.around.scheduler.at(self.stands_until, partial(self._go_on, life))

    @abstractmethod
    def begin(self) -> None:
        """Do what a life starts with."""

    @abstractmethod
    def perish(self) -> None:
        """Lose what a death takes: streams, what was not synced."""

    def tell(self, what: str) -> None:
        """Add a line to the world's story."""
        self.around.story.tell(self.name, what)

    @property
    def now(self) -> float:
        """Virtual seconds: the true time, which no process knows."""
        return self.around.scheduler.now

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Do `what` in so many seconds, if this life lasts so long."""
        self.around.scheduler.after(seconds, self.guarded(what))

    def guarded(self, what: Callable[P, None]) -> Callable[P, None]:
        """Return `what` bound to this life; while the process stands still, it waits its turn."""
        life = self.life

        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            if self.is_up and self.life == life:
                if self.stands_still and not self._is_catching_up:
                    self.keep_back(partial(do, *args, **kwargs))
                else:
                    do(*args, **kwargs)

        def do(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                what(*args, **kwargs)
            except Killed as killed:
                self.crash(str(killed))

        return run

    def pass_point(self, point: str) -> None:
        """Come to a named point of the work, which may be the last."""
        if self.around.is_fatal_point():
            raise Killed(point)
