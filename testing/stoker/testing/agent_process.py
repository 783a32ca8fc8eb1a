"""The agent's process in a simulated world: the real `NodeState`, journal codec and wire, on a
simulated host.
"""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from stoker.agent import events as e
from stoker.agent import wire
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
from stoker.agent.journal import decode_batch, encode_batch
from stoker.agent.model import DriverState, HeldAllocation, NodeIdentity, NodeView
from stoker.agent.records import AllocationHeld, Durable, Record
from stoker.agent.state import NodeState
from stoker.agent.verdicts import Check
from stoker.core.errors import StokerError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.testing.calls import AGGREGATOR, CONNECT, Failed, packet, read_packet
from stoker.testing.disk import Disk
from stoker.testing.driver_host import DriverHost
from stoker.testing.machine import Machine
from stoker.testing.mig_agent import MigLife, MigNode
from stoker.testing.network import End
from stoker.testing.process import Process, Surroundings
from stoker.testing.witness import Witness
from stoker.v1 import agent_pb2

PROCESS_READING_SECONDS = (0.005, 0.05)
PROCESS_INTERVAL_SECONDS = 5.0
INVENTORY_INTERVAL_SECONDS = 3.0
# How often a release is looked at that may have come to its end.
RELEASE_TICK_SECONDS = 0.5
REDIAL_SECONDS = (0.1, 2.0)
WELCOME_PATIENCE_SECONDS = 10.0


