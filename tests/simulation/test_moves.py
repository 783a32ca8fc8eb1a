"""Worlds in which holders are asked to move, and some of them do."""

import pytest

from stoker.testing.faults import Faults
from stoker.testing.world import Scenario, World


@pytest.mark.parametrize("seed", [6, 10])
def test_holders_move_and_every_promise_holds(seed: int) -> None:
    world = World(Scenario(seed, seconds=120.0, clients=24, faults=Faults.none()))
    outcome = world.run()
    assert world.rebalancer.offered >= outcome.counts["moved"] >= 1
