"""From the words of a caller (sizes, durations, names) to a Request that is worth sending."""

from collections.abc import Mapping
from typing import TypedDict

from stoker.client.errors import InvalidRequest
from stoker.client.model import Request
from stoker.core.errors import BadInput
from stoker.core.units import parse_bytes, parse_duration

# A client that dies holds its GPUs no longer than this.
KEPT_TTL_SECONDS = 60.0  # in a context, which keeps its allocation alive
PLAIN_TTL_SECONDS = 3600.0  # of a plain request, which nobody keeps alive unasked


class Wish(TypedDict, total=False):
    """What may be asked for; what is left out does not matter to the caller."""

    gpus: int  # whole GPUs, all on one node; 1 when left out
    memory: str | int | None  # a share of one GPU: "20GiB", or bytes
    model: str | None  # "H100-80GB", or a part of the driver's name
    pool: str | None
    node: str | None
    host_boot_id: str | None  # only nodes under this kernel boot
    holder: str | None  # who asks; user@host when left out
    labels: Mapping[str, str] | None  # kept with the allocation
    ttl: str | float  # how long it lives without a keep-alive: "10m", or seconds
    priority: int  # higher goes first among those that wait; 0 when left out


def build_request(wish: Wish, *, holder: str, ttl_seconds: float) -> Request:
    """Return the request for a wish; `holder` and `ttl_seconds` stand in for what it leaves out.

    Raises InvalidRequest where the words make no sense; the bounds are the aggregator's to know.
    """
    gpus, memory = wish.get("gpus", 1), wish.get("memory")
    memory_bytes = None if memory is None else as_bytes(memory, "memory")
    if gpus < 1:
        raise InvalidRequest(f"gpus: wanted at least 1, found {gpus}")
    if memory_bytes is not None and gpus != 1:
        raise InvalidRequest(
            f"gpus: a share of memory is a share of one GPU, found {gpus} with memory {memory}"
        )
    if memory_bytes is not None and memory_bytes < 1:
        raise InvalidRequest(f"memory: wanted at least 1 byte, found {memory}")
    return Request(
        gpus=gpus,
        holder=wish.get("holder") or holder,
        ttl_seconds=as_seconds(wish.get("ttl", ttl_seconds), "ttl"),
        memory_bytes=memory_bytes,
        model=wish.get("model") or "",
        pool=wish.get("pool") or "",
        node=wish.get("node") or "",
        host_boot_id=wish.get("host_boot_id") or "",
        labels=wish.get("labels") or None,
        priority=wish.get("priority", 0),
    )


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
