"""Calls between the processes of a simulated world: real protobuf messages on simulated streams.

A packet on a stream is a message, or why the call failed, as gRPC's status says. Before it stands
how wrong the sender's wall clock is: only a simulation knows that, and only its checks use it.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from stoker.testing.network import End, Network

AGGREGATOR = "aggregator"
CONNECT = "Connect"  # the agents' only method; the others are those of the service Fleet

M = TypeVar("M", bound=Message)

_HEAD = struct.Struct("<?d")


@dataclass(frozen=True, slots=True)
class Failed:
    """The call ended without an answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Said(Generic[M]):
    """A message, and how many seconds its sender's wall clock was ahead of the truth."""

    message: M
    wall_offset: float


def packet(message: Message, wall_offset: float = 0.0) -> bytes:
    """Return the bytes that carry a message."""
    return _HEAD.pack(True, wall_offset) + message.SerializeToString()


def failure_packet(reason: str) -> bytes:
    """Return the bytes that tell why a call failed."""
    return _HEAD.pack(False, 0.0) + reason.encode()


def read_packet(kind: type[M], data: bytes) -> Said[M] | Failed:
    """Return what a packet says."""
    is_message, wall_offset = _HEAD.unpack_from(data)
    rest = data[_HEAD.size :]
    return Said(kind.FromString(rest), wall_offset) if is_message else Failed(rest.decode())


def call(
    network: Network,
    caller: str,
    method: str,
    request: Message,
    kind: type[M],
    heard: Callable[[Said[M] | Failed], None],
) -> End:
    """Say `request` on a new stream; `heard` is told every answer, and how the stream ends."""
    end = network.dial(caller, AGGREGATOR, method)
    end.on_message = lambda data: heard(read_packet(kind, data))
    end.on_end = lambda reason: heard(Failed(reason))
    end.send(packet(request))
    return end
