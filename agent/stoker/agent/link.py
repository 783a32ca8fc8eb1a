"""The agent's line to the aggregator: one stream at a time, dialled anew whenever it breaks.

The link decides nothing about what is said. It tells the state that a stream is up or down and
what came on it, and sends what the state hands it; what is handed over while no stream is up is
forgotten, because the state will send it again.

A stream counts as broken when the aggregator ends it, when TCP or HTTP/2 says so, when no welcome
comes, or when frames are under way and nothing has come back for a while. The next attempt goes to
the next address, after a pause that grows with each failure and is never the same for two agents:
ten thousand of them come back from a restart of the aggregator without a thundering herd.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import assert_never

import grpc
from grpc import aio

from stoker.agent.events import CommandReceived, Event, FrameAcked, LinkDown, LinkUp, Welcomed
from stoker.agent.model import Frame, Hello
from stoker.agent.wire import (
    PROTOCOL_VERSION,
    Ack,
    MalformedMessage,
    MigRelay,
    Order,
    Welcome,
    frame_message,
    hello_message,
    mig_answer_message,
    read_message,
)
from stoker.core.clock import Clock
from stoker.core.errors import StokerError
from stoker.core.mig.reports import MigAsk, MigReport
from stoker.v1 import agent_pb2, agent_pb2_grpc

# The first pause after a failure, doubled up to the longest; each is shortened at random by up to
# half.
PAUSE_SECONDS_FIRST = 0.5
PAUSE_SECONDS_MAX = 15.0
# Nothing that this process does can mend a wrong version or a name in use: look again seldom.
PAUSE_SECONDS_HOPELESS = 30.0
CONNECT_SECONDS_MAX = 10.0
WELCOME_SECONDS_MAX = 10.0
# Acks come at once; their absence while frames are under way means that nobody reads.
ACK_SECONDS_MAX = 30.0
# A peer that vanished without a word is noticed after the time plus the timeout. Servers must allow
# pings this often without data (`grpc.http2.min_recv_ping_interval_without_data_ms`).
KEEPALIVE_SECONDS = 20.0
KEEPALIVE_TIMEOUT_SECONDS = 10.0

# Questions about partitions that are answered at one time on a stream; more are refused.
RELAYS_MAX = 8

_HOPELESS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_OPTIONS: list[tuple[str, int]] = [
    # Channels of one process otherwise share a connection per address, and with it the back-off of
    # an earlier one, which would hold up ours.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
]

_Call = aio.StreamStreamCall[agent_pb2.AgentMessage, agent_pb2.AggregatorMessage]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Ended:
    """Why a stream ended."""

    reason: str
    is_hopeless: bool = False
    was_welcomed: bool = False


class Link:
    """The line to one of the aggregator's addresses. `run` must be running for it to be up."""

    def __init__(
        self,
        addresses: Sequence[str],
        happen: Callable[[Event], None],
        *,
        ask_mig: Callable[[MigAsk], Awaitable[MigReport]],
        clock: Clock,
        rng: Random,
    ) -> None:
        """Take where to dial and whom to tell; `happen` is called in the loop, and may send.

        `ask_mig` answers what is asked about partitions, or raises StokerError.
        """
        assert addresses, "an agent without an aggregator has no link"
        self._addresses = addresses
        self._happen = happen
        self._ask_mig = ask_mig
        self._clock = clock
        self._rng = rng
        self._stream: _Stream | None = None

    def send_hello(self, hello: Hello) -> None:
        """Say hello on the stream that just came up."""
        if self._stream is not None:
            self._stream.put(hello_message(hello))

    def send_frame(self, frame: Frame) -> None:
        """Send a frame on the stream that is up."""
        if self._stream is not None:
            self._stream.put(frame_message(frame))

    async def run(self) -> None:
        """Keep a stream up until cancelled, which ends it in an orderly way."""
        failures = 0
        attempt = 0
        told = ""
        while True:
            address = self._addresses[attempt % len(self._addresses)]
            attempt += 1
            ended = await self._talk(address)
            failures = 1 if ended.was_welcomed else failures + 1
            pause = self._pause(failures, is_hopeless=ended.is_hopeless)
            text = f"aggregator {address}: {ended.reason}"
            # The same reason again and again is worth one line.
            level = logging.DEBUG if text == told else logging.WARNING
            _log.log(level, "%s; trying again in %.1f s", text, pause)
            told = text
            await self._clock.sleep(pause)

    def _pause(self, failures: int, *, is_hopeless: bool) -> float:
        longest = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS_FIRST * 2.0 ** min(failures - 1, 10))
        if is_hopeless:
            longest = PAUSE_SECONDS_HOPELESS
        return longest * self._rng.uniform(0.5, 1.0)

    async def _talk(self, address: str) -> _Ended:
        """Hold one stream for as long as it lives, and return why it ended."""
        async with aio.insecure_channel(address, options=_OPTIONS) as channel:
            call = agent_pb2_grpc.AgentLinkStub(channel).Connect()
            try:
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    await call.wait_for_connection()
            except aio.AioRpcError as error:
                return _explained(error)
            except TimeoutError:
                return _Ended(f"no connection within {CONNECT_SECONDS_MAX:g} s")
            stream = _Stream(call, self._clock)
            ended = _Ended("the agent is stopping")
            self._stream = stream
            self._happen(LinkUp(self._clock.now()))
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = tasks.create_task(stream.send(), name="link sender")
                    ended = await self._converse(stream, address, tasks)
                    for each in (sending, *stream.answering):
                        each.cancel()
            finally:
                self._stream = None
                self._happen(LinkDown(self._clock.now(), ended.reason))
            return ended

    async def _converse(self, stream: "_Stream", address: str, tasks: asyncio.TaskGroup) -> _Ended:
        """Take in what the aggregator says until it stops, and return why it did."""
        try:
            while (message := await stream.receive()) is not None:
                relay = self._take(stream, message, address)
                if relay is not None:
                    stream.answer(relay, self._ask_mig, tasks)
        except aio.AioRpcError as error:
            return replace(_explained(error), was_welcomed=stream.is_welcomed)
        except _Silent as error:
            return _Ended(str(error), was_welcomed=stream.is_welcomed)
        return _Ended("it ended the stream", was_welcomed=stream.is_welcomed)

    def _take(
        self, stream: "_Stream", message: agent_pb2.AggregatorMessage, address: str
    ) -> MigRelay | None:
        """Tell what the aggregator said, but for a question, which is returned."""
        now = self._clock.now()
        try:
            received = read_message(message)
        except MalformedMessage as error:
            # A command that means nothing is the aggregator's to mend; the telemetry goes on.
            _log.error("aggregator %s sent a malformed message: %s", address, error)
            return None
        match received:
            case Ack(sequence):
                self._happen(FrameAcked(now, sequence))
            case Order(number, command):
                self._happen(CommandReceived(now, number, command))
            case Welcome(_, version, acked_sequence):
                stream.is_welcomed = True
                _log.info("connected to aggregator %s, version %s", address, version)
                self._happen(Welcomed(now, acked_sequence))
            case MigRelay():
                return received
            case _:
                assert_never(received)
        return None


