"""Which GPU instances lie beside each other on a board, what still fits, and where it is best put.

A layout is legal when nothing overlaps, every instance begins where its profile may, no profile
occurs more often than the board allows, and there are compute slices for all of them. Media
engines are one more limit: one instance with `+me` at a time, and `+me.all` takes them all, so
that only instances without any (`-me`) may be beside it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from stoker.core.errors import BadInput, shown
from stoker.core.mig.geometry import Geometry, Layout, MigProfile, Placed

# A GPU instance that is needed, wherever it lies: profile, and compute slices of each compute
# instance; empty: one that takes all of it.
Instance = tuple[str, tuple[int, ...]]

# NVML_GPU_INSTANCE_PROFILE_..._SLICE; above them are the variants: media, memory, graphics.
_PLAIN_CONSTANT_MAX = 6
_PART = re.compile(r"([1-9])c\.(.+)", re.ASCII)


def objection(geometry: Geometry, layout: Layout) -> str | None:
    """Return why a board cannot be cut up so; None: it can."""
    profiles: list[MigProfile] = []
    for each in layout:
        profile = geometry.profile(each.profile)
        if profile is None:
            return f"{each.profile} is not offered; there are {_offered(geometry)}"
        if each.start not in profile.starts or each.size != profile.memory_slices:
            return (
                f"{each.profile} cannot lie at {each.start} with {each.size} memory slices; it has "
                f"{profile.memory_slices} and begins at {', '.join(map(str, profile.starts))}"
            )
        if (reason := _compute_objection(profile, each.compute)) is not None:
            return reason
        profiles.append(profile)
    for number, each in enumerate(layout):
        for other in layout[:number]:
            if each.mask & other.mask:
                return (
                    f"{other.profile} at {other.start} and {each.profile} at {each.start} overlap"
                )
    return _count_objection(geometry, profiles)


def misfit(geometry: Geometry, instances: Sequence[Instance]) -> str | None:
    """Return why not even an empty board holds these GPU instances; None: it does."""
    profiles: list[MigProfile] = []
    for name, compute in instances:
        profile = geometry.profile(name)
        if profile is None:
            return f"{name} is not offered; there are {_offered(geometry)}"
        if (reason := _compute_objection(profile, compute)) is not None:
            return reason
        profiles.append(profile)
    if (reason := _count_objection(geometry, profiles)) is not None:
        return reason
    wanted = sum(profile.memory_slices for profile in profiles)
    if wanted > geometry.memory_slices:
        return f"they take {wanted} memory slices of {geometry.memory_slices}"
    if arrange(geometry, instances) is None:
        names = ", ".join(name for name, _ in instances)
        return f"there are slices enough, and no places at which {names} lie beside each other"
    return None


def free_starts(geometry: Geometry, layout: Layout, profile_name: str) -> tuple[int, ...]:
    """Return the memory slices at which one more instance may begin beside those of the layout."""
    profile = geometry.profile(profile_name)
    if profile is None or not _counts_allow(geometry, layout, profile):
        return ()
    taken = _taken(layout)
    return tuple(start for start in profile.starts if not taken & _mask(profile, start))


def best_start(geometry: Geometry, layout: Layout, profile_name: str) -> int | None:
    """Return the start that leaves most placements for what comes later; None: it does not fit.

    A lone 3g goes to 4, where it takes the memory slice that has no compute slice beside it.
    """
    profile = geometry.profile(profile_name)
    starts = free_starts(geometry, layout, profile_name)
    if profile is None or not starts:
        return None

    def rank(start: int) -> tuple[int, int, int]:
        placed = Placed(start, profile.memory_slices, profile.name)
        return (*_room(geometry, (*layout, placed)), -start)

    return max(starts, key=rank)


def layouts(geometry: Geometry, *, plain: bool = True) -> Iterator[Layout]:
    """Yield every legal layout, the empty one first; plain: no variants, no double-memory 1g.

    Every compute instance takes its whole GPU instance.
    """
    placements = _placements(geometry, is_plain_only=plain)

    def beyond(layout: Layout, taken: int, position: int) -> Iterator[Layout]:
        yield layout
        for place in range(position, len(placements)):
            profile, placed = placements[place]
            if not taken & placed.mask and _counts_allow(geometry, layout, profile):
                yield from beyond((*layout, placed), taken | placed.mask, place + 1)

    return beyond((), 0, 0)


@lru_cache(maxsize=64)
def maximal_layouts(geometry: Geometry, *, plain: bool = True) -> tuple[Layout, ...]:
    """Return the legal layouts to which nothing can be added (of what `plain` admits)."""
    placements = _placements(geometry, is_plain_only=plain)
    return tuple(
        layout
        for layout in layouts(geometry, plain=plain)
        if not any(
            not _taken(layout) & placed.mask and _counts_allow(geometry, layout, profile)
            for profile, placed in placements
        )
    )


def split_device(geometry: Geometry, name: str) -> tuple[str, int | None]:
    """Return the GPU instance profile of a MIG device, and its compute slices if it is a part.

    "1c.2g.20gb" is ("2g.20gb", 1), "2g.20gb" is ("2g.20gb", None), and so is "2c.2g.20gb".
    Raises BadInput that names what the board offers.
    """
    part = _PART.fullmatch(name)
    profile = geometry.profile(part[2] if part else name)
    if profile is None:
        raise BadInput(f"MIG device {shown(name)} is not offered; there are {_offered(geometry)}")
    slices = int(part[1]) if part else profile.compute_slices
    offered = [each.compute_slices for each in profile.compute_profiles]
    if slices not in (*offered, profile.compute_slices):
        raise BadInput(
            f"MIG device {shown(name)}: {profile.name} has no compute instance of {slices} "
            f"slices; there are {', '.join(f'{each}c' for each in offered)}"
        )
    return profile.name, None if slices == profile.compute_slices else slices


def instances_of(geometry: Geometry, devices: Mapping[str, int]) -> tuple[Instance, ...]:
    """Return the GPU instances that so many of each MIG device take, the largest first.

    Devices that are parts share as few GPU instances as hold them. Raises BadInput as
    `split_device` does.
    """
    whole: list[Instance] = []
    parts: dict[str, list[int]] = {}
    for name, count in devices.items():
        profile, slices = split_device(geometry, name)
        if slices is None:
            whole += [(profile, ())] * count
        else:
            parts.setdefault(profile, []).extend([slices] * count)
    for profile, wanted in parts.items():
        whole += [(profile, each) for each in _packed(geometry, profile, wanted)]
    order = {each.name: (-each.memory_slices, -each.compute_slices) for each in geometry.profiles}
    return tuple(sorted(whole, key=lambda each: (order[each[0]], each)))


def arrange(
    geometry: Geometry,
    instances: Sequence[Instance],
    keep: Layout = (),
    prefer: Layout = (),
) -> Layout | None:
    """Return the best layout of exactly these instances; None: there is none that is legal.

    All of `keep` stay where they are (compute instances too, so each must be one of the
    instances). Among the layouts that do so, as many of `prefer` as can be stay, those whose
    compute instances need no change before others; then the one that leaves most placements.
    The search is exact: it looks at every layout.
    """
    pool = Counter((name, _parts(geometry, name, compute)) for name, compute in instances)
    kept = tuple(
        Placed(each.start, each.size, each.profile, _parts(geometry, each.profile, each.compute))
        for each in keep
    )
    pool.subtract((each.profile, each.compute) for each in kept)
    if min(pool.values(), default=0) < 0 or objection(geometry, kept) is not None:
        return None
    liked = {
        (each.start, each.profile): _parts(geometry, each.profile, each.compute) for each in prefer
    }
    best: Layout | None = None
    best_rank: tuple[int, int, int, int] = (-1, -1, -1, -1)
    for layout in _fillings(geometry, kept, pool):
        staying = [each for each in layout if (each.start, each.profile) in liked]
        unchanged = sum(liked[each.start, each.profile] == each.compute for each in staying)
        rank = (len(staying), unchanged, *_room(geometry, layout))
        if rank > best_rank:
            best, best_rank = layout, rank
    return best


def describe(layout: Layout) -> str:
    """Return the layout for people, the largest first: "3g.40gb@4 2g.20gb@0 1g.10gb@2"."""
    if not layout:
        return "no instances"
    return " ".join(
        f"{each.profile}@{each.start}"
        + (f"({'+'.join(f'{slices}c' for slices in each.compute)})" if each.compute else "")
        for each in sorted(layout, key=lambda each: (-each.size, each.start))
    )


def place(geometry: Geometry, profiles: Sequence[MigProfile]) -> tuple[int, ...] | None:
    """Return the memory slice at which each instance begins; None when they do not fit together.

    Of those that are alike the first lies where a lone one would, if any does, the others upwards.
    """
    layout = arrange(geometry, [(profile.name, ()) for profile in profiles])
    if layout is None:
        return None
    starts: dict[str, list[int]] = {}
    for each in layout:
        starts.setdefault(each.profile, []).append(each.start)
    for name, found in starts.items():
        alone = best_start(geometry, (), name)
        found.sort(key=lambda start: (start != alone, start))
    return tuple(starts[profile.name].pop(0) for profile in profiles)


def instance_id(geometry: Geometry, memory_slices: int, start: int) -> int:
    """Return the ID of the GPU instance at this place: nodes of a tree, numbered from the root."""
    leaves = geometry.memory_slices // memory_slices
    return leaves - 1 + start // memory_slices


# --- what may be beside what


def _offered(geometry: Geometry) -> str:
    return ", ".join(profile.name for profile in geometry.profiles)


def _compute_objection(profile: MigProfile, compute: tuple[int, ...]) -> str | None:
    if sum(compute) > profile.compute_slices:
        return (
            f"compute instances of {profile.name} take {sum(compute)} compute slices of "
            f"{profile.compute_slices}"
        )
    most = {each.compute_slices: each.count_max for each in profile.compute_profiles}
    for slices, count in Counter(compute).items():
        if count > most.get(slices, 0):
            return (
                f"{profile.name} has at most {most.get(slices, 0)} compute instances of "
                f"{slices} slices, not {count}"
            )
    return None


def _count_objection(geometry: Geometry, profiles: Sequence[MigProfile]) -> str | None:
    for name, count in Counter(profile.name for profile in profiles).items():
        profile = geometry.profile(name)
        if profile is not None and count > profile.count_max:
            return f"there may be at most {profile.count_max} {name}, not {count}"
    wanted = sum(profile.compute_slices for profile in profiles)
    if wanted > geometry.compute_slices:
        return f"they take {wanted} compute slices of {geometry.compute_slices}"
    return _media_objection([profile.name for profile in profiles])


def _media_objection(names: Sequence[str]) -> str | None:
    extended = [name for name in names if name.endswith("+me")]
    if len(extended) > 1:
        return f"only one instance may have the media extensions, not {', '.join(extended)}"
    every = next((name for name in names if name.endswith("+me.all")), None)
    if every is not None:
        others = list(names)
        others.remove(every)
        having = [name for name in others if not name.endswith("-me")]
        if having:
            return f"{every} takes all media engines, and {having[0]} would have some"
    return None


def _counts_allow(geometry: Geometry, layout: Layout, profile: MigProfile) -> bool:
    """Whether one more of the profile may be there, wherever it lies."""
    profiles = [found for each in layout if (found := geometry.profile(each.profile)) is not None]
    return _count_objection(geometry, [*profiles, profile]) is None


def _mask(profile: MigProfile, start: int) -> int:
    return (1 << profile.memory_slices) - 1 << start


def _taken(layout: Layout) -> int:
    taken = 0
    for each in layout:
        taken |= each.mask
    return taken


def _placements(
    geometry: Geometry, *, is_plain_only: bool
) -> tuple[tuple[MigProfile, Placed], ...]:
    """Return every place that an empty board has, by place."""
    found = [
        (profile, Placed(start, profile.memory_slices, profile.name))
        for profile in geometry.profiles
        if not is_plain_only or profile.constant <= _PLAIN_CONSTANT_MAX
        for start in profile.starts
    ]
    return tuple(sorted(found, key=lambda each: each[1]))


def _room(geometry: Geometry, layout: Layout) -> tuple[int, int]:
    """Return how many placements a layout leaves, and how many memory slices those have.

    Variants take the places of the plain ones, and do not count again.
    """
    taken = _taken(layout)
    count = slices = 0
    for profile in geometry.profiles:
        if "+" in profile.name or "-" in profile.name:
            continue
        if _counts_allow(geometry, layout, profile):
            free = sum(not taken & _mask(profile, start) for start in profile.starts)
            count += free
            slices += free * profile.memory_slices
    return count, slices


# --- searching


def _parts(geometry: Geometry, name: str, compute: tuple[int, ...]) -> tuple[int, ...]:
    """Return the one way to write these compute instances: the largest first, all of it empty."""
    profile = geometry.profile(name)
    if profile is not None and compute == (profile.compute_slices,):
        return ()
    return tuple(sorted(compute, reverse=True))


def _packed(geometry: Geometry, name: str, wanted: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the compute instances of as few GPU instances as hold them.

    The largest first into the first that has room: sizes are so few that no other way does better.
    """
    profile = geometry.profile(name)
    assert profile is not None, f"{name} was split from a device of this board"
    found: list[tuple[int, ...]] = []
    for slices in sorted(wanted, reverse=True):
        for place, parts in enumerate(found):
            if _compute_objection(profile, (*parts, slices)) is None:
                found[place] = (*parts, slices)
                break
        else:
            found.append((slices,))
    return found


