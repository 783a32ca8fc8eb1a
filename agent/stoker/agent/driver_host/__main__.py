"""The driver host: the one process that holds the GPU driver open and may hang in it.

The agent starts it as `python -m stoker.agent.driver_host`, asks over a socket and reads the note
page when no answer comes (see `driver_host.frames`). It knows nothing but the driver, and imports
nothing more: it lives on every host for months.

It ends when the agent closes the socket, when it is sent SIGTERM, and when the agent dies, however
that dies. A call that hangs holds the main thread, so a second thread watches the socket: when it
is closed and the main thread does not come back in time, that thread ends the process. What no
thread can end is a process that the kernel itself holds (uninterruptible sleep).

A sweep that is under way when the agent hangs up is left at the next call: it may take seconds, and
whoever waits for the devices does not.
"""

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stoker.agent.driver import Driver, DriverError, DriverUnavailable, Suspect
from stoker.agent.driver_host.frames import (
    LENGTH,
    REQUESTS,
    NotePage,
    Reply,
    Request,
    Verb,
    encode_body,
    frame_length,
    pack,
    to_failure,
)
from stoker.agent.facts import Rate
from stoker.agent.nvml.driver import NvmlDriver, nvidia_ml_py
from stoker.agent.processes import die_with_parent
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading
from stoker.core.errors import StokerError

# How long a closed socket waits for a call that is under way: shutting down in the middle of one
# has upset the firmware of real cards.
END_GRACE_SECONDS = 1.0
EXIT_HUNG = 70
# Objects of a reading live for its answer and have no cycles: the usual 700 of them are reached
# several times in one sweep.
GARBAGE_THRESHOLD = 5_000
# With the number of the GPU: the name of the file that stands for a simulated /dev/nvidiaN.
SIMULATED_DEVICE = "stoker-simulated-nvidia"

Announce = Callable[[int, str], None]
MakeDriver = Callable[[argparse.Namespace, Announce], Driver]


class HungUp(Exception):
    """The agent has hung up: what is under way is for nobody."""


class Notes:
    """What the driver announces: each call goes on the page, until the agent hangs up."""

    def __init__(self, page: NotePage) -> None:
        """Take the page that the agent reads."""
        self.page = page
        self._is_over = self._is_ending = False

    def announce(self, gpu_index: int, function: str) -> None:
        """Note a call; raises HungUp when nobody waits for it any more."""
        if self._is_over and not self._is_ending:
            raise HungUp
        self.page.write(gpu_index, function)

    def hang_up(self) -> None:
        """Let the next call not be made."""
        self._is_over = True

    def end(self) -> None:
        """Let calls be made again, those that end the session."""
        self._is_ending = True


