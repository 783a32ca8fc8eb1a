"""A step of the host's clock moves no deadline."""

import time

import pytest

from stoker.core.clock import SteadyClock


def test_a_step_of_the_wall_clock_does_not_move_a_steady_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000.0)
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    clock = SteadyClock()
    assert clock.now() == 1_000.0
    monkeypatch.setattr(time, "time", lambda: 4_600.0)  # an hour ahead at once
    monkeypatch.setattr(time, "monotonic", lambda: 51.5)
    assert clock.now() == 1_001.5
