"""Whether a node can host a request, and if not, which filter says no and what it found.

Of a gang a node is asked for one part. What no waiting mends is looked at first, so that the reason
that a person reads is the one that stays.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from stoker.aggregator.model import (
    Gpu,
    Refusal,
    Request,
)
from stoker.aggregator.placing import node_filters as of_node
from stoker.aggregator.placing.holders import held_by, out_of_use
from stoker.aggregator.placing.joined import largest_set
from stoker.aggregator.placing.mig_parts import (
    closed_mig,
    count_free_mig,
    count_mig,
    mig_in_use,
    no_mig,
)
from stoker.aggregator.placing.node_filters import in_part, told_apart
from stoker.aggregator.placing.parts import anti_affinity_label, taken_values
from stoker.aggregator.placing.wanted import each_node, lying, mig_device, on_one_node, percent
from stoker.aggregator.views import (
    FleetView,
    GpuView,
    NodeView,
    describe_cordon,
    describe_withheld,
    name_some,
)
from stoker.core.model_names import names_match
from stoker.core.units import format_bytes


def refuse(
    request: Request, node: NodeView, view: FleetView, taken: Mapping[str, str] | None = None
) -> Refusal | None:
    """Return the first filter's refusal, or None when the node can host (a part of) the request.

    `taken` is what `taken_values` gives, for a caller that asks about many nodes.
    """
    if fits(request, node, view, taken):
        return None
    refusal = refuse_lasting(request, node, view) or refuse_now(request, node, view, taken)
    assert refusal is not None, f"{node.name} does not fit {request}, and no filter says why"
    return refusal


def fits(
    request: Request, node: NodeView, view: FleetView, taken: Mapping[str, str] | None = None
) -> bool:
    """Whether no filter refuses; what is free of a node says the most about it.

    A GPU that is free is none that is out of use, cordoned, or in MIG mode, so that those filters
    need not be asked.
    """
    fresh_until = view.fresh_until.get(node.name)
    return (
        node.node.cordoned is None
        and not node.problem
        and fresh_until is not None
        and view.now <= fresh_until
        and _has_free(request, node)
        and all(a_filter(request, node) is None for a_filter in FILTERS_OF_NODES)
        and of_node.free_cpu(request, node) is None
        and of_node.free_host_memory(request, node) is None
        and (request.anti_affinity is None or _beside(request, node, view, taken) is None)
        and (not request.gpu_topology_required or _topology_free(request, node, view) is None)
    )


def refuse_now(
    request: Request, node: NodeView, view: FleetView, taken: Mapping[str, str] | None = None
) -> Refusal | None:
    """Return the first refusal that may pass by itself."""
    return (
        of_node.cordon(request, node)
        or of_node.problem(request, node)
        or of_node.freshness(node, view)
        or (_beside(request, node, view, taken) if request.anti_affinity is not None else None)
        or _free(request, node, view)
        or (_topology_free(request, node, view) if request.gpu_topology_required else None)
        or of_node.free_cpu(request, node)
        or of_node.free_host_memory(request, node)
    )


def refuse_lasting(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    """Return the first refusal that stays until somebody changes the fleet or the request.

    Nobody waits for a GPU that is out of use, cordoned by itself or withheld until it is
    partitioned, or for a MIG device that does not exist: it may take a person to bring it.
    """
    for a_filter in LASTING_FILTERS:
        refusal = a_filter(request, node)
        if refusal is not None:
            return refusal
    return _gpus_closed(request, node, view) or (
        _topology_total(request, node) if request.gpu_topology_required else None
    )


def could_ever_fit(request: Request, node: NodeView, view: FleetView) -> bool:
    """Whether the node would host (a part of) the request once free, fresh and uncordoned."""
    return refuse_lasting(request, node, view) is None


# --- what fits on a GPU


def matches_gpu(request: Request, gpu: Gpu) -> bool:
    """Whether it is a GPU of the kind that was asked for: model, memory, compute capability."""
    return (
        _is_asked(request, gpu.model)
        and gpu.memory_total_bytes >= request.gpu_memory_min_bytes
        and _is_capable(request, gpu)
    )


def matching_gpus(request: Request, node: NodeView) -> Sequence[GpuView]:
    """Return the node's GPUs of the kind that was asked for."""
    if _takes_any_kind(request):
        return node.gpus
    if not request.gpu_memory_min_bytes and request.compute_capability_min is None:
        # Most nodes have one model, whose name decides for all.
        asked = [model for model in node.free_by_model if _is_asked(request, model)]
        if len(asked) == len(node.free_by_model):
            return node.gpus
        return [gpu for gpu in node.gpus if gpu.gpu.model in asked] if asked else ()
    return [gpu for gpu in node.gpus if matches_gpu(request, gpu.gpu)]


