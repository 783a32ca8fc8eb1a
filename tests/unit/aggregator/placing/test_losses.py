"""What the policy `fragmentation` goes by, against its formula written out."""

from collections.abc import Sequence
from math import erf, exp, inf, pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.builders import Scene, make_facts, make_gpus, whole

from stoker.aggregator.placing import kernels as k
from stoker.aggregator.placing.columns import Columns
from stoker.aggregator.placing.kernels import worth_of
from stoker.aggregator.placing.losses import KAPPA, SHORTFALLS, losses
from stoker.aggregator.placing.scarcity import SCARCITY, demand, prices
from stoker.aggregator.placing.tasks import Task

NO_JOBS = np.zeros((0, 3), np.int64)
NO_PRICES = np.zeros((0, 1))
WANTS = st.just(0.0) | st.floats(1, 20_000)  # of CPU or memory, for each GPU


def make_task(
    gpus: int = 1,
    milli: int = 1000,
    cpu: int = 0,
    memory: int = 0,
    fits: Sequence[bool] = (True,),
    weight: float = 1.0,
) -> Task:
    return Task(cpu, memory, gpus, milli < 1000, (milli,) * len(fits), tuple(fits), weight)


def shortfall(want: float, spread: float, there: float, usable: float) -> float:
    """The newsvendor's loss in GPUs, without a table."""
    if want == 0 or usable == 0:
        return 0.0
    deviation = spread * sqrt(usable)
    lacking = want * usable - there
    z = lacking / deviation if deviation else inf * lacking
    if abs(z) > 4:
        return max(0.0, lacking) / want
    density, below = exp(-z * z / 2) / sqrt(2 * pi), 0.5 * (1 + erf(z / sqrt(2)))
    return deviation * (density + z * below) / want


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 8),
    st.tuples(*[WANTS, st.floats(0, 20_000)] * 2),
    st.integers(0, 128_000),
    st.integers(0, 128_000),
)
def test_a_node_is_worth_its_gpus_less_what_will_want(
    usable: int, drains: tuple[float, ...], cpu: int, memory: int
) -> None:
    table = np.array([drains]) + np.array([[0.0, 1e-9, 0.0, 1e-9]])
    found = worth_of(0, cpu, memory, float(usable), 0, table, SHORTFALLS, NO_JOBS, NO_PRICES)
    lost = max(
        shortfall(table[0, 0], table[0, 1], cpu, usable),
        shortfall(table[0, 2], table[0, 3], memory, usable),
    )
    assert found == pytest.approx(usable - lost, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("what", "free", "cpu", "memory", "kept"),
    [
        ("room for two jobs", 8, 100, 100, 2 * 3.0),
        ("GPUs for one", 7, 100, 100, 3.0),
        ("CPUs for one", 8, 19, 100, 3.0),
        ("memory for none", 8, 100, 4, 0.0),
        ("too few GPUs", 3, 100, 100, 0.0),
    ],
)
def test_places_for_jobs_are_kept(what: str, free: int, cpu: int, memory: int, kept: float) -> None:
    jobs, job_prices = np.array([[4, 10, 5]], np.int64), np.array([[3.0]])
    drains = np.zeros((1, 4))
    found = worth_of(0, cpu, memory, float(free), free, drains, SHORTFALLS, jobs, job_prices)
    assert found == pytest.approx(free + kept), what


def test_of_several_kinds_of_job_the_dearest_counts() -> None:
    jobs = np.array([[4, 1, 1], [2, 1, 1]], np.int64)
    drains = np.zeros((1, 4))
    worth = worth_of(0, 9, 9, 4.0, 4, drains, SHORTFALLS, jobs, np.array([[1.0], [0.8]]))
    assert worth == pytest.approx(4 + 2 * 0.8)


# --- from the mix


def test_what_requests_take_of_the_host_for_each_gpu() -> None:
    tasks = [make_task(1, cpu=4000, memory=10), make_task(1, cpu=8000, memory=10)]
    found = losses(tasks, cards=1)
    rho, sigma, rho_memory, sigma_memory = found.drains[0]
    assert (rho, rho_memory) == (6000, 10)
    assert sigma == pytest.approx(KAPPA * 2000)
    assert sigma_memory == pytest.approx(0.0, abs=1e-6)


