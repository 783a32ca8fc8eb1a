"""A status fits into a client's trailers, whatever it has to tell."""

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import status_pb2  # type: ignore[import-untyped]

from stoker.aggregator.failures import CallFailure, cannot_place, cut, invalid
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Refusal, Refusals
from stoker.v1 import types_pb2

# What a client takes unless it was told otherwise, for all trailers together.
TRAILERS_BYTES_MAX = 8_192


class Recorder:
    """The context of a call that remembers how it was ended."""

    def __init__(self) -> None:
        self.trailers: dict[str, bytes] = {}
        self.sentence = ""

    async def abort(
        self, code: object, sentence: str, trailers: tuple[tuple[str, bytes], ...]
    ) -> None:
        self.sentence = sentence
        self.trailers = dict(trailers)


async def aborted(failure: CallFailure) -> tuple[Recorder, list[AnyMessage]]:
    context = Recorder()
    await failure.abort(context)  # type: ignore[arg-type]
    status = status_pb2.Status.FromString(context.trailers["grpc-status-details-bin"])
    assert status.message == context.sentence
    return context, list(status.details)


def refusals_of(details: list[AnyMessage]) -> types_pb2.Refusals:
    found = types_pb2.Refusals()
    assert any(detail.Unpack(found) for detail in details)
    return found


@pytest.mark.parametrize(
    ("count", "length"), [(0, 10), (1, 10), (1, 50_000), (8, 200), (10_000, 80)]
)
async def test_refusals_fit_and_tell_how_many_there_were(count: int, length: int) -> None:
    nodes = tuple(Refusal(f"node-{i}", "gpus_free", "€" * length, "1", "0") for i in range(count))
    context, details = await aborted(cannot_place(Refusals("no node: " + "€" * length, nodes, 3)))
    # Details may be sent in base64, and each sign of the sentence in three.
    size = (
        len(context.trailers["grpc-status-details-bin"]) * 4 / 3
        + len(context.sentence.encode()) * 3
    )
    assert size < TRAILERS_BYTES_MAX + 200
    told = refusals_of(details)
    assert (told.nodes_total, told.ahead) == (count, 3)
    assert len(told.nodes) >= min(count, 1)
    assert told.summary.startswith("no node: ")


async def test_few_refusals_are_told_whole() -> None:
    nodes = tuple(Refusal(f"n{i}", "cordoned", "cordoned: fans", "a", "b") for i in range(8))
    _, details = await aborted(cannot_place(Refusals("no", nodes)))
    assert [(each.node, each.reason) for each in refusals_of(details).nodes] == [
        (f"n{i}", "cordoned: fans") for i in range(8)
    ]


async def test_long_complaint_is_cut() -> None:
    context, _ = await aborted(invalid(Malformed("labels", "x" * 100_000)))
    assert len(context.sentence) < 1_000
    assert context.sentence.endswith("…")


@pytest.mark.parametrize(
    ("text", "size", "cut_text"),
    [("short", 5, "short"), ("longer", 5, "lo…"), ("€€€", 9, "€€€"), ("€€€", 8, "€…")],
)
def test_cut_keeps_whole_signs(text: str, size: int, cut_text: str) -> None:
    assert cut(text, size) == cut_text
