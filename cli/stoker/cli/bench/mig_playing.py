"""One run of `stoker bench mig`: instances come and go on GPUs of seven slices, one a tick.

Each asks for a profile of the mix and stays for a time that is uniform up to twice the mean, which
is such that the memory slices asked for at any time are `load` of those there are. What finds no
place is lost; nobody waits. Figures are of what comes after a warm-up of four mean stays.
"""

import time
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Final

import msgspec

from stoker.aggregator.placing.mig_moves import LayoutPool, MoveBudget, Spot, slices_moved
from stoker.aggregator.placing.mig_slices import SlicePolicy, pool_of, table_of
from stoker.core.mig.boards import A100_40GB
from stoker.testing.workloads import mig_repack
from stoker.testing.workloads.mig_repack import SEVEN_SLICE_SHAPES

BOARD: Final = A100_40GB
# In the order of SEVEN_SLICE_SHAPES.
PROFILES = ("1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb")
# How often each of PROFILES is asked for.
MIXES: Final = {
    "uniform": (1, 1, 1, 1, 1, 1),
    "skew-small": (6, 5, 4, 3, 2, 1),
    "skew-big": (1, 2, 3, 4, 5, 6),
    "bimodal": (5, 4, 1, 1, 4, 5),
}
REPACK = "repack"
_SIZES = tuple(shape.size for shape in SEVEN_SLICE_SHAPES)
_SLICES = BOARD.geometry.memory_slices
_WARM_UP_STAYS = 4


class Run(msgspec.Struct, frozen=True):
    """What to play."""

    policy: str  # of SlicePolicy, or REPACK
    mix: str
    load: float
    seed: int
    gpus: int
    requests: int
    moves: bool = False  # who fits nowhere may have others moved


class Outcome(msgspec.Struct, frozen=True):
    """What came of it, after the warm-up; shares in per cent."""

    run: Run
    requests_accepted: float  # of the requests
    slices_accepted: float  # of the memory slices asked for
    requests_with_moves: float  # of the requests, that had others moved
    moves: int
    slices_moved: int
    decisions_per_second: float  # of one core's time, with what they and departures change


@dataclass(frozen=True, slots=True)
class _Course:
    """Who comes, and for how long."""

    shapes: tuple[int, ...]  # in the order of SEVEN_SLICE_SHAPES
    stays: tuple[int, ...]  # ticks
    warm_up: int  # so many of them come before what counts
    stay_max: int


@dataclass(slots=True)
class _Tally:
    requests: int = 0
    slices: int = 0
    with_moves: int = 0
    moves: int = 0
    slices_moved: int = 0


def play(run: Run) -> Outcome:
    """Play it; the same run comes out the same, save for the time that it takes."""
    course = _course(run)
    began = time.process_time()
    if run.policy == REPACK:
        tally = _repack(run, course)
    elif run.moves:
        tally = _play_with_moves(run, course)
    else:
        tally = _play(run, course)
    took = time.process_time() - began
    asked = sum(_SIZES[shape] for shape in course.shapes[course.warm_up :])
    return Outcome(
        run=run,
        requests_accepted=100 * tally.requests / run.requests,
        slices_accepted=100 * tally.slices / asked,
        requests_with_moves=100 * tally.with_moves / run.requests,
        moves=tally.moves,
        slices_moved=tally.slices_moved,
        decisions_per_second=len(course.shapes) / max(took, 1e-9),
    )


def _course(run: Run) -> _Course:
    weights = MIXES[run.mix]
    mean = sum(w * size for w, size in zip(weights, _SIZES, strict=True)) / sum(weights)
    stay = run.load * run.gpus * _SLICES / mean
    warm_up, stay_max = int(_WARM_UP_STAYS * stay), max(1, round(2 * stay - 1))
    number = warm_up + run.requests
    rng = Random(run.seed)
    shapes = rng.choices(range(len(weights)), weights, k=number)
    stays = [rng.randint(1, stay_max) for _ in range(number)]
    return _Course(tuple(shapes), tuple(stays), warm_up, stay_max)


