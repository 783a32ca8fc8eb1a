"""What a workload is made of: hosts with GPUs, and tasks that ask for GPUs, CPU and memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stoker.aggregator.model import COMPUTE_MILLI, Request

# Nothing expires while a workload is played: its own events say what ends.
TTL_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Host:
    """A node of a workload's fleet."""

    name: str
    model: str  # of all its GPUs
    gpus: int
    cpu_milli: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Task:
    """What somebody once asked for, or could. CPU, memory and GPUs are those of each of its nodes.

    Times are seconds on the workload's own clock; None where it has none.
    """

    name: str
    cpu_milli: int
    memory_bytes: int
    gpus: int  # 0: CPU alone
    gpu_milli: int  # of each of its GPUs; less than COMPUTE_MILLI only of a single one
    models: tuple[str, ...] = ()  # any of these; none: any at all
    nodes: int = 1
    arrives_at: float | None = None
    runs_seconds: float | None = None

    @property
    def gpu_milli_total(self) -> int:
        """What it takes of the fleet's GPUs, in thousandths of one."""
        return self.nodes * self.gpus * self.gpu_milli

    @property
    def is_share(self) -> bool:
        """Whether it takes a part of a GPU."""
        return self.gpus == 1 and self.gpu_milli < COMPUTE_MILLI

    def request(self) -> Request:
        """Return it as a client would ask for it."""
        return Request(
            gpus=self.gpus,
            holder="workload",
            ttl_seconds=TTL_SECONDS,
            compute_milli=self.gpu_milli if self.is_share else None,
            nodes=self.nodes,
            cpu_milli=self.cpu_milli,
            host_memory_bytes=self.memory_bytes,
            models=self.models,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """A fleet and the tasks that come to it; the tasks are also the mix that policies may know."""

    hosts: tuple[Host, ...]
    tasks: tuple[Task, ...]

    @property
    def capacity_milli(self) -> int:
        """All GPUs of the fleet, in thousandths of one."""
        return gpus_milli(self.hosts)

    def times(self, copies: int) -> "Workload":
        """Return a workload so many times as large: every host and every task so many times."""
        if copies == 1:
            return self
        return Workload(
            tuple(
                replace(host, name=f"{host.name}-{copy}")
                for copy in range(copies)
                for host in self.hosts
            ),
            self.tasks * copies,
        )


def gpus_milli(hosts: Sequence[Host]) -> int:
    """Return how much GPU the hosts have together, in thousandths of one."""
    return sum(host.gpus for host in hosts) * COMPUTE_MILLI
