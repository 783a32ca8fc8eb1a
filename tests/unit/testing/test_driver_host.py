"""The driver host of the simulated world does what the real one does, as its agent hears of it."""

from collections.abc import Callable
from random import Random

import pytest
from tests.unit.testing.test_process import Diarist, Town

from stoker.agent import events as e
from stoker.agent.model import DriverState
from stoker.testing.cards import Span
from stoker.testing.driver_host import DriverHost
from stoker.testing.machine import Machine, build_machine

TICK_SECONDS = 1.0


class Told:
    """A host that is asked every second, and what it tells."""

    def __init__(self) -> None:
        self.town = Town()
        self.agent = Diarist(self.town)
        self.agent.start()
        self.machine: Machine = build_machine(1, 3, Random(1))
        self.events: list[e.Event] = []
        self.host = DriverHost(self.machine, self.agent, self.events.append)
        self.host.begin()
        self._tick()

    def _tick(self) -> None:
        self.agent.after(TICK_SECONDS, self._tick)
        self.host.look_again()
        self.host.sample()

    def later(self, seconds: float) -> None:
        now = self.town.scheduler.now
        self.town.scheduler.run_until(now + seconds, lambda: None)

    @property
    def now(self) -> float:
        return self.town.scheduler.now

    @property
    def uuids(self) -> list[str]:
        return [gpu.uuid for gpu in self.machine.gpus]

    def driver(self) -> DriverState:
        """What it says of the driver."""
        changes = [each for each in self.events if isinstance(each, e.DriverChanged)]
        return changes[-1].status.state

    @property
    def found(self) -> tuple[list[str], list[tuple[str | None, str]]]:
        """The GPUs that can be read, and those that cannot, with the kind of error."""
        told = [each.inventory for each in self.events if isinstance(each, e.InventoryRead)][-1]
        missing = [(fault.uuid, fault.error_kind) for fault in told.missing]
        return [gpu.uuid for gpu in told.gpus], missing

    @property
    def sampled(self) -> list[str]:
        """The GPUs of which the last answered sample told something."""
        taken = [each for each in self.events if isinstance(each, e.SampleTaken)]
        return [reading.uuid for reading in taken[-1].readings if reading.facts]


@pytest.fixture
def told() -> Told:
    told = Told()
    told.later(3.0)
    assert (told.driver(), told.found) == (DriverState.READING, (told.uuids, []))
    assert told.sampled == told.uuids
    assert told.machine.cards.out_since(told.uuids[0], told.now) is None
    return told


def test_gpu_that_hangs_blocks_all_then_is_left_alone_then_tried_again(told: Told) -> None:
    first, second, third = told.uuids
    told.machine.cards.hung[second] = Span(told.now, told.now + 6.0)
    told.events.clear()
    told.later(0.5)
    assert not any(isinstance(each, e.SampleTaken) for each in told.events)
    assert told.machine.cards.out_since(first, told.now) is not None
    told.later(3.0)
    states = [each.status.state for each in told.events if isinstance(each, e.DriverChanged)]
    assert states == [DriverState.BLOCKED, DriverState.READING]
    assert told.found == ([first, third], [(second, "driver_timeout")])
    assert told.sampled == [first, third]
    told.later(15.0)
    assert told.found == (told.uuids, [])
    assert told.sampled == told.uuids


def test_no_host_starts_while_a_killed_one_is_not_reaped(told: Told) -> None:
    told.machine.cards.killed_hosts_stay = Span(told.now, told.now + 20.0)
    told.machine.cards.hung[told.uuids[0]] = Span(told.now, told.now + 3.0)
    told.later(5.0)
    for _ in range(10):
        assert told.driver() is DriverState.BLOCKED
        told.later(1.0)
    told.later(20.0)
    assert told.driver() is DriverState.READING


def lose(told: Told) -> Callable[[], object]:
    told.machine.cards.lost[told.uuids[0]] = told.now
    return told.machine.cards.lost.clear


def pull(told: Told) -> Callable[[], object]:
    told.machine.cards.pulled[told.uuids[0]] = told.now
    return told.machine.cards.pulled.clear


@pytest.mark.parametrize("away", [lose, pull])
def test_gpu_that_is_gone_is_told_and_comes_back(
    told: Told, away: Callable[[Told], Callable[[], object]]
) -> None:
    come_back = away(told)
    told.later(3.0)
    missing = [(told.uuids[0], "gpu_lost")] if away is lose else []
    assert told.found == (told.uuids[1:], missing)
    assert told.sampled == told.uuids[1:]
    assert told.driver() is DriverState.READING
    come_back()
    told.later(3.0)
    assert told.found == (told.uuids, [])
    assert told.machine.cards.found_at[told.uuids[0]] > told.machine.cards.found_at[told.uuids[1]]


def test_driver_that_is_unloaded_and_loaded_in_another_version(told: Told) -> None:
    told.machine.cards.unloaded = Span(told.now, told.now + 5.0)
    told.machine.cards.version += 1
    told.later(3.0)
    assert told.driver() is DriverState.FAILED
    told.later(6.0)
    assert told.driver() is DriverState.READING


def test_library_that_no_longer_fits_ends_the_host(told: Told) -> None:
    told.machine.cards.version += 1
    told.later(1.3)
    states = [each.status.state for each in told.events if isinstance(each, e.DriverChanged)]
    assert DriverState.FAILED in states
    told.later(4.0)
    assert told.driver() is DriverState.READING


def test_mig_mode_is_told_when_it_changes(told: Told) -> None:
    told.machine.cards.mig.add(told.uuids[2])
    told.later(2.0)
    inventory = [each.inventory for each in told.events if isinstance(each, e.InventoryRead)][-1]
    assert [gpu.mig_enabled for gpu in inventory.gpus] == [False, False, True]


def test_driver_that_is_let_go_of_is_not_read_until_it_is_resumed(told: Told) -> None:
    told.host.release("released by root")
    told.later(0.5)
    assert told.driver() is DriverState.RELEASED
    told.events.clear()
    told.later(10.0)
    assert not any(isinstance(each, e.SampleTaken) for each in told.events)
    assert told.machine.cards.out_since(told.uuids[0], told.now) is not None
    told.host.resume()
    told.later(3.0)
    assert told.driver() is DriverState.READING
