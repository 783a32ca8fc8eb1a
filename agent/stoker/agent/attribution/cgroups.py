"""What the cgroup of a process says about it: systemd unit, container, pod, Slurm job.

The kernel tells one path for each hierarchy (`/proc/PID/cgroup`): with cgroup v2 there is one, with
v1 some dozen, and in the hybrid form both. Nobody promises how these paths look; whoever makes a
cgroup names it as he likes. So the names that are known stand in tables here, with who gives them,
and every other name says nothing.

A path is read from the root on:

- Of containers in containers the innermost counts: the process is in that one.
- Of pods the outermost counts: that is the one that this host's kubelet knows.
- Of units only those outside of containers count: this host's systemd knows no others.
- Below `user@1000.service` every name was given by that user. Nobody's pod or Slurm job is there.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stoker.agent.owners import Owner


@dataclass(frozen=True, slots=True)
class Container:
    """A container that a process is in."""

    id: str
    runtime: str  # empty: its cgroup does not tell


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands; empty: nowhere of that kind."""

    unit: str = ""
    containers: tuple[Container, ...] = ()  # the outermost first
    pod_uid: str = ""
    slurm_job: str = ""
    slurm_step: str = ""

    def owner(self) -> Owner:
        """Return it as the owner of the process; names are for others to find."""
        inner = self.containers[-1] if self.containers else Container("", "")
        return Owner(
            unit=self.unit,
            container_id=inner.id,
            container_runtime=inner.runtime,
            pod_uid=self.pod_uid,
            slurm_job=self.slurm_job,
            slurm_step=self.slurm_step,
        )


NOWHERE = Place()

# What stands before and after the id of a container in the name of its cgroup, and whose that is.
_CONTAINERS = (
    # dockerd with systemd as its cgroup driver: /system.slice/docker-ID.scope
    ("docker-", ".scope", "docker"),
    # containerd under a kubelet with the systemd driver: .../cri-containerd-ID.scope
    ("cri-containerd-", ".scope", "containerd"),
    # nerdctl, which drives containerd: /system.slice/nerdctl-ID.scope
    ("nerdctl-", ".scope", "containerd"),
    # CRI-O, and the process beside each of its containers that watches it (conmon).
    ("crio-", ".scope", "cri-o"),
    ("crio-conmon-", ".scope", "cri-o"),
    # CRI-O under a kubelet with the cgroupfs driver: /kubepods/pod.../crio-ID
    ("crio-", "", "cri-o"),
    ("crio-conmon-", "", "cri-o"),
    # Podman as root: /machine.slice/libpod-ID.scope; as a user below user@1000.service/user.slice
    ("libpod-", ".scope", "podman"),
    ("libpod-conmon-", ".scope", "podman"),
    # Podman with the cgroupfs driver: /libpod_parent/libpod-ID
    ("libpod-", "", "podman"),
    ("libpod-conmon-", "", "podman"),
    # Podman in a unit of its own (Quadlet, --cgroups=split): .../web.service/libpod-payload-ID
    ("libpod-payload-", "", "podman"),
)
# Whose a bare id is, by the name of the cgroup above it. Under any other name it is a container
# too (`docker --cgroup-parent`, pods with the cgroupfs driver), but not told whose.
_PARENTS = {
    "docker": "docker",  # dockerd with the cgroupfs driver: /docker/ID
    "moby": "docker",  # dockerd's namespace in containerd
    "default": "containerd",  # `ctr` and nerdctl with the cgroupfs driver: /default/ID
    "k8s.io": "containerd",  # the kubelet's namespace in containerd, as seen with `ctr`
}
# The runtime's daemon: that a container or a job stands below it says nothing about that one.
_DAEMONS = frozenset(
    {
        *("docker.service", "containerd.service", "crio.service", "k3s.service"),
        *("k3s-agent.service", "rke2-agent.service", "rke2-server.service", "slurmd.service"),
    }
)
_ID_CHARACTERS = 64  # of a container: a SHA-256 in hexadecimal, with every runtime of the table
_HEXADECIMAL = frozenset("0123456789abcdef")
_WORD = frozenset(string.ascii_letters + string.digits)


def parse_cgroup(text: str) -> Place:
    """Return where the process stands whose /proc/PID/cgroup this is.

    With several hierarchies each part is from the first one that tells it, systemd's own before
    the others. Text that is not of this form says nothing.
    """
    places = [_parse_path(path) for path in _paths(text)]
    jobs = [place for place in places if place.slurm_job]
    job = next((place for place in jobs if place.slurm_step), jobs[0] if jobs else NOWHERE)
    containers = max((place.containers for place in places), key=len, default=())
    pod_uid = next((place.pod_uid for place in places if place.pod_uid), "")
    unit = next((place.unit for place in places if place.unit), "")
    if unit in _DAEMONS and (containers or pod_uid or job.slurm_job):
        unit = ""
    return Place(unit, containers, pod_uid, job.slurm_job, job.slurm_step)


def _paths(text: str) -> list[str]:
    """Return the different paths, systemd's hierarchy first, then v2's, then the others."""
    ranked: list[tuple[int, str]] = []
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) < 3 or not fields[2].startswith("/"):
            continue
        number, controllers, path = fields
        rank = (
            0 if controllers == "name=systemd" else 1 if (number, controllers) == ("0", "") else 2
        )
        ranked.append((rank, path.removesuffix(" (deleted)")))
    return list(dict.fromkeys(path for _, path in sorted(ranked, key=lambda each: each[0])))