class _Silent(Exception):
    """The aggregator has not answered for too long."""


class _Stream:
    """One stream, and what waits to be written on it: at most the outbox's window and a hello."""

    def __init__(self, call: _Call, clock: Clock) -> None:
        self.is_welcomed = False
        self.answering: set[asyncio.Task[None]] = set()
        self._call = call
        self._clock = clock
        self._queue: asyncio.Queue[agent_pb2.AgentMessage] = asyncio.Queue()
        # Since when something was said and nothing has come back; None: nothing is under way.
        self._unanswered_since: float | None = None

    def put(self, message: agent_pb2.AgentMessage) -> None:
        """Send a message after those before it."""
        self._queue.put_nowait(message)
        if self._unanswered_since is None:
            self._unanswered_since = self._clock.monotonic()

    def answer(
        self,
        relay: MigRelay,
        ask: Callable[[MigAsk], Awaitable[MigReport]],
        tasks: asyncio.TaskGroup,
    ) -> None:
        """Have a question answered, on this stream or not at all."""
        if len(self.answering) >= RELAYS_MAX:
            error = StokerError(f"{RELAYS_MAX} questions about MIG are being answered; ask again")
            self.put(mig_answer_message(relay.id, error))
            return
        task = tasks.create_task(self._answer(relay, ask), name="answer about MIG")
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)

    async def _answer(self, relay: MigRelay, ask: Callable[[MigAsk], Awaitable[MigReport]]) -> None:
        answer: MigReport | StokerError
        try:
            answer = relay.ask if isinstance(relay.ask, MalformedMessage) else await ask(relay.ask)
        except StokerError as error:
            answer = error
        self.put(mig_answer_message(relay.id, answer))

    async def send(self) -> None:
        """Write what is put until the stream ends; why it ended, `receive` tells."""
        while True:
            message = await self._queue.get()
            try:
                await self._call.write(message)
            except (aio.AioRpcError, asyncio.InvalidStateError):
                return

    async def receive(self) -> agent_pb2.AggregatorMessage | None:
        """Return the next message, or None at the end; raises _Silent or the error of the call."""
        # Not `asyncio.timeout`: to cancel a read is to cancel the call.
        reading = asyncio.ensure_future(self._call.read())
        try:
            while not reading.done():
                seconds = ACK_SECONDS_MAX if self.is_welcomed else WELCOME_SECONDS_MAX
                await asyncio.wait([reading], timeout=seconds)
                if not reading.done():
                    self._check_patience(seconds)
            message = reading.result()
        finally:
            reading.cancel()
        self._unanswered_since = None
        # End of stream is an object of grpc's own, which its types do not show.
        return message if isinstance(message, agent_pb2.AggregatorMessage) else None

    def _check_patience(self, seconds: float) -> None:
        if not self.is_welcomed:
            raise _Silent(f"no welcome within {seconds:g} s")
        since = self._unanswered_since
        if since is not None and self._clock.monotonic() - since >= seconds:
            raise _Silent(f"frames are under way, and nothing came back for {seconds:g} s")


def _explained(error: aio.AioRpcError) -> _Ended:
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        details = f"{details} (this agent speaks protocol version {PROTOCOL_VERSION})"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        details = f"{details} (is this the address of an aggregator?)"
    return _Ended(f"{code.name}: {details}", is_hopeless=code in _HOPELESS)
