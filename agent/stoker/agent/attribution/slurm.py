"""Finds the Slurm jobs of this machine by their cgroups, and processes that may tell their GPUs.

Slurm has no socket to ask for what it has handed out. While a job runs there is a cgroup of it,
with the processes of each of its steps, and those were told their GPUs in their environment.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stoker.agent.attribution.assignments import JobGpus
from stoker.agent.attribution.slurm_variables import (
    FOREIGN_STEP,
    JOB_STEPS,
    gpus_of_job,
    job_of,
)
from stoker.agent.procfs import read
from stoker.agent.proctable import ProcTable

CGROUPS = Path("/sys/fs/cgroup")
# Where Slurm keeps jobs is looked for again after so long, while it is nowhere: once it was
# started on a machine, that cgroup stays.
SEARCH_SECONDS = 30.0
# Processes of one step that are asked: all of them were told the same, but not all tell it.
PIDS_PER_STEP_MAX = 4
JOBS_MAX = 1024  # of one machine; more are a broken Slurm

# Slurm keeps a job in one cgroup of each controller that it uses; one of these is always among
# them. (cgroup v1; with v2 there is one tree, which in the hybrid form lies in "unified".)
_V1_CONTROLLERS = ("freezer", "devices", "memory", "cpuset")
_V2_ROOTS = ("", "unified")

# Which of a job's steps is asked first: the script has the variables of the whole job.
_FIRST_STEPS = {"batch": 0, "interactive": 1, "extern": 3}
_OTHER_STEPS = 2


# A job and the inode of its cgroup: as long as it is the same, so are the job's GPUs.
JobKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a job, and some of its processes."""

    name: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A job that runs here."""

    id: str
    key: JobKey
    steps: tuple[str, ...]  # that run now
    silent: tuple[Step, ...] = ()  # of which nobody has told, the one that tells most first


@dataclass(frozen=True, slots=True)
class JobsFound:
    """What could be seen of the jobs of this machine."""

    known: tuple[JobGpus, ...] = ()
    # Jobs of which somebody with more rights must ask a process.
    unread: tuple[Job, ...] = ()
    unknown: str = ""  # why it is not known which jobs there are; empty: it is


class SlurmJobs:
    """The jobs of this machine. Use it in one thread at a time."""

    def __init__(
        self,
        cgroups: Path | None = CGROUPS,
        table: ProcTable | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the mount of the cgroups, in a container the host's, and who knows processes.

        Without cgroups (None) there is no Slurm, whatever runs here.
        """
        self._cgroups = cgroups
        self._table = table or ProcTable()
        self._monotonic = monotonic
        self._roots: tuple[Path, ...] = ()
        self._searched_at: float | None = None
        # What each step of a job was told, also of steps that have ended.
        self._told: dict[JobKey, dict[str, Mapping[str, str]]] = {}

    def find(self) -> JobsFound:
        """Return the jobs, and of those whose processes we may ask the GPUs."""
        try:
            folders = self._folders()
            jobs = [_job(id_, folder) for id_, folder in sorted(folders.items())]
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            return JobsFound(unknown=f"which Slurm jobs run here is not known: {why}")
        if len(jobs) > JOBS_MAX:
            return JobsFound(unknown=f"{len(jobs)} Slurm jobs, at most {JOBS_MAX} are believed")
        self._told = {job.key: self._told.get(job.key, {}) for job in jobs}
        known: list[JobGpus] = []
        unread: list[Job] = []
        for job in jobs:
            silent = tuple(
                step
                for name in self.silent_steps(job)
                if (step := Step(name, _pids(folders[job.id] / f"step_{name}"))).pids
                and not self._ask(job, step)
            )
            gpus = self.gpus(job)
            if gpus.unknown and silent:
                unread.append(replace(job, silent=silent))
            else:
                known.append(gpus)
        return JobsFound(tuple(known), tuple(unread))

    def silent_steps(self, job: Job) -> tuple[str, ...]:
        """Return the steps of which nobody has told, if that matters."""
        told = self._told.get(job.key, {})
        if JOB_STEPS & told.keys():
            return ()
        return tuple(name for name in job.steps if name not in told and name != FOREIGN_STEP)

    def take(self, job: Job, step: Step, variables: Mapping[str, str]) -> bool:
        """Take in what a process of a step was told; False: it is none of that job."""
        if job_of(variables)[0] != job.id:
            return False
        self._told.setdefault(job.key, {})[step.name] = variables
        return True

    def gpus(self, job: Job) -> JobGpus:
        """Return what the job has, by what was taken in until now."""
        return gpus_of_job(job.id, self._told.get(job.key, {}), job.steps)

    def _ask(self, job: Job, step: Step) -> bool:
        """Return whether a process of the step has told; all of a step were told the same."""
        found = (self._table.look_up(pid) for pid in step.pids)
        return any(self.take(job, step, facts.slurm) for facts in found if facts and facts.slurm)

    def _folders(self) -> dict[str, Path]:
        """Return the cgroup of each job."""
        now = self._monotonic()
        is_due = self._searched_at is None or now - self._searched_at >= SEARCH_SECONDS
        if is_due and not self._roots and self._cgroups is not None:
            self._searched_at = now
            self._roots = tuple(_roots(self._cgroups))
        found: dict[str, Path] = {}
        for root in self._roots:
            for parent in (root, *_folders(root, "uid_")):  # v1 has a folder for each user
                for folder in _folders(parent, "job_"):
                    found.setdefault(folder.name.removeprefix("job_"), folder)
        return found


def _roots(cgroups: Path) -> Iterator[Path]:
    """Yield where Slurm keeps jobs, as `Place` knows them by their paths."""
    for root in _V2_ROOTS:
        system = cgroups / root / "system.slice"
        yield from (each for each in _folders(system) if each.name.endswith("slurmstepd.scope"))
    for controller in _V1_CONTROLLERS:
        yield from _folders(cgroups / controller, "slurm")


def _job(id_: str, folder: Path) -> Job:
    steps = [each.name.removeprefix("step_") for each in _folders(folder, "step_")]
    steps.sort(key=lambda step: (_FIRST_STEPS.get(step, _OTHER_STEPS), step))
    try:
        inode = folder.stat().st_ino
    except FileNotFoundError:  # it has just ended
        inode = 0
    return Job(id_, (id_, inode), tuple(steps))


def _pids(step: Path) -> tuple[int, ...]:
    """Return some processes of a step: in it (v1) or below its "user" (v2), of its tasks first."""
    found: list[int] = []
    tasks = [*_folders(step, "task_"), *_folders(step / "user", "task_")]
    for folder in (*tasks, step / "user", step):
        for line in read(str(folder / "cgroup.procs")).split():
            if line != b"0":  # a process of another PID namespace
                found.append(int(line))
            if len(found) == PIDS_PER_STEP_MAX:
                return tuple(found)
    return tuple(found)


def _folders(parent: Path, prefix: str = "") -> list[Path]:
    """Return the folders below one whose names begin so; none where it is not there."""
    try:
        with os.scandir(parent) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
