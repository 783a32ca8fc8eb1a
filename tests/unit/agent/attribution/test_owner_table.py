"""Whose a process is, by its cgroup and its environment as they are found on real machines.

Each row is a process: what its /proc says, and the owner that follows. The texts have the form that
the named software gives them; ids and names are made up.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.proc_tree import ProcTree

from stoker.agent.attribution.resolver import Attribution
from stoker.agent.owners import NOBODY, Owner
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import ProcessReading

ID = "4f1c9d2b7a3e5f60718293a4b5c6d7e8f9010a1b2c3d4e5f60718293a4b5c6d7"
INNER = "b" * 64
OUTER = "0" * 63 + "1"
UID = "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6"
UID_ = UID.replace("-", "_")
STATIC = "9f86d081884c7d659a2feaa0c55ad015"
KINDS_UID = "ffffffff-0001-4002-8003-a1b2c3d4e5f6"
KINDS_UID_ = KINDS_UID.replace("-", "_")


class Row(NamedTuple):
    name: str
    cgroup: str
    owner: Owner
    environ: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)


def docker(id_: str = ID, **more: str) -> Owner:
    return Owner(container_id=id_, container_runtime="docker", **more)


def podman(**more: str) -> Owner:
    return Owner(container_id=ID, container_runtime="podman", **more)


def pod(runtime: str, uid: str = UID, id_: str = ID) -> Owner:
    return Owner(container_id=id_, container_runtime=runtime, pod_uid=uid)


def v1(path: str, systemd: str | None = None) -> str:
    """Cgroup v1: a path in every controller, and perhaps another one in systemd's hierarchy."""
    controllers = (
        *("misc", "rdma", "pids", "perf_event", "net_cls,net_prio", "memory", "hugetlb"),
        *("freezer", "devices", "cpuset", "cpu,cpuacct", "blkio"),
    )
    lines = [f"{n}:{each}:{path}" for n, each in zip(range(13, 1, -1), controllers, strict=True)]
    return "\n".join([*lines, f"1:name=systemd:{systemd or path}", "0::/", ""])


def hybrid(path: str, systemd: str) -> str:
    """v1 controllers, with the processes of systemd in a v2 tree beside them."""
    return v1(path, systemd).replace("0::/", f"0::{systemd}")


USER = "/user.slice/user-1000.slice/user@1000.service"
KUBE = "/kubepods.slice"
BURSTABLE = f"{KUBE}/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"
BESTEFFORT = f"{KUBE}/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice"
GUARANTEED = f"{KUBE}/kubepods-pod{UID_}.slice"
KIND = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"

SYSTEMD = [
    Row("a service", "0::/system.slice/jupyter.service\n", Owner(unit="jupyter.service")),
    Row("a service, v1", v1("/", "/system.slice/jupyter.service"), Owner(unit="jupyter.service")),
    Row(
        "a service, hybrid",
        hybrid("/system.slice", "/system.slice/jupyter.service"),
        Owner(unit="jupyter.service"),
    ),
    Row(
        "an instance of a template",
        "0::/system.slice/system-vllm.slice/vllm@8000.service\n",
        Owner(unit="vllm@8000.service"),
    ),
    Row(
        "what a service has put into a cgroup of its own",
        "0::/system.slice/ray.service/workers\n",
        Owner(unit="ray.service"),
    ),
    Row(
        "a login",
        "0::/user.slice/user-1000.slice/session-3.scope\n",
        Owner(unit="session-3.scope"),
    ),
    Row(
        "a service of a user", f"0::{USER}/app.slice/train.service\n", Owner(unit="train.service")
    ),
    Row(
        "a program on a user's desktop",
        f"0::{USER}/app.slice/app-org.gnome.Terminal.slice/vte-spawn-1b2c.scope\n",
        Owner(unit="vte-spawn-1b2c.scope"),
    ),
    Row("a user's own systemd", f"0::{USER}/init.scope\n", Owner(unit="user@1000.service")),
    Row("systemd", "0::/init.scope\n", Owner(unit="init.scope")),
    Row("a virtual machine", "0::/machine.slice/machine-qemu\\x2d1\\x2dgpu.scope\n",
        Owner(unit="machine-qemu\\x2d1\\x2dgpu.scope")),
    Row("a slice is no unit that does anything", "0::/user.slice/user-1000.slice\n", NOBODY),
    Row("a kernel thread", "0::/\n", NOBODY),
    Row(
        "its cgroup is removed already",
        "0::/system.slice/train.service (deleted)\n",
        Owner(unit="train.service"),
    ),
    Row("dockerd itself", "0::/system.slice/docker.service\n", Owner(unit="docker.service")),
]  # fmt: skip

