"""What others have handed out, and whose processes are: a real kubelet's API, the real helper."""

import contextlib
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path

import grpc
import pytest
from tests.support import root_helper
from tests.support.proc_tree import ProcTree

from stoker.agent.attribution import kubernetes, resolver
from stoker.agent.attribution.resolver import Attributed, Attribution
from stoker.agent.model import NumberedGpu, NumberedInventory
from stoker.agent.owners import AssignedBy, Assignment, Owner
from stoker.agent.privileged import Helper, HelperUnavailable, JobVariables
from stoker.agent.proctable import ProcTable
from stoker.agent.readings import GpuIdentity, MigDeviceReading, ProcessReading
from stoker.agent.telemetry import GpuTelemetry
from stoker.agent.tenants import describe_all
from stoker.testing.kubelet import Kubelet

A = "GPU-aaaaaaaa-0000-4000-8000-000000000000"
B = "GPU-bbbbbbbb-0000-4000-8000-000000000000"
MIG = "MIG-33333333-0000-4000-8000-000000000000"
UID = "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6"
ID = "c" * 64
TRAINER = "pod ml/train-0 (container trainer)"
V2 = "system.slice/slurmstepd.scope"


class Machine:
    """A host that has, or has not, a kubelet, Slurm, and a root helper."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "k.sock"
        self.proc = ProcTree(root / "proc")
        self.cgroups = root / "cgroup"
        self.logs = root / "pods"
        for folder in (self.cgroups, self.logs):
            folder.mkdir()
        self.now = 1000.0
        self.inventory = NumberedInventory(
            None, None, tuple(NumberedGpu(n, identity(n, uuid)) for n, uuid in enumerate((A, B)))
        )
        self.telemetry: tuple[GpuTelemetry, ...] = (
            GpuTelemetry(A, 0.0, {}, {}, (), {}),
            GpuTelemetry(B, 0.0, {}, {}, (MigDeviceReading(MIG, 3, 0, "1g.10gb"),), {}),
        )
        self.table = ProcTable(str(self.proc.root), monotonic=lambda: self.now)
        self.attribution = self.attributed_by(None)

    def attributed_by(self, helper: Helper | None, *, required: bool = False) -> Attribution:
        self.attribution = Attribution(
            helper=helper,
            pod_resources=self.socket,
            is_pod_resources_required=required,
            proc_root=str(self.proc.root),
            cgroup_root=self.cgroups,
            pods_log_root=self.logs,
            containers_log_root=None,
            monotonic=lambda: self.now,
        )
        return self.attribution

    async def ask(self, *pids: int) -> Attributed:
        readings = [ProcessReading(A, pid, "compute") for pid in pids]
        looked = self.attribution.look(describe_all(readings, self.table).values())
        return await self.attribution.resolve(looked, self.inventory, self.telemetry)

    def start_job(self, job: int, step: str, pid: int, environ: Mapping[str, str] | None) -> None:
        folder = self.cgroups / V2 / f"job_{job}" / f"step_{step}" / "user" / "task_0"
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text(f"{pid}\n")
        self.proc.start(pid, environ=environ)


def identity(index: int, uuid: str) -> GpuIdentity:
    return GpuIdentity(index, uuid, "H100", 80 << 30, minor_number=index)


def by_kubelet(
    uuid: str, mig: str = "", pod: str = "train-0", container: str = "trainer"
) -> Assignment:
    owner = Owner(pod_namespace="ml", pod_name=pod, container_name=container)
    return Assignment(uuid, AssignedBy.KUBELET, owner.described(), mig, owner)


@pytest.fixture
def folder() -> Generator[Path]:
    with root_helper.open_folder() as folder:  # its path is short enough for a socket's
        yield folder


@pytest.fixture
async def machine(folder: Path) -> AsyncGenerator[Machine]:
    machine = Machine(folder)
    yield machine
    await machine.attribution.close()


@pytest.fixture
async def kubelet(machine: Machine) -> AsyncGenerator[Kubelet]:
    async with Kubelet(machine.socket) as kubelet:
        yield kubelet


# --- the kubelet


async def test_a_machine_without_a_kubelet_has_handed_out_nothing(machine: Machine) -> None:
    assert await machine.ask() == Attributed({}, pods={})


async def test_what_pods_have_is_not_free(machine: Machine, kubelet: Kubelet) -> None:
    assert (await machine.ask()).assignments == ()
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [A])
    kubelet.give("ml", "train-0", "trainer", "cpu-plugin.example/core", ["0"])
    kubelet.give("ml", "serve-0", "server", "nvidia.com/mig-1g.10gb", [MIG])
    kubelet.claim(
        *("ml", "dra-0", "main"),
        ["k8s.gpu.nvidia.com/device=gpu-1"],
        driver="gpu.nvidia.com",
        device="gpu-1",
    )
    told = await machine.ask()
    assert told.assignments == (
        by_kubelet(A),
        by_kubelet(B, pod="dra-0", container="main"),
        by_kubelet(B, MIG, pod="serve-0", container="server"),
    )
    assert told.assignments_unknown == ""
    kubelet.take_away("ml", "train-0")
    assert by_kubelet(A) not in (await machine.ask()).assignments


async def test_a_mig_device_is_known_while_its_gpu_is_not_read(
    machine: Machine, kubelet: Kubelet
) -> None:
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/mig-1g.10gb", [MIG])
    machine.telemetry, told = (), machine.telemetry
    assert MIG in (await machine.ask()).assignments_unknown
    machine.telemetry = told
    assert (await machine.ask()).assignments == (by_kubelet(B, MIG),)
    machine.telemetry = ()
    assert (await machine.ask()).assignments == (by_kubelet(B, MIG),)


async def test_a_process_of_a_pod_has_the_name_of_the_only_one_on_its_gpu(
    machine: Machine, kubelet: Kubelet
) -> None:
    machine.proc.start(7, cgroup=f"0::/kubepods/pod{UID}/{ID}\n")
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [A])
    owner = (await machine.ask(7)).owner(7, A)
    assert owner.described() == TRAINER
    assert (await machine.ask(7)).owner(7, B).described() == f"pod with UID {UID}"
    kubelet.give("ml", "train-1", "trainer", "nvidia.com/gpu", [f"{A}::1"])
    assert (await machine.ask(7)).owner(7, A).described() == f"pod with UID {UID}"
    # A device that is not found may be a part of any GPU.
    kubelet.take_away("ml", "train-1")
    assert (await machine.ask(7)).owner(7, A).described() == TRAINER
    kubelet.give("ml", "train-1", "trainer", "nvidia.com/mig-1g.10gb", [MIG.replace("3", "4")])
    assert (await machine.ask(7)).owner(7, A).described() == f"pod with UID {UID}"
    (machine.logs / f"ml_other_{UID}").mkdir()
    machine.now += 60.0
    assert (await machine.ask(7)).owner(7, A).described() == "pod ml/other"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "it answered UNIMPLEMENTED (no)"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "it answered RESOURCE_EXHAUSTED (no)"),
        (grpc.StatusCode.UNAVAILABLE, "nobody answers there"),
    ],
)
async def test_a_kubelet_that_fails_leaves_it_unknown(
    machine: Machine, kubelet: Kubelet, code: grpc.StatusCode, said: str
) -> None:
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [A])
    kubelet.fail(code, "no")
    told = await machine.ask()
    assert told.assignments == ()
    assert told.assignments_unknown == (
        f"what the kubelet has handed out is not known: {machine.socket}: {said}"
    )
    kubelet.mend()
    assert (await machine.ask()).assignments == (by_kubelet(A),)


async def test_a_kubelet_that_hangs_leaves_it_unknown(
    machine: Machine, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await machine.ask()
    kubelet.hang()
    with monkeypatch.context() as hasty:
        hasty.setattr(kubernetes, "ANSWER_SECONDS_MAX", 0.1)
        told = await machine.ask()
    assert told.assignments_unknown.endswith("it has not answered within 0.1 s")
    kubelet.go_on()
    assert (await machine.ask()).assignments_unknown == ""


async def test_an_answer_that_cannot_be_read_leaves_it_unknown(
    machine: Machine, kubelet: Kubelet
) -> None:
    kubelet.say(b"\xff\xff")
    assert "its answer cannot be read" in (await machine.ask()).assignments_unknown


async def test_an_answer_that_is_too_long_leaves_it_unknown(
    machine: Machine, kubelet: Kubelet
) -> None:
    kubelet.say(b"\0" * (kubernetes.ANSWER_BYTES_MAX + 1))
    assert "RESOURCE_EXHAUSTED" in (await machine.ask()).assignments_unknown


async def test_a_long_answer_is_read(machine: Machine, kubelet: Kubelet) -> None:
    for number in range(1000):
        ids = [f"{A}::{number}"]
        kubelet.give("ml", f"train-{number}", "trainer", "nvidia.com/gpu.shared", ids)
    assert len((await machine.ask()).assignments) == 1000


async def test_a_kubelet_that_has_vanished_leaves_it_unknown_until_it_is_back(
    machine: Machine, kubelet: Kubelet
) -> None:
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [A])
    assert (await machine.ask()).assignments == (by_kubelet(A),)
    await kubelet.vanish(leaving_socket=True)
    assert (await machine.ask()).assignments_unknown.endswith("nobody answers there")
    await kubelet.vanish()
    told = await machine.ask()
    assert told.assignments_unknown.endswith("there is no such socket")
    assert told.assignments == ()
    await kubelet.start()
    assert (await machine.ask()).assignments == (by_kubelet(A),)


async def test_a_kubelet_that_must_be_there_and_is_not_leaves_it_unknown(machine: Machine) -> None:
    machine.attributed_by(None, required=True)
    assert (await machine.ask()).assignments_unknown.endswith("there is no such socket")


async def test_what_is_no_socket_leaves_it_unknown(machine: Machine) -> None:
    machine.socket.write_text("")
    assert (await machine.ask()).assignments_unknown.endswith("it is no socket")


async def test_a_machine_that_is_said_to_have_no_kubelet_is_not_looked_at(
    machine: Machine, kubelet: Kubelet
) -> None:
    kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [A])
    attribution = Attribution(pod_resources=None, cgroup_root=machine.cgroups)
    told = await attribution.resolve(attribution.look([]), machine.inventory, ())
    assert told == Attributed({}, pods={})
    assert kubelet.calls == 0


# --- Slurm, and the root helper


@contextlib.contextmanager
def helper_of(
    machine: Machine, *processes: tuple[int, int, Mapping[str, str]]
) -> Generator[Helper]:
    """A root helper that may read these environments: (PID, start in ticks, environment)."""
    folder = machine.root / "helper"
    folder.mkdir()
    tree = root_helper.ProcTree(folder / "proc")
    for pid, ticks, environ in processes:
        entries = "".join(f"{key}={value}\0" for key, value in environ.items())
        tree.add(pid, ticks=ticks, environ=entries.encode())
    log = root_helper.LogPipe(folder / "kmsg")
    options = ("--proc", str(tree.root), "--kmsg", str(log.path))
    try:
        with root_helper.running(folder, *options) as running:
            yield running.helper
    finally:
        log.close()


BATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_GPUS": "1"}
SLURMS = Assignment(B, AssignedBy.SLURM, "Slurm job 17", owner=Owner(slurm_job="17"))


async def test_what_jobs_have_is_not_free(machine: Machine) -> None:
    machine.start_job(17, "batch", 7, BATCH)
    told = await machine.ask()
    assert (told.assignments, told.assignments_unknown) == ((SLURMS,), "")


async def test_a_job_whose_processes_nobody_may_ask_leaves_it_unknown(machine: Machine) -> None:
    machine.start_job(17, "batch", 7, None)
    assert (await machine.ask()).assignments_unknown == (
        "which GPUs Slurm job 17 has is not known: no process of its step batch tells "
        "(there is no root helper to ask them)"
    )


async def test_the_helper_asks_what_we_may_not(machine: Machine) -> None:
    machine.start_job(17, "batch", 7, None)
    machine.proc.start(8, cgroup="0::/a.service\n", environ=None)
    machine.proc.start(9, cgroup="0::/a.service\n", environ=None)
    task = {"SLURM_JOB_ID": "18", "SLURM_STEP_ID": "2"}
    with helper_of(machine, (7, 500, BATCH), (8, 500, task), (9, 500, {})) as helper:
        machine.attributed_by(helper)
        told = await machine.ask(8, 9)
    assert (told.assignments, told.assignments_unknown) == ((SLURMS,), "")
    assert told.owner(8, A) == Owner(unit="a.service", slurm_job="18", slurm_step="2")
    assert told.owner(9, A) == Owner(unit="a.service")
    # What it has said is remembered: it need not be there any more.
    assert await machine.ask(8, 9) == told


async def test_the_allocation_that_a_process_of_another_user_names_is_told_by_the_helper(
    machine: Machine,
) -> None:
    pod, job = f"0::/kubepods/pod{UID}/{ID}\n", f"0::/{V2}/job_17/step_0\n"
    machine.proc.start(7, environ=None)
    machine.proc.start(8, cgroup=pod, environ=None)
    machine.proc.start(9, cgroup=job, environ=None)
    machine.proc.start(10, environ=None)
    named = [(pid, 500, {"STOKER_ALLOCATION_ID": f"a-{pid}"}) for pid in (7, 8)]
    both = (9, 500, {"STOKER_ALLOCATION_ID": "a-9", "SLURM_JOB_ID": "99"})
    with helper_of(machine, *named, both, (10, 500, {})) as helper:
        machine.attributed_by(helper)
        told = await machine.ask(7, 8, 9, 10)
    assert told.claims == {7: "a-7", 8: "a-8", 9: "a-9"}
    # What an environment says of a job or a pod is not truer than the cgroup.
    assert (told.owner(8, A).pod_uid, told.owner(9, A).slurm_job) == (UID, "17")
    # A process that has moved to another cgroup is still the one that was asked.
    machine.proc.move(7, "0::/b.service\n")
    machine.now += resolver.ASK_AGAIN_SECONDS
    again = await machine.ask(7, 8, 9, 10)
    assert (again.claims, again.owner(7, A).unit) == (told.claims, "b.service")
    # One that has its PID is not.
    machine.proc.start(7, environ=None, ticks=501)
    assert (await machine.ask(7, 8, 9, 10)).claims == {8: "a-8", 9: "a-9"}


async def test_a_process_that_has_become_another_program_is_asked_again(machine: Machine) -> None:
    machine.proc.start(8, environ=None)
    with helper_of(machine, (8, 500, {"STOKER_ALLOCATION_ID": "a-1", "SLURM_JOB_ID": "1"})):
        machine.attributed_by(Helper(machine.root / "helper" / "helper.sock"))
        told = await machine.ask(8)
        assert (told.claims, told.owner(8, A).slurm_job) == ({8: "a-1"}, "1")
        environ = machine.root / "helper" / "proc" / "8" / "environ"
        environ.write_bytes(b"STOKER_ALLOCATION_ID=a-2\0")
        assert await machine.ask(8) == told
        machine.now += resolver.ASK_AGAIN_SECONDS
        told = await machine.ask(8)
        assert (told.claims, told.owner(8, A).slurm_job) == ({8: "a-2"}, "")


async def test_what_the_helper_says_of_a_pid_that_was_given_away_is_not_believed(
    machine: Machine,
) -> None:
    machine.proc.start(8, environ=None, ticks=500)
    with helper_of(machine, (8, 900, {"SLURM_JOB_ID": "18"})) as helper:
        machine.attributed_by(helper)
        assert (await machine.ask(8)).owner(8, A) == Owner()


async def test_a_helper_that_is_gone_is_named_and_asked_again(machine: Machine) -> None:
    machine.start_job(17, "batch", 7, None)
    machine.proc.start(8, environ=None)
    machine.attributed_by(Helper(machine.root / "helper" / "helper.sock"))
    told = await machine.ask(8)
    assert "helper.sock: " in told.assignments_unknown
    assert told.owner(8, A) == Owner()
    with helper_of(machine, (7, 500, BATCH), (8, 500, {"SLURM_JOB_ID": "18"})):
        assert (await machine.ask(8)).assignments == (SLURMS,)
        machine.now += resolver.ASK_AGAIN_SECONDS
        assert (await machine.ask(8)).owner(8, A) == Owner(slurm_job="18")


async def test_a_helper_that_hangs_does_not_hold_up_a_reading(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "HELPER_SECONDS_MAX", 0.1)
    machine.start_job(17, "batch", 7, None)
    for pid in range(8, 108):
        machine.proc.start(pid, environ=None)
    path = machine.root / "silent.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(str(path))
        silent.listen()
        machine.attributed_by(Helper(path))
        told = await machine.ask(*range(8, 108))
    assert told.assignments_unknown.endswith(f"(the helper at {path} takes too long)")
    assert set(told.owners.values()) == {Owner()}


async def test_of_many_processes_some_are_asked_each_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "HELPER_QUESTIONS_MAX", 2)
    for pid in (1, 2, 3):
        machine.proc.start(pid, environ=None)
    told = {"SLURM_JOB_ID": "18"}
    with helper_of(machine, (1, 500, told), (2, 500, told), (3, 500, told)) as helper:
        machine.attributed_by(helper)
        jobs = [[each.slurm_job for each in (await machine.ask(1, 2, 3)).owners.values()]]
        jobs.append([each.slurm_job for each in (await machine.ask(1, 2, 3)).owners.values()])
    assert jobs == [["18", "18", ""], ["18", "18", "18"]]


class CountingHelper(Helper):
    """Counts the questions of a reading."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.count = 0

    async def job_variables(self, pid: int) -> JobVariables | None:
        self.count += 1
        return await super().job_variables(pid)


