"""A GPU's partitions in the terms in which they are wanted, and whether the two are the same."""

from collections import Counter
from collections.abc import Mapping

from stoker.agent.partitions import GpuInstance, GpuPartitions, Target
from stoker.core.errors import BadInput
from stoker.core.mig.geometry import Geometry, Layout, MigProfile, Placed, Wanted
from stoker.core.mig.layouts import split_device

# A MIG device: its GPU instance's profile, and its compute slices if it is a part of one.
Part = tuple[str, int | None]


def target_of(gpu: GpuPartitions) -> Target:
    """Return how the GPU is now, as something to get back to."""
    return Target(gpu.is_enabled, layout_of(gpu))


def layout_of(gpu: GpuPartitions) -> Layout:
    """Return the GPU instances that are of use: those without compute instances are not."""
    return tuple(
        sorted(
            Placed(each.start, each.size, each.profile, compute_of(each, gpu.geometry))
            for each in gpu.instances
            if each.compute_instances
        )
    )


def compute_of(instance: GpuInstance, geometry: Geometry) -> tuple[int, ...]:
    """Return its compute instances as `Placed.compute` tells them, the largest first."""
    slices = tuple(
        sorted((each.compute_slices for each in instance.compute_instances), reverse=True)
    )
    profile = geometry.profile(instance.profile)
    return () if profile is not None and slices == (profile.compute_slices,) else slices


def slices_of(compute: tuple[int, ...], profile: MigProfile) -> tuple[int, ...]:
    """Return the compute slices of each compute instance, the largest first."""
    return tuple(sorted(compute, reverse=True)) or (profile.compute_slices,)


def wanted_of_target(target: Target) -> Wanted:
    """Return the devices of a layout; where they are is not part of it."""
    return Wanted(target.is_enabled, tuple(sorted(named(parts_of(target.layout)).items())))


def named(parts: Mapping[Part, int]) -> Mapping[str, int]:
    """Return how many there are of each device, by name."""
    return {
        f"{slices}c.{profile}" if slices else profile: count
        for (profile, slices), count in parts.items()
    }


def is_as_wanted(gpu: GpuPartitions, wanted: Wanted) -> bool:
    """Whether the GPU has just the wanted devices, wherever they are, and nothing half made."""
    is_mode_right = gpu.is_enabled == gpu.is_pending == wanted.is_enabled
    is_whole = all(each.compute_instances for each in gpu.instances)
    if not (is_mode_right and is_whole):
        return False
    try:
        return devices_of(gpu.geometry, wanted) == parts_of(layout_of(gpu))
    except BadInput:
        return False  # it has none of what its board does not offer


def devices_of(geometry: Geometry, wanted: Wanted) -> Counter[Part]:
    """Return how many of each device are wanted. Raises BadInput naming what the board offers."""
    found: Counter[Part] = Counter()
    for name, count in wanted.devices:
        found[split_device(geometry, name)] += count
    return +found


def parts_of(layout: Layout) -> Counter[Part]:
    """Return how many of each device a layout has."""
    return Counter(
        (placed.profile, slices) for placed in layout for slices in (placed.compute or (None,))
    )
