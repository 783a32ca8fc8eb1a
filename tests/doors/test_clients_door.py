"""What the aggregator says to requests that cannot be, and that nothing comes of them."""

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from grpc import aio
from tests.support.daemons import Stage, free_nodes
from tests.support.raw import FLEET, PLACEHOLDER, refusal_of, send, watch
from tests.support.raw import with_bytes_that_are_not_utf8 as not_utf8

from stoker.client import AsyncFleet
from stoker.v1 import fleet_pb2, placing_pb2, types_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED_KEY = "used"


def wish(**fields: object) -> fleet_pb2.AllocateRequest:
    """A request that is right but for `fields`."""
    return with_request({}, **fields)


def with_request(around: dict[str, object], **fields: object) -> fleet_pb2.AllocateRequest:
    request = {"gpus": 1, "holder": "somebody", "ttl_seconds": 60.0, **fields}
    return fleet_pb2.AllocateRequest(request=types_pb2.Request(**request), **around)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Row:
    """What is sent, and the answer: its status, and the words that its sentence must have."""

    sent: Message | bytes
    named: Sequence[str]
    reason: str = "INVALID_REQUEST"
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    method: str = "Allocate"


def refused(sent: Message, *named: str) -> Row:
    return Row(sent, named, "CANNOT_PLACE", grpc.StatusCode.RESOURCE_EXHAUSTED)


def unknown(method: str, sent: Message, *named: str) -> Row:
    return Row(sent, named, "NOT_FOUND", grpc.StatusCode.NOT_FOUND, method)


