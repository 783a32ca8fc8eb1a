"""What the agent and its driver host say to each other, and the page of the call being made.

Over a socket go frames: four bytes of length, then MessagePack. One question is asked at a time.
Beside it lies one page of shared memory: before each call into the driver the host notes there
which function it calls and for which GPU. When the host then hangs, it cannot tell; the page can.
"""

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from stoker.agent.driver import ERRORS_BY_KIND, DriverError, Suspect, UnknownDriverError

T = TypeVar("T")

LENGTH = struct.Struct(">I")
# A reading of 64 GPUs with 1000 processes each stays far below.
FRAME_BYTES_MAX = 16 << 20

_NOTE = struct.Struct("<i60s")
_NOBODY = -1


class Verb(StrEnum):
    """What can be asked."""

    OPEN = "open"
    INVENTORY = "inventory"
    SAMPLE = "sample"
    PROCESSES = "processes"


class Request(msgspec.Struct, frozen=True, array_like=True):
    """A question; the reply bears its number."""

    number: int
    verb: Verb
    suspects: tuple[Suspect, ...] = ()  # of an inventory


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A DriverError on its way."""

    kind: str
    found: str
    function: str | None
    gpu: str | None


_NOTHING = msgspec.Raw(msgspec.msgpack.encode(None))


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """A failure, or the answer in MessagePack."""

    number: int
    failure: Failure | None = None
    body: msgspec.Raw = _NOTHING


@dataclass(frozen=True, slots=True)
class RealDriver:
    """NVML, as nvidia-ml-py finds it."""


@dataclass(frozen=True, slots=True)
class SimulatedDriver:
    """Simulated GPUs: the same node name and seed give the same UUIDs."""

    specs: tuple[str, ...]  # "8xH100-80GB"; several make a node of mixed cards
    node: str
    seed: int = 0
    scenario_path: str | None = None


DriverSource = RealDriver | SimulatedDriver


@dataclass(frozen=True, slots=True)
class Note:
    """The call that the driver host made last."""

    gpu_index: int | None  # None: about no GPU in particular
    function: str


class NotePage:
    """The shared page. The host writes it before each call; the agent reads it when one hangs."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _NOTE.size)

    @staticmethod
    def create() -> int:
        """Return the descriptor of a new page, on which nothing is noted."""
        fd = os.memfd_create("stoker-driver-note")
        os.ftruncate(fd, _NOTE.size)
        return fd

    def write(self, gpu_index: int, function: str) -> None:
        """Note a call; a negative index is no GPU, an empty function no call."""
        _NOTE.pack_into(self._map, 0, gpu_index, function.encode())

    def clear(self) -> None:
        """Note that no call is being made."""
        self.write(_NOBODY, "")

    def read(self) -> Note | None:
        """Return the call being made, or None."""
        index, name = _NOTE.unpack_from(self._map)
        function = bytes(name).rstrip(b"\0").decode("ascii", "replace")
        return Note(index if index >= 0 else None, function) if function else None

    def close(self) -> None:
        """Let go of the page."""
        self._map.close()


def pack(message: Request | Reply) -> bytes:
    """Return the frame of a message."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """Return how many bytes follow; raises ValueError when that cannot be true."""
    (length,) = LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {length} bytes, more than {FRAME_BYTES_MAX}")
    return int(length)


def to_failure(error: DriverError) -> Failure:
    """Return the error as it travels."""
    return Failure(error.kind, error.found, error.function, error.gpu)


def from_failure(
    failure: Failure, kinds: Mapping[str, type[DriverError]] = ERRORS_BY_KIND
) -> DriverError:
    """Return the error as it was raised."""
    kind = kinds.get(failure.kind, UnknownDriverError)
    return kind(failure.found, function=failure.function, gpu=failure.gpu)


def arguments_of(source: DriverSource) -> list[str]:
    """Return the flags of the driver host that say which driver to open."""
    match source:
        case RealDriver():
            return []
        case SimulatedDriver():
            flags = [f"--simulate={spec}" for spec in source.specs]
            flags += [f"--node={source.node}", f"--seed={source.seed}"]
            if source.scenario_path is not None:
                flags.append(f"--scenario={source.scenario_path}")
            return flags


def encode_body(answer: Any) -> msgspec.Raw:
    """Return an answer ready for a reply."""
    return msgspec.Raw(msgspec.msgpack.encode(answer))


def decode_body(body: msgspec.Raw, type_: type[T]) -> T:
    """Return the answer in a reply."""
    return msgspec.msgpack.decode(body, type=type_)
