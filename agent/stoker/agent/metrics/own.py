"""The agent's own page: what stands in a snapshot as families of the table `metrics.table`.

A value that is not there is left out: a reading that failed, a fact that the card does not tell, a
value older than three intervals. Only what the agent itself counts goes on through a failure.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from stoker.agent.facts import FACTS, Fact
from stoker.agent.metrics.condition import condition_families
from stoker.agent.metrics.exposition import Family, histogram, labels
from stoker.agent.metrics.families import (
    absent_gpu_labels,
    gpu_labels,
    gpu_values,
    in_braces,
    single,
    written,
)
from stoker.agent.metrics.holders import holder_families
from stoker.agent.metrics.partitions import partition_families
from stoker.agent.metrics.row import (
    BUILD_LABELS,
    DRIVER_INFO_LABELS,
    INFO_LABELS,
    MIG_LABELS,
    MISSING_LABELS,
)
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.metrics.table import (
    METRICS,
    MIG_FACTS,
    RATE_OF,
    extent_metric_name,
    gpu_metric_name,
    mig_metric_name,
)
from stoker.agent.model import DriverState
from stoker.agent.readings import Extent, GpuIdentity, MigDeviceReading
from stoker.agent.telemetry import WINDOWED, GpuTelemetry, XidCount

_GPU_NAMES = tuple((fact, gpu_metric_name(fact)) for fact in FACTS)
_MIG_NAMES = tuple((fact, mig_metric_name(fact)) for fact in MIG_FACTS)
_EXTENT_READS: tuple[tuple[str, Callable[[Extent], float]], ...] = (
    ("min", lambda extent: extent.least),
    ("max", lambda extent: extent.most),
    ("mean", lambda extent: extent.mean),
)
_EXTENT_NAMES = tuple(
    (fact, extent_metric_name(fact, which), read)
    for fact in WINDOWED
    for which, read in _EXTENT_READS
)


def own_families(snapshot: Snapshot) -> Iterator[Family]:
    """Yield every family that the snapshot has something to say about, and empty ones."""
    gpus = snapshot.gpus
    node = snapshot.view.identity.node
    base = gpu_labels(snapshot)
    told = snapshot.telemetry
    read = [(base[gpu.uuid], told[gpu.uuid]) for gpu in gpus if gpu.uuid in told]
    yield from _fact_families(read)
    yield from _extent_families(read)
    yield from _mig_families(node, [(gpu, told[gpu.uuid]) for gpu in gpus if gpu.uuid in told])
    yield written("stoker_gpu_up", ((in_braces(base[gpu.uuid]), gpu.uuid in told) for gpu in gpus))
    yield from _inventory_families(snapshot)
    yield from _xid_families(snapshot, base)
    yield from condition_families(snapshot, base)
    yield from partition_families(snapshot, base)
    yield from _allocation_families(snapshot, base)
    yield from holder_families(snapshot, base)
    yield from _agent_families(snapshot)
    yield from _host_families(snapshot)


def _fact_families(read: Sequence[tuple[str, GpuTelemetry]]) -> Iterator[Family]:
    for fact, name in _GPU_NAMES:
        label = FACTS[fact].label
        if label is None:
            counter = RATE_OF.get(fact)
            series = [
                (in_braces(base), value)
                for base, gpu in read
                if (value := gpu.facts.get(fact)) is not None
                and not (counter is not None and _tells(gpu, counter))
            ]
        else:
            series = [
                (in_braces(base, label, which), value)
                for base, gpu in read
                if (values := gpu.by_label.get(fact))
                for which, value in values.items()
            ]
        yield written(name, series)


def _tells(gpu: GpuTelemetry, fact: Fact) -> bool:
    return fact in gpu.facts or bool(gpu.by_label.get(fact))


def _extent_families(read: Sequence[tuple[str, GpuTelemetry]]) -> Iterator[Family]:
    for fact, name, value_of in _EXTENT_NAMES:
        series = [
            (in_braces(base), value_of(extent))
            for base, gpu in read
            if (extent := gpu.extents.get(fact)) is not None
        ]
        yield written(name, series)


def _mig_families(node: str, read: Sequence[tuple[GpuIdentity, GpuTelemetry]]) -> Iterator[Family]:
    devices = [
        (labels(MIG_LABELS, _mig_values(node, gpu, device)), device.facts)
        for gpu, telemetry in read
        for device in telemetry.mig_devices
    ]
    for fact, name in _MIG_NAMES:
        series = [
            (text, value) for text, facts in devices if (value := facts.get(fact)) is not None
        ]
        yield written(name, series)


def _inventory_families(snapshot: Snapshot) -> Iterator[Family]:
    node, inventory = snapshot.view.identity.node, snapshot.view.inventory
    if inventory is None:
        return
    yield written(
        "stoker_gpu_info",
        ((labels(INFO_LABELS, _info_values(node, gpu)), 1) for gpu in snapshot.gpus),
    )
    versions = (inventory.driver_version, inventory.cuda_version, inventory.nvml_version)
    values = (node, *(version or "" for version in versions))
    yield written("stoker_gpu_driver_info", [(labels(DRIVER_INFO_LABELS, values), 1)])
    missing = {
        labels(MISSING_LABELS, (node, str(each.index), each.uuid or "", each.error_kind))
        for each in inventory.missing
    }
    yield written("stoker_gpu_missing", ((text, 1) for text in sorted(missing)))


def _xid_families(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[Family]:
    """Tell the Xids of every GPU, read or not."""
    series: list[tuple[str, XidCount]] = []
    for uuid, counts in sorted(snapshot.view.xids.items()):
        text = base.get(uuid) or absent_gpu_labels(snapshot, uuid)
        series += [
            (in_braces(text, "xid", str(xid)), count) for xid, count in sorted(counts.items())
        ]
    yield written("stoker_gpu_xid_errors_total", ((text, each.total) for text, each in series))
    yield written(
        "stoker_gpu_xid_last_timestamp_seconds", ((text, each.last_at) for text, each in series)
    )


def _allocation_families(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[Family]:
    count: list[tuple[str, float]] = []
    size: list[tuple[str, float]] = []
    for gpu in snapshot.gpus:
        held = [each for each in snapshot.view.held if gpu.uuid in each.gpu_uuids]
        shares = (each.memory_bytes or gpu.memory_total_bytes for each in held)
        count.append((in_braces(base[gpu.uuid]), len(held)))
        size.append((in_braces(base[gpu.uuid]), sum(shares)))
    yield written("stoker_gpu_allocations", count)
    yield written("stoker_gpu_allocated_memory_bytes", size)


def _agent_families(snapshot: Snapshot) -> Iterator[Family]:
    view = snapshot.view
    build = (view.identity.node, view.identity.agent_version)
    yield written("stoker_agent_build_info", [(labels(BUILD_LABELS, build), 1)])
    yield single("stoker_agent_simulated", view.identity.simulated)
    yield single("stoker_agent_connected", view.connected)
    yield single("stoker_agent_kernel_log_followed", view.kernel_log.is_followed)
    yield single("stoker_agent_outbox_frames", view.outbox_frames)
    yield single("stoker_agent_frames_dropped_total", view.frames_dropped)
    yield single("stoker_agent_samples_total", view.samples_total)
    yield written(
        "stoker_agent_sample_failures_total",
        (
            (labels(("reason",), (kind,)), number)
            for kind, number in sorted(view.sample_failures.items())
        ),
    )
    yield written(
        "stoker_agent_read_failures_total",
        (
            (labels(("fact", "reason"), key), number)
            for key, number in sorted(view.read_failures.items())
        ),
    )
    durations = snapshot.sample_durations
    metric = METRICS["stoker_agent_sample_duration_seconds"]
    yield histogram(
        metric.name,
        metric.doc,
        durations.cumulative(),
        durations.sum_seconds,
        sum(durations.counts),
    )
    yield single("stoker_agent_last_success_timestamp_seconds", view.last_success_at)
    yield from _collector_families(snapshot)


def _collector_families(snapshot: Snapshot) -> Iterator[Family]:
    runs = [(labels(("collector",), (name,)), run) for name, run in snapshot.collectors.items()]
    for name, values in (
        ("success", [(text, run.succeeded) for text, run in runs]),
        ("duration_seconds", [(text, run.duration_seconds) for text, run in runs]),
        ("last_success_timestamp_seconds", [(text, run.last_success_at) for text, run in runs]),
    ):
        told = ((text, value) for text, value in values if value is not None)
        yield written(f"stoker_agent_collector_{name}", told)


def _host_families(snapshot: Snapshot) -> Iterator[Family]:
    host, since = snapshot.host, snapshot.host_unreaped_since
    yield written(
        "stoker_agent_driver_state",
        ((labels(("state",), (s,)), s is snapshot.view.driver.state) for s in DriverState),
    )
    yield single("stoker_agent_driver_host_restarts_total", host.restarts_total)
    yield single("stoker_agent_driver_host_renewals_total", host.renewals_total)
    yield single("stoker_agent_driver_host_timeouts_total", host.timeouts_total)
    hangs = sorted(host.hangs_by_function.items())
    yield written(
        "stoker_agent_driver_hangs_total",
        ((labels(("function",), (function,)), number) for function, number in hangs),
    )
    yield single("stoker_agent_driver_host_failures_total", host.failures_total)
    yield single("stoker_agent_driver_host_crashes_total", host.crashes_total)
    yield single("stoker_agent_driver_host_kills_total", host.kills_total)
    yield single("stoker_agent_driver_inventory_changes_total", host.inventory_changes_total)
    yield single("stoker_agent_driver_host_unkillable_total", host.unreaped_total)
    yield single("stoker_agent_driver_host_unreaped", since is not None)
    held = None if since is None else snapshot.monotonic_seconds - since
    yield single("stoker_agent_driver_host_unreaped_seconds", held)


def _info_values(node: str, gpu: GpuIdentity) -> tuple[str, ...]:
    facts = (
        *(gpu.pci_bus_id, gpu.serial, gpu.vbios_version, gpu.board_part_number),
        *(gpu.compute_capability, gpu.minor_number, gpu.numa_node),
    )
    return (*gpu_values(node, gpu), *("" if fact is None else str(fact) for fact in facts))


def _mig_values(node: str, gpu: GpuIdentity, device: MigDeviceReading) -> tuple[str, ...]:
    return (
        *(node, str(gpu.index), gpu.uuid, device.uuid, device.profile),
        *(str(device.gpu_instance_id), str(device.compute_instance_id)),
    )
