"""Numbered frames: what the next one must carry, and the outbox that keeps them until acknowledged.

What frames report beside telemetry is level-triggered: a part of the report (`Part`) is owed until
a frame of this stream carries it, whole. After every welcome all parts are owed, because the
aggregator behind it may know nothing; therefore a frame that waits for another stream keeps only
its telemetry, and an older truth never arrives after a newer one. Commands belong to their stream
too: on a new one the aggregator says again what it still wants.

The outbox is bounded in two ways. At most `FRAMES_MAX` frames are kept: ten minutes of one-second
telemetry survive a restart of the aggregator whole. Beyond that the oldest frame that is only
telemetry goes; if there is none, the oldest frame is merged into the next, so that only telemetry
is ever lost. At most `WINDOW` frames are under way on a stream without an acknowledgement, so that
a slow aggregator holds back the outbox and does not fill the buffers of the stream.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from stoker.agent.model import (
    DriverStatus,
    Frame,
    HeldAllocation,
    HoldRefusal,
    NumberedInventory,
    NumberedSample,
    ProcessTable,
)
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.verdicts import GpuHealth

FRAMES_MAX = 600
WINDOW = 64
# Refusals that wait for a frame. Beyond that the oldest goes: the aggregator still wants it, and
# says so again on its next stream.
REFUSALS_MAX = 1024


class Outbox:
    """Frames in the order of their numbers; those that were sent on this stream come first."""

    def __init__(self, frames_max: int = FRAMES_MAX, window: int = WINDOW) -> None:
        assert frames_max > window > 0, "a full outbox must have a frame that is not under way"
        self._frames_max = frames_max
        self._window = window
        self._sent: deque[Frame] = deque()
        self._unsent: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._sent) + len(self._unsent)

    @property
    def first_sequence(self) -> int | None:
        """The lowest number kept."""
        queue = self._sent or self._unsent
        return queue[0].sequence if queue else None

    def add(self, frame: Frame) -> bool:
        """Keep a frame whose number is above all others; return whether another had to go."""
        self._unsent.append(frame)
        if len(self) <= self._frames_max:
            return False
        for queue in (self._sent, self._unsent):
            for place, old in enumerate(queue):
                if old.is_telemetry_only and old is not frame:
                    del queue[place]
                    return True
        oldest = self._unsent.popleft()
        self._unsent[0] = oldest.merged_into(self._unsent[0])
        return True

    def take_due(self) -> tuple[Frame, ...]:
        """Return the frames to send now on the stream, which from here on count as sent."""
        due: list[Frame] = []
        while self._unsent and len(self._sent) < self._window:
            frame = self._unsent.popleft()
            self._sent.append(frame)
            due.append(frame)
        return tuple(due)

    def rewind(self) -> None:
        """Prepare for another stream: nothing was sent on it; of the frames telemetry remains."""
        frames = [frame.only_telemetry() for frame in (*self._sent, *self._unsent)]
        self._sent.clear()
        self._unsent = deque(frames)

    def acknowledge(self, sequence: int) -> None:
        """Let go of the frames up to and including `sequence`."""
        for queue in (self._sent, self._unsent):
            while queue and queue[0].sequence <= sequence:
                queue.popleft()


class Part(Enum):
    """What a frame may carry beside telemetry and refusals; each is always told whole."""

    INVENTORY = auto()
    HELD = auto()
    DRIVER = auto()
    PROCESSES = auto()
    HEALTH = auto()
    MIG = auto()


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to tell now, whether it is owed or not."""

    inventory: NumberedInventory | None
    held: tuple[HeldAllocation, ...]
    driver: DriverStatus
    processes: ProcessTable | None
    health: tuple[GpuHealth, ...] = ()
    mig: tuple[GpuMigStatus, ...] | None = ()  # None: it is not known yet


class LinkStatus(Enum):
    """How far the talk with the aggregator has come."""

    DOWN = auto()
    GREETED = auto()  # the hello is said, the welcome has not come
    WELCOMED = auto()


@dataclass(frozen=True, slots=True)
class _Parting:
    """An allocation that the node let go of, until the aggregator has said that it knows."""

    allocation: HeldAllocation
    told_in: int | None = None  # the frame of this stream that does not list it any more


