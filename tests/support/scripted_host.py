"""A driver host whose driver does what a file says: what no scenario of simulated GPUs can do.

`python scripted_host.py FILE FLAGS...` serves as `python -m stoker.agent.driver_host` does.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stoker.agent.driver import InventoryChanged, Suspect
from stoker.agent.driver_host import __main__ as driver_host
from stoker.agent.driver_host.frames import DriverSource, arguments_of
from stoker.agent.driver_host.process import Spawn
from stoker.agent.facts import Fact, Rate
from stoker.agent.processes import Child, start
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory, ProcessesReading

FUNCTION = "nvmlDeviceGetFieldValues"


@dataclass(frozen=True, slots=True)
class Script:
    """What the driver does from now on."""

    gpus: tuple[str, ...] = ("a", "b")
    calls: int = 1  # into the driver, for each GPU in a sample
    call_seconds: float = 0.0
    slow_gpus: tuple[str, ...] = ()  # those whose calls take so long; empty: all
    hang: str = ""  # a function about no GPU that does not return in a sample

    def write(self, path: Path) -> None:
        """Let a host that runs do it too."""
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(self))
        draft.rename(path)


def log_of(path: Path) -> Path:
    """Where the driver of this script writes how it was asked for samples, a line for each."""
    return path.with_suffix(".log")


def scripted(path: Path) -> Spawn:
    """Starts hosts that do what the file says."""

    def spawn(source: DriverSource, agent: socket.socket, page: int) -> Child:
        flags = [f"--socket={agent.fileno()}", f"--page={page}", f"--parent={os.getpid()}"]
        argv = [sys.executable, __file__, str(path), *flags, *arguments_of(source)]
        return start(argv, pass_fds=(agent.fileno(), page), new_session=True)

    return spawn


class ScriptedDriver:
    """A driver, as the host holds it."""

    def __init__(self, path: Path, announce: driver_host.Announce, *, with_dcgm: bool) -> None:
        """Take the file."""
        self._path, self._announce, self._with_dcgm = path, announce, with_dcgm
        self._found: tuple[str, ...] = ()

    def open(self) -> None:
        """Begin."""
        self._announce(-1, "nvmlInit")

    def close(self) -> None:
        """End."""
        self._announce(-1, "nvmlShutdown")

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        """Find those of the script."""
        self._found = self._script().gpus
        gpus = tuple(GpuIdentity(i, uuid, "T4", 1 << 30) for i, uuid in enumerate(self._found))
        return Inventory(0.0, None, None, None, simulated=True, gpus=gpus)

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        """Make the calls of the script, and keep a record of having been asked."""
        script = self._script()
        with log_of(self._path).open("a") as log:
            log.write(f"{' '.join(rates)} {'with' if profiling else 'without'} profiling\n")
        if script.gpus != self._found:
            raise InventoryChanged("other GPUs than before")
        if script.hang and self._with_dcgm:
            self._announce(-1, script.hang)
            while self._script().hang:
                time.sleep(0.01)
        for index, uuid in enumerate(script.gpus):
            for _ in range(script.calls):
                self._announce(index, FUNCTION)
                if not script.slow_gpus or uuid in script.slow_gpus:
                    time.sleep(script.call_seconds)
        told = {Fact.SM_ACTIVE_RATIO: 1.0} if self._with_dcgm else {Fact.POWER_WATTS: 1.0}
        return tuple(GpuReading(uuid, 0.0, facts=told) for uuid in script.gpus)

    def processes(self) -> ProcessesReading:
        """Nobody uses them."""
        return ProcessesReading(0.0, 0.0, ())

    def _script(self) -> Script:
        return msgspec.json.decode(self._path.read_bytes(), type=Script)


def main(arguments: Sequence[str]) -> int:
    """Serve the agent."""
    path = Path(arguments[0])

    def make(options: argparse.Namespace, announce: driver_host.Announce) -> ScriptedDriver:
        return ScriptedDriver(path, announce, with_dcgm=not options.without_dcgm)

    return driver_host.main(arguments[1:], make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
