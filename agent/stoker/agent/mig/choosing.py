"""Decides where a GPU's instances are to lie, before anything is touched.

The search is exact (`core.mig.layouts.arrange`): who uses an instance keeps it where it is if any
legal layout has it there; then as many of the idle ones stay as can; then most room is left.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from stoker.agent.mig.comparing import (
    Part,
    compute_of,
    devices_of,
    is_as_wanted,
    named,
    parts_of,
    target_of,
)
from stoker.agent.mig.in_the_way import GpuUsers
from stoker.agent.mig.steps import compute_changes, kept_places
from stoker.agent.partitions import GpuInstance, GpuPartitions, Target
from stoker.core.errors import BadInput
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import arrange, describe, instances_of, misfit, objection
from stoker.core.mig.reports import InTheWay

# A GPU instance that is needed: profile, and the compute slices of its compute instances.
_Needed = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a GPU does not get the wanted partitions."""

    reason: str
    # Who would have to leave; nobody: it cannot be done at all.
    in_the_way: tuple[InTheWay, ...] = ()
    # What could be done if they left; None: nothing.
    target: Target | None = None


def choose(gpu: GpuPartitions, wanted: Wanted, users: GpuUsers) -> Target | Refusal:
    """Return the layout to go to; or why there is none, and what would be if its users left."""
    counts = [count for _, count in wanted.devices]
    if min(counts, default=0) < 0:
        return Refusal(f"{gpu.uuid}: less than none of a MIG device is wanted")
    if not wanted.is_enabled and any(counts):
        return Refusal(f"{gpu.uuid}: MIG devices are wanted, and MIG mode off")
    if is_as_wanted(gpu, wanted):
        return target_of(gpu)
    try:
        needed = instances_of(gpu.geometry, dict(named(devices_of(gpu.geometry, wanted))))
    except BadInput as error:
        return Refusal(f"{gpu.uuid} ({gpu.model}): {error}")
    if (reason := misfit(gpu.geometry, needed)) is not None:
        names = ", ".join(f"{count}x {name}" for name, count in wanted.devices)
        return Refusal(f"{gpu.uuid} ({gpu.model}): {names} cannot be: {reason}")
    target = _least_disturbing(gpu, wanted, needed, users)
    return admit(gpu, target, users)


def admit(gpu: GpuPartitions, target: Target, users: GpuUsers) -> Target | Refusal:
    """Return the target, or who has to leave before it can be gone to."""
    people = disturbed(gpu, target, users)
    if not people:
        return target
    names = "; ".join(each.name for each in people)
    if gpu.is_enabled == target.is_enabled:
        what = f"{describe(_going(gpu, target))} would have to go, and is"
    else:
        mode = "on" if target.is_enabled else "off"
        what = f"MIG mode cannot be turned {mode} while the GPU is"
    return Refusal(f"{gpu.uuid}: {what} in use by {names}", people, target)


def disturbed(gpu: GpuPartitions, target: Target, users: GpuUsers) -> tuple[InTheWay, ...]:
    """Return who uses what goes on the way to the target; each once."""
    if gpu.is_enabled != target.is_enabled:
        found = [*_all_of(users), *users.holders]
    else:
        going = disturbed_instances(gpu, target)
        found = [user for id_ in sorted(going) for user in users.instances.get(id_, ())]
        found += users.anywhere if going else ()
    return tuple(dict.fromkeys(found))


def disturbed_instances(gpu: GpuPartitions, target: Target) -> frozenset[int]:
    """Return the IDs of the GPU instances that go, or lose one of their compute instances."""
    kept = kept_places(gpu, target)
    return frozenset(
        each.id
        for each in gpu.instances
        if each.id not in kept or compute_changes(each, kept[each.id], gpu.geometry)[0]
    )


