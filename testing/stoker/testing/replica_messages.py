"""What replicas and their callers are told when they are measured, and what the callers report."""

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """One replica of a service."""

    target: str  # host:port of the aggregator
    service: str
    seconds: float  # that a call takes
    slots: int  # calls at a time
    is_random: bool  # whether that is the mean of an exponential distribution
    seed: int


@dataclass(frozen=True, slots=True)
class CallsPlan:
    """Calls of a service; they arrive at random (a Poisson process), whatever the answers do."""

    target: str  # host:port of the aggregator
    service: str
    policy: str  # of POLICIES
    rate: float  # a second
    seed: int


class CallsReport(msgspec.Struct, frozen=True, tag=True):
    """What became of the calls that were due in the window."""

    calls: int
    errors: dict[str, int]  # by what went wrong
    by_address: dict[str, int]  # calls that each replica got
    call_micros: list[int]  # from when a call was due until its answer was read
    lag_micros: list[int]  # from when a call was due until it was begun
