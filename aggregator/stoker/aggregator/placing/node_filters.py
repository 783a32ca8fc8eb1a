"""The filters that look at a node as a whole: where it is, what runs on it, and how it is."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import AllocationState, Refusal, Request
from stoker.aggregator.views import FleetView, GpuView, NodeView
from stoker.core.units import format_bytes, format_duration

# --- what stays so until somebody changes the fleet or the request


def asked_node(request: Request, node: NodeView) -> Refusal | None:
    """Refuse another node than the one that was asked for."""
    if request.node is None or request.node == node.name:
        return None
    return Refusal(node.name, "node", f"node {request.node} was asked for", request.node, node.name)


def asked_host(request: Request, node: NodeView) -> Refusal | None:
    """Refuse another host than the caller's own."""
    if request.host_boot_id is None or request.host_boot_id == node.node.facts.boot_id:
        return None
    return Refusal(
        node.name,
        "host",
        "it is another host than the one the command would run on",
        f"boot {request.host_boot_id}",
        f"boot {node.node.facts.boot_id}",
    )


def asked_pool(request: Request, node: NodeView) -> Refusal | None:
    """Refuse another pool."""
    if request.pool is None or request.pool == node.node.facts.pool:
        return None
    found = node.node.facts.pool
    where = f"pool {found}" if found else "no pool"
    reason = f"pool {request.pool} was asked for, it is in {where}"
    return Refusal(node.name, "pool", reason, request.pool, found)


