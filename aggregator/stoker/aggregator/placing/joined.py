"""How many GPUs of a node lie to each other as a request requires, at most."""

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

from stoker.aggregator.model import Gpu, GpuTopology
from stoker.aggregator.placing.topology import links_between


def largest_set(gpus: Sequence[Gpu], topology: GpuTopology) -> int:
    """Return how many of `gpus` lie to each other as `topology` says, all of one model, at most.

    One GPU always does. A card whose memory node is not known is beside none.
    """
    by_model: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        by_model.setdefault(gpu.model, []).append(gpu)
    return max((_largest_of_model(each, topology) for each in by_model.values()), default=0)


def _largest_of_model(gpus: Sequence[Gpu], topology: GpuTopology) -> int:
    match topology:
        case GpuTopology.ANY:
            return len(gpus)
        case GpuTopology.NUMA:
            beside = Counter(gpu.numa_node for gpu in gpus if gpu.numa_node is not None)
            return max(beside.values(), default=1)
        case GpuTopology.NVLINK:
            return _largest_clique(_linked(gpus))
        case _:
            assert_never(topology)


def _linked(gpus: Sequence[Gpu]) -> list[int]:
    """Return for each GPU which of the others it is linked to, as bits by place in `gpus`."""
    masks = [0] * len(gpus)
    for i, one in enumerate(gpus):
        for j in range(i):
            if links_between(one, gpus[j]) > 0:
                masks[i] |= 1 << j
                masks[j] |= 1 << i
    return masks


def _largest_clique(masks: Sequence[int]) -> int:
    """Return the size of the largest set whose members are each linked to each.

    Behind NVSwitches all are, which the first descent finds; other boards have at most 16 GPUs.
    """
    best = 0

    def grow(size: int, among: int) -> None:
        nonlocal best
        best = max(best, size)
        while among and size + among.bit_count() > best:
            place = among.bit_length() - 1
            among &= ~(1 << place)
            grow(size + 1, among & masks[place])

    grow(0, (1 << len(masks)) - 1)
    return best
