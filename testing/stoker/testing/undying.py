"""Driver hosts that SIGKILL does not end, as the kernel keeps one that sleeps uninterruptibly.

No test can put a process into that sleep, so what is simulated is what the agent sees of it: the
process was asked and killed, it is still there, and `/proc/PID/stat` says D. The process itself is
real: it has its call under way and its files open until it is let go.
"""

import socket

from stoker.agent.driver_host.frames import DriverSource
from stoker.agent.driver_host.process import Spawn, spawn_host, state_of
from stoker.agent.processes import Child

UNINTERRUPTIBLE = "D"


class UndyingProcess:
    """A process that, while it is held, ignores signals and cannot be reaped."""

    def __init__(self, process: Child) -> None:
        """Take a process; it is not held yet."""
        self._process = process
        self.is_held = False

    @property
    def pid(self) -> int:
        """Which process it is."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it is held, and while it runs."""
        return None if self.is_held else self._process.returncode

    def poll(self) -> int | None:
        """Reap it, unless it is held."""
        return None if self.is_held else self._process.poll()

    def terminate(self) -> None:
        """Send SIGTERM, which waits while it is held."""
        if not self.is_held:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, which waits while it is held."""
        if not self.is_held:
            self._process.kill()

    def let_go(self) -> None:
        """Let the signals through: the process ends, as one does that the kernel lets go."""
        self.is_held = False
        self._process.kill()


class Undying:
    """Starts driver hosts (`DriverHost(spawn=...)`) and says what the kernel would (`read_state`).

    `hold` has the host that was started last live on, whatever is sent to it.
    """

    def __init__(self, spawn: Spawn = spawn_host) -> None:
        """Take how to start one."""
        self._spawn = spawn
        self.started: list[UndyingProcess] = []

    def __call__(self, source: DriverSource, agent: socket.socket, page: int) -> UndyingProcess:
        """Start a driver host."""
        process = UndyingProcess(self._spawn(source, agent, page))
        self.started.append(process)
        return process

    def read_state(self, pid: int) -> str | None:
        """Return the state of a process as `state_of` does, and D of one that is held."""
        is_held = any(each.pid == pid and each.is_held for each in self.started)
        return UNINTERRUPTIBLE if is_held else state_of(pid)

    def hold(self) -> None:
        """Hold the host that was started last."""
        self.started[-1].is_held = True

    def let_go(self) -> None:
        """Let go of every host that is held."""
        for process in self.started:
            if process.is_held:
                process.let_go()
