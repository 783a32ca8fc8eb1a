"""The page for Prometheus: what the node last read, never older than it may be, and the agent.

A GPU's value that is not there is left out: a reading that failed, a fact that the card does not
tell, a sample older than three intervals. Only the agent's own series go on through a failure.
"""

import errno
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stoker.agent.driver_link import HostCounters
from stoker.agent.model import DriverState, NodeView, ProcessTable
from stoker.agent.readings import GpuIdentity, GpuSample
from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

# A value is told for so many intervals after it was read.
INTERVALS_FRESH = 3.0
DURATION_SECONDS_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_GPU_LABELS = ("node", "gpu", "uuid", "model")
_Labels = Mapping[str, tuple[str, ...]]  # by UUID
_GAUGES: tuple[tuple[str, str], ...] = (
    ("memory_used_bytes", "Memory in use, without what the driver keeps for itself."),
    ("memory_free_bytes", "Memory not in use."),
    ("memory_reserved_bytes", "Memory that the driver keeps for itself."),
    ("utilization_ratio", "Share of time in which a kernel ran."),
    ("memory_utilization_ratio", "Share of time in which memory was accessed."),
    ("temperature_celsius", "Temperature of the GPU core."),
    ("power_watts", "Power drawn by the board."),
    ("sm_clock_hertz", "Clock of the SMs."),
    ("memory_clock_hertz", "Clock of the memory."),
)


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

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, how many were no longer) as Prometheus wants it."""
        bounds = [*(f"{bound:g}" for bound in DURATION_SECONDS_BOUNDS), "+Inf"]
        return [(bound, sum(self.counts[: i + 1])) for i, bound in enumerate(bounds)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape shows; made at the moment of the scrape."""

    view: NodeView
    monotonic_seconds: float
    host: HostCounters
    sample_durations: Durations
    processes_interval_seconds: float

    @property
    def samples(self) -> dict[str, GpuSample]:
        """The samples that may be told, by UUID."""
        interval = self.view.identity.interval_seconds
        if self._is_fresh(self.view.last_success_monotonic_seconds, interval):
            return {sample.uuid: sample for sample in self.view.samples}
        return {}

    @property
    def processes(self) -> ProcessTable | None:
        """The processes, if they may be told."""
        since = self.view.processes_monotonic_seconds
        is_fresh = self._is_fresh(since, self.processes_interval_seconds)
        return self.view.processes if is_fresh else None

    def _is_fresh(self, since: float | None, interval: float) -> bool:
        return since is not None and self.monotonic_seconds - since <= INTERVALS_FRESH * interval


class NodeCollector(Collector):
    """The metrics of a node, taken from a snapshot with every scrape."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        """`take` is called in the thread of the scrape."""
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        snapshot = self._take()
        yield from _gpu_metrics(snapshot)
        yield from _agent_metrics(snapshot)


class MetricsServer:
    """The page under `/metrics`, served by threads of its own."""

    def __init__(self, address: Address, take: Callable[[], Snapshot]) -> None:
        """Listen; raises InUse when the port is taken, BadInput when the address is not ours."""
        registry = CollectorRegistry()
        registry.register(NodeCollector(take))
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except OSError as error:
            kind = InUse if error.errno == errno.EADDRINUSE else BadInput
            raise kind(f"metrics.listen: {address}: {error.strerror}") from error
        self.address = Address(address.host, self._server.server_port)

    def close(self) -> None:
        """Stop listening; scrapes under way are left to end."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _gpu_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    view, samples = snapshot.view, snapshot.samples
    gpus = () if view.inventory is None else tuple(gpu.identity for gpu in view.inventory.gpus)
    labels = {g.uuid: (view.identity.node, str(g.index), g.uuid, g.model) for g in gpus}
    total = _gpu_gauge("memory_total_bytes", "All memory of the GPU.")
    for gpu in gpus:
        total.add_metric(labels[gpu.uuid], gpu.memory_total_bytes)
    yield total
    for fact, doc in _GAUGES:
        family = _gpu_gauge(fact, doc)
        for uuid, sample in samples.items():
            value: float | None = getattr(sample, fact)
            if uuid in labels and value is not None:
                family.add_metric(labels[uuid], value)
        yield family
    energy = CounterMetricFamily(
        "stoker_gpu_energy_joules", "Energy since the driver was loaded.", labels=_GPU_LABELS
    )
    for uuid, sample in samples.items():
        if uuid in labels and sample.energy_joules_total is not None:
            energy.add_metric(labels[uuid], sample.energy_joules_total)
    yield energy
    yield from _allocation_metrics(view, gpus, labels)
    if snapshot.processes is not None:
        yield from _process_metrics(snapshot.processes, gpus, labels)


