"""Whatever is said to the root helper, however: it stays up, stays small, and does no more."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Generator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.root_helper import (
    SECONDS_MAX,
    LogPipe,
    ProcTree,
    RunningHelper,
    open_folder,
    running,
)

from stoker.agent.helper.server import CONNECTIONS_MAX, REQUEST_BYTES_MAX
from stoker.agent.helper.verbs import VERBS

RSS_GROWTH_BYTES_MAX = 2 << 20
LIST = b'{"verb": "list_holders"}\n'

WORDS = st.sampled_from(
    [
        *VERBS,
        *("verb", "pid", "boot_id", "after", "reboot", "kill", "__init__", "environ", "../1", ""),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=8,
)
REQUESTS = JSON | st.dictionaries(WORDS, JSON, max_size=4).map(
    lambda found: {"verb": "list_holders", **found}
)
LINES = REQUESTS.map(lambda value: json.dumps(value).encode() + b"\n")
SAID = (
    st.binary(max_size=2 * REQUEST_BYTES_MAX)
    | LINES
    | st.tuples(LINES, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    | st.lists(LINES, max_size=3).map(b"".join)
    | st.integers(1, 1 << 18).map(lambda size: b"x" * size)
)
LAWS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def found() -> Generator[RunningHelper]:
    with open_folder() as folder:
        tree, log = ProcTree(folder / "proc"), LogPipe(folder / "kmsg")
        tree.add(10, open_files=["/dev/nvidia0"], environ=b"SECRET=1\0SLURM_JOB_ID=2\0")
        options = (
            *("--proc", str(tree.root), "--kmsg", str(log.path)),
            *("--pod-resources", str(folder / "nowhere.sock")),
        )
        tuning = {"server.LINE_SECONDS_MAX": 0.2, "verbs.HEARTBEAT_SECONDS": 0.1}
        with running(folder, *options, tuning=tuning) as found:
            yield found
        log.close()


@contextlib.contextmanager
def unharmed(found: RunningHelper) -> Generator[None]:
    """Expect that it answers afterwards as before, and that nothing of it has grown."""
    answer = settled_answer(found)
    process = psutil.Process(found.process.pid)
    descriptors, rss = process.num_fds(), process.memory_info().rss
    yield
    assert settled_answer(found) == answer
    assert process.num_fds() == descriptors
    assert process.memory_info().rss - rss < RSS_GROWTH_BYTES_MAX


def settled_answer(found: RunningHelper) -> list[dict[str, Any]]:
    """Return what it answers once all others are served."""
    deadline = time.monotonic() + SECONDS_MAX
    while time.monotonic() < deadline:
        assert found.process.poll() is None, found.log()
        answer = found.ask(LIST)
        if answer and "ok" in answer[0] and not found.children:
            return answer
    raise AssertionError(f"it does not come to rest: {found.log()}")


@pytest.fixture(scope="module", autouse=True)
def unharmed_by_all(found: RunningHelper) -> Generator[None]:
    with unharmed(found):
        yield


@LAWS
@given(SAID)
def test_what_is_said_is_answered_or_refused(found: RunningHelper, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(os.fsencode(found.path))  # waits its turn
        line.settimeout(SECONDS_MAX)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(said)
            line.shutdown(socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(1 << 16):
                heard += part
    told = [json.loads(each) for each in heard.splitlines()]
    assert told, "it hung up without a word"
    assert b"SECRET" not in heard
    if "refused" in told[0]:
        assert len(told) == 1
        return
    # Not refused: so it was exactly one of the verbs.
    verb = json.loads(said)["verb"]
    assert verb in VERBS
    assert told[0]["ok"] is True
    if verb == "list_holders":
        assert json.loads(said) == {"verb": verb}


@settings(LAWS, max_examples=60)
@given(st.lists(st.tuples(SAID, st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_callers_who_come_at_once_and_go_as_they_like(
    found: RunningHelper, crowd: list[tuple[bytes, bool, bool]]
) -> None:
    with contextlib.ExitStack() as opened:
        for said, is_left_open, hears in crowd:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            line.connect(os.fsencode(found.path))  # waits its turn
            line.settimeout(SECONDS_MAX)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                line.settimeout(0.05)
                line.sendall(said)
                if hears:
                    line.recv(10)
            if is_left_open:
                opened.callback(line.close)
            else:
                line.close()
        assert len(found.children) <= 2 * CONNECTIONS_MAX, "each with one who reads memory"


def test_many_callers_leave_nothing(found: RunningHelper) -> None:
    with unharmed(found):
        for _ in range(300):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
                line.connect(os.fsencode(found.path))  # waits its turn
                line.settimeout(SECONDS_MAX)
                line.sendall(b'{"verb"')
