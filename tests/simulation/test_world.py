"""Whatever goes wrong, the promises hold; and when the faults stop, everything comes to rest.

The promises stand in `stoker.testing.invariants`, `.moments` and `.liveness`, one function each.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from tests.simulation.runs import FIXED, SOAKED, asked_for, outcome, rotating_seeds, scenario

from stoker.testing.faults import Faults
from stoker.testing.world import Scenario

# What has to happen in the fixed seeds together, or they would show nothing.
HAPPENINGS = (
    *("aggregator starts", "frames", "acknowledged", "expired", "refused by node"),
    *("granted from the queue", "NodeRegistered", "NodeCordoned", "NodeUncordoned"),
    *("values shown", "missing: driver_timeout", "missing: gpu_lost"),
    *("GpuHealthChanged", "GpuCordoned", "GpuUncordoned"),
    *("AllocationRequested", "AllocationGranted", "AllocationReleasing", "AllocationEnded"),
)

DIGEST = """
import logging, sys
from stoker.testing.world import Scenario, World
logging.disable(logging.CRITICAL)
print(World(Scenario(int(sys.argv[1]), seconds=60.0)).run().digest)
"""


@pytest.mark.parametrize("seed", asked_for(FIXED))
def test_promises_hold(seed: int) -> None:
    outcome(scenario(seed))


@pytest.mark.parametrize("seed", asked_for(FIXED[:4]))
def test_what_nodes_hold_is_taken_over_by_a_ledger_that_was_lost(seed: int) -> None:
    run = outcome(replace(scenario(seed), faults=replace(Faults(), ledger_lost=30.0)))
    assert run.counts["AllocationAdopted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", asked_for(rotating_seeds()))
def test_promises_hold_whatever_the_day(seed: int) -> None:
    outcome(scenario(seed))


@pytest.mark.soak
@pytest.mark.parametrize("seed", asked_for(tuple(range(SOAKED))))
def test_promises_hold_for_long(seed: int) -> None:
    outcome(scenario(seed, seconds=1800.0, nodes=12, gpus=8))


def test_world_is_lively() -> None:
    counts: Counter[str] = Counter()
    for seed in FIXED:
        counts.update(outcome(Scenario(seed)).counts)
    assert [name for name in HAPPENINGS if counts[name] < len(FIXED)] == [], counts


def test_same_seed_gives_the_same_run_event_for_event() -> None:
    def digest(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST, "3"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest("1") == digest("2")


def test_another_seed_gives_another_run() -> None:
    assert outcome(Scenario(FIXED[0])).digest != outcome(Scenario(FIXED[1])).digest
