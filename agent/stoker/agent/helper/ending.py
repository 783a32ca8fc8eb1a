"""Ends a process that has a GPU open, and no other: not even one that has its PID by now."""

import os
import select
import signal
import time

from stoker.agent.helper.files import open_devices, read, read_process
from stoker.agent.helper.ground import Ground
from stoker.agent.helper.requests import Refused, Told

# How long a process may take to end, by the signal; after that it is told not to be gone.
TERM_SECONDS_MAX = 10.0
KILL_SECONDS_MAX = 5.0
# For all else that is done besides.
_ALARM_SECONDS = 20
_INFORMATION_BYTES_MAX = 1 << 14


def end_holder(ground: Ground, wish: Told) -> Told:
    """Send a process a signal, if it has this GPU's device file open; tell whether it is gone."""
    pid, ticks, gpu = wish["pid"], wish["started_ticks"], wish["gpu"]
    assert isinstance(pid, int)
    assert isinstance(ticks, int)
    assert isinstance(gpu, str)
    is_last = wish["signal"] == "KILL"
    seconds = KILL_SECONDS_MAX if is_last else TERM_SECONDS_MAX
    signal.alarm(int(seconds) + _ALARM_SECONDS)
    if pid in (1, os.getpid(), os.getppid()):
        raise Refused(f"process {pid} is not one to be ended")
    try:
        # It stands for the process that has the PID now, also when another one has it later.
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return {"ok": True, "is_gone": True, "is_simulated": bool(ground.standin)}
    except OSError as error:
        raise Refused(f"process {pid}: {error.strerror}") from error
    told: Told
    try:
        told = _objection(ground, gpu, pid, ticks) or {}
        if not told:
            signal.pidfd_send_signal(process, signal.SIGKILL if is_last else signal.SIGTERM)
            told = {"ok": True, "is_gone": _ends(process, seconds)}
    except (ProcessLookupError, FileNotFoundError):  # it ended meanwhile
        told = {"ok": True, "is_gone": True}
    except PermissionError as error:
        found = f"{error.strerror}, as without CAP_KILL or CAP_SYS_PTRACE"
        told = {"failed": "no_permission", "message": f"process {pid}: {found}"}
    finally:
        os.close(process)
    return {**told, "is_simulated": bool(ground.standin)}


def _objection(ground: Ground, gpu: str, pid: int, ticks: int) -> Told | None:
    """Return what to tell in place of sending a signal; raises OSError when it ended."""
    process = read_process(ground.proc, pid)
    if process.started_ticks != ticks:  # another one; the one that is meant has ended
        return {"ok": True, "is_gone": True}
    if process.is_kernel_thread:
        raise Refused(f"process {pid} is the kernel's")
    if ground.standin:
        from stoker.agent.helper import driving  # noqa: PLC0415 (it loads the simulated driver)

        is_holder = driving.has_user(ground.standin, gpu, pid)
        what = f"{gpu} of the simulated driver"
    else:
        what = _device_of(ground.proc, gpu)
        is_holder = what in open_devices(ground.proc, pid)[0]
    if is_holder:
        return None
    return {"failed": "not_found", "message": f"process {pid} does not have {what} open"}


def _device_of(proc: str, gpu: str) -> str:
    """Return "/dev/nvidia3" for a GPU, as the kernel module tells it; raises Refused."""
    folder = f"{proc}/driver/nvidia/gpus"
    try:
        for address in sorted(os.listdir(folder)):
            text = read(f"{folder}/{address}/information", _INFORMATION_BYTES_MAX)
            fields = [line.partition(b":") for line in text.splitlines()]
            told = {name.strip(): value.strip() for name, _, value in fields}
            minor = told.get(b"Device Minor", b"")
            if told.get(b"GPU UUID") == gpu.encode() and minor.isdigit():
                return f"/dev/nvidia{int(minor)}"
    except OSError as error:
        raise Refused(f"{error.filename or folder}: {error.strerror}") from error
    raise Refused(f"{folder}: the kernel module knows no {gpu}")


def _ends(process: int, seconds: float) -> bool:
    """Whether a process ends within these seconds."""
    deadline = time.monotonic() + seconds
    ready = select.poll()
    ready.register(process, select.POLLIN)  # a descriptor of a process is ready once it has ended
    return bool(ready.poll(max(0.0, deadline - time.monotonic()) * 1000))
