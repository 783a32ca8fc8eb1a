"""What the fleet could do for a request: lift cordons, cut cards anew, end others' use, grow.

Each change is of one node, but for a release, which takes an allocation from all of its nodes, and
for what is added.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stoker.aggregator.model import MIG_ANY, Allocation, AllocationState, Request
from stoker.aggregator.placing.changes import Change, Situation
from stoker.aggregator.placing.filters import matching_gpus, share_bytes_of
from stoker.aggregator.placing.mig_parts import has_compute
from stoker.aggregator.placing.whatif import (
    AddNodes,
    EndProcesses,
    Release,
    Repartition,
    Uncordon,
    UnknownModel,
    WhatIf,
    profiles_of,
    template_of,
)
from stoker.aggregator.views import GpuView, NodeView, describe_foreign, name_some
from stoker.core.gpu_models import MIB
from stoker.core.units import format_bytes

# What a release may mend.
OF_TENANTS = frozenset(
    (
        *("anti_affinity", "gpus_free", "memory_free", "compute_free", "mig_free"),
        *("topology_free", "cpu_free", "host_memory_free"),
    )
)


def letting_go(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """What has been given up, and its node has yet to let go of: nothing but time is needed."""
    releasing = {
        allocation.id: allocation
        for allocation in s.view.allocations.values()
        if allocation.state is AllocationState.RELEASING
    }
    by_node: dict[str, list[str]] = {}
    for id_, allocation in releasing.items():
        for name in allocation.nodes:
            by_node.setdefault(name, []).append(id_)
    for name, ids in by_node.items():
        summary = f"wait until node {name} has let go of {name_some(ids)}, given up already"
        yield _release("wait", s.request, (len(ids),), name, summary, ids)
    if len(by_node) > 1 and s.request.nodes > 1:
        summary = f"wait until {name_some(list(releasing))}, given up already, are let go of"
        yield _release("wait", s.request, (len(releasing),), "", summary, list(releasing))


def uncordoned(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """Without cordons that operators set."""
    for node in s.view.nodes.values():
        by_operators = _cordoned(s.request, node, by_health=False)
        yield from _uncordoned(s.request, node, by_operators, "uncordon")


def repaired(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """With GPUs well again that are cordoned for their health."""
    for node in s.view.nodes.values():
        ill = _cordoned(s.request, node, by_health=True)
        if ill:
            others = _cordoned(s.request, node, by_health=False)
            yield from _uncordoned(s.request, node, [*others, *ill], "repair", len(others))


def repartitioned(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """With idle cards cut into what is wanted, or whole again."""
    request = s.request
    for node in s.view.nodes.values():
        if node.node.cordoned is not None or node.problem:
            continue
        if request.mig_profile is not None:
            yield from _cut(request, node)
        elif request.gpus > 0:
            idle = [gpu for gpu in matching_gpus(request, node) if _is_idle_in_mig_mode(gpu)]
            for count in range(1, min(len(idle), request.gpus) + 1):
                yield _whole_again(request, node, idle[:count])


def without_processes(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """Without processes that are none of ours: of each GPU, and of the first few of a node."""
    for node in s.view.nodes.values():
        used = [gpu for gpu in matching_gpus(s.request, node) if gpu.foreign]
        sets: dict[tuple[str, ...], list[GpuView]] = {(gpu.gpu.uuid,): [gpu] for gpu in used}
        for count in range(2, len(used) + 1):
            sets[tuple(gpu.gpu.uuid for gpu in used[:count])] = used[:count]
        for uuids, gpus in sets.items():
            names = ", ".join(f"GPU {gpu.gpu.index}" for gpu in gpus)
            processes = [each for gpu in gpus for each in gpu.foreign]
            summary = f"end {describe_foreign(processes)} on {names} of node {node.name}"
            yield Change(
                "end_processes",
                (len(uuids), len(processes)),
                f"{node.name} {names}",
                summary,
                s.request,
                EndProcesses(node.name, uuids),
                node.name,
                uuids,
            )


def added(s: Situation, fleet: WhatIf) -> Iterator[Change]:
    """With new nodes: as few as a gang lacks, and at most all of it."""
    request = s.request
    if request.mig_profile is not None or request.node is not None or request.host_boot_id:
        return
    labels = dict(request.node_labels or {})
    for model in _models(s):
        try:
            template_of(s.view, model, 1)
        except UnknownModel:
            continue
        gpus = _size(s, model)
        for more, able in _groups(s):
            where = tuple({**labels, **more}.items())
            for nodes in range(max(1, request.nodes - able), request.nodes + 1):
                yield _added(request, model, nodes, gpus, where)


Weight = tuple[int, int, int]  # the highest priority, the bytes of GPU memory, how many


@dataclass(frozen=True, slots=True)
class ReleaseSet:
    """Allocations that might be released for a node, and what that costs."""

    ids: tuple[str, ...]  # by name
    weight: Weight

    @property
    def key(self) -> tuple[Weight, tuple[str, ...]]:
        """What orders those of one node, as `Change.key` does what is made of them."""
        return (self.weight, self.ids)


def releasable(s: Situation, fleet: WhatIf, node: NodeView) -> dict[str, tuple[int, int]]:
    """Return what may be asked to go for the request's sake: its priority and bytes by id."""
    return {
        each.id: (each.request.priority, sum(device.memory_bytes for device in each.devices))
        for each in fleet.tenants_of(node.name)
        if each.state is AllocationState.GRANTED and each.request.priority <= s.request.priority
    }


