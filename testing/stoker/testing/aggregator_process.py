"""The aggregator's process in a simulated world: the real ledger, control loop, sessions and
clients' service.

Only what touches the machine is simulated: the event loop, the clock, the store's disk and the
streams.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, assert_never

from stoker.aggregator import events as e
from stoker.aggregator.api import FleetService
from stoker.aggregator.control import Control
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.meters import Meters
from stoker.aggregator.moves import MovePlan
from stoker.aggregator.sessions import AgentLink
from stoker.core.errors import StoreError
from stoker.testing.aggregator_store import Group, LedgerFile, SimulatedStore
from stoker.testing.broken import Broken
from stoker.testing.calls import AGGREGATOR, CONNECT, Said, read_packet
from stoker.testing.disk import Disk
from stoker.testing.machine import EPOCH
from stoker.testing.network import End
from stoker.testing.process import Killed, Process, Surroundings
from stoker.testing.served_call import METHODS, Method, ServedCall, current
from stoker.testing.virtual_loop import VirtualLoop
from stoker.testing.witness import Witness
from stoker.v1 import agent_pb2, fleet_pb2

VERSION = "0.1.0"
SNAPSHOT_SECONDS = 20.0
# Cordons by health are part of what has to be over when the world comes to rest, which is long
# before the hour is over that a GPU waits which fell ill too often.
CORDONS = CordonPolicy(uncordon_after_seconds=10.0, changes_per_hour_max=1000)


class AggregatorProcess(Process):
    """The aggregator; its store outlives it."""

    store_type = SimulatedStore

    def __init__(self, around: Surroundings, witness: Witness) -> None:
        super().__init__(AGGREGATOR, around)
        self.witness = witness
        self.file = LedgerFile(Disk[Group](around.scheduler, around.rng))
        self.wall_offset = 0.0  # seconds; its clock may be another after every start
        self.fleet = Fleet()
        self.loop: VirtualLoop | None = None

    def virtual(self, wall: float) -> float:
        """Return the virtual time at which the aggregator's clock shows `wall`."""
        return wall - EPOCH - self.wall_offset

    # --- a life

    def begin(self) -> None:
        self.loop = loop = VirtualLoop(self, self.around.report)
        self.clock = AggregatorClock(self)
        meters = Meters()
        store = self.store_type(self.file, self)
        try:
            self.ledger = WitnessedLedger(self, store, meters)
        except StoreError as error:
            raise Killed(f"cannot start: {error}") from error
        self.fleet = self.ledger.fleet
        self.witness.recovered(self.fleet, self.file.replayed())
        link = AgentLink(self.ledger, meters, self.clock, VERSION)
        control = SeededControl(self.ledger, link, meters, self.clock, CORDONS)
        control.rng = self.around.rng
        service = FleetService(
            self.ledger,
            control,
            meters,
            self.clock,
            VERSION,
            CORDONS,
            relay=link.ask_about_mig,
        )
        self._open(loop, CONNECT, link.connect)
        service.rebalancing.aside = _at_once
        service.rebalancing.new_id = control.new_offer_id
        for name in METHODS:
            if name != CONNECT:
                self._open(loop, name, service.methods()[name])
        loop.spawn(control.run(), "control")
        loop.spawn(link.run(), "acknowledgements")
        loop.spawn(self._keep_snapshots(), "snapshots")

    def perish(self) -> None:
        if kept := self.file.disk.crash():
            self.tell(f"its disk had {kept} transactions that it was not told of")
        self.around.network.stop_listening(self.name)
        self.around.network.break_all_of(self.name)
        self.dispose()

    def dispose(self) -> None:
        """End the tasks of a life that is over, or of a run."""
        if self.loop is not None:
            self.loop.dispose()
            self.loop = None

    def _open(self, loop: VirtualLoop, name: str, method: Method) -> None:
        def serve(end: End) -> None:
            ServedCall(self, loop, end, name, method)

        accept_in_turn = self.guarded(serve)

        def accept(end: End) -> None:
            if self.stands_still:  # the kernel takes the line, and what is said on it waits there
                end.on_message = lambda data: self._keep_back(name, end, data)
            accept_in_turn(end)

        self.around.network.listen(self.name, name, accept)

    def _keep_back(self, name: str, end: End, data: bytes) -> None:
        if self.stands_still:  # otherwise it has died meanwhile
            self.arrived(name, data)
            self.keep_back(lambda: end.on_message(data))

    def arrived(self, name: str, data: bytes) -> None:
        """Take in what has come to this host for a call, before anybody reads it."""
        if name == "KeepAlive":
            said = read_packet(fleet_pb2.KeepAliveRequest, data)
            assert isinstance(said, Said)
            self.witness.kept_alive(said.message.allocation_id, self.now)

    async def _keep_snapshots(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_SECONDS)
            try:
                await self.ledger.keep_snapshot()
            except StoreError as error:
                self.tell(f"no snapshot: {error}")

    # --- what the witness is told

    def promise(self, id_: str, expires_at: float) -> None:
        """Take in that a client is about to be told that it has an allocation."""
        until, allocation = self.virtual(expires_at), self.fleet.allocations[id_]
        self._watch(lambda: self.witness.promised(allocation, until))

    def acknowledge(self, node: str, sequence: int, reading: agent_pb2.Frame) -> None:
        """Take in that an agent is about to be told that its frames were taken in."""
        self._watch(lambda: self.witness.acknowledged(node, sequence, reading))

    def decided(self, events: Sequence[e.DurableEvent]) -> None:
        """Take in what is about to be stored."""
        if not self.is_up:
            return
        self.tell("; ".join(described(event) for event in events))
        self._watch(lambda: self.witness.decided(self.fleet, events, self.now, self.clock.now()))

    def noted(self, event: e.VolatileEvent) -> None:
        """Take in what was noted just now."""
        if not self.is_up:
            return  # a task that was ended with the process
        match event:
            case e.AgentConnected():
                hello = current.get().hello
                assert hello is not None
                self._watch(lambda: self.witness.greeted(hello, self.life, self.now))
            case e.FrameArrived():
                told = current.get().frame
                assert told is not None
                taken = self.fleet.status(event.node).acked_sequence
                self._watch(
                    lambda: self.witness.took_frame(event, told, taken, self.now, self.virtual)
                )
            case e.AgentDisconnected(_, node, session, reason):
                self.tell(f"session {session} of {node} is over: {reason}")
            case _:
                pass

    def _watch(self, look: Any) -> None:
        """Have a look; what it finds broken must not be lost in the task that is looked at."""
        try:
            self.guarded(look)()
        except Broken as broken:
            self.around.report(broken)
            raise