async def readings_until_all_have_told(machine: Machine, pids: range, seconds: float = 1.0) -> int:
    """Have the helper asked by reading after reading; return how many it took."""
    helper = CountingHelper(machine.root / "helper" / "helper.sock")
    machine.attributed_by(helper)
    for number in range(1, 60):
        helper.count = 0
        told = await machine.ask(*pids)
        assert helper.count <= resolver.HELPER_QUESTIONS_MAX
        machine.now += seconds
        if told.claims == {pid: f"a-{pid}" for pid in pids}:
            return number
    raise AssertionError("not all have told")


def strangers(machine: Machine, pids: range) -> list[tuple[int, int, Mapping[str, str]]]:
    """Have processes run whose environment only the helper may read."""
    for pid in pids:
        machine.proc.start(pid, environ=None)
    return [(pid, 500, {"STOKER_ALLOCATION_ID": f"a-{pid}"}) for pid in pids]


async def test_all_of_a_hundred_processes_are_asked_within_some_readings(machine: Machine) -> None:
    pids = range(1, 101)
    with helper_of(machine, *strangers(machine, pids)):
        assert await readings_until_all_have_told(machine, pids) >= 2


async def test_who_is_asked_again_does_not_go_before_who_never_was(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "HELPER_QUESTIONS_MAX", 2)
    pids, seconds = range(1, 7), resolver.ASK_AGAIN_SECONDS
    with helper_of(machine, *strangers(machine, pids)):
        assert await readings_until_all_have_told(machine, pids, seconds) == 3


