"""Real daemons of stoker in the folder of a test: started, killed, started again, ended with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.ports import free_port
from tests.support.waiting import until, until_true

from stoker.client import AsyncFleet, ClientError, Node, NodeState

STOP_SECONDS_MAX = 20.0
_LOG_LINES_SHOWN = 60


def plain_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment without stoker's own variables, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    return {**kept, "GRPC_VERBOSITY": "ERROR", **(more or {})}


class Daemon:
    """One daemon that may live several times, each time with the same options."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        told_in: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`told_in`: the file in its data folder in which it tells its process id and ports."""
        self.name = name
        self.command = tuple(command)
        self.data_dir = folder / name
        self.log_path = folder / f"{name}.log"
        self._told_in = told_in
        self._environment = plain_environment(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of its newest life."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    @property
    def seen_data_dir(self) -> Path:
        """Its data folder as it sees it itself: perhaps on a disk that is mounted for it alone."""
        return Path(f"/proc/{self.process.pid}/root{self.data_dir}")

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything that its lives have written."""
        if self._process is None:
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def spawn(self, command: Sequence[str] | None = None) -> None:
        """Begin a life, with another command line where one is given; returns at once."""
        assert not self.is_running, f"{self.name} is running"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command if command is None else command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    async def start(self, command: Sequence[str] | None = None) -> dict[str, Any]:
        """Begin a life and return what it tells of itself once it listens."""
        self.spawn(command)
        return await self.told()

    async def told(self) -> dict[str, Any]:
        """Return what this life tells of itself; fails when it ends instead."""

        async def look() -> dict[str, Any] | None:
            status = self.process.poll()
            assert status is None, f"{self.name} ended with status {status}:\n{self.log_end()}"
            return self.read_told()

        return await until(f"{self._told_in} of {self.name}", look)

    def read_told(self) -> dict[str, Any] | None:
        """Return what this life told of itself so far."""
        try:
            text = (self.seen_data_dir / self._told_in).read_text(encoding="utf-8")
        except OSError:  # not there yet, or the process has just ended
            return None
        found: dict[str, Any] = json.loads(text)
        return found if self._is_ours(found["pid"]) else None

    def _is_ours(self, pid: int) -> bool:
        # Under a tracer the daemon is a child of what was started.
        if pid == self.process.pid:
            return True
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return False
        return f"\nPPid:\t{self.process.pid}\n" in status

    def kill(self) -> None:
        """End it by SIGKILL, and return when it is gone."""
        self.process.kill()
        self.process.wait()

    async def ended(self, seconds: float = STOP_SECONDS_MAX) -> int:
        """Return its exit status once it has ended by itself."""
        await until_true(f"the end of {self.name}", lambda: not self.is_running, seconds)
        return self.process.returncode

    async def stop(self) -> int:
        """Ask it to end, by SIGTERM, and return its exit status."""
        self._terminate()
        return await self.ended()

    def _terminate(self) -> None:
        if self.is_running:
            # A tracer passes no signal on, so it is for the daemon itself.
            told = self.read_told()
            os.kill(told["pid"] if told else self.process.pid, signal.SIGTERM)

    def log_end(self) -> str:
        """Return the last lines that it wrote."""
        return "\n".join(self.log.splitlines()[-_LOG_LINES_SHOWN:])

    def end(self) -> None:
        """End it in whatever way works; for the end of a test."""
        if not self.is_running:
            return
        self._terminate()
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end on SIGTERM:\n{self.log_end()}") from None


class Stage:
    """An aggregator and agents, each a process of its own; they end with the context.

    When the test passes, no daemon may have written a traceback.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.daemons: list[Daemon] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(is_content=error is None)

    def close(self, *, is_content: bool) -> None:
        """End every daemon, agents first; without content, show what they wrote."""
        failures: list[str] = []
        for daemon in reversed(self.daemons):
            try:
                daemon.end()
            except AssertionError as failure:
                failures.append(str(failure))
        if not is_content:
            for daemon in self.daemons:
                sys.stdout.write(f"--- {daemon.name}:\n{daemon.log_end()}\n")
            return
        for daemon in self.daemons:
            if "Traceback" in daemon.log:
                failures.append(f"a traceback of {daemon.name}:\n{daemon.log_end()}")
        assert not failures, "\n".join(failures)

    def aggregator(
        self,
        *options: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Daemon:
        """Return an aggregator at the stage's address, not started; `prefix` goes before it."""
        command = [
            *prefix,
            *python_module("stoker.aggregator"),
            *self.aggregator_options(*options),
        ]
        return self._add(Daemon("aggregator", command, self.folder, "aggregator.json", environment))

    def aggregator_options(self, *more: str) -> list[str]:
        """Return the options of the stage's aggregator."""
        return [
            *("--data-dir", str(self.folder / "aggregator")),
            *("--listen", self.address),
            *("--metrics-listen", "127.0.0.1:0"),
            *more,
        ]

    def agent(
        self,
        node: str,
        simulate: str | None,
        *options: str,
        aggregator: str | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Daemon:
        """Return an agent of that node, not started; it dials `aggregator` or the stage's."""
        command = [
            *prefix,
            *python_module("stoker.agent"),
            *("--node", node, "--aggregator", aggregator or self.address),
            *("--data-dir", str(self.folder / node)),
            *("--metrics-listen", "127.0.0.1:0"),
            *(() if simulate is None else ("--simulate", simulate)),
            *options,
        ]
        return self._add(Daemon(node, command, self.folder, "agent.json", environment))

    def verb(self, *arguments: str) -> Daemon:
        """Return a `stoker` command that talks to the stage's aggregator, not started."""
        command = [*python_module("stoker.cli"), *arguments]
        name = f"verb-{len(self.daemons)}"
        environment = {"STOKER_ADDRESS": self.address}
        return self._add(Daemon(name, command, self.folder, "nowhere", environment))

    def other(self, daemon: Daemon) -> Daemon:
        """Let another daemon end with the stage."""
        return self._add(daemon)

    def fleet(self, *, timeout: float = 10.0, patience: float = 10.0) -> AsyncFleet:
        """Return a client of the stage's aggregator."""
        return AsyncFleet(self.address, timeout=timeout, patience=patience)

    def _add(self, daemon: Daemon) -> Daemon:
        daemon.data_dir.parent.mkdir(parents=True, exist_ok=True)
        self.daemons.append(daemon)
        return daemon


def python_module(name: str) -> list[str]:
    """Return the command that runs a module with this Python."""
    return [sys.executable, "-m", name]


async def ready_nodes(fleet: AsyncFleet, count: int) -> dict[str, Node]:
    """Return the nodes by name once `count` of them are ready, with all their GPUs."""

    async def look() -> dict[str, Node] | None:
        try:
            nodes = (await fleet.nodes()).nodes
        except ClientError:
            return None
        ready = {n.name: n for n in nodes if n.state is NodeState.READY and n.gpus}
        return ready if len(ready) >= count else None

    return await until(f"{count} ready nodes at {fleet.address}", look)


async def free_nodes(fleet: AsyncFleet, count: int) -> dict[str, Node]:
    """Return the nodes by name once `count` of them are ready and would grant a GPU."""
    nodes = await ready_nodes(fleet, count)

    async def look() -> bool:
        # Between the first sample of a node and its first look at processes, nothing is free.
        found = [await fleet.explain_request(gpus=1, node=name) for name in nodes]
        return all(each.placeable for each in found)

    await until(f"a free GPU on {', '.join(nodes)}", look)
    return nodes


def run_command(
    *command: str,
    environment: Mapping[str, str] | None = None,
    seconds: float = 60.0,
    stdin: bytes = b"",
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its status and output."""
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env=plain_environment(environment),
        timeout=seconds,
        check=False,
    )
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def stoker(
    *arguments: str, environment: Mapping[str, str] | None = None, seconds: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run the `stoker` command to its end."""
    command = [*python_module("stoker.cli"), *arguments]
    return run_command(*command, environment=environment, seconds=seconds)