def _least_disturbing(
    gpu: GpuPartitions, wanted: Wanted, needed: Sequence[_Needed], users: GpuUsers
) -> Target:
    if not wanted.is_enabled or not gpu.is_enabled:
        layout = arrange(gpu.geometry, needed)
        assert layout is not None, "no misfit, and yet no layout"
        return Target(wanted.is_enabled, layout)
    used = {each.id for each in gpu.instances if users.anywhere or each.id in users.instances}
    # A GPU instance without compute instances is nobody's.
    busy = [each for each in gpu.instances if each.id in used and each.compute_instances]
    for gone in _fewest_first(busy, users):
        stay = [each for each in busy if each not in gone]
        if (layout := _layout_with(gpu, wanted, stay)) is not None:
            return Target(True, layout)
    raise AssertionError("no misfit, and yet no layout")


def _fewest_first(
    busy: Sequence[GpuInstance], users: GpuUsers
) -> Iterator[tuple[GpuInstance, ...]]:
    """Yield what may have to go: as few instances as can be, of as few users as can be."""
    for count in range(len(busy) + 1):
        yield from sorted(
            combinations(busy, count),
            key=lambda gone: sum(len(users.instances.get(each.id, ())) for each in gone),
        )


def _layout_with(gpu: GpuPartitions, wanted: Wanted, stay: Sequence[GpuInstance]) -> Layout | None:
    prefer = tuple(_as_placed(gpu, each) for each in gpu.instances)
    for keep, instances in _ways_to_keep(gpu, wanted, stay):
        if (layout := arrange(gpu.geometry, instances, keep, prefer)) is not None:
            return layout
    return None


def _ways_to_keep(
    gpu: GpuPartitions, wanted: Wanted, stay: Sequence[GpuInstance]
) -> Sequence[tuple[Layout, Sequence[_Needed]]]:
    """Return what these instances may become without losing anything, and all that is needed.

    Devices that are parts may be added to those that have room, or be made elsewhere; the ways
    that take few GPU instances come first.
    """
    left = devices_of(gpu.geometry, wanted)
    left.subtract(part for each in stay for part in parts_of((_as_placed(gpu, each),)).elements())
    if min(left.values(), default=0) < 0:
        return ()
    ways = [
        (keep, [*((each.profile, each.compute) for each in keep), *_made_of(gpu, rest)])
        for keep, rest in _grown(gpu, +left, stay)
    ]
    return sorted(ways, key=lambda way: len(way[1]))


def _made_of(gpu: GpuPartitions, parts: Counter[Part]) -> Sequence[_Needed]:
    return instances_of(gpu.geometry, dict(named(+parts)))


def _grown(
    gpu: GpuPartitions, left: Counter[Part], stay: Sequence[GpuInstance]
) -> Iterator[tuple[Layout, Counter[Part]]]:
    """Yield what these may grow to with some of what is left, and what is left then."""
    if not stay:
        yield (), left
        return
    first, *others = stay
    now = _as_placed(gpu, first)
    sizes = [(part, count) for part, count in left.items() if part[0] == first.profile and part[1]]
    # An instance that is one device has no room for another.
    ranges = [range(count + 1) if now.compute else range(1) for _, count in sizes]
    for counts in product(*ranges):
        added = Counter({part: count for (part, _), count in zip(sizes, counts, strict=True)})
        new = [slices for (_, slices), count in added.items() for _ in range(count) if slices]
        placed = replace(now, compute=tuple(sorted((*now.compute, *new), reverse=True)))
        if not new:
            placed = now
        elif not _has_room(gpu, first, placed):
            continue
        for keep, rest in _grown(gpu, left - added, others):
            yield (placed, *keep), rest


def _has_room(gpu: GpuPartitions, instance: GpuInstance, placed: Placed) -> bool:
    is_legal = objection(gpu.geometry, (placed,)) is None
    return is_legal and not compute_changes(instance, placed, gpu.geometry)[0]


def _as_placed(gpu: GpuPartitions, instance: GpuInstance) -> Placed:
    compute = compute_of(instance, gpu.geometry)
    return Placed(instance.start, instance.size, instance.profile, compute)


def _going(gpu: GpuPartitions, target: Target) -> Layout:
    going = disturbed_instances(gpu, target)
    return tuple(_as_placed(gpu, each) for each in gpu.instances if each.id in going)


def _all_of(users: GpuUsers) -> Iterator[InTheWay]:
    for id_ in sorted(users.instances):
        yield from users.instances[id_]
    yield from users.anywhere
