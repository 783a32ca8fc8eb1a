"""Coroutines on virtual time, and what a kill does to them."""

import asyncio
from random import Random

import pytest

from stoker.testing.network import NO_FAULTS, Network
from stoker.testing.process import Killed, Process
from stoker.testing.scheduler import Scheduler
from stoker.testing.story import Story
from stoker.testing.virtual_loop import VirtualLoop


class Place:
    """Surroundings in which the process dies at the step that the test names."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.rng = Random(1)
        self.network = Network(self.scheduler, self.rng, NO_FAULTS)
        self.story = Story(lambda: self.scheduler.now, None)
        self.errors: list[BaseException] = []
        self.steps = 0
        self.last_step = 10**9

    def is_fatal_point(self) -> bool:
        return False

    def is_fatal_step(self) -> bool:
        self.steps += 1
        return self.steps > self.last_step

    def report(self, error: BaseException) -> None:
        self.errors.append(error)

    def mourn(self, process: Process) -> None:
        pass

    def run(self, seconds: float) -> None:
        self.scheduler.run_until(self.scheduler.now + seconds, after_each=lambda: None)


class Daemon(Process):
    """A process that runs one coroutine."""

    def __init__(self, place: Place) -> None:
        super().__init__("daemon", place)
        self.place = place
        self.told: list[tuple[float, str]] = []

    def begin(self) -> None:
        self.loop = VirtualLoop(self, self.place.report)
        self.loop.spawn(self.work(), "work")

    def perish(self) -> None:
        self.loop.dispose()

    def note(self, what: str) -> None:
        self.told.append((self.now, what))

    async def work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tick())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.5):
                    await asyncio.Event().wait()
            self.note("timeout")
            await asyncio.sleep(1000.0)

    async def tick(self) -> None:
        try:
            for _ in range(3):
                await asyncio.sleep(1.0)
                self.note("tick")
        finally:
            self.note("over")


def started() -> tuple[Place, Daemon]:
    place = Place()
    daemon = Daemon(place)
    daemon.start()
    return place, daemon


def test_sleep_timeouts_and_task_groups_go_by_virtual_time() -> None:
    place, daemon = started()
    place.run(10.0)
    daemon.crash("end of the test")
    assert daemon.told[:5] == [
        (1.0, "tick"),
        (2.0, "tick"),
        (2.5, "timeout"),
        (3.0, "tick"),
        (3.0, "over"),
    ]
    assert place.errors == []


def test_killed_at_any_step_it_goes_no_further_and_leaves_no_task() -> None:
    place, daemon = started()
    place.run(10.0)
    daemon.crash("end of the test")
    steps = place.steps
    for last in range(steps):
        place = Place()
        place.last_step = last
        daemon = Daemon(place)
        daemon.start()
        place.run(10.0)
        assert not daemon.is_up
        assert daemon.loop.is_closed()
        assert daemon.told.count((daemon.now, "over")) == 0 or last > 0
        assert place.errors == []


def test_an_error_that_nobody_takes_care_of_is_told() -> None:
    class Faulty(Daemon):
        async def work(self) -> None:
            await asyncio.sleep(1.0)
            raise ValueError("a bug")

    place = Place()
    daemon = Faulty(place)
    daemon.start()
    place.run(2.0)
    assert [str(error) for error in place.errors] == ["a bug"]
    daemon.crash("end of the test")


def test_a_callback_of_one_life_does_nothing_in_the_next() -> None:
    place, daemon = started()
    done: list[str] = []
    daemon.after(5.0, lambda: done.append("first life"))
    daemon.crash("killed")
    daemon.start()
    daemon.after(5.0, lambda: done.append("second life"))
    place.run(10.0)
    daemon.crash("end of the test")
    assert done == ["second life"]


def test_killed_in_the_middle_of_what_it_does() -> None:
    place, daemon = started()

    def die() -> None:
        raise Killed("at this point")

    daemon.after(1.0, die)
    place.run(2.0)
    assert not daemon.is_up
    assert "dies: at this point" in place.story.tail()
