"""Where the workload of a run comes from: two files, or a seed."""

from pathlib import Path
from random import Random
from typing import assert_never

from stoker.testing.workloads.generated import generate
from stoker.testing.workloads.messages import Generated, PlacementPlan, Recorded
from stoker.testing.workloads.recorded import read_workload
from stoker.testing.workloads.tasks import Workload

# The workload of a seed is made by another, so that it does not go along with its order.
_SEEDS_FROM = 1_000_000


class Source:
    """The workloads of a plan; raises BadInput for files that are not what they should be."""

    def __init__(self, plan: PlacementPlan) -> None:
        self._plan = plan
        self._recorded: Workload | None = None
        match plan.workload:
            case Recorded(nodes, tasks):
                self._recorded = read_workload(Path(nodes), Path(tasks)).times(plan.copies)
            case Generated():
                pass
            case _:
                assert_never(plan.workload)

    def workload(self, seed: int) -> Workload:
        """Return the workload of that seed; a recorded one is the same for all."""
        if self._recorded is not None:
            return self._recorded
        rng = Random(_SEEDS_FROM + seed)
        return generate(rng, fleets=self._plan.copies, turns=self._plan.turns)

    @staticmethod
    def small() -> Workload:
        """Return a workload that does not take long."""
        return generate(Random(_SEEDS_FROM))
