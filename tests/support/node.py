"""A node's state for stories: a clock, a disk that answers at once unless told not to, a wire."""

from collections.abc import Iterable

from stoker.agent.actions import (
    Action,
    ReadInventory,
    ReadProcesses,
    ReleaseDriver,
    ResumeDriver,
    SaveJournal,
    SendFrame,
    SendHello,
)
from stoker.agent.events import (
    CommandReceived,
    DriverChanged,
    Event,
    FrameAcked,
    InventoryRead,
    JournalFailed,
    JournalSaved,
    LinkDown,
    LinkUp,
    ProcessesTaken,
    ProcessReadingBegun,
    ReleaseAsked,
    ResumeAsked,
    SampleTaken,
    Started,
    Welcomed,
)
from stoker.agent.facts import Fact
from stoker.agent.model import (
    DriverState,
    DriverStatus,
    Drop,
    Frame,
    HeldAllocation,
    Hello,
    Hold,
    Host,
    NodeIdentity,
    NodeView,
    ProcessSeen,
)
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory
from stoker.agent.records import (
    Record,
)
from stoker.agent.state import (
    NodeState,
)

GIB = 2**30
READING = DriverStatus(DriverState.READING)


def gpu(index: int) -> GpuIdentity:
    return GpuIdentity(
        index=index, uuid=f"GPU-{index}", model="Tesla T4", memory_total_bytes=16 * GIB
    )


def inventory(*indices: int) -> Inventory:
    return Inventory(
        at=0.0,
        driver_version="580.1",
        nvml_version=None,
        cuda_driver_version="13.0",
        simulated=True,
        gpus=tuple(map(gpu, indices)),
    )


def reading(index: int, at: float) -> GpuReading:
    facts = {Fact.MEMORY_USED_BYTES: float(GIB), Fact.POWER_WATTS: 20.0}
    return GpuReading(uuid=f"GPU-{index}", at=at, facts=facts)


def allocation(
    id_: str, *gpus: int, memory: int | None = None, since: float = 0.0
) -> HeldAllocation:
    return HeldAllocation(
        id=id_,
        gpu_uuids=tuple(f"GPU-{index}" for index in gpus),
        memory_bytes=memory,
        holder="ann",
        ttl_seconds=600.0,
        held_since=since,
    )


class Node:
    """A state with a clock, a disk that answers at once unless told otherwise, and a wire."""

    def __init__(
        self,
        records: Iterable[Record] = (),
        process_id: str = "first",
        now: float = 1000.0,
        host: Host | None = None,
        *,
        awaits_mig: bool = False,
    ) -> None:
        self.disk: list[Record] = list(records)
        self.disk_works = True
        self.disk_answers = True
        self.unanswered: list[SaveJournal] = []
        self.now = now
        self.commands = 0
        self.state = NodeState(
            tuple(self.disk),
            NodeIdentity("n1", "0.1.0", "boot", True, "", {}, 1.0, process_id, host),
            awaits_mig=awaits_mig,
        )
        self.frames: list[Frame] = []
        self.hellos: list[Hello] = []
        self.asked_at_start = self.happen(Started(self.now))

    def happen(self, event: Event) -> list[Action]:
        """Tell the state; return what it asked for beside saves that were done at once."""
        asked: list[Action] = []
        todo = list(self.state.handle(event, self.now - 1000.0))
        while todo:
            action = todo.pop(0)
            match action:
                case SaveJournal(ticket, records) if not self.disk_answers:
                    self.unanswered.append(action)
                    asked.append(action)
                case SaveJournal(ticket, records) if self.disk_works:
                    self.disk.extend(records)
                    todo += self.state.handle(JournalSaved(self.now, ticket), self.now - 1000.0)
                case SaveJournal(ticket, _):
                    failure = JournalFailed(self.now, ticket, "no room")
                    todo += self.state.handle(failure, self.now - 1000.0)
                case SendFrame(frame):
                    self.frames.append(frame)
                    asked.append(action)
                case SendHello(hello):
                    self.hellos.append(hello)
                case ReadProcesses() | ReadInventory() | ReleaseDriver() | ResumeDriver():
                    asked.append(action)
        return asked

    def answer_saves(self) -> list[Action]:
        saves, self.unanswered, self.disk_answers = self.unanswered, [], True
        asked: list[Action] = []
        for save in saves:
            self.disk.extend(save.records)
            asked += self.happen(JournalSaved(self.now, save.ticket))
        return asked

    def fail_saves(self) -> list[Action]:
        saves, self.unanswered, self.disk_answers = self.unanswered, [], True
        asked: list[Action] = []
        for save in saves:
            asked += self.happen(JournalFailed(self.now, save.ticket, "no room"))
        return asked

    def reconnect(self) -> Hello:
        self.happen(LinkDown(self.now, "gone"))
        self.commands = 0
        return self.connect()

    def connect(self, acked: int = 0) -> Hello:
        self.happen(LinkUp(self.now))
        self.happen(Welcomed(self.now, acked))
        return self.hellos[-1]

    def ready(self, *gpus: int) -> "Node":
        """Bring it to where it is connected and everything was told and acknowledged."""
        self.happen(InventoryRead(self.now, inventory(*(gpus or (0, 1)))))
        self.happen(DriverChanged(self.now, READING))
        self.connect()
        self.read_processes()
        self.tick()
        self.ack()
        self.frames.clear()
        return self

    def tick(self, *gpus: int) -> list[Action]:
        self.now += 1.0
        readings = tuple(reading(index, self.now) for index in gpus or (0, 1))
        return self.happen(SampleTaken(self.now, readings))

    def ack(self) -> None:
        self.happen(FrameAcked(self.now, self.frames[-1].sequence))

    def hold(self, wanted: HeldAllocation) -> list[Action]:
        self.commands += 1
        return self.happen(CommandReceived(self.now, self.commands, Hold(wanted)))

    def drop(self, id_: str) -> list[Action]:
        self.commands += 1
        return self.happen(CommandReceived(self.now, self.commands, Drop(id_, "released")))

    def release(self, seconds: float | None = None, by: str = "root") -> list[Action]:
        until = None if seconds is None else self.now + seconds
        return self.happen(ReleaseAsked(self.now, until, by))

    def resume(self) -> list[Action]:
        return self.happen(ResumeAsked(self.now, "root"))

    def read_processes(
        self, *seen: ProcessSeen, unread: tuple[str, ...] = (), unnamed: bool = False
    ) -> list[Action]:
        self.happen(ProcessReadingBegun(self.now))
        return self.happen(ProcessesTaken(self.now, self.now, seen, unread, unnamed))

    @property
    def view(self) -> NodeView:
        return self.state.view()

    @property
    def held(self) -> set[str]:
        return {each.id for each in self.state.view().held}


def held_in(frame: Frame) -> set[str] | None:
    return None if frame.held is None else {each.id for each in frame.held}
