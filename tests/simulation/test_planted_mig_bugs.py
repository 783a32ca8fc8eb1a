"""The invariants of partitioned GPUs bite, as those of `test_planted_bugs` do: each bug that is
planted here is found by some of a few seeds.
"""

# pyright: reportPrivateUsage=false

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from stoker.agent import holding
from stoker.agent.mig import looking
from stoker.agent.mig.choosing import Refusal
from stoker.agent.mig.in_the_way import GpuUsers
from stoker.agent.mig.keeping import Keeper
from stoker.agent.mig.operations import Book, GpuRecord
from stoker.agent.mig.steps import _Way
from stoker.agent.mig.turns import Turn
from stoker.agent.partitions import (
    CreateComputeInstance,
    GpuMigStatus,
    GpuPartitions,
    Step,
    Target,
)
from stoker.aggregator import leaving, upkeep, views
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.leaving import Tables
from stoker.aggregator.model import Claim, Gpu, NodeStatus
from stoker.aggregator.verdicts import GpuCordon
from stoker.aggregator.views import GpuView
from stoker.testing.faults import Faults
from stoker.testing.mig_agent import MigLife
from stoker.testing.network import NO_FAULTS
from stoker.testing.world import Scenario, SimulationFailed, World

SEEDS = range(3, 13)
SECONDS = 60.0

Patch = pytest.MonkeyPatch


def withheld_gpus_granted(patch: Patch) -> None:
    real = views.view_gpu

    def view_gpu(
        gpu: Gpu,
        claims: tuple[Claim, ...],
        held_for: Collection[str],
        status: NodeStatus,
        cordon: GpuCordon | None = None,
    ) -> GpuView:
        return real(gpu, claims, held_for, replace(status, mig=None), cordon)

    patch.setattr(views, "view_gpu", view_gpu)


def withheld_gpus_held(patch: Patch) -> None:
    def why_withheld(status: GpuMigStatus) -> str | None:
        return None

    patch.setattr(holding, "_why_withheld", why_withheld)


def users_overlooked(patch: Patch) -> None:
    def users_of(*args: Any) -> GpuUsers:
        return GpuUsers()

    patch.setattr(looking, "users_of", users_of)


def not_waited_for_the_evicted(patch: Patch) -> None:
    real = Turn._wait

    def wait(self: Turn, refusal: Refusal, target: Target, users: GpuUsers) -> None:
        leave_by = self._operation.leave_by
        if self._operation.evict and leave_by is not None and self._now >= leave_by:
            self._begin(target)
        else:
            real(self, refusal, target, users)

    patch.setattr(Turn, "_wait", wait)


def evicted_before_the_deadline(patch: Patch) -> None:
    real = leaving._held

    def held(
        fleet: Tables, node: str, mig: GpuMig, leave_by: float
    ) -> Iterator[tuple[float, str, str]]:
        yield from real(fleet, node, mig, leave_by - 60.0)

    patch.setattr(leaving, "_held", held)


def evicted_without_being_asked(patch: Patch) -> None:

    def evictions(fleet: Tables) -> Iterator[tuple[float, str, str]]:
        for name in fleet.leaving:
            for mig in (fleet.status(name).mig or {}).values():
                if mig.leave_by is not None:
                    yield from leaving._held(fleet, name, mig, mig.leave_by)

    patch.setattr(upkeep, "evictions", evictions)


def book_said_to_be_saved_before_it_is(patch: Patch) -> None:
    real = MigLife._save

    async def save(self: MigLife, book: Book) -> None:
        self._loop.create_task(real(self, book))

    patch.setattr(MigLife, "_save", save)


def operations_forgotten(patch: Patch) -> None:
    def knows(self: GpuRecord, operation_id: str) -> bool:
        return False

    patch.setattr(GpuRecord, "knows", knows)


def layout_before_not_noted(patch: Patch) -> None:
    def target_of(gpu: GpuPartitions) -> Target:
        return Target(gpu.is_enabled)

    patch.setattr("stoker.agent.mig.turns.target_of", target_of)


def compute_instances_forgotten(patch: Patch) -> None:
    real = _Way.created

    def created(self: _Way) -> tuple[Step, ...]:
        return tuple(each for each in real(self) if not isinstance(each, CreateComputeInstance))

    patch.setattr(_Way, "created", created)


def gone_back_without_reading(patch: Patch) -> None:
    def go_on_noted(self: Turn) -> None:
        self._step_on()

    patch.setattr(Turn, "_go_on_noted", go_on_noted)


def not_resumed(patch: Patch) -> None:
    def load(self: Keeper, book: Book) -> None:
        self._notes.book = book

    patch.setattr(Keeper, "_load", load)


@dataclass(frozen=True)
class Planted:
    plant: Callable[[Patch], None]
    breaks: frozenset[str]
    faults: Faults | None = None  # None: what the seed draws


def planted(plant: Callable[[Patch], None], *breaks: str, faults: Faults | None = None) -> Planted:
    return Planted(plant, frozenset(breaks), faults)


CALM = Faults.none()
SLOW_DISKS = replace(CALM, agent_disk_slow=1.0)
SLOW_NETWORK = replace(CALM, network=replace(NO_FAULTS, slow=0.3))
KILLED = replace(CALM, agent_killed=4.0, fatal_point=0.01)

BUGS = (
    planted(withheld_gpus_granted, "grants_fit_the_last_report", faults=CALM),
    planted(withheld_gpus_held, "nothing_new_is_held_on_a_withheld_gpu", faults=SLOW_NETWORK),
    planted(users_overlooked, "what_is_held_is_not_destroyed", faults=CALM),
    planted(not_waited_for_the_evicted, "what_is_held_is_not_destroyed", faults=CALM),
    planted(evicted_before_the_deadline, "leases_run_their_time", faults=CALM),
    planted(evicted_without_being_asked, "leases_run_their_time", faults=CALM),
    planted(book_said_to_be_saved_before_it_is, "what_is_done_was_noted", faults=SLOW_DISKS),
    planted(operations_forgotten, "no_operation_runs_twice", "a_final_word_is_true", faults=CALM),
    planted(layout_before_not_noted, "a_final_word_is_true", faults=CALM),
    planted(compute_instances_forgotten, "a_final_word_is_true", faults=CALM),
    planted(gone_back_without_reading, "a_final_word_is_true", faults=CALM),
    planted(not_resumed, "every_gpu_says_how_it_is", faults=KILLED),
)


def find(bug: Planted) -> tuple[int, SimulationFailed]:
    for seed in SEEDS:
        scenario = Scenario(seed, SECONDS, nodes=2, gpus=2, clients=8, faults=bug.faults, mig=True)
        try:
            World(scenario).run()
        except SimulationFailed as failure:
            return seed, failure
    pytest.fail(f"no seed of {SEEDS} found it")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_found(bug: Planted, monkeypatch: Patch) -> None:
    bug.plant(monkeypatch)
    seed, failure = find(bug)
    assert failure.invariant in bug.breaks, failure
    assert f"make simulate SEED={seed} " in str(failure)
