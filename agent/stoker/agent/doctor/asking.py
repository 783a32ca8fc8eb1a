"""Asks those who know: the agent at its socket, and NVML in a child that may hang.

NVML is never loaded here, and not opened at all where that could harm: an agent that has released
the driver has done so for somebody; one whose driver hangs would be joined by another process that
the kernel does not let go of; a kernel module that is not loaded would be loaded by it. One child
at a time: each holds a lock for as long as it lives, so one that hangs for good has no company.
"""

import asyncio
import fcntl
import functools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoker.agent.doctor.host import user_name
from stoker.agent.doctor.observed import AgentFacts, DriverFacts, Trouble, User, WhyNot
from stoker.agent.doctor.roots import Roots
from stoker.agent.driver import DriverError, DriverTimeout, DriverUnavailable, HostStuck
from stoker.agent.driver_host.frames import DriverSource
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.process import spawn_host, state_of
from stoker.agent.driver_host.states import Failed, Patience
from stoker.agent.facts import Rate
from stoker.agent.processes import Child
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading
from stoker.core import local
from stoker.core.errors import StokerError

LOCK_NAME = "stoker-doctor.lock"
_STEP_SECONDS = 0.05
# Of all time: after which one call counts as hung, so that there is time to leave that GPU alone
# and read the others.
CALL_SHARE = 0.2
_END_SECONDS = 0.8
_PROBE_SECONDS = 0.5
_UNINTERRUPTIBLE = "D"  # the kernel's letter
# How the agent words a GPU on which its own driver host hung.
_HANGS = ("left alone: ", "has not returned")


def agent(roots: Roots, sockets: Sequence[Path]) -> AgentFacts:
    """Return what the agent of this host tells."""
    try:
        status = local.ask(sockets, local.AskStatus(), local.Status)
    except StokerError as error:
        is_there = any(map(_is_there, sockets))
        return AgentFacts(None, str(error), is_there)
    return AgentFacts(status, "", True, _user_of(roots, status.pid))


def why_not_asked(agent: AgentFacts | None, *, has_module: bool) -> DriverFacts | None:
    """Return why NVML had better not be opened, or None when it may be.

    `agent`: None when it did not answer in time; `has_module`: whether the kernel module is loaded,
    as far as can be seen.
    """
    if not has_module:
        return DriverFacts("the kernel module is not loaded", WhyNot.UNLOADED)
    if agent is None or (agent.status is None and agent.is_there):
        return DriverFacts(
            "an agent is there and does not say whether it has released the driver", WhyNot.UNSAID
        )
    if agent.status is None or agent.status.simulated:
        return None
    driver = agent.status.driver
    if agent.status.release is not None or driver.state == "released":
        return DriverFacts("the agent has released the driver", WhyNot.RELEASED)
    call = driver.call.function if driver.call else ""
    if driver.state == "blocked":
        return DriverFacts(f"the agent's own driver host hangs: {driver.reason}", WhyNot.HANGS)
    if driver.state == "starting" and call:
        return DriverFacts(f"the agent is starting, and is in {call}", WhyNot.STARTING)
    for gpu in agent.status.gpus:
        if not gpu.is_read and any(word in gpu.reason for word in _HANGS):
            return DriverFacts(f"the agent's driver host hung on GPU {gpu.index}", WhyNot.HANGS)
    return None


def driver(
    source: DriverSource, seconds: float, call_seconds: float, lock_folders: Sequence[Path]
) -> DriverFacts:
    """Return what NVML tells a child of ours in all that time; one call may take `call_seconds`."""
    began = time.monotonic()
    opened = _open_lock(lock_folders)
    if isinstance(opened, str):
        return DriverFacts(f"no lock could be made: {opened}", WhyNot.NO_LOCK)
    path, lock = opened
    try:
        while not _is_taken(lock):
            if time.monotonic() - began > seconds / 2:
                return _why_taken(lock, path)
            time.sleep(_STEP_SECONDS)
        return asyncio.run(_ask(source, seconds - (time.monotonic() - began), call_seconds, lock))
    finally:
        os.close(lock)


def default_lock_folders(environ: Mapping[str, str], uid: int) -> tuple[Path, ...]:
    """Return where the lock may lie: first where nobody else can put a file of that name."""
    own = [Path("/run")] if uid == 0 else []
    if named := environ.get("XDG_RUNTIME_DIR"):
        own.append(Path(named))
    return (*own, Path("/dev/shm"), Path("/tmp"))


