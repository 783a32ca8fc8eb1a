"""The root helper as a real process, a /proc of files for it to read, and a log it can follow."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stoker.agent.privileged import Helper

BOOT_ID = "11111111-2222-3333-4444-555555555555"
SECONDS_MAX = 20.0
# Somebody without rights, in a test that is run as root.
NOBODY = 65534


@contextlib.contextmanager
def open_folder() -> Generator[Path]:
    """Give a folder that every user may enter, and only its owner may change."""
    folder = Path(tempfile.mkdtemp(prefix="stoker-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass
class RunningHelper:
    """A helper that answers at `path`."""

    path: Path
    process: subprocess.Popen[bytes]

    @property
    def helper(self) -> Helper:
        """A client of it."""
        return Helper(self.path, timeout_seconds=SECONDS_MAX)

    @property
    def children(self) -> list[psutil.Process]:
        """The processes that answer somebody now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self) -> str:
        """What it has written."""
        return self.path.with_name("helper.log").read_text(encoding="utf-8")

    def ask(self, said: bytes, *, is_over: bool = True) -> list[dict[str, Any]]:
        """Say something as whoever runs the test, and return all that comes back.

        `is_over`: whether the helper is told that no more comes.
        """
        return ask(self.path, said, is_over=is_over)


@contextlib.contextmanager
def running(
    folder: Path,
    *options: str,
    user: str | None = None,
    tuning: Mapping[str, float] | None = None,
    inherited: socket.socket | None = None,
    prefix: Sequence[str] = (),
) -> Generator[RunningHelper]:
    """Give a helper that says it is ready, at helper.sock in `folder`; it is ended by SIGTERM.

    `tuning`: other values for constants, such as {"server.LINE_SECONDS_MAX": 0.1}. `inherited`: a
    socket that listens there already, handed over as systemd does. `prefix`: goes before it all.
    """
    path = folder / "helper.sock"
    where = () if inherited is not None else ("--socket", str(path))
    command = [*prefix, *command_of(tuning, inherited)]
    command += [*where, "--user", user or str(os.geteuid()), *options]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        (folder / "helper.log").open("wb") as log,
    ):
        manager.bind(os.fsencode(folder / "notify.sock"))
        manager.settimeout(SECONDS_MAX)
        process = subprocess.Popen(
            command,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify.sock")},
            stderr=log,
            pass_fds=() if inherited is None else (inherited.fileno(),),
            cwd="/",
        )
        found = RunningHelper(path, process)
        try:
            try:
                assert manager.recv(64) == b"READY=1"
            except TimeoutError:
                raise AssertionError(f"the helper is not ready: {found.log()}") from None
            yield found
        finally:
            (folder / "notify.sock").unlink()
            process.terminate()
            process.wait(SECONDS_MAX)
        assert "Traceback" not in found.log(), found.log()


def command_of(
    tuning: Mapping[str, float] | None = None, inherited: socket.socket | None = None
) -> list[str]:
    """Return the command that runs a helper, as for `running`."""
    if not tuning and inherited is None:
        return [sys.executable, "-m", "stoker.agent.helper"]
    lines = [
        "import os, sys",
        "from stoker.agent.helper import __main__, ending, memory, partitions, server, verbs",
        *(f"{name} = {value!r}" for name, value in (tuning or {}).items()),
    ]
    if inherited is not None:
        number = inherited.fileno()
        lines += [
            f"os.dup2({number}, 3, inheritable=True) if {number} != 3 else None",
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))",
        ]
    lines.append("sys.exit(__main__.main())")
    return [sys.executable, "-c", "\n".join(lines)]


def ask(path: Path, said: bytes, *, is_over: bool = True) -> list[dict[str, Any]]:
    """Say something to whoever listens there, and return the lines that come back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(os.fsencode(path))  # waits its turn
        line.settimeout(SECONDS_MAX)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(said)
            if is_over:
                line.shutdown(socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(1 << 16):
                heard += part
    return [json.loads(each) for each in heard.splitlines()]


class ProcTree:
    """A folder that looks like /proc to whoever reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        random = root / "sys" / "kernel" / "random"
        random.mkdir(parents=True)
        (random / "boot_id").write_text(f"{BOOT_ID}\n", encoding="ascii")

    def add(
        self,
        pid: int,
        *,
        uid: int = 1000,
        name: str = "python3",
        ticks: int = 500,
        cmdline: bytes | None = b"python3\0train.py\0",
        environ: bytes | None = b"",
        open_files: Sequence[str] = (),
        maps: bytes | None = b"",
        cgroup: str = "0::/user.slice\n",
        is_kernel_thread: bool = False,
    ) -> Path:
        """Add a process. A file that is None is a pipe that nobody writes to: it reads for ever."""
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        flags = 0x00200040 if is_kernel_thread else 0x00400000
        self.set_start(pid, ticks, name=name, flags=flags)
        (folder / "status").write_text(f"Name:\tx\nUid:\t{uid}\t0\t0\t0\n", encoding="ascii")
        (folder / "cgroup").write_text(cgroup, encoding="utf-8", errors="surrogateescape")
        for number, target in enumerate(open_files):
            (folder / "fd" / str(number)).symlink_to(target)
        for file, text in (("cmdline", cmdline), ("environ", environ), ("maps", maps)):
            if text is None:
                os.mkfifo(folder / file)
            else:
                (folder / file).write_bytes(text)
        return folder

    def set_start(self, pid: int, ticks: int, *, name: str = "x", flags: int = 0) -> None:
        """Have the process begin then; with another time it is another process."""
        fields = f"S 1 1 1 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 {ticks} 0 0"
        (self.root / str(pid) / "stat").write_text(f"{pid} ({name}) {fields}\n", encoding="utf-8")


class LogPipe:
    """A pipe in place of /dev/kmsg; it never ends, as the kernel's log does not."""

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self.path = path
        os.mkfifo(path, mode)
        self._end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        assert stat.S_ISFIFO(os.fstat(self._end).st_mode)

    def write(self, sequence: int, text: str, *, seconds: float = 1.0) -> None:
        """Have the kernel say something, so long after its boot."""
        record = f"6,{sequence},{int(seconds * 1e6)},-;{text}\n"
        os.write(self._end, record.encode())

    def close(self) -> None:
        os.close(self._end)
