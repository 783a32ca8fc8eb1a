"""What the page for Prometheus tells of services: operations, latencies, endpoints, weights.

Counters are of a service on a GPU, or on the set of GPUs that a replica has: they outlive the
endpoints that added to them, and there are at most `services.TOTALS_MAX` of them.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stoker.aggregator.services import ServicesPicture
from stoker.core.latencies import BOUNDS

_LABELS = ("service", "node", "gpu")


class ServiceCollector(Collector):
    """The metrics of services, from a picture that is taken with every scrape."""

    def __init__(self, take: Callable[[], ServicesPicture | None]) -> None:
        """`take` is called in the thread of the scrape; it gives None when the loop is stuck."""
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family."""
        picture = self._take()
        if picture is not None:
            yield from _done(picture)
            yield from _endpoints(picture)


def _done(picture: ServicesPicture) -> Iterator[Metric]:
    operations = CounterMetricFamily(
        "stoker_service_operations",
        "Operations that replicas of a service report to have ended, failed ones included.",
        labels=_LABELS,
    )
    errors = CounterMetricFamily(
        "stoker_service_errors", "Operations that have failed.", labels=_LABELS
    )
    seconds = HistogramMetricFamily(
        "stoker_service_operation_seconds",
        "What operations took that succeeded.",
        labels=_LABELS,
    )
    for labels, totals in picture.totals.items():
        operations.add_metric(labels, totals.operations)
        errors.add_metric(labels, totals.errors)
        seconds.add_metric(labels, _buckets(totals.latency_counts), totals.latency_sum_seconds)
    yield from (operations, errors, seconds)


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return what Prometheus calls buckets: each bound, and how many do not exceed it."""
    names = [*(str(bound) for bound in BOUNDS), "+Inf"]
    found: list[tuple[str, float]] = []
    total = 0
    for name, count in zip(names, counts, strict=True):
        total += count
        found.append((name, total))
    return found


def _endpoints(picture: ServicesPicture) -> Iterator[Metric]:
    count = GaugeMetricFamily(
        "stoker_service_endpoints",
        "Endpoints of a service by state: called, out (not to be called now).",
        labels=("service", "state"),
    )
    weights = GaugeMetricFamily(
        "stoker_service_endpoint_weight",
        "The endpoint's part of the service's calls, from 0 to 1.",
        labels=(*_LABELS, "address"),
    )
    for view in picture.services:
        called = sum(each.share.weight > 0 for each in view.endpoints)
        count.add_metric((view.service, "called"), called)
        count.add_metric((view.service, "out"), len(view.endpoints) - called)
        for each in view.endpoints:
            of = each.endpoint
            weights.add_metric((of.service, of.node, of.gpu, of.address), each.share.weight)
    yield from (count, weights)
