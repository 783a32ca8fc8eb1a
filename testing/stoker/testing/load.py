"""What a load generator is told and what it reports: JSON lines on its standard input and output.

A generator is a child process of whoever measures. Its plan is its only argument; it says
`Connected` as it goes, then answers every `Measure` with a report, load going on in between. It
ends when its standard input does, so that none is left behind when its parent dies. Times in these
messages are of the machine's monotonic clock, which all its processes share.
"""

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from stoker.testing.replica_messages import CallsReport
from stoker.testing.workloads.messages import Bound, Instruction, PublishedRun, TimedRun


@dataclass(frozen=True, slots=True)
class AgentsPlan:
    """The agents of one process: nodes `first` to `first + nodes - 1` of the fleet."""

    target: str  # host:port of the aggregator
    first: int
    nodes: int
    nodes_total: int  # of the whole fleet, over which sending is spread
    gpus: int
    hz: float  # samples a second of every node
    seed: int


@dataclass(frozen=True, slots=True)
class ClientsPlan:
    """Clients that ask for one GPU each, hold it for a while, and give it back."""

    target: str  # host:port of the aggregator
    rate: float  # requests a second; they arrive at random (a Poisson process)
    hold_seconds: float  # mean of the (exponentially distributed) time of holding
    seed: int


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Sweeps over the GPUs of this machine, or over simulated ones."""

    simulate: tuple[str, ...]  # "8xH100-80GB"; none: those of the library that is found
    sweeps: int  # of each kind
    interval_seconds: float  # from the beginning of one to the next, where it takes no longer
    seed: int


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Report on what is due in this window."""

    begins_at: float
    ends_at: float
    with_sends: bool = False  # list every frame with samples, too


class Listening(msgspec.Struct, frozen=True, tag=True):
    """A server accepts connections on this port."""

    port: int


class Connected(msgspec.Struct, frozen=True, tag=True):
    """So many agents of this process are connected by now, or all of its clients."""

    count: int


class AgentsReport(msgspec.Struct, frozen=True, tag=True):
    """What became of the frames that were first sent in the window."""

    connections: int  # to the target, as the kernel counts them
    frames_sent: int
    frames_acked: int
    frames_dropped: int  # that the outboxes had to let go
    acks: int  # messages that acknowledged them; one may cover several frames
    disconnects: int  # streams that ended
    message_bytes: int  # of the frames as protobuf
    stream_bytes: int  # both ways on these connections: gRPC and HTTP/2, without TCP and IP
    ack_micros: list[int]  # from before a frame was written until its acknowledgement was read
    lag_micros: list[int]  # from when a sample was due until its frame was written
    sampled_at: dict[str, float]  # node -> when its newest acknowledged sample was taken (Unix)
    # node -> when each frame with samples was sent (monotonic), and when sampled (Unix), if asked
    sends: dict[str, list[tuple[float, float]]]


class ClientsReport(msgspec.Struct, frozen=True, tag=True):
    """What became of the requests that were due in the window."""

    requests: int
    granted: int
    refused: int
    errors: dict[str, int]  # by what went wrong
    granted_twice: int  # grants of a GPU that another of these clients held
    grant_micros: list[int]  # from when a request was due until its grant was read
    release_micros: list[int]  # from when a release was due until it was answered
    lag_micros: list[int]  # from when a request was due until it was begun


class Found(msgspec.Struct, frozen=True, tag=True):
    """So many GPUs can be read."""

    gpus: int


class Sweeping(msgspec.Struct, frozen=True, tag=True):
    """So many sweeps of a kind are made."""

    what: str
    done: int
    total: int


class SweepsReport(msgspec.Struct, frozen=True):
    """What the sweeps of one kind took together."""

    sweeps: int
    host_cpu_seconds: float  # of the driver host, user and system
    agent_cpu_seconds: float  # of the process that asks it
    wall_micros: list[int]  # of each: from the question until its answer was taken in
    told: int  # values, or processes, that the last one told


class SamplingReport(msgspec.Struct, frozen=True, tag=True):
    """What sweeping took, and how large both processes are."""

    driver_version: str | None
    gpus: int
    fast: SweepsReport  # the facts of every sampling tick
    everything: SweepsReport  # these and the slow ones
    processes: SweepsReport
    series: int  # lines of the page for Prometheus
    page_bytes: int
    scrape_cpu_seconds: float  # to make that page once
    frame_bytes: int  # of the last one, as protobuf
    rss_bytes: int  # of the process that asks
    host_rss_bytes: int
    calls: dict[str, int] = {}  # of one sweep into the library, by its kind


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The child cannot go on."""

    reason: str


class Lacking(msgspec.Struct, frozen=True, tag=True):
    """This machine does not have what the child needs."""

    reason: str


Said = (
    Listening
    | Connected
    | AgentsReport
    | ClientsReport
    | CallsReport
    | Found
    | Sweeping
    | SamplingReport
    | PublishedRun
    | TimedRun
    | Bound
    | Failed
    | Lacking
)


def encode(message: Measure | Instruction | Said) -> bytes:
    """Return `message` as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode_said(line: bytes) -> Said:
    """Return what a child said; raises ValueError when it is no message of ours."""
    said: Said = msgspec.json.decode(line, type=Said)
    return said


def say(message: Said, to: BinaryIO | None = None) -> None:
    """Tell the parent."""
    stream = sys.stdout.buffer if to is None else to
    stream.write(encode(message))
    stream.flush()


async def instructions() -> AsyncIterator[Measure]:
    """Yield what the parent says, until it has nothing more to say."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield msgspec.json.decode(line, type=Measure)


def to_micros(seconds: float) -> int:
    """Return whole microseconds: short lines, and finer than any figure here is exact."""
    return round(seconds * 1e6)


def percentile(ordered: Sequence[float], ratio: float) -> float | None:
    """Return the smallest of the ordered values that `ratio` of them do not exceed, if any."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(ratio * len(ordered)) - 1)]