class Reporter:
    """What is under way to the aggregator, and what is still to be said."""

    def __init__(self, next_sequence: int) -> None:
        self.next_sequence = next_sequence
        self.link = LinkStatus.DOWN
        self.frames_dropped = 0
        self.processes_told_at = float("-inf")  # monotonic
        self._outbox = Outbox()
        self._owed: set[Part] = set()
        self._refusals: dict[str, HoldRefusal] = {}  # by allocation, oldest first
        self._partings: dict[str, _Parting] = {}  # by id
        self._last_command = 0
        self._undone: dict[str, int] = {}  # ids of commands that are under way, by allocation

    @property
    def outbox_frames(self) -> int:
        """How many frames are kept."""
        return len(self._outbox)

    @property
    def first_sequence(self) -> int:
        """The lowest number kept, or the next one."""
        first = self._outbox.first_sequence
        return self.next_sequence if first is None else first

    @property
    def parting(self) -> Mapping[str, HeldAllocation]:
        """What was let go of, and the aggregator may not know it."""
        return {id_: each.allocation for id_, each in self._partings.items()}

    @property
    def is_due(self) -> bool:
        """Whether something is to be said at once, and there is somebody to say it to."""
        return self.link is LinkStatus.WELCOMED and bool(self._owed or self._refusals)

    @property
    def commands_done(self) -> int:
        """Every command of this stream up to this one is carried out, refused, or seen in `held`.

        A drop of what is held counts at once: until it is verified, `held` lists the allocation. A
        drop of what is not held counts once processes were read: whoever was promised the GPUs
        may have used them although the hold never came.
        """
        return min(self._undone.values(), default=self._last_command + 1) - 1

    def owe(self, *parts: Part) -> None:
        """Note that these parts are to be told."""
        self._owed.update(parts)

    def refuse(self, allocation_id: str, reason: str) -> None:
        """Note that a hold is refused, which also settles it."""
        self.settle(allocation_id)
        if len(self._refusals) >= REFUSALS_MAX:
            del self._refusals[next(iter(self._refusals))]
        self._refusals[allocation_id] = HoldRefusal(allocation_id, reason)

    def receive(self, command: int, unsettled: str | None) -> None:
        """Note a command of this stream; `unsettled`: the allocation that it holds up."""
        self._last_command = command
        if unsettled is not None:
            self._undone[unsettled] = command

    def settle(self, allocation_id: str) -> None:
        """Note that no command about an allocation is under way any more."""
        self._undone.pop(allocation_id, None)

    def part_with(self, allocation: HeldAllocation) -> None:
        """Note that an allocation is gone, to be told with the processes that were looked at."""
        self._partings[allocation.id] = _Parting(allocation)
        self.owe(Part.HELD, Part.PROCESSES)

    def greet(self) -> None:
        """Note that the hello goes out."""
        assert self.link is LinkStatus.DOWN, "a stream came up before the last one was down"
        self.link = LinkStatus.GREETED

    def resume(self, acked_sequence: int) -> None:
        """Note the welcome; what is kept beyond `acked_sequence` is due, then everything anew."""
        self.acknowledge(acked_sequence)
        # The aggregator has counted further when the disk lost what had been reserved.
        self.next_sequence = max(self.next_sequence, acked_sequence + 1)
        self.link = LinkStatus.WELCOMED
        self.owe(*Part)

    def hang_up(self) -> None:
        """Note that the stream is gone, and with it what was asked and not yet said on it."""
        self.link = LinkStatus.DOWN
        self._outbox.rewind()
        self._refusals.clear()
        self._last_command = 0
        self._undone.clear()
        self._partings = {i: replace(each, told_in=None) for i, each in self._partings.items()}

    def acknowledge(self, sequence: int) -> None:
        """Let go of what the aggregator has taken in."""
        self._outbox.acknowledge(sequence)
        self._partings = {
            id_: each
            for id_, each in self._partings.items()
            if each.told_in is None or each.told_in > sequence
        }

    def add_frame(
        self, at: float, monotonic: float, samples: Iterable[NumberedSample], report: Report
    ) -> None:
        """Put the next frame into the outbox; it carries what is owed, if a stream is up."""
        frame = Frame(
            sequence=self.next_sequence,
            at=at,
            monotonic_seconds=monotonic,
            samples=tuple(samples),
            frames_dropped=self.frames_dropped,
        )
        self.next_sequence += 1
        if self.link is LinkStatus.WELCOMED:
            frame = self._with_parts(frame, report)
        if self._outbox.add(frame):
            self.frames_dropped += 1

    def take_due(self) -> tuple[Frame, ...]:
        """Return the frames to send now."""
        return self._outbox.take_due() if self.link is LinkStatus.WELCOMED else ()

    def _with_parts(self, frame: Frame, report: Report) -> Frame:
        owed, self._owed = self._owed, set()
        refusals, self._refusals = tuple(self._refusals.values()), {}
        if Part.PROCESSES in owed:
            self.processes_told_at = frame.monotonic_seconds
        if Part.HELD in owed:
            self._partings = {
                id_: replace(each, told_in=each.told_in or frame.sequence)
                for id_, each in self._partings.items()
            }
        return replace(
            frame,
            processes=report.processes if Part.PROCESSES in owed else None,
            held=report.held if Part.HELD in owed else None,
            refusals=refusals,
            inventory=report.inventory if Part.INVENTORY in owed else None,
            driver=report.driver if Part.DRIVER in owed else None,
            health=report.health if Part.HEALTH in owed else None,
            mig=report.mig if Part.MIG in owed else None,
            commands_done=self.commands_done,
        )
