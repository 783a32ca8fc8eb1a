"""Calls with bytes that no client of ours would send, and the status that comes back."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import (  # type: ignore[import-untyped]
    error_details_pb2,  # pyright: ignore[reportMissingTypeStubs]
    status_pb2,  # pyright: ignore[reportMissingTypeStubs]
)
from grpc import aio

CALL_SECONDS_MAX = 20.0
# Stands in a message for bytes that protobuf would not let us write.
PLACEHOLDER = "placeholder"
NOT_UTF8 = b"\xff" * len(PLACEHOLDER)

FLEET = "/stoker.v1.Fleet/"
AGENT_LINK = "/stoker.v1.AgentLink/"
HEALTH = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed; `reason` is the stable word for it, empty when the details have none."""

    code: grpc.StatusCode
    said: str
    reason: str


def with_bytes_that_are_not_utf8(message: Message) -> bytes:
    """Return the message with its placeholder replaced."""
    data = message.SerializeToString()
    assert PLACEHOLDER.encode() in data
    return data.replace(PLACEHOLDER.encode(), NOT_UTF8)


async def send(address: str, path: str, data: bytes) -> bytes:
    """Return the answer to a call with one message and one answer; raises AioRpcError."""
    async with _opened(address) as channel:
        call = channel.unary_unary(path)
        answer: bytes = await call(data, timeout=CALL_SECONDS_MAX)
        return answer


async def begin_stream(address: str, path: str, data: bytes) -> None:
    """Send the first message of a stream both ways and wait for its answer; raises AioRpcError."""
    async with _opened(address) as channel:
        call = channel.stream_stream(path)
        stream = call(timeout=CALL_SECONDS_MAX)
        await stream.write(data)
        await stream.read()


async def watch(address: str, path: str, data: bytes) -> None:
    """Send one message and wait for the first of many answers; raises AioRpcError."""
    async with _opened(address) as channel:
        call = channel.unary_stream(path)
        await call(data, timeout=CALL_SECONDS_MAX).read()


def refusal_of(error: aio.AioRpcError) -> Refusal:
    """Return what the error of a call says."""
    reason = ""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status: Any = status_pb2.Status.FromString(value)
            info: Any = error_details_pb2.ErrorInfo()
            assert any(each.Unpack(info) for each in status.details)
            assert info.domain == "stoker"
            reason = str(info.reason)
    return Refusal(error.code(), error.details() or "", reason)


def _opened(address: str) -> Any:
    # Untyped: with bytes in and out, its types are left open.
    return aio.insecure_channel(address)
