"""Fleets that are but supposed: with a node more or less, without a cordon, after a release.

Nothing is granted on them; they answer what would come of a request if the fleet were so.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    DriverState,
    Gpu,
    GpuSample,
    MigDevice,
    Node,
    NodeFacts,
    NodeStatus,
)
from stoker.aggregator.placing.node_filters import driver_version
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.verdicts import Condition
from stoker.aggregator.views import FleetView, GpuView, NodeView, view_node
from stoker.core.gpu_models import MIB, MODELS, GpuModel
from stoker.core.mig.geometry import MigProfile
from stoker.core.model_names import names_match

_HOLDING = (AllocationState.GRANTED, AllocationState.RELEASING)


@dataclass(frozen=True, slots=True)
class AddNodes:
    """So many nodes more, idle and well; `model` is of the fleet or of the catalogue."""

    nodes: int
    gpus: int  # on each
    model: str
    pool: str = ""
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """Without this node."""

    node: str


@dataclass(frozen=True, slots=True)
class Uncordon:
    """Without the cordons of these GPUs of the node, and with `is_node` without its own."""

    node: str
    gpu_uuids: tuple[str, ...] = ()
    is_node: bool = True


@dataclass(frozen=True, slots=True)
class Release:
    """Without these allocations."""

    allocation_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndProcesses:
    """Without the processes on these GPUs that are none of ours."""

    node: str
    gpu_uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Repartition:
    """These GPUs cut into as many devices of one profile as fit; no profile: MIG mode is off."""

    node: str
    gpu_uuids: tuple[str, ...]
    profile: str | None


Supposition = AddNodes | RemoveNode | Uncordon | Release | EndProcesses | Repartition


class UnknownModel(Exception):
    """Neither the fleet nor the catalogue has the model."""


class WhatIf:
    """Supposes changes of one fleet, which is left as it is."""

    def __init__(self, view: FleetView) -> None:
        self.view = view
        self._tenants: dict[str, list[Allocation]] | None = None

    def tenants_of(self, node: str) -> list[Allocation]:
        """Return what the node holds, or has not been seen to let go of."""
        if self._tenants is None:
            self._tenants = {}
            for allocation in self.view.allocations.values():
                if allocation.state in _HOLDING:
                    for name in allocation.nodes:
                        self._tenants.setdefault(name, []).append(allocation)
        return self._tenants.get(node, [])

    def suppose(self, supposition: Supposition) -> FleetView:
        """Return the fleet as it would be. Raises UnknownModel and KeyError (no such node)."""
        match supposition:
            case AddNodes():
                return _with_nodes(self.view, supposition)
            case RemoveNode(name):
                rest = {other: node for other, node in self.view.nodes.items() if other != name}
                return replace(self.view, nodes=rest)
            case Uncordon(name):
                return self._with(name, self.uncordoned(supposition))
            case Release(ids):
                gone = frozenset(ids)
                allocations = (self.view.allocations[id_] for id_ in ids)
                names = dict.fromkeys(name for each in allocations for name in each.nodes)
                nodes = {name: self.node_without(name, gone) for name in names}
                return replace(self.view, nodes={**self.view.nodes, **nodes})
            case EndProcesses(name, uuids):
                return self._with(name, self._without_processes(name, uuids))
            case Repartition(name):
                return self._with(name, self.repartitioned(supposition))
            case _:
                assert_never(supposition)

    def touched(self, supposition: Supposition, supposed: FleetView) -> list[str]:
        """Return the nodes of the supposed fleet that are others than they were, or new."""
        match supposition:
            case AddNodes(count):
                return list(supposed.nodes)[-count:]
            case RemoveNode():
                return []
            case Release(ids):
                nodes = (name for id_ in ids for name in self.view.allocations[id_].nodes)
                return list(dict.fromkeys(nodes))
            case Uncordon(name) | EndProcesses(name) | Repartition(name):
                return [name]
            case _:
                assert_never(supposition)

    def node_without(self, name: str, ids: Iterable[str]) -> NodeView:
        """Return the node without these allocations and their processes."""
        gone = frozenset(ids)
        status = self._status(name)
        held = {id_: each for id_, each in (status.held or {}).items() if id_ not in gone}
        status = replace(status, held=held if status.held is not None else None)
        if status.processes is not None:
            left = tuple(p for p in status.processes.processes if p.allocation_id not in gone)
            status = replace(status, processes=replace(status.processes, processes=left))
        return self._rebuilt(self.view.nodes[name], status, gone=gone)

    def uncordoned(self, lifted: Uncordon) -> NodeView:
        """Return the node without these cordons."""
        before = self.view.nodes[lifted.node]
        node = before.node
        if lifted.is_node:
            node = replace(node, cordoned=None, drain_at=None)
        uuids = frozenset(lifted.gpu_uuids)
        return self._rebuilt(before, self._status(lifted.node), node=node, uncordoned=uuids)

    def repartitioned(self, cut: Repartition) -> NodeView:
        """Return the node with these GPUs cut anew, or whole again."""
        before = self.view.nodes[cut.node]
        facts = before.node.facts
        gpus = tuple(
            _cut(gpu, cut.profile) if gpu.uuid in cut.gpu_uuids else gpu for gpu in facts.gpus
        )
        node = replace(before.node, facts=replace(facts, gpus=gpus))
        return self._rebuilt(before, self._status(cut.node), node=node)

    def _without_processes(self, name: str, uuids: tuple[str, ...]) -> NodeView:
        before = self.view.nodes[name]
        status = self._status(name)
        assert status.processes is not None, f"{name} has told of processes that are none of ours"
        foreign = {id(p) for gpu in before.gpus if gpu.gpu.uuid in uuids for p in gpu.foreign}
        left = tuple(p for p in status.processes.processes if id(p) not in foreign)
        status = replace(status, processes=replace(status.processes, processes=left))
        return self._rebuilt(before, status)

    def _rebuilt(
        self,
        before: NodeView,
        status: NodeStatus,
        node: Node | None = None,
        gone: frozenset[str] = frozenset(),
        uncordoned: frozenset[str] = frozenset(),
    ) -> NodeView:
        claims = {
            gpu.gpu.uuid: tuple(each for each in gpu.claims if each.allocation_id not in gone)
            for gpu in before.gpus
        }
        conditions = {
            gpu.gpu.uuid: Condition(gpu.gpu.uuid, before.name, cordon=gpu.cordon)
            for gpu in before.gpus
            if gpu.cordon is not None and gpu.gpu.uuid not in uncordoned
        }
        tenants = [each for each in self.tenants_of(before.name) if each.id not in gone]
        return view_node(node or before.node, claims, status, conditions, tenants)

    def _status(self, name: str) -> NodeStatus:
        return self.view.statuses.get(name, NodeStatus())

    def _with(self, name: str, node: NodeView) -> FleetView:
        return replace(self.view, nodes={**self.view.nodes, name: node})


def cordoned_gpus(node: NodeView) -> tuple[str, ...]:
    """Return the GPUs of the node that are cordoned one by one."""
    return tuple(gpu.gpu.uuid for gpu in node.gpus if gpu.cordon is not None)


def profiles_of(gpu: Gpu) -> tuple[MigProfile, ...]:
    """Return what the card can be cut into; none where it has no MIG, or nobody knows."""
    if gpu.mig_enabled is None:
        return ()
    model = next((each for each in MODELS.values() if each.driver_name == gpu.model), None)
    return model.mig_profiles if model is not None else ()


@dataclass(frozen=True, slots=True)
class Template:
    """What a new node's GPUs are like."""

    gpu: Gpu
    reserved_bytes: int
    cpu_milli: int | None  # of the host
    host_memory_bytes: int | None


