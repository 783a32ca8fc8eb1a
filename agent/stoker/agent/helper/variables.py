"""The variables of an environment that tell whose a process is; the helper tells of no others."""

# Which allocation the process claims to use; whether it may is for others to judge.
ALLOCATION = "STOKER_ALLOCATION_ID"
# What Slurm tells a job of itself and its GPUs. Others of its variables may be credentials.
SLURM_VARIABLES = frozenset(
    {
        *("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_STEP_ID", "SLURM_STEPID"),
        *("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_SHARDS_ON_NODE"),
        *("SLURM_GPUS", "SLURM_GPUS_PER_NODE"),
    }
)
JOB_VARIABLES = frozenset({ALLOCATION, *SLURM_VARIABLES})