def asked_labels(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node that has not all of the labels; the first that differs is told."""
    if not request.node_labels:
        return None
    labels = node.node.facts.labels or {}
    for name, value in request.node_labels.items():
        found = labels.get(name)
        if found != value:
            has = f"no label {name}" if found is None else f"{name}={found}"
            reason = f"label {name}={value} was asked for, it has {has}"
            return Refusal(node.name, "node_labels", reason, f"{name}={value}", has)
    return None


def gang_label(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node without the label whose value all nodes of a gang shall share."""
    name = request.same_label
    if name is None or not request.same_label_required or request.nodes == 1:
        return None
    if name in (node.node.facts.labels or {}):
        return None
    reason = f"the nodes of a gang shall share the value of label {name}, it has none"
    return Refusal(node.name, "same_label", reason, f"label {name}", f"no label {name}")


def asked_driver(request: Request, node: NodeView) -> Refusal | None:
    """Refuse an older driver, and one that nobody knows."""
    least = request.driver_version_min
    if least is None:
        return None
    text = node.node.facts.driver_version
    if text and driver_version(text) >= least:
        return None
    wanted = ".".join(str(part) for part in least)
    found = text or "not known"
    reason = f"wanted a driver of at least {wanted}, its driver is {found}"
    return Refusal(node.name, "driver_version", reason, wanted, found)


def total_cpu(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a host with fewer CPUs in all."""
    total = node.node.facts.cpu_milli
    if request.cpu_milli == 0 or (total is not None and total >= request.cpu_milli):
        return None
    wanted = f"wanted {cpus(request.cpu_milli)}"
    if total is None:
        reason = f"{wanted}, it does not tell how many it has"
        return Refusal(node.name, "cpu_total", reason, str(request.cpu_milli), "not known")
    reason = f"{wanted}, it has {cpus(total)} in all"
    return Refusal(node.name, "cpu_total", reason, str(request.cpu_milli), str(total))


def total_host_memory(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a host with less memory in all."""
    wanted_bytes, total = request.host_memory_bytes, node.node.facts.host_memory_bytes
    if wanted_bytes == 0 or (total is not None and total >= wanted_bytes):
        return None
    if total is None:
        reason = f"wanted {format_bytes(wanted_bytes)} of host memory, it does not tell its own"
        return Refusal(node.name, "host_memory_total", reason, str(wanted_bytes), "not known")
    wanted, found = told_apart(wanted_bytes, total)
    reason = f"wanted {wanted} of host memory, it has {found} in all"
    return Refusal(node.name, "host_memory_total", reason, str(wanted_bytes), str(total))


# --- what passes


def cordon(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node that its operator keeps from use."""
    reason = node.node.cordoned
    if reason is None:
        return None
    return Refusal(node.name, "cordoned", f"cordoned: {reason}", "not cordoned", reason)


def problem(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a node that nobody hears of, or whose driver cannot be read."""
    if not node.problem:
        return None
    name = "driver" if node.connected else "disconnected"
    return Refusal(node.name, name, node.problem, "connected, driver read", node.problem)


def freshness(node: NodeView, view: FleetView) -> Refusal | None:
    """Refuse a node whose newest sample is too old to be relied on."""
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


def same_node(request: Request, node: NodeView, view: FleetView) -> Refusal | None:
    """Refuse a node where another of the same service is."""
    service = request.service
    if service is None or request.anti_affinity != "node" or service not in node.services:
        return None
    other = allocation_of(service, node, view)
    reason = f"{other} of service {service} is there, and none shall be beside another on a node"
    return Refusal(node.name, "anti_affinity", reason, f"no other of {service}", other)


def same_label_value(request: Request, node: NodeView, taken: Mapping[str, str]) -> Refusal | None:
    """Refuse a node whose label has a value that another of the same service has.

    A node without the label shares its value with none.
    """
    label = request.anti_affinity
    value = (node.node.facts.labels or {}).get(label) if label is not None else None
    if value is None or value not in taken:
        return None
    reason = (
        f"{taken[value]} of service {request.service} is on a node with {label}={value}, "
        f"and no two of them shall share it"
    )
    wanted = f"no other of {request.service} with {label}={value}"
    return Refusal(node.name, "anti_affinity", reason, wanted, taken[value])


def free_cpu(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a host whose other tenants leave too few CPUs."""
    free = node.cpu_free_milli
    if request.cpu_milli == 0 or (free is not None and free >= request.cpu_milli):
        return None
    assert free is not None, f"{node.name} tells of no CPUs, which is refused before"
    total = cpus(node.node.facts.cpu_milli or 0)
    reason = f"wanted {cpus(request.cpu_milli)}, {free / 1000:g} of {total} are free"
    return Refusal(node.name, "cpu_free", reason, str(request.cpu_milli), str(free))


def free_host_memory(request: Request, node: NodeView) -> Refusal | None:
    """Refuse a host whose other tenants leave too little memory."""
    free = node.host_memory_free_bytes
    if request.host_memory_bytes == 0 or (free is not None and free >= request.host_memory_bytes):
        return None
    assert free is not None, f"{node.name} tells of no memory, which is refused before"
    wanted, found = told_apart(request.host_memory_bytes, free)
    total = format_bytes(node.node.facts.host_memory_bytes or 0)
    reason = f"wanted {wanted} of host memory, {found} of {total} is free"
    wanted_bytes = str(request.host_memory_bytes)
    return Refusal(node.name, "host_memory_free", reason, wanted_bytes, str(free))


# --- helpers, also of others


def is_beside(request: Request, gpu: GpuView, node: NodeView) -> bool:
    """Whether others of the same service are on the GPU where none shall be beside another."""
    if request.anti_affinity != "gpu" or request.service is None:
        return False
    return gpu.gpu.uuid in node.services.get(request.service, ())


def allocation_of(service: str, node: NodeView, view: FleetView) -> str:
    """Return the id of an allocation of the service that the node holds."""
    for gpu in node.gpus:
        for claim in gpu.claims:
            tenant = view.allocations.get(claim.allocation_id)
            if tenant is not None and tenant.request.service == service:
                return tenant.id
    holding = (AllocationState.GRANTED, AllocationState.RELEASING)
    for tenant in view.allocations.values():  # it holds no GPU
        is_there = tenant.state in holding and node.name in tenant.nodes
        if is_there and tenant.request.service == service:
            return tenant.id
    raise AssertionError(f"{node.name} lists service {service}, and no allocation of it is there")


def driver_version(text: str) -> tuple[int, ...]:
    """Return the numbers of "570.124.06"; of a part that is none, only what stands before it."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)


def cpus(milli: int) -> str:
    """Return CPUs for a person."""
    return f"{milli / 1000:g} CPU" if milli == 1000 else f"{milli / 1000:g} CPUs"


def told_apart(wanted_bytes: int, found_bytes: int) -> tuple[str, str]:
    """Return both sizes for a person; in bytes when they would read the same."""
    wanted, found = format_bytes(wanted_bytes), format_bytes(max(0, found_bytes))
    if wanted == found:
        return f"{wanted_bytes} B", f"{found_bytes} B"
    return wanted, found


def in_part(sentences: Sequence[str], shown: int = 3) -> str:
    """Return the first few of many sentences, and how many more there are."""
    more = f"; {len(sentences) - shown} more" if len(sentences) > shown else ""
    return "; ".join(sentences[:shown]) + more