def release_sets(
    s: Situation, node: NodeView, weights: Mapping[str, tuple[int, int]]
) -> list[ReleaseSet]:
    """Return releases that may make room on the node, the cheapest first.

    Of what is releasable: each alone; the first few in the order of priority and size; and all
    that hold any of the first few GPUs, in the order of what it takes to clear them. The cost is
    the highest priority, then the GPU memory that is taken away, then how many lose it.
    """
    order = sorted(weights, key=lambda id_: (weights[id_], id_))
    sets = {frozenset((id_,)) for id_ in order}
    sets.update(frozenset(order[:count]) for count in range(2, len(order) + 1))
    sets.update(_clearing(s.request, node, weights))
    found = [ReleaseSet(tuple(sorted(ids)), _weight(ids, weights)) for ids in sets]
    return sorted(found, key=lambda each: each.key)


def least_weight(
    request: Request, node: NodeView, weights: Mapping[str, tuple[int, int]]
) -> Weight:
    """Return what no release for the node can cost less than."""
    priority = min(priority for priority, _ in weights.values())
    least = min(taken for _, taken in weights.values())
    if request.is_whole and request.gpus > 0:
        gpus = matching_gpus(request, node)
        held = sorted(
            sum(
                gpu.gpu.memory_total_bytes if claim.memory_bytes is None else claim.memory_bytes
                for claim in gpu.claims
            )
            for gpu in gpus
            if gpu.claims
        )
        free = sum(gpu.is_free for gpu in gpus)
        least = max(least, sum(held[: max(0, request.gpus - free)]))
    return (priority, least, 1)


def released(s: Situation, node: NodeView, ids: Sequence[str], weight: tuple[int, ...]) -> Change:
    """Return the change that releases these allocations for the node's sake."""
    allocations = [s.view.allocations[id_] for id_ in ids]
    told = [f"{each.id} ({each.request.holder}, {_holding(each)})" for each in allocations]
    priorities = sorted({each.request.priority for each in allocations})
    of = f"priority {' and '.join(str(each) for each in priorities)}"
    summary = f"release {name_some(told)} of {of}, on node {node.name}"
    name = " ".join((node.name, *ids))
    return _release("release", s.request, weight, name, summary, ids, node.name)


