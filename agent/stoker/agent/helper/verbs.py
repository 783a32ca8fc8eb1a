"""All that the helper does for a caller: one table of verbs, and what each of them tells."""

import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

from stoker.agent.helper.files import (
    Process,
    open_devices,
    read,
    read_process,
    real_uid,
    sorted_devices,
)
from stoker.agent.helper.ground import Ground
from stoker.agent.helper.log import KernelLog
from stoker.agent.helper.memory import Hanging, Hangs, Memory
from stoker.agent.helper.partitions import CHANGING, GPU_VERBS
from stoker.agent.helper.requests import Arguments, Refused, Told, is_pid, understood

HOLDERS_MAX = 4096
HOLDERS_BYTES_MAX = 1 << 23
CGROUP_BYTES_MAX = 4096
SEQUENCE_MAX = 1 << 63
# For an answer that a client waits 5 s for; what is not read by then is told as lacking.
ANSWER_SECONDS_MAX = 3.5
# A follower that hears nothing for longer, and a little, knows that the helper is gone.
HEARTBEAT_SECONDS = 10.0
# How often what stands in for the log, and has ended, is looked at; the log itself never ends.
_STANDIN_SECONDS = 0.1
_STATUS_BYTES_MAX = 1 << 14


class Paths:
    """What the verbs look at, and what they may do; no caller has a say in it."""

    def __init__(
        self, kmsg: str, pod_resources: str, ground: Ground, *, only_reads: bool = False
    ) -> None:
        """Take where the kernel's log and the kubelet's pod-resources API are.

        `ground`: where what is about GPUs is read and done; `only_reads`: nothing is changed.
        """
        self.kmsg = kmsg
        self.pod_resources = pod_resources
        self.ground = ground
        self.only_reads = only_reads


class Work:
    """What the verbs work with, for one caller."""

    def __init__(
        self,
        paths: Paths,
        *,
        hanging: Hanging,
        notes: int,
        caller: socket.socket,
        parent: int,
    ) -> None:
        """`parent`: the process that accepts; `notes`: a pipe to it."""
        self.ground = paths.ground
        self.only_reads = paths.only_reads
        self.proc = paths.ground.proc
        self.kmsg = paths.kmsg
        self.pod_resources = paths.pod_resources
        # Goes to the caller with the line that is told next; whoever set it closes it.
        self.handed_over: socket.socket | None = None
        self.hanging = hanging
        self.notes = notes
        self.caller = caller
        self.parent = parent

    def memory(self) -> Memory:
        """Return what reads the memory of processes for this answer."""
        return Memory(self.proc, self.hanging, self.notes, self.caller, ANSWER_SECONDS_MAX)


# --- follow_kernel_log


def follow_kernel_log(work: Work, wish: Told) -> Iterator[Told]:
    """Tell the records about GPUs that come after one of this boot, or all that are still there."""
    try:
        boot_id = read(f"{work.proc}/sys/kernel/random/boot_id", 64).decode("ascii").strip()
        after = wish["after"] if wish["boot_id"] == boot_id else None
        log = KernelLog(work.kmsg, after if isinstance(after, int) else None)
    except PermissionError as error:
        raise Refused(f"{error.filename}: {error.strerror}, as without CAP_SYSLOG") from error
    except OSError as error:
        raise Refused(f"{error.filename}: {error.strerror}") from error
    yield {"ok": True}
    ready = select.poll()
    ready.register(work.caller, select.POLLIN)
    ready.register(log.descriptor, select.POLLIN)
    hung_up = select.poll()
    hung_up.register(work.caller, select.POLLIN)
    said_at = time.monotonic()
    while os.getppid() == work.parent:
        lines: list[Told] = [
            {"sequence": record.sequence, "at": at, "text": record.text}
            for record, at in log.read()
        ]
        if log.take_lost():
            lines.insert(0, {"lost": True})
        if not lines and time.monotonic() - said_at >= HEARTBEAT_SECONDS:
            lines = [{}]
        if lines:
            yield from lines
            said_at = time.monotonic()
        if not log.has_more and not log.is_over:
            wait = said_at + HEARTBEAT_SECONDS - time.monotonic()
            ready.poll(max(0.0, wait) * 1000)
        if hung_up.poll(_STANDIN_SECONDS * 1000 if log.is_over else 0):
            return  # or it says more than it may


# --- list_holders


def list_holders(work: Work, wish: Told) -> Iterator[Told]:
    """Tell every process that has /dev/nvidia* open or mapped."""
    del wish
    memory = work.memory()
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    holders: list[Told] = []
    denied = unread = late = size = 0
    for pid in sorted(int(name) for name in os.listdir(work.proc) if name.isdecimal()):
        is_full = len(holders) >= HOLDERS_MAX or size >= HOLDERS_BYTES_MAX
        if is_full or time.monotonic() > deadline:
            late += 1
            continue
        try:
            holder, is_whole = _holder(work.proc, pid, memory)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except PermissionError:
            denied += 1
            continue
        unread += not is_whole
        if holder is not None:
            holders.append(holder)
            size += len(json.dumps(holder))
    lacking = (
        f"processes whose open files may not be read (CAP_SYS_PTRACE): {denied}" * bool(denied),
        f"processes whose open or mapped files could not all be read: {unread}" * bool(unread),
        f"processes not looked at, for there are too many: {late}" * bool(late),
    )
    yield {"ok": True, "holders": holders, "shortfall": "; ".join(filter(None, lacking))}


