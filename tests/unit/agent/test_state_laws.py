"""Laws of the node's state, whatever breaks: links, disks, driver, either process, in any order.

A small aggregator stands beside the real state. It keeps its grants through restarts, commands what
a node should hold, and takes an allocation for gone by the rule of the protocol. What must never
happen: that it believes an allocation gone which the node holds, or is about to hold.
"""

from collections import deque
from dataclasses import dataclass
from random import Random

import pytest

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
    CommandReceived,
    Event,
    FrameAcked,
    InventoryRead,
    JournalFailed,
    JournalSaved,
    LinkDown,
    LinkUp,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
    ReleaseAsked,
    ReleaseTimePassed,
    ResumeAsked,
    SampleTaken,
    Started,
    Welcomed,
)
from stoker.agent.facts import Fact
from stoker.agent.model import Command, Drop, Frame, HeldAllocation, Hello, Hold, NodeIdentity
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory
from stoker.agent.records import AllocationDropped, AllocationHeld, Durable, Record
from stoker.agent.state import NodeState

GPUS = ("GPU-0", "GPU-1")
MEMORY = 4
INVENTORY = Inventory(
    at=0.0,
    driver_version=None,
    nvml_version=None,
    cuda_driver_version=None,
    simulated=True,
    gpus=tuple(GpuIdentity(i, uuid, "T4", MEMORY) for i, uuid in enumerate(GPUS)),
)


@dataclass
class Grant:
    """An allocation as the aggregator keeps it."""

    allocation: HeldAllocation
    is_released: bool = False


class Aggregator:
    """Grants durably; all else it knows only from the stream."""

    def __init__(self) -> None:
        self.grants: dict[str, Grant] = {}
        self.gone: set[str] = set()
        self.acked: dict[str, int] = {}  # by incarnation; survives, as the ledger's does
        self.incarnation = ""
        self.held: set[str] | None = None
        self.sent: dict[str, tuple[int, Command]] = {}
        self.commands = 0
        self.commands_done = 0

    def forget(self) -> None:
        """The stream is gone, or the process."""
        self.held = None
        self.sent.clear()
        self.commands = self.commands_done = 0

    def has_room(self, wanted: HeldAllocation) -> bool:
        others = [g.allocation for g in self.grants.values()]
        for uuid in wanted.gpu_uuids:
            tenants = [each for each in others if uuid in each.gpu_uuids]
            if tenants and (wanted.memory_bytes is None or tenants[0].memory_bytes is None):
                return False
            if sum(t.memory_bytes or 0 for t in tenants) + (wanted.memory_bytes or 0) > MEMORY:
                return False
        return True

    def take_hello(self, hello: Hello) -> Welcomed:
        self.forget()
        self.incarnation = hello.incarnation
        self.held = {each.id for each in hello.held}
        self.settle()
        return Welcomed(0.0, self.acked.get(hello.incarnation, 0))

    def take_frame(self, frame: Frame) -> FrameAcked:
        # Numbers never repeat within a life: a repeated one would be taken for known.
        assert frame.sequence > self.acked.get(self.incarnation, 0)
        self.acked[self.incarnation] = frame.sequence
        if frame.held is not None:
            self.held = {each.id for each in frame.held}
        self.commands_done = max(self.commands_done, frame.commands_done)
        for refusal in frame.refusals:
            if refusal.allocation_id in self.grants:
                self.grants[refusal.allocation_id].is_released = True
        self.settle()
        return FrameAcked(0.0, frame.sequence)

    def settle(self) -> None:
        """End what was released and is certainly not held."""
        assert self.held is not None
        for id_, grant in list(self.grants.items()):
            number, last = self.sent.get(id_, (0, None))
            is_over = last is None or (isinstance(last, Drop) and self.commands_done >= number)
            if grant.is_released and id_ not in self.held and is_over:
                del self.grants[id_]
                self.gone.add(id_)

    def command(self) -> list[CommandReceived]:
        """Say what differs between what is granted and what is held."""
        if self.held is None:
            return []
        said: list[CommandReceived] = []
        for id_ in sorted(self.grants.keys() | self.held):
            grant = self.grants.get(id_)
            last = self.sent.get(id_, (0, None))[1]
            is_held = id_ in self.held or isinstance(last, Hold)
            if grant is not None and not grant.is_released:
                wanted: Command | None = None if is_held else Hold(grant.allocation)
            else:
                wanted = Drop(id_, "") if is_held else None
            if wanted is not None and not isinstance(last, type(wanted)):
                self.commands += 1
                self.sent[id_] = (self.commands, wanted)
                said.append(CommandReceived(0.0, self.commands, wanted))
        return said


