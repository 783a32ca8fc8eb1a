"""What the host has beside its GPUs: the CPUs and the memory that the kernel tells of.

Both are those of the whole host, also where the agent runs in a container or under limits of its
own: they are for the work that is placed here, not for the agent. So the files of the kernel count,
which no limit of a container changes, and not what this process may use.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from stoker.agent.model import Host
from stoker.core.gpu_models import GpuModel

CPUS = Path("/sys/devices/system/cpu")
MEMORY = Path("/proc/meminfo")

# More than any kernel is built for; a list that says otherwise is no list of CPUs.
_CPUS_MAX = 65_536
_MILLI = 1000
_KIBIBYTE = 1024

_log = logging.getLogger(__name__)


def read_host(cpus: Path = CPUS, memory: Path = MEMORY) -> Host | None:
    """Return what the kernel tells; None, with a line in the log, where it does not.

    CPUs that were isolated at boot are left out: no process runs there that does not ask for it.
    """
    try:
        online = parse_cpus((cpus / "online").read_text(encoding="ascii"))
        isolated = parse_cpus((cpus / "isolated").read_text(encoding="ascii"))
        memory_bytes = parse_memory_total(memory.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        _log.warning("the CPUs and memory of this host are not known: %s", error)
        return None
    return Host(cpu_milli=len(online - isolated) * _MILLI, memory_bytes=memory_bytes)


def simulated_host(models: Iterable[GpuModel]) -> Host:
    """Return a host as these GPUs commonly have: for each of them its part."""
    models = tuple(models)
    return Host(
        cpu_milli=sum(model.host_cpus for model in models) * _MILLI,
        memory_bytes=sum(model.host_memory_bytes for model in models),
    )


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list such as "0-3,8"; raises ValueError for what is none."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue  # the empty list
        first, is_range, last = part.partition("-")
        low, high = int(first), int(last if is_range else first)
        if not 0 <= low <= high < _CPUS_MAX:
            raise ValueError(f"{part!r} is no range of CPUs")
        found.update(range(low, high + 1))
    return frozenset(found)


def parse_memory_total(text: str) -> int:
    """Return the bytes of MemTotal in a /proc/meminfo; raises ValueError where it is not there."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            number, _, unit = value.strip().partition(" ")
            if unit == "kB":
                return int(number) * _KIBIBYTE
    raise ValueError("/proc/meminfo has no line `MemTotal: ... kB`")
