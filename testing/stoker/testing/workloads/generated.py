"""Workloads made by seed: what tasks ask for is drawn from what the openb trace is known to be made
of (its published sizes and how frequent they are), on a small fleet of the same kinds of nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from stoker.aggregator.model import COMPUTE_MILLI
from stoker.testing.workloads.tasks import Host, Task, Workload, gpus_milli

MIB = 2**20
# Tasks arrive at random (a Poisson process, so far apart on the mean) and run for times of an
# exponential distribution, so long that they ask for so much of the fleet's GPU time.
_ARRIVE_SECONDS_APART = 60.0
_ASKED_RATIO = 1.1


@dataclass(frozen=True, slots=True)
class _Hosts:
    """So many equal hosts of the small fleet."""

    count: int
    model: str
    gpus: int
    cpu_milli: int
    memory_mib: int


# The kinds of which openb has the most GPUs, about a twentieth of each.
_FLEET = (
    _Hosts(27, "G2", 8, 96_000, 393_216),
    _Hosts(2, "G3", 8, 128_000, 786_432),
    _Hosts(19, "T4", 2, 104_000, 524_288),
    _Hosts(1, "T4", 4, 96_000, 393_216),
    _Hosts(5, "P100", 2, 16_000, 122_880),
    _Hosts(1, "P100", 2, 64_000, 262_144),
    _Hosts(1, "V100M16", 4, 32_000, 131_072),
    _Hosts(1, "V100M32", 8, 96_000, 786_432),
)

# Share of one GPU, in thousandths -> how many tasks of openb ask for it.
_SHARES = {
    810: 1078,
    470: 750,
    320: 328,
    650: 253,
    230: 140,
    460: 128,
    590: 75,
    160: 74,
    550: 72,
    220: 62,
    370: 47,
    110: 24,
    480: 19,
    50: 7,
    330: 7,
    350: 6,
    270: 4,
    440: 2,
    140: 1,
    290: 1,
}


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a kind of task takes beside its share, and how many do."""

    count: int
    cpu_milli: int
    memory_mib: int


# GPUs -> how many tasks ask for so many whole ones.
_MULTIPLES = {2: 16, 4: 15, 8: 44}
# GPUs, and whether whole -> what a task takes beside them.
_DEMANDS: dict[tuple[int, bool], tuple[_Demand, ...]] = {
    (0, False): (
        _Demand(364, 12_500, 57_344),
        _Demand(284, 32_000, 49_152),
        _Demand(163, 8_000, 30_517),
        _Demand(120, 15_400, 51_200),
    ),
    (1, False): (
        _Demand(1122, 3_152, 5_600),
        _Demand(625, 11_908, 47_104),
        _Demand(486, 8_000, 30_517),
        _Demand(371, 4_000, 22_888),
        _Demand(152, 4_152, 10_600),
    ),
    (1, True): (
        _Demand(857, 11_300, 49_152),
        _Demand(534, 11_400, 48_128),
        _Demand(470, 3_152, 5_600),
        _Demand(255, 18_708, 64_512),
        _Demand(195, 9_810, 41_560),
        _Demand(108, 16_000, 32_768),
    ),
    (2, True): (_Demand(7, 16_200, 66_560), _Demand(3, 6_000, 65_536)),
    (4, True): (_Demand(9, 32_200, 132_096), _Demand(3, 32_000, 131_072)),
    (8, True): (_Demand(18, 88_000, 327_680), _Demand(18, 64_200, 263_168)),
}


@dataclass(frozen=True, slots=True)
class Kinds:
    """How many of a kind of task there are to the others of openb, and how many are constrained."""

    cpu_alone: int = 1088
    shares: int = 3078
    whole: int = 3911
    multiples: int = 75
    constrained_ratio: float = 0.0  # of the tasks with one GPU: they take one model alone


OPENB = Kinds()
# As the trace's variant in which all tasks with one GPU are shares, and the one in which many
# tasks name the model that they want.
SHARES_ALONE = Kinds(shares=7064, whole=0, multiples=0)
CONSTRAINED = Kinds(constrained_ratio=0.33)


def generate(rng: Random, kinds: Kinds = OPENB, fleets: int = 1, turns: float = 1.0) -> Workload:
    """Return a workload on so many times the small fleet, whose tasks would fill it so often."""
    hosts = tuple(
        Host(
            name=f"{each.model.lower()}-{each.gpus}-{each.cpu_milli // 1000}-{number:03}",
            model=each.model,
            gpus=each.gpus,
            cpu_milli=each.cpu_milli,
            memory_bytes=each.memory_mib * MIB,
        )
        for each in _FLEET
        for number in range(each.count * fleets)
    )
    limit = gpus_milli(hosts) * turns
    tasks: list[Task] = []
    asked, now = 0, 0.0
    while asked < limit:
        now += rng.expovariate(1 / _ARRIVE_SECONDS_APART)
        task = _draw(len(tasks), now, kinds, rng)
        asked += task.gpu_milli_total
        tasks.append(task)
    return Workload(hosts, tuple(_timed(tasks, gpus_milli(hosts) * now, rng)))


def _draw(number: int, at: float, kinds: Kinds, rng: Random) -> Task:
    counts = (kinds.cpu_alone, kinds.shares, kinds.whole, kinds.multiples)
    (kind,) = rng.choices(("cpu", "share", "whole", "multiple"), counts)
    match kind:
        case "cpu":
            gpus, milli = 0, 0
        case "share":
            gpus, milli = 1, _pick(_SHARES, rng)
        case "whole":
            gpus, milli = 1, COMPUTE_MILLI
        case _:
            gpus, milli = _pick(_MULTIPLES, rng), COMPUTE_MILLI
    demands = _DEMANDS[gpus, milli == COMPUTE_MILLI]
    (demand,) = rng.choices(demands, [each.count for each in demands])
    # Of the fleet's models, each as often as it has GPUs.
    (host,) = rng.choices(_FLEET, [each.count * each.gpus for each in _FLEET])
    is_constrained = gpus == 1 and rng.random() < kinds.constrained_ratio
    return Task(
        name=f"task-{number:05}",
        cpu_milli=demand.cpu_milli,
        memory_bytes=demand.memory_mib * MIB,
        gpus=gpus,
        gpu_milli=milli,
        models=(host.model,) if is_constrained else (),
        arrives_at=at,
    )


def _timed(tasks: list[Task], milli_seconds: float, rng: Random) -> Iterator[Task]:
    """Yield the tasks with how long they run, so that they ask for their part of the GPU time."""
    parts = [rng.expovariate(1) for _ in tasks]
    weighed = zip(tasks, parts, strict=True)
    asked = sum(task.gpu_milli_total * part for task, part in weighed)
    for task, part in zip(tasks, parts, strict=True):
        yield replace(task, runs_seconds=_ASKED_RATIO * milli_seconds * part / asked)


def _pick(counts: dict[int, int], rng: Random) -> int:
    (size,) = rng.choices(list(counts), list(counts.values()))
    return size
