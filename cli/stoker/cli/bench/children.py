"""The processes of a bench: started in order, spoken to in lines, ended whatever happens.

Each runs in a session of its own, so that Ctrl-C reaches the bench alone and it can end them in
order; what they write on standard error is kept, and the end of it told when one fails.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from stoker.core.errors import Missing, StokerError
from stoker.testing.load import Failed, Lacking, Measure, Said, decode_said, encode
from stoker.testing.workloads.messages import Instruction

# A report has a figure for every frame of its window.
LINE_BYTES_MAX = 256 * 2**20
STOP_SECONDS_MAX = 5.0
_STDERR_LINES_SHOWN = 5


class ChildFailed(StokerError):
    """A process of the bench ended, or said that it cannot go on."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used since it began, and what it holds now."""

    cpu_seconds: float  # user and system, all threads
    rss_bytes: int


class Child:
    """One process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, stderr: Path) -> None:
        self.name = name
        self._process = process
        self._stderr = stderr
        self._usage = psutil.Process(process.pid)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def usage(self) -> Usage:
        """Return what it has used; raises ChildFailed when it has ended."""
        try:
            times = self._usage.cpu_times()
            return Usage(times.user + times.system, self._usage.memory_info().rss)
        except psutil.NoSuchProcess as error:
            raise ChildFailed(self._told_at_end()) from error

    def tell(self, message: Measure | Instruction) -> None:
        """Send it a message."""
        assert self._process.stdin is not None
        self._process.stdin.write(encode(message))

    async def hear(self) -> Said:
        """Return its next message; raises ChildFailed when it fails or ends, Missing where it lacks
        something.
        """
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._process.wait()
            raise ChildFailed(self._told_at_end())
        said = decode_said(line)
        if isinstance(said, Failed):
            raise ChildFailed(f"{self.name}: {said.reason}")
        if isinstance(said, Lacking):
            raise Missing(said.reason)
        return said

    def check(self) -> None:
        """Raise ChildFailed when it has ended."""
        if self._process.returncode is not None:
            raise ChildFailed(self._told_at_end())

    async def stop(self) -> None:
        """End it: politely, then by force."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _told_at_end(self) -> str:
        code = self._process.returncode
        how = "ended" if code is None else f"ended with status {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"{self.name} {how}", *lines[-_STDERR_LINES_SHOWN:]])


class Children:
    """Starts processes; as a context manager it ends them, the youngest first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # for what they write on standard error
        self._children: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self._children):
            await child.stop()

    async def start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start `python -m module` under a name that messages use, `environment` added to ours."""
        stderr = self._folder / f"{len(self._children)}.stderr"
        with stderr.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=_environment(environment or {}),
                limit=LINE_BYTES_MAX,
                start_new_session=True,
            )
        child = Child(name, process, stderr)
        self._children.append(child)
        return child


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return ours without settings of stoker: what is measured is what everybody gets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    return {**kept, "GRPC_VERBOSITY": "ERROR", **more}
