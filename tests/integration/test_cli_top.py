"""`stoker top` on a real fleet: lines, documents, and the screen of a terminal."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.support.daemons import Stage, plain_environment, ready_nodes, stoker
from tests.support.waiting import until_true

from stoker.client import AsyncFleet
from stoker.core.errors import ExitCode

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncFleet]:
    async with Stage(tmp_path_factory.mktemp("top")) as stage:
        await stage.aggregator().start()
        await stage.agent("node-a", "2xT4").start()
        async with stage.fleet() as fleet:
            await ready_nodes(fleet, 1)
            yield fleet


async def test_lines_where_no_terminal_is(fleet: AsyncFleet) -> None:
    done = stoker(*("top", "--address", fleet.address, "--interval", "100ms", "--iterations", "2"))
    assert done.returncode == ExitCode.OK, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (1 + 1 + 2)  # sums, names of columns, GPUs
    for look in (lines[:4], lines[4:]):
        assert "1 of 1 node ready; 0 of 2 GPUs allocated" in look[0]
        assert [re.split(r"\s{2,}", line)[:2] for line in look[2:]] == [
            ["node-a", "0"],
            ["node-a", "1"],
        ]
        assert all("SIMULATED" in line for line in look[2:])


async def test_a_document_for_each_look(fleet: AsyncFleet) -> None:
    done = stoker(
        *("top", "--json", "--address", fleet.address, "--interval=100ms", "--iterations=2")
    )
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(looks) == 2
    for look in looks:
        assert [len(node["gpus"]) for node in look["nodes"]] == [2]
        assert look["allocations"] == []


async def test_too_short_an_interval_is_refused(fleet: AsyncFleet) -> None:
    done = stoker("top", "--address", fleet.address, "--interval", "1ms")
    assert done.returncode == ExitCode.USAGE
    assert "--interval" in done.stderr


# Makes a terminal its own, so that Ctrl-C is a signal to it, and becomes the command.
ON_TERMINAL = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


class Screen:
    """`stoker top` in the foreground of a terminal, and what it shows."""

    def __init__(self, address: str) -> None:
        self._screen, terminal = pty.openpty()
        command = [sys.executable, "-m", "stoker.cli", "top", "--address", address]
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, str(terminal), *command],
            env=plain_environment({"TERM": "xterm", "COLUMNS": "100", "LINES": "10"}),
            pass_fds=[terminal],
        )
        os.close(terminal)
        os.set_blocking(self._screen, False)
        self._shown = b""

    def shows(self, text: bytes) -> bool:
        # BlockingIOError: nothing new; otherwise the other side is closed.
        with contextlib.suppress(OSError):
            self._shown += os.read(self._screen, 65536)
        return text in self._shown

    def press(self, key: bytes) -> None:
        os.write(self._screen, key)

    def has_ended(self) -> bool:
        self.shows(b"")  # nobody else empties what the terminal holds
        return self.process.poll() is not None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 130)])
async def test_a_key_ends_the_screen(fleet: AsyncFleet, key: bytes, code: int) -> None:
    screen = Screen(fleet.address)
    try:
        await until_true("the GPUs on the screen", lambda: screen.shows(b"node-a"))
        screen.press(key)
        # What was on the screen before comes back.
        await until_true("the end of the screen", lambda: screen.shows(b"\x1b[?1049l"))
        await until_true("the end of `stoker top`", screen.has_ended)
        assert screen.process.returncode == code
    finally:
        screen.close()
