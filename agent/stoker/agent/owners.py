"""To whom a process, and a GPU that somebody else has assigned, belongs."""

from dataclasses import dataclass
from enum import StrEnum

_ID_CHARACTERS = 12  # of a container's, as its own tools show them


@dataclass(frozen=True, slots=True)
class Owner:
    """What a process is part of, as its cgroup and others on the node tell; empty: not told."""

    unit: str = ""  # of systemd: "jupyter.service", "session-3.scope"
    container_id: str = ""
    container_runtime: str = ""  # "docker", "containerd", "cri-o", "podman"
    container_name: str = ""
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    slurm_job: str = ""
    slurm_step: str = ""

    def described(self) -> str:
        """Return it in a few words, the outermost first; empty: nothing is known."""
        if self.pod_name:
            container = f" (container {self.container_name})" if self.container_name else ""
            return f"pod {self.pod_namespace}/{self.pod_name}{container}"
        if self.pod_uid:
            return f"pod with UID {self.pod_uid}"
        if self.slurm_job:
            return f"Slurm job {self.slurm_job}"
        if self.container_id:
            name = self.container_name or self.container_id[:_ID_CHARACTERS]
            return f"{self.container_runtime or 'a'} container {name}"
        return f"unit {self.unit}" if self.unit else ""


NOBODY = Owner()


class AssignedBy(StrEnum):
    """Who hands out GPUs beside us."""

    KUBELET = "kubelet"
    SLURM = "slurm"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A GPU, or a part of one, that was handed out by somebody else; in use even while idle."""

    gpu_uuid: str
    by: AssignedBy
    holder: str  # in words: "pod ml/train-0 (container trainer)", "Slurm job 1234"
    mig_device_uuid: str = ""  # empty: the whole GPU, or not told
    owner: Owner = NOBODY  # the holder, as far as it is told


@dataclass(frozen=True, slots=True)
class DeviceHolder:
    """A process that has device files of the driver open, whether or not it uses a GPU."""

    pid: int
    user: str
    command: str
    devices: tuple[str, ...]  # "/dev/nvidia0", "/dev/nvidiactl"
    owner: Owner = NOBODY
    started_at: float | None = None
