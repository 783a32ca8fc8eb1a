"""The simulated disk: what is durable, in which order, and what a crash leaves of it."""

from functools import partial
from random import Random

import pytest

from stoker.testing.disk import FULL, SLOW_SYNC_SECONDS, Disk
from stoker.testing.scheduler import Scheduler


class Writer:
    """Writes numbers, and notes what it is answered."""

    def __init__(self, seed: int = 1) -> None:
        self.scheduler = Scheduler()
        self.disk: Disk[int] = Disk(self.scheduler, Random(seed))
        self.answers: list[tuple[int, str, tuple[int, ...]]] = []

    def write(self, *numbers: int) -> None:
        for number in numbers:
            self.disk.write(number, partial(self._note, number))

    def _note(self, number: int, reason: str) -> None:
        self.answers.append((number, reason, tuple(self.disk.durable)))

    def run(self, seconds: float) -> None:
        self.scheduler.run_until(self.scheduler.now + seconds, after_each=lambda: None)


def test_writes_are_durable_in_order_and_before_their_answer() -> None:
    writer = Writer()
    writer.write(1, 2, 3)
    writer.run(1.0)
    assert [(number, reason) for number, reason, _ in writer.answers] == [
        (1, ""),
        (2, ""),
        (3, ""),
    ]
    assert all(number in durable for number, _, durable in writer.answers)
    assert writer.disk.durable == [1, 2, 3]
    assert writer.disk.syncs == 3


def test_a_full_disk_keeps_nothing_and_says_so() -> None:
    writer = Writer()
    writer.disk.is_full = True
    writer.write(1)
    writer.run(1.0)
    writer.disk.mend()
    writer.write(2)
    writer.run(1.0)
    assert [(number, reason) for number, reason, _ in writer.answers] == [(1, FULL), (2, "")]
    assert writer.disk.durable == [2]


def test_a_slow_disk_takes_its_time() -> None:
    writer = Writer()
    writer.disk.is_slow = True
    writer.write(1)
    writer.run(SLOW_SYNC_SECONDS[0])
    assert writer.answers == []
    writer.run(SLOW_SYNC_SECONDS[1])
    assert writer.disk.durable == [1]


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_keeps_a_beginning_and_answers_nobody(seed: int) -> None:
    writer = Writer(seed)
    writer.write(1, 2, 3, 4, 5)
    writer.run(0.004)
    told = [number for number, _, _ in writer.answers]
    writer.disk.crash()
    kept = list(writer.disk.durable)
    writer.run(1.0)
    assert [number for number, _, _ in writer.answers] == told
    assert kept == writer.disk.durable == [1, 2, 3, 4, 5][: len(kept)]
    assert kept[: len(told)] == told
    writer.write(6)
    writer.run(1.0)
    assert writer.disk.durable == [*kept, 6]


def test_some_crash_keeps_what_nobody_was_told_of() -> None:
    def unknown(seed: int) -> int:
        writer = Writer(seed)
        writer.write(1, 2)
        return writer.disk.crash()

    assert {unknown(seed) for seed in range(20)} == {0, 1, 2}
