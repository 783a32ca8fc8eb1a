"""What the parts of the agent's own page share: families by their row, and a GPU's labels as text.

A GPU's labels are turned into text once (`gpu_labels`) and shared by its hundred series.
"""

from collections.abc import Iterable, Mapping

from stoker.agent.metrics.exposition import Family, family, pairs
from stoker.agent.metrics.row import GPU_LABELS
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.metrics.table import METRICS
from stoker.agent.readings import GpuIdentity

# Labels as text, and a value.
Series = Iterable[tuple[str, float]]


def written(name: str, series: Series) -> Family:
    """Return the family of that row of the table."""
    metric = METRICS[name]
    return family(metric.name, metric.kind, metric.doc, series)


def single(name: str, value: float | None) -> Family:
    """Return a family of one series without labels, or of none when there is no value."""
    return written(name, [] if value is None else [("", value)])


def in_braces(base: str, name: str = "", value: str = "") -> str:
    """Return a series' labels; the own label's value is a word of ours and needs no escaping."""
    return f'{{{base},{name}="{value}"}}' if name else f"{{{base}}}"


def gpu_values(node: str, gpu: GpuIdentity) -> tuple[str, ...]:
    """Return the values of GPU_LABELS."""
    return (node, str(gpu.index), gpu.uuid, gpu.model)


def gpu_labels(snapshot: Snapshot) -> Mapping[str, str]:
    """Return the labels of every GPU of the inventory, as text without braces, by UUID."""
    node = snapshot.view.identity.node
    return {gpu.uuid: pairs(GPU_LABELS, gpu_values(node, gpu)) for gpu in snapshot.gpus}


def absent_gpu_labels(snapshot: Snapshot, uuid: str) -> str:
    """Return those of a GPU that cannot be read: what is not known of it is empty."""
    view = snapshot.view
    missing = () if view.inventory is None else view.inventory.missing
    index = next((str(fault.index) for fault in missing if fault.uuid == uuid), "")
    return pairs(GPU_LABELS, (view.identity.node, index, uuid, ""))
