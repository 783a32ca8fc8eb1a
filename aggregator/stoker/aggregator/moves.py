"""Moves as values: which allocation goes where, why, what it costs and what it gains."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from stoker.aggregator.model import Placement
from stoker.aggregator.relocating import Off
from stoker.aggregator.usable import GPU_MILLI, Kind

MOVES_DEFAULT = 10
MOVES_MAX = 1_000
ANSWER_SECONDS_DEFAULT = 60.0
ANSWER_SECONDS_MAX = 86_400.0


@dataclass(frozen=True, slots=True)
class RebalanceOptions:
    """When the fleet rebalances by itself, and how far; otherwise it does when it is asked to."""

    every_seconds: float = 0.0  # 0: never
    moves_max: int = MOVES_DEFAULT
    answer_seconds: float = ANSWER_SECONDS_DEFAULT


class MoveKind(StrEnum):
    """What a move is good for."""

    DEFRAGMENT = "defragment"
    RELIEVE = "relieve"


@dataclass(frozen=True, slots=True)
class MovePolicy:
    """What a move must be worth, and when a GPU is hot; milli are thousandths of a GPU."""

    defragment_gain_min: float = 1.25  # times the cost
    # Less than 1: the load that leaves a GPU is seldom more than the share that carries it.
    relieve_gain_min: float = 0.5  # times the cost
    hot_milli: int = 900  # of utilisation or of memory in use
    cool_milli: int = 700  # where a move goes stays below
    imbalance_min_milli: int = 300  # between a hot GPU and the one that relieves it


@dataclass(frozen=True, slots=True)
class Move:
    """One allocation from one place to another."""

    allocation_id: str
    from_placements: tuple[Placement, ...]
    to_placements: tuple[Placement, ...]
    kind: MoveKind
    reason: str  # one sentence with its numbers
    cost_milli: int
    gain_milli: int
    loss_milli: float  # of usable capacity where it goes, in the gain already
    off: Off  # what is to become free, so that it is no use to go there instead
    goal: str = ""  # the waiting allocation that it makes room for; empty: none


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Moves in the order in which they hold."""

    moves: tuple[Move, ...]
    summary: str
    kinds: tuple[Kind, ...] = ()  # of request, by which gains were measured


def worth(milli: int) -> str:
    """Return so many thousandths of a GPU for a sentence: `3.5 GPUs' worth`."""
    return f"{milli / GPU_MILLI:.4g} GPUs' worth"


def gain_min_of(kind: MoveKind, policy: MovePolicy) -> float:
    """Return how many times its cost a move of that kind must gain."""
    match kind:
        case MoveKind.DEFRAGMENT:
            return policy.defragment_gain_min
        case MoveKind.RELIEVE:
            return policy.relieve_gain_min
        case _:
            assert_never(kind)
