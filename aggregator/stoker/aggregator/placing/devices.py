"""Which GPUs, which share or which MIG device of a node a request gets."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import (
    Device,
    MigDevice,
    Request,
)
from stoker.aggregator.placing.filters import (
    has_room,
    matches_gpu,
    matching_gpus,
    share_bytes_of,
)
from stoker.aggregator.placing.mig_growth import growth
from stoker.aggregator.placing.mig_parts import free_mig, mig_slices
from stoker.aggregator.placing.topology import best_set, satisfies
from stoker.aggregator.views import FleetView, GpuView, NodeView

NO_HINT: Sequence[str] = ()

_NOWHERE: Mapping[str, int] = {}


def choose(
    request: Request,
    node: NodeView,
    view: FleetView,
    prefer: Sequence[str] = NO_HINT,
    model: str | None = None,
) -> tuple[Device, ...] | None:
    """Return what the request gets of this node, in PCI order; None: its GPUs do not have it.

    Only the GPUs are looked at: whether the node may be used at all is the filters' to say, and of
    a node that they let pass this is never None. A request for no GPUs gets none.

    `prefer` are UUIDs of GPUs, the best first, for shares and MIG devices: the choice of a policy,
    which gives way to the request's own preferences. With `model` only GPUs of that model, by the
    driver's name; otherwise, if the request leaves a choice, of the model with fewest left free.
    """
    if request.gpus == 0:
        return ()
    if request.mig_profile is not None:
        return _choose_mig_devices(request, node, prefer, model)
    if request.is_share:
        return _choose_share(request, node, prefer, model)
    return _choose_whole(request, node, model)


def gpus_for_part(request: Request, node: NodeView, model: str | None = None) -> list[GpuView]:
    """Return the GPUs that could give the share, or a MIG device as it is asked for."""
    gpus = [gpu for gpu in matching_gpus(request, node) if model is None or gpu.gpu.model == model]
    if request.mig_profile is not None:
        return [gpu for gpu in gpus if free_mig(request, gpu, node)]
    return [gpu for gpu in gpus if has_room(request, gpu, node)]


def gpus_of_service(request: Request, node: NodeView) -> Mapping[str, int]:
    """Return how often the request's own service is on each GPU of the node that has it."""
    counts: dict[str, int] = {}
    if request.service is not None:
        for uuid in node.services.get(request.service, ()):
            counts[uuid] = counts.get(uuid, 0) + 1
    return counts


# --- whole GPUs


def _choose_whole(request: Request, node: NodeView, model: str | None) -> tuple[Device, ...] | None:
    is_any_kind = matching_gpus(request, node) is node.gpus
    free_by_model: dict[str, list[int]] = {}
    for place, gpu in enumerate(node.gpus):
        if not gpu.is_free or (model is not None and gpu.gpu.model != model):
            continue
        if is_any_kind or matches_gpu(request, gpu.gpu):
            free_by_model.setdefault(gpu.gpu.model, []).append(place)
    best: tuple[tuple[bool, bool, int, str], tuple[int, ...]] | None = None
    for name, free in free_by_model.items():
        if len(free) < request.gpus:
            continue
        chosen, is_preferred = _best_of_model(request, node, free)
        lies = satisfies([node.gpus[place].gpu for place in chosen], request.gpu_topology)
        if request.gpu_topology_required and not lies:
            continue
        key = (not is_preferred, not lies, len(free), name)
        best = (key, chosen) if best is None or key < best[0] else best
    if best is None:
        return None
    return tuple(_whole(node.gpus[place]) for place in best[1])


def _best_of_model(
    request: Request, node: NodeView, free: list[int]
) -> tuple[tuple[int, ...], bool]:
    """Return the best set of these free GPUs, and whether it has the preferred one."""
    gpus = [gpu.gpu for gpu in node.gpus]
    wanted, topology = request.gpus, request.gpu_topology
    preferred = request.preferred_gpu_uuid
    if preferred is not None:
        must = next((place for place in free if gpus[place].uuid == preferred), None)
        if must is not None:
            chosen = best_set(gpus, free, wanted, topology, must)
            # Named GPU first, then how they lie, unless that is a condition.
            if not request.gpu_topology_required or satisfies(
                [gpus[place] for place in chosen], topology
            ):
                return chosen, True
    return best_set(gpus, free, wanted, topology), False


def _whole(gpu: GpuView) -> Device:
    facts = gpu.gpu
    return Device(facts.uuid, facts.model, facts.index, facts.memory_total_bytes, exclusive=True)


# --- shares