def may_make_room(request: Request, node: NodeView, ids: Collection[str]) -> bool:
    """Whether the node might host the request without these: cheap, and false only if it cannot.

    Only what they hold of its GPUs is counted.
    """
    if request.gpus == 0:
        return True
    gpus = matching_gpus(request, node)
    if request.mig_profile is not None:
        return any(
            gpu.mig_free or any(claim.allocation_id in ids for claim in gpu.claims) for gpu in gpus
        )
    if request.is_share:
        return any(
            gpu.room_bytes >= share_bytes_of(request, gpu)
            or any(claim.allocation_id in ids for claim in gpu.claims)
            for gpu in gpus
        )
    clear = sum(
        gpu.is_free
        or (bool(gpu.claims) and all(claim.allocation_id in ids for claim in gpu.claims))
        for gpu in gpus
    )
    return clear >= request.gpus


# --- helpers


def _cordoned(request: Request, node: NodeView, *, by_health: bool) -> list[GpuView]:
    return [
        gpu
        for gpu in matching_gpus(request, node)
        if gpu.cordon is not None and gpu.cordon.by_health is by_health
    ]


def _uncordoned(
    request: Request, node: NodeView, gpus: Sequence[GpuView], kind: str, least: int = 0
) -> Iterator[Change]:
    """Yield the change without the node's own cordon, and with the first few GPUs' lifted too.

    More than `least` GPUs: the first ones are not of that kind.
    """
    is_node = node.node.cordoned is not None
    begin = least + 1 if least or kind == "repair" else int(not is_node)
    for count in range(begin, len(gpus) + 1):
        chosen = gpus[:count]
        uuids = tuple(gpu.gpu.uuid for gpu in chosen)
        names = ", ".join(f"GPU {gpu.gpu.index}" for gpu in chosen)
        yield Change(
            kind,
            (len(node.gpus) if is_node else 0, count),
            node.name,
            _uncordon_summary(node, chosen, names, kind, is_node=is_node),
            request,
            Uncordon(node.name, uuids, is_node=is_node),
            node.name,
            uuids,
        )


def _uncordon_summary(
    node: NodeView, gpus: Sequence[GpuView], names: str, kind: str, *, is_node: bool
) -> str:
    reasons = [] if node.node.cordoned is None else [node.node.cordoned]
    reasons += dict.fromkeys(gpu.cordon.reason for gpu in gpus if gpu.cordon is not None)
    what = f"node {node.name}" if is_node else ""
    if gpus:
        what = f"{what} and its {names}" if what else f"{names} of node {node.name}"
    why = f" (cordoned: {'; '.join(reasons[:3])})"
    if kind == "repair":
        return f"mend {what}{why}"
    return f"uncordon {what}{why}"


def _is_idle_in_mig_mode(gpu: GpuView) -> bool:
    return bool(gpu.gpu.mig_enabled) and _is_unused(gpu)


def _is_unused(gpu: GpuView) -> bool:
    is_open = gpu.cordon is None and not gpu.is_withheld
    is_sound = gpu.is_read and gpu.processes_known and is_open and not gpu.strays
    return is_sound and not (gpu.claims or gpu.foreign or gpu.assigned)


def _cut(request: Request, node: NodeView) -> Iterator[Change]:
    """Yield the change of the node's first card that will do; one in MIG mode goes first."""
    unused = [gpu for gpu in matching_gpus(request, node) if _is_unused(gpu)]
    unused.sort(key=lambda gpu: not gpu.gpu.mig_enabled)
    for gpu in unused:
        large = [
            each
            for each in profiles_of(gpu.gpu)
            if each.memory_mib * MIB >= (request.memory_bytes or 0)
            and request.mig_profile in (MIG_ANY, each.name)
            and has_compute(request, each.compute_slices, gpu.gpu.model)
        ]
        profile = min(large, key=lambda each: (each.memory_mib, each.name), default=None)
        if profile is None:
            continue
        card = f"GPU {gpu.gpu.index} of node {node.name}, which is idle,"
        mode = "" if gpu.gpu.mig_enabled else " with MIG mode on"
        yield Change(
            "repartition",
            (int(not gpu.gpu.mig_enabled),),
            node.name,
            f"cut {card} into {profile.name}{mode}",
            request,
            Repartition(node.name, (gpu.gpu.uuid,), profile.name),
            node.name,
            (gpu.gpu.uuid,),
        )
        return


