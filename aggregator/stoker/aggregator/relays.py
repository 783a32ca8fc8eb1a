"""What clients ask agents through their streams: each question gets one answer, or an end."""

import asyncio
from collections import deque

import grpc

from stoker.aggregator import limits
from stoker.aggregator.failures import CallFailure
from stoker.aggregator.limits import Malformed
from stoker.core.clock import Clock
from stoker.v1 import mig_pb2

# An agent that has not answered by then is not waited for.
ANSWER_SECONDS = 30.0
# Questions that wait for the answer of one agent; more than that nobody asks who is well.
ASKED_MAX = 32


class Relays:
    """The questions of one stream."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._next_id = 1
        self._asked: dict[int, asyncio.Future[mig_pb2.MigAnswer | CallFailure]] = {}
        self._unsent: deque[mig_pb2.MigRelay] = deque()
        self._ended: CallFailure | None = None

    async def ask(self, ask: mig_pb2.MigAsk, clock: Clock) -> mig_pb2.MigAnswer:
        """Return the agent's answer; what is to be written must be taken by `next_unsent`.

        Raises CallFailure: UNAVAILABLE when the stream ends meanwhile or no answer comes in time,
        RESOURCE_EXHAUSTED when the agent has too many questions to answer.
        """
        if self._ended is not None:
            raise self._ended
        if len(self._asked) >= ASKED_MAX:
            sentence = f"{ASKED_MAX} questions wait for the answer of node {self._node}"
            raise CallFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY", sentence)
        id_, self._next_id = self._next_id, self._next_id + 1
        answer: asyncio.Future[mig_pb2.MigAnswer | CallFailure]
        answer = self._asked[id_] = asyncio.get_running_loop().create_future()
        self._unsent.append(mig_pb2.MigRelay(id=id_, ask=ask))
        patience = asyncio.ensure_future(clock.sleep(ANSWER_SECONDS))
        try:
            await asyncio.wait((answer, patience), return_when=asyncio.FIRST_COMPLETED)
        finally:
            patience.cancel()
            self._asked.pop(id_, None)
        if not answer.done():
            sentence = f"node {self._node} did not answer within {ANSWER_SECONDS:g} s"
            raise CallFailure(grpc.StatusCode.UNAVAILABLE, "NO_ANSWER", sentence)
        found = answer.result()
        if isinstance(found, CallFailure):
            raise found
        return found

    def next_unsent(self) -> mig_pb2.MigRelay | None:
        """Return the next question to write; None: all are written.

        What nobody waits for any more is not asked.
        """
        while self._unsent:
            relay = self._unsent.popleft()
            if relay.id in self._asked:
                return relay
        return None

    def answer(self, message: mig_pb2.MigAnswer) -> None:
        """Take an answer; one that comes too late is for nobody. Raises Malformed."""
        if not 0 < message.id < self._next_id:
            raise Malformed("mig.id", f"{message.id} was not asked on this stream")
        if bool(message.report_json) is bool(message.refusal):
            raise Malformed("mig", "must be either a report or a refusal")
        found = len(message.report_json)
        if found > limits.MIG_REPORT_BYTES_MAX:
            most = limits.MIG_REPORT_BYTES_MAX
            raise Malformed("mig.report_json", f"at most {most} characters, found {found}")
        asked = self._asked.pop(message.id, None)
        if asked is not None and not asked.done():
            asked.set_result(message)

    def end(self, reason: str) -> None:
        """Let everybody who waits know that the stream is over."""
        self._ended = not_connected(self._node, reason)
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(self._ended)
        self._asked.clear()


def not_connected(node: str, reason: str) -> CallFailure:
    """The node's agent cannot be asked."""
    sentence = f"node {node} is not connected: {reason}"
    return CallFailure(grpc.StatusCode.UNAVAILABLE, "NOT_CONNECTED", sentence)
