"""What runs on the GPUs of a node, whose it is, and what others have handed out, as values."""

from dataclasses import dataclass

_ID_CHARACTERS = 12  # of a container's, as its own tools show them


@dataclass(frozen=True, slots=True)
class Owner:
    """What a process is part of, as its node tells; what is empty cannot be seen."""

    unit: str = ""  # of systemd
    container_id: str = ""
    container_runtime: str = ""
    container_name: str = ""
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    slurm_job: str = ""
    slurm_step: str = ""

    def described(self) -> str:
        """Return it in a few words, the outermost first; empty: nothing is known."""
        if self.pod_name:
            return f"pod {self.pod_namespace}/{self.pod_name}"
        if self.pod_uid:
            return f"pod with UID {self.pod_uid}"
        if self.slurm_job:
            return f"Slurm job {self.slurm_job}"
        if self.container_name or self.container_id:
            return f"container {self.container_name or self.container_id[:_ID_CHARACTERS]}"
        return f"unit {self.unit}" if self.unit else ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process with a context on a GPU."""

    gpu_uuid: str
    pid: int
    user: str = ""  # empty: cannot be seen
    command: str = ""
    memory_used_bytes: int | None = None
    allocation_id: str = ""  # empty: the agent found it to be nobody's of ours
    started_at: float | None = None
    owner: Owner | None = None  # beyond its user; None: nothing is known
    gpu_instance_id: int | None = None  # of MIG; None: the whole GPU, or not told


@dataclass(frozen=True, slots=True)
class Assignment:
    """A GPU, or a part of one, that somebody else has handed out; in use even while idle."""

    gpu_uuid: str
    by: str  # "kubelet", "slurm"
    holder: str  # "pod ml/train-0 (container trainer)", "Slurm job 1234"
    mig_device_uuid: str = ""  # empty: the whole GPU, or not told


@dataclass(frozen=True, slots=True)
class ProcessTable:
    """The processes on a node's GPUs at one instant, and what others have handed out of them."""

    started_at: float  # node's clock
    processes: tuple[Process, ...]
    unread_gpu_uuids: tuple[str, ...] = ()
    assignments: tuple[Assignment, ...] = ()
    assignments_unknown: str = ""  # why it is not known what others have handed out

    def says_the_same_as(self, other: "ProcessTable | None") -> bool:
        """Whether nothing but the time of reading differs."""
        return other is not None and (
            (self.processes, self.unread_gpu_uuids, self.assignments, self.assignments_unknown)
            == (
                *(other.processes, other.unread_gpu_uuids),
                *(other.assignments, other.assignments_unknown),
            )
        )