# How often what is done, of all steps.
WEIGHTS = {
    "flow": 40,
    "grant": 10,
    "release": 8,
    "begin_reading": 12,
    "end_reading": 12,
    "tick": 6,
    "connect": 6,
    "fail_disk": 2,
    "read_inventory": 1,
    "release_driver": 1,
    "resume_driver": 1,
    "cut": 2,
    "crash_node": 1,
    "crash_aggregator": 1,
}


class World:
    """One node, one aggregator, and everything between them that can break."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.aggregator = Aggregator()
        self.disk: list[Record] = []
        self.ids = 0
        self.processes = 0
        self.now = 0.0
        self.start_node()

    def run(self, steps: int) -> None:
        for step in self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps):
            getattr(self, step)()
            self.check()
        self.come_to_rest()
        self.check()

    def start_node(self) -> None:
        self.processes += 1
        identity = NodeIdentity("n", "", "", True, "", {}, 1.0, f"process-{self.processes}")
        self.state = NodeState(tuple(self.disk), identity)
        self.saves: deque[SaveJournal] = deque()
        self.up: deque[Hello | Frame] = deque()
        self.down: deque[Event] = deque()
        self.is_linked = False
        self.is_reading = False
        self.is_driver_released = False
        self.happen(Started(self.now))
        self.advance("disk")

    def happen(self, event: Event) -> None:
        for action in self.state.handle(event, self.now):
            match action:
                case SaveJournal():
                    self.saves.append(action)
                case SendHello(hello):
                    self.up.append(hello)
                case SendFrame(frame):
                    self.up.append(frame)
                case ReadProcesses() | ReadInventory():
                    pass  # readings begin at any time here
                case ReleaseDriver():
                    self.is_driver_released = True
                case ResumeDriver():
                    self.is_driver_released = False

    # --- what people do

    def grant(self) -> None:
        gpus = self.rng.sample(GPUS, self.rng.randint(1, len(GPUS)))
        memory = self.rng.choice([None, *range(1, MEMORY + 1)])
        uuids = tuple(gpus) if memory is None else (gpus[0],)
        wanted = HeldAllocation(f"a{self.ids}", uuids, memory, "", 1.0, 0.0)
        if self.aggregator.has_room(wanted):
            self.ids += 1
            self.aggregator.grants[wanted.id] = Grant(wanted)
            self.command()

    def release(self) -> None:
        if self.aggregator.grants:
            id_ = self.rng.choice(sorted(self.aggregator.grants))
            self.aggregator.grants[id_].is_released = True
            if self.aggregator.held is not None:
                self.aggregator.settle()
            self.command()

    def command(self) -> None:
        self.down += self.aggregator.command()

    # --- what the node's surroundings do

    def tick(self) -> None:
        self.now += 1.0
        facts = {Fact.MEMORY_USED_BYTES: 1.0}
        readings = tuple(GpuReading(uuid, self.now, facts=facts) for uuid in GPUS)
        self.happen(ReleaseTimePassed(self.now))
        self.happen(SampleTaken(self.now, readings))

    def release_driver(self) -> None:
        until = self.rng.choice([None, self.now + self.rng.uniform(0.0, 20.0)])
        self.happen(ReleaseAsked(self.now, until, "root"))

    def resume_driver(self) -> None:
        self.happen(ResumeAsked(self.now, "root"))

    def read_inventory(self) -> None:
        self.happen(InventoryRead(self.now, INVENTORY))

    def begin_reading(self) -> None:
        self.happen(ProcessReadingBegun(self.now))
        self.is_reading = True

    def end_reading(self) -> None:
        if self.is_reading:
            self.is_reading = False
            unread = tuple(uuid for uuid in GPUS if self.rng.random() < 0.1)
            if self.rng.random() < 0.2:
                self.happen(ProcessReadingFailed(self.now, ""))
            else:
                self.happen(ProcessesTaken(self.now, self.now, (), unread))

    def fail_disk(self) -> None:
        if self.saves:
            save = self.saves.popleft()
            self.happen(JournalFailed(self.now, save.ticket, "no room"))

    def flow(self) -> None:
        """Let some of what is under way arrive, in some order."""
        for step in self.rng.choices(["disk", "up", "down"], k=self.rng.randint(1, 8)):
            self.advance(step)

    def advance(self, step: str) -> bool:
        """Let one thing that is under way arrive; return whether there was any."""
        if step == "disk" and self.saves:
            save = self.saves.popleft()
            self.disk.extend(save.records)
            self.happen(JournalSaved(self.now, save.ticket))
        elif step == "up" and self.up:
            message = self.up.popleft()
            if isinstance(message, Hello):
                self.down.append(self.aggregator.take_hello(message))
            else:
                self.down.append(self.aggregator.take_frame(message))
            self.command()
        elif step == "down" and self.down:
            self.happen(self.down.popleft())
        else:
            return False
        return True

    # --- what breaks

    def connect(self) -> None:
        if not self.is_linked:
            self.is_linked = True
            self.happen(LinkUp(self.now))

    def cut(self) -> None:
        if self.is_linked:
            self.is_linked = False
            self.up.clear()
            self.down.clear()
            self.aggregator.forget()
            self.happen(LinkDown(self.now, "cut"))

    def crash_node(self) -> None:
        if self.saves and self.rng.random() < 0.5:  # between the disk's answer and ours
            self.disk.extend(self.saves.popleft().records)
        self.aggregator.forget()
        self.start_node()

    def crash_aggregator(self) -> None:
        """It comes back with its grants, and without having counted any frame."""
        self.aggregator.acked.clear()
        self.cut()
        self.aggregator.forget()

    # --- what holds

    @property
    def possible(self) -> dict[str, HeldAllocation]:
        """What the node holds, on disk or in memory, or is about to."""
        held = {each.id: each for each in self.state.view().held}
        held |= Durable().after(self.disk).held
        for save in self.saves:
            for record in save.records:
                if isinstance(record, AllocationHeld):
                    held[record.allocation.id] = record.allocation
        return held

    def check(self) -> None:
        possible = self.possible
        assert not self.aggregator.gone & possible.keys(), "believed gone, and it is there"
        assert possible.keys() <= self.aggregator.grants.keys(), "never granted, and it is there"
        for uuid in GPUS:
            tenants = [each for each in possible.values() if uuid in each.gpu_uuids]
            assert len(tenants) <= 1 or all(each.memory_bytes for each in tenants)
            assert sum(each.memory_bytes or 0 for each in tenants) <= MEMORY
        if not self.saves:
            assert {e.id for e in self.state.view().held} == Durable().after(self.disk).held.keys()
        self.check_release()

    def check_release(self) -> None:
        """The driver is released when somebody wants it so; and then nothing is told of it."""
        view = self.state.view()
        assert self.is_driver_released == (view.release is not None)
        if view.release is not None:
            assert view.samples == ()
            assert view.processes is None or not view.processes.processes
        if not view.release_unsaved:
            assert Durable().after(self.disk).release == view.release

    def come_to_rest(self) -> None:
        """Once nothing breaks any more, the node holds exactly what is granted."""
        self.connect()
        self.resume_driver()
        for _ in range(4):
            self.read_inventory()
            self.begin_reading()
            self.is_reading = False
            self.happen(ProcessesTaken(self.now, self.now, ()))
            self.tick()
            while self.advance("disk") or self.advance("up") or self.advance("down"):
                pass
        grants = self.aggregator.grants
        assert not any(grant.is_released for grant in grants.values())
        assert {each.id for each in self.state.view().held} == grants.keys()
        view = self.state.view()
        assert (view.outbox_frames, view.connected) == (0, True)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_breaks_nothing_is_believed_gone_that_is_held(seed: int) -> None:
    world = World(seed)
    world.run(steps=1000)
    assert len(world.aggregator.gone) > 10, "the story was too quiet to show anything"


def test_records_applied_twice_equal_once() -> None:
    a = HeldAllocation("a", ("GPU-0",), None, "", 1.0, 0.0)
    records: list[Record] = [AllocationHeld(a), AllocationDropped("b"), AllocationHeld(a)]
    once = Durable().after(records)
    assert once.after(records) == once
    assert Durable().after(once.records()) == once
