"""What people see of services, as golden files; foreign words in it are only words."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType
from tests.conftest import Golden

from stoker.cli import render_services, screen
from stoker.client import Endpoint, ServiceEndpoints

ADDRESS = "127.0.0.1:7070"
WELL = Endpoint(
    *("e1", "10.0.0.5:9000", 0.62, "as well as its peers", "0a1b2c3d4e5f6071", "gpu-1"),
    gpu_uuids=("GPU-1",),
    capacity=32,
    in_flight=3.25,
    latency_p50_seconds=0.0123,
    operations_per_second=245.6,
    error_ratio=0.0,
    utilization_ratio=0.43,
    memory_used_ratio=0.5,
)
SLOW = replace(
    WELL,
    address="10.0.0.6:9000",
    weight=0.38,
    reason="slower: a median of 2.1 s; its GPU is 97 % busy",
    allocation_id="1b2c3d4e5f60718a",
    node="gpu-2",
    capacity=None,
    in_flight=12.0,
    latency_p50_seconds=2.1,
    operations_per_second=4.56,
    error_ratio=0.08,
    utilization_ratio=0.97,
)
OUT = Endpoint(
    *("e3", "[fd00::7]:9000", 0.0, "GPU 3 of node gpu-3 is unhealthy: Xid 79", "2c3d", "gpu-3"),
    gpu_uuids=("GPU-3",),
)
TOKENIZER = ServiceEndpoints("tokenizer", 7, "epoch", True, 1.8e9, (WELL, SLOW))
EMBEDDER = ServiceEndpoints("embedder", 4, "epoch", True, 1.8e9, (OUT,))
JUST_STARTED = tuple(replace(each, settled=False) for each in (EMBEDDER, TOKENIZER))

ROWS = {
    "services": ((EMBEDDER, TOKENIZER), 200),
    "services-narrow": ((EMBEDDER, TOKENIZER), 80),
    "services-none": ((), 200),
    "services-just-started": (JUST_STARTED, 120),
}


def text_of(shown: RenderableType, width: int = 200) -> str:
    stream = io.StringIO()
    screen.show(shown, screen.console(stream, width))
    return stream.getvalue()


@pytest.mark.parametrize("name", ROWS)
def test_what_people_see(name: str, golden: Golden) -> None:
    found, width = ROWS[name]
    golden(f"cli/{name}.txt", text_of(render_services.services(found, ADDRESS), width))


def said_everywhere(said: str) -> RenderableType:
    endpoint = replace(WELL, address=said, reason=said, allocation_id=said, node=said)
    found = replace(TOKENIZER, service=said, endpoints=(endpoint,))
    return render_services.services((found,), said)


@given(st.text(min_size=1, max_size=12))
def test_no_word_of_a_replica_disturbs_the_terminal(said: str) -> None:
    lines = text_of(said_everywhere(said), 10_000).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == len(text_of(said_everywhere("x"), 10_000).split("\n"))


def test_markup_is_words() -> None:
    assert text_of(said_everywhere("[red]"), 10_000).count("[red]") == 6
