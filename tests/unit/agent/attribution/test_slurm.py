"""Which GPUs Slurm's jobs have on this machine, by their cgroups and their environments."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.proc_tree import ProcTree

from stoker.agent.attribution.assignments import JobGpus
from stoker.agent.attribution.slurm import JOBS_MAX, SEARCH_SECONDS, JobsFound, SlurmJobs, Step
from stoker.agent.attribution.slurm_variables import gpus_of_job, parse_gpu_list
from stoker.agent.proctable import ProcTable

BATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_GPUS": "0,1"}
TASK = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_STEP_GPUS": "1"}
A = "GPU-aaaaaaaa-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("0",)),
        ("0,1,2", ("0", "1", "2")),
        ("0-3", ("0", "1", "2", "3")),
        ("0,2-3,7", ("0", "2", "3", "7")),
        (f"{A},MIG-1", (A, "MIG-1")),
        ("3-1", None),
        ("", None),
        ("NoDevFiles", None),
        ("0-", None),
        ("0-9999", None),
        ("-1", None),
        ("all", None),
    ],
)
def test_list_of_gpus(text: str, expected: tuple[str, ...] | None) -> None:
    assert parse_gpu_list(text) == expected


@pytest.mark.parametrize(
    ("what", "told", "steps", "expected"),
    [
        ("the script", {"batch": BATCH}, "batch", JobGpus("17", ("0", "1"))),
        ("its steps, too", {"0": TASK, "batch": BATCH}, "0 batch", JobGpus("17", ("0", "1"))),
        ("a step that tells nothing, too", {"batch": BATCH}, "0 batch", JobGpus("17", ("0", "1"))),
        ("an interactive shell", {"interactive": BATCH}, "interactive", JobGpus("17", ("0", "1"))),
        (
            "steps, where the script runs elsewhere: what they inherit is that node's",
            {"0": {**TASK, "SLURM_JOB_GPUS": "6,7"}},
            "0",
            JobGpus("17", ("1",)),
        ),
        (
            "all steps together",
            {"0": TASK, "1": {**TASK, "SLURM_STEP_GPUS": "1,2"}},
            "0 1",
            JobGpus("17", ("1", "2")),
        ),
        ("a step that has ended", {"0": TASK}, "", JobGpus("17", ("1",))),
        ("only a login is left", {"0": TASK}, "extern", JobGpus("17", ("1",))),
        (
            "not all steps",
            {"0": TASK},
            "0 1",
            JobGpus("17", unknown="no process of its step 1 tells"),
        ),
        ("a script without GPUs", {"batch": {"SLURM_JOB_ID": "17"}}, "batch", JobGpus("17")),
        (
            "a script whose job has GPUs on other nodes",
            {"batch": {"SLURM_JOB_ID": "17", "SLURM_GPUS": "8"}},
            "batch",
            JobGpus("17"),
        ),
        ("a step without GPUs", {"0": {"SLURM_JOB_ID": "17"}}, "0", JobGpus("17")),
        (
            "a step without GPUs of a job with some",
            {"0": {"SLURM_JOB_ID": "17", "SLURM_JOB_GPUS": "6"}},
            "0",
            JobGpus("17", unknown="it has SLURM_JOB_GPUS=6, which does not say which"),
        ),
        (
            "a part of a GPU",
            {"batch": {"SLURM_JOB_ID": "17", "SLURM_SHARDS_ON_NODE": "4"}},
            "batch",
            JobGpus("17", unknown="it has SLURM_SHARDS_ON_NODE=4, which does not say which"),
        ),
        (
            "a list that is none",
            {"batch": {"SLURM_JOB_ID": "17", "SLURM_JOB_GPUS": "some"}},
            "batch",
            JobGpus("17", unknown="'some' is no list of GPUs"),
        ),
        ("nobody", {}, "", JobGpus("17", unknown="no process of it tells")),
        ("only a login", {}, "extern", JobGpus("17", unknown="no process of it tells")),
    ],
)
def test_gpus_of_a_job(
    what: str, told: Mapping[str, Mapping[str, str]], steps: str, expected: JobGpus
) -> None:
    assert gpus_of_job("17", told, steps.split()) == expected, what


class Machine:
    """The cgroups and processes of a machine with Slurm."""

    def __init__(self, root: Path) -> None:
        self.cgroups, self.proc = root / "cgroup", ProcTree(root / "proc")
        self.cgroups.mkdir()
        self.now = 1000.0
        self.jobs = SlurmJobs(
            self.cgroups, ProcTable(str(self.proc.root)), monotonic=lambda: self.now
        )

    def run(self, path: str, pid: int, environ: Mapping[str, str] | None) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text(f"{pid}\n")
        self.proc.start(pid, environ=environ)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


V2 = "system.slice/slurmstepd.scope"


@pytest.mark.parametrize(
    "path",
    [
        f"{V2}/job_17/step_batch/user/task_special",
        f"{V2}/job_17/step_batch/user/task_0",
        f"{V2}/job_17/step_batch/user",
        "system.slice/gpu01_slurmstepd.scope/job_17/step_batch/user/task_0",
        f"unified/{V2}/job_17/step_batch/user/task_0",
        "freezer/slurm/uid_1000/job_17/step_batch",
        "devices/slurm/uid_1000/job_17/step_batch/task_0",
        "memory/slurm_gpu01/uid_1000/job_17/step_batch/task_0",
        "cpuset/slurm/uid_1000/job_17/step_batch/task_0",
    ],
)
def test_a_job_is_found_where_slurm_keeps_it(machine: Machine, path: str) -> None:
    machine.run(path, 42, BATCH)
    assert machine.jobs.find() == JobsFound((JobGpus("17", ("0", "1")),))


def test_a_machine_without_slurm_has_no_jobs(machine: Machine) -> None:
    for each in ("system.slice/cron.service", "user.slice", "devices", "slurm"):
        (machine.cgroups / each).mkdir(parents=True)
    assert machine.jobs.find() == JobsFound()


def test_a_machine_whose_cgroups_are_not_there_has_no_jobs(tmp_path: Path) -> None:
    assert SlurmJobs(tmp_path / "none").find() == JobsFound()
    assert SlurmJobs(None).find() == JobsFound()


def test_slurm_that_is_started_later_is_found_after_a_while(machine: Machine) -> None:
    assert machine.jobs.find() == JobsFound()
    machine.run(f"{V2}/job_17/step_batch/user/task_0", 42, BATCH)
    assert machine.jobs.find() == JobsFound()
    machine.now += SEARCH_SECONDS
    assert machine.jobs.find().known == (JobGpus("17", ("0", "1")),)


def test_jobs_come_and_go_at_once(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_batch/user/task_0", 42, BATCH)
    assert [job.job for job in machine.jobs.find().known] == ["17"]
    machine.run(f"{V2}/job_18/step_batch/user/task_0", 43, {**BATCH, "SLURM_JOB_ID": "18"})
    assert [job.job for job in machine.jobs.find().known] == ["17", "18"]
    (machine.cgroups / V2 / "job_17").rename(machine.cgroups / "gone")
    assert [job.job for job in machine.jobs.find().known] == ["18"]


def test_a_step_is_asked_once(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_0/user/task_0", 42, TASK)
    assert machine.jobs.find().known == (JobGpus("17", ("1",)),)
    machine.proc.end(42)
    assert machine.jobs.find().known == (JobGpus("17", ("1",)),)
    machine.run(f"{V2}/job_17/step_1/user/task_0", 43, {**TASK, "SLURM_STEP_GPUS": "0"})
    assert machine.jobs.find().known == (JobGpus("17", ("1", "0")),)


def test_a_job_keeps_its_gpus_while_it_ends(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_extern/user/task_special", 41, None)
    machine.run(f"{V2}/job_17/step_batch/user/task_special", 42, BATCH)
    assert machine.jobs.find().known == (JobGpus("17", ("0", "1")),)
    (machine.cgroups / V2 / "job_17" / "step_batch").rename(machine.cgroups / "gone")
    assert machine.jobs.find().known == (JobGpus("17", ("0", "1")),)


def test_a_process_that_is_another_jobs_by_now_tells_nothing(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_batch/user/task_0", 42, {**BATCH, "SLURM_JOB_ID": "18"})
    assert machine.jobs.find().known == ()
    (job,) = machine.jobs.find().unread
    assert machine.jobs.gpus(job).unknown == "no process of its step batch tells"


def test_a_job_whose_processes_we_may_not_ask_is_told_with_them(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_extern/user/task_special", 41, None)
    machine.run(f"{V2}/job_17/step_0/user/task_0", 42, None)
    machine.run(f"{V2}/job_17/step_batch/user/task_special", 43, None)
    (job,) = machine.jobs.find().unread
    assert job.steps == ("batch", "0", "extern")
    batch = Step("batch", (43,))
    assert job.silent == (batch, Step("0", (42,)))  # a login knows nothing of GPUs
    assert not machine.jobs.take(job, batch, {})
    assert machine.jobs.find().unread == (job,)
    assert machine.jobs.take(job, batch, BATCH)
    assert machine.jobs.silent_steps(job) == ()
    assert machine.jobs.find() == JobsFound((JobGpus("17", ("0", "1")),))


def test_of_a_job_that_is_just_beginning_nothing_is_known(machine: Machine) -> None:
    (machine.cgroups / V2 / "job_17").mkdir(parents=True)
    assert machine.jobs.find() == JobsFound((JobGpus("17", unknown="no process of it tells"),))


def test_cgroups_that_may_not_be_listed_leave_it_unknown(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("stoker.agent.attribution.slurm.os.scandir", refuse)
    assert machine.jobs.find().unknown == (
        f"which Slurm jobs run here is not known: {machine.cgroups}/system.slice: Permission denied"
    )


def test_more_jobs_than_a_machine_can_have_are_unknown(machine: Machine) -> None:
    for number in range(JOBS_MAX + 1):
        (machine.cgroups / V2 / f"job_{number}").mkdir(parents=True)
    assert machine.jobs.find() == JobsFound(
        unknown=f"{JOBS_MAX + 1} Slurm jobs, at most {JOBS_MAX} are believed"
    )


def test_a_job_that_was_put_back_into_the_queue_is_asked_anew(machine: Machine) -> None:
    machine.run(f"{V2}/job_17/step_batch/user/task_0", 42, BATCH)
    assert machine.jobs.find().known == (JobGpus("17", ("0", "1")),)
    (machine.cgroups / V2 / "job_17").rename(machine.cgroups / "gone")
    assert machine.jobs.find() == JobsFound()
    machine.run(f"{V2}/job_17/step_batch/user/task_0", 43, {**BATCH, "SLURM_JOB_GPUS": "2"})
    assert machine.jobs.find().known == (JobGpus("17", ("2",)),)