def _holder(proc: str, pid: int, memory: Memory) -> tuple[Told | None, bool]:
    """Return the process if it is a holder, and whether all of it was read; raises OSError."""
    process = read_process(proc, pid)
    if process.is_kernel_thread:
        return None, True
    devices, is_whole = open_devices(proc, pid)
    try:
        devices.update(memory.read("maps", process))
    except (Hangs, PermissionError):
        is_whole = False
    if not devices:
        return None, is_whole
    told: Told = {
        "pid": pid,
        "uid": real_uid(read(f"{proc}/{pid}/status", _STATUS_BYTES_MAX)),
        "command": _command(process, memory),
        "started_ticks": process.started_ticks,
        "cgroup": read(f"{proc}/{pid}/cgroup", CGROUP_BYTES_MAX).decode("utf-8", "replace"),
        "devices": sorted_devices(devices),
    }
    _expect_same(proc, process)
    return told, is_whole


def _command(process: Process, memory: Memory) -> str:
    try:
        return "".join(memory.read("cmdline", process)) or f"[{process.name}]"
    except Hangs:
        return f"[{process.name}]"


def _expect_same(proc: str, process: Process) -> None:
    """Raise OSError when the PID is another process's by now."""
    if read_process(proc, process.pid).started_ticks != process.started_ticks:
        raise ProcessLookupError


# --- job_variables


def job_variables(work: Work, wish: Told) -> Iterator[Told]:
    """Tell which job and allocation a process names in its environment; no other variable, ever."""
    pid = wish["pid"]
    assert isinstance(pid, int)
    try:
        process = read_process(work.proc, pid)
        variables = work.memory().read("environ", process)
        _expect_same(work.proc, process)
    except (FileNotFoundError, ProcessLookupError):
        yield {"ok": True, "process": None}
        return
    except PermissionError as error:
        raise Refused(f"{error.strerror}, as without CAP_SYS_PTRACE") from error
    except Hangs as error:
        raise Refused(str(error)) from error
    told = {
        "started_ticks": process.started_ticks,
        "variables": dict(variable.split("=", 1) for variable in variables),
    }
    yield {"ok": True, "process": told}


# --- connect_pod_resources


def connect_pod_resources(work: Work, wish: Told) -> Iterator[Told]:
    """Hand over a connection to the kubelet's pod-resources API, at the one path that is set.

    Nothing can be changed over it: that API only lists which devices pods have, and the kubelet
    serves no other one at that socket. Which is asked of it the helper does not see.
    """
    del wish
    path = work.pod_resources
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.setblocking(False)
        try:
            line.connect(os.fsencode(path))  # at once, or not at all
        except (FileNotFoundError, NotADirectoryError):
            yield {"ok": True, "is_there": False}
            return
        except (ConnectionRefusedError, BlockingIOError) as error:
            yield {"ok": True, "is_there": True, "why": f"{path}: {error.strerror}"}
            return
        except OSError as error:
            raise Refused(f"{path}: {error.strerror or error}") from error
        work.handed_over = line
        yield {"ok": True, "is_there": True}


# --- the table


def _is_boot_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 64


def _is_sequence(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value < SEQUENCE_MAX)


Run = Callable[[Work, Told], Iterator[Told]]


def _on(ground_verb: Callable[[Ground, Told], Told]) -> Run:
    """Return a verb that looks at nothing but the GPUs, and has one line to tell."""

    def run(work: Work, wish: Told) -> Iterator[Told]:
        yield ground_verb(work.ground, wish)

    return run


# The verb; what does it; what has to be given, and how that is checked.
VERBS: dict[str, tuple[Run, Arguments]] = {
    "follow_kernel_log": (follow_kernel_log, {"boot_id": _is_boot_id, "after": _is_sequence}),
    "list_holders": (list_holders, {}),
    "job_variables": (job_variables, {"pid": is_pid}),
    "connect_pod_resources": (connect_pod_resources, {}),
    **{name: (_on(run), arguments) for name, (run, arguments) in GPU_VERBS.items()},
}


def answer(said: bytes, work: Work) -> Iterator[Told]:
    """Return the lines of the answer to a line; raises Refused, here or at its first line."""
    verb, wish = understood(said, {name: arguments for name, (_, arguments) in VERBS.items()})
    if work.only_reads and verb in CHANGING:
        raise Refused(f"{verb}: this helper changes nothing (its option --read-only)")
    return VERBS[verb][0](work, wish)
