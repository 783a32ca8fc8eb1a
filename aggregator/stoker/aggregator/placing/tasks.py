"""Usual requests as policies weigh them: what they take of each card, and how often they come."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of request; cards are those of the fleet, by number."""

    cpu_milli: int
    memory_bytes: int  # of the host
    gpus: int
    is_share: bool
    milli: tuple[int, ...]  # of one GPU, by card; 1000: whole. 0: it is too large for the card
    fits: tuple[bool, ...]  # by card: it may run there
    weight: float  # how often it comes, in any unit
