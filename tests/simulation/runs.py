"""Which seeds are run, and each run once, however many tests look at it.

make simulate SEED=7           one seed; TROUBLE_SECONDS, NODES, GPUS, CLIENTS as a failure says,
                               and MIG=1 for a world with partitioned GPUs
STOKER_SEED=7 make test-slow   another base for the rotating seeds, else it is the date
STORY=1                        tells the whole story, not only its end
"""

import os
from datetime import UTC, datetime
from functools import cache

from stoker.testing.world import Outcome, Scenario, World

# Always run: what a change is checked with.
FIXED = tuple(range(1, 10))
ROTATING = 64
SOAKED = 200


def rotating_seeds() -> tuple[int, ...]:
    """Seeds that differ from day to day, so that in time they see everything."""
    base = int(os.environ.get("STOKER_SEED") or datetime.now(UTC).strftime("%Y%m%d")) * 1000
    return tuple(range(base, base + ROTATING))


def asked_for(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The seed that was asked for, or else these."""
    asked = os.environ.get("SEED")
    return (int(asked),) if asked else seeds


def scenario(seed: int, seconds: float = 180.0, nodes: int = 6, gpus: int = 4) -> Scenario:
    """What is run for a seed; a failure prints how to ask for the same again."""
    return Scenario(
        seed,
        seconds=float(os.environ.get("TROUBLE_SECONDS", seconds)),
        nodes=int(os.environ.get("NODES", nodes)),
        gpus=int(os.environ.get("GPUS", gpus)),
        clients=int(os.environ.get("CLIENTS", 2 * nodes)),
        mig=bool(os.environ.get("MIG")),
    )


@cache
def outcome(scenario: Scenario) -> Outcome:
    """Run the scenario, or fail with its story."""
    return World(scenario, print if os.environ.get("STORY") else None).run()
