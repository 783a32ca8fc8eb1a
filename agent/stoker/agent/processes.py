"""Starts child processes so that none is left behind: each ends with its parent, and is reaped.

`python -m stoker.agent.processes PARENT_PID COMMAND...` is the little program that `start` puts
before a command which shall end with its parent: it asks the kernel for that and becomes the
command. A `preexec_fn` would do the same inside of the fork, which is not safe in a process with
threads (gRPC has many).
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from stoker.core.clock import Clock  # it imports asyncio, which the driver host does without

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = (0.005, 0.1)  # first and longest pause between two looks at a process
# SIGKILL works at once, or not until the kernel lets go of the process.
_KILL_SECONDS = 1.0
_NOT_STARTED = 127  # as a shell says it


class Child(Protocol):
    """A process that we started; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
    die_with_parent: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a command; raises OSError when it cannot be started.

    `new_session` keeps the signals of our terminal from it. `die_with_parent` has the kernel send
    it SIGTERM when the thread that started it ends, so call from the main thread; a command that
    is not found then shows as exit code 127.
    """
    if die_with_parent:
        argv = [sys.executable, "-P", "-m", "stoker.agent.processes", str(os.getpid()), *argv]
    return subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=new_session,
    )


async def wait(process: Child, seconds: float, clock: "Clock") -> int | None:
    """Return the exit code (negative: a signal), or None when it still runs after `seconds`."""
    deadline = clock.monotonic() + seconds
    pause, longest = _POLL_SECONDS
    while (code := process.poll()) is None and (left := deadline - clock.monotonic()) > 0:
        await clock.sleep(min(pause, left))
        pause = min(pause * 2, longest)
    return code


async def end(process: Child, *, grace_seconds: float, clock: "Clock") -> int | None:
    """Ask the process to end, kill it after the grace; None when even that did not end it."""
    process.terminate()
    if (code := await wait(process, grace_seconds, clock)) is None:
        process.kill()
        code = await wait(process, _KILL_SECONDS, clock)
    return code


def die_with_parent(parent_pid: int, signum: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent ends; ends it if that was before.

    The wish outlives exec, except of programs with other rights (setuid).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def main(arguments: Sequence[str]) -> int:
    """Become the command, as a process that ends with its parent."""
    parent_pid, *command = arguments
    die_with_parent(int(parent_pid))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return _NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
