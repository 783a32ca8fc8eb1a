"""What the environment that Slurm gave to a process says: its job and step, the GPUs of its job.

Slurm gives a job's GPUs to its batch script (and an interactive shell) as SLURM_JOB_GPUS, and those
of each other step to its tasks as SLURM_STEP_GPUS. Both are numbers of this node. A task inherits
what its job's script had on another node, so of SLURM_JOB_GPUS only the script itself is believed.
"""

from collections.abc import Collection, Mapping

from stoker.agent.attribution.assignments import JobGpus

# Steps that Slurm makes by itself, by their number in the environment.
_STEP_NAMES = {"4294967290": "interactive", "4294967291": "batch", "4294967292": "extern"}
# Steps whose processes have the job's own variables.
JOB_STEPS = frozenset({"batch", "interactive"})
# Holds what came in from outside (ssh): it may know its job, and knows nothing of GPUs.
FOREIGN_STEP = "extern"
# Any of these says that there is something of a GPU on this node.
_HERE = ("SLURM_GPUS_ON_NODE", "SLURM_SHARDS_ON_NODE")
# Any of these, inherited by a step, says that its job has GPUs, here or on another node.
_ANYWHERE = (*_HERE, "SLURM_JOB_GPUS", "SLURM_GPUS", "SLURM_GPUS_PER_NODE")
_GPUS_MAX = 1024  # of one job on one node


def job_of(variables: Mapping[str, str]) -> tuple[str, str]:
    """Return the job and the step of a process; empty: it is in none, or it is not told."""
    job = variables.get("SLURM_JOB_ID") or variables.get("SLURM_JOBID") or ""
    step = variables.get("SLURM_STEP_ID") or variables.get("SLURM_STEPID") or ""
    if not (job.isascii() and job.isalnum()):
        return "", ""  # whatever the process has made of it
    return job, _STEP_NAMES.get(step, step if step.isascii() and step.isalnum() else "")


def gpus_of_job(job: str, told: Mapping[str, Mapping[str, str]], steps: Collection[str]) -> JobGpus:
    """Return a job's GPUs on this node, by what its steps were told; `steps` run now.

    Without the script (it runs on another node, or the job is `salloc`) they are what all of its
    steps have together, also of those that have ended: a job keeps its GPUs to its end.
    """
    script = next((told[step] for step in JOB_STEPS if step in told), None)
    silent = sorted(set(steps) - told.keys() - {FOREIGN_STEP})
    if script is None and (silent or not told):
        which = f"its step {silent[0]}" if silent else "it"
        return JobGpus(job, unknown=f"no process of {which} tells")
    marks: tuple[str, ...] = _HERE
    if script is not None:
        lists, asked = [script.get("SLURM_JOB_GPUS")], script
    else:
        lists = [variables.get("SLURM_STEP_GPUS") for variables in told.values()]
        asked = {name: value for each in told.values() for name, value in each.items()}
        marks = _ANYWHERE
    texts = [text for text in lists if text]
    if not texts:
        named = [name for name in marks if asked.get(name)]
        why = f"it has {named[0]}={asked[named[0]][:80]}, which does not say which" if named else ""
        return JobGpus(job, unknown=why)
    ids: list[str] = []
    for text in texts:
        parsed = parse_gpu_list(text)
        if parsed is None:
            return JobGpus(job, unknown=f"{text[:80]!r} is no list of GPUs")
        ids += parsed
    return JobGpus(job, tuple(dict.fromkeys(ids)))


def parse_gpu_list(text: str) -> tuple[str, ...] | None:
    """Return the GPUs of "0,2-3" or "GPU-...,MIG-..."; None: it is no such list."""
    found: list[str] = []
    for part in text.split(","):
        word = part.strip()
        first, dash, last = word.partition("-")
        if word.startswith(("GPU-", "MIG-")):
            found.append(word)
        elif not _is_number(first) or (dash and not _is_number(last)):
            return None
        else:
            numbers = range(int(first), int(last or first) + 1)
            if not 0 < len(numbers) <= _GPUS_MAX:
                return None
            found += map(str, numbers)
        if len(found) > _GPUS_MAX:
            return None
    return tuple(found)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4
