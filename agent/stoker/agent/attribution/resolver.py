"""Finds for each process on a GPU whose it is, and what of the GPUs others have handed out.

What is read from files is read in a thread (`look`), because it may hang; who is asked over a
socket is asked in the loop (`resolve`), each with a deadline. What cannot be seen is said: an owner
that is not known is empty, assignments that are not known come with the reason.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stoker.agent.attribution import assignments, kubernetes, pod_names, slurm
from stoker.agent.attribution.assignments import Assigned, JobGpus, PodHolding
from stoker.agent.attribution.cgroups import NOWHERE, Place, parse_cgroup
from stoker.agent.attribution.devices import MigDevice, NodeGpu, node_gpus
from stoker.agent.attribution.kubernetes import Listing, PodResources
from stoker.agent.attribution.pod_names import PodNames
from stoker.agent.attribution.slurm import Job, JobKey, JobsFound, SlurmJobs
from stoker.agent.attribution.slurm_variables import job_of
from stoker.agent.helper.variables import ALLOCATION
from stoker.agent.model import NumberedInventory
from stoker.agent.owners import NOBODY, Assignment, Owner
from stoker.agent.privileged import Helper, HelperUnavailable
from stoker.agent.proctable import REMEMBER_SECONDS, ProcessFacts, ProcTable
from stoker.agent.telemetry import GpuTelemetry

# All questions to the helper in one reading. Each costs it two forks, which took 3 to 8 ms where it
# was measured: half a second for all of them. Who is not asked in one reading is asked in the next,
# who has waited longest first; so a host with 100 processes of others takes two readings.
HELPER_SECONDS_MAX = 1.0
HELPER_QUESTIONS_MAX = 64
# Of which so much is for the GPUs of Slurm's jobs; the processes have the rest, and what is left.
JOBS_SHARE = 0.5
# It says of one process that it lets nobody read it; so many in a row, and there is no helper.
HELPER_FAILURES_MAX = 3
# A process that was asked about is asked about again after that, as one is that we may read
# ourselves: it may be another program by then, or may have become readable.
ASK_AGAIN_SECONDS = REMEMBER_SECONDS


@dataclass(frozen=True, slots=True)
class Looked:
    """What the files of this machine tell."""

    owners: Mapping[int, Owner]  # by PID
    # Whose environment only the helper may read, who has waited longest first.
    asked: tuple[ProcessFacts, ...]
    jobs: JobsFound


@dataclass(frozen=True, slots=True)
class Attributed:
    """Whose the processes are, and what is handed out."""

    owners: Mapping[int, Owner]  # by PID
    assignments: tuple[Assignment, ...] = ()
    assignments_unknown: str = ""  # why they are not known; empty: they are
    # By GPU: the only pod that has it, for a process of a pod whose name is not known.
    pods: Mapping[str, Owner] | None = None
    # By PID: the allocation that a process names whose environment only the helper may read.
    claims: Mapping[int, str] = field(default_factory=dict[int, str])

    def owner(self, pid: int, gpu_uuid: str) -> Owner:
        """Return whose a process on a GPU is."""
        found = self.owners.get(pid, NOBODY)
        if not found.pod_uid or found.pod_name or not self.pods:
            return found
        pod = self.pods.get(gpu_uuid, NOBODY)
        return replace(
            found,
            pod_namespace=pod.pod_namespace,
            pod_name=pod.pod_name,
            container_name=found.container_name or pod.container_name,
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """What was made of a process; as long as its facts are the same object, it holds."""

    facts: ProcessFacts
    place: Place
    owner: Owner
    # When the helper is to be asked for its environment (monotonic); inf: never, -inf: it was not.
    ask_at: float
    told: Mapping[str, str] = field(default_factory=dict[str, str])  # what it said


class Attribution:
    """Knows who else uses this machine. `look` and `resolve` take turns, never both at a time."""

    def __init__(
        self,
        *,
        helper: Helper | None = None,
        pod_resources: Path | None = kubernetes.SOCKET,
        is_pod_resources_required: bool = False,
        proc_root: str = "/proc",
        cgroup_root: Path | None = slurm.CGROUPS,
        pods_log_root: Path | None = pod_names.PODS,
        containers_log_root: Path | None = pod_names.CONTAINERS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take who is asked, and where this machine's files are; in a container, the host's.

        `helper`: reads the environment of others' processes, and connects to the kubelet where
        this user may not; None: nobody does.
        `pod_resources`: the kubelet's socket; None: this is no Kubernetes node, whatever is there.
        `is_pod_resources_required`: it is one, also while that socket is missing.
        `cgroup_root`: where Slurm's jobs are; None: they are nobody's on these GPUs.
        """
        self._helper = helper
        self._kubelet = PodResources(
            pod_resources, is_required=is_pod_resources_required, helper=helper
        )
        self._names = PodNames(pods_log_root, containers_log_root, monotonic=monotonic)
        self._jobs = SlurmJobs(cgroup_root, ProcTable(proc_root), monotonic=monotonic)
        self._monotonic = monotonic
        self._known: dict[int, _Known] = {}
        # When a process of a job was asked about and told nothing (monotonic).
        self._silent_at: dict[tuple[JobKey, str, int], float] = {}
        self._mig_devices: dict[str, tuple[MigDevice, ...]] = {}
        self._handed_out: tuple[Listing, tuple[NodeGpu, ...], Assigned] | None = None

    def look(self, processes: Iterable[ProcessFacts]) -> Looked:
        """Return what files tell about these processes and Slurm's jobs; may block for long."""
        before, self._known = self._known, {}
        now = self._monotonic()
        asked: list[_Known] = []
        for facts in processes:
            known = before.get(facts.pid)
            if known is None or known.facts is not facts:
                known = self._make(facts, known)
            elif known.place.pod_uid and not known.owner.pod_name:
                known = replace(known, owner=self._named(known.place, known.owner))
            self._known[facts.pid] = known
            if known.ask_at <= now:
                asked.append(known)
        asked.sort(key=lambda known: known.ask_at)
        owners = {pid: known.owner for pid, known in self._known.items()}
        return Looked(owners, tuple(known.facts for known in asked), self._jobs.find())

    async def resolve(
        self,
        looked: Looked,
        inventory: NumberedInventory | None,
        telemetry: Iterable[GpuTelemetry],
    ) -> Attributed:
        """Return the whole, with what the kubelet and the helper say; takes a bounded time.

        The GPUs of the node, and the MIG devices that were read of them, tell which ones are meant.
        """
        listing, jobs = await asyncio.gather(self._kubelet.list(), self._ask_helper(looked))
        gpus = self._gpus(inventory, telemetry)
        of_pods = self._of_pods(listing, gpus)
        assigned = assignments.join(
            Assigned(unknown=listing.unknown),
            Assigned(unknown=looked.jobs.unknown),
            of_pods,
            assignments.of_jobs((*looked.jobs.known, *jobs), gpus),
        )
        owners = {pid: known.owner for pid, known in self._known.items()}
        told = {pid: known.told for pid, known in self._known.items() if ALLOCATION in known.told}
        has_unnamed = any(each.pod_uid and not each.pod_name for each in owners.values())
        return Attributed(
            owners=owners,
            assignments=assigned.assignments,
            assignments_unknown=assigned.unknown,
            pods=_only_pods(listing, gpus) if has_unnamed and not of_pods.unknown else {},
            claims={pid: variables[ALLOCATION] for pid, variables in told.items()},
        )

    async def close(self) -> None:
        """Hang up."""
        await self._kubelet.close()

    # --- one process

    def _make(self, facts: ProcessFacts, before: _Known | None) -> _Known:
        place = parse_cgroup(facts.cgroup) if facts.cgroup else NOWHERE
        owner = self._named(place, place.owner())
        if facts.started_ticks is None:
            return _Known(facts, place, owner, math.inf)
        if facts.slurm is not None:
            return _Known(facts, place, _with_job(place, owner, facts.slurm), math.inf)
        if before is None or before.facts.started_ticks != facts.started_ticks:
            return _Known(facts, place, owner, -math.inf)
        owner = _with_job(place, owner, before.told)
        return _Known(facts, place, owner, before.ask_at, before.told)

    def _named(self, place: Place, owner: Owner) -> Owner:
        if not place.pod_uid:
            return owner
        name = self._names.look_up(place.pod_uid, (each.id for each in place.containers))
        return replace(
            owner, pod_namespace=name.namespace, pod_name=name.pod, container_name=name.container
        )

    # --- the helper

    async def _ask_helper(self, looked: Looked) -> Sequence[JobGpus]:
        """Have the helper asked about processes, and return what jobs have by what it said."""
        jobs = looked.jobs.unread
        if self._helper is None:
            why = "there is no root helper to ask them"
            return [_explained(self._jobs.gpus(job), why) for job in jobs]
        began = asyncio.get_running_loop().time()
        of_jobs = _Questions(
            self._helper,
            int(HELPER_QUESTIONS_MAX * JOBS_SHARE),
            began + HELPER_SECONDS_MAX * JOBS_SHARE,
        )
        await self._ask_jobs(jobs, of_jobs)
        left = HELPER_QUESTIONS_MAX - of_jobs.count
        of_processes = _Questions(self._helper, left, began + HELPER_SECONDS_MAX)
        await self._ask_processes(looked.asked, of_processes)
        return [_explained(self._jobs.gpus(job), of_jobs.failure) for job in jobs]

    async def _ask_jobs(self, jobs: Iterable[Job], questions: "_Questions") -> None:
        """Ask processes of jobs until each step has told; who has told nothing goes to the end."""
        waiting = {
            (job.key, step.name, pid): (job, step)
            for job in jobs
            for step in job.silent
            for pid in step.pids
        }
        silent_at = {key: at for key, at in self._silent_at.items() if key in waiting}
        for key in sorted(waiting, key=lambda key: silent_at.get(key, -math.inf)):
            job, step = waiting[key]
            if questions.are_over:
                break
            if step.name not in self._jobs.silent_steps(job):  # all of a step were told the same
                continue
            variables = await questions.ask(key[2], None)
            if not variables or not self._jobs.take(job, step, variables):
                silent_at[key] = self._monotonic()
        self._silent_at = silent_at

    async def _ask_processes(
        self, processes: Iterable[ProcessFacts], questions: "_Questions"
    ) -> None:
        for facts in processes:
            if questions.are_over:
                break
            variables = await questions.ask(facts.pid, facts.started_ticks)
            known = self._known[facts.pid]
            now = self._monotonic()
            # Whose answer was only late is asked again soon, after those who have not been asked.
            known = replace(known, ask_at=now if questions.are_late else now + ASK_AGAIN_SECONDS)
            if variables is not None:
                owner = _with_job(known.place, known.owner, variables)
                known = replace(known, owner=owner, told=variables)
            self._known[facts.pid] = known

    # --- the GPUs

    def _of_pods(self, listing: Listing, gpus: tuple[NodeGpu, ...]) -> Assigned:
        """Return what the kubelet has handed out, made anew only if it may be something else."""
        made = self._handed_out
        if made is None or made[0] is not listing or made[1] != gpus:
            made = (listing, gpus, assignments.of_pods(listing.holdings, gpus))
            self._handed_out = made
        return made[2]

    def _gpus(
        self, inventory: NumberedInventory | None, telemetry: Iterable[GpuTelemetry]
    ) -> tuple[NodeGpu, ...]:
        gpus = node_gpus(inventory, telemetry, self._mig_devices)
        self._mig_devices = {gpu.uuid: gpu.mig_devices for gpu in gpus if gpu.mig_devices}
        return gpus


