"""Calls as values, statuses as errors; protobuf is known here and in the `wire_*` beside it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_never

import grpc
from google.protobuf.message import DecodeError
from google.rpc import (  # type: ignore[import-untyped]
    error_details_pb2,
    status_pb2,
)

from stoker.client import errors, wire_health
from stoker.client import wire_answers as read
from stoker.client.model import (
    AddNodes,
    Allocation,
    Allocations,
    AllocationState,
    Change,
    Explanation,
    FleetHealth,
    KeptAlive,
    Node,
    Nodes,
    Refusals,
    RemoveNode,
    Request,
    UncordonNode,
    WhatIf,
)
from stoker.client.retrying import Method, Tries, is_retried
from stoker.client.wire_requests import request_message, sendable
from stoker.v1 import fleet_pb2, fleet_pb2_grpc, placing_pb2, types_pb2

T = TypeVar("T")

ERROR_DOMAIN = "stoker"
# The id of what is granted, or waits, comes before the answer under this name.
ALLOCATION_ID_KEY = "stoker-allocation-id"
_ID = "allocation_id"
_COUNT_LIMIT = 2**32  # of the wire; what makes sense is the aggregator's to know
_DETAILS_KEY = "grpc-status-details-bin"
# What grpc.aio makes of a message that was to be written when the connection had just broken.
_BROKEN_WRITE = ("INTERNAL", "Internal error from Core")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call as a value: what is sent, how its answer is read, how long it waits on purpose."""

    method: Method
    message: Any
    read: Callable[[Any], T]
    about: str = ""  # the allocation or node, for errors
    wait_seconds: float = 0.0
    has_key: bool = False


# --- calls


def allocate(request: Request, idempotency_key: str, wait_seconds: float) -> Call[Allocation]:
    message = fleet_pb2.AllocateRequest(
        request=request_message(request),
        idempotency_key=sendable(idempotency_key, "idempotency_key"),
        wait_seconds=wait_seconds,
    )
    return Call(
        Method.ALLOCATE,
        message,
        lambda answers: read.allocation(_only(answers).allocation),
        wait_seconds=wait_seconds,
        has_key=bool(idempotency_key),
    )


def keep_alive(allocation_id: str) -> Call[KeptAlive]:
    """One turn of the stream both ways: one message is sent, one answer is read."""
    messages = (fleet_pb2.KeepAliveRequest(allocation_id=sendable(allocation_id, _ID)),)
    return Call(
        Method.KEEP_ALIVE,
        messages,
        lambda answers: read.kept_alive(_only(answers)),
        about=allocation_id,
    )


def release(allocation_id: str, reason: str, wait_seconds: float) -> Call[Allocation]:
    message = fleet_pb2.ReleaseRequest(
        allocation_id=sendable(allocation_id, _ID),
        reason=sendable(reason, "reason"),
        wait_seconds=wait_seconds,
    )
    return Call(
        Method.RELEASE,
        message,
        lambda answer: read.allocation(answer.allocation),
        about=allocation_id,
        wait_seconds=wait_seconds,
    )


def explain(subject: str | Request, what_if: Sequence[WhatIf] = ()) -> Call[Explanation]:
    supposed = [_what_if(each) for each in what_if]
    if isinstance(subject, str):
        message = placing_pb2.ExplainRequest(allocation_id=sendable(subject, _ID), what_if=supposed)
        return Call(Method.EXPLAIN, message, read.explanation, about=subject)
    message = placing_pb2.ExplainRequest(request=request_message(subject), what_if=supposed)
    return Call(Method.EXPLAIN, message, read.explanation)


def _what_if(change: WhatIf) -> placing_pb2.WhatIf:
    match change:
        case AddNodes(gpus, model, nodes, pool):
            for what, count in (("gpus", gpus), ("nodes", nodes)):
                if not 0 < count < _COUNT_LIMIT:
                    raise errors.InvalidRequest(f"{what}: wanted at least 1, found {count}")
            add = placing_pb2.AddNodes(
                nodes=nodes,
                gpus=gpus,
                model=sendable(model, "model"),
                pool=sendable(pool, "pool"),
            )
            return placing_pb2.WhatIf(add=add)
        case RemoveNode(node):
            return placing_pb2.WhatIf(remove_node=sendable(node, "node"))
        case UncordonNode(node):
            return placing_pb2.WhatIf(uncordon_node=sendable(node, "node"))
        case _:
            assert_never(change)


