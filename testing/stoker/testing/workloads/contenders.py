"""The aggregator's placer under a policy by name, as a run needs it."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from stoker.aggregator import compiled
from stoker.aggregator.placing.kernels import INTERPRETED, Kernels
from stoker.aggregator.placing.mix import Mix
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.policies import Policies
from stoker.aggregator.placing.shapes import shape_of
from stoker.testing.workloads.tasks import Task


def make_placer(
    policy: str,
    mix: Sequence[Task] | None,
    order: Sequence[str],
    seed: int,
    kernels: Kernels = INTERPRETED,
) -> Placer:
    """Return the placer.

    `mix`: the tasks that the policy knows all are like, as the published ones do; None: it learns
    that from what arrives. `order`: the nodes as ties are resolved.
    """
    known = None if mix is None else Mix.of(shape_of(task.request()) for task in mix)
    return Placer(
        Policies.named(policy),
        mix=known,
        is_learning=known is None,
        order=order,
        draw=Random(seed).randrange,
        kernels=kernels,
    )


def kernels_in(folder: Path | None) -> Kernels:
    """Return the placer's loops: compiled into that folder where numba is installed, which takes
    seconds; interpreted where it is not, and without a folder. They decide the same.
    """
    if folder is None or not compiled.is_available():
        return INTERPRETED
    return compiled.load(folder)
