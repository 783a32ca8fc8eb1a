"""Which GPU instances (MIG) a board can be cut into, and where they fit.

Figures are those of `nvidia-smi mig -lgip` and `-lgipp` on real boards; marked rows were not seen
in a listing and are scaled from the smaller ones. All these boards have seven compute slices and
eight memory slices, so they share profile IDs and placements, which count memory slices. Slice 7
has no compute slice beside it: only 3g at 4, a double-memory 1g at 6, and 7g reach it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

COMPUTE_SLICES = 7
MEMORY_SLICES = 8


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One kind of GPU instance that a board offers."""

    name: str  # "3g.40gb", with its attributes: "1g.10gb+me"
    profile_id: int
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]  # the memory slices at which it may begin
    memory_mib: int
    sm_count: int
    copy_engines: int
    decoders: int
    jpeg_decoders: int
    optical_flow: int
    count_max: int


def place(profiles: Sequence[MigProfile]) -> tuple[int, ...] | None:
    """Return the memory slice at which each instance begins; None when they do not fit together.

    Large instances are placed first, as the driver's guide advises, and a lone 3g at slice 4,
    where it wastes no compute slice.
    """
    if sum(profile.compute_slices for profile in profiles) > COMPUTE_SLICES:
        return None
    names = [profile.name for profile in profiles]
    if any(names.count(profile.name) > profile.count_max for profile in profiles):
        return None
    order = sorted(range(len(profiles)), key=lambda place: -profiles[place].memory_slices)
    starts: dict[int, int] = {}

    def fits(depth: int, taken: int) -> bool:
        if depth == len(order):
            return True
        profile = profiles[order[depth]]
        for start in reversed(profile.starts) if profile.memory_slices > 2 else profile.starts:
            mask = (1 << profile.memory_slices) - 1 << start
            if not taken & mask and fits(depth + 1, taken | mask):
                starts[order[depth]] = start
                return True
        return False

    return tuple(starts[place] for place in range(len(profiles))) if fits(0, 0) else None


def instance_id(memory_slices: int, start: int) -> int:
    """Return the ID of the GPU instance at this place: nodes of a tree, numbered from the root."""
    return {8: 0, 4: 1 + start // 4, 2: 3 + start // 2, 1: 7 + start}[memory_slices]


# Profile ID, compute slices, memory slices, first memory slices, how many at most.
_SHAPES = {
    "1g": (19, 1, 1, (0, 1, 2, 3, 4, 5, 6), 7),
    "double 1g": (15, 1, 2, (0, 2, 4, 6), 4),
    "2g": (14, 2, 2, (0, 2, 4), 3),
    "3g": (9, 3, 4, (0, 4), 2),
    "4g": (5, 4, 4, (0,), 1),
    "7g": (0, 7, 8, (0,), 1),
}
_MEDIA_EXTENSIONS_ID = 20

# Name, MiB, SMs, copy engines, decoders, JPEG decoders.
_Row = tuple[str, int, int, int, int, int]


def _board(*rows: _Row) -> tuple[MigProfile, ...]:
    """Return a board's profiles from a row per shape, and the 1g with the media engines."""
    plain = [
        MigProfile(
            name=name,
            profile_id=profile_id,
            compute_slices=compute,
            memory_slices=memory,
            starts=starts,
            memory_mib=mib,
            sm_count=sm_count,
            copy_engines=copy_engines,
            decoders=decoders,
            jpeg_decoders=jpeg,
            optical_flow=1 if compute == COMPUTE_SLICES else 0,
            count_max=count_max,
        )
        for (profile_id, compute, memory, starts, count_max), (
            name,
            mib,
            sm_count,
            copy_engines,
            decoders,
            jpeg,
        ) in zip(_SHAPES.values(), rows, strict=True)
    ]
    media = replace(
        plain[0],
        name=f"{plain[0].name}+me",
        profile_id=_MEDIA_EXTENSIONS_ID,
        decoders=1,
        jpeg_decoders=1,
        optical_flow=1,
        count_max=1,
    )
    return (plain[0], media, *plain[1:])


A100_40GB = _board(
    ("1g.5gb", 4864, 14, 1, 0, 0),
    ("1g.10gb", 9856, 14, 1, 1, 0),
    ("2g.10gb", 9856, 28, 2, 1, 0),
    ("3g.20gb", 19968, 42, 3, 2, 0),
    ("4g.20gb", 19968, 56, 4, 2, 0),
    ("7g.40gb", 40192, 98, 7, 5, 1),
)
A100_80GB = _board(
    ("1g.10gb", 9728, 14, 1, 0, 0),
    ("1g.20gb", 19968, 14, 1, 1, 0),
    ("2g.20gb", 19968, 28, 2, 1, 0),
    ("3g.40gb", 40192, 42, 3, 2, 0),
    ("4g.40gb", 40192, 56, 4, 2, 0),
    ("7g.80gb", 80896, 98, 7, 5, 1),
)
H100_80GB = _board(
    ("1g.10gb", 9984, 16, 1, 1, 1),
    ("1g.20gb", 20096, 26, 1, 1, 1),
    ("2g.20gb", 20096, 32, 2, 2, 2),
    ("3g.40gb", 40448, 60, 3, 3, 3),
    ("4g.40gb", 40448, 64, 4, 4, 4),
    ("7g.80gb", 81152, 132, 8, 7, 7),
)
H200_141GB = _board(
    ("1g.18gb", 16384, 16, 1, 1, 1),
    ("1g.35gb", 33024, 26, 1, 1, 1),
    ("2g.35gb", 33024, 32, 2, 2, 2),
    ("3g.71gb", 71168, 60, 3, 3, 3),
    ("4g.71gb", 71168, 64, 4, 4, 4),
    ("7g.141gb", 143104, 132, 8, 7, 7),
)
B200 = _board(
    ("1g.23gb", 22528, 18, 2, 1, 1),  # 20992 MiB with another driver
    ("1g.45gb", 45312, 30, 2, 1, 1),
    ("2g.45gb", 45312, 36, 4, 2, 2),
    ("3g.90gb", 91136, 70, 6, 3, 3),  # scaled, as the two below
    ("4g.90gb", 91136, 72, 8, 4, 4),
    ("7g.180gb", 182784, 148, 16, 7, 7),
)
