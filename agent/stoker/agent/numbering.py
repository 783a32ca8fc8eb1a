"""Which short number each GPU has in frames: it keeps it for good, also while it is away.

Readings number nothing, but they show when there is more to number or to tell of than is known.
"""

from collections.abc import Sequence

from stoker.agent.facts import Fact
from stoker.agent.model import Host, NumberedGpu, NumberedInventory, NumberedSample
from stoker.agent.readings import (
    GpuIdentity,
    GpuReading,
    GpuSample,
    Inventory,
    MigDeviceIdentity,
    MigDeviceReading,
)
from stoker.agent.records import Durable, GpuNumbered


def number_gpus(
    inventory: Inventory,
    durable: Durable,
    before: NumberedInventory | None,
    host: Host | None,
) -> tuple[NumberedInventory, tuple[GpuNumbered, ...]]:
    """Return the inventory with a number for every GPU, and the numbers that are new."""
    numbers = dict(durable.numbers)
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
        host,
    )
    return numbered, tuple(fresh)


def number_samples(
    samples: Sequence[GpuSample], inventory: NumberedInventory | None
) -> tuple[NumberedSample, ...]:
    """Return the samples with their GPUs' numbers; without those of GPUs that have none yet."""
    gpus = () if inventory is None else inventory.gpus
    numbers = {gpu.identity.uuid: gpu.number for gpu in gpus}
    return tuple(NumberedSample(numbers[s.uuid], s) for s in samples if s.uuid in numbers)


def is_outdated(inventory: NumberedInventory | None, readings: Sequence[GpuReading]) -> bool:
    """Whether readings tell of GPUs, MIG devices or NVLinks that the inventory does not have.

    A GPU that could not be read says nothing, and nothing of MIG devices when they could not all be
    listed. Links that went down are no reason either: one that comes and goes would have the whole
    fleet hear of it each time.
    """
    known = () if inventory is None else inventory.gpus
    gpus = {each.identity.uuid: each.identity for each in known}
    for reading in readings:
        if reading.is_lost:
            continue
        gpu = gpus.get(reading.uuid)
        if gpu is None or _has_other_parts(gpu, reading):
            return True
        if sum(reading.by_label.get(Fact.NVLINK_UP, {}).values()) > gpu.nvlinks_active:
            return True
    return False


def _has_other_parts(gpu: GpuIdentity, reading: GpuReading) -> bool:
    if any(failure.fact == Fact.MIG_MODE for failure in reading.failures):
        return False
    told = {_placed(each) for each in reading.mig_devices}
    return told != {_placed(each) for each in gpu.mig_devices}


def _placed(device: MigDeviceIdentity | MigDeviceReading) -> tuple[str, str, int, int]:
    """Return what tells two MIG devices apart: a UUID may come again with another layout."""
    return (device.uuid, device.profile, device.gpu_instance_id, device.compute_instance_id)
