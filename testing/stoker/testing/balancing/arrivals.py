"""Replicas of services as they come: a few all the time, and many of one service at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_GIB = 2**30

# What a replica asks for of a GPU's memory, and what its service does to a GPU on the mean. They go
# together only loosely: a large model that few people ask is as common as a small one that many do.
_MEMORY_GIB = (4, 6, 8, 12, 16, 24)
_DEMANDS = (0.03, 0.06, 0.1, 0.15, 0.25)
# An instance starts, loads its model, and only then takes requests.
_START_SECONDS = (2.0, 20.0)
_USED = (0.5, 0.95)  # of the memory that it asked for
_LIFE_SECONDS = 300.0  # on the mean
_BURST_EVERY_SECONDS = 30.0  # on the mean
_BURST_SIZES = (0.5, 1.5)  # of the mean
_BURST_SECONDS = 3.0  # within which all of a burst come
_ALONE = 0.3  # of all replicas come alone

# Of what is asked for at a time, on the mean, as a part of the fleet's memory.
OFFERED = 0.6


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica: what it asks for, and what it then does, which nobody knows before."""

    number: int
    at: float  # when it is asked for, in seconds from the beginning
    memory_bytes: int
    memory_used_bytes: int  # once it has started
    demand: float  # of a GPU's compute, on the mean, once it has started
    start_seconds: float
    run_seconds: float  # from the grant to the release
    noise: int  # seed of how its demand swings


def make_replicas(
    seed: int, seconds: float, gpus: int, gpu_memory_bytes: int
) -> tuple[Replica, ...]:
    """Return the replicas that come within so many seconds, by time.

    Those of a longer time begin with those of a shorter one.
    """
    mean_bytes = sum(_MEMORY_GIB) / len(_MEMORY_GIB) * _GIB
    per_second = OFFERED * gpus * gpu_memory_bytes / mean_bytes / _LIFE_SECONDS
    wanted = [
        *_alone(Random(f"{seed} alone"), seconds, per_second * _ALONE),
        *_bursts(Random(f"{seed} bursts"), seconds, per_second * (1 - _ALONE)),
    ]
    wanted.sort()
    return tuple(
        _replica(Random(f"{seed} {number}"), number, at, gib, demand)
        for number, (at, gib, demand) in enumerate(wanted)
        if at < seconds
    )


_Wanted = tuple[float, int, float]  # when, GiB, demand


def _alone(random: Random, seconds: float, per_second: float) -> Iterator[_Wanted]:
    at = 0.0
    while (at := at + random.expovariate(per_second)) < seconds:
        yield at, random.choice(_MEMORY_GIB), random.choice(_DEMANDS)


def _bursts(random: Random, seconds: float, per_second: float) -> Iterator[_Wanted]:
    """Yield replicas of one service at a time; a larger fleet sees larger bursts."""
    mean_size = per_second * _BURST_EVERY_SECONDS
    at = 0.0
    while (at := at + random.expovariate(1 / _BURST_EVERY_SECONDS)) < seconds:
        gib, demand = random.choice(_MEMORY_GIB), random.choice(_DEMANDS)
        for _ in range(max(1, round(mean_size * random.uniform(*_BURST_SIZES)))):
            yield at + random.uniform(0.0, _BURST_SECONDS), gib, demand


def _replica(random: Random, number: int, at: float, gib: int, demand: float) -> Replica:
    return Replica(
        number,
        at,
        memory_bytes=gib * _GIB,
        memory_used_bytes=int(gib * _GIB * random.uniform(*_USED)),
        demand=demand * random.uniform(0.7, 1.3),
        start_seconds=random.uniform(*_START_SECONDS),
        run_seconds=random.expovariate(1 / _LIFE_SECONDS),
        noise=random.getrandbits(32),
    )
