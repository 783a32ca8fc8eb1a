"""The rows of the table about how GPUs are partitioned (MIG), and what is being done about it."""

from stoker.agent.metrics.exposition import FamilyKind
from stoker.agent.metrics.row import GPU_LABELS, MIG_INSTANCE_LABELS, MIG_STATE_LABELS, Metric

_GAUGE = FamilyKind.GAUGE

MIG_ROWS: tuple[Metric, ...] = (
    Metric(
        "stoker_gpu_mig_state",
        _GAUGE,
        MIG_STATE_LABELS,
        "1 for how far the GPU is on the way to the MIG layout that was declared for it, 0 for the "
        "other states; absent where none was.",
        rate="as it changes",
    ),
    Metric(
        "stoker_gpu_mig_withheld",
        _GAUGE,
        GPU_LABELS,
        "Whether nothing new is placed on the GPU, as its MIG layout is not in place.",
        rate="as it changes",
    ),
    Metric(
        "stoker_gpu_mig_changed_timestamp_seconds",
        _GAUGE,
        GPU_LABELS,
        "When its partitions were changed last; absent where nobody kept note of it.",
        rate="as it changes",
    ),
    Metric(
        "stoker_mig_instance_info",
        _GAUGE,
        MIG_INSTANCE_LABELS,
        "A GPU instance, and the memory slices that it takes; absent where the agent may not read "
        "places.",
        source="NVML",
        rate="as it changes",
    ),
)
