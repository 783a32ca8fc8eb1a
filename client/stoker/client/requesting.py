"""From the words of a caller (sizes, durations, names) to a Request that is worth sending."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from stoker.client.errors import InvalidRequest
from stoker.client.model import GpuTopology, Request
from stoker.core.errors import BadInput
from stoker.core.units import parse_bytes, parse_duration

# A client that dies holds its GPUs no longer than this.
KEPT_TTL_SECONDS = 60.0  # in a context, which keeps its allocation alive
PLAIN_TTL_SECONDS = 3600.0  # of a plain request, which nobody keeps alive unasked


class Wish(TypedDict, total=False):
    """What may be asked for; what is left out does not matter to the caller."""

    gpus: int  # whole GPUs, or MIG devices with `mig`, all on one node; 1 when left out
    nodes: int  # a gang: as many GPUs on each of so many nodes, all or nothing
    memory: str | int | None  # a share of one GPU: "20GiB", or bytes
    compute: float | None  # a share of one GPU's compute, from 0 to 1
    mig: str | None  # of this profile: "1g.10gb"; "any": the smallest with `memory` and `compute`
    cpus: float | None  # of the host, on each node; so is the next
    host_memory: str | int | None
    model: str | Sequence[str] | None  # "H100-80GB", or a part of the driver's name; any of several
    gpu_memory: str | int | None  # only GPUs with at least so much in all
    compute_capability: str | None  # at least; "8.0"
    driver: str | None  # at least; "570.124.06"
    pool: str | None
    node: str | None
    host_boot_id: str | None  # only nodes under this kernel boot
    node_labels: Mapping[str, str] | None  # only nodes that have these
    topology: str | None  # "numa" or "nvlink": how its GPUs lie to each other
    require_topology: bool  # nothing else will do; else it is preferred
    same_label: str | None  # of a gang: all of its nodes share the value of this node label
    require_same_label: bool  # nothing else will do; else it is preferred
    service: str | None  # what it is a replica of
    anti_affinity: str | None  # never beside its like on the same "gpu", "node", or node label
    spread: str | None  # preferred where fewest of its like are: "gpu", "node", or a node label
    near: str | None  # preferred on a node where that service is
    prefer_gpu: str | None  # NVML's UUID
    duration: str | float | None  # how long it is expected to be held
    movable: bool  # whether its holder agrees to be asked to move
    holder: str | None  # who asks; user@host when left out
    labels: Mapping[str, str] | None  # kept with the allocation
    ttl: str | float  # how long it lives without a keep-alive: "10m", or seconds
    priority: int  # higher goes first among those that wait; 0 when left out


def build_request(wish: Wish, *, holder: str, ttl_seconds: float) -> Request:
    """Return the request for a wish; `holder` and `ttl_seconds` stand in for what it leaves out.

    Raises InvalidRequest where the words make no sense; the bounds are the aggregator's to know.
    """
    gpus, nodes = wish.get("gpus", 1), wish.get("nodes", 1)
    memory, mig = wish.get("memory"), wish.get("mig") or ""
    memory_bytes = None if memory is None else as_bytes(memory, "memory")
    compute_milli = _thousandths(wish.get("compute"), "compute")
    if gpus < 1:
        raise InvalidRequest(f"gpus: wanted at least 1, found {gpus}")
    if nodes < 1:
        raise InvalidRequest(f"nodes: wanted at least 1, found {nodes}")
    if memory_bytes is not None and gpus != 1 and not mig:
        raise InvalidRequest(
            f"gpus: a share of memory is a share of one GPU, found {gpus} with memory {memory}"
        )
    if memory_bytes is not None and memory_bytes < 1:
        raise InvalidRequest(f"memory: wanted at least 1 byte, found {memory}")
    model, duration = wish.get("model") or (), wish.get("duration")
    return Request(
        gpus=gpus,
        nodes=nodes,
        holder=wish.get("holder") or holder,
        ttl_seconds=as_seconds(wish.get("ttl", ttl_seconds), "ttl"),
        memory_bytes=memory_bytes,
        compute_milli=compute_milli,
        mig_profile=mig,
        cpu_milli=_thousandths(wish.get("cpus"), "cpus") or 0,
        host_memory_bytes=as_bytes(wish.get("host_memory") or 0, "host_memory"),
        models=(model,) if isinstance(model, str) else tuple(model),
        gpu_memory_min_bytes=as_bytes(wish.get("gpu_memory") or 0, "gpu_memory"),
        compute_capability_min=wish.get("compute_capability") or "",
        driver_version_min=wish.get("driver") or "",
        pool=wish.get("pool") or "",
        node=wish.get("node") or "",
        host_boot_id=wish.get("host_boot_id") or "",
        node_labels=wish.get("node_labels") or None,
        gpu_topology=_topology(wish.get("topology")),
        gpu_topology_required=wish.get("require_topology", False),
        same_label=wish.get("same_label") or "",
        same_label_required=wish.get("require_same_label", False),
        service=wish.get("service") or "",
        anti_affinity=wish.get("anti_affinity") or "",
        spread=wish.get("spread") or "",
        near_service=wish.get("near") or "",
        preferred_gpu_uuid=wish.get("prefer_gpu") or "",
        duration_seconds=None if duration is None else as_seconds(duration, "duration"),
        movable=wish.get("movable", False),
        labels=wish.get("labels") or None,
        priority=wish.get("priority", 0),
    )


def _thousandths(value: float | None, what: str) -> int | None:
    """Return thousandths, to the nearest one; raises InvalidRequest where that is not one."""
    if value is None:
        return None
    if not 0.001 <= value < float("inf"):
        raise InvalidRequest(f"{what}: wanted at least 0.001, found {value:g}")
    return round(value * 1000)


def _topology(word: str | None) -> GpuTopology:
    known = [each.value for each in GpuTopology if each is not GpuTopology.UNKNOWN]
    if word is not None and word not in known:
        raise InvalidRequest(f"topology: wanted one of {', '.join(known)}, found {word!r}")
    return GpuTopology(word or GpuTopology.ANY)


def as_bytes(size: str | int, what: str) -> int:
    """Return bytes, given as such or as a text like "20GiB"; raises InvalidRequest."""
    if isinstance(size, int):
        return size
    try:
        return parse_bytes(size, what)
    except BadInput as error:
        raise InvalidRequest(str(error)) from error


def as_seconds(duration: str | float, what: str) -> float:
    """Return seconds, given as such or as a text like "10m"; raises InvalidRequest."""
    if isinstance(duration, str):
        try:
            return parse_duration(duration, what)
        except BadInput as error:
            raise InvalidRequest(str(error)) from error
    if not 0 <= duration < float("inf"):
        raise InvalidRequest(f"{what}: wanted seconds, zero or more, found {duration}")
    return float(duration)
