"""The fleet as partitioning by demand sees it: GPUs that may be cut up, requests that wait.

A GPU is left alone unless everything about it is known and well: its node is fresh and open, the
places of its instances are told, nothing is being done to it. Where it cannot be told who uses
which of its instances, all of them count as used.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping

from stoker.aggregator.cuts import CutGpu, Demand, InstanceUse, Proposal
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.model import COMPUTE_MILLI, MIG_ANY, Allocation, MigDevice, Request
from stoker.aggregator.placing import node_filters as of_node
from stoker.aggregator.placing.filters import FILTERS_OF_NODES, matching_gpus
from stoker.aggregator.verdicts import Condition, Verdict
from stoker.aggregator.views import FleetView, GpuView, NodeView
from stoker.core.mig.boards import board_of
from stoker.core.mig.geometry import Layout, MigState, Placed
from stoker.core.mig.layouts import instance_id

# What else was declared is somebody's business: it failed, or it is being done.
_SETTLED = (None, MigState.SUCCESS)


def cut_gpus(
    view: FleetView, conditions: Mapping[str, Condition], pools: Collection[str]
) -> tuple[CutGpu, ...]:
    """Return the GPUs of these pools that may be cut up; `conditions` are by UUID."""
    found: list[CutGpu] = []
    for node in view.nodes.values():
        if node.node.facts.pool not in pools or not _is_open(node, view):
            continue
        for gpu in node.gpus:
            condition = conditions.get(gpu.gpu.uuid)
            if condition is None or condition.verdict is not Verdict.UNHEALTHY:
                cut = _cut_gpu(node, gpu)
                if cut is not None:
                    found.append(cut)
    return tuple(found)


def demands(
    queue: Iterable[Allocation], view: FleetView, slices: int, but: Collection[str] = ()
) -> tuple[Demand, ...]:
    """Return what waits for MIG devices, or for whole GPUs of one node, in the queue's order.

    `slices`: the compute slices of a whole board. Without those in `but`, for which something is
    being done already.
    """
    found: list[Demand] = []
    for waiting in queue:
        request = waiting.request
        is_about_us = request.mig_profile is not None or (request.is_whole and request.gpus > 0)
        if waiting.id in but or not is_about_us or request.nodes > 1:
            continue
        nodes = frozenset(
            name for name, node in view.nodes.items() if _could_host(request, node, view)
        )
        if request.mig_profile is None:
            demand = Demand(
                waiting.id,
                request.holder,
                waiting.requested_at,
                whole_gpus=request.gpus,
                nodes=nodes,
            )
        else:
            demand = Demand(
                waiting.id,
                request.holder,
                waiting.requested_at,
                profile="" if request.mig_profile == MIG_ANY else request.mig_profile,
                memory_bytes_min=request.memory_bytes or 0,
                compute_slices_min=-(-(request.compute_milli or 0) * slices // COMPUTE_MILLI),
                count=request.gpus,
                nodes=nodes,
            )
        found.append(demand)
    return tuple(found)


def operation_of(proposal: Proposal, mig: GpuMig) -> str:
    """Return the id of the operation that does it, on a GPU of which that was told last.

    The same proposal on the same GPU as it was has the same id, also after a restart, so that it
    is done once; made again after something else was done, it is another.
    """
    told = (proposal.node, proposal.gpu_uuid, proposal.wanted, proposal.layout)
    based_on = (mig.operation_id, mig.layout)
    digest = hashlib.sha256(repr((told, based_on)).encode()).hexdigest()
    return f"by-demand-{digest[:24]}"


def _is_open(node: NodeView, view: FleetView) -> bool:
    is_fresh = view.now <= view.fresh_until.get(node.name, float("-inf"))
    is_known = not node.problem and not node.assignments_unknown
    return node.connected and node.node.cordoned is None and is_fresh and is_known


def _could_host(request: Request, node: NodeView, view: FleetView) -> bool:
    """Whether nothing but GPUs is in the way."""
    filters = (*FILTERS_OF_NODES, of_node.free_cpu, of_node.free_host_memory)
    return (
        all(a_filter(request, node) is None for a_filter in filters)
        and of_node.same_node(request, node, view) is None
        and bool(matching_gpus(request, node))
    )


def _cut_gpu(node: NodeView, gpu: GpuView) -> CutGpu | None:
    mig, facts = gpu.mig, gpu.gpu
    is_sound = gpu.is_read and gpu.processes_known and not gpu.strays and gpu.cordon is None
    if mig is None or not is_sound or gpu.missing is not None or mig.is_withheld:
        return None
    if mig.layout is None or mig.state not in _SETTLED:
        return None
    if mig.geometry is None or mig.geometry.memory_slices == 0:  # where instances lie is not told
        return None
    if facts.mig_enabled is None or any(not each.mig_device_uuid for each in gpu.assigned):
        return None
    board = board_of(0, facts.model)
    return CutGpu(
        node=node.name,
        uuid=facts.uuid,
        index=facts.index,
        pool=node.node.facts.pool,
        geometry=mig.geometry,
        is_enabled=facts.mig_enabled,
        toggles_at_once=board is not None and board.is_toggled_at_once,
        instances=_instances(gpu, mig) if facts.mig_enabled else (),
        is_free=_is_free(gpu),
        changed_at=mig.changed_at,
    )


def _is_free(gpu: GpuView) -> bool:
    """Whether nobody has it but by its instances."""
    if not gpu.gpu.mig_enabled:
        return gpu.is_free
    return all(claim.mig_device_uuid for claim in gpu.claims) and all(
        process.gpu_instance_id is not None for process in gpu.foreign
    )


def _instances(gpu: GpuView, mig: GpuMig) -> tuple[InstanceUse, ...]:
    """Return its instances and who uses them."""
    layout = mig.layout or ()
    places = _places(gpu, mig, layout)
    if places is None:
        # What is listed and what is told do not fit to each other; soon they will.
        return tuple(InstanceUse(placed, is_foreign=True) for placed in layout)
    devices = {device.uuid: device for device in gpu.gpu.mig_devices}
    users: dict[Placed, set[str]] = {}
    for claim in gpu.claims:
        device = devices.get(claim.mig_device_uuid)
        if device is None:  # it was cut away under its holder
            return tuple(InstanceUse(placed, is_foreign=True) for placed in layout)
        users.setdefault(places[device.gpu_instance_id], set()).add(claim.allocation_id)
    busy = {process.gpu_instance_id for process in gpu.foreign}
    handed_out = (devices.get(each.mig_device_uuid) for each in gpu.assigned)
    busy.update(each.gpu_instance_id for each in handed_out if each is not None)
    foreign = {placed for id_, placed in places.items() if id_ in busy}
    return tuple(
        InstanceUse(placed, tuple(sorted(users.get(placed, ()))), placed in foreign)
        for placed in layout
    )


def _places(gpu: GpuView, mig: GpuMig, layout: Layout) -> Mapping[int, Placed] | None:
    """Return the place of each GPU instance by its ID; None: the two do not fit to each other."""
    assert mig.geometry is not None, f"{gpu.gpu.uuid}: what it can be cut into is not told"
    places = {instance_id(mig.geometry, each.size, each.start): each for each in layout}
    of_devices = {each.gpu_instance_id: each for each in gpu.gpu.mig_devices}
    if len(places) < len(layout) or places.keys() != of_devices.keys():
        return None
    if any(_profile(device) != places[id_].profile for id_, device in of_devices.items()):
        return None
    return places


def _profile(device: MigDevice) -> str:
    """Return the profile of its GPU instance: "2g.20gb" of "1c.2g.20gb"."""
    slices, _, rest = device.profile.partition(".")
    return rest if slices.endswith("c") else device.profile