def _play(run: Run, course: _Course) -> _Tally:
    """Play a policy that moves nobody."""
    table = table_of(BOARD.geometry, SlicePolicy(run.policy), _mix(run))
    pool = pool_of(table, [0] * run.gpus)
    shapes = [table.shape_of[profile] for profile in PROFILES]
    taken_by = [{start: shape.mask(start) for start in shape.starts} for shape in table.shapes]
    # By tick, round and round: who leaves then, as GPU and mask.
    leaving: list[list[tuple[int, int]]] = [[] for _ in range(course.stay_max + 1)]
    tally = _Tally()
    find, change, masks = pool.find, pool.change, pool.masks
    for tick, kind, stay in zip(count(), course.shapes, course.stays, strict=False):
        now = tick % len(leaving)
        for gpu, taken in leaving[now]:
            change(gpu, masks[gpu] & ~taken)
        leaving[now] = []
        shape = shapes[kind]
        found = find(shape)
        if found is None:
            continue
        gpu, start = found
        taken = taken_by[shape][start]
        change(gpu, masks[gpu] | taken)
        leaving[(tick + stay) % len(leaving)].append((gpu, taken))
        if tick >= course.warm_up:
            tally.requests += 1
            tally.slices += _SIZES[kind]
    return tally


def _play_with_moves(run: Run, course: _Course) -> _Tally:
    """Play a policy that moves others for who fits nowhere, within the budget."""
    table = table_of(BOARD.geometry, SlicePolicy(run.policy), _mix(run))
    pool = LayoutPool(table, run.gpus)
    shapes = [table.shape_of[profile] for profile in PROFILES]
    leaving: list[list[int]] = [[] for _ in range(course.stay_max + 1)]
    spots: dict[int, Spot] = {}  # by the tick at which its instance came
    tenants: dict[Spot, int] = {}
    tally, budget = _Tally(), MoveBudget()
    for tick, kind, stay in zip(count(), course.shapes, course.stays, strict=False):
        if tick == course.warm_up:
            budget = MoveBudget()  # nothing is left from before of what counts
        now = tick % len(leaving)
        for tenant in leaving[now]:
            spot = spots.pop(tenant)
            del tenants[spot]
            pool.take(spot)
        leaving[now] = []
        budget.count_request()
        found = pool.find(shapes[kind])
        if found is not None:
            pool.put(found)
        elif budget.allows(_SIZES[kind], _SLICES):
            room = pool.make_room(shapes[kind])
            if room is not None:
                budget.take()
                for move in room.moves:
                    tenant = tenants.pop(move.origin)
                    tenants[move.goal] = tenant
                    spots[tenant] = move.goal
                pool.carry_out(room)
                found = room.spot
                if tick >= course.warm_up:
                    tally.with_moves += 1
                    tally.moves += len(room.moves)
                    tally.slices_moved += slices_moved(table, room.moves)
        if found is None:
            continue
        spots[tick], tenants[found] = found, tick
        leaving[(tick + stay) % len(leaving)].append(tick)
        if tick >= course.warm_up:
            tally.requests += 1
            tally.slices += _SIZES[kind]
    return tally


def _repack(run: Run, course: _Course) -> _Tally:
    """Play unlimited free migration: whoever fits if all are placed anew is accepted."""
    leaving: list[list[int]] = [[] for _ in range(course.stay_max + 1)]
    there = [0] * len(_SIZES)
    tally = _Tally()
    for tick, kind, stay in zip(count(), course.shapes, course.stays, strict=False):
        now = tick % len(leaving)
        for gone in leaving[now]:
            there[gone] -= 1
        leaving[now] = []
        there[kind] += 1
        if not mig_repack.fits(run.gpus, there):
            there[kind] -= 1
            continue
        leaving[(tick + stay) % len(leaving)].append(kind)
        if tick >= course.warm_up:
            tally.requests += 1
            tally.slices += _SIZES[kind]
    return tally


def _mix(run: Run) -> tuple[tuple[str, float], ...]:
    return tuple(zip(PROFILES, map(float, MIXES[run.mix]), strict=True))
