"""The loop that decides: wishes, reports, deadlines in; events, replies, commands out.

It waits until there is something to decide, makes one round of decisions for everything that is
there, stores its events in one go, and only then answers. While a commit runs, the next wishes
gather. When the store refuses, every wish of the round fails with its error, nothing has happened,
and the loop goes on; until the store takes writes again, it decides nothing but wishes, and says
that it is in trouble.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from stoker.aggregator import events as e
from stoker.aggregator.commands import difference
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import Round, next_due
from stoker.aggregator.findings import Findings
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import Command
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.queueing import Hosts
from stoker.aggregator.tenancy import allocations_on
from stoker.aggregator.upkeep import CordonWatch
from stoker.aggregator.wishes import (
    Reply,
    Wish,
)
from stoker.core.clock import Clock
from stoker.core.errors import StoreError

# How often deadlines are looked at: a lease ends at most so late, and never early.
TICK_SECONDS = 0.1
# Reports of nodes wait so long for others, to be decided on together; wishes do not wait.
GATHER_SECONDS = 0.005
# Decided in one round, so that one does not hold up the loop for long; the rest follows at once.
WISHES_PER_ROUND = 64
# The queue is served at most so often: it costs a look at the whole fleet per waiting request.
SERVE_SECONDS_MIN = 0.05
# How often the GPUs of one allocation are compared with each other.
OBSERVE_SECONDS = 10.0
# A loop that has not come round for so long is stuck: in the disk, most likely.
STUCK_SECONDS = 3.0
# A loop that saw no time for so long stood still, as under SIGSTOP or in a VM that was paused: the
# keep-alives of that time wait unread. It is less than the shortest TTL, so that a lease that is
# kept alive never ends by it, and far more than a loop is late under load.
STANDSTILL_SECONDS = 0.5
# How often a store that refused is asked whether it takes writes again.
PROBE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Streams(Protocol):
    """The agents' streams, as the loop sees them."""

    def next_command_id(self, node: str) -> int | None:
        """Return the id of the next command on the node's stream; None: there is no stream."""
        ...

    def has_inventory(self, node: str) -> bool:
        """Whether the node has told which GPUs it has."""
        ...

    def send(self, node: str, commands: Sequence[Command]) -> None:
        """Send the commands, in order, after everything sent before."""
        ...


@dataclass(frozen=True, slots=True)
class _Asked:
    wish: Wish
    reply: "asyncio.Future[Reply]"


