"""Why a request cannot be placed, in one line over the whole fleet: `1,213 nodes: 800 wrong model`.

Nodes are counted by the filter that refused them, the most frequent first. Beside each count stands
what a person asks next: what those nodes have instead, or which comes nearest and how near.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stoker.aggregator.model import Refusal, Request
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.node_filters import cpus
from stoker.aggregator.placing.parts import Parts, anti_affinity_label, parts_max
from stoker.aggregator.placing.wanted import each_node, lying, percent
from stoker.aggregator.views import FleetView, name_some
from stoker.core.units import format_bytes

_KINDS_MAX = 3  # how many different findings of one filter are told


def summarise(
    request: Request, refusals: Sequence[Refusal], view: FleetView, able: Sequence[str] = ()
) -> str:
    """Return the line; `able` are the nodes that refused nothing.

    For a request of one node there are none such, unless it can be placed. Of a gang each could
    host a part.
    """
    wanted = request.described()
    if not view.nodes:
        return f"no node for {wanted}: the fleet has no nodes yet"
    if request.nodes > 1:
        return _of_gang(request, refusals, view, able)
    if able:
        return f"{len(able):,} of {_count(view.nodes, 'node')} can host {wanted} now"
    return f"no node for {wanted}: {_of_nodes(request, refusals, view)}"


def _of_nodes(request: Request, refusals: Sequence[Refusal], view: FleetView) -> str:
    narrow = _narrowed(request, refusals, view)
    if narrow:
        return narrow
    if len(refusals) == 1:
        return f"{refusals[0].node}: {refusals[0].reason}"
    return f"{len(refusals):,} nodes: {_counted(request, refusals)}"


def _narrowed(request: Request, refusals: Sequence[Refusal], view: FleetView) -> str:
    """Return the line where the request itself leaves few nodes, or none; empty: it does not."""
    for name, asked, what in (
        ("node", request.node, f"node {request.node}"),
        ("host", request.host_boot_id, "the host that the command would run on"),
        ("pool", request.pool, f"pool {request.pool}"),
    ):
        if asked is None:
            continue
        asked_for = [each for each in refusals if each.filter != name]
        if not asked_for:
            return f"{what} {_missing(name, view)}"
        rest = len(refusals) - len(asked_for)
        if rest == 0:
            continue
        others = f"{_count(rest, 'other node')} {'was' if rest == 1 else 'were'} not asked for"
        if len(asked_for) == 1:
            return f"{asked_for[0].node}: {asked_for[0].reason} ({others})"
        counted = _counted(request, asked_for)
        return f"{len(asked_for):,} nodes of {what}: {counted} ({others})"
    return ""


def _missing(name: str, view: FleetView) -> str:
    if name == "pool":
        pools = sorted({node.node.facts.pool for node in view.nodes.values()} - {""})
        return f"has no node; there {'is' if len(pools) == 1 else 'are'} {_names(pools, 'no pool')}"
    return f"is not in the fleet, which has {_count(view.nodes, 'node')}"


def _of_gang(
    request: Request, refusals: Sequence[Refusal], view: FleetView, able: Sequence[str]
) -> str:
    together = most_together(request, view, able)
    wanted = request.described()
    parts = f"{len(able):,} of {_count(view.nodes, 'node')} can host one of the parts"
    limits: list[str] = []
    if together.count < len(able):
        if together.value:
            alike = f"with one {request.same_label} ({together.value})"
            limits.append(f"at most {together.count} of them {alike}")
        elif request.same_label_required and request.same_label is not None:
            limits.append(f"none of them has label {request.same_label}")
        else:
            apart = anti_affinity_label(request)
            alike = f"with a different {apart} each" if apart is not None else "of one GPU model"
            limits.append(f"at most {together.count} of them {alike}")
    told = "; ".join([parts, *limits])
    if not refusals:
        return f"no place for {wanted}: {told}"
    return f"no place for {wanted}: {told}; {_counted(request, refusals)}"


def most_together(request: Request, view: FleetView, able: Sequence[str]) -> Parts:
    """Return how many of these nodes, each of which could host a part of a gang, can together."""
    nodes = [view.nodes[name] for name in able]
    if request.gpus == 0:
        return parts_max(request, nodes)
    best = Parts(0)
    for model in sorted({model for node in nodes for model in node.free_by_model}):
        of_model = [n for n in nodes if choose(request, n, view, model=model) is not None]
        parts = parts_max(request, of_model)
        best = parts if parts.count > best.count else best
    return best


def _counted(request: Request, refusals: Iterable[Refusal]) -> str:
    by_filter: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        by_filter.setdefault(refusal.filter, []).append(refusal)
    order = {name: place for place, name in enumerate(WORDS)}
    names = sorted(by_filter, key=lambda name: (-len(by_filter[name]), order[name]))
    return ", ".join(_part(request, WORDS[name], by_filter[name]) for name in names)


def _part(request: Request, words: "Words", refusals: Sequence[Refusal]) -> str:
    told = f"{len(refusals):,} {words.said(request)}"
    if words.amount is not None:
        known = [each for each in refusals if each.found.isdecimal() and each.found != "0"]
        if not known:
            return told
        best = max(known, key=lambda each: int(each.found))
        return f"{told} (best: {best.node} has {words.amount(int(best.found))})"
    if words.is_told:
        return f"{told}{_found(refusals, words.opens, words.closes)}"
    return told


def _found(refusals: Sequence[Refusal], opens: str, closes: str) -> str:
    """Return what was found, the most frequent first, with counts where they differ."""
    kinds = Counter(each.found for each in refusals if each.found)
    if not kinds:
        return ""
    common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    is_plain = len(common) == 1 or common[0][1] == 1
    shown = [found if is_plain else f"{count:,} x {found}" for found, count in common[:_KINDS_MAX]]
    more = f" and {len(common) - _KINDS_MAX} more" if len(common) > _KINDS_MAX else ""
    return f"{opens}{', '.join(shown)}{more}{closes}"


@dataclass(frozen=True, slots=True)
class Words:
    """How a person reads a count of one filter's refusals."""

    said: Callable[[Request], str]
    amount: Callable[[int], str] | None = None  # what the nearest miss has, where it is a number
    is_told: bool = False  # whether what was found is told in words
    opens: str = " ("
    closes: str = ")"


