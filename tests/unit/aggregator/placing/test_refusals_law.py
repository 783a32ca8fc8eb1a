"""A refusal never names a node that would fit, and none that would not is left out.

What fits is worked out here by going through all sets of devices, from the words of the request.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from hypothesis import HealthCheck, given, settings
from tests.unit.aggregator.placing.small_fleets import Case, cases

from stoker.aggregator.admission import objection
from stoker.aggregator.model import (
    COMPUTE_MILLI,
    MIG_ANY,
    AllocationState,
    Device,
    GpuTopology,
    Placement,
    Plan,
    Request,
)
from stoker.aggregator.placing.filters import could_ever_fit, fits, refuse
from stoker.aggregator.placing.place import explain, find_place, place
from stoker.aggregator.queueing import kept_for
from stoker.aggregator.views import FleetView, GpuView, NodeView
from stoker.core.model_names import names_match

LAW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(".")) if text else ()


def is_asked_kind(request: Request, gpu: GpuView) -> bool:
    facts = gpu.gpu
    return (
        (not request.models or any(names_match(each, facts.model) for each in request.models))
        and facts.memory_total_bytes >= request.gpu_memory_min_bytes
        and numbers(facts.compute_capability) >= (request.compute_capability_min or ())
    )


def others_of_service(request: Request, view: FleetView) -> Iterator[tuple[str, str]]:
    """Yield the node and GPU of everything that others of the service hold."""
    holding = (AllocationState.GRANTED, AllocationState.RELEASING)
    for allocation in view.allocations.values():
        if allocation.request.service == request.service and allocation.state in holding:
            for placement in allocation.placements:
                for device in placement.devices or ():
                    yield placement.node, device.uuid


def is_beside(request: Request, node: NodeView, uuid: str, view: FleetView) -> bool:
    if request.service is None or request.anti_affinity is None:
        return False
    found = list(others_of_service(request, view))
    match request.anti_affinity:
        case "gpu":
            return (node.name, uuid) in found
        case "node":
            return any(name == node.name for name, _ in found)
        case label:
            mine = (node.node.facts.labels or {}).get(label)
            return mine is not None and any(
                (view.nodes[name].node.facts.labels or {}).get(label) == mine for name, _ in found
            )


def lie_as_required(request: Request, gpus: tuple[GpuView, ...]) -> bool:
    if not request.gpu_topology_required:
        return True
    pairs = [(one.gpu, other.gpu) for one, other in combinations(gpus, 2)]
    match request.gpu_topology:
        case GpuTopology.ANY:
            return True
        case GpuTopology.NUMA:
            return all(a.numa_node is not None and a.numa_node == b.numa_node for a, b in pairs)
        case GpuTopology.NVLINK:
            return all(
                (a.nvswitch_links and b.nvswitch_links)
                or (b.uuid in dict(a.nvlink_peers) and a.uuid in dict(b.nvlink_peers))
                for a, b in pairs
            )


def device_sets(request: Request, node: NodeView) -> Iterator[tuple[Device, ...]]:
    gpus = [gpu for gpu in node.gpus if is_asked_kind(request, gpu)]
    if request.is_whole:
        for chosen in combinations(gpus, request.gpus):
            if len({gpu.gpu.model for gpu in chosen}) == 1 and lie_as_required(request, chosen):
                yield tuple(
                    Device(g.gpu.uuid, g.gpu.model, g.gpu.index, g.gpu.memory_total_bytes, True)
                    for g in chosen
                )
        return
    for gpu in gpus:
        facts = gpu.gpu
        if request.is_share:
            size = request.memory_bytes
            if size is None:
                size = facts.memory_total_bytes * (request.compute_milli or 0) // COMPUTE_MILLI
            compute = request.compute_milli
            yield (Device(facts.uuid, facts.model, facts.index, size, False, compute),)
    if request.mig_profile is not None:
        for devices in combinations(mig_devices(request, gpus), request.gpus):
            if len({device.model for device in devices}) == 1:
                yield devices


def mig_devices(request: Request, gpus: list[GpuView]) -> list[Device]:
    """Return the devices of these GPUs that are what was asked for; of all models 7 are a whole."""
    return [
        Device(
            *(gpu.gpu.uuid, gpu.gpu.model, gpu.gpu.index, each.memory_total_bytes, False),
            mig_device_uuid=each.uuid,
        )
        for gpu in gpus
        for each in gpu.gpu.mig_devices
        if request.mig_profile in (MIG_ANY, each.profile)
        and each.memory_total_bytes >= (request.memory_bytes or 0)
        and int(each.profile[0]) * COMPUTE_MILLI >= 7 * (request.compute_milli or 0)
    ]


def fits_in_fact(request: Request, node: NodeView, view: FleetView) -> bool:
    facts = node.node.facts
    labels = facts.labels or {}
    if (
        request.node not in (None, node.name)
        or request.pool not in (None, facts.pool)
        or request.host_boot_id not in (None, facts.boot_id)
        or any(labels.get(name) != each for name, each in (request.node_labels or {}).items())
        or numbers(facts.driver_version) < (request.driver_version_min or ())
        or (request.cpu_milli and request.cpu_milli > (node.cpu_free_milli or 0))
    ):
        return False
    is_gang = request.nodes > 1 and request.same_label_required
    if is_gang and request.same_label is not None and request.same_label not in labels:
        return False
    return any(
        not objection(Plan((Placement(node.name, devices),)), request, view)
        and not any(is_beside(request, node, device.uuid, view) for device in devices)
        for devices in device_sets(request, node)
    )


def gang_fits_in_fact(request: Request, view: FleetView, able: list[str]) -> bool:
    """Whether some nodes of these can host the gang together, on one model."""
    models = {gpu.gpu.model for name in able for gpu in view.nodes[name].gpus}
    for names in combinations(able, request.nodes):
        labels = [view.nodes[name].node.facts.labels or {} for name in names]
        alike = request.same_label if request.same_label_required else None
        if alike is not None and len({each.get(alike) for each in labels}) > 1:
            continue
        apart = request.anti_affinity if request.service is not None else None
        if apart not in (None, "gpu", "node"):
            values = [each[apart] for each in labels if apart in each]
            if len(set(values)) < len(values):
                continue
        for model in models:
            of_model = tuple(
                fits_in_fact(request, narrowed(view.nodes[name], model), view) for name in names
            )
            if all(of_model):
                return True
    return False


def narrowed(node: NodeView, model: str) -> NodeView:
    return replace(node, gpus=tuple(gpu for gpu in node.gpus if gpu.gpu.model == model))


@LAW
@given(cases())
def test_refused_are_those_that_do_not_fit(case: Case) -> None:
    request, view = case.request, case.scene.view()
    for node in view.nodes.values():
        expected = fits_in_fact(request, node, view)
        refusal = refuse(request, node, view)
        assert (refusal is None) == expected, refusal
        assert fits(request, node, view) == expected
        if expected:
            assert could_ever_fit(request, node, view)


@LAW
@given(cases())
def test_an_explanation_names_those_that_do_not_fit_or_are_kept(case: Case) -> None:
    request, view = case.request, case.scene.view()
    blocked = kept_for(case.ahead, view)
    refusals = explain(request, view, blocked)
    refused = {each.node: each.filter for each in refusals.nodes}
    able = [name for name in view.nodes if name not in refused]
    for name, node in view.nodes.items():
        does_fit = fits_in_fact(request, node, view)
        assert (name in able) == (does_fit and name not in blocked)
        assert (refused.get(name) == "queue") == (does_fit and name in blocked)
    found = place(request, view, blocked)
    if request.nodes == 1:
        assert isinstance(found, Plan) == bool(able)
    else:
        assert isinstance(found, Plan) == gang_fits_in_fact(request, view, able)
    assert (find_place(request, view, blocked) is None) == (not isinstance(found, Plan))
    assert refusals.summary
