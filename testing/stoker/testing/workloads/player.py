"""A process that plays workloads: told on its standard input what, it says what became of it.

Run as `python -m stoker.testing.workloads.player PLAN`. It ends when its standard input does, after
what it is doing then.
"""

import gc
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from stoker.core.daemons import COLLECTOR_THRESHOLDS
from stoker.core.errors import BadInput
from stoker.testing.load import Connected, Failed, say
from stoker.testing.workloads.contenders import kernels_in
from stoker.testing.workloads.messages import FindBound, Instruction, PlacementPlan
from stoker.testing.workloads.plays import find_bound, play
from stoker.testing.workloads.sources import Source


def run(plan: PlacementPlan, lines: Iterable[bytes]) -> None:
    """Do what the lines say, one after the other."""
    try:
        source = Source(plan)
    except BadInput as error:  # a file has changed since the parent read it
        say(Failed(str(error)))
        return
    kernels = kernels_in(None if plan.compiled is None else Path(plan.compiled))
    say(Connected(1))
    warm: set[str] = set()
    for line in lines:
        what: Instruction = msgspec.json.decode(line, type=Instruction)
        if isinstance(what, FindBound):
            say(find_bound(source.workload(what.seed), what.seed))
            continue
        if what.policy not in warm:
            # What is compiled, or loaded, at first use is no part of what a decision costs.
            play(source.small(), what, is_learning=plan.is_learning, kernels=kernels)
            warm.add(what.policy)
        workload = source.workload(what.seed)
        say(play(workload, what, is_learning=plan.is_learning, kernels=kernels))


if __name__ == "__main__":
    # As in the aggregator: its decisions are what is measured.
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    run(msgspec.json.decode(sys.argv[1], type=PlacementPlan), sys.stdin.buffer)