class SeededControl(Control):
    """The real loop; the ids that it gives come from the seed."""

    rng: Random

    def _new_id(self) -> str:
        return f"a-{self.rng.randrange(1 << 32):08x}"

    def new_offer_id(self) -> str:
        """Return the id of an offer to move."""
        return f"o-{self.rng.randrange(1 << 32):08x}"


class AggregatorClock:
    """The aggregator's clock; its wall clock may be wrong."""

    def __init__(self, process: AggregatorProcess) -> None:
        self._process = process

    def now(self) -> float:
        return EPOCH + self._process.now + self._process.wall_offset

    def monotonic(self) -> float:
        return self._process.now + 5000.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))


class WitnessedLedger(Ledger):
    """The real ledger, which lets the witness see what goes through it."""

    def __init__(self, process: AggregatorProcess, store: SimulatedStore, meters: Meters) -> None:
        super().__init__(store, meters, process.clock.now())
        self._process = process

    async def record(self, *events: e.DurableEvent) -> None:
        self._process.decided(events)
        await super().record(*events)

    def note(self, *events: e.VolatileEvent) -> None:
        for event in events:
            super().note(event)
            self._process.noted(event)


async def _at_once(work: Callable[[], MovePlan]) -> MovePlan:
    """Plan in the loop: there are no threads here."""
    return work()


def described(event: e.DurableEvent) -> str:
    """Return the event in a few words, for the story."""
    match event:
        case e.NodeRegistered(_, facts):
            return f"registers {facts.name} with {len(facts.gpus)} GPUs"
        case e.NodeCordoned(_, node, reason):
            return f"cordons {node}: {reason}"
        case e.NodeUncordoned(_, node):
            return f"uncordons {node}"
        case e.GpuHealthChanged(_, node, uuid, _, health):
            return f"{node} judges {uuid}: {health.verdict} {health.reason}"
        case e.GpuForgotten(_, node, uuid):
            return f"forgets {uuid} of {node}"
        case e.GpuCordoned(_, node, uuid, reason):
            return f"cordons {uuid} of {node}: {reason}"
        case e.GpuUncordoned(_, node, uuid):
            return f"uncordons {uuid} of {node}"
        case e.AllocationRequested():
            return f"{event.id} waits: {event.request.described()} for {event.request.holder}"
        case e.AllocationGranted() | e.AllocationAdopted():
            verb = "granted" if isinstance(event, e.AllocationGranted) else "adopted"
            places = " and ".join(
                f"{each.node}/{','.join(str(device.index) for device in each.devices)}"
                for each in event.placements
            )
            what = event.request.described()
            return f"{event.id} {verb}: {what} for {event.request.holder} on {places}"
        case e.AllocationReleasing(_, id_, reason):
            return f"{id_} releasing: {reason}"
        case e.AllocationEnded(_, id_, reason):
            return f"{id_} ended: {reason}"
        case e.AllocationsForgotten(_, ids):
            return f"forgets {len(ids)}"
        case _:
            assert_never(event)
