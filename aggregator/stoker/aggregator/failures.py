"""How a call fails: a status code, a sentence, and google.rpc details that programs can read."""

from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio

from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Refusals
from stoker.aggregator.wire_fleet import refusals_message
from stoker.core.errors import StoreError
from stoker.v1 import types_pb2

DOMAIN = "stoker"
# A status travels in HTTP/2 trailers, of which a client takes 8 KiB unless it was told otherwise;
# there the sentence stands twice, and the details perhaps in base64. Explain tells all.
SENTENCE_BYTES_MAX = 700
DETAILS_BYTES_MAX = 4_200
REASON_BYTES_MAX = 1_000

_DETAILS_KEY = "grpc-status-details-bin"  # where grpcio-status looks for it

Context = aio.ServicerContext[Any, Any]


class CallFailure(Exception):
    """The call ends with this status."""

    def __init__(
        self, code: grpc.StatusCode, reason: str, sentence: str, *details: Message
    ) -> None:
        """`reason` is stable for programs, `sentence` is for a person."""
        super().__init__(sentence)
        self.code = code
        self.reason = reason
        self.sentence = cut(sentence, SENTENCE_BYTES_MAX)
        self._details = details

    async def abort(self, context: Context) -> NoReturn:
        """End the call with this status."""
        status = status_pb2.Status(code=self.code.value[0], message=self.sentence)
        kind = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=self.reason)
        for detail in (kind, *self._details):
            status.details.add().Pack(detail)
        trailers = ((_DETAILS_KEY, status.SerializeToString()),)
        await context.abort(self.code, self.sentence, trailers)


def invalid(error: Malformed) -> CallFailure:
    """The request, or a field of it, cannot be understood or is out of range."""
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field, description=cut(error.problem, SENTENCE_BYTES_MAX)
    )
    return CallFailure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        str(error),
        error_details_pb2.BadRequest(field_violations=[violation]),
    )


def cannot_place(refusals: Refusals, sentence: str = "") -> CallFailure:
    """The request cannot be placed now."""
    return CallFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "CANNOT_PLACE",
        sentence or refusals.summary,
        _fitting(refusals),
    )


def not_found(what: str, known: str = "") -> CallFailure:
    """There is no such allocation, node or GPU; `known` tells what there is instead."""
    sentence = f"{what} is not known" + (f": {known}" if known else "")
    return CallFailure(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", sentence)


def not_granted(allocation_id: str, reason: str) -> CallFailure:
    """The allocation left the queue without a grant, and not for want of room."""
    return CallFailure(
        grpc.StatusCode.ABORTED,
        "NOT_GRANTED",
        f"allocation {allocation_id} left the queue: {reason}",
    )


def key_reused(key: str, allocation_id: str) -> CallFailure:
    """The idempotency key stands for another request."""
    return CallFailure(
        grpc.StatusCode.ALREADY_EXISTS,
        "KEY_REUSED",
        f"idempotency key {key!r} was used for another request, that of allocation {allocation_id}",
    )


def store_unavailable(error: StoreError) -> CallFailure:
    """The wish could not be made durable, so it was not granted."""
    return CallFailure(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", str(error))


def version_too_old(sentence: str) -> CallFailure:
    """The changes that were asked for are no longer kept."""
    return CallFailure(grpc.StatusCode.OUT_OF_RANGE, "VERSION_TOO_OLD", sentence)


def cut(text: str, bytes_max: int) -> str:
    """Return `text`, cut at `bytes_max` bytes of UTF-8 with an ellipsis when it is longer."""
    data = text.encode()
    if len(data) <= bytes_max:
        return text
    return data[: bytes_max - 3].decode(errors="ignore") + "…"


def _fitting(refusals: Refusals) -> types_pb2.Refusals:
    """Return the refusals with as many nodes as a status has room for."""
    whole = refusals_message(refusals)
    fitting = types_pb2.Refusals(
        summary=cut(whole.summary, SENTENCE_BYTES_MAX),
        nodes_total=whole.nodes_total,
        ahead=whole.ahead,
    )
    room = DETAILS_BYTES_MAX - SENTENCE_BYTES_MAX - fitting.ByteSize()
    fitting.nodes.extend(_first_that_fit(whole, room))
    return fitting


def _first_that_fit(refusals: types_pb2.Refusals, room: int) -> Iterator[types_pb2.Refusal]:
    for refusal in refusals.nodes:
        for field in ("reason", "wanted", "found"):
            setattr(refusal, field, cut(getattr(refusal, field), REASON_BYTES_MAX))
        room -= refusal.ByteSize() + 4
        if room < 0:
            return
        yield refusal
