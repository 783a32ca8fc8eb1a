"""The page for Prometheus: the fleet as it is at the moment of the scrape, and what was counted.

A scrape runs in a thread of its own. It asks the event loop for a picture, which is made of values
that never change and is quickly taken, and turns it into text while the loop goes on. A GPU's value
that is not there is left out: a reading that failed, a fact that the card does not tell, a sample
older than three intervals.
"""

import asyncio
import concurrent.futures
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stoker.aggregator.fleet import INTERVALS_FRESH
from stoker.aggregator.health_metrics import health_metrics
from stoker.aggregator.meters import Meters
from stoker.aggregator.mig_metrics import mig_metrics
from stoker.aggregator.model import AllocationState, DriverState, GpuSample
from stoker.aggregator.picture import Picture
from stoker.aggregator.views import GpuView
from stoker.aggregator.wire_fleet import fresh_sample, node_state
from stoker.core.addresses import Address
from stoker.core.errors import InUse
from stoker.v1 import fleet_pb2

T = TypeVar("T")

# A loop that does not hand out a picture so long is stuck; then the fleet is left out of the page.
PICTURE_SECONDS = 5.0

_GPU_LABELS = ("node", "gpu", "uuid", "model")
_GPU_STATES: tuple[str, ...] = ("free", "allocated", "shared", "foreign", "unavailable")
_NODE_STATES = {
    fleet_pb2.NODE_STATE_READY: "ready",
    fleet_pb2.NODE_STATE_STALE: "stale",
    fleet_pb2.NODE_STATE_DISCONNECTED: "disconnected",
}
_DRIVER_STATES = ", ".join(DriverState)
_GAUGES: Mapping[str, tuple[str, Callable[[GpuSample], float | None]]] = {
    "memory_used_bytes": (
        "Memory in use, without what the driver keeps for itself.",
        lambda sample: sample.memory_used_bytes,
    ),
    "utilization_ratio": (
        "Share of time in which a kernel ran.",
        lambda sample: sample.utilization_ratio,
    ),
    "temperature_celsius": (
        "Temperature of the GPU core.",
        lambda sample: sample.temperature_celsius,
    ),
    "power_watts": ("Power drawn by the board.", lambda sample: sample.power_watts),
}

_log = logging.getLogger(__name__)