def _allocation_metrics(
    view: NodeView, gpus: tuple[GpuIdentity, ...], labels: _Labels
) -> Iterator[Metric]:
    count = _gpu_gauge("allocations", "Allocations that hold the GPU or a share of it.")
    size = _gpu_gauge("allocated_memory_bytes", "Memory of the GPU that is granted to somebody.")
    for gpu in gpus:
        held = [each for each in view.held if gpu.uuid in each.gpu_uuids]
        count.add_metric(labels[gpu.uuid], len(held))
        shares = (each.memory_bytes or gpu.memory_total_bytes for each in held)
        size.add_metric(labels[gpu.uuid], sum(shares))
    yield count
    yield size


def _process_metrics(
    table: ProcessTable, gpus: tuple[GpuIdentity, ...], labels: _Labels
) -> Iterator[Metric]:
    every = _gpu_gauge("processes", "Processes with a context on the GPU.")
    foreign = _gpu_gauge("foreign_processes", "Those of them that belong to no allocation.")
    for gpu in gpus:
        if gpu.uuid not in table.unread_gpu_uuids:
            users = [each for each in table.processes if each.process.gpu_uuid == gpu.uuid]
            every.add_metric(labels[gpu.uuid], len(users))
            foreign.add_metric(labels[gpu.uuid], sum(not each.allocation_id for each in users))
    yield every
    yield foreign


def _agent_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    view, host = snapshot.view, snapshot.host
    build = GaugeMetricFamily(
        "stoker_agent_build_info", "Always 1; the label tells the version.", labels=["version"]
    )
    build.add_metric([view.identity.agent_version], 1)
    yield build
    yield _gauge("simulated", "Whether the GPUs are simulated.", view.identity.simulated)
    yield _gauge("connected", "Whether the aggregator has welcomed this agent.", view.connected)
    yield _gauge("outbox_frames", "Frames that are not acknowledged yet.", view.outbox_frames)
    yield _counter("frames_dropped", "Frames that the full outbox dropped.", view.frames_dropped)
    yield _counter("samples", "Sampling ticks that were answered.", view.samples_total)
    failures = CounterMetricFamily(
        "stoker_agent_sample_failures", "Sampling ticks without an answer.", labels=["reason"]
    )
    for kind, number in sorted(view.sample_failures.items()):
        failures.add_metric([kind], number)
    yield failures
    durations = snapshot.sample_durations
    yield HistogramMetricFamily(
        "stoker_agent_sample_duration_seconds",
        "Time that the driver took to answer a sampling tick.",
        buckets=durations.cumulative(),
        sum_value=durations.sum_seconds,
    )
    if view.last_success_at is not None:
        yield _gauge(
            "last_success_timestamp_seconds",
            "When a sampling tick was last answered.",
            view.last_success_at,
        )
    state = GaugeMetricFamily(
        "stoker_agent_driver_state", "1 for the state that the driver is in.", labels=["state"]
    )
    for each in DriverState:
        state.add_metric([each], each is view.driver.state)
    yield state
    yield _counter("driver_host_restarts", "Driver hosts replaced.", host.restarts_total)
    yield _counter("driver_host_timeouts", "Questions not answered in time.", host.timeouts_total)
    yield _counter("driver_host_kills", "Driver hosts that had to be killed.", host.kills_total)


def _gpu_gauge(fact: str, doc: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stoker_gpu_{fact}", doc, labels=_GPU_LABELS)


def _gauge(name: str, doc: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stoker_agent_{name}", doc, value=value)


def _counter(name: str, doc: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"stoker_agent_{name}", doc, value=value)
