"""How GPUs are partitioned (MIG), for the agent's own page: states, and where instances are.

All of it is what the agent itself last told the aggregator: a GPU of which it tells nothing any
more has no series.
"""

from collections.abc import Iterator, Mapping

from stoker.agent.metrics.exposition import Family, labels
from stoker.agent.metrics.families import absent_gpu_labels, in_braces, written
from stoker.agent.metrics.row import MIG_INSTANCE_LABELS
from stoker.agent.metrics.snapshot import Snapshot
from stoker.core.mig.geometry import MigState


def partition_families(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[Family]:
    """Yield the families of partitions; `base`: the labels of the GPUs by UUID."""
    states: list[tuple[str, float]] = []
    withheld: list[tuple[str, float]] = []
    changed: list[tuple[str, float]] = []
    instances: list[tuple[str, float]] = []
    node = snapshot.view.identity.node
    indices = {gpu.uuid: str(gpu.index) for gpu in snapshot.gpus}
    for gpu in sorted(snapshot.view.mig, key=lambda each: each.gpu_uuid):
        uuid = gpu.gpu_uuid
        text = base.get(uuid) or absent_gpu_labels(snapshot, uuid)
        if gpu.state is not None:
            states += [(in_braces(text, "state", s), s is gpu.state) for s in MigState]
        withheld.append((in_braces(text), gpu.is_withheld))
        if gpu.changed_at is not None:
            changed.append((in_braces(text), gpu.changed_at))
        for each in gpu.layout or ():
            place = (node, indices.get(uuid, ""), uuid, each.profile, f"{each.start}")
            instances.append((labels(MIG_INSTANCE_LABELS, (*place, f"{each.size}")), 1))
    yield written("stoker_gpu_mig_state", states)
    yield written("stoker_gpu_mig_withheld", withheld)
    yield written("stoker_gpu_mig_changed_timestamp_seconds", changed)
    yield written("stoker_mig_instance_info", instances)