def main(arguments: Sequence[str], make_driver: MakeDriver | None = None) -> int:
    """Serve the agent until it hangs up; the exit code is 0, or 70 when a call hung."""
    options, make = _parse(arguments), make_driver or _make_driver
    gc.set_threshold(GARBAGE_THRESHOLD)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the agent decides
    agent = socket.socket(fileno=options.socket)
    notes = Notes(NotePage(options.page))
    # Not an exception in the middle of a call: the call ends, then the socket reads as closed.
    signal.signal(signal.SIGTERM, lambda signum, frame: _hang_up(agent, notes))
    die_with_parent(options.parent)
    threading.Thread(target=_end_when_closed, args=(agent, notes), daemon=True).start()
    with agent:
        _serve(agent, notes, lambda: make(options, notes.announce))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stoker.agent.driver_host")
    parser.add_argument("--socket", type=int, required=True, help="descriptor: the agent")
    parser.add_argument("--page", type=int, required=True, help="descriptor: the note page")
    parser.add_argument("--parent", type=int, required=True, help="PID of the agent")
    parser.add_argument("--without-dcgm", action="store_true", help="a host hung in it")
    parser.add_argument("--dcgm-address", default="", metavar="HOST:PORT", help="or a path")
    parser.add_argument("--dcgm-bindings", type=Path, metavar="FOLDER")
    parser.add_argument("--dcgm-interval", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--simulate", action="append", default=[], metavar="COUNTxMODEL")
    parser.add_argument("--node", default="", help="of a simulated node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", type=Path, help="JSON file of scripted processes and faults")
    parser.add_argument("--mig-state", type=Path, help="JSON file of how simulated GPUs are cut up")
    return parser.parse_args(arguments)


def _make_driver(options: argparse.Namespace, announce: Announce) -> Driver:
    driver = (
        _simulated(options, announce)
        if options.simulate
        else NvmlDriver(nvidia_ml_py(), announce=announce)
    )
    if not options.dcgm_address or options.without_dcgm:
        return driver
    # Only a node with an nv-hostengine pays for what follows.
    from stoker.agent.dcgm.driver import with_dcgm  # noqa: PLC0415

    return with_dcgm(
        driver, options.dcgm_address, options.dcgm_bindings, options.dcgm_interval, announce
    )


def _simulated(options: argparse.Namespace, announce: Announce) -> Driver:
    # Only a simulated node pays for what follows.
    from stoker.agent.simulated.nvml import SimulatedNvml  # noqa: PLC0415
    from stoker.agent.simulated.scenario import NOTHING_HAPPENS, ScenarioFile  # noqa: PLC0415
    from stoker.core.gpu_models import GpuModel, parse_simulate_spec  # noqa: PLC0415

    models: list[GpuModel] = []
    for spec in options.simulate:
        count, model = parse_simulate_spec(spec)
        models += [model] * count
    scenario = ScenarioFile(options.scenario) if options.scenario else NOTHING_HAPPENS
    table = SimulatedNvml(
        models,
        node=options.node,
        seed=options.seed,
        scenario=scenario,
        mig_state=options.mig_state,
    )
    driver = NvmlDriver(table, simulated=True, announce=announce)
    return _WithDeviceFiles(driver, len(models))


class _WithDeviceFiles:
    """A simulated driver that holds a file per GPU open, as a session with a real one does.

    So whether the devices are free can be seen in /proc/PID/fd, where a real node has
    /dev/nvidiaN: as `memfd:stoker-simulated-nvidiaN`.
    """

    def __init__(self, driver: Driver, count: int) -> None:
        self._driver = driver
        self._count = count
        self._files: list[int] = []

    def open(self) -> None:
        self._driver.open()
        self._files = [
            os.memfd_create(f"{SIMULATED_DEVICE}{number}") for number in range(self._count)
        ]

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        return self._driver.inventory(suspects)

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        return self._driver.sample(rates, profiling=profiling)

    def processes(self) -> ProcessesReading:
        return self._driver.processes()

    def close(self) -> None:
        self._driver.close()
        while self._files:
            os.close(self._files.pop())


def _serve(agent: socket.socket, notes: Notes, make: Callable[[], Driver]) -> None:
    driver: Driver | None = None
    try:
        while (frame := _receive(agent)) is not None:
            request = REQUESTS.decode(frame)
            try:
                if driver is None:
                    driver = _open(make)
                reply = Reply(request.number, body=encode_body(_answer(driver, request)))
            except DriverError as error:
                reply = Reply(request.number, failure=to_failure(error))
            notes.page.clear()
            agent.sendall(pack(reply))
    except (BrokenPipeError, ConnectionResetError, HungUp):
        return  # the agent is gone, and nobody is left to tell
    finally:
        notes.end()
        if driver is not None:
            # A session that cannot be ended properly ends with the process.
            with contextlib.suppress(DriverError):
                driver.close()


def _open(make: Callable[[], Driver]) -> Driver:
    try:
        driver = make()
    except DriverError:
        raise
    except StokerError as error:  # a simulation that cannot be made as asked
        raise DriverUnavailable(str(error)) from error
    driver.open()
    # What was loaded until here stays: looking through it for garbage, over and over, is in vain.
    gc.freeze()
    return driver


def _answer(driver: Driver, request: Request) -> object:
    match request.verb:
        case Verb.OPEN:
            return None
        case Verb.INVENTORY:
            return driver.inventory(request.suspects)
        case Verb.SAMPLE:
            return driver.sample(request.rates, profiling=request.profiling)
        case Verb.PROCESSES:
            return driver.processes()


def _receive(agent: socket.socket) -> bytes | None:
    """Return the next frame, or None when the agent hung up."""
    head = _read(agent, LENGTH.size)
    return None if head is None else _read(agent, frame_length(head))


def _read(agent: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = agent.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _hang_up(agent: socket.socket, notes: Notes) -> None:
    notes.hang_up()
    with contextlib.suppress(OSError):  # the agent hung up first
        agent.shutdown(socket.SHUT_RD)


def _end_when_closed(agent: socket.socket, notes: Notes) -> None:
    """Wait until nobody will ask any more, then see to it that the process ends."""
    watch = select.poll()
    watch.register(agent.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    watch.poll()
    notes.hang_up()
    time.sleep(END_GRACE_SECONDS)
    note = notes.page.read()
    call = f"{note.function} has not returned" if note else "it does not end"
    sys.stderr.write(f"driver host {os.getpid()}: {call}; leaving it\n")
    sys.stderr.flush()
    os._exit(EXIT_HUNG)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