CONTAINERS = [
    Row("Docker", f"0::/system.slice/docker-{ID}.scope\n", docker()),
    Row("Docker, cgroupfs driver", f"0::/docker/{ID}\n", docker()),
    Row("Docker, v1", v1(f"/docker/{ID}"), docker()),
    Row("Docker, v1, systemd driver", v1(f"/system.slice/docker-{ID}.scope"), docker()),
    Row("Docker, hybrid, dockerd's own cgroup in v2",
        v1(f"/docker/{ID}").replace("0::/", "0::/system.slice/docker.service"), docker()),
    Row("Docker without root", f"0::{USER}/user.slice/docker-{ID}.scope\n",
        docker(unit="user@1000.service")),
    Row("Docker, a parent chosen by the user", f"0::/gpu-jobs/{ID}\n", Owner(container_id=ID)),
    Row("a systemd inside of Docker", f"0::/docker/{ID}/system.slice/nginx.service\n", docker()),
    Row("containerd, `ctr run`", f"0::/default/{ID}\n",
        Owner(container_id=ID, container_runtime="containerd")),
    Row("containerd, nerdctl", f"0::/system.slice/nerdctl-{ID}.scope\n",
        Owner(container_id=ID, container_runtime="containerd")),
    Row("Podman", f"0::/machine.slice/libpod-{ID}.scope/container\n", podman()),
    Row("Podman, v1", v1(f"/machine.slice/libpod-{ID}.scope"), podman()),
    Row("Podman, cgroupfs driver", f"0::/libpod_parent/libpod-{ID}\n", podman()),
    Row("Podman's watcher", f"0::/machine.slice/libpod-conmon-{ID}.scope\n", podman()),
    Row("Podman, a pod of its own", f"0::/machine.slice/machine-libpod_pod_{INNER}.slice/"
        f"libpod-{ID}.scope\n", podman()),
    Row("Podman without root", f"0::{USER}/user.slice/libpod-{ID}.scope/container\n",
        podman(unit="user@1000.service")),
    Row("Podman without root, its watcher", f"0::{USER}/user.slice/libpod-conmon-{ID}.scope\n",
        podman(unit="user@1000.service")),
    Row("Podman in a unit (Quadlet)", f"0::/system.slice/web.service/libpod-payload-{ID}\n",
        podman(unit="web.service")),
    Row("Podman in a unit of a user",
        f"0::{USER}/app.slice/web.service/libpod-payload-{ID}\n", podman(unit="web.service")),
    Row("LXC", "0::/lxc.payload.lab/system.slice/jupyter.service\n",
        Owner(container_id="lab", container_runtime="lxc")),
    Row("LXC, v1", v1("/lxc/101/ns"), Owner(container_id="101", container_runtime="lxc")),
    Row("Docker in Docker", f"0::/system.slice/docker-{OUTER}.scope/docker/{ID}\n", docker()),
    Row("Docker in LXC", f"0::/lxc.payload.lab/system.slice/docker-{ID}.scope\n", docker()),
    Row("an id too short is a name", "0::/docker/4f1c9d2b7a3e\n", NOBODY),
]  # fmt: skip