def free_gpus(request: Request, node: NodeView) -> list[GpuView]:
    """Return the node's GPUs of the kind that was asked for which could be taken whole."""
    return [gpu for gpu in matching_gpus(request, node) if gpu.is_free]


def share_bytes_of(request: Request, gpu: GpuView) -> int:
    """Return the bytes that a share takes of the GPU.

    A part of the compute takes the same part of what the driver leaves: of all the memory, two
    halves would not fit on one card.
    """
    return request.share_bytes(gpu.usable_bytes)


def has_room(request: Request, gpu: GpuView, node: NodeView) -> bool:
    """Whether the share fits on the GPU now; whether the GPU is of the right kind is not asked."""
    return (
        gpu.room_bytes > 0
        and gpu.room_bytes >= share_bytes_of(request, gpu)
        and gpu.compute_free_milli >= (request.compute_milli or 0)
        and not of_node.is_beside(request, gpu, node)
    )


# --- which GPUs there are


def _asked_gpus(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node that has no GPU of the kind; the first quality that none has is told."""
    if request.gpus == 0 or _takes_any_kind(request):
        return None
    models = node.free_by_model
    if request.models and not any(_is_asked(request, model) for model in models):
        wanted = " or ".join(request.models)
        found = ", ".join(sorted(models)) or "no GPUs"
        return Refusal(node.name, "model", f"wanted {wanted}, it has {found}", wanted, found)
    of_model = [gpu.gpu for gpu in node.gpus if _is_asked(request, gpu.gpu.model)]
    least = request.gpu_memory_min_bytes
    large = [gpu for gpu in of_model if gpu.memory_total_bytes >= least]
    if not large:
        largest = max(gpu.memory_total_bytes for gpu in of_model)
        shown = told_apart(least, largest)
        reason = f"wanted a GPU with at least {shown[0]}, its largest has {shown[1]}"
        return Refusal(node.name, "gpu_memory", reason, str(least), str(largest))
    if any(_is_capable(request, gpu) for gpu in large) or request.compute_capability_min is None:
        return None
    wanted = "{}.{}".format(*request.compute_capability_min)
    found = ", ".join(sorted({gpu.compute_capability or "not known" for gpu in large}))
    reason = f"wanted compute capability {wanted} or more, it has {found}"
    return Refusal(node.name, "compute_capability", reason, wanted, found)


def _total_size(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node that has too few GPUs, too small ones, or no MIG device of the profile."""
    if request.gpus == 0:
        return None
    gpus = [gpu for gpu in matching_gpus(request, node) if gpu.missing is None]
    if request.mig_profile is not None:
        enough = count_mig(request, gpus) >= request.gpus
        return None if enough else no_mig(request, node, gpus)
    if _could_ever(request, gpus):
        return None
    if request.is_share:
        wanted_bytes, largest = _nearest(request, gpus)
        wanted, found = told_apart(wanted_bytes, largest)
        reason = f"wanted {wanted} of one GPU, its largest has {found} beyond what the driver keeps"
        reason += out_of_use(node)
        return Refusal(node.name, "memory_total", reason, str(wanted_bytes), str(largest))
    counts = Counter(gpu.gpu.model for gpu in gpus)
    if len(counts) > 1:
        has = ", ".join(f"{count} x {model}" for model, count in sorted(counts.items()))
        reason = f"wanted {each_node(request)}, all of one model, on one node, it has {has}"
    else:
        has = f"{len(gpus)} of {node.gpus_total} GPUs" if node.missing else str(len(gpus))
        reason = f"wanted {each_node(request)} on one node, it has {has}"
    found = str(_most_of_one_model(gpus))
    return Refusal(node.name, "gpus_total", reason + out_of_use(node), str(request.gpus), found)


def _mig_mode(request: Request, node: NodeView) -> Refusal | None:
    """Refuse where cards in MIG mode, which give nothing but their devices, are needed whole."""
    if request.gpus == 0 or request.mig_profile is not None:
        return None
    gpus = [gpu for gpu in matching_gpus(request, node) if gpu.missing is None]
    in_mode = [gpu for gpu in gpus if gpu.gpu.mig_enabled]
    left = [gpu for gpu in gpus if not gpu.gpu.mig_enabled]
    if not in_mode or _could_ever(request, left):
        return None
    names = name_some([f"GPU {gpu.gpu.index}" for gpu in in_mode])
    wanted, found, told = _sizes(request, left, "not in MIG mode")
    reason = f"wanted {on_one_node(request)}, {told}: MIG mode is on at {names}"
    return Refusal(node.name, "mig_mode", reason, wanted, found)


def _gpus_closed(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    """Refuse where GPUs that are cordoned one by one, or withheld, make it too few or too small."""
    if not (node.cordoned_gpus or node.withheld_gpus) or request.gpus == 0:
        return None
    gpus = _usable_ever(request, node)
    uncordoned = [gpu for gpu in gpus if gpu.cordon is None]
    if node.cordoned_gpus and not _would_do(request, uncordoned):
        cordons = [describe_cordon(gpu, view.now) for gpu in gpus if gpu.cordon is not None]
        return _closed(request, node, "gpus_cordoned", uncordoned, len(gpus), cordons)
    in_use = [gpu for gpu in uncordoned if not gpu.is_withheld]
    if not node.withheld_gpus or _would_do(request, in_use):
        return None
    told = [describe_withheld(gpu) for gpu in uncordoned if gpu.is_withheld]
    return _closed(request, node, "mig_withheld", in_use, len(gpus), told)


def _closed(
    request: Request,
    node: NodeView,
    name: str,
    left: Sequence[GpuView],
    of: int,
    reasons: Sequence[str],
) -> Refusal:
    """Refuse because only those that are `left` of so many GPUs are open to new allocations."""
    is_cordoned = name == "gpus_cordoned"
    if request.mig_profile is not None:
        has = count_mig(request, left)
        told = closed_mig(has, "cordoned" if is_cordoned else "withheld")
        reason = f"wanted {request.described()}, {told}: {in_part(reasons)}"
        return Refusal(node.name, name, reason, mig_device(request), str(has))
    how = "not cordoned" if is_cordoned else "not withheld"
    wanted, found, told = _sizes(request, left, how, of)
    reason = f"wanted {on_one_node(request)}, {told}: {in_part(reasons)}"
    return Refusal(node.name, name, reason, wanted, found)


def _topology_total(request: Request, node: NodeView) -> Refusal | None:
    if request.gpus < 2:
        return None
    usable = _usable_ever(request, node)
    gpus = [gpu for gpu in usable if gpu.cordon is None and not gpu.is_withheld]
    most = largest_set([gpu.gpu for gpu in gpus], request.gpu_topology)
    if most >= request.gpus:
        return None
    reason = f"wanted {each_node(request)} {lying(request)}, at most {most} of its {len(gpus)} are"
    return Refusal(node.name, "topology_total", reason, str(request.gpus), str(most))


# --- what is free of them


def _beside(
    request: Request, node: NodeView, view: FleetView, taken: Mapping[str, str] | None
) -> Refusal | None:
    if request.anti_affinity == "node":
        return of_node.same_node(request, node, view)
    if anti_affinity_label(request) is None:
        return None
    known = taken_values(request, view) if taken is None else taken
    return of_node.same_label_value(request, node, known)


def _has_free(request: Request, node: NodeView) -> bool:
    if request.is_whole:
        return count_free(request, node) >= request.gpus
    gpus = matching_gpus(request, node)
    if request.mig_profile is not None:
        return count_free_mig(request, gpus, node) >= request.gpus
    return any(has_room(request, gpu, node) for gpu in gpus)


def _free(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if _has_free(request, node):
        return None
    if request.mig_profile is not None:
        return _free_mig(request, node, view)
    if request.is_share:
        return _free_share(request, node, view)
    return _free_whole(request, node, view)


def _free_whole(request: Request, node: NodeView, view: FleetView) -> Refusal:
    free = count_free(request, node)
    gpus = matching_gpus(request, node)
    alike = ", all of one model," if len({gpu.gpu.model for gpu in gpus}) > 1 else ""
    reason = f"wanted {each_node(request)}{alike} free on one node, {free} of {len(gpus)} are"
    reason += held_by([gpu for gpu in gpus if not gpu.is_free], node, view.now)
    return Refusal(node.name, "gpus_free", reason, str(request.gpus), str(free))


def count_free(request: Request, node: NodeView) -> int:
    """Return how many GPUs of one model and of the kind that was asked for are free."""
    if _takes_any_kind(request):
        return max(node.free_by_model.values(), default=0)
    if request.gpu_memory_min_bytes or request.compute_capability_min is not None:
        return _most_of_one_model(free_gpus(request, node))
    return max(
        (count for name, count in node.free_by_model.items() if _is_asked(request, name)),
        default=0,
    )


def _free_share(request: Request, node: NodeView, view: FleetView) -> Refusal:
    gpus = matching_gpus(request, node)
    fitting = [gpu for gpu in gpus if 0 < gpu.room_bytes >= share_bytes_of(request, gpu)]
    if not fitting:
        roomiest = max(gpus, key=lambda gpu: gpu.room_bytes)
        wanted_bytes = share_bytes_of(request, roomiest)
        wanted, found = told_apart(wanted_bytes, roomiest.room_bytes)
        reason = f"wanted {wanted} of one GPU, at most {found} is free on one"
        reason += held_by(gpus, node, view.now)
        return Refusal(
            node.name, "memory_free", reason, str(wanted_bytes), str(roomiest.room_bytes)
        )
    most = max(gpu.compute_free_milli for gpu in fitting)
    wanted_milli = request.compute_milli or 0
    if most < wanted_milli:
        reason = (
            f"wanted {percent(wanted_milli)} of the compute of one GPU, at most "
            f"{percent(most)} is not promised on one with the memory"
        )
        reason += held_by(fitting, node, view.now)
        return Refusal(node.name, "compute_free", reason, str(wanted_milli), str(most))
    return _beside_on_gpu(request, node, view, fitting)


def _free_mig(request: Request, node: NodeView, view: FleetView) -> Refusal:
    gpus = matching_gpus(request, node)
    having = [gpu for gpu in gpus if gpu.missing is None and count_mig(request, [gpu])]
    anywhere = replace(request, anti_affinity=None)
    if count_free_mig(anywhere, having, node) >= request.gpus:
        return _beside_on_gpu(request, node, view, having)
    return mig_in_use(request, node, having, view.now)


def _beside_on_gpu(
    request: Request, node: NodeView, view: FleetView, gpus: Iterable[GpuView]
) -> Refusal:
    """Refuse because only GPUs that others of the service hold have the room."""
    service = request.service
    assert service is not None, f"no service, and yet beside it: {request}"
    held = name_some(
        [f"GPU {gpu.gpu.index}" for gpu in gpus if of_node.is_beside(request, gpu, node)]
    )
    other = of_node.allocation_of(service, node, view)
    reason = f"only {held} would have the room, where others of service {service} are: {other}"
    return Refusal(node.name, "anti_affinity", reason, f"a GPU without {service}", other)


def _topology_free(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    if request.gpus < 2:
        return None
    gpus = free_gpus(request, node)
    most = largest_set([gpu.gpu for gpu in gpus], request.gpu_topology)
    if most >= request.gpus:
        return None
    among = f"at most {most} of the {len(gpus)} free ones are"
    reason = f"wanted {each_node(request)} {lying(request)}, {among}"
    taken = [gpu for gpu in matching_gpus(request, node) if not gpu.is_free]
    reason += held_by(taken, node, view.now)
    return Refusal(node.name, "topology_free", reason, str(request.gpus), str(most))


# --- helpers


def _takes_any_kind(request: Request) -> bool:
    return (
        not request.models
        and not request.gpu_memory_min_bytes
        and request.compute_capability_min is None
    )


def _is_asked(request: Request, model: str) -> bool:
    for asked in request.models:
        if names_match(asked, model):
            return True
    return not request.models


def _is_capable(request: Request, gpu: Gpu) -> bool:
    least = request.compute_capability_min
    return least is None or (
        bool(gpu.compute_capability) and of_node.driver_version(gpu.compute_capability) >= least
    )


def _nearest(request: Request, gpus: Sequence[GpuView]) -> tuple[int, int]:
    """Return what a share would take of the largest of these, and what that one has."""
    largest = max(gpus, key=lambda gpu: gpu.usable_bytes, default=None)
    if largest is None:
        return request.memory_bytes or 0, 0
    return share_bytes_of(request, largest), largest.usable_bytes


def _usable_ever(request: Request, node: NodeView) -> list[GpuView]:
    """Return the GPUs of the kind that nobody has to bring back before they can be taken."""
    gpus = (gpu for gpu in matching_gpus(request, node) if gpu.missing is None)
    if request.mig_profile is not None:
        return list(gpus)
    return [gpu for gpu in gpus if not gpu.gpu.mig_enabled]


def _could_ever(request: Request, gpus: Iterable[GpuView]) -> bool:
    """Whether these, if nobody had anything of them, would do for whole GPUs or a share."""
    if request.is_share:
        return any(0 < gpu.usable_bytes >= share_bytes_of(request, gpu) for gpu in gpus)
    return _most_of_one_model(gpus) >= request.gpus


def _would_do(request: Request, gpus: Sequence[GpuView]) -> bool:
    """The same, also for MIG devices."""
    if request.mig_profile is not None:
        return count_mig(request, gpus) >= request.gpus
    return _could_ever(request, gpus)


def _most_of_one_model(gpus: Iterable[GpuView]) -> int:
    return max(Counter(gpu.gpu.model for gpu in gpus).values(), default=0)


def _sizes(
    request: Request, left: Sequence[GpuView], how: str, of: int | None = None
) -> tuple[str, str, str]:
    """Return wanted, found, and how far those that are `how` reach, in a clause."""
    if request.is_share:
        wanted_bytes, largest = _nearest(request, left)
        told = f"the largest that is {how} has {format_bytes(largest)}"
        return str(wanted_bytes), str(largest), told
    found = _most_of_one_model(left)
    among = f" of {of}" if of is not None else ""
    return str(request.gpus), str(found), f"{found}{among} are {how}"


# What stays so until somebody changes the fleet or the request, cheapest first; cordons of single
# GPUs and the topology that a request requires come after these.
FILTERS_OF_NODES: tuple[Callable[[Request, NodeView], Refusal | None], ...] = (
    of_node.asked_node,
    of_node.asked_host,
    of_node.asked_pool,
    of_node.asked_labels,
    of_node.gang_label,
    of_node.asked_driver,
    of_node.total_cpu,
    of_node.total_host_memory,
)
LASTING_FILTERS: tuple[Callable[[Request, NodeView], Refusal | None], ...] = (
    *FILTERS_OF_NODES[:-2],
    _asked_gpus,
    _total_size,
    _mig_mode,
    *FILTERS_OF_NODES[-2:],
)
