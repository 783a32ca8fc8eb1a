"""The simulated network: streams in order, breaks, partitions, and what each end learns when."""

from random import Random

import pytest

from stoker.testing.network import (
    NO_FAULTS,
    PATIENCE_SECONDS,
    SLOW_SECONDS_MAX,
    End,
    Network,
    NetworkFaults,
)
from stoker.testing.scheduler import Scheduler


class Line:
    """A stream from "node-1" to "aggregator", and what each side has heard."""

    def __init__(self, faults: NetworkFaults = NO_FAULTS, seed: int = 1) -> None:
        self.scheduler = Scheduler()
        self.network = Network(self.scheduler, Random(seed), faults)
        self.heard: dict[str, list[bytes]] = {"node-1": [], "aggregator": []}
        self.ended: dict[str, tuple[float, str]] = {}
        self.far: list[End] = []
        self.network.listen("aggregator", "agents", self._accept)
        self.near = self.network.dial("node-1", "aggregator", "agents")
        self._attend(self.near)

    def _accept(self, end: End) -> None:
        self.far.append(end)
        self._attend(end)

    def _attend(self, end: End) -> None:
        end.on_message = self.heard[end.owner].append

        def note(reason: str) -> None:
            self.ended[end.owner] = (self.scheduler.now, reason)

        end.on_end = note

    def run(self, seconds: float) -> None:
        self.scheduler.run_until(self.scheduler.now + seconds, after_each=lambda: None)


MESSAGES = [bytes([number]) for number in range(50)]


def test_messages_arrive_in_order_however_slow_some_are() -> None:
    line = Line(NetworkFaults(slow=0.5, stream_breaks_per_message=0.0))
    line.run(SLOW_SECONDS_MAX + 1)
    for message in MESSAGES:
        line.near.send(message)
        line.far[0].send(message)
    line.run(SLOW_SECONDS_MAX + 1)
    assert line.heard == {"node-1": MESSAGES, "aggregator": MESSAGES}


def test_what_is_sent_before_the_stream_is_accepted_arrives_after_it() -> None:
    line = Line()
    line.near.send(b"hello")
    line.run(1.0)
    assert line.heard["aggregator"] == [b"hello"]


def test_nobody_listens() -> None:
    line = Line()
    line.network.stop_listening("aggregator")
    line.run(1.0)
    assert line.ended["node-1"][1] == "the stream broke"


def test_a_close_is_heard_after_what_was_sent_before_it() -> None:
    line = Line()
    line.run(1.0)
    line.near.send(b"last words")
    line.near.close()
    line.near.send(b"too late")
    line.run(1.0)
    assert line.heard["aggregator"] == [b"last words"]
    assert [(owner, reason) for owner, (_, reason) in line.ended.items()] == [
        ("aggregator", "closed by its peer")
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_break_loses_the_end_of_what_is_under_way(seed: int) -> None:
    line = Line(seed=seed)
    line.run(1.0)
    for message in MESSAGES:
        line.near.send(message)
    line.network.break_all_of("aggregator")
    line.near.send(b"not known yet to be lost")
    line.run(1.0)
    arrived = line.heard["aggregator"]
    assert arrived == MESSAGES[: len(arrived)]
    assert line.ended.keys() == {"node-1", "aggregator"}


def test_a_partition_that_ends_soon_only_delays() -> None:
    line = Line()
    line.run(1.0)
    line.network.partition("node-1", "aggregator")
    for message in MESSAGES:
        line.near.send(message)
    line.run(PATIENCE_SECONDS[0] - 1)
    assert line.heard["aggregator"] == []
    line.network.heal("node-1", "aggregator")
    line.run(PATIENCE_SECONDS[1] + 1)
    assert line.heard["aggregator"] == MESSAGES
    assert line.ended == {}


def test_in_a_long_partition_each_end_loses_patience_in_its_own_time() -> None:
    line = Line()
    line.run(1.0)
    line.network.partition("node-1", "aggregator")
    line.run(PATIENCE_SECONDS[1] + 1)
    (one, _), (other, _) = line.ended.values()
    assert one != other
    assert PATIENCE_SECONDS[0] <= min(one, other) - 1.0
    assert max(one, other) - 1.0 <= PATIENCE_SECONDS[1]
    again = line.network.dial("node-1", "aggregator", "agents")
    line.run(10.0)
    assert not again.is_open, "dialled in vain"


def test_whoever_holds_half_a_stream_learns_it_when_the_partition_ends() -> None:
    line = Line()
    line.run(1.0)
    line.network.partition("node-1", "aggregator")
    line.near.close()
    line.run(PATIENCE_SECONDS[0] - 1)
    assert line.ended == {}
    line.network.heal_all()
    line.run(1.0)
    assert line.ended.keys() == {"aggregator"}


def test_a_silent_host_is_noticed_by_impatience_only() -> None:
    line = Line()
    line.run(1.0)
    line.network.fall_silent("node-1")
    line.run(PATIENCE_SECONDS[0] - 0.1)
    assert line.ended == {}
    line.run(PATIENCE_SECONDS[1])
    assert line.ended.keys() == {"aggregator"}


def test_same_seed_same_network() -> None:
    def tell(seed: int) -> tuple[dict[str, list[bytes]], dict[str, tuple[float, str]]]:
        line = Line(NetworkFaults(slow=0.2, stream_breaks_per_message=0.02), seed)
        line.run(1.5)
        for message in MESSAGES:
            line.near.send(message)
            line.run(0.1)
        return line.heard, line.ended

    assert tell(3) == tell(3)
    assert tell(3) != tell(4)
