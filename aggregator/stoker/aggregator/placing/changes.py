"""What the asker could ask for instead: each a request that is less, or less particular.

What the fleet could do instead is in `fleet_changes`; both are looked at in the order that
`smallest` states.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.aggregator.model import MIG_ANY, Allocation, Refusal, Request
from stoker.aggregator.placing.node_filters import cpus, driver_version
from stoker.aggregator.placing.wanted import each_node, lying, percent
from stoker.aggregator.placing.whatif import Supposition
from stoker.aggregator.views import FleetView, NodeView
from stoker.core.gpu_models import MODELS
from stoker.core.model_names import names_match
from stoker.core.units import format_bytes

NODES_MAX = 1_024  # of a gang
PRIORITY_MAX = 1_000_000

Keep = Callable[[Sequence[Allocation], FleetView], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Situation:
    """A request that cannot be placed now, and all that decides so."""

    request: Request
    view: FleetView
    refused: Mapping[str, Refusal]  # by node; each of the others could host a part of a gang
    blocked: Mapping[str, str]  # nodes kept for those ahead
    ahead: Sequence[Allocation]  # in the queue before it, in order
    keep: Keep  # which nodes are kept for these in that fleet, and for whom first
    able: Sequence[str]  # the nodes that refused nothing

    def nodes_refused_by(self, filters: Collection[str]) -> Iterator[NodeView]:
        """Yield the nodes that one of these filters was the first to refuse."""
        for name, refusal in self.refused.items():
            if refusal.filter in filters:
                yield self.view.nodes[name]


@dataclass(frozen=True, slots=True)
class Change:
    """One change, and what it costs among those of its rank: the amount, then the name."""

    kind: str  # stable for programs
    amount: tuple[int, ...]
    name: str
    summary: str  # a clause for a person: "ask for 3 GPUs instead of 4"
    request: Request  # to make then
    supposed: Supposition | None = None  # what the fleet does; None: nothing
    node: str = ""  # where the fleet does it
    gpu_uuids: tuple[str, ...] = ()
    allocation_ids: tuple[str, ...] = ()  # what would have to be released

    @property
    def key(self) -> tuple[tuple[int, ...], str, str]:
        """What orders changes of one rank, none like another."""
        return (self.amount, self.kind, self.name)


Changes = Callable[[Situation], Iterable[Change]]

# Filters whose refusal may be another when GPUs of another kind, or fewer of them, are asked for.
OF_GPUS = frozenset(
    (
        *("model", "gpu_memory", "compute_capability", "gpus_total", "memory_total", "mig_total"),
        *(
            "mig_mode",
            "gpus_cordoned",
            "mig_withheld",
            "topology_total",
            "anti_affinity",
            "gpus_free",
        ),
        *("memory_free", "compute_free", "mig_free", "topology_free"),
    )
)
OF_HOST = frozenset(("cpu_total", "cpu_free", "host_memory_total", "host_memory_free"))


def without_topology(s: Situation) -> Iterator[Change]:
    """GPUs that may lie to each other as they will."""
    request = s.request
    if request.gpu_topology_required and request.gpus > 1:
        summary = f"prefer {each_node(request)} {lying(request)} instead of requiring it"
        less = replace(request, gpu_topology_required=False)
        yield Change("gpu_topology", (), "", summary, less)


def without_same_label(s: Situation) -> Iterator[Change]:
    """A gang whose nodes may differ in that label."""
    request = s.request
    if request.same_label_required and request.same_label is not None and request.nodes > 1:
        summary = f"prefer nodes of one {request.same_label} instead of requiring it"
        less = replace(request, same_label_required=False)
        yield Change("same_label", (), "", summary, less)


def without_anti_affinity(s: Situation) -> Iterator[Change]:
    """Beside others of the service, where there is no other place."""
    request = s.request
    if request.service is not None and request.anti_affinity is not None:
        where = request.anti_affinity
        summary = f"prefer a {where} without others of {request.service} instead of requiring it"
        less = replace(request, anti_affinity=None, spread=request.spread or where)
        yield Change("anti_affinity", (), "", summary, less)


def other_host(s: Situation) -> Iterator[Change]:
    """Any host."""
    if s.request.host_boot_id is not None:
        less = replace(s.request, host_boot_id=None)
        yield Change("host", (), "", "run it on any host instead of this one", less)


def other_node(s: Situation) -> Iterator[Change]:
    """Any node."""
    if s.request.node is not None:
        summary = f"take any node instead of {s.request.node}"
        yield Change("node", (), "", summary, replace(s.request, node=None))


def fewer_labels(s: Situation) -> Iterator[Change]:
    """Without one of the labels."""
    labels = s.request.node_labels or {}
    for name, value in labels.items():
        left = {other: each for other, each in labels.items() if other != name}
        summary = f"do not ask for label {name}={value}"
        yield Change("node_labels", (), name, summary, replace(s.request, node_labels=left or None))


def other_pool(s: Situation) -> Iterator[Change]:
    """Another pool, or any."""
    asked = s.request.pool
    if asked is None:
        return
    pools = {node.node.facts.pool for node in s.nodes_refused_by({"pool"})}
    for pool in pools - {""}:
        summary = f"ask for pool {pool} instead of {asked}"
        yield Change("other_pool", (0,), pool, summary, replace(s.request, pool=pool))
    if "" in pools:
        summary = f"ask for any pool instead of {asked}"
        yield Change("other_pool", (1,), "", summary, replace(s.request, pool=None))


def older_driver(s: Situation) -> Iterator[Change]:
    """A driver that there is, the newest first; then any."""
    least = s.request.driver_version_min
    if least is None:
        return
    texts = {node.node.facts.driver_version for node in s.nodes_refused_by({"driver_version"})}
    versions = {driver_version(text) for text in texts} - {()}
    wanted = ".".join(str(part) for part in least)
    for place, version in enumerate(sorted(versions, reverse=True)):
        told = ".".join(str(part) for part in version)
        summary = f"do with driver {told} instead of {wanted}"
        less = replace(s.request, driver_version_min=version)
        yield Change("driver_version", (place,), "", summary, less)
    summary = f"do with any driver instead of at least {wanted}"
    less = replace(s.request, driver_version_min=None)
    yield Change("driver_version", (len(versions),), "", summary, less)


def lower_capability(s: Situation) -> Iterator[Change]:
    """A compute capability that there is, the highest first; then any."""
    least = s.request.compute_capability_min
    if least is None:
        return
    texts = {gpu.gpu.compute_capability for node in s.view.nodes.values() for gpu in node.gpus}
    known = {version for text in texts if len(version := driver_version(text)) == 2}
    lower = sorted((each for each in known if each < least), reverse=True)
    wanted = "{}.{}".format(*least)
    for place, (major, minor) in enumerate(lower):
        summary = f"do with compute capability {major}.{minor} instead of {wanted}"
        less = replace(s.request, compute_capability_min=(major, minor))
        yield Change("compute_capability", (place,), "", summary, less)
    summary = f"do with any compute capability instead of at least {wanted}"
    less = replace(s.request, compute_capability_min=None)
    yield Change("compute_capability", (len(lower),), "", summary, less)


def smaller_gpus(s: Situation) -> Iterator[Change]:
    """GPUs with less memory, the largest first."""
    least = s.request.gpu_memory_min_bytes
    sizes = {gpu.gpu.memory_total_bytes for node in s.view.nodes.values() for gpu in node.gpus}
    for size in (each for each in sizes if each < least):
        summary = f"do with GPUs of {format_bytes(size)} instead of {format_bytes(least)}"
        less = replace(s.request, gpu_memory_min_bytes=size)
        yield Change("gpu_memory", (least - size,), "", summary, less)


def larger_profile(s: Situation) -> Iterator[Change]:
    """A MIG device of another profile with as much memory and compute, the smallest first."""
    asked = s.request.mig_profile
    if asked is None or asked == MIG_ANY:
        return
    wanted = profile_size(asked)
    there = {
        device.profile
        for node in s.view.nodes.values()
        for gpu in node.gpus
        for device in gpu.gpu.mig_devices
    }
    for profile in there - {asked}:
        slices, gigabytes = profile_size(profile)
        if slices >= wanted[0] and gigabytes >= wanted[1]:
            summary = f"ask for a MIG {profile} instead of {asked}"
            less = replace(s.request, mig_profile=profile)
            yield Change("other_profile", (gigabytes, slices), profile, summary, less)


def other_model(s: Situation) -> Iterator[Change]:
    """Another model: with as much memory and little more first, then smaller ones."""
    asked = s.request.models
    if not asked:
        return
    sizes: dict[str, int] = {each.driver_name: each.memory_total_bytes for each in MODELS.values()}
    there: dict[str, int] = {}
    for node in s.view.nodes.values():
        for gpu in node.gpus:
            there[gpu.gpu.model] = gpu.gpu.memory_total_bytes
    sizes |= there
    mine = [sizes[name] for name in sizes if any(names_match(each, name) for each in asked)]
    wanted = min(mine, default=0)
    for model, size in there.items():
        if any(names_match(each, model) for each in asked):
            continue
        summary = f"ask for {model} instead of {' or '.join(asked)}"
        amount = (int(size < wanted), abs(size - wanted))
        yield Change("other_model", amount, model, summary, replace(s.request, models=(model,)))


def fewer_cpus(s: Situation) -> Iterator[Change]:
    """As many CPUs as are free somewhere, the most first, and at least half."""
    asked = s.request.cpu_milli
    for free in _levels((node.cpu_free_milli for node in s.view.nodes.values()), asked):
        summary = f"ask for {cpus(free)} instead of {cpus(asked)}"
        less = replace(s.request, cpu_milli=free)
        yield Change("less_cpu", (asked - free,), "", summary, less)


def less_host_memory(s: Situation) -> Iterator[Change]:
    """As much host memory as is free somewhere, the most first, and at least half."""
    asked = s.request.host_memory_bytes
    for free in _levels((node.host_memory_free_bytes for node in s.view.nodes.values()), asked):
        summary = f"ask for {format_bytes(free)} of host memory instead of {format_bytes(asked)}"
        less = replace(s.request, host_memory_bytes=free)
        yield Change("less_host_memory", (asked - free,), "", summary, less)


def less_compute(s: Situation) -> Iterator[Change]:
    """As much compute as is free on a GPU somewhere, the most first, and at least half."""
    asked = s.request.compute_milli
    if asked is None or not s.request.is_share:
        return
    gpus = (gpu for node in s.view.nodes.values() for gpu in node.gpus)
    levels = (gpu.compute_free_milli for gpu in gpus)
    if s.request.memory_bytes is None:  # the memory goes with the compute
        levels = (
            min(gpu.compute_free_milli, gpu.room_bytes * 1000 // max(1, gpu.usable_bytes))
            for node in s.view.nodes.values()
            for gpu in node.gpus
        )
    for free in _levels(levels, asked):
        summary = f"ask for {percent(free)} of the compute instead of {percent(asked)}"
        less = replace(s.request, compute_milli=free)
        yield Change("less_compute", (asked - free,), "", summary, less)


def less_memory(s: Situation) -> Iterator[Change]:
    """As much memory as is free on a GPU somewhere, the most first, and at least half."""
    asked = s.request.memory_bytes
    if asked is None:
        return
    gpus = [gpu for node in s.view.nodes.values() for gpu in node.gpus]
    if s.request.mig_profile is None:
        levels = [gpu.room_bytes for gpu in gpus]
    else:
        levels = [device.memory_total_bytes for gpu in gpus for device in gpu.mig_free]
    for free in _levels(levels, asked):
        summary = f"ask for {format_bytes(free)} of one GPU instead of {format_bytes(asked)}"
        less = replace(s.request, memory_bytes=free)
        yield Change("less_memory", (asked - free,), "", summary, less)


def over_more_nodes(s: Situation) -> Iterator[Change]:
    """The GPUs of one node over several, equally; so are CPUs and host memory."""
    request = s.request
    if request.nodes > 1 or not request.is_whole:
        return
    for nodes in range(2, min(request.gpus, NODES_MAX) + 1):
        if request.gpus % nodes:
            continue
        each = request.gpus // nodes
        gang = replace(
            request,
            nodes=nodes,
            gpus=each,
            cpu_milli=-(-request.cpu_milli // nodes),
            host_memory_bytes=-(-request.host_memory_bytes // nodes),
        )
        summary = f"take {each} GPU{'s' * (each > 1)} on each of {nodes} nodes instead of "
        summary += f"{request.gpus} on one"
        yield Change("spread_nodes", (nodes,), "", summary, gang)


def fewer_gpus(s: Situation) -> Iterator[Change]:
    """Fewer GPUs on each node, the most first, and at least half."""
    return (each for each in _fewer_gpus(s) if 2 * each.request.gpus >= s.request.gpus)


def far_fewer_gpus(s: Situation) -> Iterator[Change]:
    """Less than half of the GPUs on each node, the most first."""
    return (each for each in _fewer_gpus(s) if 2 * each.request.gpus < s.request.gpus)


def fewer_nodes(s: Situation) -> Iterator[Change]:
    """A gang of fewer nodes, the most first, and at least half."""
    return (each for each in _fewer_nodes(s) if 2 * each.request.nodes >= s.request.nodes)


def far_fewer_nodes(s: Situation) -> Iterator[Change]:
    """A gang of less than half of the nodes, the most first."""
    return (each for each in _fewer_nodes(s) if 2 * each.request.nodes < s.request.nodes)


def higher_priority(s: Situation) -> Iterator[Change]:
    """Just before some of those that are ahead in the queue, the fewest first."""
    mine = s.request.priority
    for priority in sorted({waiting.request.priority for waiting in s.ahead} - {PRIORITY_MAX}):
        passed = [each for each in s.ahead if each.request.priority <= priority]
        summary = (
            f"raise its priority from {mine} to {priority + 1}, which goes before "
            f"{len(passed)} that wait{'s' * (len(passed) == 1)}"
        )
        less = replace(s.request, priority=priority + 1)
        yield Change("higher_priority", (priority,), "", summary, less)


def profile_size(profile: str) -> tuple[int, int]:
    """Return the compute slices and the gigabytes in a MIG profile's name: 3 and 40 of 3g.40gb.

    What is no such name is larger than any.
    """
    parts = profile.partition("+")[0].split(".")
    slices, memory = parts[0][:-1], parts[-1][:-2]
    if slices.isdecimal() and memory.isdecimal():
        return int(slices), int(memory)
    return NODES_MAX, NODES_MAX


def _levels(found: Iterable[int | None], asked: int) -> list[int]:
    """Return what there is of less than was asked for, and at least half, the most first."""
    least = max(1, -(-asked // 2))
    return sorted({each for each in found if each is not None and least <= each < asked})[::-1]


def _fewer_gpus(s: Situation) -> Iterator[Change]:
    request = s.request
    if request.is_share:
        return
    what = "GPU" if request.is_whole else "MIG device"
    on_each = " on each node" if request.nodes > 1 else ""
    for gpus in range(request.gpus - 1, 0, -1):
        summary = f"ask for {gpus} {what}{'s' * (gpus > 1)}{on_each} instead of {request.gpus}"
        lost = (request.gpus - gpus) * request.nodes
        yield Change("fewer_gpus", (lost, 1), "", summary, replace(request, gpus=gpus))


def _fewer_nodes(s: Situation) -> Iterator[Change]:
    request = s.request
    for nodes in range(request.nodes - 1, 0, -1):
        summary = f"ask for {nodes} node{'s' * (nodes > 1)} instead of {request.nodes}"
        lost = (request.nodes - nodes) * max(1, request.gpus)
        yield Change("fewer_nodes", (lost, 0), "", summary, replace(request, nodes=nodes))
