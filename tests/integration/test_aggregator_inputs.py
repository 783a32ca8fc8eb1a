"""What the clients' door says to requests that cannot be: the field is named, nothing is done."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from grpc import aio
from tests.integration.aggregator_stage import Failure, Stage, TinyAgent, failure_of, serving, wish
from tests.support.pages import fetch_metrics, read_page

from stoker.v1 import agent_pb2, agent_pb2_grpc, fleet_pb2, placing_pb2

NAN, INF = float("nan"), float("inf")
INVALID = grpc.StatusCode.INVALID_ARGUMENT
ASKED = dict[str, object]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path) as stage, stage.agent(gpus=2):
        yield stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """One for all tests that change nothing."""
    async with serving(tmp_path_factory.mktemp("inputs")) as stage, stage.agent(gpus=2):
        yield stage


@dataclass(frozen=True, slots=True)
class Bad:
    """A call, the field that the answer names, and a word of its sentence."""

    field: str
    word: str
    method: str
    message: Message


def allocate(field: str, word: str, **fields: object) -> Bad:
    return Bad(f"request.{field}", word, "Allocate", wish(**fields))  # type: ignore[arg-type]


def around(field: str, word: str, **fields: object) -> Bad:
    message = wish()
    for name, value in fields.items():
        setattr(message, name, value)
    return Bad(field, word, "Allocate", message)


def other(field: str, word: str, message: Message) -> Bad:
    method = type(message).__name__.removesuffix("Request")
    return Bad(field, word, method, message)


BAD: Mapping[str, Bad] = {
    "no GPU": allocate("gpus", "1 to 1,024", gpus=0),
    "too many GPUs": allocate("gpus", "1,025", gpus=1025),
    "share of two GPUs": allocate("gpus", "one GPU", gpus=2, memory_bytes=1),
    "share of nothing": allocate("memory_bytes", "found 0", memory_bytes=0),
    "share beyond any": allocate("memory_bytes", "found", memory_bytes=1 << 63),
    "nobody asks": allocate("holder", "empty", holder=""),
    "long holder": allocate("holder", "at most 256 bytes, found 257", holder="x" * 257),
    "long holder in few letters": allocate("holder", "found 258", holder="\u20ac" * 86),
    "holder with a bell": allocate("holder", "printable", holder="a\a"),
    "no TTL": allocate("ttl_seconds", "found 0", ttl_seconds=0.0),
    "negative TTL": allocate("ttl_seconds", "found -5", ttl_seconds=-5.0),
    "TTL beyond a year": allocate("ttl_seconds", "31,536,001", ttl_seconds=31_536_001.0),
    "TTL that is no number": allocate("ttl_seconds", "nan", ttl_seconds=NAN),
    "unknown model": allocate("models", "nearest is H100-80GB", models=("H100-80GG",)),
    "model that is no name": allocate("models", "catalogue has", models=("%%%",)),
    "long pool": allocate("pool", "at most 256", pool="p" * 257),
    "odd node": allocate("node", "letters, digits", node="a/b"),
    "long node": allocate("node", "at most 253", node="n" * 254),
    "long boot id": allocate("host_boot_id", "at most 256", host_boot_id="b" * 257),
    "many labels": allocate("labels", "at most 64", labels={str(n): "" for n in range(65)}),
    "label without a name": allocate("labels key", "empty", labels={"": "x"}),
    "label with a long name": allocate("labels key", "at most 63", labels={"k" * 64: "x"}),
    "long label": allocate("labels['k']", "at most 256 bytes", labels={"k": "v" * 257}),
    "label of 1 MB": allocate("labels['k']", "found 1048576", labels={"k": "v" * (1 << 20)}),
    "urgent beyond measure": allocate("priority", "1,000,001", priority=1_000_001),
    "long key": around("idempotency_key", "at most 128", idempotency_key="k" * 129),
    "negative wait": around("wait_seconds", "found -1", wait_seconds=-1.0),
    "endless wait": around("wait_seconds", "inf", wait_seconds=INF),
    "release of nothing": other("allocation_id", "empty", fleet_pb2.ReleaseRequest()),
    "long reason": other(
        "reason", "1024", fleet_pb2.ReleaseRequest(allocation_id="a", reason="r" * 1025)
    ),
    "patience beyond a minute": other(
        "wait_seconds", "61", fleet_pb2.ReleaseRequest(allocation_id="a", wait_seconds=61.0)
    ),
    "nothing to explain": other(
        "subject", "allocation_id or a request", placing_pb2.ExplainRequest()
    ),
    "request to explain that cannot be": other(
        "request.gpus", "found 0", placing_pb2.ExplainRequest(request=wish(gpus=0).request)
    ),
    "cordon of nothing": other("node", "empty", fleet_pb2.CordonRequest(reason="x")),
    "cordon without a reason": other("reason", "empty", fleet_pb2.CordonRequest(node="n1")),
    "uncordon of an odd name": other("node", "'n 1'", fleet_pb2.UncordonRequest(node="n 1")),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", BAD)
async def test_field_is_named_and_nothing_is_done(name: str, shared: Stage) -> None:
    bad = BAD[name]
    before = (await shared.fleet.ListNodes(fleet_pb2.ListNodesRequest())).resource_version
    method: Callable[..., aio.UnaryUnaryCall[Message, Message]] = getattr(shared.fleet, bad.method)
    failure = await failure_of(method(bad.message))
    assert (failure.code, failure.reason, failure.fields) == (
        INVALID,
        "INVALID_REQUEST",
        [bad.field],
    )
    assert bad.word in failure.sentence
    assert failure.sentence.startswith(bad.field)
    assert len(failure.sentence) < 1_000
    after = (await shared.fleet.ListNodes(fleet_pb2.ListNodesRequest())).resource_version
    assert after == before


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "message",
    [
        fleet_pb2.ReleaseRequest(allocation_id="nobody"),
        placing_pb2.ExplainRequest(allocation_id="nobody"),
        fleet_pb2.CordonRequest(node="nowhere", reason="x"),
        fleet_pb2.UncordonRequest(node="nowhere"),
    ],
    ids=lambda message: type(message).__name__,
)
async def test_what_is_not_there_is_named(message: Message, shared: Stage) -> None:
    method: Callable[..., aio.UnaryUnaryCall[Message, Message]]
    method = getattr(shared.fleet, type(message).__name__.removesuffix("Request"))
    failure = await failure_of(method(message))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert "nobody" in failure.sentence or "node nowhere" in failure.sentence


async def test_text_that_is_not_utf8_is_found_and_named(stage: Stage) -> None:
    data = wish(holder="XXXX").SerializeToString().replace(b"XXXX", b"ab\xff\xfe")
    failure = await failure_of(stage.raw("Allocate", data))
    assert (failure.code, failure.fields) == (INVALID, ["request.holder"])
    assert "not UTF-8 at byte 2 of 4" in failure.sentence


async def test_bytes_that_are_no_message_are_refused(stage: Stage) -> None:
    failure = await failure_of(stage.raw("Allocate", b"\xff\xff"))
    assert failure.code is INVALID
    assert "AllocateRequest" in failure.sentence


async def test_label_of_10_megabytes_is_refused_unread_and_the_line_lives(stage: Stage) -> None:
    failure = await failure_of(stage.fleet.Allocate(wish(labels={"k": "v" * 10_000_000})))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in failure.sentence
    await stage.allocate()


async def test_malformed_keep_alive_ends_its_stream(stage: Stage) -> None:
    call = stage.fleet.KeepAlive()
    await call.write(fleet_pb2.KeepAliveRequest())
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert Failure(caught.value).fields == ["allocation_id"]


async def test_model_of_the_fleet_is_known_though_not_in_the_catalogue(stage: Stage) -> None:
    async with stage.agent("n2", 1) as agent:
        assert agent.gpus[0].model not in ("", "Quantum 9000")
    failure = await failure_of(stage.fleet.Allocate(wish(models=("Quantum-9000",))))
    assert failure.fields == ["request.models"]
    hello = agent.hello()
    hello.node, hello.incarnation = "n3", "of n3"
    hello.inventory.gpus[0].model = "NVIDIA Quantum 9000"
    hello.inventory.gpus[0].uuid = "GPU-n3"
    call = agent_pb2_grpc.AgentLinkStub(stage.channel).Connect()
    await call.write(agent_pb2.AgentMessage(hello=hello))
    await call.read()
    failure = await failure_of(stage.fleet.Allocate(wish(models=("Quantum-9000",))))
    assert failure.reason == "CANNOT_PLACE"
    call.cancel()


async def test_refusals_of_a_large_fleet_fit_a_client_with_default_limits(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        for number in range(60):
            name = f"node-{number:03}-with-a-name-of-some-length.rack-{number % 7}.example.internal"
            async with TinyAgent(name, gpus=1).connected(stage.channel):
                pass
        failure = await failure_of(stage.fleet.Allocate(wish(gpus=4)))
        assert failure.reason == "CANNOT_PLACE"
        assert failure.refusals is not None
        assert failure.refusals.nodes_total == 60
        assert 5 <= len(failure.refusals.nodes) < 60
        asked = placing_pb2.ExplainRequest(request=wish(gpus=4).request)
        assert len((await stage.fleet.Explain(asked)).refusals.nodes) == 60


async def test_every_answer_to_allocate_is_counted(stage: Stage) -> None:
    await stage.allocate(key="k1", gpus=2)
    await stage.allocate(key="k1", gpus=2)
    await failure_of(stage.fleet.Allocate(wish()))
    await failure_of(stage.fleet.Allocate(wish(gpus=0)))
    (await stage.queue()).hang_up()
    page = read_page(await fetch_metrics(str(stage.aggregator.metrics_address)))
    counted = {
        dict(labels)["outcome"]: n for labels, n in page["stoker_allocation_requests_total"].items()
    }
    assert counted == {
        "granted": 1,
        "repeated": 1,
        "refused": 1,
        "invalid": 1,
        "queued": 1,
        "failed": 0,
    }