def list_nodes() -> Call[Nodes]:
    return Call(
        Method.LIST_NODES,
        fleet_pb2.ListNodesRequest(),
        lambda answer: Nodes(
            tuple(read.node(each) for each in answer.nodes),
            answer.resource_version,
            answer.aggregator_version,
        ),
    )


def list_allocations(*, include_ended: bool) -> Call[Allocations]:
    return Call(
        Method.LIST_ALLOCATIONS,
        fleet_pb2.ListAllocationsRequest(include_ended=include_ended),
        lambda answer: Allocations(
            tuple(read.allocation(each) for each in answer.allocations), answer.resource_version
        ),
    )


def watch(resource_version: int) -> Call[Change]:
    message = fleet_pb2.WatchRequest(resource_version=resource_version)
    return Call(Method.WATCH, message, read.change)


def cordon(node: str, reason: str, gpu_uuid: str | None = None) -> Call[Node]:
    message = fleet_pb2.CordonRequest(
        node=sendable(node, "node"), reason=sendable(reason, "reason"), gpu_uuid=_gpu(gpu_uuid)
    )
    return Call(Method.CORDON, message, _node, about=node)


def uncordon(node: str, gpu_uuid: str | None = None) -> Call[Node]:
    message = fleet_pb2.UncordonRequest(node=sendable(node, "node"), gpu_uuid=_gpu(gpu_uuid))
    return Call(Method.UNCORDON, message, _node, about=node)


def drain(
    node: str, reason: str, gpu_uuid: str | None = None, grace_seconds: float | None = None
) -> Call[Node]:
    message = fleet_pb2.DrainRequest(
        node=sendable(node, "node"),
        reason=sendable(reason, "reason"),
        gpu_uuid=_gpu(gpu_uuid),
        grace_seconds=grace_seconds,
    )
    return Call(Method.DRAIN, message, _node, about=node)


def list_health(*, include_healthy: bool) -> Call[FleetHealth]:
    message = fleet_pb2.ListHealthRequest(include_healthy=include_healthy)
    return Call(Method.LIST_HEALTH, message, wire_health.fleet_health)


def stub(channel: grpc.Channel) -> fleet_pb2_grpc.FleetStub:
    return fleet_pb2_grpc.FleetStub(channel)


def async_stub(channel: grpc.aio.Channel) -> "fleet_pb2_grpc.FleetAsyncStub":
    return fleet_pb2_grpc.FleetStub(channel)


# gRPC hands out the initial metadata of a unary call only with its answer, and the id of what waits
# is in there. On the wire a stream of one answer is the same thing.
_ALLOCATE_PATH = f"/{fleet_pb2.DESCRIPTOR.services_by_name['Fleet'].full_name}/Allocate"


def allocating(channel: grpc.Channel) -> "grpc.UnaryStreamMultiCallable[Any, Any]":
    """Return Allocate as a stream."""
    return channel.unary_stream(
        _ALLOCATE_PATH,
        request_serializer=fleet_pb2.AllocateRequest.SerializeToString,
        response_deserializer=fleet_pb2.AllocateResponse.FromString,
    )


def async_allocating(channel: grpc.aio.Channel) -> "grpc.aio.UnaryStreamMultiCallable[Any, Any]":
    """Return Allocate as a stream."""
    return channel.unary_stream(
        _ALLOCATE_PATH,
        request_serializer=fleet_pb2.AllocateRequest.SerializeToString,
        response_deserializer=fleet_pb2.AllocateResponse.FromString,
    )


# --- answers


def allocation_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """Return the id that the initial metadata of an answer to Allocate carries."""
    for key, value in metadata or ():
        if key == ALLOCATION_ID_KEY:
            return value.decode() if isinstance(value, bytes) else value
    return None


def _gpu(uuid: str | None) -> str:
    """Return which GPU is meant, empty for all of the node."""
    if uuid == "":  # a variable that was not set must not cordon a node of eight
        raise errors.InvalidRequest("gpu_uuid: wanted the UUID of a GPU, found an empty text")
    return "" if uuid is None else sendable(uuid, "gpu_uuid")


def _node(answer: Any) -> Node:
    """Return the node in the answer to a cordon, its end, or a drain."""
    return read.node(answer.node)


def _only(messages: Sequence[T]) -> T:
    """Return the answer of a call that is read as a stream."""
    if len(messages) != 1:
        raise errors.AggregatorFailed(f"one answer was expected, found {len(messages)}")
    return messages[0]


