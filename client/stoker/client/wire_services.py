"""Messages of the service `stoker.v1.Services` to values and back."""

from typing import Any

import grpc

from stoker.client import errors
from stoker.client.retrying import Method
from stoker.client.services import (
    Endpoint,
    Observed,
    Registration,
    ServiceEndpoints,
    Standing,
)
from stoker.client.wire import Call, Failure, error_of, failure
from stoker.v1 import services_pb2, services_pb2_grpc


def stub(channel: grpc.Channel) -> services_pb2_grpc.ServicesStub:
    return services_pb2_grpc.ServicesStub(channel)


def async_stub(channel: grpc.aio.Channel) -> "services_pb2_grpc.ServicesAsyncStub":
    return services_pb2_grpc.ServicesStub(channel)


def list_services() -> Call[tuple[ServiceEndpoints, ...]]:
    return Call(
        Method.LIST_SERVICES,
        services_pb2.ListServicesRequest(),
        lambda answer: tuple(_service(each) for each in answer.services),
    )


def route(service: str) -> Call[ServiceEndpoints]:
    message = services_pb2.RouteRequest(service=_text(service, "service"))
    return Call(Method.ROUTE, message, lambda answer: _service(answer.service))


def watch_endpoints(service: str) -> Call[ServiceEndpoints]:
    message = services_pb2.WatchEndpointsRequest(service=_text(service, "service"))
    return Call(Method.WATCH_ENDPOINTS, message, lambda answer: _service(answer.service))


def serve(registration: Registration) -> Call[Standing | None]:
    """The first message of the stream; of its answers, None is that the endpoint is known."""
    register = services_pb2.RegisterEndpoint(
        allocation_id=_text(registration.allocation_id, "allocation_id"),
        service=_text(registration.service, "service"),
        address=_text(registration.address, "address"),
        capacity=registration.capacity,
    )
    return Call(
        Method.SERVE,
        services_pb2.ServeRequest(register=register),
        _standing,
        about=registration.allocation_id,
    )


def sign(observed: Observed) -> services_pb2.ServeRequest:
    """Return a sign of life."""
    counts = observed.latency_counts if any(observed.latency_counts) else ()
    return services_pb2.ServeRequest(
        sign=services_pb2.SignOfLife(
            operations=observed.operations,
            errors=observed.errors,
            latency_counts=counts,
            latency_sum_seconds=observed.latency_sum_seconds,
            in_flight=observed.in_flight,
        )
    )


def why_lost(
    lost: grpc.RpcError | None, call: Call[Any], address: str
) -> tuple[Failure, errors.ClientError]:
    """Return what ended a stream, as it came and as an error; None: the other side, wordless."""
    failed = Failure("UNAVAILABLE", "it ended the stream") if lost is None else failure(lost)
    return failed, error_of(failed, call, address)


def closed(address: str) -> errors.Unreachable:
    """Return the error of a stream that was to begin on a connection that its client hung up."""
    return errors.Unreachable(f"the client of the aggregator at {address} is closed")


def _standing(answer: services_pb2.ServeResponse) -> Standing | None:
    if not answer.HasField("standing"):
        return None
    return Standing(answer.standing.weight, answer.standing.reason)


def _service(message: services_pb2.ServiceEndpoints) -> ServiceEndpoints:
    return ServiceEndpoints(
        service=message.service,
        version=message.version,
        epoch=message.epoch,
        settled=message.settled,
        at=message.at,
        endpoints=tuple(_endpoint(each) for each in message.endpoints),
    )


def _endpoint(message: services_pb2.Endpoint) -> Endpoint:
    def maybe(field: str) -> Any:
        return getattr(message, field) if message.HasField(field) else None  # type: ignore[arg-type]

    return Endpoint(
        id=message.id,
        address=message.address,
        weight=message.weight,
        reason=message.reason,
        allocation_id=message.allocation_id,
        node=message.node,
        gpu_uuids=tuple(message.gpu_uuids),
        capacity=maybe("capacity"),
        in_flight=maybe("in_flight"),
        latency_p50_seconds=maybe("latency_p50_seconds"),
        operations_per_second=maybe("operations_per_second"),
        error_ratio=maybe("error_ratio"),
        utilization_ratio=maybe("utilization_ratio"),
        memory_used_ratio=maybe("memory_used_ratio"),
        registered_at=message.registered_at,
        seen_at=message.seen_at,
    )


def _text(value: str, what: str) -> str:
    """Return text that can be sent."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidRequest(f"{what}: wanted UTF-8, found {value[:60]!r}") from error
    return value
