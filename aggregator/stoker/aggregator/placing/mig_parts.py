"""MIG devices for a request: which match it, how many a node has, and why there are too few.

All devices of one request come from cards of one model on one node; it does not matter which card.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stoker.aggregator.model import COMPUTE_MILLI, MIG_ANY, Gpu, MigDevice, Refusal, Request
from stoker.aggregator.placing.holders import held_by, out_of_use
from stoker.aggregator.placing.node_filters import is_beside
from stoker.aggregator.placing.wanted import mig_device
from stoker.aggregator.views import GpuView, NodeView
from stoker.core.mig.boards import BOARDS

# By the driver's name of the model. What is not here can be asked for by profile and memory.
_COMPUTE_SLICES: Mapping[str, int] = {
    board.driver_name: board.geometry.compute_slices for board in reversed(BOARDS)
}


def mig_slices(profile: str) -> int:
    """Return the compute slices of a MIG device: 1 of "1g.10gb", and of "1c.2g.20gb" as well."""
    digits = profile[: len(profile) - len(profile.lstrip("0123456789"))]
    assert digits, f"no MIG profile: {profile!r}"
    return int(digits)


def has_compute(request: Request, slices: int, model: str) -> bool:
    """Whether so many compute slices of a card are the part of its compute that was asked for."""
    if not request.compute_milli:
        return True
    total = _COMPUTE_SLICES.get(model)
    return total is not None and slices * COMPUTE_MILLI >= request.compute_milli * total


def is_mig_match(request: Request, device: MigDevice, gpu: Gpu) -> bool:
    """Whether the card's MIG device is of the profile, memory and compute that was asked for."""
    if device.memory_total_bytes < (request.memory_bytes or 0):
        return False
    if request.mig_profile not in (MIG_ANY, device.profile):
        return False
    return has_compute(request, mig_slices(device.profile), gpu.model)


def free_mig(request: Request, gpu: GpuView, node: NodeView) -> list[MigDevice]:
    """Return the card's MIG devices that the request could take now."""
    if not gpu.mig_free or is_beside(request, gpu, node):
        return []
    return [device for device in gpu.mig_free if is_mig_match(request, device, gpu.gpu)]


def count_free_mig(request: Request, gpus: Iterable[GpuView], node: NodeView) -> int:
    """Return how many of these cards' devices, all of one model, the request could take now."""
    counts: Counter[str] = Counter()
    for gpu in gpus:
        if gpu.mig_free:
            counts[gpu.gpu.model] += len(free_mig(request, gpu, node))
    return max(counts.values(), default=0)


def count_mig(request: Request, gpus: Iterable[GpuView]) -> int:
    """Return how many of these cards' devices, all of one model, match the request, free or not."""
    counts: Counter[str] = Counter()
    for gpu in gpus:
        matching = sum(is_mig_match(request, each, gpu.gpu) for each in gpu.gpu.mig_devices)
        counts[gpu.gpu.model] += matching
    return max(counts.values(), default=0)


def no_mig(request: Request, node: NodeView, gpus: Sequence[GpuView]) -> Refusal:
    """Refuse a node whose cards have too few devices that match."""
    there = Counter(device.profile for gpu in gpus for device in gpu.gpu.mig_devices)
    has = ", ".join(f"{count} x {profile}" for profile, count in sorted(there.items()))
    if has:
        found = f"it has {has}"
    elif any(gpu.gpu.mig_enabled is not None for gpu in gpus):
        found = "its GPUs are not partitioned"
    else:
        found = "its GPUs have no MIG"
    reason = f"wanted {request.described()}, {found}" + out_of_use(node)
    return Refusal(node.name, "mig_total", reason, mig_device(request), has or "none")


def mig_in_use(request: Request, node: NodeView, gpus: Sequence[GpuView], now: float) -> Refusal:
    """Refuse a node of whose devices that match too few are free; `gpus` have them."""
    free = sum(is_mig_match(request, each, gpu.gpu) for gpu in gpus for each in gpu.mig_free)
    total = sum(
        is_mig_match(request, each, gpu.gpu) for gpu in gpus for each in gpu.gpu.mig_devices
    )
    are = "is" if free == 1 else "are"
    reason = f"wanted {request.described()}, {free} of {total} {are} free"
    reason += held_by(gpus, node, now, in_mig_mode=False)
    return Refusal(node.name, "mig_free", reason, mig_device(request), str(free))


def closed_mig(left: int, how: str) -> str:
    """Return, in a clause, how far the devices reach whose cards are not `how`."""
    if left == 0:
        return f"every GPU that has one is {how}"
    are = "is" if left == 1 else "are"
    return f"{left} {are} on GPUs that are not {how}"