ROWS = {
    "no GPUs": Row(wish(gpus=0), ["gpus", "found 0"]),
    "more GPUs than any node has": Row(wish(gpus=5000), ["gpus", "5,000"]),
    "gang with memory": Row(wish(gpus=2, memory_bytes=1 << 30), ["gpus", "memory"]),
    "no memory": Row(wish(memory_bytes=0), ["memory_bytes", "found 0"]),
    "memory beyond a signed field": Row(wish(memory_bytes=1 << 63), ["memory_bytes"]),
    "negative TTL": Row(wish(ttl_seconds=-5.0), ["ttl_seconds", "-5"]),
    "no TTL": Row(wish(ttl_seconds=0.0), ["ttl_seconds", "found 0"]),
    "TTL that is no number": Row(wish(ttl_seconds=math.nan), ["ttl_seconds", "nan"]),
    "TTL without end": Row(wish(ttl_seconds=math.inf), ["ttl_seconds", "inf"]),
    "no holder": Row(wish(holder=""), ["holder", "empty"]),
    "holder too long": Row(wish(holder="h" * 257), ["holder", "256", "257"]),
    "holder with a line break": Row(wish(holder="a\nb"), ["holder", "printable", "\\n"]),
    "holder that is not UTF-8": Row(
        not_utf8(wish(holder=PLACEHOLDER)), ["request.holder", "UTF-8"]
    ),
    "label that is not UTF-8": Row(
        not_utf8(wish(labels={"job": PLACEHOLDER})), ["request.labels", "UTF-8"]
    ),
    "label too long": Row(wish(labels={"job": "x" * 257}), ["labels", "job", "256", "257"]),
    "label of 3 MB": Row(wish(labels={"job": "x" * (3 << 20)}), ["labels", "job", "256"]),
    "label of 10 MB": Row(
        wish(labels={"job": "x" * (10 << 20)}),
        ["message", "larger", "10485"],
        "",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    "name of a label too long": Row(wish(labels={"j" * 64: "x"}), ["labels", "63", "64"]),
    "too many labels": Row(
        wish(labels={f"key{number}": "x" for number in range(65)}), ["labels", "64", "65"]
    ),
    "unknown GPU model": Row(wish(models=("H100-80BG",)), ["model", "H100-80BG", "H100-80GB"]),
    "priority out of range": Row(wish(priority=2_000_000), ["priority", "2,000,000"]),
    "negative wait": Row(with_request({"wait_seconds": -1.0}), ["wait_seconds", "-1"]),
    "wait without end": Row(with_request({"wait_seconds": math.inf}), ["wait_seconds", "inf"]),
    "key too long": Row(
        with_request({"idempotency_key": "k" * 129}), ["idempotency_key", "128", "129"]
    ),
    "key of another request": Row(
        with_request({"idempotency_key": USED_KEY}, gpus=2),
        ["idempotency key", USED_KEY, "another request"],
        "KEY_REUSED",
        grpc.StatusCode.ALREADY_EXISTS,
    ),
    "nothing asked for": Row(fleet_pb2.AllocateRequest(), ["gpus"]),
    "garbage": Row(b"\x0b\xff\xff", ["AllocateRequest"]),
    "model that no node has": refused(wish(models=("B200",)), "B200"),
    "node that is not there": refused(wish(node="node-z"), "node"),
    "more GPUs than the node has": refused(wish(gpus=3), "3"),
    "released, and unknown": unknown(
        "Release", fleet_pb2.ReleaseRequest(allocation_id="nobody"), "nobody"
    ),
    "released, without an id": Row(fleet_pb2.ReleaseRequest(), ["allocation_id"], method="Release"),
    "released, with an id that is not UTF-8": Row(
        not_utf8(fleet_pb2.ReleaseRequest(allocation_id=PLACEHOLDER)),
        ["allocation_id", "UTF-8"],
        method="Release",
    ),
    "explained, and unknown": unknown(
        "Explain", placing_pb2.ExplainRequest(allocation_id="nobody"), "nobody"
    ),
    "nothing to explain": Row(placing_pb2.ExplainRequest(), ["subject"], method="Explain"),
    "cordoned, and unknown": unknown(
        "Cordon", fleet_pb2.CordonRequest(node="node-z", reason="broken"), "node-z"
    ),
    "cordoned without a reason": Row(
        fleet_pb2.CordonRequest(node="node-a"), ["reason", "empty"], method="Cordon"
    ),
    "cordoned, with a name that is none": Row(
        fleet_pb2.CordonRequest(node="../a", reason="x"), ["node", "../a"], method="Cordon"
    ),
    "uncordoned, and unknown": unknown(
        "Uncordon", fleet_pb2.UncordonRequest(node="node-z"), "node-z"
    ),
    "a GPU cordoned, and unknown": unknown(
        "Cordon", fleet_pb2.CordonRequest(node="node-a", reason="x", gpu_uuid="GPU-z"), "GPU-z"
    ),
    "a GPU uncordoned, and unknown": unknown(
        "Uncordon", fleet_pb2.UncordonRequest(node="node-a", gpu_uuid="GPU-z"), "GPU-z"
    ),
    "drained, and unknown": unknown(
        "Drain", fleet_pb2.DrainRequest(node="node-z", reason="broken"), "node-z"
    ),
    "drained without a reason": Row(
        fleet_pb2.DrainRequest(node="node-a"), ["reason", "empty"], method="Drain"
    ),
    "drained with a grace that is none": Row(
        fleet_pb2.DrainRequest(node="node-a", reason="x", grace_seconds=-1.0),
        ["grace_seconds", "-1"],
        method="Drain",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[AsyncFleet]:
    """A fleet with one node of two GPUs, one of them taken."""
    async with Stage(tmp_path_factory.mktemp("door")) as stage:
        await stage.aggregator().start()
        await stage.agent("node-a", "2xT4").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            await fleet.request(gpus=1, holder="first", idempotency_key=USED_KEY)
            yield fleet


@pytest.mark.parametrize("name", ROWS)
async def test_request_is_refused(name: str, fleet: AsyncFleet) -> None:
    row = ROWS[name]
    before = await settled(fleet)
    data = row.sent if isinstance(row.sent, bytes) else row.sent.SerializeToString()
    with pytest.raises(aio.AioRpcError) as caught:
        await send(fleet.address, FLEET + row.method, data)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (row.code, row.reason), refusal
    assert [word for word in row.named if word not in refusal.said] == [], refusal
    assert len(refusal.said) < 1000
    assert await settled(fleet) == before


async def test_watch_beyond_the_newest_version_is_refused(fleet: AsyncFleet) -> None:
    asked = fleet_pb2.WatchRequest(resource_version=1 << 40)
    with pytest.raises(aio.AioRpcError) as caught:
        await watch(fleet.address, FLEET + "Watch", asked.SerializeToString())
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "VERSION_TOO_OLD")
    assert str(1 << 40) in refusal.said


async def test_method_that_is_not_there_is_unimplemented(fleet: AsyncFleet) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await send(fleet.address, FLEET + "Evict", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def settled(fleet: AsyncFleet) -> object:
    """What the ledger says; a node's confirmation is no part of it."""
    answer = await fleet.allocations(include_ended=True)
    return answer.resource_version, [(each.id, each.state) for each in answer.allocations]
