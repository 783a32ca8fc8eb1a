"""A command that runs in an allocation: its signals, its end, and the end of its allocation."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from stoker.agent.processes import start

# What is passed on to the command.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# What a terminal sends to every process in its foreground, so to the command as well.
_FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
# A command that lost its GPUs has so long to save its work.
GRACE_SECONDS = 30.0

Receiver = Callable[[signal.Signals], None]


class SignalRouter:
    """Hands signals to whoever is in charge at the time; nobody: they are dropped."""

    def __init__(self, receiver: Receiver | None) -> None:
        """Take the signals of this process; for the main thread with a running event loop."""
        self.receiver = receiver
        for signum in FORWARDED:
            asyncio.get_running_loop().add_signal_handler(signum, self._route, signum)

    def _route(self, signum: signal.Signals) -> None:
        if self.receiver is not None:
            self.receiver(signum)


class Errand:
    """The command of `alloc -- COMMAND`."""

    def __init__(self, command: Sequence[str], grace_seconds: float = GRACE_SECONDS) -> None:
        self._command = command
        self._grace_seconds = grace_seconds
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self, variables: Mapping[str, str]) -> int:
        """Run the command with these variables too; returns its exit code, 128 + N after signal N.

        Should this process die, the command is sent SIGTERM: nothing would keep its GPUs for it.
        """
        process = start(
            self._command, env={**os.environ, **variables}, stdin=None, die_with_parent=True
        )
        self._process = process
        code = await asyncio.to_thread(process.wait)
        return code if code >= 0 else 128 - code

    def forward(self, signum: signal.Signals) -> None:
        """Pass a signal on, unless the terminal has sent it to the command itself."""
        if self._process is not None and not (signum in _FROM_TERMINAL and _is_in_foreground()):
            self._process.send_signal(signum)

    def end(self) -> None:
        """Ask the command to end, and leave the time it takes to it."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """Ask the command to end, and kill it if it does not."""
        if self._process is not None:
            self._process.terminate()
            loop = asyncio.get_running_loop()
            loop.call_later(self._grace_seconds, self._process.kill)


def _is_in_foreground() -> bool:
    """Whether a terminal controls this process and its group is the one that Ctrl-C is for."""
    with contextlib.suppress(OSError):  # no terminal
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False
