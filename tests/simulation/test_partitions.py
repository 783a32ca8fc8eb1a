"""Worlds in which GPUs are partitioned (MIG) while everything else goes on, and goes wrong.

The promises stand in `stoker.testing.mig_witness` and `.mig_promises`, beside those of every world.
"""

from collections import Counter
from dataclasses import replace

import pytest
from tests.simulation.runs import asked_for, outcome, rotating_seeds, scenario

from stoker.testing.faults import Faults
from stoker.testing.world import Scenario

FIXED = (1, 2, 3)
ROTATING = 24

# What has to happen in the fixed seeds together, or they would show nothing.
HAPPENINGS = (
    *("MIG steps", "MIG noted", "MIG refused", "MIG stuck", "evicted"),
    *("MIG asked success", "MIG asked failed", "MIG undo success"),
    *("MIG declared success", "MIG declared failed"),
)


def partitioned(seed: int) -> Scenario:
    """A small world: every fault meets a GPU that is being partitioned."""
    return replace(scenario(seed, seconds=100.0, nodes=3, gpus=2), clients=8, mig=True)


@pytest.mark.parametrize("seed", asked_for(FIXED))
def test_promises_hold(seed: int) -> None:
    outcome(partitioned(seed))


@pytest.mark.parametrize("seed", asked_for(FIXED[:1]))
def test_promises_hold_when_agents_die_at_every_turn(seed: int) -> None:
    faults = replace(Faults.none(), agent_killed=2.0, agent_disk_slow=10.0, fatal_point=0.02)
    outcome(replace(partitioned(seed), faults=faults))


def test_world_is_lively() -> None:
    counts: Counter[str] = Counter()
    for seed in FIXED:
        counts.update(outcome(partitioned(seed)).counts)
    assert [name for name in HAPPENINGS if not counts[name]] == [], counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", asked_for(rotating_seeds()[:ROTATING]))
def test_promises_hold_whatever_the_day(seed: int) -> None:
    outcome(partitioned(seed))