def _always(text: str) -> Callable[[Request], str]:
    return lambda request: text


def _on_one_node(request: Request) -> str:
    if request.gpus == 1:
        return "no free GPU"
    return f"no {request.gpus} free GPUs on one node"


def _mig(request: Request) -> str:
    least = f" with {format_bytes(request.memory_bytes)}" if request.memory_bytes else ""
    what = "MIG device" if request.mig_profile == "any" else f"MIG {request.mig_profile}"
    if request.compute_milli is not None:
        compute = f"{percent(request.compute_milli)} of the compute"
        least += f" and {compute}" if least else f" with {compute}"
    return f"{request.gpus} x {what}{least}" if request.gpus > 1 else f"{what}{least}"


def _share(request: Request) -> str:
    if request.memory_bytes is not None:
        return format_bytes(request.memory_bytes)
    return f"{percent(request.compute_milli or 0)} of the memory"


# In the order of the filters.
WORDS: Mapping[str, Words] = {
    "node": Words(_always("another node than asked for")),
    "host": Words(_always("on another host")),
    "pool": Words(lambda request: f"not in pool {request.pool}", is_told=True),
    "node_labels": Words(_always("other labels"), is_told=True),
    "same_label": Words(lambda request: f"no label {request.same_label}"),
    "driver_version": Words(
        lambda request: (
            "driver older than " + ".".join(str(part) for part in request.driver_version_min or ())
        ),
        is_told=True,
    ),
    "model": Words(_always("wrong model"), is_told=True),
    "gpu_memory": Words(
        lambda request: f"no GPU of {format_bytes(request.gpu_memory_min_bytes)}",
        amount=format_bytes,
    ),
    "compute_capability": Words(_always("too low a compute capability"), is_told=True),
    "gpus_total": Words(lambda request: f"fewer than {request.gpus} GPUs", amount=str),
    "memory_total": Words(
        lambda request: f"GPUs too small for {_share(request)}", amount=format_bytes
    ),
    "mig_total": Words(lambda request: f"no {_mig(request)}", is_told=True),
    "mig_mode": Words(_always("too few GPUs that are not in MIG mode")),
    "cpu_total": Words(lambda request: f"fewer than {cpus(request.cpu_milli)}", amount=cpus),
    "host_memory_total": Words(
        lambda request: f"less than {format_bytes(request.host_memory_bytes)} of host memory",
        amount=format_bytes,
    ),
    "gpus_cordoned": Words(_always("too few GPUs that are not cordoned")),
    "mig_withheld": Words(_always("too few GPUs whose MIG layout is in place")),
    "topology_total": Words(
        lambda request: f"no {each_node(request)} {lying(request)}", amount=str
    ),
    "cordoned": Words(_always("cordoned"), is_told=True, opens=": ", closes=""),
    "disconnected": Words(_always("disconnected")),
    "driver": Words(_always("driver not readable"), is_told=True),
    "stale": Words(_always("telemetry stale")),
    "anti_affinity": Words(lambda request: f"beside another of service {request.service}"),
    "gpus_free": Words(_on_one_node, amount=str),
    "memory_free": Words(
        lambda request: f"no {_share(request)} free on one GPU", amount=format_bytes
    ),
    "compute_free": Words(
        lambda request: f"no {percent(request.compute_milli or 0)} of the compute free on one GPU",
        amount=percent,
    ),
    "mig_free": Words(lambda request: f"no {_mig(request)} free"),
    "topology_free": Words(
        lambda request: f"no {request.gpus} free GPUs {lying(request)}", amount=str
    ),
    "cpu_free": Words(lambda request: f"no {cpus(request.cpu_milli)} free", amount=cpus),
    "host_memory_free": Words(
        lambda request: f"no {format_bytes(request.host_memory_bytes)} of host memory free",
        amount=format_bytes,
    ),
    "queue": Words(_always("kept for requests ahead in the queue"), is_told=True),
}


def _names(names: Sequence[str], none: str) -> str:
    return name_some(list(names)) if names else none


def _count(of: int | Collection[str], what: str) -> str:
    count = of if isinstance(of, int) else len(of)
    return f"{count:,} {what}{'' if count == 1 else 's'}"
