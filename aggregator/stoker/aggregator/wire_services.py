"""Messages of the services' door to values and back; raises Malformed with the field's path."""

from stoker.aggregator import limits
from stoker.aggregator.limits import Malformed
from stoker.aggregator.routing import Share
from stoker.aggregator.services import EndpointView, ServiceView, Sign
from stoker.core.addresses import parse_address
from stoker.core.errors import BadInput, shown
from stoker.core.latencies import BUCKETS, SECONDS_MAX
from stoker.v1 import services_pb2

CAPACITY_MAX = 1_000_000
# Of one sign of life, which is due twice a second.
OPERATIONS_MAX = 100_000_000
IN_FLIGHT_MAX = 1_000_000


def read_service(name: str, field: str) -> str:
    """Return the service's name."""
    return limits.dns_name(name, field)


def read_address(text: str) -> str:
    """Return where callers reach a replica, in its usual form."""
    limits.text(text, "register.address", limits.TEXT_BYTES_MAX, required=True)
    try:
        address = parse_address(text)
    except BadInput:
        raise Malformed("register.address", f"must be HOST:PORT, found {shown(text)}") from None
    if address.port == 0:
        raise Malformed("register.address", f"must have a port to call, found {shown(text)}")
    return str(address)


def read_capacity(message: services_pb2.RegisterEndpoint) -> int | None:
    """Return how many calls it can work on at a time; None: it does not say."""
    if not message.HasField("capacity"):
        return None
    return int(limits.number(message.capacity, "register.capacity", 1, CAPACITY_MAX))


def read_sign(message: services_pb2.SignOfLife) -> Sign:
    """Return the sign of life."""
    limits.number(message.operations, "sign.operations", 0, OPERATIONS_MAX)
    limits.number(message.errors, "sign.errors", 0, message.operations)
    limits.number(message.in_flight, "sign.in_flight", 0, IN_FLIGHT_MAX)
    counts = tuple(message.latency_counts) or (0,) * BUCKETS
    if len(counts) != BUCKETS:
        raise Malformed("sign.latency_counts", f"must be {BUCKETS} counts, found {len(counts)}")
    limits.number(sum(counts), "sign.latency_counts", 0, message.operations - message.errors)
    seconds = message.latency_sum_seconds
    limits.number(seconds, "sign.latency_sum_seconds", 0, OPERATIONS_MAX * SECONDS_MAX)
    return Sign(message.operations, message.errors, counts, seconds, message.in_flight)


def service_message(view: ServiceView, epoch: str) -> services_pb2.ServiceEndpoints:
    """Return a service as a message."""
    return services_pb2.ServiceEndpoints(
        service=view.service,
        version=view.version,
        epoch=epoch,
        settled=view.is_settled,
        at=view.at,
        endpoints=[_endpoint_message(each) for each in view.endpoints],
    )


def standing_message(share: Share) -> services_pb2.ServeResponse:
    """Return how an endpoint stands with callers."""
    standing = services_pb2.EndpointStanding(weight=share.weight, reason=share.reason)
    return services_pb2.ServeResponse(standing=standing)


def _endpoint_message(view: EndpointView) -> services_pb2.Endpoint:
    endpoint, load = view.endpoint, view.load
    return services_pb2.Endpoint(
        id=endpoint.id,
        address=endpoint.address,
        weight=view.share.weight,
        reason=view.share.reason,
        allocation_id=endpoint.allocation_id,
        node=endpoint.node,
        gpu_uuids=endpoint.gpu_uuids,
        capacity=endpoint.capacity,
        in_flight=load.in_flight,
        latency_p50_seconds=load.latency_p50_seconds,
        operations_per_second=view.operations_per_second,
        error_ratio=load.error_ratio,
        utilization_ratio=load.utilization_ratio,
        memory_used_ratio=load.memory_used_ratio,
        registered_at=endpoint.registered_at,
        seen_at=view.seen_at,
    )
