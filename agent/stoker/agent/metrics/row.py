"""A row of the table of the agent's own metrics: the name, the type and the labels of one family.

Names carry base units; what changes with time or place stands in an `_info` series, to be joined
by `uuid`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stoker.agent.metrics.exposition import FamilyKind

GPU_LABELS = ("node", "gpu", "uuid", "model")
MIG_LABELS = (
    *("node", "gpu", "uuid", "mig_uuid"),
    *("profile", "gpu_instance", "compute_instance"),
)
MIG_STATE_LABELS = (*GPU_LABELS, "state")
MIG_INSTANCE_LABELS = ("node", "gpu", "uuid", "profile", "start", "size")
INFO_LABELS = (
    *GPU_LABELS,
    *("pci_bus_id", "serial", "vbios_version", "board_part_number"),
    *("compute_capability", "minor_number", "numa_node"),
)
DRIVER_INFO_LABELS = ("node", "driver_version", "cuda_version", "nvml_version")
XID_LABELS = (*GPU_LABELS, "xid")
MISSING_LABELS = ("node", "gpu", "uuid", "error_kind")
HEALTH_LABELS = (*GPU_LABELS, "verdict")
FAULT_TIME_LABELS = (*GPU_LABELS, "check", "code")
FAULT_LABELS = (*FAULT_TIME_LABELS, "verdict", "action")
ASSIGNED_LABELS = (*GPU_LABELS, "by")
ASSIGNMENT_INFO_LABELS = ("node", "uuid", "mig_uuid", "by", "holder")
PROCESS_LABELS = ("node", "uuid", "pid")
OWNER_LABELS = (
    *("user", "command", "unit", "pod", "pod_uid", "namespace", "container"),
    *("slurm_job", "allocation"),
)
PROCESS_INFO_LABELS = (*PROCESS_LABELS, *OWNER_LABELS)
BUILD_LABELS = ("node", "version")

# Nobody's series has more labels: some stores refuse more than 30.
LABELS_MAX = 20


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table: one family of series."""

    name: str
    kind: FamilyKind
    labels: tuple[str, ...]
    doc: str
    source: str = "agent"  # who knows it
    rate: str = "scrape"  # how often it is made anew

    @property
    def unit(self) -> str:
        """What a value counts, by the end of the name."""
        bare = self.name.removesuffix("_total")
        for end, unit in _UNITS.items():
            if bare.endswith(end):
                return unit
        return "0 or 1" if self.doc.startswith("Whether") else "number"


_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "_bytes_per_second": "bytes/s",
        "_bytes": "bytes",
        "_ratio": "0 to 1",
        "_hertz": "Hz",
        "_watts": "W",
        "_joules": "J",
        "_celsius": "°C",
        "_timestamp_seconds": "Unix seconds",
        "_time_seconds": "Unix seconds",
        "_seconds": "s",
        "_info": "always 1",
    }
)