class _Questions:
    """Questions to the helper that end together."""

    def __init__(self, helper: Helper, count_max: int, until: float) -> None:
        """`until`: by the clock of the loop."""
        self._helper = helper
        self._count_max = count_max
        self._until = until
        self._failures = 0  # in a row
        self.count = 0
        self.are_late = False  # so much so that the last one was not answered
        self.failure = ""  # the last one

    @property
    def are_over(self) -> bool:
        """Whether no further one is answered."""
        is_used_up = self.count >= self._count_max
        return is_used_up or self.are_late or self._failures == HELPER_FAILURES_MAX

    async def ask(self, pid: int, started_ticks: int | None) -> Mapping[str, str] | None:
        """Return which job a process names; None: not told, or it is another process now."""
        self.count += 1
        try:
            async with asyncio.timeout_at(self._until):
                told = await self._helper.job_variables(pid)
        except HelperUnavailable as error:
            self._failures += 1
            self.failure = str(error)
            return None
        except TimeoutError:
            self.are_late = True
            self.failure = f"the helper at {self._helper.path} takes too long"
            return None
        self._failures = 0
        if told is None or started_ticks not in {None, told.started_ticks}:
            return None
        return told.variables


def _with_job(place: Place, owner: Owner, variables: Mapping[str, str]) -> Owner:
    """Return it with the job that an environment names, which cannot be truer than a cgroup."""
    if place.slurm_job or place.pod_uid:
        return owner
    job, step = job_of(variables)
    return replace(owner, slurm_job=job, slurm_step=step)


def _explained(job: JobGpus, why: str) -> JobGpus:
    """Return it with a further reason why its GPUs are not known, if they are not."""
    return replace(job, unknown=f"{job.unknown} ({why})") if job.unknown and why else job


def _only_pods(listing: Listing, gpus: Sequence[NodeGpu]) -> Mapping[str, Owner]:
    """Return by GPU the pod that has it, of those that one pod alone has."""
    if listing.unknown:
        return {}
    holders: dict[str, list[PodHolding]] = {}
    for holding in listing.holdings:
        for each in assignments.of_pods([holding], gpus).assignments:
            holders.setdefault(each.gpu_uuid, []).append(holding)
    found: dict[str, Owner] = {}
    for uuid, holdings in holders.items():
        pods = {(each.namespace, each.pod) for each in holdings}
        containers = {each.container for each in holdings}
        if len(pods) == 1:
            ((namespace, pod),) = pods
            container = containers.pop() if len(containers) == 1 else ""
            found[uuid] = Owner(pod_namespace=namespace, pod_name=pod, container_name=container)
    return found
