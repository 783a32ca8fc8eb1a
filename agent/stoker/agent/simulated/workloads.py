"""Which processes of this machine say that they use simulated GPUs.

A process says so by its environment: STOKER_SIMULATED_WORKLOAD, such as
"memory=4GiB utilization=0.8", and CUDA_VISIBLE_DEVICES with the UUIDs of the GPUs, or of the MIG
devices, that it uses (or "all"). Without CUDA_VISIBLE_DEVICES it uses none: a simulated GPU is
never used by accident. What the workload does not say, or says wrongly, is a bare CUDA context
that does nothing.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from stoker.agent.procfs import parse_stat, parse_variable, read
from stoker.core.errors import BadInput
from stoker.core.units import parse_bytes

WORKLOAD = "STOKER_SIMULATED_WORKLOAD"
DEVICES = "CUDA_VISIBLE_DEVICES"
CONTEXT_BYTES = 448 * 2**20  # what a process holds on a GPU before it allocates anything


@dataclass(frozen=True, slots=True)
class Workload:
    """A real process on simulated GPUs."""

    pid: int
    name: str
    uuids: frozenset[str]
    memory_bytes: int  # on each of them
    utilization: float


def find_workloads(uuids: Collection[str], proc: str = "/proc") -> tuple[Workload, ...]:
    """Return the processes that use some of these GPUs; others' environments stay unread."""
    found: list[Workload] = []
    for pid in _pids(proc):
        # Most processes end here: their environment may not be read, or has no workload.
        environ = read(f"{proc}/{pid}/environ")
        workload = parse_variable(environ, WORKLOAD)
        if workload is None:
            continue
        used = parse_devices(parse_variable(environ, DEVICES) or "", uuids)
        if used:
            memory, utilization = parse_workload(workload)
            name = read(f"{proc}/{pid}/cmdline").split(b"\0")[0].decode("utf-8", "replace")
            found.append(Workload(pid, name, used, memory, utilization))
    return tuple(found)


def is_alive(pid: int, proc: str = "/proc") -> bool:
    """Whether the process runs; one that ended and was not reaped (a zombie) does not."""
    stat = read(f"{proc}/{pid}/stat")
    return bool(stat) and parse_stat(stat).state != "Z"


def parse_devices(text: str, uuids: Collection[str]) -> frozenset[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by UUID or its unambiguous beginning."""
    if text.strip() == "all":
        return frozenset(uuids)
    named: set[str] = set()
    for entry in (part.strip() for part in text.split(",")):
        is_uuid = entry.startswith(("GPU-", "MIG-"))
        meant = [uuid for uuid in uuids if is_uuid and uuid.startswith(entry)]
        if len(meant) != 1:
            break  # CUDA too sees only the devices before the first one that it cannot find
        named.add(meant[0])
    return frozenset(named)


def parse_workload(text: str) -> tuple[int, float]:
    """Return bytes and utilization; what is missing or wrong is that of a bare context."""
    memory, utilization = CONTEXT_BYTES, 0.0
    for part in text.split():
        name, _, value = part.partition("=")
        try:
            if name == "memory":
                memory = parse_bytes(value)
            elif name == "utilization":
                utilization = min(1.0, max(0.0, float(value)))
        except (BadInput, ValueError):
            continue
    return memory, utilization


def _pids(proc: str) -> Iterator[int]:
    with os.scandir(proc) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield int(entry.name)
