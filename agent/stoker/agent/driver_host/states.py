"""What the driver host can be doing, what happened to it so far, and how patient one is with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker.agent.driver import DriverError, HostStuck, Suspect
from stoker.agent.driver_host.watch import Limits, Note

# Functions told apart by `HostCounters.hangs_by_function`; further ones count as OTHER_FUNCTIONS.
HUNG_FUNCTIONS_MAX = 64
OTHER_FUNCTIONS = "other"
# A question of many calls may take so many times as long as one call may.
_CALLS_PER_QUESTION = 10


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the driver host may take for what, and how soon it gets another chance."""

    # One call of a host that starts: without persistence mode nvmlInit takes seconds per GPU.
    start_seconds: float = 60.0
    call_seconds: float = 1.0  # one call of a host that runs; also the wait for one's turn
    end_grace_seconds: float = 0.75  # between asking a host to end and killing it
    # The same when somebody waits for the devices: with `kill_seconds` it is below a second.
    release_grace_seconds: float = 0.35
    kill_seconds: float = 0.4  # after which a killed host counts as held by the kernel
    restart_seconds_min: float = 0.1  # doubled with each failure in a row
    restart_seconds_max: float = 30.0
    settled_seconds: float = 60.0  # a host that lived so long had no part in earlier failures
    # Of what was left alone or lost; doubled each time that it was tried in vain.
    retrial_seconds_min: float = 30.0
    retrial_seconds_max: float = 1800.0

    @property
    def start_limits(self) -> Limits:
        """Of each question until a host runs."""
        return Limits(self.start_seconds, self.start_seconds * _CALLS_PER_QUESTION)

    @property
    def limits(self) -> Limits:
        """Of each question to a host that runs."""
        return Limits(self.call_seconds, self.call_seconds * _CALLS_PER_QUESTION)


@dataclass(frozen=True, slots=True)
class Starting:
    """A host is coming up; `pid` is None while there is not even a process."""

    pid: int | None
    since: float


@dataclass(frozen=True, slots=True)
class Running:
    """A host answers."""

    pid: int
    since: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """A host was asked to end, and is killed if it does not."""

    pid: int
    since: float


@dataclass(frozen=True, slots=True)
class Unreaped:
    """A host was killed and is held by the kernel: no other may start."""

    pid: int
    since: float
    process_state: str | None = None  # the kernel's letter: "D" is uninterruptible sleep
    function: str | None = None  # the call that it hangs in
    gpu: str | None = None  # which that call is about: a UUID, or "GPU 3"

    @property
    def reason(self) -> str:
        """What there is to wait for."""
        if self.process_state == "D":
            held = "in uninterruptible sleep"
        else:
            held = f"was killed and has not ended (state {self.process_state or 'unknown'})"
        within = f", in {self.function}" if self.function else ""
        about = f" of {self.gpu}" if self.function and self.gpu else ""
        return f"pending: PID {self.pid} {held}{within}{about}"


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no host; another one starts at `retry_at`."""

    error: DriverError
    retry_at: float


@dataclass(frozen=True, slots=True)
class Released:
    """There is no host, because somebody wants the devices free."""

    since: float


HostState = Starting | Running | Stopping | Unreaped | Failed | Released


def stuck(state: Unreaped) -> HostStuck:
    """Return the error of who asks while the kernel holds a host."""
    return HostStuck(
        f"{state.reason}; the driver holds it, and no other driver host is started until it is gone"
    )


def why_busy(state: HostState, call: Note | None) -> str:
    """Say why a host in this state does not take a question now."""
    match state:
        case Starting(pid=None):
            return "the driver host is not started yet"
        case Starting(pid=pid):
            return f"driver host {pid} is starting{f', in {call.function}' if call else ''}"
        case Stopping(pid=pid):
            return f"driver host {pid} is being ended"
        case _:
            return "the driver host is busy with another question"


@dataclass(frozen=True, slots=True)
class HostCounters:
    """What happened since the agent started."""

    starts_total: int = 0
    restarts_total: int = 0  # starts after a failure, not after a release or a renewal
    renewals_total: int = 0  # hosts replaced to look for what was lost; no failure
    timeouts_total: int = 0  # questions that the driver did not answer in time
    failures_total: int = 0  # questions that were answered by an error, or could not be asked
    crashes_total: int = 0  # hosts that stumbled inside of the library
    kills_total: int = 0  # hosts that did not end when asked
    unreaped_total: int = 0  # hosts that did not end when killed
    inventory_changes_total: int = 0  # times that the GPUs were not those found before
    # Of the timeouts those in a call: by the driver's function, `HUNG_FUNCTIONS_MAX` of them.
    hangs_by_function: Mapping[str, int] = field(default_factory=dict[str, int])


def with_hang(hangs: Mapping[str, int], function: str) -> Mapping[str, int]:
    """Return the counts with one more hang in this function."""
    if function not in hangs and len(hangs) >= HUNG_FUNCTIONS_MAX:
        function = OTHER_FUNCTIONS
    return {**hangs, function: hangs.get(function, 0) + 1}


@dataclass(frozen=True, slots=True)
class HostReport:
    """The driver host as an operator wants to know it."""

    state: HostState
    is_wanted: bool  # False: it was released, or is to be as soon as it can
    function: str | None  # the call into the driver that is under way
    gpu: str | None  # which that call is about: a UUID, or "GPU 3"
    suspects: tuple[Suspect, ...]  # left alone because a host hung on them
    awaited_gpus: tuple[str, ...]  # lost ones that are looked for now and then
    is_dcgm_left_alone: bool  # because a host hung in it
