"""Pattern prices are those of the whole linear program, with every pattern written out."""

from collections.abc import Iterator, Mapping

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.aggregator.placing.prices import NOTHING_CUT, UNIT, Prices, cut

MIXES = st.dictionaries(
    st.integers(15, 99).map(lambda units: units * UNIT),
    st.floats(0.5, 50.0),
    min_size=1,
    max_size=4,
)


def patterns(sizes: list[int], room: int = 1000) -> Iterator[tuple[int, ...]]:
    """Every way to cut so much into pieces of these sizes."""
    if not sizes:
        yield ()
        return
    for count in range(room // sizes[0] + 1):
        for rest in patterns(sizes[1:], room - count * sizes[0]):
            yield (count, *rest)


def fewest_gpus(wanted: Mapping[int, float]) -> float:
    """How many GPUs, in fractions, the pieces need when they are cut in the best way."""
    sizes = sorted(wanted)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    for _ in sizes:
        solver.addVar(0.0, 1.0)
    for column, size in enumerate(sizes):
        solver.changeColCost(column, wanted[size])
    solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
    for pattern in patterns(sizes):
        columns = np.arange(len(sizes), dtype=np.int32)
        solver.addRow(-highspy.kHighsInf, 1.0, len(sizes), columns, np.array(pattern, np.float64))
    solver.run()
    return float(solver.getObjectiveValue())


def worth(prices: Prices, sizes: list[int], pattern: tuple[int, ...]) -> float:
    return sum(count * prices.pieces[size] for size, count in zip(sizes, pattern, strict=True))


@settings(max_examples=60, deadline=None)
@given(MIXES)
def test_prices_solve_the_program_over_all_patterns(wanted: Mapping[int, float]) -> None:
    prices, sizes = cut(wanted), sorted(wanted)
    assert all(worth(prices, sizes, each) <= 1.0 + 1e-6 for each in patterns(sizes))
    total = sum(wanted[size] * prices.pieces[size] for size in sizes)
    assert total == pytest.approx(fewest_gpus(wanted), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(MIXES, st.integers(0, 1000))
def test_a_rest_is_worth_the_dearest_pieces_that_it_holds(
    wanted: Mapping[int, float], rest: int
) -> None:
    prices, sizes = cut(wanted), sorted(wanted)
    dearest = max(worth(prices, sizes, each) for each in patterns(sizes, rest))
    assert prices.rests[rest] == pytest.approx(1.0 if rest == 1000 else min(1.0, dearest), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(MIXES, MIXES)
def test_what_was_known_of_another_mix_only_saves_time(
    wanted: Mapping[int, float], other: Mapping[int, float]
) -> None:
    prices = cut(wanted, cut(other).patterns)
    sizes = sorted(wanted)
    assert all(worth(prices, sizes, each) <= 1.0 + 1e-6 for each in patterns(sizes))
    total = sum(wanted[size] * prices.pieces[size] for size in sizes)
    assert total == pytest.approx(fewest_gpus(wanted), abs=1e-6)


def test_two_that_fill_a_gpu_waste_nothing_and_others_do() -> None:
    prices = cut({810: 10.0, 190: 10.0, 600: 1.0})
    assert prices.pieces[810] + prices.pieces[190] == pytest.approx(1.0)
    rests = prices.rests

    def wasted(size: int, left: int) -> float:
        return float(rests[left] - rests[left - size]) - prices.pieces[size]

    assert wasted(190, 190) == pytest.approx(0.0)
    assert wasted(190, 600) > 0.1


@pytest.mark.parametrize(
    ("what", "size", "price"),
    [
        ("a size of the mix", 500, 0.5),
        ("a size that is rounded up to it", 495, 0.5),
        ("a size that nobody asked for leaves half a GPU", 400, 0.5),
        ("a size that leaves nothing", 600, 1.0),
    ],
)
def test_price_of_a_size(what: str, size: int, price: float) -> None:
    assert cut({500: 3.0}).price_of(size) == pytest.approx(price), what


def test_a_piece_takes_least_where_the_rest_is_worth_nothing_else() -> None:
    assert cut({600: 1.0}).least_of(300) == 0.0
    assert cut({500: 1.0}).least_of(500) == 0.5


def test_without_shares_a_rest_is_worth_nothing() -> None:
    assert cut({}) is NOTHING_CUT
    assert (NOTHING_CUT.rests[999], NOTHING_CUT.rests[1000]) == (0.0, 1.0)
