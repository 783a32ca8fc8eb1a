"""The agents' streams: what they say becomes events, and what they must be told goes out in order.

A stream belongs to one node. It begins with a hello, which is registered when its facts are new;
then frames come in order. What was taken in before is left aside, numbers that were passed over are
counted. A frame is acknowledged once what it changes durably is on disk; those that change nothing
are acknowledged a few at a time.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from stoker.aggregator import events as e
from stoker.aggregator.failures import CallFailure, Context, store_unavailable
from stoker.aggregator.inventories import named, with_inventory
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.limits import Malformed
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import Command, MissingGpu, NodeFacts
from stoker.aggregator.relays import Relays, not_connected
from stoker.aggregator.rpc import received
from stoker.aggregator.wire import (
    PROTOCOL_VERSION,
    Hello,
    ack_message,
    command_message,
    read_frame,
    read_hello,
    read_inventory,
    relay_message,
    welcome_message,
)
from stoker.core.clock import Clock
from stoker.core.errors import StoreError
from stoker.v1 import agent_pb2, mig_pb2

# A stream that does not say hello so soon is closed.
HELLO_SECONDS = 10.0
# How often acknowledgements are looked at: so late comes that of a frame which changed something.
ACK_TICK_SECONDS = 0.2
# Frames that changed nothing wait so long for their acknowledgement, or until there are so many:
# to write one costs as much as to take in a frame.
ACK_SECONDS = 2.0
ACK_FRAMES = 16
# While the store refuses, frames cannot be acknowledged; the last one is repeated so often, for an
# agent takes long silence for a dead line.
ACK_REPEAT_SECONDS = 10.0
# A restarted agent waits until its former line is silent for two samples, at most so long.
RIVAL_SECONDS_MAX = 10.0
# A node that does not take its commands is cut off; its next stream is told the difference anew.
COMMANDS_QUEUED_MAX = 4_096
# The offset between two clocks is the least one seen in this and the last window: long enough for
# one frame that was not held up, short enough that clocks do not drift apart noticeably.
OFFSET_WINDOW_SECONDS = 60.0

_log = logging.getLogger(__name__)


class ClockOffset:
    """How far an agent's monotonic clock is behind ours, from the messages that came quickest."""

    def __init__(self, sent: float, arrived: float) -> None:
        self._least = self._least_before = arrived - sent
        self._window_began = arrived

    def delay(self, sent: float, arrived: float) -> float:
        """Return how much longer than the quickest this message was on its way, in seconds."""
        offset = arrived - sent
        if arrived - self._window_began > OFFSET_WINDOW_SECONDS:
            self._least_before, self._least = self._least, offset
            self._window_began = arrived
        self._least = min(self._least, offset)
        return offset - min(self._least, self._least_before)


@dataclass(slots=True)
class _Progress:
    """How far an incarnation of a node's agent was taken in; kept from stream to stream."""

    incarnation: str
    sequence: int = 0


class _Session:
    """One stream of an agent."""

    def __init__(self, id_: int, hello: Hello, progress: _Progress, arrived: float) -> None:
        self.id = id_
        self.node = hello.facts.name
        self.process_id = hello.process_id
        self.progress = progress
        self.offset = ClockOffset(hello.monotonic_seconds, arrived)
        self.uuids: dict[int, str] = {}
        self.has_inventory = False
        self.is_connected = False  # the fleet knows of it
        self.commands: deque[Command] = deque()
        self.relays = Relays(self.node)
        self.commands_done = 0
        self.next_command_id = 1
        self.pending = 0  # frames not acknowledged
        self.pending_since = 0.0  # monotonic
        self.is_urgent = False  # one of them changed something
        self.acked = progress.sequence
        self.acked_at = arrived
        self.is_ack_due = False
        self.wake = asyncio.Event()
        self.spoke = asyncio.Event()
        self.is_over = False
        self.ending: CallFailure | None = None

    def end(self, failure: CallFailure) -> None:
        """Let the stream end with this status."""
        self.ending = self.ending or failure
        self.wake.set()


