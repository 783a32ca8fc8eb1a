"""The loops compiled give what they give interpreted, for every policy."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.placing.small_fleets import KINDS, REQUESTS, Case, cases

from stoker.aggregator import compiled
from stoker.aggregator.model import Request
from stoker.aggregator.placing.kernels import INTERPRETED, NO_FIT, Kernels, pick, pick_plainly
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.policies import POLICIES, Policies
from stoker.aggregator.placing.shapes import shape_of
from stoker.testing.clock import VirtualClock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def kernels(folder: Path) -> Kernels:
    return compiled.load(folder)


def placer(policy: str, loops: Kernels) -> Placer:
    mix = Mix.of(shape_of(request) for request in KINDS)
    return Placer(Policies.named(policy), mix, is_learning=False, draw=lambda _: 0, kernels=loops)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.lists(REQUESTS, min_size=1, max_size=4), st.sampled_from(sorted(POLICIES)))
def test_compiled_and_interpreted_decide_alike(
    kernels: Kernels, case: Case, requests: list[Request], policy: str
) -> None:
    view = case.scene.view()
    fast, slow = placer(policy, kernels), placer(policy, INTERPRETED)
    for request in requests:
        assert fast.ranked(request, view) == slow.ranked(request, view)
        assert fast.find(request, view) == slow.find(request, view)


@st.composite
def keyed(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[list[int], list[int], list[int]]:
    count = draw(st.integers(0, 12))
    keys = draw(st.lists(st.integers(NO_FIT, 3), min_size=count, max_size=count))
    flags = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    return keys, draw(st.permutations(range(count))), draw(st.sampled_from(([], flags)))


@given(keyed())
def test_the_first_of_the_highest_is_picked(
    kernels: Kernels, rows: tuple[list[int], list[int], list[int]]
) -> None:
    keys, order, excluded = rows
    able = [
        row for row in range(len(keys)) if keys[row] != NO_FIT and not (excluded and excluded[row])
    ]
    expected = min(able, key=lambda row: (-keys[row], order[row]), default=-1)
    arrays = (
        np.array(keys, np.int32),
        np.array(order, np.int64),
        np.array(excluded, np.uint8),
    )
    for way in (pick, pick_plainly, kernels.pick):
        assert way(*arrays) == expected


def stored(folder: Path) -> list[Path]:
    return list(folder.rglob("*.nbc"))


async def test_loops_are_compiled_once_the_fleet_is_worth_it(
    kernels: Kernels, folder: Path
) -> None:
    used: list[Kernels] = []
    counts = iter((0, 10, 300))
    clock = VirtualClock()
    async with asyncio.TaskGroup() as tasks:
        waiting = compiled.run_when_worth_it(used.append, lambda: next(counts), 256, folder, clock)
        tasks.create_task(waiting)
        for _ in range(2):
            assert used == []
            await clock.advance(compiled.LOOK_SECONDS)
    assert [each.is_compiled for each in used] == [kernels.is_compiled]
    assert stored(folder)  # for the next start


@pytest.mark.parametrize("program", ["false", "there-is-no-such-program"])
async def test_placement_runs_interpreted_where_nothing_can_be_compiled(
    program: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    used: list[Kernels] = []
    await compiled.run_when_worth_it(used.append, lambda: 1, 0, tmp_path, VirtualClock())
    assert used == []
    assert "placement runs interpreted" in caplog.text


async def test_without_numba_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    used: list[Kernels] = []
    await compiled.run_when_worth_it(used.append, lambda: 1_000, 0, tmp_path, VirtualClock())
    assert used == []
