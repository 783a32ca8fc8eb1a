"""What every process of a simulated world is: it lives, may die at any point, and what it had begun
dies with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
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
            self.tell(f"dies: {why}")
            self.perish()
            self.around.mourn(self)

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
        """Return `what` bound to this life."""
        life = self.life

        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            if self.is_up and self.life == life:
                try:
                    what(*args, **kwargs)
                except Killed as killed:
                    self.crash(str(killed))

        return run

    def pass_point(self, point: str) -> None:
        """Come to a named point of the work, which may be the last."""
        if self.around.is_fatal_point():
            raise Killed(point)
