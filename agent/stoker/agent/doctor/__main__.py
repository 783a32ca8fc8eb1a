"""The process that looks: each look in a thread of its own, each result a line as it comes.

It ends by itself when its time is over, whatever still hangs, and with the process that wants to
know. See `stoker.agent.doctor.look` for why it is a process.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path

import msgspec

from stoker.agent.doctor import asking, host, kernel, services
from stoker.agent.doctor.look import Told, Wanted
from stoker.agent.doctor.observed import AgentFacts, DriverFacts, Look, ModuleFacts, Unseen
from stoker.agent.doctor.roots import Roots
from stoker.agent.driver_host.frames import RealDriver
from stoker.agent.processes import die_with_parent

# Of all time: for the agent to answer, so that the driver may be asked in the rest.
_AGENT_SHARE = 0.3
# Of all time: for programs that are run, so that their failing is told before the time is over.
_PROGRAM_SHARE = 0.8


class Looker:
    """The looks at one host, all at the same time."""

    def __init__(self, wanted: Wanted) -> None:
        """Take what is wanted; time counts from now."""
        self._wanted = wanted
        self._roots = Roots(Path(wanted.root))
        self._deadline = time.monotonic() + wanted.seconds
        self._found: dict[Look, Future[object]] = {each: Future() for each in wanted.looks}
        self._line = threading.Lock()

    def run(self) -> None:
        """Write a line for each look that returns; return when all have, or when time is over."""
        acts = self._acts()
        for each in self._wanted.looks:
            threading.Thread(target=self._look, args=(each, acts[each]), daemon=True).start()
        for found in self._found.values():
            try:
                found.result(max(0.0, self._deadline - time.monotonic()))
            except NotInTime:
                return

    def _acts(self) -> dict[Look, Callable[[], object]]:
        wanted, roots, environ = self._wanted, self._roots, os.environ
        seconds = wanted.seconds * _PROGRAM_SHARE
        helper = None if wanted.helper is None else Path(wanted.helper)
        return {
            Look.HOST: lambda: host.host(roots, environ, wanted.user),
            Look.BUS: lambda: host.bus(roots),
            Look.MODULE: lambda: host.module(roots),
            Look.LIBRARY: lambda: host.library(roots, environ),
            Look.DEVICES: lambda: host.devices(roots),
            Look.INSTANCES: lambda: host.instances(roots),
            Look.SERVICES: lambda: services.services(roots, seconds),
            Look.FABRIC: lambda: services.fabric(roots, seconds),
            Look.CONTAINERS: lambda: services.containers(roots),
            Look.KERNEL_LOG: lambda: kernel.kernel_log(roots, helper, seconds),
            Look.HELPER: lambda: kernel.helper_there(helper, seconds),
            Look.AGENT: lambda: asking.agent(roots, [Path(each) for each in wanted.sockets]),
            Look.DRIVER: self._driver,
        }

    def _look(self, each: Look, act: Callable[[], object]) -> None:
        try:
            part = act()
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            part = Unseen(f"{where}{error.strerror or error}")
        except Exception as error:  # noqa: BLE001 (a bug in one look must not hide the others)
            part = Unseen(f"a bug: {type(error).__name__}: {error}")
        if isinstance(part, Unseen):
            told = Told(each, why=part.why)
        else:
            told = Told(each, msgspec.Raw(msgspec.json.encode(part)))
        with self._line:
            sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
            sys.stdout.buffer.flush()
            self._found[each].set_result(part)

    def _driver(self) -> DriverFacts:
        seconds = self._wanted.seconds * _AGENT_SHARE
        module = self._result(Look.MODULE, seconds)
        agent = self._result(Look.AGENT, seconds)
        why_not = asking.why_not_asked(
            agent if isinstance(agent, AgentFacts) else None,
            has_module=not (isinstance(module, ModuleFacts) and module.is_loaded is False),
        )
        if why_not is not None:
            return why_not
        folders = [Path(each) for each in self._wanted.lock_folders]
        left = self._deadline - time.monotonic()
        source = self._wanted.simulated or RealDriver()
        return asking.driver(source, left, self._wanted.call_seconds, folders)

    def _result(self, look: Look, seconds: float) -> object:
        try:
            return self._found[look].result(seconds)
        except NotInTime:
            return None


def main(arguments: Sequence[str]) -> None:
    """Look at what standard input asks for."""
    die_with_parent(int(arguments[0]))
    Looker(msgspec.json.decode(sys.stdin.buffer.read(), type=Wanted)).run()
    sys.stdout.buffer.flush()
    os._exit(0)  # whatever hangs would be waited for


if __name__ == "__main__":
    main(sys.argv[1:])
