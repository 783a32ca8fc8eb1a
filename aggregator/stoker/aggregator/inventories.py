"""What a node has: GPUs that it reads, those it had before and cannot read now, and its host.

A GPU that falls off the bus, or on which the driver hangs, stays a GPU of its node: what claims it
is shown there, and when it answers again nothing has to be stored. So what is stored is what sits
in the slots; what cannot be read, and why, is a report like any other and lives in the node's
status, however often its reason changes.
"""

from dataclasses import dataclass, replace

from stoker.aggregator.model import Gpu, MissingGpu, NodeFacts


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of a node, what drives them, and what the host has beside, as its agent told."""

    driver_version: str
    cuda_version: str
    gpus: tuple[Gpu, ...]  # that can be read
    missing: tuple[MissingGpu, ...] = ()
    cpu_milli: int | None = None  # of the host, in thousandths of a core; None: not known
    host_memory_bytes: int | None = None

    def uuids(self) -> dict[int, str]:
        """Return the UUID of each of the agent's short numbers."""
        return {gpu.number: gpu.uuid for gpu in self.gpus}


def named(inventory: Inventory, known: NodeFacts | None) -> Inventory:
    """Return the inventory with the UUIDs of missing GPUs, as far as they can be `known`.

    An agent that was started while a GPU hangs cannot ask it for its name. When the driver counts
    as many as before, the GPU is taken for the one that was there before.
    """
    taken = {gpu.uuid for gpu in inventory.gpus}
    slots: dict[int, str] = {}
    if known is not None and len(known.gpus) == len(inventory.gpus) + len(inventory.missing):
        slots = {gpu.index: gpu.uuid for gpu in known.gpus}
    missing: list[MissingGpu] = []
    for each in inventory.missing:
        # One that can be read is not missing, whatever its index was when it was left alone.
        candidates = (each.uuid, slots.get(each.index, ""))
        uuid = next((one for one in candidates if one and one not in taken), "")
        taken.add(uuid)
        missing.append(replace(each, uuid=uuid))
    return replace(inventory, missing=tuple(missing))


def with_inventory(facts: NodeFacts, inventory: Inventory, known: NodeFacts | None) -> NodeFacts:
    """Return the facts with the GPUs of a `named` inventory, missing ones as they were known."""
    before = {gpu.uuid: gpu for gpu in known.gpus} if known else {}
    # Numbers mean something within one journal of the agent, and only for GPUs that it told of.
    numbers = inventory.uuids()
    is_same_journal = known is not None and known.incarnation == facts.incarnation
    kept: list[Gpu] = []
    for each in inventory.missing:
        gpu = before.get(each.uuid)
        if gpu is not None:
            number = gpu.number if is_same_journal and gpu.number not in numbers else 0
            kept.append(replace(gpu, index=each.index, number=number))
    gpus = (*inventory.gpus, *kept)
    return replace(
        facts,
        driver_version=inventory.driver_version,
        cuda_version=inventory.cuda_version,
        cpu_milli=inventory.cpu_milli,
        host_memory_bytes=inventory.host_memory_bytes,
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.index)) if kept else inventory.gpus,
    )
