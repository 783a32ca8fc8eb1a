"""Which short number each GPU has in frames: it keeps it for good, also while it is away."""

from collections.abc import Mapping, Sequence

from stoker.agent.model import NumberedGpu, NumberedInventory, NumberedSample
from stoker.agent.readings import GpuSample, Inventory
from stoker.agent.records import GpuNumbered


def number_gpus(
    inventory: Inventory, durable: Mapping[str, int], before: NumberedInventory | None
) -> tuple[NumberedInventory, tuple[GpuNumbered, ...]]:
    """Return the inventory with a number for every GPU, and the numbers that are new."""
    numbers = dict(durable)
    if before is not None:
        # Those of the last inventory hold even if the journal could not take them.
        numbers.update((gpu.identity.uuid, gpu.number) for gpu in before.gpus)
    fresh: list[GpuNumbered] = []
    for gpu in inventory.gpus:
        if gpu.uuid not in numbers:
            numbers[gpu.uuid] = max(numbers.values(), default=0) + 1
            fresh.append(GpuNumbered(gpu.uuid, numbers[gpu.uuid]))
    numbered = NumberedInventory(
        inventory.driver_version,
        inventory.cuda_driver_version,
        tuple(NumberedGpu(numbers[gpu.uuid], gpu) for gpu in inventory.gpus),
        inventory.missing,
        inventory.nvml_version,
    )
    return numbered, tuple(fresh)


def number_samples(
    samples: Sequence[GpuSample], inventory: NumberedInventory | None
) -> tuple[NumberedSample, ...]:
    """Return the samples with their GPUs' numbers; without those of GPUs that have none yet."""
    gpus = () if inventory is None else inventory.gpus
    numbers = {gpu.identity.uuid: gpu.number for gpu in gpus}
    return tuple(NumberedSample(numbers[s.uuid], s) for s in samples if s.uuid in numbers)
