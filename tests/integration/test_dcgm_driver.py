"""A driver that DCGM completes: whatever DCGM does, the other driver's readings stand."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.dcgm import importable_bindings
from tests.support.waiting import until_true

from stoker.agent.dcgm.bindings import load_bindings
from stoker.agent.dcgm.driver import WithDcgm
from stoker.agent.dcgm.source import DcgmSource
from stoker.agent.driver import Driver, DriverUnavailable, InventoryChanged, Suspect
from stoker.agent.facts import Fact, Rate
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory, ProcessesReading
from stoker.testing.dcgm_engine import EngineGpu, FakeHostengine

SM, POWER = Fact.SM_ACTIVE_RATIO, Fact.POWER_WATTS
LONG, SHORT = 30.0, 0.02


class Inner:
    """A driver of one GPU that tells what it is told to tell."""

    def __init__(self) -> None:
        self.facts = {POWER: 300.0}
        self.error: Exception | None = None
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        self.calls.append(f"inventory {len(suspects)}")
        ampere = GpuIdentity(0, "g0", "a card", 1 << 30, compute_capability="8.0")
        return Inventory(1.0, None, None, None, True, (ampere,))

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        self.calls.append("sample" if profiling else "sample without profiling")
        if self.error is not None:
            raise self.error
        return (GpuReading("g0", 1.0, tuple(rates), dict(self.facts)),)

    def processes(self) -> ProcessesReading:
        self.calls.append("processes")
        return ProcessesReading(1.0, 1.0, ())

    def close(self) -> None:
        self.calls.append("close")
        if self.error is not None:
            raise self.error


@pytest.fixture
def engine() -> Iterator[FakeHostengine]:
    with FakeHostengine([EngineGpu("g0")]) as engine:
        engine.value = lambda number, field: 0
        yield engine


@pytest.fixture
def bindings(tmp_path: Path) -> Iterator[Path]:
    with importable_bindings(tmp_path) as folder:
        yield folder


Make = Callable[..., WithDcgm]


@pytest.fixture
def make(engine: FakeHostengine, bindings: Path) -> Iterator[Make]:
    made: list[WithDcgm] = []

    def make(
        inner: Driver,
        patience: float = LONG,
        announce: Callable[[int, str], None] = lambda index, function: None,
    ) -> WithDcgm:
        source = DcgmSource(
            engine.address, 1.0, lambda: load_bindings(bindings), log=lambda text: None
        )
        driver = WithDcgm(inner, source, announce=announce, patience_seconds=patience)
        driver.inventory()
        made.append(driver)
        return driver

    yield make
    engine.answering.set()
    for driver in made:
        driver.close()


def only(readings: tuple[GpuReading, ...]) -> GpuReading:
    (reading,) = readings
    return reading


def test_the_facts_of_dcgm_join_those_of_the_driver(make: Make) -> None:
    reading = only(make(Inner()).sample())
    assert reading.facts[POWER] == 300.0
    assert reading.facts[SM] == 0.0
    assert reading.failures == ()


def test_dcgm_is_not_touched_where_the_driver_tells(make: Make, engine: FakeHostengine) -> None:
    inner = Inner()
    inner.facts[SM] = 0.5
    driver = make(inner)
    assert only(driver.sample()).facts == {POWER: 300.0, SM: 0.5}
    driver.sample(profiling=False)
    assert engine.calls == []


def test_slow_facts_alone_are_none_of_dcgm(make: Make, engine: FakeHostengine) -> None:
    driver = make(Inner())
    assert only(driver.sample((Rate.SLOW,))).facts == {POWER: 300.0}
    assert engine.calls == []


def test_everything_else_is_the_other_drivers(make: Make) -> None:
    inner = Inner()
    driver = make(inner)
    driver.open()
    assert driver.inventory((Suspect(0, None, None, ""),)).simulated
    assert driver.processes().processes == ()
    driver.sample(profiling=False)
    driver.close()
    assert inner.calls == [
        *("inventory 0", "open", "inventory 1", "processes", "sample without profiling", "close")
    ]


@pytest.mark.parametrize("error", [InventoryChanged("1 GPU more"), DriverUnavailable("gone")])
def test_an_error_of_the_other_driver_passes(make: Make, error: Exception) -> None:
    inner = Inner()
    inner.error = error
    driver = make(inner)
    with pytest.raises(type(error)):
        driver.sample()
    inner.error = None


def test_what_is_paused_is_resumed_at_the_end_even_when_the_other_driver_fails(
    make: Make, engine: FakeHostengine
) -> None:
    inner = Inner()
    driver = make(inner)
    (reading,) = driver.sample(profiling=False)
    assert reading.failures == ()
    assert engine.is_paused
    inner.error = DriverUnavailable("gone")
    with pytest.raises(DriverUnavailable):
        driver.close()
    assert not engine.is_paused
    inner.error = None


def test_the_agent_can_see_that_dcgm_is_waited_for(make: Make) -> None:
    announced: list[tuple[int, str]] = []

    def announce(index: int, function: str) -> None:
        announced.append((index, function))

    make(Inner(), announce=announce).sample()
    assert announced == [(-1, "dcgm")]


async def test_a_dcgm_that_hangs_costs_its_facts_only(make: Make, engine: FakeHostengine) -> None:
    inner = Inner()
    driver = make(inner, SHORT)
    await until_true("DCGM's facts", lambda: SM in driver.sample()[0].facts)
    engine.hang()
    (reading,) = driver.sample()
    assert reading.facts == {POWER: 300.0}
    (failure,) = reading.failures
    assert (failure.fact, failure.error_kind) == ("dcgm", "driver_timeout")
    assert failure.message.startswith("g0: dcgmEntitiesGetLatestValues: has not returned for 0.")
    # Nobody waits a second time for an answer that does not come, and one that came is not used.
    asked = len(inner.calls)
    engine.answering.set()
    await until_true("DCGM to come back", lambda: SM in driver.sample()[0].facts)
    assert len(inner.calls) > asked


def test_closing_does_not_wait_for_a_dcgm_that_hangs(make: Make, engine: FakeHostengine) -> None:
    driver = make(Inner(), SHORT)
    engine.hang()
    driver.sample()
    closing = threading.Thread(target=driver.close, daemon=True)
    closing.start()
    closing.join(LONG)  # half of what a request may take
    assert not closing.is_alive()
