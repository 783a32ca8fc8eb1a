"""Snapshots for the metrics pages: a node of two GPUs, one that tells everything and one little."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from stoker.agent.driver_host.states import HostCounters
from stoker.agent.facts import BANK_AVAILABILITIES, CLOCK_EVENT_BITS, FACTS, Fact
from stoker.agent.metrics.dcgm import dcgm_families
from stoker.agent.metrics.exposition import prometheus_text
from stoker.agent.metrics.own import own_families
from stoker.agent.metrics.snapshot import Durations, Snapshot
from stoker.agent.metrics.table import MIG_FACTS
from stoker.agent.model import (
    AttributedProcess,
    CollectorStatus,
    DriverState,
    DriverStatus,
    HeldAllocation,
    NodeIdentity,
    NodeView,
    NumberedGpu,
    NumberedInventory,
    ProcessSeen,
    ProcessTable,
)
from stoker.agent.owners import AssignedBy, Assignment, Owner
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import Extent, GpuFault, GpuIdentity, MigDeviceReading
from stoker.agent.telemetry import WINDOWED, GpuTelemetry, XidCount
from stoker.agent.verdicts import (
    Check,
    Fault,
    GpuHealth,
    KernelLogStatus,
    RepairAction,
    Verdict,
)
from stoker.core.mig.geometry import MigState, Placed

GIB = 2**30
NOW = 101.0  # monotonic; the newest sample is a second old

# A value of its own for every fact, so that no series can stand for another one.
EVERY_FACT: Mapping[Fact, float] = {
    fact: 5000.0 - i for i, (fact, spec) in enumerate(FACTS.items()) if spec.label is None
}
_LABEL_VALUES: Mapping[str, tuple[str, ...]] = {
    "reason": (
        *CLOCK_EVENT_BITS.values(),
        *("thermal", "board_limit", "low_utilization", "reliability"),
    ),
    "fan": ("0", "1"),
    "link": tuple(str(link) for link in range(18)),
    "cause": ("correctable", "uncorrectable"),
    "availability": BANK_AVAILABILITIES,
}
EVERY_LABELLED_FACT: Mapping[Fact, Mapping[str, float]] = {
    fact: {value: float(i) for i, value in enumerate(_LABEL_VALUES[spec.label])}
    for fact, spec in FACTS.items()
    if spec.label is not None
}
IDENTITIES = (
    GpuIdentity(
        *(0, "GPU-0", "NVIDIA H100 80GB HBM3", 80 * GIB),
        pci_bus_id="00000000:53:00.0",
        serial="1654922006536",
        board_part_number="692-2G520-0200-000",
        vbios_version="96.00.5E.00.01",
        minor_number=3,
        compute_capability="9.0",
        numa_node=1,
    ),
    GpuIdentity(1, "GPU-1", "Tesla T4", 16 * GIB),
)
FULL = GpuTelemetry(
    *("GPU-0", 1000.0, EVERY_FACT, EVERY_LABELLED_FACT, ()),
    {fact: Extent(1.0 + i, 3.0 + i, 2.0 + i, 5) for i, fact in enumerate(WINDOWED)},
)
# A card that tells little: nothing else about it may be on the page.
BARE = GpuTelemetry("GPU-1", 1000.0, {Fact.MEMORY_USED_BYTES: 0.0}, {}, (), {})
MIG_DEVICE = MigDeviceReading(
    "MIG-a", 3, 0, "1g.10gb", {fact: 2000.0 + i for i, fact in enumerate(MIG_FACTS)}
)

VIEW = NodeView(
    identity=NodeIdentity("n1", "0.1.0", "boot", False, "", {}, 1.0, "process"),
    incarnation="life",
    inventory=NumberedInventory(
        *("580.1", "13.0"),
        tuple(NumberedGpu(i + 1, identity) for i, identity in enumerate(IDENTITIES)),
    ),
    samples=(),
    telemetry=(FULL, BARE),
    xids={},
    read_failures={},
    processes=ProcessTable(
        990.0,
        (
            AttributedProcess(ProcessSeen("GPU-0", 7), "a"),
            AttributedProcess(ProcessSeen("GPU-0", 8), ""),
        ),
        unread_gpu_uuids=("GPU-1",),
    ),
    processes_monotonic_seconds=90.0,
    held=(
        HeldAllocation("a", ("GPU-0",), 3 * GIB, "ann", 60.0, 0.0),
        HeldAllocation("b", ("GPU-0",), 4 * GIB, "bob", 60.0, 0.0),
        HeldAllocation("c", ("GPU-1",), None, "cyd", 60.0, 0.0),
    ),
    ending=frozenset(),
    driver=DriverStatus(DriverState.READING),
    connected=True,
    outbox_frames=2,
    frames_dropped=5,
    samples_total=900,
    sample_failures={"driver_timeout": 3, "gpu_lost": 1},
    last_success_at=1000.25,
    last_success_monotonic_seconds=100.0,
)
FAULTS = (
    Fault(
        *(Check.XID, "79", Verdict.UNHEALTHY, RepairAction.REBOOT),
        *("Xid 79: the GPU has fallen off the bus", 900.0, 901.5, 1),
    ),
    Fault(
        *(Check.NVLINK_ERRORS, "4", Verdict.DEGRADED, RepairAction.DRAIN),
        *("NVLink 4: 12 replays in a minute", 950.0, 999.0, 12),
    ),
)
POD = Owner(
    unit="kubelet.service",
    container_id="0123456789abcdef",
    container_runtime="containerd",
    container_name="trainer",
    pod_uid="7b1c",
    pod_namespace="ml",
    pod_name="train-0",
)
TABLE = ProcessTable(
    990.0,
    (
        AttributedProcess(
            ProcessSeen("GPU-0", 7, "ann", "/usr/bin/python3 train.py --token=abc", GIB), "a"
        ),
        AttributedProcess(ProcessSeen("GPU-0", 8, owner=POD), ""),
    ),
    unread_gpu_uuids=("GPU-1",),
    assignments=(
        Assignment("GPU-0", AssignedBy.KUBELET, POD.described(), owner=POD),
        Assignment("GPU-0", AssignedBy.SLURM, "Slurm job 77", "MIG-a", owner=Owner(slurm_job="77")),
    ),
)
# As VIEW, with what happens rarely: every family of the table that a snapshot gives is told.
EVENTFUL = replace(
    VIEW,
    inventory=replace(
        VIEW.inventory,
        missing=(
            GpuFault(2, None, "gpu_lost", "it is lost"),
            GpuFault(3, "GPU-3", "not_found", "it was there before"),
        ),
    )
    if VIEW.inventory
    else None,
    telemetry=(replace(FULL, mig_devices=(MIG_DEVICE,)), BARE),
    xids={"GPU-0": {31: XidCount(2, 900.5), 79: XidCount(1, 901.5)}},
    read_failures={("gpu", "gpu_lost"): 2, ("power_watts", "unknown"): 1},
    processes=TABLE,
    health=(
        GpuHealth("GPU-0", Verdict.UNHEALTHY, RepairAction.REBOOT, "Xid 79", faults=FAULTS),
        GpuHealth("GPU-1", Verdict.HEALTHY),
        GpuHealth("GPU-3", Verdict.UNKNOWN, RepairAction.NONE, "it was there before"),
    ),
    kernel_log=KernelLogStatus(is_followed=True, source="helper", reason=""),
    memory_unattributed_bytes={"GPU-0": 2 * GIB},
    mig=(
        GpuMigStatus(
            *("GPU-0", MigState.APPLYING, "2 of 5 steps", "all-balanced", "op-1", True),
            changed_at=990.5,
            layout=(Placed(0, 1, "1g.10gb"), Placed(4, 4, "3g.40gb", (1, 2))),
        ),
        GpuMigStatus("GPU-1"),
    ),
)


def snapshot(view: NodeView = VIEW, monotonic: float = NOW) -> Snapshot:
    return Snapshot(
        view=view,
        monotonic_seconds=monotonic,
        host=HostCounters(
            starts_total=3,
            restarts_total=2,
            renewals_total=5,
            timeouts_total=4,
            failures_total=6,
            crashes_total=7,
            kills_total=1,
            unreaped_total=8,
            inventory_changes_total=9,
            hangs_by_function={"nvmlDeviceGetPowerUsage": 3, "nvmlDeviceGetTemperature": 1},
        ),
        sample_durations=Durations().with_one(0.001).with_one(0.03).with_one(7.0),
        processes_interval_seconds=5.0,
    )


def eventful() -> Snapshot:
    return replace(
        snapshot(EVENTFUL),
        collectors={"fast": CollectorStatus(True, 0.003, 1000.25), "slow": CollectorStatus()},
        host_unreaped_since=60.5,
    )


def told(*gpus: GpuTelemetry) -> Snapshot:
    """Return a snapshot of a node whose GPUs told just this."""
    return snapshot(replace(VIEW, telemetry=gpus))


def own_page(shown: Snapshot) -> str:
    return prometheus_text(own_families(shown))


def dcgm_page(shown: Snapshot, hostname_label: str = "Hostname") -> str:
    return prometheus_text(dcgm_families(shown, hostname_label))


def label_names(page: str) -> Mapping[str, Sequence[set[str]]]:
    """Return the names of labels of every sample, by the name of its family."""
    return {
        family.name: [set(sample.labels) for sample in family.samples]
        for family in text_string_to_metric_families(page)
    }