async def test_jobs_that_never_tell_starve_no_process_and_no_other_job(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "HELPER_QUESTIONS_MAX", 4)
    pids = range(1, 11)
    for job in range(100, 110):
        machine.start_job(job, "batch", job, None)
    machine.start_job(200, "batch", 200, None)
    mute: list[tuple[int, int, Mapping[str, str]]] = [(job, 500, {}) for job in range(100, 110)]
    telling = (200, 500, {"SLURM_JOB_ID": "200", "SLURM_JOB_GPUS": "1"})
    with helper_of(machine, *strangers(machine, pids), *mute, telling):
        assert await readings_until_all_have_told(machine, pids) <= 6
        told = await machine.ask(*pids)
        while not told.assignments:
            told = await machine.ask(*pids)
    assert [each.owner.slurm_job for each in told.assignments] == ["200"]
    assert "Slurm job 100" in told.assignments_unknown


async def test_processes_that_cannot_be_read_starve_no_other(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = range(100, 110)
    told = strangers(machine, pids)
    for pid in range(1, 7):
        machine.proc.start(pid, environ=None)
    unreadable = CountingHelper.job_variables

    async def refuse(self: CountingHelper, pid: int) -> JobVariables | None:
        if pid < 7:
            raise HelperUnavailable("its memory hangs")
        return await unreadable(self, pid)

    monkeypatch.setattr(CountingHelper, "job_variables", refuse)
    with helper_of(machine, *told):
        helper = CountingHelper(machine.root / "helper" / "helper.sock")
        machine.attributed_by(helper)
        for _ in range(2):
            await machine.ask(*range(1, 7), *pids)
        found = await machine.ask(*range(1, 7), *pids)
    assert found.claims == {pid: f"a-{pid}" for pid in pids}