def _fillings(geometry: Geometry, kept: Layout, pool: Counter[Instance]) -> Iterator[Layout]:
    """Yield every legal layout of what is kept and all of the pool."""
    todo: list[tuple[MigProfile, tuple[int, ...]]] = []
    for (name, compute), count in pool.items():
        profile = geometry.profile(name)
        if profile is None:
            return
        todo += [(profile, compute)] * count
    todo.sort(key=lambda each: (-each[0].memory_slices, each[0].name, each[1]))
    kept_profiles = [
        found for each in kept if (found := geometry.profile(each.profile)) is not None
    ]
    if _count_objection(geometry, [*kept_profiles, *(profile for profile, _ in todo)]) is not None:
        return
    if any(_compute_objection(profile, compute) is not None for profile, compute in todo):
        return

    def fill(depth: int, taken: int, layout: Layout) -> Iterator[Layout]:
        if depth == len(todo):
            yield tuple(sorted(layout))
            return
        profile, compute = todo[depth]
        # Alike instances are placed in ascending order: their exchange is no other layout.
        above = layout[-1].start if depth and todo[depth - 1] == todo[depth] else -1
        for start in profile.starts:
            if start > above and not taken & _mask(profile, start):
                placed = Placed(start, profile.memory_slices, profile.name, compute)
                yield from fill(depth + 1, taken | placed.mask, (*layout, placed))

    yield from fill(0, _taken(kept), kept)
