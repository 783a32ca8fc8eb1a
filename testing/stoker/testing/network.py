"""A seeded network between the processes of a simulated world, as unkind as a real one.

Streams are gRPC's: in order and reliable while they live. A partition stalls a stream; what was
sent meanwhile arrives when it heals, unless an end lost patience first, each in its own time, so
one end may believe in a stream that the other has given up. When a stream breaks, what was under
way is lost from some point on, in each direction its own. What a dead stream still delivers is the
owner's to ignore, so it is delivered now and then.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from stoker.testing.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """How unkind the network is; every figure is a probability unless its name says otherwise."""

    latency_seconds: float = 0.0005
    latency_jitter_seconds: float = 0.002
    slow: float = 0.01  # a message takes up to SLOW_SECONDS_MAX more
    call_twice: float = 0.02  # a client does not wait for the answer to its first call
    stream_breaks_per_message: float = 0.002
    late_after_break: float = 0.3  # what was under way when a stream broke still reaches its owner


NO_FAULTS = NetworkFaults(slow=0, call_twice=0, stream_breaks_per_message=0)

SLOW_SECONDS_MAX = 1.0
# How long an end waits for a peer that does not answer before it gives the stream up (gRPC's
# keepalive).
PATIENCE_SECONDS = (5.0, 25.0)
# How long a dial into a partition takes to fail.
DIAL_SECONDS = (1.0, 5.0)


def _ignore_message(message: bytes) -> None:
    del message


def _ignore_end(reason: str) -> None:
    del reason


class End:
    """One side of a stream, as the process that owns it sees it."""

    def __init__(self, network: "Network", owner: str, peer: str) -> None:
        self.owner = owner
        self.peer = peer
        self.is_open = True
        self.on_message: Callable[[bytes], None] = _ignore_message
        self.on_end: Callable[[str], None] = _ignore_end
        self._network = network

    def send(self, message: bytes) -> None:
        """Send in order, for as long as this side believes in the stream."""
        if self.is_open:
            self._network.carry(self, message)

    def close(self) -> None:
        """Give the stream up: what was sent still arrives, and what comes is to be ignored."""
        if self.is_open:
            self.is_open = False
            self._network.closed(self)


@dataclass(slots=True, eq=False)
class _Flow:
    """One direction of a stream: what is under way to `to`."""

    to: End
    under_way: deque[bytes]
    last_arrival: float = 0.0
    stalled: int = 0  # arrivals that a partition holds back


@dataclass(slots=True, eq=False)
class _Stream:
    ends: tuple[End, End]
    flows: dict[End, _Flow]  # by the sending end
    is_broken: bool = False

    @property
    def between(self) -> frozenset[str]:
        return frozenset((self.ends[0].owner, self.ends[1].owner))


class Network:
    """Delivers on virtual time. It knows processes by name: "aggregator", "node-3"."""

    def __init__(self, scheduler: Scheduler, rng: Random, faults: NetworkFaults) -> None:
        self.faults = faults
        self._scheduler = scheduler
        self._rng = rng
        self._listeners: dict[tuple[str, str], Callable[[End], None]] = {}
        # By each side that has not learned of the end.
        self._streams: dict[End, _Stream] = {}
        self._cut: dict[frozenset[str], int] = {}  # pair -> which partition
        self._partitions = 0

    # --- streams

    def listen(self, process: str, door: str, accept: Callable[[End], None]) -> None:
        """Have `accept` called with this side of every new stream to that door."""
        self._listeners[process, door] = accept

    def stop_listening(self, process: str) -> None:
        """Refuse what dials that process from now on."""
        for key in [key for key in self._listeners if key[0] == process]:
            del self._listeners[key]

    def dial(self, owner: str, process: str, door: str) -> End:
        """Return the near end of a new stream; when nobody answers it ends soon, as streams do."""
        near = End(self, owner, process)
        if frozenset((owner, process)) in self._cut:
            self._scheduler.after(
                self._rng.uniform(*DIAL_SECONDS), lambda: _tell_end(near, "dialled in vain")
            )
            return near
        far = End(self, process, owner)
        stream = _Stream((near, far), {})
        stream.flows = {near: _Flow(far, deque()), far: _Flow(near, deque())}
        self._streams[near] = self._streams[far] = stream

        def knock() -> None:
            accept = self._listeners.get((process, door))
            if accept is None:
                self._break(stream)
            else:
                accept(far)

        arrival = self._arrival()
        stream.flows[near].last_arrival = arrival
        self._scheduler.at(arrival, knock)
        return near

    def carry(self, sender: End, message: bytes) -> None:
        """Take a message from its sender; the stream may break under it."""
        stream = self._streams.get(sender)
        if stream is None or stream.is_broken:
            return  # the sender does not know yet
        flow = stream.flows[sender]
        flow.under_way.append(message)
        flow.last_arrival = max(self._arrival(), flow.last_arrival)
        self._scheduler.at(flow.last_arrival, partial(self._arrive, stream, flow))
        if self._rng.random() < self.faults.stream_breaks_per_message:
            self._break(stream)

    def closed(self, end: End) -> None:
        """Let the other side know, after what was sent before."""
        stream = self._streams.get(end)
        if stream is None or stream.is_broken:
            self._forget(end)
            return
        stream.is_broken = True
        flow = stream.flows[end]
        self._notify_unless_cut(stream, flow.to, "closed by its peer", flow.last_arrival)
        self._forget(end)

    def break_all_of(self, process: str) -> None:
        """Break every stream of a process, as its death does while its host lives on."""
        for stream in self._streams_of(process):
            self._break(stream)

    def fall_silent(self, process: str) -> None:
        """Take a whole host off the network: its peers notice only when they lose patience."""
        for stream in self._streams_of(process):
            stream.is_broken = True
            for end in stream.ends:
                if end.owner != process:
                    self._lose_patience(end)
            for flow in stream.flows.values():
                flow.under_way.clear()

    def _break(self, stream: _Stream) -> None:
        """Let both ends learn of it after a moment; of what is under way the first part arrives."""
        stream.is_broken = True
        for flow in stream.flows.values():
            for _ in range(self._rng.randint(0, len(flow.under_way))):
                flow.under_way.pop()
        for end in stream.ends:
            self._notify_unless_cut(stream, end, "the stream broke", self._arrival())

    def _arrive(self, stream: _Stream, flow: _Flow) -> None:
        if stream.between in self._cut:
            flow.stalled += 1
            return
        if not flow.under_way:
            return  # it was lost in a break
        message = flow.under_way.popleft()
        if flow.to.is_open or self._rng.random() < self.faults.late_after_break:
            flow.to.on_message(message)
        else:
            flow.under_way.clear()  # nor does what follows it

    def _notify_unless_cut(self, stream: _Stream, end: End, reason: str, when: float) -> None:
        if stream.between not in self._cut:  # in a partition an end learns it by its own patience
            self._scheduler.at(max(when, self._arrival()), lambda: self._end(end, reason))

    def _lose_patience(self, end: End) -> None:
        patience = self._rng.uniform(*PATIENCE_SECONDS)
        self._scheduler.after(patience, lambda: self._end(end, "its peer does not answer"))

    def _end(self, end: End, reason: str) -> None:
        self._forget(end)
        _tell_end(end, reason)

    def _forget(self, end: End) -> None:
        self._streams.pop(end, None)

    def _streams_of(self, process: str) -> list[_Stream]:
        known = dict.fromkeys(self._streams.values())
        return [each for each in known if process in each.between and not each.is_broken]

    # --- partitions

    def partition(self, a: str, b: str) -> None:
        """Cut two processes off from each other."""
        pair = frozenset((a, b))
        if pair in self._cut:
            return
        self._partitions += 1
        number = self._cut[pair] = self._partitions
        for stream in self._streams_of(a):
            if stream.between == pair:
                for end in stream.ends:
                    self._lose_patience_if_cut(end, pair, number)

    def _lose_patience_if_cut(self, end: End, pair: frozenset[str], number: int) -> None:
        def lose() -> None:
            stream = self._streams.get(end)
            if stream is not None and self._cut.get(pair) == number:
                stream.is_broken = True
                self._end(end, "its peer does not answer")

        self._scheduler.after(self._rng.uniform(*PATIENCE_SECONDS), lose)

    def heal(self, a: str, b: str) -> None:
        """End a partition: what stalled goes on, and whoever holds half a stream learns it."""
        pair = frozenset((a, b))
        if self._cut.pop(pair, None) is None:
            return
        for stream in [s for s in dict.fromkeys(self._streams.values()) if s.between == pair]:
            for flow in stream.flows.values():
                for _ in range(flow.stalled):
                    flow.last_arrival = max(self._arrival(), flow.last_arrival)
                    self._scheduler.at(flow.last_arrival, partial(self._arrive, stream, flow))
                flow.stalled = 0
            if stream.is_broken:
                for end in stream.ends:
                    self._notify_unless_cut(stream, end, "the stream broke", self._arrival())

    def heal_all(self) -> None:
        """End every partition."""
        for pair in list(self._cut):
            self.heal(*sorted(pair))

    def _arrival(self) -> float:
        faults = self.faults
        seconds = faults.latency_seconds + self._rng.random() * faults.latency_jitter_seconds
        if self._rng.random() < faults.slow:
            seconds += self._rng.random() * SLOW_SECONDS_MAX
        return self._scheduler.now + seconds


def _tell_end(end: End, reason: str) -> None:
    if end.is_open:
        end.is_open = False
        end.on_end(reason)