# --- errors


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed call: the status as gRPC names it, its text, and the details that came along."""

    status: str
    text: str
    reason: str = ""  # the aggregator's stable word for it; empty: it did not speak, or not to us
    refusals: Refusals | None = None
    fields: Sequence[tuple[str, str]] = ()  # field and what is wrong with it


def pause_or_raise(
    lost: grpc.RpcError | None, call: Call[Any], tries: Tries, now: float, address: str
) -> float:
    """Return the seconds to wait before the call is sent again, or raise what it failed with.

    `lost` is None for a stream that the other side ended without a word.
    """
    failed = Failure("UNAVAILABLE", "it ended the stream") if lost is None else failure(lost)
    if is_retried(call.method, failed.status, failed.reason, has_key=call.has_key):
        pause = tries.pause_after_failure(now)
        if pause is not None:
            return pause
    raise error_of(failed, call, address) from lost


def failure(error: grpc.RpcError) -> Failure:
    """Return what is in the error of a call, sync or async."""
    # Every error that a call raises is a call as well; the annotations do not say so.
    call: Any = error
    status, text = call.code().name, call.details() or ""
    if (status, text) == _BROKEN_WRITE:
        return Failure("UNAVAILABLE", "the connection broke")
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return _explained(status, text, value)
    return Failure(status, text)


def error_of(failed: Failure, call: Call[Any], address: str) -> errors.ClientError:
    """Return the error that a caller can act on."""
    text = failed.text or failed.status
    match failed.reason, failed.status:
        case ("CANNOT_PLACE", _):
            return errors.Refused(failed.refusals or Refusals(text, (), 0, 0))
        case ("NOT_GRANTED", _):
            return errors.AllocationEnded(call.about, AllocationState.ENDED, text)
        case ("NOT_FOUND", _):
            return errors.NotFound(text)
        case ("KEY_REUSED", _):
            return errors.KeyReused(text)
        case ("VERSION_TOO_OLD", _):
            return errors.VersionTooOld(text)
        case ("STORE_UNAVAILABLE", _):
            return errors.StoreUnavailable(text)
        case ("INVALID_REQUEST", _) | (_, "INVALID_ARGUMENT"):
            return errors.InvalidRequest(_with_fields(text, failed.fields))
        case (_, "FAILED_PRECONDITION") | ("TOO_MANY", _) if call.method is Method.MIG:
            return errors.MigRefused(text)
        case ("" | "STOPPING", "UNAVAILABLE" | "CANCELLED"):
            return errors.Unreachable(f"aggregator at {address} cannot be reached: {_cause(text)}")
        case ("", "RESOURCE_EXHAUSTED") if "larger than max" in text:
            return errors.InvalidRequest(f"the request is too large: {text}")
        case ("", "DEADLINE_EXCEEDED"):
            return errors.Unreachable(f"aggregator at {address} did not answer in time")
        case (_, "UNAVAILABLE" | "DEADLINE_EXCEEDED") if call.method is Method.MIG:
            return errors.Unreachable(text)  # the aggregator itself did answer: its node does not
        case ("", "UNIMPLEMENTED"):
            return errors.AggregatorFailed(
                f"what answers at {address} has no {call.method}: another program, or an older one"
            )
        case _:
            return errors.AggregatorFailed(
                f"aggregator at {address}: {call.method} failed with {failed.status}: {text}"
            )


def _explained(status: str, text: str, value: bytes) -> Failure:
    """Read google.rpc details; what is not ours or cannot be read is left out."""
    details = status_pb2.Status()
    try:
        details.ParseFromString(value)
    except DecodeError:
        return Failure(status, text)
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    refusals = types_pb2.Refusals()
    found: Refusals | None = None
    for each in details.details:
        # Unpack does nothing to a message of another type.
        each.Unpack(bad)
        each.Unpack(info)
        if each.Unpack(refusals):
            found = read.refusals(refusals)
    return Failure(
        status,
        text,
        info.reason if info.domain == ERROR_DOMAIN else "",
        found,
        tuple((each.field, each.description) for each in bad.field_violations),
    )


def _with_fields(text: str, fields: Sequence[tuple[str, str]]) -> str:
    """Return the text, with what is wrong field by field unless it says so already."""
    more = [f"{field}: {wrong}" for field, wrong in fields if wrong not in text]
    return "; ".join([text, *more])


def _cause(text: str) -> str:
    """Return the end of gRPC's chain of causes, which is the part that a person can act on."""
    return text.rsplit("Failed to connect to remote host: ", 1)[-1].removeprefix("connect: ")
