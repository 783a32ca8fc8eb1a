"""The steps from how a GPU is partitioned to how it is to be, in the order in which they work.

They are worked out anew from what the driver tells after every step, so there is no plan to get
lost in: after a crash, or when somebody else has done a step, the rest is still the rest.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import assert_never

from stoker.agent.mig.comparing import slices_of
from stoker.agent.partitions import (
    ComputeInstance,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuInstance,
    GpuPartitions,
    SetMode,
    Step,
    Target,
)
from stoker.core.mig.geometry import Geometry, MigProfile, Placed
from stoker.core.mig.layouts import objection


def obstacle(gpu: GpuPartitions, target: Target) -> str:
    """Return why there is no way to the target, whatever is done; empty: there is one.

    While there is none, `next_steps` must not be asked.
    """
    if not target.is_enabled:
        assert not target.layout, target
        return ""
    if (wrong := objection(gpu.geometry, target.layout)) is not None:
        return wrong
    for placed in target.layout:
        profile = _profile(gpu.geometry, placed)
        offered = {each.compute_slices for each in profile.compute_profiles}
        if placed.compute == () and profile.compute_slices not in offered:
            return f"the driver tells no compute instance that takes all of {placed.profile}"
    return ""


def is_there(gpu: GpuPartitions, target: Target) -> bool:
    """Whether the GPU is as the target says."""
    return not needs_reset(gpu, target) and not next_steps(gpu, target)


def needs_reset(gpu: GpuPartitions, target: Target) -> bool:
    """Whether the wanted mode waits for a reset of the GPU or a reboot; nothing is done before."""
    return gpu.is_enabled != gpu.is_pending == target.is_enabled


def next_steps(gpu: GpuPartitions, target: Target) -> tuple[Step, ...]:
    """Return all steps from the one to the other; none while the wanted mode is pending.

    `obstacle` has found none.
    """
    if needs_reset(gpu, target):
        return ()
    way = _Way(gpu, target)
    if gpu.is_enabled == gpu.is_pending:
        mode = () if gpu.is_enabled == target.is_enabled else (SetMode(target.is_enabled),)
        return (*way.destroyed(), *mode, *way.created())
    # The other mode is pending: what is made now would be lost by the next reset.
    return (SetMode(target.is_enabled), *way.destroyed(), *way.created())


def kept_places(gpu: GpuPartitions, target: Target) -> dict[int, Placed]:
    """Return the GPU instances that stay, by ID; their compute instances may change."""
    if not gpu.is_enabled or not target.is_enabled:
        return {}
    wanted = {(each.start, each.size, each.profile): each for each in target.layout}
    return {
        each.id: wanted[place]
        for each in gpu.instances
        if (place := (each.start, each.size, each.profile)) in wanted
    }


def compute_changes(
    instance: GpuInstance, placed: Placed, geometry: Geometry
) -> tuple[tuple[ComputeInstance, ...], tuple[int, ...]]:
    """Return which compute instances of an instance that stays go, and the slices of new ones."""
    wanted = slices_of(placed.compute, _profile(geometry, placed))
    present = sorted(instance.compute_instances, key=lambda each: each.start)
    slices = _profile(geometry, placed).compute_slices
    for kept in _subsets(present):
        missing = Counter(wanted)
        missing.subtract(each.compute_slices for each in kept)
        if min(missing.values(), default=0) < 0:
            continue
        new = tuple(sorted(missing.elements(), reverse=True))
        taken = sum(_mask(each.start, each.compute_slices) for each in kept)
        if not kept or _fit(new, taken, slices):
            return tuple(each for each in present if each not in kept), new
    raise AssertionError(f"{placed} cannot be made of nothing")


def sentence(step: Step) -> str:
    """Return a step in words."""
    match step:
        case SetMode():
            return f"turn MIG mode {'on' if step.is_enabled else 'off'}"
        case DestroyComputeInstance():
            name = f" ({step.uuid})" if step.uuid else ""
            where = f"GPU instance {step.gpu_instance_id}"
            return f"destroy compute instance {step.compute_instance_id} of {where}{name}"
        case DestroyGpuInstance():
            return f"destroy GPU instance {step.gpu_instance_id}: {step.profile}@{step.start}"
        case CreateGpuInstance():
            return f"create GPU instance {step.profile}@{step.start}"
        case CreateComputeInstance():
            where = f"the GPU instance at {step.start}"
            return f"create a compute instance of {step.compute_slices}c in {where}"
        case _:
            assert_never(step)


class _Way:
    """What goes and what comes between a GPU and a target."""

    def __init__(self, gpu: GpuPartitions, target: Target) -> None:
        self._gpu = gpu
        self._target = target
        self._kept = kept_places(gpu, target)
        self._changes = {
            each.id: compute_changes(each, self._kept[each.id], gpu.geometry)
            for each in gpu.instances
            if each.id in self._kept
        }

    def destroyed(self) -> tuple[Step, ...]:
        gone = [each for each in self._gpu.instances if each.id not in self._kept]
        compute = (
            DestroyComputeInstance(instance.id, each.id, each.uuid)
            for instance in self._gpu.instances
            for each in (
                self._changes[instance.id][0]
                if instance.id in self._kept
                else instance.compute_instances
            )
        )
        return (*compute, *(DestroyGpuInstance(each.id, each.profile, each.start) for each in gone))

    def created(self) -> tuple[Step, ...]:
        stays = {placed: id_ for id_, placed in self._kept.items()}
        # The largest first: a small one may not take the only place of a large one. Places are
        # given here, but the driver's own books are kept in that order.
        order = sorted(self._target.layout, key=lambda each: (-each.size, each.start))
        instances = tuple(
            CreateGpuInstance(
                _profile(self._gpu.geometry, each).profile_id, each.profile, each.start, each.size
            )
            for each in order
            if each not in stays
        )
        compute = tuple(
            CreateComputeInstance(each.start, self._compute_profile_id(each, slices), slices)
            for each in order
            for slices in (
                self._changes[stays[each]][1]
                if each in stays
                else slices_of(each.compute, _profile(self._gpu.geometry, each))
            )
        )
        return (*instances, *compute)

    def _compute_profile_id(self, placed: Placed, slices: int) -> int:
        profile = _profile(self._gpu.geometry, placed)
        # Several may have as many slices: the one that takes all is what a whole instance gets.
        offered = [each for each in profile.compute_profiles if each.compute_slices == slices]
        return max(offered, key=lambda each: each.is_whole).profile_id


def _profile(geometry: Geometry, placed: Placed) -> MigProfile:
    profile = geometry.profile(placed.profile)
    assert profile is not None, f"{placed.profile} is not offered, and was not objected to"
    return profile


def _subsets(present: Sequence[ComputeInstance]) -> Iterator[tuple[ComputeInstance, ...]]:
    for count in range(len(present), -1, -1):
        yield from combinations(present, count)


def _fit(wanted: tuple[int, ...], taken: int, slices: int) -> bool:
    """Whether compute instances fit beside what is taken; like GPU instances, they begin at
    multiples of their size, of 4 for the large ones."""
    if not wanted:
        return True
    first, *rest = wanted
    stride = first if first <= 2 else 4
    return any(
        not taken & (mask := _mask(start, first)) and _fit(tuple(rest), taken | mask, slices)
        for start in range(0, slices - first + 1, stride)
    )


def _mask(start: int, count: int) -> int:
    return (1 << count) - 1 << start