KUBERNETES = [
    Row("Burstable, containerd", f"0::{BURSTABLE}/cri-containerd-{ID}.scope\n", pod("containerd")),
    Row("BestEffort", f"0::{BESTEFFORT}/cri-containerd-{ID}.scope\n", pod("containerd")),
    Row("Guaranteed", f"0::{GUARANTEED}/cri-containerd-{ID}.scope\n", pod("containerd")),
    Row("v1", v1(f"{BURSTABLE}/cri-containerd-{ID}.scope"), pod("containerd")),
    Row("CRI-O", f"0::{GUARANTEED}/crio-{ID}.scope/container\n", pod("cri-o")),
    Row("CRI-O's watcher", f"0::{GUARANTEED}/crio-conmon-{ID}.scope\n", pod("cri-o")),
    Row("Docker as runtime", f"0::{BURSTABLE}/docker-{ID}.scope\n", pod("docker")),
    Row("cgroupfs driver, Burstable", f"0::/kubepods/burstable/pod{UID}/{ID}\n", pod("")),
    Row("cgroupfs driver, BestEffort", f"0::/kubepods/besteffort/pod{UID}/{ID}\n", pod("")),
    Row("cgroupfs driver, Guaranteed", v1(f"/kubepods/pod{UID}/{ID}"), pod("")),
    Row("cgroupfs driver, CRI-O", f"0::/kubepods/burstable/pod{UID}/crio-{ID}\n", pod("cri-o")),
    Row("a static pod",
        f"0::{KUBE}/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/"
        f"cri-containerd-{ID}.scope\n", pod("containerd", STATIC)),
    Row("a static pod, cgroupfs driver", f"0::/kubepods/burstable/pod{STATIC}/{ID}\n",
        pod("", STATIC)),
    Row("kubelet with the systemd driver, containerd without",
        f"0::/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:"
        f"{ID}\n", pod("containerd")),
    Row("k3s, cgroupfs driver, v1", v1(f"/kubepods/besteffort/pod{UID}/{ID}",
        f"/system.slice/k3s.service/kubepods/besteffort/pod{UID}/{ID}"), pod("")),
    Row("a pod's own cgroup", f"0::{BURSTABLE}\n", Owner(pod_uid=UID)),
    Row("kind, the node in Docker",
        f"0::/system.slice/docker-{OUTER}.scope{KIND}/kubelet-kubepods-besteffort-pod{UID_}.slice/"
        f"cri-containerd-{ID}.scope\n", pod("containerd")),
    Row("kind, cgroupfs driver", f"0::/docker/{OUTER}/kubelet/kubepods/pod{UID}/{ID}\n", pod("")),
    Row("kind in a pod: this host's kubelet knows the outer one",
        f"0::{GUARANTEED}/cri-containerd-{OUTER}.scope/docker/{INNER}{KIND}/"
        f"kubelet-kubepods-besteffort-pod{KINDS_UID_}.slice/cri-containerd-{ID}.scope\n",
        pod("containerd")),
    Row("Docker in a pod", f"0::{BURSTABLE}/cri-containerd-{OUTER}.scope/docker/{ID}\n",
        pod("docker")),
    Row("seen from within another pod",
        f"0::/../../kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope\n",
        pod("containerd")),
    Row("seen from within another pod, cgroupfs driver", f"0::/../../pod{UID}/{ID}\n", pod("")),
    Row("seen from beside it in one pod", f"0::/../cri-containerd-{ID}.scope\n",
        Owner(container_id=ID, container_runtime="containerd")),
    Row("seen from within its own container", "0::/\n", NOBODY),
    Row("a user's own kubelet is none of this host's",
        f"0::{USER}/user.slice/kubepods/pod{UID}/{ID}\n",
        Owner(unit="user@1000.service", container_id=ID)),
    Row("what a pod says of Slurm is not believed", f"0::{BURSTABLE}/cri-containerd-{ID}.scope\n",
        pod("containerd"), {"SLURM_JOB_ID": "17"}),
]  # fmt: skip

