"""The mix of requests: recent ones count for more, and it stays bounded."""

import pytest
from tests.unit.aggregator.builders import whole

from stoker.aggregator.placing import mix as mix_module
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.shapes import Shape, shape_of

ONE, TWO = shape_of(whole(1)), shape_of(whole(2))


def shares(mix: Mix) -> dict[Shape, float]:
    found = dict(mix.shapes())
    return {shape: weight / sum(found.values()) for shape, weight in found.items()}


def test_in_a_known_workload_all_count_alike() -> None:
    assert shares(Mix.of([ONE, ONE, TWO, ONE])) == {ONE: 0.75, TWO: 0.25}


def test_a_request_counts_half_after_the_half_life() -> None:
    mix = Mix(half_life=100)
    mix.add(ONE)
    for _ in range(99):
        mix.add(whole_shape(8))
    mix.add(TWO)
    found = shares(mix)
    assert found[ONE] / found[TWO] == pytest.approx(0.5)


def whole_shape(gpus: int) -> Shape:
    return shape_of(whole(gpus))


def test_the_heaviest_come_first() -> None:
    assert [shape for shape, _ in Mix.of([TWO, ONE, ONE]).shapes()] == [ONE, TWO]


def test_the_rarest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix_module, "SHAPES_MAX", 4)
    often = [shape_of(whole(1, cpu_milli=cpus)) for cpus in range(1, 4)]
    seldom = [shape_of(whole(1, cpu_milli=cpus)) for cpus in range(10, 30)]
    mix = Mix.of([shape for each in seldom for shape in (*often, each)])
    assert len(mix.shapes()) <= 8
    assert {shape for shape, _ in mix.shapes()[:3]} == set(often)
    assert mix.arrived == 80


def test_weights_stay_finite_and_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix_module, "_SCALE_MAX", 1e3)
    scaled, plain = Mix(half_life=2.0), Mix(half_life=2.0)
    for number in range(60):
        scaled.add(ONE if number % 3 else TWO)
    monkeypatch.setattr(mix_module, "_SCALE_MAX", 1e100)
    for number in range(60):
        plain.add(ONE if number % 3 else TWO)
    assert shares(scaled) == pytest.approx(shares(plain))
