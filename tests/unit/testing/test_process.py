"""A process that stands still: what is due or arrives meanwhile waits, in its order."""

from random import Random

from stoker.testing.network import NO_FAULTS, Network
from stoker.testing.process import Process
from stoker.testing.scheduler import Scheduler
from stoker.testing.story import Story


class Town:
    """Surroundings in which nothing goes wrong."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.rng = Random(1)
        self.story = Story(lambda: self.scheduler.now, None)
        self.network = Network(self.scheduler, self.rng, NO_FAULTS)

    def is_fatal_point(self) -> bool:
        return False

    def is_fatal_step(self) -> bool:
        return False

    def report(self, error: BaseException) -> None:
        raise error

    def mourn(self, process: Process) -> None:
        pass


class Diarist(Process):
    """Notes when it did what."""

    def __init__(self, town: Town) -> None:
        super().__init__("diarist", town)
        self.diary: list[tuple[float, str]] = []

    def begin(self) -> None:
        pass

    def perish(self) -> None:
        pass

    def note(self, what: str) -> None:
        self.diary.append((self.now, what))

    def plan(self, seconds: float, what: str) -> None:
        self.after(seconds, lambda: self.note(what))


def live(seconds: float, *standstills: tuple[float, float]) -> list[tuple[float, str]]:
    """Return the diary of one that has something to do every second, and stands still then."""
    town = Town()
    diarist = Diarist(town)
    diarist.start()
    for second in range(1, int(seconds) + 1):
        diarist.plan(second, f"task {second}")
    for at, duration in standstills:
        town.scheduler.at(at, lambda duration=duration: diarist.stand_still(duration))  # type: ignore[misc]
    town.scheduler.run_until(100.0, lambda: None)
    return diarist.diary


def test_what_is_due_meanwhile_is_done_afterwards_in_its_order() -> None:
    assert live(5, (1.5, 2.0)) == [
        (1.0, "task 1"),
        (3.5, "task 2"),
        (3.5, "task 3"),
        (4.0, "task 4"),
        (5.0, "task 5"),
    ]


def test_standing_still_again_meanwhile_changes_no_order() -> None:
    diary = live(6, (1.5, 2.0), (2.5, 3.0))
    assert diary == [(1.0, "task 1"), *((5.5, f"task {n}") for n in (2, 3, 4, 5)), (6.0, "task 6")]


def test_what_belongs_together_happens_together() -> None:
    """What a step asks for at once is part of it, also while it is made up for."""
    town = Town()
    diarist = Diarist(town)
    diarist.start()

    def step() -> None:
        diarist.note("begin")
        diarist.guarded(lambda: diarist.note("inside"))()
        diarist.note("end")

    for second in (1.0, 2.0):
        diarist.after(second, step)
    town.scheduler.at(0.5, lambda: diarist.stand_still(4.0))
    town.scheduler.run_until(100.0, lambda: None)
    assert diarist.diary == [(4.5, word) for word in ("begin", "inside", "end") * 2]


def test_death_while_it_stands_still_ends_what_was_kept_back() -> None:
    town = Town()
    diarist = Diarist(town)
    diarist.start()
    diarist.plan(1.0, "never")
    town.scheduler.at(0.5, lambda: diarist.stand_still(4.0))
    town.scheduler.at(2.0, lambda: diarist.crash("killed"))
    town.scheduler.at(3.0, diarist.start)
    town.scheduler.at(3.5, lambda: diarist.plan(0.5, "in the next life"))
    town.scheduler.run_until(100.0, lambda: None)
    assert diarist.diary == [(4.0, "in the next life")]