SLURM = [
    Row("v2", "0::/system.slice/slurmstepd.scope/job_17/step_0/user/task_0\n",
        Owner(slurm_job="17", slurm_step="0")),
    Row("v2, the batch script",
        "0::/system.slice/slurmstepd.scope/job_17/step_batch/user/task_special\n",
        Owner(slurm_job="17", slurm_step="batch")),
    Row("v2, several slurmd on one host",
        "0::/system.slice/gpu01_slurmstepd.scope/job_17/step_extern/user/task_special\n",
        Owner(slurm_job="17", slurm_step="extern")),
    Row("v1", v1("/slurm/uid_1000/job_17/step_0/task_0", "/system.slice/slurmd.service"),
        Owner(slurm_job="17", slurm_step="0")),
    Row("v1, several slurmd on one host",
        v1("/slurm_gpu01/uid_1000/job_17/step_batch/task_0", "/system.slice/slurmd.service"),
        Owner(slurm_job="17", slurm_step="batch")),
    Row("v1, not in every controller",
        "11:freezer:/slurm/uid_1000/job_17/step_0\n9:cpuset:/slurm/uid_1000/job_17\n"
        "4:pids:/system.slice/slurmd.service\n1:name=systemd:/system.slice/slurmd.service\n",
        Owner(slurm_job="17", slurm_step="0")),
    Row("v1, only the job", "9:cpuset:/slurm/uid_1000/job_17\n", Owner(slurm_job="17")),
    Row("Slurm's own processes", "0::/system.slice/slurmstepd.scope/system\n",
        Owner(unit="slurmstepd.scope")),
    Row("slurmd in a pod",
        f"0::{GUARANTEED}/cri-containerd-{ID}.scope/system.slice/slurmstepd.scope/job_17/step_0\n",
        Owner(container_id=ID, container_runtime="containerd", pod_uid=UID, slurm_job="17",
              slurm_step="0")),
    Row("without cgroups, by its environment", "0::/system.slice/slurmd.service\n",
        Owner(unit="slurmd.service", slurm_job="17", slurm_step="3"),
        {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "3"}),
    Row("by its environment, old names, the batch script",
        "0::/user.slice/user-1000.slice/session-3.scope\n",
        Owner(unit="session-3.scope", slurm_job="17", slurm_step="batch"),
        {"SLURM_JOBID": "17", "SLURM_STEPID": "4294967291"}),
    Row("a container that a job has started", f"0::/system.slice/docker-{ID}.scope\n",
        docker(slurm_job="17"), {"SLURM_JOB_ID": "17"}),
    Row("its cgroup is believed rather than its environment",
        "0::/system.slice/slurmstepd.scope/job_17/step_0/user/task_0\n",
        Owner(slurm_job="17", slurm_step="0"), {"SLURM_JOB_ID": "99", "SLURM_STEP_ID": "9"}),
    Row("no job id that Slurm would give", "0::/\n", NOBODY, {"SLURM_JOB_ID": "17; rm"}),
    Row("a user's own cgroup of that name is nobody's job",
        f"0::{USER}/slurm/uid_0/job_17/step_0\n", Owner(unit="user@1000.service")),
]  # fmt: skip

TABLE = {
    f"{kind}: {row.name}": row
    for kind, rows in {
        "systemd": SYSTEMD,
        "containers": CONTAINERS,
        "Kubernetes": KUBERNETES,
        "Slurm": SLURM,
    }.items()
    for row in rows
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_owner(tmp_path: Path, row: Row) -> None:
    tree = ProcTree(tmp_path / "proc")
    tree.start(42, cgroup=row.cgroup, environ={"HOME": "/home/ann", **row.environ})
    table = ProcTable(str(tree.root))
    facts = table.describe(ProcessReading("GPU-0", 42, "compute"))
    attribution = Attribution(
        pod_resources=None,
        proc_root=str(tree.root),
        cgroup_root=tmp_path / "cgroup",
        pods_log_root=None,
        containers_log_root=None,
    )
    assert attribution.look([facts]).owners == {42: row.owner}


def test_no_row_stands_twice() -> None:
    assert len(TABLE) == len(SYSTEMD) + len(CONTAINERS) + len(KUBERNETES) + len(SLURM)