def template_of(view: FleetView, model: str, gpus: int) -> Template:
    """Return what a node with `gpus` of `model` is like: as those of the fleet, else the catalogue.

    Raises UnknownModel.
    """
    known = [
        (node, gpu)
        for node in view.nodes.values()
        for gpu in node.gpus
        if names_match(model, gpu.gpu.model)
    ]
    if known:
        counts = Counter(gpu.gpu.model for _, gpu in known)
        name = min(counts, key=lambda each: (-counts[each], each))
        node, gpu = next(each for each in known if each[1].gpu.model == name)
        return _like(node, gpu)
    for listed in MODELS.values():
        if names_match(model, listed.driver_name):
            return _catalogued(listed, gpus)
    raise UnknownModel(model)


def _like(node: NodeView, gpu: GpuView) -> Template:
    facts = node.node.facts
    # Its links lead to GPUs of that node; through switches, to all beside it.
    idle = None if gpu.gpu.mig_enabled is None else False
    like = replace(gpu.gpu, mig_enabled=idle, mig_devices=(), nvlink_peers=())
    return Template(like, gpu.reserved_bytes, facts.cpu_milli, facts.host_memory_bytes)


def _catalogued(model: GpuModel, gpus: int) -> Template:
    gpu = Gpu(
        uuid="",
        model=model.driver_name,
        index=0,
        memory_total_bytes=model.memory_total_bytes,
        compute_capability="{}.{}".format(*model.compute_capability),
        power_limit_watts=model.power_limit_watts,
        mig_enabled=False if model.has_mig else None,
        nvswitch_links=model.nvlink_count,
    )
    cpus, memory = model.host_cpus * gpus * 1000, model.host_memory_bytes * gpus
    return Template(gpu, model.memory_reserved_bytes, cpus, memory)


