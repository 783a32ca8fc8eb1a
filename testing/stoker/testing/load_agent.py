"""One agent of a load generator: the production state, wire format and link to the aggregator.

What stands in for its other edges: GPUs that are made up, a reading of processes that finds none
and takes no time, and a journal that says "durable" without a disk, so that a thousand agents fit
in one process.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import assert_never

from stoker.agent.actions import (
    ReadInventory,
    ReadProcesses,
    ReleaseDriver,
    ResumeDriver,
    SaveJournal,
    SendFrame,
    SendHello,
)
from stoker.agent.events import (
    DriverChanged,
    Event,
    FrameAcked,
    InventoryRead,
    JournalSaved,
    LinkDown,
    ProcessesTaken,
    ProcessReadingBegun,
    SampleTaken,
    Started,
    Welcomed,
)
from stoker.agent.link import Link
from stoker.agent.model import DriverState, DriverStatus, Frame, NodeIdentity
from stoker.agent.state import NodeState
from stoker.agent.wire import frame_message
from stoker.core.clock import Clock
from stoker.core.errors import StokerError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.testing.load import AgentsPlan, Measure, to_micros
from stoker.testing.load_source import MovingGpus

# As the agent reads them.
PROCESSES_INTERVAL_SECONDS = 5.0


class Tally:
    """What is counted in one window, over all agents of the process."""

    def __init__(self, window: Measure) -> None:
        self._window = window
        self.sends: dict[str, list[tuple[float, float]]] = {}
        self.frames_sent = 0
        self.frames_acked = 0
        self.acks = 0
        self.message_bytes = 0
        self.ack_micros: list[int] = []
        self.lag_micros: list[int] = []

    def list_send(self, node: str, sent_at: float, sampled_at: float) -> None:
        """Note a frame with samples, if that is asked for."""
        if self._window.with_sends:
            self.sends.setdefault(node, []).append((sent_at, sampled_at))

    def covers(self, at: float) -> bool:
        """Whether that instant (monotonic) lies in the window."""
        return self._window.begins_at <= at < self._window.ends_at


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A frame that is not acknowledged yet."""

    sequence: int
    sent_at: float  # monotonic, first time
    sampled_at: float | None  # Unix; None: it has no samples


class LoadAgent:
    """One node. `run` keeps it connected, `sample` is called whenever its next sample is due."""

    def __init__(self, plan: AgentsPlan, number: int, clock: Clock) -> None:
        rng = Random(f"{plan.seed}/{number}")
        interval_seconds = 1 / plan.hz
        self.name = f"bench-{number:05d}"
        self.phase_seconds = interval_seconds * number / plan.nodes_total
        self.welcomed = asyncio.Event()  # for the first time
        self.disconnects = 0
        self.disconnect_reason = ""
        self.tally: Tally | None = None
        self.sampled_at: float | None = None  # when the newest acknowledged sample was taken (Unix)
        self._clock = clock
        self._gpus = MovingGpus(plan.gpus, interval_seconds, rng)
        self._processes_due = clock.monotonic() + rng.random() * PROCESSES_INTERVAL_SECONDS
        self._under_way: deque[_UnderWay] = deque()
        self._sent_up_to = 0
        self._link = Link((plan.target,), self._handle, ask_mig=_refuse_mig, clock=clock, rng=rng)
        identity = NodeIdentity(
            node=self.name,
            agent_version="bench",
            boot_id=f"{rng.getrandbits(128):032x}",
            simulated=True,
            pool="",
            labels={},
            interval_seconds=interval_seconds,
            process_id=f"{rng.getrandbits(128):032x}",
        )
        self._state = NodeState((), identity)
        now = clock.now()
        self._handle(Started(now))
        self._handle(InventoryRead(now, self._gpus.inventory(now)))
        self._handle(DriverChanged(now, DriverStatus(DriverState.READING)))
        self._read_processes()

    async def run(self) -> None:
        """Keep a stream to the target until cancelled."""
        await self._link.run()

    @property
    def frames_dropped(self) -> int:
        """Frames that the outbox had to let go since the beginning."""
        return self._state.view().frames_dropped

    def awaits_ack(self, tally: Tally) -> bool:
        """Whether a frame of that window is not acknowledged yet."""
        return any(tally.covers(frame.sent_at) for frame in self._under_way)

    def sample(self, due: float) -> None:
        """Take the sample that was due at that time (monotonic), and now and then the processes."""
        now = self._clock.now()
        self._handle(SampleTaken(now, self._gpus.readings(now)))
        lag = self._clock.monotonic() - due
        if self.tally is not None and self.tally.covers(due):
            self.tally.lag_micros.append(to_micros(lag))
        if due >= self._processes_due:
            self._processes_due = due + PROCESSES_INTERVAL_SECONDS
            self._read_processes()

    def _read_processes(self) -> None:
        self._handle(ProcessReadingBegun(self._clock.now()))
        now = self._clock.now()
        self._handle(ProcessesTaken(now, started_at=now, processes=()))

    def _handle(self, event: Event) -> None:
        """Tell the state what happened, and do what it asks for."""
        match event:
            case FrameAcked(_, sequence):
                self._count_acks(sequence)
            case Welcomed():
                self.welcomed.set()
            case LinkDown(_, reason):
                self.disconnects += 1
                self.disconnect_reason = reason
            case _:
                pass
        for action in self._state.handle(event, self._clock.monotonic()):
            match action:
                case SendHello(hello):
                    self._link.send_hello(hello)
                case SendFrame(frame):
                    self._count_frame(frame)
                    self._link.send_frame(frame)
                case SaveJournal(ticket):
                    self._handle(JournalSaved(self._clock.now(), ticket))
                case ReadProcesses():
                    self._read_processes()
                case ReadInventory():
                    now = self._clock.now()
                    self._handle(InventoryRead(now, self._gpus.inventory(now)))
                case ReleaseDriver() | ResumeDriver():
                    raise AssertionError(f"nobody asks a load agent for {action}")
                case _:
                    assert_never(action)

    def _count_frame(self, frame: Frame) -> None:
        if frame.sequence <= self._sent_up_to:
            return  # it was resent on a new stream
        self._sent_up_to = frame.sequence
        now = self._clock.monotonic()
        sampled_at = frame.at if frame.samples else None
        self._under_way.append(_UnderWay(frame.sequence, now, sampled_at))
        if self.tally is not None and self.tally.covers(now):
            self.tally.frames_sent += 1
            self.tally.message_bytes += frame_message(frame).ByteSize()
            if sampled_at is not None:
                self.tally.list_send(self.name, now, sampled_at)

    def _count_acks(self, sequence: int) -> None:
        now = self._clock.monotonic()
        of_window = 0
        while self._under_way and self._under_way[0].sequence <= sequence:
            frame = self._under_way.popleft()
            self.sampled_at = frame.sampled_at or self.sampled_at
            if self.tally is not None and self.tally.covers(frame.sent_at):
                of_window += 1
                self.tally.ack_micros.append(to_micros(now - frame.sent_at))
        if self.tally is not None and of_window:
            self.tally.frames_acked += of_window
            self.tally.acks += 1


async def _refuse_mig(_ask: MigAsk) -> MigReport:
    raise StokerError("the GPUs of a load generator cannot be partitioned")