class Control:
    """The loop; `run` must be running for wishes to be answered."""

    def __init__(
        self,
        ledger: Ledger,
        streams: Streams,
        meters: Meters,
        clock: Clock,
        policy: CordonPolicy | None = None,
        findings: Findings | None = None,
        placer: Placer | None = None,
    ) -> None:
        """`policy`: when GPUs are cordoned for their health; `findings`: who notices what else.

        `placer` finds the places; what the ledger's allocations asked for is what it learns first.
        """
        self._ledger = ledger
        self._streams = streams
        self._meters = meters
        self._clock = clock
        self._hosts = Hosts()
        self.placer = placer or Placer()
        known = sorted(ledger.fleet.allocations.values(), key=lambda each: each.requested_at)
        for allocation in known:
            self.placer.learn(allocation.request)
        self._watch = CordonWatch(policy or CordonPolicy())
        self._findings = findings or Findings()
        self._observed_at = float("-inf")  # monotonic
        self._asked: deque[_Asked] = deque()
        self._wake = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._completed_at: float | None = None  # monotonic
        self._looked_at = (clock.now(), clock.monotonic())
        self._giving_up: frozenset[str] = frozenset()  # by the commit that is under way
        self._turned = asyncio.Event()
        self._failure: StoreError | None = None
        self._probed_at = 0.0
        self._served_at = float("-inf")
        self._served_version = -1
        ledger.on_news(self._nudge)

    async def wish(self, wish: Wish) -> Reply:
        """Return the reply once it is durable; raises StoreError, and then nothing has happened."""
        asked = _Asked(wish, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._wake.set()
        return await asked.reply

    async def settled(self, allocation_id: str) -> None:
        """Return once no commit is under way that ends this allocation's lease."""
        while allocation_id in self._giving_up:
            await self._turned.wait()

    async def turned(self) -> None:
        """Return when the loop comes round the next time."""
        await self._turned.wait()

    def trouble(self) -> str:
        """Return why the loop does not do its work; empty: it does."""
        if self._completed_at is None:
            return "the control loop has not come round yet"
        silence = self._clock.monotonic() - self._completed_at
        if silence > STUCK_SECONDS:
            return f"the control loop has not come round for {silence:.1f} s"
        if self._failure is not None:
            return f"the store refuses writes: {self._failure}"
        return ""

    async def run(self) -> None:
        """Decide until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick(), name="control ticks")
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._failure is not None:
                    await self._probe()
                if self._has_work(self._look_at_clock()):
                    await self._round()
                self._completed_at = self._clock.monotonic()
                self._turned.set()
                self._turned.clear()

    # --- waiting

    async def _tick(self) -> None:
        while True:
            self._wake.set()
            await self._clock.sleep(TICK_SECONDS)
            now = self._look_at_clock()  # also while a commit keeps the loop waiting
            if self._clock.monotonic() - self._observed_at >= OBSERVE_SECONDS:
                self._observed_at = self._clock.monotonic()
                self._findings.observe(self._ledger.fleet, now)

    def _look_at_clock(self) -> float:
        """Return the time, before something is decided by it.

        After a standstill every lease runs anew from here, as after a restart: nobody could be
        heard. A wall clock that was set forward looks the same, and ends no lease either.
        """
        before, now = self._looked_at, (self._clock.now(), self._clock.monotonic())
        self._looked_at = now
        stood_still = max(now[0] - before[0], now[1] - before[1])
        if stood_still > STANDSTILL_SECONDS:
            _log.warning("stood still for %.1f s: every lease runs anew from now", stood_still)
            self._ledger.note(e.Recovered(now[0]))
        return now[0]

    def _nudge(self) -> None:
        """Wake the loop soon when what was recorded or noted gives it something to decide."""
        if self._gathering is not None:
            return
        fleet = self._ledger.fleet
        has_room = fleet.waiting and fleet.capacity_version != self._served_version
        if fleet.unreconciled or has_room:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(GATHER_SECONDS, self._gathered)

    def _gathered(self) -> None:
        self._gathering = None
        self._wake.set()

    def _has_work(self, now: float) -> bool:
        if self._asked:
            return True
        if self._failure is not None:
            return False
        fleet = self._ledger.fleet
        due_at = next_due(fleet, self._watch)
        is_due = due_at is not None and due_at <= now
        return is_due or bool(fleet.unreconciled) or self._is_queue_due()

    def _is_queue_due(self) -> bool:
        fleet = self._ledger.fleet
        return (
            bool(fleet.waiting)
            and fleet.capacity_version != self._served_version
            and self._clock.monotonic() - self._served_at >= SERVE_SECONDS_MIN
        )

    async def _probe(self) -> None:
        now = self._clock.monotonic()
        if now - self._probed_at < PROBE_SECONDS:
            return
        self._probed_at = now
        try:
            await self._ledger.probe()
        except StoreError as error:
            self._failure = error
        else:
            self._recovered()

    # --- deciding

    async def _round(self) -> None:
        """Decide once over everything that is there."""
        asked = self._take_asked()
        self._meters.rounds.inc()
        try:
            if self._failure is None:
                with self._ledger.reconciling() as nodes:
                    await self._decide(asked, nodes)
            else:
                await self._decide(asked, None)
        except StoreError as error:
            self._failed(error, asked)

    async def _decide(self, asked: Sequence[_Asked], nodes: set[str] | None) -> None:
        """Decide, store, answer, command; without `nodes` decide on the wishes only."""
        fleet = self._ledger.fleet
        now = self._look_at_clock()
        a_round = Round(fleet, now, self._new_id, self._hosts, self._watch, self.placer)
        served_version = self._served_version
        if nodes is not None:
            a_round.housekeep(nodes)
            if self._is_queue_due():
                served_version = fleet.capacity_version
                self._served_at = self._clock.monotonic()
                a_round.serve_queue()
        replies = [a_round.wish(each.wish) for each in asked]
        if a_round.events:
            await self._store(a_round.events)
        self._served_version = served_version
        for each, reply in zip(asked, replies, strict=True):
            if not each.reply.done():  # its caller may be gone
                each.reply.set_result(reply)
        touched = self._nodes_of(a_round.events)
        for node in sorted(touched | nodes if nodes else touched):
            self._command(node, now)

    async def _store(self, events: Sequence[e.DurableEvent]) -> None:
        self._giving_up = frozenset(
            event.id for event in events if isinstance(event, e.AllocationReleasing)
        )
        try:
            await self._ledger.record(*events)
        finally:
            self._giving_up = frozenset()
        self._recovered()

    def _take_asked(self) -> list[_Asked]:
        asked: list[_Asked] = []
        while self._asked and len(asked) < WISHES_PER_ROUND:
            each = self._asked.popleft()
            if not each.reply.done():  # a caller that is gone already wishes nothing
                asked.append(each)
        if self._asked:
            self._wake.set()
        return asked

    def _new_id(self) -> str:
        while True:
            id_ = secrets.token_hex(8)
            if id_ not in self._ledger.fleet.allocations:
                return id_

    def _failed(self, error: StoreError, asked: Iterable[_Asked]) -> None:
        if self._failure is None:
            _log.error("the store refuses writes: %s", error)
        self._failure = error
        self._probed_at = self._clock.monotonic()
        for each in asked:
            if not each.reply.done():
                each.reply.set_exception(type(error)(str(error)))

    def _recovered(self) -> None:
        if self._failure is not None:
            _log.info("the store takes writes again")
        self._failure = None

    # --- telling the nodes

    def _nodes_of(self, events: Iterable[e.DurableEvent]) -> set[str]:
        """Return the nodes whose wanted allocations these events changed."""
        nodes: set[str] = set()
        for event in events:
            match event:
                case e.AllocationGranted() | e.AllocationAdopted():
                    nodes.update(placement.node for placement in event.placements)
                case e.AllocationReleasing() | e.AllocationEnded():
                    nodes.update(self._ledger.fleet.allocations[event.id].nodes)
                case (
                    e.NodeRegistered()
                    | e.NodeCordoned()
                    | e.NodeUncordoned()
                    | e.GpuHealthChanged()
                    | e.GpuForgotten()
                    | e.GpuCordoned()
                    | e.GpuUncordoned()
                    | e.AllocationRequested()
                    | e.AllocationsForgotten()
                ):
                    pass
                case _:
                    assert_never(event)
        return nodes

    def _command(self, node: str, now: float) -> None:
        """Send the difference between what the node shall hold and what it says it holds."""
        fleet = self._ledger.fleet
        status = fleet.status(node)
        first_id = self._streams.next_command_id(node)
        if first_id is None or status.session == 0 or status.held is None:
            return
        sent = fleet.sent.get(node, {})
        commands = difference(
            node,
            allocations_on(fleet, node),
            status.held,
            sent,
            first_id,
            # What it reported while the round was stored may still be adopted in the next one.
            inventory_known=self._streams.has_inventory(node) and node not in fleet.unreconciled,
        )
        if commands:
            self._ledger.note(e.CommandsSent(now, node, status.session, commands))
            self._streams.send(node, commands)
