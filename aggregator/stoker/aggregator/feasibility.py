"""Whether a node can host a request, and if not, which filter says no and what it found."""

from collections.abc import Callable

from stoker.aggregator.model import Refusal, Request
from stoker.aggregator.views import (
    FleetView,
    GpuView,
    NodeView,
    describe_assigned,
    describe_cordon,
    describe_foreign,
    describe_missing,
    name_some,
)
from stoker.core.model_names import names_match
from stoker.core.units import format_bytes, format_duration

Filter = Callable[[Request, NodeView, FleetView], Refusal | None]

_SENTENCES_MAX = 3  # how many GPUs' cordons are told whole in one refusal


def refuse(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    """Return the first filter's refusal, or None when the node can host the request now."""
    for a_filter in FILTERS:
        refusal = a_filter(request, node, view)
        if refusal is not None:
            return refusal
    return None


def could_ever_fit(request: Request, node: NodeView, view: FleetView) -> bool:
    """Whether the node would host the request once it were free, fresh and uncordoned.

    Nobody waits for a GPU that is out of use or cordoned by itself: it may take a person to bring
    it back.
    """
    return all(a_filter(request, node, view) is None for a_filter in LASTING_FILTERS)


def matching_gpus(request: Request, node: NodeView) -> list[GpuView]:
    """Return the node's GPUs of the model that was asked for."""
    model = request.model
    return [gpu for gpu in node.gpus if model is None or names_match(model, gpu.gpu.model)]


def count_free(request: Request, node: NodeView) -> int:
    """Return how many of the node's GPUs of the model that was asked for are free."""
    model = request.model
    if model is None:
        return node.free_gpus
    count = 0
    for name, free in node.free_by_model.items():
        if names_match(model, name):
            count += free
    return count


def find_room(request: Request, memory_bytes: int, node: NodeView) -> GpuView | None:
    """Return the node's best GPU for a share of `memory_bytes`; None when none has the room."""
    if node.room_bytes_max < memory_bytes:
        return None
    model = request.model
    for gpu in node.tightest_first:
        if gpu.room_bytes >= memory_bytes and (model is None or names_match(model, gpu.gpu.model)):
            return gpu
    return None


def _asked_node(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if request.node is None or request.node == node.name:
        return None
    return Refusal(node.name, "node", f"node {request.node} was asked for", request.node, node.name)


def _asked_host(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if request.host_boot_id is None or request.host_boot_id == node.node.facts.boot_id:
        return None
    return Refusal(
        node.name,
        "host",
        "it is another host than the one the command would run on",
        f"boot {request.host_boot_id}",
        f"boot {node.node.facts.boot_id}",
    )


def _asked_pool(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if request.pool is None or request.pool == node.node.facts.pool:
        return None
    found = node.node.facts.pool
    where = f"pool {found}" if found else "no pool"
    reason = f"pool {request.pool} was asked for, it is in {where}"
    return Refusal(node.name, "pool", reason, request.pool, found)


def _asked_model(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    model = request.model
    if model is None or any(names_match(model, name) for name in node.free_by_model):
        return None
    found = ", ".join(sorted({gpu.gpu.model for gpu in node.gpus})) or "no GPUs"
    return Refusal(node.name, "model", f"wanted {model}, it has {found}", model, found)


def _total_size(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    gpus = [gpu for gpu in matching_gpus(request, node) if gpu.missing is None]
    if request.memory_bytes is None:
        if len(gpus) >= request.gpus:
            return None
        found = f"{len(gpus)} of {node.gpus_total} GPUs" if node.missing else str(len(gpus))
        reason = f"wanted {request.described()} on one node, it has {found}" + _out_of_use(node)
        return Refusal(node.name, "gpus_total", reason, str(request.gpus), str(len(gpus)))
    largest = max((gpu.gpu.memory_total_bytes - gpu.reserved_bytes for gpu in gpus), default=0)
    if largest >= request.memory_bytes:
        return None
    wanted, found = _told_apart(request.memory_bytes, largest)
    reason = f"wanted {wanted} of one GPU, its largest has {found} beyond what the driver keeps"
    reason += _out_of_use(node)
    return Refusal(
        node.name, "memory_total", reason, str(request.memory_bytes), str(max(0, largest))
    )


def _gpus_cordoned(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    """Refuse where only GPUs that are cordoned one by one make it too few, or too small."""
    if node.cordoned_gpus == 0:
        return None
    gpus = [gpu for gpu in matching_gpus(request, node) if gpu.missing is None]
    in_use = [gpu for gpu in gpus if gpu.cordon is None]
    if request.memory_bytes is None:
        if len(in_use) >= request.gpus:
            return None
        found = f"{len(in_use)} of {len(gpus)} are not cordoned"
        wanted, left = str(request.gpus), str(len(in_use))
        reason = f"wanted {request.described()} on one node, {found}"
    else:
        sizes = (gpu.gpu.memory_total_bytes - gpu.reserved_bytes for gpu in in_use)
        largest = max((0, *sizes))
        if largest >= request.memory_bytes:
            return None
        wanted, left = str(request.memory_bytes), str(largest)
        shown = _told_apart(request.memory_bytes, largest)
        reason = f"wanted {shown[0]} of one GPU, the largest that is not cordoned has {shown[1]}"
    cordons = [describe_cordon(gpu, view.now) for gpu in gpus if gpu.cordon is not None]
    return Refusal(node.name, "gpus_cordoned", f"{reason}: {_in_part(cordons)}", wanted, left)


def _cordon(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if node.node.cordoned is None:
        return None
    return Refusal(
        node.name, "cordoned", f"cordoned: {node.node.cordoned}", "not cordoned", node.node.cordoned
    )


def _problem(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if not node.problem:
        return None
    name = "driver" if node.connected else "disconnected"
    return Refusal(node.name, name, node.problem, "connected, driver read", node.problem)


def _freshness(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    fresh_until = view.fresh_until.get(node.name)
    if fresh_until is not None and view.now <= fresh_until:
        return None
    if fresh_until is None:
        reason, found = "no sample of its GPUs has arrived yet", "none"
    else:
        late = format_duration(view.now - fresh_until)
        reason = f"its newest sample is {late} beyond three sampling intervals"
        found = f"{late} late"
    return Refusal(node.name, "stale", reason, "a sample of the last three intervals", found)


def _free_gpus(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if request.memory_bytes is not None or count_free(request, node) >= request.gpus:
        return None
    gpus = matching_gpus(request, node)
    free = count_free(request, node)
    reason = f"wanted {request.described()} free on one node, {free} of {len(gpus)} are"
    taken = [gpu for gpu in gpus if not gpu.is_free]
    reason += _held_by(taken, node, view.now)
    return Refusal(node.name, "gpus_free", reason, str(request.gpus), str(free))


def _free_memory(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    memory_bytes = request.memory_bytes
    if memory_bytes is None or find_room(request, memory_bytes, node) is not None:
        return None
    gpus = matching_gpus(request, node)
    largest = max((gpu.room_bytes for gpu in gpus), default=0)
    wanted, found = _told_apart(memory_bytes, largest)
    reason = f"wanted {wanted} of one GPU, at most {found} is free on one"
    reason += _held_by(gpus, node, view.now)
    return Refusal(node.name, "memory_free", reason, str(memory_bytes), str(largest))


# What stays so until somebody changes the fleet or the request, cheapest first.
LASTING_FILTERS: tuple[Filter, ...] = (
    _asked_node,
    _asked_host,
    _asked_pool,
    _asked_model,
    _total_size,
    _gpus_cordoned,
)
FILTERS: tuple[Filter, ...] = (
    *LASTING_FILTERS,
    _cordon,
    _problem,
    _freshness,
    _free_gpus,
    _free_memory,
)


def _told_apart(wanted_bytes: int, found_bytes: int) -> tuple[str, str]:
    """Return both sizes for a person; in bytes when they would read the same."""
    wanted, found = format_bytes(wanted_bytes), format_bytes(max(0, found_bytes))
    if wanted == found:
        return f"{wanted_bytes} B", f"{found_bytes} B"
    return wanted, found


def _out_of_use(node: NodeView) -> str:
    """Return the GPUs that would count if they could be read, for the end of a sentence."""
    return f"; {describe_missing(node.missing)}" if node.missing else ""


def _in_part(sentences: list[str]) -> str:
    """Return the first few of many sentences, and how many more there are."""
    more = f"; {len(sentences) - _SENTENCES_MAX} more" if len(sentences) > _SENTENCES_MAX else ""
    return "; ".join(sentences[:_SENTENCES_MAX]) + more


def _held_by(gpus: list[GpuView], node: NodeView, now: float) -> str:
    """Return who holds what is not free, and what cannot be used, for the end of a sentence."""
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
        parts.append(_in_part(cordons))
    in_mig_mode = [f"GPU {gpu.gpu.index}" for gpu in gpus if gpu.gpu.mig_enabled]
    if in_mig_mode:
        parts.append(f"MIG mode: {', '.join(in_mig_mode)}")
    if node.missing:
        parts.append(describe_missing(node.missing))
    unread = [f"GPU {gpu.gpu.index}" for gpu in gpus if not gpu.is_read and gpu.missing is None]
    if unread:
        parts.append(f"the newest reading of {', '.join(unread)} failed")
    unknown = [f"GPU {gpu.gpu.index}" for gpu in gpus if gpu.is_read and not gpu.processes_known]
    if unknown:
        parts.append(f"the processes on {', '.join(unknown)} are not known yet")
    return ": " + "; ".join(parts) if parts else ""
