"""Looks at a host from a child process, and waits no longer than it was told.

Anything on a broken host may hang: a file of /proc, a service manager, the driver. So each look has
a thread of its own, and all of them live in a child (`python -m stoker.agent.doctor`): a thread
that the kernel holds keeps its process from ending, and that process is not the one for whose end
somebody waits. The child writes a line for each look as it returns; what has not come in time has
hung, and is a finding like others.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from stoker.agent.doctor.observed import (
    AgentFacts,
    BusFacts,
    ContainersFacts,
    DevicesFacts,
    DriverFacts,
    FabricFacts,
    HelperFacts,
    HostFacts,
    InstancesFacts,
    KernelLogFacts,
    LibraryFacts,
    Look,
    ModuleFacts,
    Observed,
    ServicesFacts,
    Unseen,
    User,
)
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.processes import start
from stoker.core.local import Status

# For the child to start, and to be told that what it waits for will not come.
_START_SECONDS = 0.5
# A child whose time is over ends by itself.
_END_SECONDS = 0.2
_KILL_SECONDS = 0.3
_LINE_BYTES_MAX = 1 << 25


class _AgentTold(msgspec.Struct, frozen=True):
    """The agent's part on its way."""

    status: Status | None
    why: str
    is_there: bool
    user: User | None


PARTS: Mapping[Look, type[Any]] = {
    Look.HOST: HostFacts,
    Look.BUS: BusFacts,
    Look.MODULE: ModuleFacts,
    Look.LIBRARY: LibraryFacts,
    Look.DEVICES: DevicesFacts,
    Look.INSTANCES: InstancesFacts,
    Look.SERVICES: ServicesFacts,
    Look.FABRIC: FabricFacts,
    Look.CONTAINERS: ContainersFacts,
    Look.KERNEL_LOG: KernelLogFacts,
    Look.HELPER: HelperFacts,
    Look.AGENT: _AgentTold,
    Look.DRIVER: DriverFacts,
}
# Whether the driver may be opened is known from these.
NEEDED_BY_DRIVER = (Look.AGENT, Look.MODULE)


class Wanted(msgspec.Struct, frozen=True):
    """What is to be looked at, where, and for how long."""

    looks: tuple[Look, ...] = tuple(Look)
    seconds: float = 10.0
    call_seconds: float = 2.0  # after which one call into the driver counts as hung
    root: str = "/"
    sockets: tuple[str, ...] = ()  # where the agent may answer
    helper: str | None = None  # where the root helper does
    lock_folders: tuple[str, ...] = ()
    user: User | None = None  # whose rights are judged; None: whoever looks
    simulated: SimulatedDriver | None = None  # in place of NVML


class Told(msgspec.Struct, frozen=True):
    """What one look found: its part, or why not."""

    look: Look
    part: msgspec.Raw = msgspec.Raw(b"null")
    why: str = ""  # not empty: there is no part


_TOLD: msgspec.json.Decoder[Told] = msgspec.json.Decoder(Told)


def look(wanted: Wanted) -> Observed:
    """Return what is found on this host; what does not answer within `wanted.seconds` is unseen."""
    began = time.monotonic()
    looks = set(wanted.looks)
    if Look.DRIVER in looks:
        looks |= set(NEEDED_BY_DRIVER)
    wanted = msgspec.structs.replace(wanted, looks=tuple(each for each in Look if each in looks))
    parts, failure = _parts(wanted, began + wanted.seconds)
    why = failure or f"no answer within {wanted.seconds:g} s"
    silent: dict[Look, object] = {each: Unseen(why) for each in looks}
    found = {each.value: part for each, part in (silent | parts).items()}
    return replace(Observed(**found), seconds=time.monotonic() - began)  # type: ignore[arg-type]


def _parts(wanted: Wanted, deadline: float) -> tuple[dict[Look, object], str]:
    """Return what the child told, and why it ended early, if it did."""
    stderr = os.memfd_create("stoker-doctor")
    argv = [sys.executable, "-P", "-m", "stoker.agent.doctor", str(os.getpid())]
    child = start(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, new_session=True
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        left = max(0.1, deadline - time.monotonic() - _START_SECONDS)
        with contextlib.suppress(BrokenPipeError):  # it failed: how, is seen below
            child.stdin.write(msgspec.json.encode(msgspec.structs.replace(wanted, seconds=left)))
            child.stdin.close()
        lines = _lines(child.stdout.fileno(), deadline)
        parts = {told.look: _decoded(told) for told in map(_TOLD.decode, lines)}
    finally:
        _leave(child)
        complaint = os.pread(stderr, 1 << 16, 0).decode("utf-8", "replace").strip()
        os.close(stderr)
    if child.returncode in (0, -signal.SIGKILL):
        return parts, ""
    last = complaint.splitlines()[-1] if complaint else f"exit code {child.returncode}"
    return parts, f"the looking process failed: {last}"


def _lines(file: int, deadline: float) -> Iterable[bytes]:
    """Yield the lines that come until the other end is closed, or until the deadline."""
    begun = bytearray()
    while (left := deadline - time.monotonic()) > 0 and len(begun) <= _LINE_BYTES_MAX:
        readable, _, _ = select.select([file], [], [], left)
        part = os.read(file, 1 << 16) if readable else b""
        if not part:
            return
        *whole, rest = (bytes(begun) + part).split(b"\n")
        begun = bytearray(rest)
        yield from whole


def _decoded(told: Told) -> object:
    if told.why:
        return Unseen(told.why)
    part: object = msgspec.json.decode(told.part, type=PARTS[told.look])
    if isinstance(part, _AgentTold):
        return AgentFacts(part.status, part.why, part.is_there, part.user)
    return part


def _leave(child: "subprocess.Popen[bytes]") -> None:
    """End the child, and do not wait for one that the kernel does not let go of."""
    if child.stdout is not None:
        child.stdout.close()
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
    try:
        child.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        child.returncode = -signal.SIGKILL  # nobody reaps it but init; no warning about that
