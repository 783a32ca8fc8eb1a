"""What a scrape shows, as it stands at one moment, and how long each part of it may be told."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stoker.agent.driver_host.states import HostCounters
from stoker.agent.model import CollectorStatus, NodeView, ProcessTable
from stoker.agent.readings import GpuIdentity
from stoker.agent.telemetry import GpuTelemetry

# A value is told for so many intervals after it was read.
INTERVALS_FRESH = 3.0
DURATION_SECONDS_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Durations:
    """How long something took, in the buckets of a histogram (seconds)."""

    counts: tuple[int, ...] = (0,) * (len(DURATION_SECONDS_BOUNDS) + 1)
    sum_seconds: float = 0.0

    def with_one(self, seconds: float) -> "Durations":
        """Return the durations with one more."""
        place = bisect_left(DURATION_SECONDS_BOUNDS, seconds)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return replace(self, counts=counts, sum_seconds=self.sum_seconds + seconds)

    def cumulative(self) -> list[tuple[float, int]]:
        """Return (upper bound, how many were no longer) for every bound."""
        return [
            (bound, sum(self.counts[: i + 1])) for i, bound in enumerate(DURATION_SECONDS_BOUNDS)
        ]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape shows; made at the moment of the scrape."""

    view: NodeView
    monotonic_seconds: float
    host: HostCounters
    sample_durations: Durations
    processes_interval_seconds: float
    # How the newest run of each of the agent's readers went, by the reader's name.
    collectors: Mapping[str, CollectorStatus] = field(default_factory=dict[str, CollectorStatus])
    host_pid: int | None = None  # of the driver host; None: there is none
    # Monotonic; None: no killed driver host is held by the kernel.
    host_unreaped_since: float | None = None

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs of the node, read or not."""
        inventory = self.view.inventory
        return () if inventory is None else tuple(gpu.identity for gpu in inventory.gpus)

    @property
    def telemetry(self) -> Mapping[str, GpuTelemetry]:
        """What may be told of the GPUs, by UUID."""
        interval = self.view.identity.interval_seconds
        if self._is_fresh(self.view.last_success_monotonic_seconds, interval):
            return {each.uuid: each for each in self.view.telemetry}
        return {}

    @property
    def processes(self) -> ProcessTable | None:
        """The processes, if they may be told."""
        since = self.view.processes_monotonic_seconds
        is_fresh = self._is_fresh(since, self.processes_interval_seconds)
        return self.view.processes if is_fresh else None

    def _is_fresh(self, since: float | None, interval: float) -> bool:
        return since is not None and self.monotonic_seconds - since <= INTERVALS_FRESH * interval
