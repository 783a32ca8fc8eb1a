"""The driver host: the one process that holds the GPU driver open and may hang in it.

The agent starts it as `python -m stoker.agent.driver_host`, asks over a socket and reads the note
page when no answer comes (see `driver_frames`). It knows nothing but the driver, and imports
nothing more: it lives on every host for months.

It ends when the agent closes the socket, when it is sent SIGTERM, and when the agent dies, however
that dies. A call that hangs holds the main thread, so a second thread watches the socket: when it
is closed and the main thread does not come back in time, that thread ends the process. What no
thread can end is a process that the kernel itself holds (uninterruptible sleep).
"""

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from stoker.agent.driver import Driver, DriverError, DriverUnavailable
from stoker.agent.driver_frames import (
    LENGTH,
    NotePage,
    Reply,
    Request,
    Verb,
    encode_body,
    frame_length,
    pack,
    to_failure,
)
from stoker.agent.driver_nvml import NvmlDriver, nvidia_ml_py
from stoker.agent.processes import die_with_parent
from stoker.core.errors import StokerError

# How long a closed socket waits for a call that is under way: shutting down in the middle of one
# has upset the firmware of real cards.
END_GRACE_SECONDS = 1.0
EXIT_HUNG = 70

Announce = Callable[[int, str], None]


def main(arguments: Sequence[str]) -> int:
    """Serve the agent until it hangs up; the exit code is 0, or 70 when a call hung."""
    options = _parse(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the agent decides
    agent = socket.socket(fileno=options.socket)
    # Not an exception in the middle of a call: the call ends, then the socket reads as closed.
    signal.signal(signal.SIGTERM, lambda signum, frame: _hang_up(agent))
    die_with_parent(options.parent)
    page = NotePage(options.page)
    threading.Thread(target=_end_when_closed, args=(agent, page), daemon=True).start()
    with agent:
        _serve(agent, page, lambda: _make_driver(options, page.write))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stoker.agent.driver_host")
    parser.add_argument("--socket", type=int, required=True, help="descriptor: the agent")
    parser.add_argument("--page", type=int, required=True, help="descriptor: the note page")
    parser.add_argument("--parent", type=int, required=True, help="PID of the agent")
    parser.add_argument("--simulate", action="append", default=[], metavar="COUNTxMODEL")
    parser.add_argument("--node", default="", help="of a simulated node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", type=Path, help="JSON file of scripted processes and faults")
    return parser.parse_args(arguments)


def _make_driver(options: argparse.Namespace, announce: Announce) -> Driver:
    if not options.simulate:
        return NvmlDriver(nvidia_ml_py(), announce=announce)
    # Only a simulated node pays for what follows.
    from stoker.agent.simulated import SimulatedNvml  # noqa: PLC0415
    from stoker.agent.simulated_scenario import NOTHING_HAPPENS, ScenarioFile  # noqa: PLC0415
    from stoker.core.gpu_models import GpuModel, parse_simulate_spec  # noqa: PLC0415

    models: list[GpuModel] = []
    for spec in options.simulate:
        count, model = parse_simulate_spec(spec)
        models += [model] * count
    scenario = ScenarioFile(options.scenario) if options.scenario else NOTHING_HAPPENS
    table = SimulatedNvml(models, node=options.node, seed=options.seed, scenario=scenario)
    return NvmlDriver(table, simulated=True, announce=announce)


def _serve(agent: socket.socket, page: NotePage, make: Callable[[], Driver]) -> None:
    driver: Driver | None = None
    decoder = msgspec.msgpack.Decoder(Request)
    try:
        while (frame := _receive(agent)) is not None:
            request = decoder.decode(frame)
            try:
                if driver is None:
                    driver = _open(make)
                reply = Reply(request.number, body=encode_body(_answer(driver, request)))
            except DriverError as error:
                reply = Reply(request.number, failure=to_failure(error))
            page.clear()
            agent.sendall(pack(reply))
    except (BrokenPipeError, ConnectionResetError):
        return  # the agent is gone, and nobody is left to tell
    finally:
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
    return driver


def _answer(driver: Driver, request: Request) -> object:
    match request.verb:
        case Verb.OPEN:
            return None
        case Verb.INVENTORY:
            return driver.inventory(request.suspects)
        case Verb.SAMPLE:
            return driver.sample()
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


def _hang_up(agent: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the agent hung up first
        agent.shutdown(socket.SHUT_RD)


def _end_when_closed(agent: socket.socket, page: NotePage) -> None:
    """Wait until nobody will ask any more, then see to it that the process ends."""
    watch = select.poll()
    watch.register(agent.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    watch.poll()
    time.sleep(END_GRACE_SECONDS)
    note = page.read()
    call = f"{note.function} has not returned" if note else "it does not end"
    sys.stderr.write(f"driver host {os.getpid()}: {call}; leaving it\n")
    sys.stderr.flush()
    os._exit(EXIT_HUNG)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