def _whole_again(request: Request, node: NodeView, gpus: Sequence[GpuView]) -> Change:
    uuids = tuple(gpu.gpu.uuid for gpu in gpus)
    names = ", ".join(f"GPU {gpu.gpu.index}" for gpu in gpus)
    are = "which is idle" if len(gpus) == 1 else "which are idle"
    return Change(
        "repartition",
        (len(gpus),),
        node.name,
        f"turn MIG mode off on {names} of node {node.name}, {are}",
        request,
        Repartition(node.name, uuids, None),
        node.name,
        uuids,
    )


def _models(s: Situation) -> list[str]:
    """Return what a new node could have: what is asked for, else what there is of that kind."""
    if s.request.models:
        return list(s.request.models)
    there = {
        gpu.gpu.model for node in s.view.nodes.values() for gpu in matching_gpus(s.request, node)
    }
    return sorted(there)


def _size(s: Situation, model: str) -> int:
    """Return the GPUs of a new node: as the smallest of the fleet that has enough of them."""
    wanted = max(1, s.request.gpus)
    name = template_of(s.view, model, wanted).gpu.model
    counts = {
        sum(gpu.gpu.model == name for gpu in node.gpus)
        for node in s.view.nodes.values()
        if name in node.free_by_model
    }
    return min((count for count in counts if count >= wanted), default=wanted)


def _added(
    request: Request, model: str, nodes: int, gpus: int, labels: tuple[tuple[str, str], ...]
) -> Change:
    what = "a node" if nodes == 1 else f"{nodes} nodes"
    with_labels = "".join(f", {name}={value}" for name, value in labels)
    where = f" in pool {request.pool}" if request.pool else ""
    return Change(
        "add_nodes",
        (nodes * gpus, nodes),
        f"{model} {labels}",
        f"add {what} with {gpus} x {model}{with_labels}{where}",
        request,
        AddNodes(nodes, gpus, model, request.pool or "", labels),
    )


def _groups(s: Situation) -> Iterator[tuple[dict[str, str], int]]:
    """Yield with which label new nodes of a gang would be beside how many that can host a part."""
    label = s.request.same_label
    if label is None or not s.request.same_label_required or s.request.nodes == 1:
        yield {}, len(s.able)
        return
    able = Counter((s.view.nodes[name].node.facts.labels or {}).get(label) for name in s.able)
    values = {(node.node.facts.labels or {}).get(label) for node in s.view.nodes.values()}
    for value in sorted(each for each in values if each is not None):
        yield {label: value}, able[value]


def _weight(ids: Iterable[str], weights: Mapping[str, tuple[int, int]]) -> Weight:
    """Return the highest priority, the bytes of GPU memory, and the number."""
    known = [weights[id_] for id_ in ids]
    return max(each for each, _ in known), sum(each for _, each in known), len(known)


def _clearing(
    request: Request, node: NodeView, weights: Mapping[str, tuple[int, int]]
) -> Iterator[frozenset[str]]:
    """Yield who would have to go so that the first few GPUs are clear, the cheapest first."""
    holders = [
        {claim.allocation_id for claim in gpu.claims}
        for gpu in matching_gpus(request, node)
        if gpu.claims
    ]
    clearable = [sorted(ids) for ids in holders if ids <= weights.keys()]
    clearable.sort(key=lambda ids: (_weight(ids, weights), ids))
    gone: frozenset[str] = frozenset()
    for ids in clearable:
        gone = gone.union(ids)
        yield gone


def _release(
    kind: str,
    request: Request,
    amount: tuple[int, ...],
    name: str,
    summary: str,
    ids: Sequence[str],
    node: str = "",
) -> Change:
    return Change(
        kind,
        amount,
        name,
        summary,
        request,
        Release(tuple(ids)),
        node or name,
        allocation_ids=tuple(ids),
    )


def _holding(allocation: Allocation) -> str:
    devices = allocation.devices
    whole = sum(device.exclusive for device in devices)
    if whole:
        return f"{whole} GPU{'s' * (whole > 1)}"
    if not devices:
        return allocation.request.described()
    return format_bytes(sum(device.memory_bytes for device in devices))
