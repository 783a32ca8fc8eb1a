"""Every layout of a board is made on the simulated driver from every other, and read again.

The plan is the product's own (`choosing`, `steps`), the calls are those of the root helper's
library, and the driver refuses what a real one refuses. Above 2,000 pairs they are sampled.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import pytest
from tests.support.mig_memory import a_user
from tests.support.simulated_nodes import World, node

from stoker.agent.mig.choosing import Refusal, choose
from stoker.agent.mig.comparing import is_as_wanted, layout_of, wanted_of_target
from stoker.agent.mig.in_the_way import NOBODY_THERE, GpuUsers
from stoker.agent.mig.library import Library
from stoker.agent.mig.steps import is_there, next_steps, obstacle
from stoker.agent.partitions import GpuPartitions, Target
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import Scenario, ScriptedProcess
from stoker.core.mig.boards import A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000, Board
from stoker.core.mig.geometry import Layout
from stoker.core.mig.layouts import describe, layouts, maximal_layouts

PAIRS_MAX = 2_000  # all of A30's and RTX PRO 6000's are fewer
FEW = 60  # of them are tried with every change
_FIRST_PID = 5_000_001


@dataclass(frozen=True)
class Pair:
    """From one layout to another while some instances of the first are in use."""

    before: Layout
    after: Layout
    busy: Layout


class Card:
    """A simulated GPU, partitioned as the root helper does it."""

    def __init__(self, board: Board) -> None:
        self.nvml: SimulatedNvml = node(World(), 1, board.name, is_root=True)
        self.library = Library(self.nvml)
        self.gpu = self._read()
        if not self.gpu.is_enabled:
            self.go_to(Target(True))

    def use(self, busy: Layout) -> GpuUsers:
        """Let a process run on each of these instances."""
        self.nvml.play(
            Scenario(
                processes=tuple(
                    ScriptedProcess(gpu=0, pid=_FIRST_PID + number, mig_start=placed.start)
                    for number, placed in enumerate(busy)
                )
            )
        )
        starts = {each.start for each in busy}
        ids = [each.id for each in self.gpu.instances if each.start in starts]
        assert len(ids) == len(busy)
        return GpuUsers({id_: (a_user(self.gpu, f"process of {id_}"),) for id_ in ids})

    def go_to(self, target: Target) -> None:
        """Do step after step, each from what the driver then tells."""
        assert obstacle(self.gpu, target) == ""
        for _ in next_steps(self.gpu, target):
            step, *_ = next_steps(self.gpu, target)
            self.library.do(self.gpu.uuid, step, self.gpu)
            self.gpu = self._read()
        assert is_there(self.gpu, target)

    def uuids(self, busy: Layout) -> list[str]:
        """Return the MIG devices in these instances."""
        starts = {each.start for each in busy}
        return [
            part.uuid
            for each in self.gpu.instances
            for part in each.compute_instances
            if each.start in starts
        ]

    def _read(self) -> GpuPartitions:
        (gpu,) = self.library.read_all().gpus
        return gpu


def pairs(board: Board, *, is_plain: bool = True) -> Iterator[Pair]:
    """Yield every pair, or a sample; 0, 1, ... n of the instances before are busy, in turn."""
    every = list(layouts(board.geometry, plain=is_plain))
    rng = Random(board.name)
    chosen: Sequence[tuple[Layout, Layout]] = list(product(every, every))
    if len(chosen) > PAIRS_MAX:
        chosen = rng.sample(chosen, PAIRS_MAX)
    for number, (before, after) in enumerate(chosen):
        busy = rng.sample(before, number % (len(before) + 1))
        yield Pair(before, after, tuple(sorted(busy)))


def check(board: Board, chosen: Sequence[Pair]) -> None:
    card = Card(board)
    alike: dict[tuple[str, ...], list[Layout]] = defaultdict(list)
    for layout in layouts(board.geometry, plain=False):
        alike[_devices(layout)].append(layout)
    for pair in chosen:
        card.nvml.play(Scenario())
        card.go_to(Target(True, pair.before))
        assert layout_of(card.gpu) == pair.before
        if not pair.busy:
            card.go_to(Target(True, pair.after))
            assert layout_of(card.gpu) == pair.after
            continue
        users, wanted = card.use(pair.busy), wanted_of_target(Target(True, pair.after))
        uuids = card.uuids(pair.busy)
        found = choose(card.gpu, wanted, users)
        if isinstance(found, Refusal):
            assert found.in_the_way
            assert not any(set(pair.busy) <= set(each) for each in alike[_devices(pair.after)])
            continue
        card.go_to(found)
        assert is_as_wanted(card.gpu, wanted), describe(layout_of(card.gpu))
        assert set(pair.busy) <= set(layout_of(card.gpu))
        assert card.uuids(pair.busy) == uuids


def _devices(layout: Layout) -> tuple[str, ...]:
    return tuple(sorted(each.profile for each in layout))


BOARDS = [A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000]


@pytest.mark.parametrize(
    ("board", "count"),
    [(A30_24GB, 5), (A100_40GB, 19), (H100_80GB, 19), (RTX_PRO_6000, 5)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_every_maximal_layout_is_made_as_published(board: Board, count: int) -> None:
    every = maximal_layouts(board.geometry)
    assert len(every) == count
    check(board, [Pair((), layout, ()) for layout in every])


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_some_layouts_from_others(board: Board) -> None:
    every = list(pairs(board))
    check(board, Random(f"few of {board.name}").sample(every, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_every_layout_from_every_other(board: Board, part: int) -> None:
    every = list(pairs(board))
    assert len(every) == min(len(list(layouts(board.geometry))) ** 2, PAIRS_MAX)
    check(board, every[part::4])


@pytest.mark.slow
@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_layouts_with_media_graphics_and_memory_variants(board: Board) -> None:
    every = list(pairs(board, is_plain=False))
    check(board, Random(f"variants of {board.name}").sample(every, 300))


def test_what_nobody_uses_has_no_users() -> None:
    card = Card(A30_24GB)
    assert card.use(()) == NOBODY_THERE
