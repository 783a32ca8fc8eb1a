"""What a bench reports, worked out from what its processes counted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stoker.testing.load import AgentsReport, ClientsReport, percentile

# A generator that was later than this (99th percentile) measured itself.
AGENTS_LAG_SECONDS_MAX = 0.5
# Requests count from when they were due, so this much of a latency may be the client's own.
CLIENTS_LAG_SECONDS_MAX = 0.05


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured."""

    processor: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    grpc: str
    filesystem: str  # of the ledger's folder: what a commit waits for


@dataclass(frozen=True, slots=True)
class Used:
    """What processes used in a window."""

    cpu_seconds: float
    wall_seconds: float
    rss_bytes: int  # at its end

    @property
    def cores(self) -> float:
        """Cores kept busy, on the mean."""
        return self.cpu_seconds / self.wall_seconds


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution of latencies, in seconds; None when there were none."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of_micros(cls, micros: Iterable[int]) -> "Spread":
        """Return the distribution of these, given in microseconds."""
        ordered = sorted(micros)
        p50, p90, p99, longest = (_seconds(percentile(ordered, at)) for at in (0.5, 0.9, 0.99, 1))
        return cls(p50, p90, p99, longest)


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What it costs to take in the frames of a fleet."""

    nodes: int
    gpus: int
    hz: float
    seconds: float
    connections: int  # TCP connections to the aggregator, as the kernel counts them
    frames_sent: int
    frames_acked: int
    dropped: int  # let go by an agent's outbox, or never acknowledged
    disconnects: int
    frames_per_second: float
    bytes_per_frame: float | None  # protobuf
    stream_bytes_per_frame: float | None  # both ways, with HTTP/2, without TCP and IP
    acks_per_frame: float | None  # less than 1 where one covers several
    ack_p50_seconds: float | None  # from the agent's link to the aggregator, and back when it likes
    ack_p90_seconds: float | None
    ack_p99_seconds: float | None
    ack_max_seconds: float | None
    visible_p50_seconds: float | None  # from the agent's link until a client is shown it
    visible_p99_seconds: float | None
    nodes_visible: int  # of which a client was shown the newest acknowledged sample, or a later one
    cpu_seconds_per_frame: float | None
    aggregator_cores: float
    aggregator_rss_bytes: int
    bare_cpu_seconds_per_frame: float | None  # of a server that only acknowledges; None: not run
    bare_acks_per_frame: float | None
    bare_ack_p99_seconds: float | None
    cpu_ratio_to_bare: float | None
    generator_cores: float
    generator_lag_p99_seconds: float | None
    valid: bool
    invalid_reasons: tuple[str, ...]
    at: str  # when it began, UTC
    machine: Machine


@dataclass(frozen=True, slots=True)
class AllocateReport:
    """What it costs to grant and take back GPUs while a fleet sends its frames."""

    nodes: int
    gpus: int
    hz: float
    rate: float
    seconds: float
    hold_seconds_mean: float
    connections: int  # agents' TCP connections to the aggregator
    requests: int
    granted: int
    refused: int
    errors: Mapping[str, int]
    granted_twice: int
    achieved_per_second: float
    grant_p50_seconds: float | None  # from when it was due until the client had it
    grant_p90_seconds: float | None
    grant_p99_seconds: float | None
    grant_max_seconds: float | None
    release_p50_seconds: float | None
    release_p99_seconds: float | None
    commits: int  # of the ledger, each at least one fsync
    fsync_p50_seconds: float | None  # of a small write to the same disk, when nothing else went on
    fsync_p99_seconds: float | None
    frames_per_second: float
    frames_dropped: int
    ack_p99_seconds: float | None
    aggregator_cores: float
    aggregator_rss_bytes: int
    generator_cores: float  # agents and clients
    generator_lag_p99_seconds: float | None  # of the agents
    client_lag_p99_seconds: float | None
    valid: bool
    invalid_reasons: tuple[str, ...]
    at: str  # when it began, UTC
    machine: Machine


def merge_agents(reports: Sequence[AgentsReport]) -> AgentsReport:
    """Return the sum over the generators."""
    return AgentsReport(
        connections=sum(each.connections for each in reports),
        frames_sent=sum(each.frames_sent for each in reports),
        frames_acked=sum(each.frames_acked for each in reports),
        frames_dropped=sum(each.frames_dropped for each in reports),
        acks=sum(each.acks for each in reports),
        disconnects=sum(each.disconnects for each in reports),
        message_bytes=sum(each.message_bytes for each in reports),
        stream_bytes=sum(each.stream_bytes for each in reports),
        ack_micros=[micros for each in reports for micros in each.ack_micros],
        lag_micros=[micros for each in reports for micros in each.lag_micros],
        sampled_at={node: at for each in reports for node, at in each.sampled_at.items()},
        sends={node: sent for each in reports for node, sent in each.sends.items()},
    )


def agents_objections(agents: AgentsReport, nodes: int) -> list[str]:
    """Return why the load was not what was asked for."""
    found: list[str] = []
    lag = Spread.of_micros(agents.lag_micros).p99
    if lag is None:
        found.append("no frame was sent in the window")
    elif lag > AGENTS_LAG_SECONDS_MAX:
        found.append(
            f"the agents' generator was {lag:.2f} s late (99th percentile), "
            f"more than {AGENTS_LAG_SECONDS_MAX:g} s: it was saturated, not the aggregator"
        )
    if agents.connections != nodes:
        found.append(f"{nodes} agents had {agents.connections} TCP connections at the end")
    if agents.disconnects:
        found.append(f"{agents.disconnects} streams ended in the window")
    return found


def clients_objections(clients: ClientsReport) -> list[str]:
    """Return why the requests were not what was asked for."""
    lag = Spread.of_micros(clients.lag_micros).p99
    if lag is None:
        return ["no request was due in the window"]
    if lag <= CLIENTS_LAG_SECONDS_MAX:
        return []
    late = f"the clients were {lag:.3f} s late (99th percentile)"
    return [f"{late}, more than {CLIENTS_LAG_SECONDS_MAX:g} s: it was they who were slow"]


def _seconds(micros: float | None) -> float | None:
    return None if micros is None else micros / 1e6


def ratio(dividend: float | None, divisor: float | None) -> float | None:
    """Return the quotient; None where there is nothing to divide, or by."""
    return None if dividend is None or not divisor else dividend / divisor