class AgentLink:
    """The service; `run` must be running for frames to be acknowledged."""

    def __init__(self, ledger: Ledger, meters: Meters, clock: Clock, version: str) -> None:
        self._ledger = ledger
        self._meters = meters
        self._clock = clock
        self._version = version
        self._live: dict[str, _Session] = {}
        self._progress: dict[str, _Progress] = {}
        # What was last given to the ledger about each node: it may not be applied yet, for a stream
        # that breaks does not take back what it had recorded.
        self._recorded: dict[str, NodeFacts] = {}
        self._unacked: dict[int, _Session] = {}
        self._next_session = 1
        self._closing: CallFailure | None = None

    # --- what the control loop uses

    def next_command_id(self, node: str) -> int | None:
        """Return the id of the next command on the node's stream; None: there is no stream."""
        session = self._live.get(node)
        # Before the fleet knows of the stream, it could not remember what was sent on it.
        return session.next_command_id if session and session.is_connected else None

    def has_inventory(self, node: str) -> bool:
        """Whether the node has told which GPUs it has."""
        session = self._live.get(node)
        return session is not None and session.has_inventory

    def send(self, node: str, commands: Sequence[Command]) -> None:
        """Send the commands, in order, after everything sent before."""
        session = self._live[node]
        session.commands.extend(commands)
        session.next_command_id = commands[-1].id + 1
        session.wake.set()
        for command in commands:
            self._meters.commands.labels("hold" if command.is_hold else "drop").inc()
        if len(session.commands) > COMMANDS_QUEUED_MAX:
            sentence = f"{len(session.commands)} commands wait and are not read"
            session.end(CallFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "NOT_READING", sentence))

    async def ask_about_mig(self, node: str, ask: mig_pb2.MigAsk) -> mig_pb2.MigAnswer:
        """Return what the node's agent answers; raises CallFailure."""
        session = self._live.get(node)
        if session is None or not session.is_connected:
            raise not_connected(node, "its agent has no stream")
        session.wake.set()
        return await session.relays.ask(ask, self._clock)

    async def run(self) -> None:
        """Acknowledge what may be acknowledged until cancelled."""
        while True:
            await self._clock.sleep(ACK_TICK_SECONDS)
            now = self._clock.monotonic()
            for session in list(self._unacked.values()):
                self._acknowledge(session, now)

    def close(self, failure: CallFailure) -> None:
        """End every stream with this status, and every one that comes."""
        self._closing = failure
        for session in self._live.values():
            session.end(failure)

    # --- the call

    async def connect(self, context: Context) -> None:
        """Hold one agent's stream for as long as it lives."""
        try:
            await self._hold(context)
        except Malformed as error:
            self._note_refused(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        except StoreError as error:
            raise store_unavailable(error) from error
        except CallFailure as failure:
            if failure is not self._closing:
                self._note_refused(context, failure.code, failure.sentence)
            raise

    def _note_refused(self, context: Context, code: grpc.StatusCode, sentence: str) -> None:
        self._meters.streams_refused.labels(code.name).inc()
        _log.warning("agent at %s: its stream was closed: %s", context.peer(), sentence)

    async def _hold(self, context: Context) -> None:
        hello = await self._hello(context)
        await self._make_room(hello)
        session = self._begin(hello)
        reason = "its agent closed the stream"
        try:
            await self._register(session, hello)
            await self._converse(session, context)
        except CallFailure as failure:
            reason = failure.sentence
            raise
        except Malformed as error:
            reason = f"its agent sent what cannot be: {error}"
            raise
        except StoreError as error:
            reason = str(error)
            raise
        except asyncio.CancelledError:
            reason = "the connection broke"
            raise
        finally:
            self._end(session, reason)

    async def _hello(self, context: Context) -> Hello:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                message = await received(context)
        except TimeoutError:
            sentence = f"no hello within {HELLO_SECONDS:g} s"
            raise CallFailure(
                grpc.StatusCode.DEADLINE_EXCEEDED, "INVALID_REQUEST", sentence
            ) from None
        if not isinstance(message, agent_pb2.AgentMessage) or not message.HasField("hello"):
            raise Malformed("hello", "must be the first message of a stream")
        if message.hello.protocol_version != PROTOCOL_VERSION:
            raise CallFailure(
                grpc.StatusCode.FAILED_PRECONDITION,
                "WRONG_VERSION",
                f"the agent speaks protocol version {message.hello.protocol_version}, this "
                f"aggregator ({self._version}) speaks version {PROTOCOL_VERSION}",
            )
        return read_hello(message.hello)

    async def _make_room(self, hello: Hello) -> None:
        """End an older stream of the same agent; refuse when it is another agent that lives."""
        old = self._live.get(hello.facts.name)
        if old is None:
            return
        is_rival = old.progress.incarnation != hello.facts.incarnation
        if not is_rival and old.process_id != hello.process_id:
            # The agent was restarted and its old line is not known to be dead yet; or two hosts run
            # from one image. Of two, the first still speaks.
            old.spoke.clear()
            patience = min(2 * hello.facts.interval_seconds, RIVAL_SECONDS_MAX)
            try:
                async with asyncio.timeout(patience):
                    await old.spoke.wait()
            except TimeoutError:
                pass
            else:
                is_rival = not old.is_over
        if is_rival:
            raise CallFailure(
                grpc.StatusCode.ALREADY_EXISTS,
                "NAME_IN_USE",
                f"another live agent is called {hello.facts.name}; "
                "give one of the two another node name",
            )
        latest = self._live.get(hello.facts.name)
        if latest is not None:
            sentence = "another stream of this agent took over"
            latest.end(CallFailure(grpc.StatusCode.ABORTED, "SUPERSEDED", sentence))

    def _begin(self, hello: Hello) -> _Session:
        if self._closing is not None:
            raise self._closing
        name, incarnation = hello.facts.name, hello.facts.incarnation
        progress = self._progress.get(name)
        if progress is None or progress.incarnation != incarnation:
            progress = self._progress[name] = _Progress(incarnation)
        session = _Session(self._next_session, hello, progress, self._clock.monotonic())
        self._next_session += 1
        self._live[name] = session
        return session

    async def _register(self, session: _Session, hello: Hello) -> None:
        known = self._ledger.fleet.nodes.get(session.node)
        facts = hello.complete_facts(known.facts if known else None)
        await self._record(facts)
        if session.ending is not None:
            raise session.ending
        inventory = hello.inventory_beside(known.facts if known else None)
        if inventory is not None:
            session.uuids = inventory.uuids()
        elif known and known.facts.incarnation == facts.incarnation:
            session.uuids = {gpu.number: gpu.uuid for gpu in facts.gpus if gpu.number}
        session.has_inventory = inventory is not None or bool(facts.gpus)
        now = self._clock.now()
        missing = None if inventory is None else inventory.missing
        connected = e.AgentConnected(
            now, session.node, session.id, hello.held, session.acked, missing
        )
        session.is_connected = True
        self._ledger.note(connected)

    async def _record(self, facts: NodeFacts) -> None:
        """Have the ledger know these facts, whatever an earlier stream is still having recorded."""
        known = self._ledger.fleet.nodes.get(facts.name)
        is_known = known is not None and known.facts == facts
        if is_known and self._recorded.get(facts.name, facts) == facts:
            return
        self._recorded[facts.name] = facts
        await self._ledger.record(e.NodeRegistered(self._clock.now(), facts))

    def _end(self, session: _Session, reason: str) -> None:
        session.is_over = True
        session.spoke.set()
        session.relays.end(reason)
        self._unacked.pop(session.id, None)
        if self._live.get(session.node) is session:
            del self._live[session.node]
        now = self._clock.now()
        self._ledger.note(e.AgentDisconnected(now, session.node, session.id, reason))

    async def _converse(self, session: _Session, context: Context) -> None:
        """Read and write until the agent ends the stream; raises what else ends it."""
        # Before anything can go wrong: gRPC cannot end a call whose first write was cancelled.
        await context.write(welcome_message(self._version, session.acked))
        ended: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._write(session, context))
                await self._read(session, context)
                writing.cancel()
        except* (CallFailure, Malformed, StoreError) as several:
            ended = several.exceptions[0]
        if ended is not None:
            raise ended

    # --- up

    async def _read(self, session: _Session, context: Context) -> None:
        while (message := await received(context)) is not None:
            if not isinstance(message, agent_pb2.AgentMessage) or message.HasField("hello"):
                raise Malformed("message", "must be a frame or an answer after the hello")
            if message.HasField("mig"):
                session.spoke.set()
                session.relays.answer(message.mig)
            elif message.HasField("frame"):
                await self._take(session, message.frame)
            else:
                raise Malformed("message", "must be a frame or an answer, found neither")

    async def _take(self, session: _Session, message: agent_pb2.Frame) -> None:
        """Take one frame in, once; on a stream that was replaced it is left to the other."""
        if session.ending is not None:
            raise session.ending
        arrived = self._clock.monotonic()
        session.spoke.set()
        progress = session.progress
        if message.sequence <= progress.sequence and message.sequence > 0:
            self._meters.frames_repeated.inc()
            self._owe_ack(session, arrived, urgent=False)
            return
        now = self._clock.now()
        sampled_at = now - session.offset.delay(message.monotonic_seconds, arrived)
        urgent = bool(message.refusals) or message.HasField("held") or message.HasField("health")
        missing: tuple[MissingGpu, ...] | None = None
        if message.HasField("inventory"):
            urgent = True
            missing = await self._take_inventory(session, message.inventory)
        frame = read_frame(message, session.uuids, sampled_at, missing)
        if frame.commands_done > session.commands_done:
            session.commands_done = frame.commands_done
            urgent = True
        self._ledger.note(e.FrameArrived(now, session.node, session.id, frame, sampled_at))
        self._meters.frames.inc()
        self._meters.holds_refused.inc(len(message.refusals))
        unknown = len(message.samples) - len(frame.samples or ())
        if unknown:
            self._meters.samples_unknown.inc(unknown)
        if progress.sequence and frame.sequence > progress.sequence + 1:
            self._meters.frames_gap.inc(frame.sequence - progress.sequence - 1)
        progress.sequence = frame.sequence
        self._owe_ack(session, arrived, urgent=urgent)

    async def _take_inventory(
        self, session: _Session, message: agent_pb2.Inventory
    ) -> tuple[MissingGpu, ...]:
        """Have the GPUs on disk; return those that are missing."""
        known = self._ledger.fleet.nodes[session.node].facts
        inventory = named(read_inventory(message, "frame.inventory"), known)
        await self._record(with_inventory(known, inventory, known))
        if session.ending is not None:
            raise session.ending
        session.uuids = inventory.uuids()
        session.has_inventory = True
        return inventory.missing

    # --- down

    def _owe_ack(self, session: _Session, now: float, *, urgent: bool) -> None:
        if session.pending == 0:
            session.pending_since = now
            self._unacked[session.id] = session
        session.pending += 1
        session.is_urgent = session.is_urgent or urgent

    def _acknowledge(self, session: _Session, now: float) -> None:
        """Let the newest frame be acknowledged when it is time and its effects are on disk."""
        is_due = session.is_urgent or session.pending >= ACK_FRAMES
        if not is_due and now - session.pending_since < ACK_SECONDS:
            return
        if self._ledger.is_settled(session.node):
            del self._unacked[session.id]
            session.pending = 0
            session.is_urgent = False
            session.acked = session.progress.sequence
        elif now - session.acked_at < ACK_REPEAT_SECONDS:
            return
        session.acked_at = now
        session.is_ack_due = True
        session.wake.set()

    async def _write(self, session: _Session, context: Context) -> None:
        while True:
            await session.wake.wait()
            session.wake.clear()
            if session.ending is not None:
                raise session.ending
            while session.commands:
                await context.write(command_message(session.commands.popleft()))
            while (relay := session.relays.next_unsent()) is not None:
                await context.write(relay_message(relay))
            if session.is_ack_due:
                session.is_ack_due = False
                await context.write(ack_message(session.acked))
