"""What the agent and its driver host say to each other, and the page of the call being made.

Over a socket go frames: four bytes of length, then MessagePack. One question is asked at a time.
Beside it lies one page of shared memory: before each call into the driver the host notes there
which function it calls and for which GPU, and the number of the call. When the host then hangs, it
cannot tell; the page can. How it is read is told by `driver_host.watch`.
"""

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from stoker.agent.driver import ERRORS_BY_KIND, DriverError, Suspect, UnknownDriverError
from stoker.agent.driver_host.watch import Note
from stoker.agent.facts import Rate
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading

LENGTH = struct.Struct(">I")
# A reading of 64 GPUs with 1000 processes each stays far below.
FRAME_BYTES_MAX = 16 << 20

_NOTE = struct.Struct("<qi60s")  # number of the call, index of the GPU, function
_NOBODY = -1


class Verb(StrEnum):
    """What can be asked."""

    OPEN = "open"
    INVENTORY = "inventory"
    SAMPLE = "sample"
    PROCESSES = "processes"


class Request(msgspec.Struct, frozen=True, array_like=True):
    """A question; the reply bears its number, which the line gives it."""

    verb: Verb
    number: int = 0
    suspects: tuple[Suspect, ...] = ()  # of an inventory
    rates: tuple[Rate, ...] = (Rate.FAST,)  # of a sample
    profiling: bool = True  # of a sample


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


# Coders are made once: making one costs as much as a small answer.
_ENCODER = msgspec.msgpack.Encoder()
REQUESTS = msgspec.msgpack.Decoder(Request)
REPLIES = msgspec.msgpack.Decoder(Reply)
# The answers by question.
OPENED = msgspec.msgpack.Decoder(type(None))
INVENTORY = msgspec.msgpack.Decoder(Inventory)
READINGS = msgspec.msgpack.Decoder(tuple[GpuReading, ...])
PROCESSES = msgspec.msgpack.Decoder(ProcessesReading)


@dataclass(frozen=True, slots=True)
class DcgmEngine:
    """An nv-hostengine that runs already, and the folder of DCGM's Python bindings."""

    address: str  # HOST:PORT, or the path of a socket
    bindings: Path
    interval_seconds: float = 1.0  # between two samples


@dataclass(frozen=True, slots=True)
class RealDriver:
    """NVML, as nvidia-ml-py finds it."""

    without_dcgm: bool = False  # leave DCGM alone, because a driver host hung in it
    dcgm: DcgmEngine | None = None


@dataclass(frozen=True, slots=True)
class SimulatedDriver:
    """Simulated GPUs: the same node name and seed give the same UUIDs."""

    specs: tuple[str, ...]  # "8xH100-80GB"; several make a node of mixed cards
    node: str
    seed: int = 0
    scenario_path: str | None = None
    without_dcgm: bool = False
    dcgm: DcgmEngine | None = None
    mig_state_path: str | None = None  # where all processes of the node keep how GPUs are cut up


DriverSource = RealDriver | SimulatedDriver


class NotePage:
    """The shared page. The host writes it before each call; the agent reads it when one hangs."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _NOTE.size)
        self._number = 0

    @staticmethod
    def create() -> int:
        """Return the descriptor of a new page, on which nothing is noted."""
        fd = os.memfd_create("stoker-driver-note")
        os.ftruncate(fd, _NOTE.size)
        return fd

    def write(self, gpu_index: int, function: str) -> None:
        """Note a call; a negative index is no GPU, an empty function no call."""
        self._number += 1
        _NOTE.pack_into(self._map, 0, self._number, gpu_index, function.encode())

    def clear(self) -> None:
        """Note that no call is being made."""
        self.write(_NOBODY, "")

    def read(self) -> Note | None:
        """Return the call being made, or None."""
        number, index, name = _NOTE.unpack_from(self._map)
        function = bytes(name).rstrip(b"\0").decode("ascii", "replace")
        return Note(index if index >= 0 else None, function, number) if function else None

    def close(self) -> None:
        """Let go of the page."""
        self._map.close()


def pack(message: Request | Reply) -> bytearray:
    """Return the frame of a message."""
    frame = bytearray(LENGTH.size)
    _ENCODER.encode_into(message, frame, LENGTH.size)
    LENGTH.pack_into(frame, 0, len(frame) - LENGTH.size)
    return frame


def frame_length(frame: bytes | bytearray) -> int:
    """Return how many bytes follow the head; raises ValueError when that cannot be true."""
    (length,) = LENGTH.unpack_from(frame)
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
    flags = ["--without-dcgm"] if source.without_dcgm else []
    if source.dcgm is not None:
        flags += [
            f"--dcgm-address={source.dcgm.address}",
            f"--dcgm-bindings={source.dcgm.bindings}",
            f"--dcgm-interval={source.dcgm.interval_seconds:g}",
        ]
    match source:
        case RealDriver():
            pass
        case SimulatedDriver():
            flags += [f"--simulate={spec}" for spec in source.specs]
            flags += [f"--node={source.node}", f"--seed={source.seed}"]
            if source.scenario_path is not None:
                flags.append(f"--scenario={source.scenario_path}")
            if source.mig_state_path is not None:
                flags.append(f"--mig-state={source.mig_state_path}")
    return flags


def encode_body(answer: Any) -> msgspec.Raw:
    """Return an answer ready for a reply."""
    return msgspec.Raw(_ENCODER.encode(answer))
