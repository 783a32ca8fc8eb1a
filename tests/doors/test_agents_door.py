"""What the aggregator says to agents that cannot be, and that no node comes of them."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from grpc import aio
from tests.support.daemons import Stage
from tests.support.raw import AGENT_LINK, PLACEHOLDER, begin_stream, refusal_of
from tests.support.raw import with_bytes_that_are_not_utf8 as not_utf8

from stoker.client import AsyncFleet
from stoker.v1 import agent_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID, WRONG_VERSION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


def hello(**fields: object) -> agent_pb2.AgentMessage:
    """A hello that is right but for `fields`."""
    right: dict[str, object] = {
        "protocol_version": 1,
        "node": "node-a",
        "agent_version": "0.1.0",
        "incarnation": "1" * 32,
        "process_id": "2" * 32,
        "first_sequence": 1,
        "boot_id": "3" * 36,
        "interval_seconds": 1.0,
        "held": agent_pb2.Held(),
    }
    return agent_pb2.AgentMessage(hello=agent_pb2.Hello(**(right | fields)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Row:
    """What is sent first, and the answer: its status, and the words that its sentence must have."""

    sent: Message | bytes
    named: Sequence[str]
    code: grpc.StatusCode = INVALID


ROWS = {
    "protocol of tomorrow": Row(
        hello(protocol_version=2), ["version 2", "version 1", "aggregator"], WRONG_VERSION
    ),
    "no protocol": Row(hello(protocol_version=0), ["version 0", "version 1"], WRONG_VERSION),
    "node without a name": Row(hello(node=""), ["node", "empty"]),
    "node with a bad name": Row(hello(node="a node"), ["node", "a node"]),
    "node with a long name": Row(hello(node="n" * 254), ["node", "253"]),
    "node name that is not UTF-8": Row(not_utf8(hello(node=PLACEHOLDER)), ["hello.node", "UTF-8"]),
    "label of 3 MB": Row(hello(labels={"rack": "x" * (3 << 20)}), ["labels", "rack", "256"]),
    "too many labels": Row(
        hello(labels={f"key{number}": "x" for number in range(65)}), ["labels", "64", "65"]
    ),
    "no incarnation": Row(hello(incarnation=""), ["incarnation", "empty"]),
    "interval that is no number": Row(
        hello(interval_seconds=float("nan")), ["interval_seconds", "nan"]
    ),
    "frame before the hello": Row(
        agent_pb2.AgentMessage(frame=agent_pb2.Frame(sequence=1)), ["hello", "first"]
    ),
    "garbage": Row(b"\x0b\xff\xff", ["AgentMessage"]),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[AsyncFleet]:
    """An aggregator without agents."""
    async with Stage(tmp_path_factory.mktemp("door")) as stage:
        await stage.aggregator().start()
        async with stage.fleet() as fleet:
            yield fleet


@pytest.mark.parametrize("name", ROWS)
async def test_agent_is_refused(name: str, fleet: AsyncFleet) -> None:
    row = ROWS[name]
    data = row.sent if isinstance(row.sent, bytes) else row.sent.SerializeToString()
    with pytest.raises(aio.AioRpcError) as caught:
        await begin_stream(fleet.address, AGENT_LINK + "Connect", data)
    refusal = refusal_of(caught.value)
    assert refusal.code is row.code, refusal
    assert [word for word in row.named if word not in refusal.said] == [], refusal
    assert len(refusal.said) < 1000
    listed = await fleet.nodes()
    assert (listed.nodes, listed.resource_version) == ((), 0)