def _with_nodes(view: FleetView, add: AddNodes) -> FleetView:
    template = template_of(view, add.model, add.gpus)
    versions = {node.node.facts.driver_version for node in view.nodes.values()}
    newest = max(versions, key=driver_version, default="")
    nodes, statuses = dict(view.nodes), dict(view.statuses)
    fresh_until = dict(view.fresh_until)
    number = 0
    for _ in range(add.nodes):
        number += 1
        while f"new-{number}" in nodes:
            number += 1
        name = f"new-{number}"
        gpus = tuple(_new_gpu(template.gpu, name, index, add.gpus) for index in range(add.gpus))
        facts = NodeFacts(
            name=name,
            incarnation="",
            boot_id="",
            agent_version="",
            simulated=True,
            pool=add.pool,
            labels=dict(add.labels),
            driver_version=newest,
            gpus=gpus,
            cpu_milli=template.cpu_milli,
            host_memory_bytes=template.host_memory_bytes,
        )
        sample = GpuSample(memory_reserved_bytes=template.reserved_bytes)
        statuses[name] = NodeStatus(
            session=1,
            samples={gpu.uuid: sample for gpu in gpus},
            processes=ProcessTable(view.now, ()),
            held={},
            driver=DriverState.READING,
        )
        nodes[name] = view_node(Node(facts, view.now, 0), {}, statuses[name], {})
        fresh_until[name] = view.now
    return replace(view, nodes=nodes, statuses=statuses, fresh_until=fresh_until)


def _new_gpu(like: Gpu, node: str, index: int, gpus: int) -> Gpu:
    return replace(
        like,
        uuid=f"GPU-{node}-{index}",
        index=index,
        number=index + 1,
        numa_node=2 * index // gpus if gpus > 1 else 0,
        pci_bus_id="",
        serial="",
    )


def _cut(gpu: Gpu, profile: str | None) -> Gpu:
    if profile is None:
        return replace(gpu, mig_enabled=False, mig_devices=())
    found = next(each for each in profiles_of(gpu) if each.name == profile)
    devices = tuple(
        MigDevice(f"MIG-{gpu.uuid}-{i}", profile, found.memory_mib * MIB, i, 0)
        for i in range(found.count_max)
    )
    return replace(gpu, mig_enabled=True, mig_devices=devices)
