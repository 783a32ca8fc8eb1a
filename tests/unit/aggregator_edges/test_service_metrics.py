"""What the page for Prometheus tells of services."""

from prometheus_client import CollectorRegistry, generate_latest
from tests.conftest import Golden

from stoker.aggregator.service_metrics import ServiceCollector
from stoker.aggregator.services import (
    Endpoint,
    EndpointLeft,
    EndpointRegistered,
    Services,
    ServicesPicture,
    Sign,
    SignGiven,
)
from stoker.aggregator.standings import Standing
from stoker.core.latencies import BUCKETS, bucket_of

NOW = 1_000.0


def make_services() -> Services:
    """Two replicas of tok, one of them out; one of embed; one of tok that has left."""
    services = Services(NOW)
    for number, (service, node, gpu) in enumerate(
        (("tok", "n1", "0"), ("tok", "n2", "0,1"), ("embed", "n1", "3"), ("tok", "n3", "7"))
    ):
        endpoint = Endpoint(
            *(f"e{number}", service, f"10.0.0.{number}:9000", f"a-{number}", node, ()),
            *(gpu, None, NOW),
        )
        services.handle(EndpointRegistered(NOW, endpoint))
    counts = [0] * BUCKETS
    counts[bucket_of(0.012)] = 7
    counts[bucket_of(100.0)] = 1
    sign = Sign(10, 2, tuple(counts), 100.084, 1)
    for id_ in ("e0", "e2", "e3"):
        services.handle(SignGiven(NOW, id_, sign))
    services.handle(SignGiven(NOW, "e0", sign))
    services.handle(EndpointLeft(NOW, "e3"))
    out = {"a-1": Standing(out="cordoned")}
    services.review(services.due(NOW), NOW, lambda id_: out.get(id_, Standing()))
    return services


def page_of(services: Services) -> str:
    views = tuple(services.view(name, NOW) for name in services.names())
    registry = CollectorRegistry()
    registry.register(ServiceCollector(lambda: ServicesPicture(services.totals(), views)))
    return generate_latest(registry).decode()


def test_page_is_as_reviewed(golden: Golden) -> None:
    golden("aggregator_metrics_services.txt", page_of(make_services()))


def test_without_services_the_page_names_the_series_and_has_none() -> None:
    lines = page_of(Services(NOW)).splitlines()
    assert {line.split()[2] for line in lines} == {
        "stoker_service_operations_total",
        "stoker_service_errors_total",
        "stoker_service_operation_seconds",
        "stoker_service_endpoints",
        "stoker_service_endpoint_weight",
    }
    assert all(line.startswith("#") for line in lines)


def test_loop_that_is_stuck_leaves_the_services_out() -> None:
    assert list(ServiceCollector(lambda: None).collect()) == []
