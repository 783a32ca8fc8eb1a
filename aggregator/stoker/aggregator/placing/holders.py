"""Who holds what is not free, and what cannot be used, in words for the end of a sentence."""

from collections.abc import Iterable, Sequence

from stoker.aggregator.placing.node_filters import in_part
from stoker.aggregator.views import (
    GpuView,
    NodeView,
    describe_assigned,
    describe_cordon,
    describe_foreign,
    describe_missing,
    describe_withheld,
    name_some,
)


def held_by(
    gpus: Sequence[GpuView], node: NodeView, now: float, *, in_mig_mode: bool = True
) -> str:
    """Return who holds these GPUs, and why others of the node cannot be used; empty: nobody.

    `in_mig_mode`: whether MIG mode keeps a GPU from what was asked for.
    """
    parts: list[str] = []
    allocated = sorted({claim.allocation_id for gpu in gpus for claim in gpu.claims})
    if allocated:
        parts.append(f"allocated to {name_some(allocated)}")
    strays = sorted({id_ for gpu in gpus for id_ in gpu.strays})
    if strays:
        parts.append(f"held by the node for {name_some(strays)}, which the ledger does not grant")
    for gpu in gpus:
        if gpu.foreign:
            parts.append(f"GPU {gpu.gpu.index} is used by {describe_foreign(gpu.foreign)}")
    parts += [assigned for gpu in gpus if (assigned := describe_assigned(gpu))]
    if node.assignments_unknown:
        parts.append(f"what others have handed out is not known: {node.assignments_unknown}")
    cordons = [describe_cordon(gpu, now) for gpu in gpus if gpu.cordon is not None]
    if cordons:
        parts.append(in_part(cordons))
    withheld = [told for gpu in gpus if (told := describe_withheld(gpu))]
    if withheld:
        parts.append(in_part(withheld))
    if in_mig_mode and any(gpu.gpu.mig_enabled for gpu in gpus):
        parts.append(f"MIG mode: {_names(gpu for gpu in gpus if gpu.gpu.mig_enabled)}")
    if node.missing:
        parts.append(describe_missing(node.missing))
    unread = [gpu for gpu in gpus if not gpu.is_read and gpu.missing is None]
    if unread:
        parts.append(f"the newest reading of {_names(unread)} failed")
    unknown = [gpu for gpu in gpus if gpu.is_read and not gpu.processes_known]
    if unknown:
        parts.append(f"the processes on {_names(unknown)} are not known yet")
    return ": " + "; ".join(parts) if parts else ""


def out_of_use(node: NodeView) -> str:
    """Return the GPUs that would count if they could be read."""
    return f"; {describe_missing(node.missing)}" if node.missing else ""


def _names(gpus: Iterable[GpuView]) -> str:
    return ", ".join(f"GPU {gpu.gpu.index}" for gpu in gpus)
