"""The rows of the table about GPUs that no fact of the driver fills: health, users, what it is."""

from stoker.agent.metrics.exposition import FamilyKind
from stoker.agent.metrics.row import (
    ASSIGNED_LABELS,
    ASSIGNMENT_INFO_LABELS,
    DRIVER_INFO_LABELS,
    FAULT_LABELS,
    FAULT_TIME_LABELS,
    GPU_LABELS,
    HEALTH_LABELS,
    INFO_LABELS,
    MISSING_LABELS,
    PROCESS_INFO_LABELS,
    PROCESS_LABELS,
    XID_LABELS,
    Metric,
)
from stoker.agent.unattributed import TOLERANCE_BYTES

# Rows of info series about processes; of more, those with the most memory are told.
PROCESSES_MAX = 512
# Rows of info series about assignments; of more, the first by GPU and holder are told.
ASSIGNMENTS_MAX = 512

_GAUGE, _COUNTER = FamilyKind.GAUGE, FamilyKind.COUNTER

GPU_ROWS: tuple[Metric, ...] = (
    Metric(
        "stoker_gpu_up",
        _GAUGE,
        GPU_LABELS,
        "Whether the GPU was read within the last three intervals.",
    ),
    Metric(
        "stoker_gpu_info",
        _GAUGE,
        INFO_LABELS,
        "What the GPU is; an empty label was not told.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_driver_info",
        _GAUGE,
        DRIVER_INFO_LABELS,
        "The versions of the driver, of the CUDA it brings, and of its library.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_missing",
        _GAUGE,
        MISSING_LABELS,
        "1 for every GPU that the driver counts and that cannot be read; `error_kind` says why.",
        source="NVML",
        rate="inventory",
    ),
    Metric(
        "stoker_gpu_xid_errors_total",
        _COUNTER,
        XID_LABELS,
        "Errors that the driver reported (Xids), since the agent started; only those seen.",
        source="NVML's events",
        rate="as they come",
    ),
    Metric(
        "stoker_gpu_xid_last_timestamp_seconds",
        _GAUGE,
        XID_LABELS,
        "When the Xid was seen last.",
        source="NVML's events",
        rate="as they come",
    ),
    Metric(
        "stoker_gpu_health",
        _GAUGE,
        HEALTH_LABELS,
        "1 for the verdict on the GPU, 0 for the others; also of one that is lost or missing.",
        source="agent's judge",
        rate="as it changes",
    ),
    Metric(
        "stoker_gpu_fault",
        _GAUGE,
        FAULT_LABELS,
        "1 for every fault that lasts; `action` is what mends it.",
        source="agent's judge",
        rate="as it changes",
    ),
    Metric(
        "stoker_gpu_fault_last_timestamp_seconds",
        _GAUGE,
        FAULT_TIME_LABELS,
        "When that fault was seen last.",
        source="agent's judge",
        rate="as it changes",
    ),
    Metric(
        "stoker_gpu_memory_unattributed_bytes",
        _GAUGE,
        GPU_LABELS,
        "Memory in use that no process on the GPU accounts for; up to "
        f"{TOLERANCE_BYTES >> 20} MiB are the driver's own and told as 0.",
        source="NVML",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_assigned",
        _GAUGE,
        ASSIGNED_LABELS,
        "1 for every GPU of which others than stoker have assigned a part or all, by whom.",
        source="kubelet, cgroups",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_assignment_info",
        _GAUGE,
        ASSIGNMENT_INFO_LABELS,
        "To whom it is assigned; `mig_uuid` is empty where it is the whole GPU, or not told.",
        source="kubelet, cgroups",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_allocations",
        _GAUGE,
        GPU_LABELS,
        "Allocations that hold the GPU or a share of it.",
    ),
    Metric(
        "stoker_gpu_allocated_memory_bytes",
        _GAUGE,
        GPU_LABELS,
        "Memory of the GPU that is granted to somebody.",
    ),
    Metric(
        "stoker_gpu_processes",
        _GAUGE,
        GPU_LABELS,
        "Processes with a context on the GPU.",
        source="NVML and /proc",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_foreign_processes",
        _GAUGE,
        GPU_LABELS,
        "Those of them that belong to no allocation.",
        source="NVML and /proc",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_process_memory_used_bytes",
        _GAUGE,
        PROCESS_LABELS,
        "Memory of the GPU that the process has; absent where the driver does not tell.",
        source="NVML",
        rate="processes",
    ),
    Metric(
        "stoker_gpu_process_info",
        _GAUGE,
        PROCESS_INFO_LABELS,
        "Whose process it is; `command` is the program without its arguments.",
        source="NVML, /proc, kubelet",
        rate="processes",
    ),
)
