"""A stream before, while and after the fleet knows of it."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from stoker.aggregator.ledger import Ledger
from stoker.aggregator.meters import Meters
from stoker.aggregator.sessions import AgentLink
from stoker.aggregator.store import Outcome, Store
from stoker.testing.clock import VirtualClock
from stoker.v1 import agent_pb2


class Held(Store):
    """A store whose answers are held back until they are let through."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Event()
        super().__init__(folder)

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        assert self.gate.wait(10)
        super().deliver(outcomes)


class Call:
    """The server's end of a stream on which an agent has said hello and then says nothing."""

    def __init__(self, hello: agent_pb2.Hello) -> None:
        self.said = [agent_pb2.AgentMessage(hello=hello)]
        self.heard: asyncio.Queue[agent_pb2.AggregatorMessage] = asyncio.Queue()

    async def read(self) -> agent_pb2.AgentMessage:
        if not self.said:
            await asyncio.Event().wait()
        return self.said.pop()

    async def write(self, message: agent_pb2.AggregatorMessage) -> None:
        self.heard.put_nowait(message)

    def peer(self) -> str:
        return "a test"


async def test_nothing_is_sent_on_a_stream_that_the_fleet_does_not_know_yet(tmp_path: Path) -> None:
    """What was sent would be forgotten, and a hold under way would count as never given."""
    meters, clock = Meters(), VirtualClock()
    store = Held(tmp_path)
    ledger = Ledger(store, meters, clock.now())
    link = AgentLink(ledger, meters, clock, "9.9")
    call = Call(
        agent_pb2.Hello(
            protocol_version=1,
            node="n1",
            incarnation="i",
            process_id="p",
            interval_seconds=1.0,
            inventory=agent_pb2.Inventory(gpus=[agent_pb2.Gpu(number=1, uuid="GPU-1")]),
        )
    )
    stream = asyncio.create_task(link.connect(call))  # type: ignore[arg-type]
    await clock.advance(0.0)
    assert link.next_command_id("n1") is None
    store.gate.set()
    assert (await call.heard.get()).HasField("welcome")
    assert link.next_command_id("n1") == 1
    assert link.has_inventory("n1")
    assert ledger.fleet.status("n1").session != 0
    stream.cancel()
    await asyncio.wait([stream])
    assert link.next_command_id("n1") is None
    assert ledger.fleet.status("n1").disconnected_reason == "the connection broke"
    await asyncio.to_thread(store.close)
