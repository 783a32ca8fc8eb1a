"""What is said over an agent's local socket, and the client that says it and waits.

One request for each connection: a line of JSON from the caller, a line of JSON back. The kernel
tells the agent who calls (SO_PEERCRED), so nothing in a request says it. A new verb is a new
struct in `Request` and one in `Answer`; both sides of one version know the same ones, and an agent
names a verb that it does not know.

NoAgent     nobody answers at the socket (or at any of those that were tried)
Refused     the agent does not do it for this caller, or not now
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from stoker.core.errors import BadInput, ExitCode, StokerError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.core.units import DURATION_SECONDS_MAX

# The kernel's `sun_path` has 108 bytes, the last of which ends the name.
PATH_BYTES_MAX = 107
# A request says little, or brings a configuration of partitions; an answer lists at most what a
# node holds and runs.
REQUEST_BYTES_MAX = 64 * 2**10
ANSWER_BYTES_MAX = 16 * 2**20
# A release waits for a driver host to be ended, killed, and given up on.
ANSWER_SECONDS_MAX = 15.0

A = TypeVar("A", bound=msgspec.Struct)
Seconds = Annotated[float, msgspec.Meta(gt=0, le=DURATION_SECONDS_MAX)]


class _Request(msgspec.Struct, frozen=True, tag_field="verb", forbid_unknown_fields=True):
    """What a caller may ask."""


class _Answer(msgspec.Struct, frozen=True, tag_field="answer"):
    """What an agent may answer. A field that the caller does not know is of a newer agent."""


class _Facts(msgspec.Struct, frozen=True):
    """A part of an answer."""


class AskStatus(_Request, frozen=True, tag="status"):
    """How is the agent, and what does it know?"""


class AskRelease(_Request, frozen=True, tag="release"):
    """Let go of the driver; for good, or for so long."""

    for_seconds: Seconds | None = None


class AskResume(_Request, frozen=True, tag="resume"):
    """Take the driver again."""


class AskProfilingPause(_Request, frozen=True, tag="pause_profiling"):
    """Leave the hardware counters to somebody else's profiler; for good, or for so long."""

    for_seconds: Seconds | None = None


class AskProfilingResume(_Request, frozen=True, tag="resume_profiling"):
    """Read the hardware counters again."""


class AskSetHealthy(_Request, frozen=True, tag="set_healthy"):
    """Forget the faults of a GPU: it was mended, inspected, or taken out for good."""

    gpu: str  # its UUID, or its index


class AskMig(_Request, frozen=True, tag="mig"):
    """Plan, apply or undo partitions of the GPUs, or tell how they are."""

    ask: MigAsk


Request = (
    AskStatus
    | AskRelease
    | AskResume
    | AskProfilingPause
    | AskProfilingResume
    | AskSetHealthy
    | AskMig
)


class DriverCall(_Facts, frozen=True):
    """A call into the driver that has not returned yet."""

    function: str
    gpu_index: int | None


class DriverFacts(_Facts, frozen=True):
    """The driver as the agent sees it."""

    state: str  # "starting", "reading", "blocked", "failed", "released"
    reason: str
    since: float | None  # Unix seconds
    host_pid: int | None  # the process that holds the handles; None: there is none
    call: DriverCall | None
    host_starts: int
    host_restarts: int
    timeouts: int
    kills: int


class ReleaseFacts(_Facts, frozen=True):
    """A release that is in force."""

    at: float
    until: float | None
    by: str


class GpuFacts(_Facts, frozen=True):
    """One GPU of the node, and whether it is read."""

    uuid: str | None
    index: int
    model: str
    is_read: bool
    reason: str  # why it is not read
    verdict: str = "unknown"  # "healthy", "degraded", "unhealthy", "unknown"
    action: str = "none"  # what mends it: "restart_app", "drain", "reset_gpu", "reboot", "rma"
    faults: tuple[str, ...] = ()  # worst first, a sentence each
    memory_used_bytes: int | None = None
    # In use, and no process accounts for it; None: it cannot be told.
    memory_unattributed_bytes: int | None = None


class HeldFacts(_Facts, frozen=True):
    """An allocation that the node holds."""

    id: str
    holder: str
    gpu_uuids: tuple[str, ...]
    memory_bytes: int | None  # of a share; None: all of the GPUs, or of their MIG devices
    is_leaving: bool
    mig_device_uuids: tuple[str, ...] = ()  # empty: the GPUs themselves
    compute_milli: int | None = None  # of a share, in thousandths; None: none is promised
    cpu_milli: int = 0  # thousandths of a core of the host
    host_memory_bytes: int = 0
    gang_nodes: int = 1  # that hold a part of the allocation, this one included


class ProcessFacts(_Facts, frozen=True):
    """A process that was on a GPU when processes were read last."""

    pid: int
    user: str
    command: str
    gpu_uuid: str
    gpu_index: int | None
    allocation_id: str
    memory_used_bytes: int | None = None
    owner: str = ""  # what it is part of: "pod ml/train-0", "Slurm job 12", "unit a.service"


class AssignmentFacts(_Facts, frozen=True):
    """A GPU that somebody else has handed out."""

    gpu_uuid: str
    gpu_index: int | None
    by: str  # "kubelet", "slurm"
    holder: str


class HolderFacts(_Facts, frozen=True):
    """A process that has device files of the driver open, whether or not it uses a GPU."""

    pid: int
    user: str
    command: str
    devices: tuple[str, ...]
    owner: str


class GpuName(_Facts, frozen=True):
    """Which GPU."""

    uuid: str
    index: int