def _parse_path(path: str) -> Place:
    names = tuple(_names(path))
    unit, pod_uid, slurm_job, slurm_step = "", "", "", ""
    containers: list[Container] = []
    is_users = False  # whether the user gave these names
    for position, name in enumerate(names):
        above = names[position - 1] if position else ""
        container = _container(name, above)
        if container is not None:
            containers.append(container)
            continue
        pod_uid = pod_uid or ("" if is_users else _pod(name))
        if not slurm_job and not is_users:
            slurm_job, slurm_step = _slurm(names[position:])
            if slurm_job:
                continue
        if not containers and _is_unit(name, has_outer=bool(unit)):
            unit = name
        is_users = is_users or (name.startswith("user@") and name.endswith(".service"))
    return Place(unit, tuple(containers), pod_uid, slurm_job, slurm_step)


def _names(path: str) -> Iterator[str]:
    """Yield the names on the path from the root on, or from as far up as we may see.

    From within a cgroup namespace, what is beside its root begins with "..": those say nothing.
    """
    for name in path.split("/"):
        if name in {"", ".", ".."}:
            continue
        # A kubelet with the systemd driver says "SLICE:PREFIX:ID", and a containerd without it
        # takes that for a name. With it, PREFIX-ID.scope would be in SLICE.
        parts = name.split(":")
        if len(parts) == 3 and _container(scope := f"{parts[1]}-{parts[2]}.scope", ""):
            yield f"{parts[0].removesuffix('.slice')}.slice"
            yield scope
        else:
            yield name


def _container(name: str, above: str) -> Container | None:
    for prefix, suffix, runtime in _CONTAINERS:
        if name.startswith(prefix) and name.endswith(suffix):
            id_ = name[len(prefix) : len(name) - len(suffix)]
            if _is_id(id_):
                return Container(id_, runtime)
    if _is_id(name):
        return Container(name, _PARENTS.get(above, ""))
    # LXC and Incus name containers as people do: /lxc.payload.NAME; before version 4: /lxc/NAME
    if name.startswith("lxc.payload.") and len(name) > len("lxc.payload."):
        return Container(name.removeprefix("lxc.payload."), "lxc")
    return Container(name, "lxc") if above in {"lxc", "lxc.payload"} else None


def _pod(name: str) -> str:
    """Return the UID of the pod whose cgroup has this name; empty: it is no pod's."""
    if name.endswith(".slice") and "kubepods" in name:
        # The systemd driver: kubepods-burstable-podUID.slice, with "_" for "-" in the UID; of
        # class Guaranteed kubepods-podUID.slice; in a node of kind with "kubelet-" before it.
        _, marker, uid = name.removesuffix(".slice").rpartition("-pod")
        return _pod_uid(uid.replace("_", "-")) if marker else ""
    # The cgroupfs driver: /kubepods/burstable/podUID, of class Guaranteed /kubepods/podUID
    return _pod_uid(name.removeprefix("pod")) if name.startswith("pod") else ""


def _pod_uid(text: str) -> str:
    """Return a UID: a UUID, or of a static pod the MD5 of its file. Empty: it is neither."""
    if len(text) == 32 and _HEXADECIMAL.issuperset(text):
        return text
    groups = text.split("-")
    is_uuid = [len(group) for group in groups] == [8, 4, 4, 4, 12]
    return text if is_uuid and _HEXADECIMAL.issuperset("".join(groups)) else ""


def _slurm(names: Sequence[str]) -> tuple[str, str]:
    """Return the job and the step of a path that goes on like this; empty: it is not Slurm's."""
    first, rest = names[0], list(names[1:])
    # v2: /system.slice/slurmstepd.scope/job_1/step_0/user/task_0; with several slurmd on one host,
    # or with that option at build time, NODE_slurmstepd.scope.
    is_v2 = first == "slurmstepd.scope" or first.endswith("_slurmstepd.scope")
    # v1: /slurm/uid_1000/job_1/step_0/task_0, or /slurm_NODE/...
    is_v1 = (first == "slurm" or first.startswith("slurm_")) and bool(rest)
    if is_v1:
        is_v1 = bool(_after("uid_", rest.pop(0)))
    if not (is_v1 or is_v2) or not rest:
        return "", ""
    job = _after("job_", rest[0])
    return job, _after("step_", rest[1]) if job and len(rest) > 1 else ""


def _after(prefix: str, name: str) -> str:
    """Return the word after the prefix; empty: there is none."""
    word = name.removeprefix(prefix)
    return word if name.startswith(prefix) and word and _WORD.issuperset(word) else ""


def _is_unit(name: str, *, has_outer: bool) -> bool:
    """Whether a person would ask systemd about it."""
    if name == "init.scope":
        return not has_outer  # of a user's own systemd: user@1000.service says more
    stem, dot, kind = name.rpartition(".")
    return bool(stem and dot) and kind in {"service", "scope"}


def _is_id(text: str) -> bool:
    return len(text) == _ID_CHARACTERS and _HEXADECIMAL.issuperset(text)
