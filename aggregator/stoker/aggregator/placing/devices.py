"""Which GPUs, which share or which MIG device of a node a request gets."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import (
    Device,
    MigDevice,
    Request,
)
from stoker.aggregator.placing.filters import (
    free_mig,
    has_room,
    matches_gpu,
    matching_gpus,
    share_bytes_of,
)
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
        return _choose_mig_device(request, node, prefer, model)
    if request.is_share:
        return _choose_share(request, node, prefer, model)
    return _choose_whole(request, node, model)


def gpus_for_part(request: Request, node: NodeView, model: str | None = None) -> list[GpuView]:
    """Return the GPUs that could give the share or the MIG device that is asked for."""
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


def _choose_mig_device(
    request: Request, node: NodeView, prefer: Sequence[str], model: str | None
) -> tuple[Device, ...] | None:
    """Return the smallest MIG device that will do, of the GPU that has least left to give.

    A card that nobody uses can be cut anew, so it is the last to be begun; the same holds for a
    GPU instance of which no compute instance is used yet.
    """
    fitting = gpus_for_part(request, node, model)
    liking = _Liking(request, node, prefer)
    best: tuple[tuple[int | bool, ...], GpuView, MigDevice] | None = None
    for gpu in fitting:
        liked = liking.of(gpu)
        left_bytes = _memory_left(gpu)
        for device in free_mig(request, gpu, node):
            siblings = sum(each.gpu_instance_id == device.gpu_instance_id for each in gpu.mig_free)
            key = (
                *liked,
                device.memory_total_bytes,
                mig_slices(device.profile),
                left_bytes,
                siblings,
                gpu.gpu.index,
                device.gpu_instance_id,
                device.compute_instance_id,
            )
            best = (key, gpu, device) if best is None or key < best[0] else best
    if best is None:
        return None
    _, gpu, device = best
    facts = gpu.gpu
    return (
        Device(
            facts.uuid,
            facts.model,
            facts.index,
            device.memory_total_bytes,
            exclusive=False,
            mig_device_uuid=device.uuid,
            mig_profile=device.profile,
        ),
    )


def mig_slices(profile: str) -> int:
    """Return the compute slices of a MIG device: 1 of "1g.10gb", and of "1c.2g.20gb" as well."""
    digits = profile[: len(profile) - len(profile.lstrip("0123456789"))]
    assert digits, f"no MIG profile: {profile!r}"
    return int(digits)


def _memory_left(gpu: GpuView) -> int:
    """Return the memory of the card's GPU instances that have a free MIG device."""
    by_instance = {each.gpu_instance_id: each.memory_total_bytes for each in gpu.mig_free}
    return sum(by_instance.values())