class Exporter:
    """The page under `/metrics`, served by threads of its own."""

    def __init__(
        self,
        address: Address,
        take: Callable[[], Picture],
        meters: Meters,
        version: str,
    ) -> None:
        """Listen; `take` is called in the event loop. Raises InUse when the port is taken or the
        address is not ours.
        """
        collector = FleetCollector(in_the_loop(take), version)
        meters.registry.register(collector)
        try:
            self._server, self._thread = start_http_server(
                address.port, address.host, meters.registry
            )
        except OSError as error:
            raise InUse(f"metrics.listen: {address}: {error.strerror}") from error
        self.address = Address(address.host, self._server.server_port)

    def close(self) -> None:
        """Stop listening; scrapes under way are left to end."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class FleetCollector(Collector):
    """The metrics of the fleet, from a picture that is taken with every scrape."""

    def __init__(self, take: Callable[[], Picture | None], version: str) -> None:
        """`take` is called in the thread of the scrape; it gives None when the loop is stuck."""
        self._take = take
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        build = GaugeMetricFamily(
            "stoker_build_info",
            "Always 1; the labels tell the part and its version.",
            labels=("part", "version"),
        )
        build.add_metric(("aggregator", self._version), 1)
        yield build
        picture = self._take()
        if picture is not None:
            yield from _node_metrics(picture)
            yield from _gpu_metrics(picture)
            yield from health_metrics(picture)
            yield from mig_metrics(picture)
            yield from _allocation_metrics(picture)


def in_the_loop(take: Callable[[], T]) -> Callable[[], T | None]:
    """Return a function for other threads that has `take` called in this event loop.

    It gives None when the loop is stuck.
    """
    loop = asyncio.get_running_loop()

    async def taken() -> T:
        return take()

    def ask() -> T | None:
        picture = asyncio.run_coroutine_threadsafe(taken(), loop)
        try:
            return picture.result(PICTURE_SECONDS)
        except concurrent.futures.TimeoutError:
            picture.cancel()
            _log.warning("the loop gave no picture within %g s", PICTURE_SECONDS)
            return None

    return ask


def _node_metrics(picture: Picture) -> Iterator[Metric]:
    count = dict.fromkeys(_NODE_STATES.values(), 0)
    up = GaugeMetricFamily(
        "stoker_node_up", "Whether the node's agent has a stream.", labels=("node",)
    )
    ready = GaugeMetricFamily(
        "stoker_node_ready", "Whether the node's samples are fresh.", labels=("node",)
    )
    cordoned = GaugeMetricFamily(
        "stoker_node_cordoned", "Whether the node takes nothing new.", labels=("node",)
    )
    driver = GaugeMetricFamily(
        "stoker_node_driver_state",
        f"Always 1; the label tells what a connected node says of its driver: {_DRIVER_STATES}.",
        labels=("node", "state"),
    )
    for name, node in picture.nodes.items():
        state = _state_of(picture, name)
        count[_NODE_STATES[state]] += 1
        up.add_metric((name,), node.connected)
        ready.add_metric((name,), state == fleet_pb2.NODE_STATE_READY)
        cordoned.add_metric((name,), node.node.cordoned is not None)
        if node.connected:
            driver.add_metric((name, node.driver), 1)
    states = GaugeMetricFamily("stoker_fleet_nodes", "Nodes by state.", labels=("state",))
    for state_name, number in count.items():
        states.add_metric((state_name,), number)
    yield from (states, up, ready, cordoned, driver)


def _gpu_metrics(picture: Picture) -> Iterator[Metric]:
    count = dict.fromkeys(_GPU_STATES, 0)
    total = _gpu_gauge("memory_total_bytes", "All memory of the GPU.")
    gauges = {fact: _gpu_gauge(fact, text) for fact, (text, _) in _GAUGES.items()}
    missing = GaugeMetricFamily(
        "stoker_fleet_gpus_missing",
        "GPUs that the driver of a node counts and that cannot be read, by kind of error.",
        labels=("node", "error_kind"),
    )
    for name, node in picture.nodes.items():
        is_ready = _state_of(picture, name) == fleet_pb2.NODE_STATE_READY
        status = picture.statuses.get(name)
        samples = (status.samples if status else None) or {}
        oldest = picture.now - INTERVALS_FRESH * node.node.facts.interval_seconds
        for gpu in node.gpus:
            is_open = is_ready and node.node.cordoned is None
            count[_gpu_state(gpu, is_open=is_open)] += 1
            if gpu.missing is not None:
                continue
            facts = gpu.gpu
            labels = (name, str(facts.index), facts.uuid, facts.model)
            total.add_metric(labels, facts.memory_total_bytes)
            sample = fresh_sample(samples.get(facts.uuid), oldest)
            if sample is None:
                continue
            for fact, (_, read) in _GAUGES.items():
                value = read(sample)
                if value is not None:
                    gauges[fact].add_metric(labels, value)
        for error_kind, number in Counter(each.error_kind for each in node.missing).items():
            missing.add_metric((name, error_kind), number)
    states = GaugeMetricFamily(
        "stoker_fleet_gpus",
        "GPUs by state: free, allocated (whole), shared, foreign (used by others, or handed out by "
        "them), unavailable (not read, out of use, not fresh, cordoned, or withheld).",
        labels=("state",),
    )
    for state, number in count.items():
        states.add_metric((state,), number)
    yield from (states, missing, total, *gauges.values())


def _allocation_metrics(picture: Picture) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "stoker_allocations",
        "Allocations by state; of those that ended, the ones still remembered.",
        labels=("state",),
    )
    for state in AllocationState:
        states.add_metric((state,), picture.allocations.get(state, 0))
    yield states
    yield GaugeMetricFamily(
        "stoker_queue_length",
        "Requests that wait for a grant.",
        value=picture.allocations.get(AllocationState.WAITING, 0),
    )
    yield GaugeMetricFamily(
        "stoker_ledger_version",
        "The resource version: the number of the newest durable event.",
        value=picture.version,
    )


def _state_of(picture: Picture, name: str) -> "fleet_pb2.NodeState.ValueType":
    status = picture.statuses.get(name)
    if status is None:
        return fleet_pb2.NODE_STATE_DISCONNECTED
    return node_state(status, picture.fresh_until.get(name), picture.now)[0]


def _gpu_state(gpu: GpuView, *, is_open: bool) -> str:
    if gpu.claims:
        return "allocated" if gpu.claims[0].memory_bytes is None else "shared"
    if gpu.foreign or gpu.assigned:
        return "foreign"
    return "free" if gpu.is_free and is_open else "unavailable"


def _gpu_gauge(fact: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stoker_fleet_gpu_{fact}", text, labels=_GPU_LABELS)
