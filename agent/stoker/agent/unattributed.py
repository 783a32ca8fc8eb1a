"""Memory in use on a GPU that no process accounts for: what a process left behind, or hides.

Two things are compared that cannot be read at the same moment: what the driver says is in use on
the GPU, and what it says its processes use. So memory counts as lost only if it was in use before
the processes were read and is still in use after: a process that has come or gone in between
changes one of the two samples, and the lesser of them tells nothing of it. Only a process that goes
while another one comes can be taken for lost memory, and the next reading takes that back.
"""

from collections.abc import Collection, Iterable

from stoker.agent.model import ProcessSeen
from stoker.agent.readings import GpuSample

# Up to here memory in use is the driver's own: page tables, channels, what a context costs it
# beside the process. It is not told of any process, some MiB on an idle GPU (site checks after a
# job allow 15 MiB) and some for each process. What a lost process leaves is a CUDA context at
# least, which is several hundred MiB.
TOLERANCE_BYTES = 64 << 20


def unattributed_bytes(
    before: Iterable[GpuSample],
    after: Iterable[GpuSample],
    processes: Iterable[ProcessSeen],
    untold: Collection[str],
) -> dict[str, int]:
    """Return by GPU how much memory no process accounts for; 0 up to TOLERANCE_BYTES.

    `before` and `after` are samples from before the processes were asked for and from after they
    were told. `untold` are the GPUs whose processes are not known, or whose memory is not theirs to
    sum up: those in MIG mode, where a process is told with the memory of its MIG device.

    A GPU of which it cannot be told is left out: one that is missing from the samples or not told
    its use, one whose driver counts its own reserve as used (it does not tell
    `memory_reserved_bytes`), and one with a process whose memory is not told.
    """
    used = _used(before)
    unattributed = {
        uuid: min(used[uuid], later) for uuid, later in _used(after).items() if uuid in used
    }
    for uuid in untold:
        unattributed.pop(uuid, None)
    for process in processes:
        if process.gpu_uuid not in unattributed:
            continue
        if process.memory_used_bytes is None:
            del unattributed[process.gpu_uuid]
        else:
            unattributed[process.gpu_uuid] -= process.memory_used_bytes
    # Less than nothing: processes that share memory are each told with all of it.
    return {uuid: left if left > TOLERANCE_BYTES else 0 for uuid, left in unattributed.items()}


def _used(samples: Iterable[GpuSample]) -> dict[str, int]:
    return {
        each.uuid: each.memory_used_bytes
        for each in samples
        if each.memory_used_bytes is not None and each.memory_reserved_bytes is not None
    }