class AgentProcess(Process):
    """One agent; its journal and its machine outlive it."""

    def __init__(
        self, machine: Machine, interval_seconds: float, around: Surroundings, witness: Witness
    ) -> None:
        super().__init__(machine.name, around)
        self.witness = witness
        self.machine = machine
        self.interval_seconds = interval_seconds
        self.disk: Disk[bytes] = Disk(around.scheduler, around.rng)
        self.mig_node: MigNode | None = None  # where GPUs can be partitioned
        self._mig: MigLife | None = None
        self._durable = Durable()
        self._durable_batches = 0

    @property
    def durable(self) -> Durable:
        """What the journal on the disk adds up to, whether the process lives or not."""
        if self._durable_batches != len(self.disk.durable):
            fresh = self.disk.durable[self._durable_batches :]
            self._durable = self._durable.after(
                r for batch in fresh for r in decode_batch(batch[:-1])
            )
            self._durable_batches = len(self.disk.durable)
        return self._durable

    @property
    def held(self) -> tuple[HeldAllocation, ...]:
        """What the node holds, by its journal."""
        return tuple(self.durable.held.values())

    def lose_journal(self) -> None:
        """Lose the disk, as a reinstallation does; only while the process is down."""
        assert not self.is_up
        self.tell("its journal is lost")
        self.disk.durable.clear()
        self._durable, self._durable_batches = Durable(), 0
        if self.mig_node is not None:
            self.mig_node.lose_book(self.name)

    def cut_power(self) -> None:
        """Die with the whole host, which comes up again later: nobody is told."""
        self.around.network.fall_silent(self.name)
        self.crash("power failure")
        self.machine.reboot(self.now, f"boot-{self.around.rng.randrange(1 << 32):08x}")
        if self.mig_node is not None:
            self.mig_node.helper.lose_power()

    def ask_mig(self, ask: MigAsk, answer: Callable[[MigReport | StokerError], None]) -> None:
        """Have something asked of its partitions."""
        if self._mig is None:
            answer(StokerError("the GPUs of this node cannot be partitioned"))
        else:
            self._mig.ask(ask, answer)

    @property
    def partitions(self) -> MigLife | None:
        """What this life does about partitions."""
        return self._mig if self.is_up else None

    def dispose(self) -> None:
        """End the tasks of a life, or of a run."""
        if self._mig is not None:
            self._mig.dispose()

    def ask_release(self, seconds: float | None, by: str) -> None:
        """Have the driver let go of for so long, or until it is asked back."""
        if self.is_up:
            until = None if seconds is None else self._wall() + seconds
            self.guarded(lambda: self._handle(e.ReleaseAsked(self._wall(), until, by)))()

    def ask_resume(self, by: str) -> None:
        """Have the driver taken again."""
        if self.is_up:
            self.guarded(lambda: self._handle(e.ResumeAsked(self._wall(), by)))()

    def say_healthy(self) -> bool:
        """Have the Xids of every GPU forgotten, which nothing else ends; return whether any was."""
        if not self.is_up:
            return True
        ill = [
            each.uuid
            for each in self.state.view().health
            if any(fault.check is Check.XID for fault in each.faults)
        ]
        for uuid in ill:
            forgiven = e.FaultsForgiven(self._wall(), uuid, "root")
            self.guarded(partial(self._handle, forgiven))()
        return bool(ill)

    # --- a life

    def begin(self) -> None:
        identity = NodeIdentity(
            node=self.name,
            agent_version="0.1.0",
            boot_id=self.machine.boot_id,
            simulated=True,
            pool="",
            labels={},
            interval_seconds=self.interval_seconds,
            process_id=f"{self.around.rng.randrange(1 << 64):016x}",
        )
        records: tuple[Record, ...] = tuple(
            record for batch in self.disk.durable for record in decode_batch(batch[:-1])
        )
        self._mig = None
        node = self.mig_node
        if node is None:
            self.state = NodeState(records, identity)
        else:
            awaits = bool(node.load().gpus) or not node.declaration.is_empty
            self.state = NodeState(records, identity, awaits_mig=awaits)
            self._mig = MigLife(node, self, self, identity.process_id)
        self._saves_left = 0  # on their way to the journal
        self._awaiting_saves: list[Callable[[], None]] = []
        self._end: End | None = None
        self._is_reading = False
        self._read_again = False
        self._host = DriverHost(self.machine, self, self._handle)
        self._host.begin()
        self._handle(e.Started(self._wall()))
        self.after(INVENTORY_INTERVAL_SECONDS, self._read_inventory_regularly)
        self.after(RELEASE_TICK_SECONDS, self._look_at_release)
        self.after(self.around.rng.uniform(0.5, 1.0), self._sample)
        self.after(self.around.rng.uniform(0.5, 1.5), self._read_processes_regularly)
        self.after(self.around.rng.uniform(*REDIAL_SECONDS), self._dial)
        if self._mig is not None:
            self._mig.begin()

    def perish(self) -> None:
        kept = self.disk.crash()
        if kept:
            self.tell(f"its disk had {kept} batches that it was not told of")
        if self._mig is not None and self.mig_node is not None:
            self.mig_node.book.crash()
            self._mig.end()
        self.around.network.break_all_of(self.name)

    def _handle(self, event: e.Event) -> None:
        actions = self.state.handle(event, self.machine.monotonic(self.now))
        if self._mig is not None:
            self._mig.notice(event)
        for action in actions:
            self._act(action)

    # --- what its partitions need

    def view(self) -> NodeView:
        """Return what is known of the node now."""
        return self.state.view()

    def happen(self, event: e.Event) -> None:
        """Tell the state."""
        self._handle(event)

    def want_processes(self) -> None:
        """Have the processes read anew."""
        self._act(ReadProcesses())

    def want_inventory(self) -> None:
        """Have the inventory read anew, soon."""
        self.after(0.0, self._host.look_again)

    def once_saved(self, then: Callable[[], None]) -> None:
        """Do it when nothing is on its way to the journal."""
        self._awaiting_saves.append(then)
        self._tell_saved()

    def _tell_saved(self) -> None:
        if not self._saves_left:
            awaiting, self._awaiting_saves = self._awaiting_saves, []
            for then in awaiting:
                then()

    def release_host(self) -> None:
        """Let go of the driver, for a change of mode."""
        self._host.release("the MIG mode of a GPU is changed")

    def resume_host(self) -> None:
        """Take the driver again."""
        self._host.resume()

    def is_let_go(self) -> bool:
        """Whether no driver host is there any more."""
        return self._host.state is DriverState.RELEASED

    def _act(self, action: Action) -> None:
        match action:
            case SendHello(hello):
                held = ", ".join(each.id for each in hello.held)
                self.tell(f"hello: first frame {hello.first_sequence}, holds [{held}]")
                self._send(wire.hello_message(hello))
            case SendFrame(frame):
                self._send(wire.frame_message(frame))
            case SaveJournal(ticket, records):
                self._save(ticket, records)
            case ReadProcesses():
                if self._is_reading:
                    self._read_again = True
                else:
                    self._read_processes()
            case ReadInventory():
                self._host.look_again()
            case ReleaseDriver():
                release = self.state.view().release
                self._host.release(f"released by {release.by if release else 'somebody'}")
            case ResumeDriver():
                # Else it takes it when the mode is changed.
                if self._mig is None or not self._mig.worker.has_let_go:
                    self._host.resume()
            case _:
                assert_never(action)

    # --- the journal

    def _save(self, ticket: int, records: tuple[Record, ...]) -> None:
        def answered(reason: str) -> None:
            if reason:
                self.tell(f"cannot save {_names(records)}: {reason}")
                self._handle(e.JournalFailed(self._wall(), ticket, reason))
            else:
                self.tell(f"has saved {_names(records)}")
                self.pass_point("agent: saved, not handled")
                self._handle(e.JournalSaved(self._wall(), ticket))
                self.pass_point("agent: saved and reported")
            self._saves_left -= 1
            self._tell_saved()

        for record in records:
            if isinstance(record, AllocationHeld) and self._mig is not None:
                self._mig.look_at_hold(record.allocation)
        self._saves_left += 1
        self.disk.write(encode_batch(records), self.guarded(answered))
        self.pass_point("agent: save begun")

    # --- the driver

    def _look_at_release(self) -> None:
        self.after(RELEASE_TICK_SECONDS, self._look_at_release)
        if self.state.view().release is not None:
            self._handle(e.ReleaseTimePassed(self._wall()))

    def _read_inventory_regularly(self) -> None:
        self.after(INVENTORY_INTERVAL_SECONDS, self._read_inventory_regularly)
        self._host.look_again()

    def _sample(self) -> None:
        self.after(self.interval_seconds, self._sample)
        self._host.sample()

    def _read_processes_regularly(self) -> None:
        self.after(PROCESS_INTERVAL_SECONDS, self._read_processes_regularly)
        self._act(ReadProcesses())

    def _read_processes(self) -> None:
        self._is_reading = True
        started_wall = self._wall()
        self.witness.reading_begun(self.name, started_wall, self.now)
        self._handle(e.ProcessReadingBegun(self._wall()))

        def finish(read: frozenset[str] | None) -> None:
            self._is_reading = False
            if read is None:
                reason = "the driver does not answer"
                self._handle(e.ProcessReadingFailed(self._wall(), reason))
            else:
                found = frozenset(gpu.uuid for gpu in self._host.found)
                counted = found | {each.uuid for each in self._host.missing}
                self._handle(self.machine.processes_taken(started_wall, self.now, read, counted))
            self._read_on()

        self._host.processes(finish, self.around.rng.uniform(*PROCESS_READING_SECONDS))

    def _read_on(self) -> None:
        if self._read_again and not self._is_reading:
            self._read_again = False
            self._read_processes()

    # --- the link

    def _dial(self) -> None:
        end = self._end = self.around.network.dial(self.name, AGGREGATOR, CONNECT)
        end.on_message = self.guarded(lambda message: self._hear(end, message))
        end.on_end = self.guarded(lambda reason: self._hang_up(end, reason))
        self._welcomed = False
        self._handle(e.LinkUp(self._wall()))

        def lose_patience() -> None:
            if self._end is end and not self._welcomed:
                end.close()
                self._hang_up(end, "no welcome")

        self.after(WELCOME_PATIENCE_SECONDS, lose_patience)

    def _hang_up(self, end: End, reason: str) -> None:
        if self._end is not end:
            return
        self.tell(f"stream is gone: {reason}")
        self._end = None
        self._handle(e.LinkDown(self._wall(), reason))
        self.after(self.around.rng.uniform(*REDIAL_SECONDS), self._dial)

    def _send(self, message: agent_pb2.AgentMessage) -> None:
        if self._end is not None:
            self._end.send(packet(message))

    def _hear(self, end: End, data: bytes) -> None:
        if self._end is not end:
            return  # a stream that was given up delivers late
        said = read_packet(agent_pb2.AggregatorMessage, data)
        if isinstance(said, Failed):
            end.close()
            self._hang_up(end, said.reason)
            return
        message = wire.read_message(said.message)
        match message:
            case wire.Welcome(_, _, acked):
                self.tell(f"is welcome, frames up to {acked} are taken in")
                self._welcomed = True
                self.witness.heard_ack(self.name, acked, self.now)
                self._handle(e.Welcomed(self._wall(), acked))
            case wire.Ack(sequence):
                self.witness.heard_ack(self.name, sequence, self.now)
                self._handle(e.FrameAcked(self._wall(), sequence))
            case wire.Order(id_, command):
                self.tell(f"gets command {id_}: {command}")
                self._handle(e.CommandReceived(self._wall(), id_, command))
            case wire.MigRelay(id_, ask):
                assert isinstance(ask, MigAsk), ask
                self.ask_mig(ask, partial(self._answer_mig, end, id_))
            case _:
                assert_never(message)

    def _answer_mig(self, end: End, relay: int, answer: MigReport | StokerError) -> None:
        if self._end is end:
            self._send(wire.mig_answer_message(relay, answer))

    def _wall(self) -> float:
        return self.machine.wall(self.now)


def _names(records: tuple[Record, ...]) -> str:
    return ", ".join(str(record) for record in records)
