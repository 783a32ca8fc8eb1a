"""How a simulated GPU moves in time: power follows load, heat follows power, energy adds up."""

from collections.abc import Iterator

import pytest

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import IDLE, Work
from stoker.core.gpu_models import MODELS

GIB = 2**30
H100 = MODELS["H100-80GB"]


def cards(name: str = "H100-80GB", seconds: int = 600) -> Iterator[tuple[int, SimulatedCard]]:
    """A card, second by second: idle, from 100 to 400 under full load, idle again."""
    model = MODELS[name]
    card = SimulatedCard(model, node="n1", index=0, seed=3, now=0.0)
    for second in range(seconds):
        busy = 100 <= second < 400
        card.carry(Work(GIB, 1.0) if busy else IDLE)
        card.advance(second + 1.0)
        yield second, card


@pytest.mark.parametrize("name", MODELS)
def test_values_are_believable(name: str) -> None:
    model = MODELS[name]
    watts: dict[int, float] = {}
    celsius: dict[int, float] = {}
    for second, card in cards(name):
        watts[second], celsius[second] = card.power_watts, card.celsius
        if second < 100:
            assert card.utilization == card.memory_utilization == 0
            assert card.sm_clock_hertz == model.sm_clock_idle_hertz
        elif second < 400:
            assert 0.9 <= card.utilization <= 1
            assert 0.3 < card.memory_utilization < 0.6
            assert (
                model.sm_clock_busy_hertz * 0.9 < card.sm_clock_hertz <= model.sm_clock_busy_hertz
            )
            assert card.memory_clock_hertz == model.memory_clock_busy_hertz
    assert all(abs(watts[s] / model.power_idle_watts - 1) < 0.05 for s in range(100))
    assert all(0.8 < watts[s] / model.power_limit_watts <= 1 for s in range(110, 400))
    assert all(abs(celsius[s] - model.temperature_idle_celsius) < 3 for s in range(100))
    assert all(abs(celsius[s] - model.temperature_busy_celsius) < 6 for s in range(300, 400))
    # Power is there within seconds; heat comes and goes slowly.
    assert watts[104] > 0.8 * model.power_limit_watts
    assert celsius[104] < (model.temperature_idle_celsius + model.temperature_busy_celsius) / 2
    assert celsius[404] > (model.temperature_idle_celsius + model.temperature_busy_celsius) / 2


def test_idle_values_wander() -> None:
    seen = {(round(c.power_watts, 2), round(c.celsius, 2)) for _, c in cards(seconds=60)}
    assert len(seen) > 50


def test_energy_is_power_over_time() -> None:
    model, before, counted = H100, 0.0, 0.0
    for _, card in cards():
        assert card.energy_joules > before
        counted += card.power_watts  # once a second
        before = card.energy_joules
    assert before == pytest.approx(counted, rel=0.02)
    assert 300 * model.power_limit_watts * 0.8 < before < 600 * model.power_limit_watts


@pytest.mark.parametrize("pace", [0.05, 1.0, 7.0])
def test_how_often_it_is_read_changes_little(pace: float) -> None:
    card = SimulatedCard(H100, node="n1", index=0, seed=3, now=0.0)
    card.carry(Work(utilization=0.5))
    now = 0.0
    while now < 60:
        now = min(60.0, now + pace)
        card.advance(now)
    # An idle card's 68.6 W, and 0.92 of half of the way to the limit, reached within a second.
    assert card.energy_joules == pytest.approx(21_240, rel=0.01)
    assert card.celsius == pytest.approx(44, abs=2)


def test_a_clock_that_goes_back_takes_nothing_back() -> None:
    card = SimulatedCard(H100, node="n1", index=0, seed=3, now=100.0)
    card.advance(200.0)
    energy = card.energy_joules
    card.advance(150.0)
    assert card.energy_joules == energy
    card.advance(151.0)
    assert energy < card.energy_joules < energy + 200