def _choose_share(
    request: Request, node: NodeView, prefer: Sequence[str], model: str | None
) -> tuple[Device, ...] | None:
    """Return the share of the GPU where it is liked best, and among equals leaves least over.

    One that is shared already goes before one that is whole.
    """
    fitting = gpus_for_part(request, node, model)
    if not fitting:
        return None
    liking = _Liking(request, node, prefer)

    def order(gpu: GpuView) -> tuple[int | bool, ...]:
        room = gpu.room_bytes - share_bytes_of(request, gpu)
        return (*liking.of(gpu), gpu.is_free, room, gpu.compute_free_milli, gpu.gpu.index)

    chosen = min(fitting, key=order)
    facts = chosen.gpu
    return (
        Device(
            facts.uuid,
            facts.model,
            facts.index,
            share_bytes_of(request, chosen),
            exclusive=False,
            compute_milli=request.compute_milli,
        ),
    )


class _Liking:
    """How much a GPU is liked for a part of it, beside how well the part fits; least is best.

    The GPU that the request names, then few of its own service, then the policy's choice.
    """

    def __init__(self, request: Request, node: NodeView, prefer: Sequence[str]) -> None:
        self._preferred = request.preferred_gpu_uuid
        self._own = gpus_of_service(request, node) if request.spread == "gpu" else _NOWHERE
        self._ranks = {uuid: rank for rank, uuid in enumerate(prefer)}

    def of(self, gpu: GpuView) -> tuple[bool, int, int]:
        uuid = gpu.gpu.uuid
        is_other = uuid != self._preferred
        return is_other, self._own.get(uuid, 0), self._ranks.get(uuid, len(self._ranks))


# --- MIG devices


def _choose_mig_devices(
    request: Request, node: NodeView, prefer: Sequence[str], model: str | None
) -> tuple[Device, ...] | None:
    """Return the smallest MIG devices that will do, where the least worth of other places is lost.

    A card that nobody uses can be cut anew, so it is the last to be begun; the same holds for a
    GPU instance of which no compute instance is used yet. Among equals goes first the GPU that has
    least left to give. Several come from as few cards as that gives, all of one model.
    """
    fitting = gpus_for_part(request, node, model)
    by_model: dict[str, list[GpuView]] = {}
    for gpu in fitting:
        by_model.setdefault(gpu.gpu.model, []).append(gpu)
    enough = {
        id(gpu)
        for gpus in by_model.values()
        if sum(len(free_mig(request, gpu, node)) for gpu in gpus) >= request.gpus
        for gpu in gpus
    }
    left = [gpu for gpu in fitting if id(gpu) in enough]
    liking = _Liking(request, node, prefer)
    taken: dict[str, Device] = {}
    while len(taken) < request.gpus:
        found = _best_mig_device(request, node, left, liking, taken)
        if found is None:
            return None
        gpu, device = found
        taken[device.uuid] = _part(gpu, device)
        left = [each for each in left if each.gpu.model == gpu.gpu.model]
    return tuple(sorted(taken.values(), key=lambda each: each.index))


def _best_mig_device(
    request: Request,
    node: NodeView,
    gpus: Sequence[GpuView],
    liking: "_Liking",
    taken: Mapping[str, Device],
) -> tuple[GpuView, MigDevice] | None:
    """Return the best device of these GPUs beside those that are `taken` already."""
    best: tuple[tuple[float, ...], GpuView, MigDevice] | None = None
    used = {device.uuid for device in taken.values()}
    for gpu in gpus:
        free = [each for each in gpu.mig_free if each.uuid not in taken]
        is_idle = not (gpu.claims or gpu.foreign or gpu.assigned or gpu.gpu.uuid in used)
        ranks = (*liking.of(gpu), is_idle, _memory_left(free), gpu.gpu.index)
        for device in free_mig(request, gpu, node):
            if device.uuid in taken:
                continue
            siblings = sum(each.gpu_instance_id == device.gpu_instance_id for each in free)
            key = (
                *ranks[:3],
                device.memory_total_bytes,
                mig_slices(device.profile),
                growth(gpu, device, taken),
                *ranks[3:5],
                siblings,
                ranks[5],
                device.gpu_instance_id,
                device.compute_instance_id,
            )
            best = (key, gpu, device) if best is None or key < best[0] else best
    return None if best is None else best[1:]


def _part(gpu: GpuView, device: MigDevice) -> Device:
    facts = gpu.gpu
    return Device(
        facts.uuid,
        facts.model,
        facts.index,
        device.memory_total_bytes,
        exclusive=False,
        mig_device_uuid=device.uuid,
        mig_profile=device.profile,
    )


def _memory_left(free: Sequence[MigDevice]) -> int:
    """Return the memory of the card's GPU instances that have a free MIG device."""
    by_instance = {each.gpu_instance_id: each.memory_total_bytes for each in free}
    return sum(by_instance.values())