async def _ask(source: DriverSource, seconds: float, call_seconds: float, lock: int) -> DriverFacts:
    """Have a child read everything once, leaving alone the GPUs on which it hangs."""
    began = time.monotonic()
    host = DriverHost(
        source, patience=_patience(call_seconds), spawn=functools.partial(_spawn, lock)
    )
    task = asyncio.create_task(host.run())
    first: DriverError | None = None  # what went wrong, if anything did
    stuck = ""
    inventory: Inventory | None = None
    readings: tuple[GpuReading, ...] = ()
    processes: ProcessesReading | None = None
    try:
        async with asyncio.timeout(seconds - _END_SECONDS):
            while processes is None:
                try:
                    inventory = await host.ready()
                    # Without the hardware counters: somebody's profiler may have them.
                    readings = await host.sample((Rate.FAST, Rate.SLOW), profiling=False)
                    processes = await host.processes()
                except HostStuck as error:
                    stuck = str(error)
                    break
                except DriverError as error:
                    first = first or _cause(host, error)
                    # Without a GPU to blame it would be the same once more.
                    if isinstance(error, DriverUnavailable) or not host.suspects:
                        break
                    await asyncio.sleep(_STEP_SECONDS)
    except TimeoutError:
        first = first or _unfinished(host)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    trouble = None
    if first is not None:
        trouble = Trouble(first.kind, str(first), first.function, first.gpu)
    took = time.monotonic() - began
    return DriverFacts("", None, trouble, stuck, inventory, readings, processes, took)


def _cause(host: DriverHost, error: DriverError) -> DriverError:
    """Return what ended the driver host, where the error only says that there is none."""
    return host.state.error if isinstance(host.state, Failed) else error


def _unfinished(host: DriverHost) -> DriverError:
    call = host.call
    return DriverTimeout("not all was told in time", function=call.function if call else None)


def _patience(call_seconds: float) -> Patience:
    return Patience(
        start_seconds=call_seconds,
        call_seconds=call_seconds,
        end_grace_seconds=_END_SECONDS / 2,
        kill_seconds=_END_SECONDS / 2,
    )


def _spawn(lock: int, source: DriverSource, agent: socket.socket, page: int) -> Child:
    child = spawn_host(source, agent, page, keep=(lock,))
    os.pwrite(lock, f"{child.pid:<31}\n".encode("ascii"), 0)
    return child


def _open_lock(folders: Sequence[Path]) -> tuple[Path, int] | str:
    """Return the first lock that can be opened and is ours, or why there is none."""
    tried: list[str] = []
    for path in (folder / LOCK_NAME for folder in folders):
        if path.parent.is_dir():
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                lock = os.open(path, flags, 0o600)
            except OSError as error:
                tried.append(f"{path}: {error.strerror}")
                continue
            if os.fstat(lock).st_uid == os.geteuid():
                return path, lock
            os.close(lock)
            tried.append(f"{path}: of another user")
    return "; ".join(tried) or "no folder for it"


def _is_taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _why_taken(lock: int, path: Path) -> DriverFacts:
    noted = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
    if noted.isdigit() and state_of(int(noted)) == _UNINTERRUPTIBLE:
        found = f"an earlier look, PID {noted}, is in uninterruptible sleep: the driver holds it"
        return DriverFacts(found, WhyNot.EARLIER)
    found = f"another look at the driver is under way (PID {noted or 'unknown'} holds {path})"
    return DriverFacts(found, WhyNot.BUSY)


def _is_there(path: Path) -> bool:
    """Whether an agent listens there, if only for others."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(os.fsencode(path))
        except (PermissionError, TimeoutError, BlockingIOError):
            return True
        except OSError:
            return False
        return True


def _user_of(roots: Roots, pid: int) -> User | None:
    """Return who runs a process, by /proc/PID/status; None when it is not visible here."""
    try:
        told = dict(
            line.split(":", 1)
            for line in roots.text(f"/proc/{pid}/status").splitlines()
            if ":" in line
        )
        uid, gid = int(told["Uid"].split()[1]), int(told["Gid"].split()[1])
        groups = map(int, told["Groups"].split())
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return User(uid, (gid, *groups), user_name(uid))