def test_a_card_is_asked_for_what_those_take_who_may_use_it() -> None:
    tasks = [make_task(cpu=1000, fits=(True, False)), make_task(cpu=5000, fits=(False, True))]
    assert losses(tasks, cards=3 - 1).drains[:, 0].tolist() == [1000, 5000]


def test_a_share_weighs_as_much_as_it_is_worth() -> None:
    tasks = [make_task(milli=500, cpu=2000)]
    assert losses(tasks, cards=1).drains[0, 0] == pytest.approx(4000)


def test_of_a_mix_of_nothing_nothing_is_lost() -> None:
    assert losses([], cards=2).drains.tolist() == [[0.0] * 4] * 2


# --- from mix and fleet


def columns_of(scene: Scene) -> Columns:
    columns = Columns()
    for node in scene.view().nodes.values():
        columns.load(node)
    return columns


def scarcity_of(tasks: Sequence[Task], columns: Columns) -> list[float]:
    tables = losses(tasks, len(columns.cards))
    wanted = demand(tasks, tables, len(columns.cards))
    return [float(each) for each in prices(wanted, tables, columns).scarcity]


def two_models() -> Columns:
    first = [make_facts(f"a{i}", 8) for i in range(10)]
    second = [make_facts(f"b{i}", make_gpus(f"b{i}", 8, "NVIDIA L4", 24)) for i in range(10)]
    return columns_of(Scene(*first, *second))


ANY, FIRST = (True, True), (True, False)


@pytest.mark.parametrize(
    ("what", "tasks", "expected"),
    [
        ("nobody is bound to a model", [make_task(fits=ANY)], [0.0, 0.0]),
        (
            "all are bound to the first",
            [make_task(fits=FIRST)],
            [SCARCITY, 0.0],
        ),
        (
            "few are",
            [make_task(fits=FIRST, weight=1.0), make_task(fits=ANY, weight=99.0)],
            [0.0, 0.0],
        ),
    ],
)
def test_a_model_is_dear_where_those_who_need_it_will_fill_it(
    what: str, tasks: list[Task], expected: list[float]
) -> None:
    assert scarcity_of(tasks, two_models()) == pytest.approx(expected, abs=0.026), what


def test_closed_nodes_are_no_capacity() -> None:
    scene = Scene(make_facts("a", 8), make_facts("b", make_gpus("b", 8, "NVIDIA L4", 24)))
    tasks = [make_task(fits=FIRST, weight=3.0), make_task(fits=ANY, weight=7.0)]
    before = scarcity_of(tasks, columns_of(scene))[0]
    scene.disconnect("b")
    assert scarcity_of(tasks, columns_of(scene))[0] < before


def job_price(tasks: Sequence[Task], columns: Columns) -> float:
    tables = losses(tasks, 1)
    wanted = demand(tasks, tables, 1)
    found = prices(wanted, tables, columns).jobs
    return float(found[0, 0]) if len(found) else 0.0


def test_places_for_jobs_are_dear_where_few_are_left() -> None:
    tasks = [make_task(8, weight=1.0), make_task(1, weight=8.0)]
    scene = Scene(*(make_facts(f"n{i}", 8) for i in range(20)))
    assert job_price(tasks, columns_of(scene)) < 4.0
    for _ in range(19):
        scene.grant(whole(1, ttl_seconds=1e6))  # on as few nodes as can be
    spread = Scene(*(make_facts(f"n{i}", 8) for i in range(20)))
    for node in range(19):
        spread.grant(whole(1, ttl_seconds=1e6, node=f"n{node}"))
    assert job_price(tasks, columns_of(spread)) > job_price(tasks, columns_of(scene)) > 0.0


def test_a_mix_without_jobs_keeps_no_places() -> None:
    assert job_price([make_task(1)], columns_of(Scene(make_facts("a", 8)))) == 0.0


def test_shortfalls_are_those_of_a_normal_variable() -> None:
    middle = k.DEVIATIONS * k.PER_DEVIATION
    assert SHORTFALLS[middle] == pytest.approx(1 / sqrt(2 * pi))
    assert SHORTFALLS[-1] == pytest.approx(4.0, abs=1e-4)
    assert SHORTFALLS[0] == 0.0