class UsersFacts(_Facts, frozen=True):
    """Who uses the GPUs, as far as is known."""

    held: tuple[HeldFacts, ...]
    processes: tuple[ProcessFacts, ...]
    processes_age_seconds: float | None  # None: nothing is known of them
    unread_gpus: tuple[GpuName, ...]  # of these nothing is known
    assignments: tuple[AssignmentFacts, ...] = ()
    assignments_unknown: str = ""  # why it is not known what others have handed out
    holders: tuple[HolderFacts, ...] = ()  # of simulated GPUs: looked for at a release only
    holders_unknown: str = ""  # why they are not known; empty: they are, or nobody looked


class LinkFacts(_Facts, frozen=True):
    """The line to the aggregator."""

    aggregators: tuple[str, ...]
    is_connected: bool
    outbox_frames: int
    frames_dropped: int


class Status(_Answer, frozen=True, tag="status"):
    """How the agent is."""

    at: float
    node: str
    pid: int
    version: str
    simulated: bool
    driver_version: str | None
    summary: str  # one line, the same that the service manager is told
    driver: DriverFacts
    release: ReleaseFacts | None
    release_unsaved: str  # why a restart would not find it released (or resumed) as it is
    profiling: "Profiling"
    gpus: tuple[GpuFacts, ...]
    last_success_age_seconds: float | None
    samples: int
    sample_failures: dict[str, int]
    users: UsersFacts
    link: LinkFacts
    # What this agent cannot see, and why: "kernel log: ...", "holders of device files: ...".
    blind: tuple[str, ...] = ()


class Released(_Answer, frozen=True, tag="released"):
    """The driver is let go of; or will be, when the kernel lets go of the driver host."""

    release: ReleaseFacts
    unsaved: str
    took_seconds: float
    pending: str  # what the kernel does not let go of yet; empty: no handle is open
    users: UsersFacts  # from before


class Resumed(_Answer, frozen=True, tag="resumed"):
    """The driver is being taken again."""

    was_released: bool
    unsaved: str


class Profiling(_Answer, frozen=True, tag="profiling"):
    """Whether the hardware counters are left to somebody else."""

    is_paused: bool
    until: float | None


class SetHealthy(_Answer, frozen=True, tag="set_healthy"):
    """What was forgotten."""

    gpu_uuid: str
    forgotten: tuple[str, ...]  # the faults, a sentence each
    unsaved: str  # why a restart would remember them


class Mig(_Answer, frozen=True, tag="mig"):
    """What would be done, or how things are.

    What is applied goes on after the answer: it is over when no GPU with that operation is on its
    way any more.
    """

    report: MigReport


class Refusal(_Answer, frozen=True, tag="refusal"):
    """Why it is not done."""

    reason: str
    exit_code: int = int(ExitCode.REFUSED)


Answer = Status | Released | Resumed | Profiling | SetHealthy | Mig | Refusal

_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class NoAgent(StokerError):
    """Nobody answers at the socket."""

    exit_code = ExitCode.UNREACHABLE


class Refused(StokerError):
    """The agent said no, and why."""

    def __init__(self, refusal: Refusal) -> None:
        known = refusal.exit_code in set(ExitCode)
        self.exit_code = ExitCode(refusal.exit_code) if known else ExitCode.REFUSED
        super().__init__(refusal.reason)


def encode(message: Request | Answer) -> bytes:
    """Return a message as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Return the request that a line says; raises BadInput."""
    try:
        return _request_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"the request cannot be understood: {error}") from error


def decode_answer(line: bytes) -> Answer:
    """Return the answer that a line says; raises ValueError."""
    return _answer_decoder.decode(line)


def checked_path(path: Path, what: str = "socket") -> Path:
    """Return the path of a socket; raises BadInput when the kernel cannot take one so long."""
    size = len(os.fsencode(path))
    if size > PATH_BYTES_MAX:
        raise BadInput(
            f"{what}: {path} has {size} bytes, the kernel takes at most {PATH_BYTES_MAX} for a "
            "socket; name a shorter one"
        )
    return path


def is_answered(path: Path) -> bool:
    """Whether somebody listens at `path` and lets this user in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_SECONDS_MAX)
        try:
            probe.connect(os.fsencode(path))
        except OSError:
            return False
        return True


def ask(paths: Sequence[Path], request: Request, expected: type[A]) -> A:
    """Return what the first agent answers that is there; raises NoAgent, Refused, or BadInput.

    A socket that cannot be opened is passed over, and named when no other is there.
    """
    tried: list[str] = []
    for path in paths:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(ANSWER_SECONDS_MAX)
            try:
                line.connect(os.fsencode(checked_path(path)))
            except OSError as error:
                tried.append(f"{path}: {_why_not(error)}")
                continue
            answer = _talk(line, request, path)
        if isinstance(answer, Refusal):
            raise Refused(answer)
        if not isinstance(answer, expected):
            raise NoAgent(f"{path}: the agent answered something else than was asked")
        return answer
    raise NoAgent(f"no agent answers on this machine ({'; '.join(tried)})")


def _talk(line: socket.socket, request: Request, path: Path) -> Answer:
    said = bytearray()
    try:
        line.sendall(encode(request))
        while not said.endswith(b"\n") and len(said) <= ANSWER_BYTES_MAX:
            part = line.recv(65536)
            if not part:
                break
            said += part
    except TimeoutError:
        raise NoAgent(f"{path}: no answer within {ANSWER_SECONDS_MAX:g} s") from None
    except OSError as error:
        raise NoAgent(f"{path}: {error.strerror}") from error
    try:
        return decode_answer(bytes(said))
    except ValueError as error:  # as msgspec's and those of UTF-8 are
        found = "it hung up" if not said else f"its answer cannot be understood: {error}"
        raise NoAgent(f"{path}: {found}") from error


def _why_not(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens"
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, PermissionError):
        return "not for this user"
    return str(error.strerror or error)
