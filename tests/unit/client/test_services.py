"""What a replica tells of itself: every operation once, with what it took and how it ended."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.client import services
from stoker.client.errors import InvalidRequest
from stoker.client.services import Observed, Registration, Service, registration
from stoker.core.latencies import BUCKETS, bucket_of


def make() -> Service:
    return Service(Registration("tok", "a-1", "10.0.0.1:9000"))


def counted(observed: Observed) -> tuple[int, int, int]:
    return observed.operations, observed.errors, sum(observed.latency_counts)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (1, 0, 0)),
        ({"seconds": 0.012}, (1, 0, 1)),
        ({"operations": 32, "seconds": 0.3}, (32, 0, 32)),
        ({"operations": 32, "seconds": 0.3, "errors": 2}, (32, 2, 30)),
        ({"operations": 0}, (0, 0, 0)),
    ],
)
def test_operations_are_counted(told: dict[str, float], expected: tuple[int, int, int]) -> None:
    service = make()
    service.observe(**told)  # type: ignore[arg-type]
    observed = service.take()
    assert counted(observed) == expected
    seconds = told.get("seconds", 0.0)
    assert observed.latency_sum_seconds == pytest.approx(seconds * expected[2])
    assert observed.latency_counts[bucket_of(seconds)] == expected[2]


def test_what_was_taken_is_not_told_again_unless_it_is_put_back() -> None:
    service = make()
    service.observe(3, 0.01, errors=1)
    taken = service.take()
    assert counted(service.take()) == (0, 0, 0)
    service.observe(1, 0.01)
    service.put_back(taken)
    assert counted(service.take()) == (4, 1, 3)


@pytest.mark.parametrize(
    "told",
    [
        {"operations": -1},
        {"errors": 2},
        {"errors": -1},
        {"seconds": -0.1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": 1.7e9},  # an instant for a duration
        {"operations": 100, "seconds": 1e308},  # together more than a number can be
    ],
)
def test_what_cannot_be_is_refused_and_not_counted(told: dict[str, float]) -> None:
    service = make()
    with pytest.raises(InvalidRequest, match="observe: wanted"):
        service.observe(**told)  # type: ignore[arg-type]
    assert counted(service.take()) == (0, 0, 0)


def test_operation_is_under_way_until_it_ends() -> None:
    service = make()
    with service.operation(), service.operation():
        assert service.take().in_flight == 2
    observed = service.take()
    assert (observed.in_flight, *counted(observed)) == (0, 2, 0, 2)
    assert observed.latency_sum_seconds > 0


def test_operation_that_raises_has_failed() -> None:
    service = make()
    with pytest.raises(RuntimeError, match="out of memory"), service.operation():
        raise RuntimeError("out of memory")
    observed = service.take()
    assert (observed.in_flight, *counted(observed)) == (0, 1, 1, 0)


def test_timed_function_counts_every_call() -> None:
    service = make()

    @service.timed
    def half(number: int) -> float:
        """Halve it."""
        assert service.take().in_flight == 1
        return number / 2

    assert half(3) == 1.5
    assert half.__doc__ == "Halve it."
    assert counted(service.take()) == (1, 0, 1)
    with pytest.raises(TypeError):
        half("x")  # type: ignore[arg-type]
    assert counted(service.take()) == (1, 1, 0)


def test_generator_function_is_not_timed() -> None:
    """Its call returns at once: a replica that streams its answers would look fast and idle."""

    async def tokens() -> AsyncIterator[str]:
        yield "a"

    def lines() -> Iterator[str]:
        yield "a"

    for function in (tokens, lines):
        with pytest.raises(InvalidRequest, match=f"{function.__name__}; use operation"):
            make().timed(function)


async def test_timed_coroutine_function_is_timed_to_its_end() -> None:
    service = make()
    going_on = asyncio.Event()

    @service.timed
    async def wait() -> str:
        await going_on.wait()
        return "done"

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert (service.take().in_flight, task.done()) == (1, False)
    going_on.set()
    assert await task == "done"
    assert counted(service.take()) == (1, 0, 1)


def test_after_a_long_outage_the_count_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than can be told at a time would be refused, and the replica with it."""
    monkeypatch.setattr(services, "OPERATIONS_MAX", 10)
    service = make()
    service.observe(8, 0.01)
    untold = service.take()
    service.observe(5, 0.01)
    service.put_back(untold)
    assert counted(service.take()) == (5, 0, 5)
    service.observe(8, 0.01)
    service.observe(5, 0.01)
    assert counted(service.take()) == (5, 0, 5)


def test_threads_lose_no_operation() -> None:
    service = make()
    taken: list[int] = []

    def work() -> None:
        for _ in range(500):
            with service.operation():
                pass
            taken.append(service.take().operations)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) + service.take().operations == 2000


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.0, 100.0), st.integers(0, 50))))
def test_counts_are_those_that_the_aggregator_takes(
    told: list[tuple[int, float, int]],
) -> None:
    service = make()
    for operations, seconds, errors in told:
        service.observe(operations, seconds, min(errors, operations))
    observed = service.take()
    assert len(observed.latency_counts) == BUCKETS
    assert observed.operations == sum(operations for operations, _, _ in told)
    assert sum(observed.latency_counts) == observed.operations - observed.errors


@pytest.mark.parametrize("capacity", [0, -1, 2_000_000])
def test_capacity_that_cannot_be_is_refused(capacity: int) -> None:
    with pytest.raises(InvalidRequest, match=f"capacity: wanted 1 to .*, found {capacity}"):
        registration("tok", "a-1", "10.0.0.1:9000", capacity)
