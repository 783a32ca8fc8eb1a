"""Where a bench runs: its figures mean nothing without it."""

import os
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil

from stoker.cli.bench.figures import Machine
from stoker.core.errors import BadInput
from stoker.testing.load import to_micros

# Beside its connections a process has the ledger's files, pipes, and what gRPC polls with.
_FILES_BESIDE_CONNECTIONS = 256
# A commit of the ledger writes a page or a few.
_DISK_WRITES = 200
_DISK_WRITE_BYTES = 4096


def describe_machine(folder: Path) -> Machine:
    """Return this machine; `folder` is where the ledger will lie."""
    return Machine(
        processor=_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        python=platform.python_version(),
        grpc=grpc.__version__,
        filesystem=_filesystem(Path("/proc/self/mounts").read_text(encoding="utf-8"), folder),
    )


def allow_connections(connections: int) -> None:
    """Let this process and its children have so many; raises BadInput when they may not.

    A unit file does the same for the daemon (LimitNOFILE).
    """
    wanted = connections + _FILES_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise BadInput(
            f"--nodes: {connections} connections need {wanted} open files in one process, "
            f"and this user may have {hard} (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def time_disk(folder: Path) -> list[int]:
    """Return how long each of some small appends to a file there took to be durable, in us."""
    micros: list[int] = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(_DISK_WRITES):
            began = time.perf_counter()
            file.write(bytes(_DISK_WRITE_BYTES))
            os.fsync(file.fileno())
            micros.append(to_micros(time.perf_counter() - began))
    return micros


def utc_text(at: float) -> str:
    """Return that instant (Unix) in ISO 8601, to the second, UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _processor(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _filesystem(mounts: str, folder: Path) -> str:
    """Return the kind of filesystem that `folder` lies on, given the text of /proc/mounts."""
    best = ("", "unknown")
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split()
        # The kernel writes a space in a path as \040.
        where = where.replace("\\040", " ")
        if folder.resolve().is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]
