"""What a process that plays workloads is told, and what it reports: values of `testing.load`."""

import msgspec


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """The workload of two CSV files."""

    nodes: str  # path
    tasks: str


class Generated(msgspec.Struct, frozen=True, tag=True):
    """The workload made by the seed of each run."""


class PlacementPlan(msgspec.Struct, frozen=True):
    """What a process plays, until it has nothing more to play."""

    workload: Recorded | Generated
    copies: int = 1  # so many times as large
    turns: float = 1.0  # how often the tasks that are made would fill the fleet
    is_learning: bool = False  # policies learn the mix from what arrives; else it is given to them
    compiled: str | None = None  # folder where the compiled loops are kept; None: interpreted


class Play(msgspec.Struct, frozen=True, tag=True):
    """Play once: that policy, that seed."""

    policy: str
    seed: int
    is_timed: bool = False


class FindBound(msgspec.Struct, frozen=True, tag=True):
    """Find what no policy can exceed on the arrivals of that seed."""

    seed: int


class PublishedRun(msgspec.Struct, frozen=True, tag=True):
    """One run by the published protocol; shares in per cent of the fleet's GPUs."""

    policy: str
    seed: int
    allocated: dict[int, float]  # by how much has arrived, in per cent
    first_loss_at: float | None  # arrived when the first task was lost; None: none was
    arrivals: int
    lost: int
    decision_seconds: float  # CPU time of all decisions
    decision_p99_seconds: float


class TimedRun(msgspec.Struct, frozen=True, tag=True):
    """One run by recorded times; shares in per cent of the fleet's GPUs."""

    policy: str
    seed: int
    allocated_mean: float  # over time, from the first arrival to the last
    allocated_peak: float
    offered_mean: float  # what the tasks would have had, had all got a place
    refused: float  # of the tasks, in per cent
    refused_gpu_time: float  # of the GPU time that they asked for, in per cent
    arrivals: int
    decision_seconds: float
    decision_p99_seconds: float


class Bound(msgspec.Struct, frozen=True, tag=True):
    """What no policy can exceed on the arrivals of a seed; in per cent of the fleet's GPUs."""

    seed: int
    allocated_at_100: float
    allocated_at_130: float
    no_loss_at: float  # the most that can have arrived without a loss


Instruction = Play | FindBound
