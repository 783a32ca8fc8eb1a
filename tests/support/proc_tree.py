"""A /proc of files, as the kernel would tell it: processes that a test makes, and takes away."""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

BOOTED_AT = 1_700_000_000


class ProcTree:
    """The mount of a /proc."""

    def __init__(self, root: Path) -> None:
        """Make it, without processes."""
        self.root = root
        self._folders = itertools.count()
        root.mkdir(parents=True, exist_ok=True)
        (root / "stat").write_text(f"cpu 1 2\nbtime {BOOTED_AT}\n")

    def start(
        self,
        pid: int,
        *,
        cgroup: str = "0::/\n",
        environ: Mapping[str, str] | None = None,
        command: str = "python train.py",
        ticks: int = 500,
    ) -> None:
        """Have a process run; `environ` None: it may not be read."""
        # Like the kernel's, the folder of a process is never one that another one had: a new one
        # is made beside it and then put in its place.
        made = self.root / f"new{next(self._folders)}"
        made.mkdir()
        name = command.split(" ", maxsplit=1)[0]
        (made / "stat").write_text(f"{pid} ({name}) S 1 " + "0 " * 17 + f"{ticks} 0\n")
        (made / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
        (made / "cgroup").write_text(cgroup)
        if environ is not None:
            entries = "".join(f"{key}={value}\0" for key, value in environ.items())
            (made / "environ").write_text(entries)
        self.end(pid)
        made.rename(self.root / str(pid))

    def move(self, pid: int, cgroup: str) -> None:
        """Have the process be in another cgroup."""
        (self.root / str(pid) / "cgroup").write_text(cgroup)

    def end(self, pid: int) -> None:
        """Have the process be gone, if there is one."""
        shutil.rmtree(self.root / str(pid), ignore_errors=True)
