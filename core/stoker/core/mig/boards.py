"""What each board can be cut into, as far as it is known before its driver was asked.

Figures are those of `nvidia-smi mig -lgip` and `-lcip` on real boards, placements those of `-lgipp`
on an A100-40GB, an A30, an H100 NVL and an RTX PRO 6000; the other boards of seven slices share
their profile IDs and counts, and so, by analogy, their placements. Rows marked as estimated were
not seen in a listing: memory and SMs are scaled from the smaller profiles of the same board, the
names are those of NVIDIA's guide and of mig-parted's default configuration. Memory is what the
driver's struct carries, recovered from a column in GiB (multiples of 64 MiB).

Boards of one kind differ with driver and firmware (20992 or 22528 MiB for a B200's 1g.23gb, 7g of
186 or 189 GB on a GB200): whatever the driver tells wins (`told`).
"""

from dataclasses import dataclass, replace
from typing import Final

from stoker.core.mig.geometry import ComputeProfile, Geometry, MigProfile


@dataclass(frozen=True, slots=True)
class Board:
    """One kind of board, and what it can be cut into."""

    name: str  # as `core.gpu_models` calls it, where it can be simulated
    driver_name: str
    pci_device_ids: tuple[int, ...]  # device and vendor: 0x233010DE
    geometry: Geometry
    # A change of the mode takes effect at once and is lost with the driver (Hopper and later), or
    # takes a reset of the GPU and outlasts it (Ampere).
    is_toggled_at_once: bool
    source: str  # of its figures


def board_of(pci_device_id: int, driver_name: str) -> Board | None:
    """Return the board of that device, or else of that name; None when there is no table of it."""
    for board in BOARDS:
        if pci_device_id in board.pci_device_ids:
            return board
    return next((board for board in BOARDS if board.driver_name == driver_name), None)


def told(geometry_of_table: Geometry | None, told: Geometry) -> Geometry:
    """Return the geometry that the driver tells; the table fills in what it does not tell.

    Without root it tells no places (`starts` empty, `memory_slices` zero), and before there is a
    GPU instance no compute instance profiles. What neither tells of those follows the rule that
    all boards keep to; places cannot be guessed, so a profile without them can be made nowhere.
    """
    table = geometry_of_table or Geometry(0, 0, ())
    known = {profile.constant: profile for profile in table.profiles}
    slice_sms = min((profile.sm_count for profile in told.profiles), default=0)
    profiles = tuple(
        _filled(profile, known.get(profile.constant), slice_sms) for profile in told.profiles
    )
    slices = [profile.compute_slices for profile in profiles]
    ends = [start + profile.memory_slices for profile in profiles for start in profile.starts]
    return Geometry(
        compute_slices=told.compute_slices or table.compute_slices or max(slices, default=0),
        memory_slices=told.memory_slices or table.memory_slices or max(ends, default=0),
        profiles=profiles,
    )


def _filled(profile: MigProfile, known: MigProfile | None, slice_sms: int) -> MigProfile:
    if known is not None and known.compute_slices != profile.compute_slices:
        known = None  # a constant that means something else here
    if (
        known is not None
        and not profile.starts
        and profile.memory_slices in {0, known.memory_slices}
    ):
        profile = replace(profile, starts=known.starts, memory_slices=known.memory_slices)
    if profile.compute_profiles:
        return profile
    if known is None:
        return replace(profile, compute_profiles=_parts_of(profile, None, slice_sms))
    parts = tuple(
        replace(part, sm_count=part.sm_count * profile.sm_count // known.sm_count)
        for part in known.compute_profiles
    )
    return replace(profile, compute_profiles=parts)


# --- compute instances

# By compute slices: NVML_COMPUTE_INSTANCE_PROFILE_..._SLICE; the profile IDs are the same numbers.
_COMPUTE_CONSTANTS = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
# By compute slices of the GPU instance: the parts that are offered, and how many of each at most.
_PARTS: dict[int, dict[int, int]] = {
    1: {1: 1},
    2: {1: 2, 2: 1},
    3: {1: 3, 2: 1, 3: 1},
    4: {1: 4, 2: 2, 4: 1},
    7: {1: 7, 2: 3, 3: 2, 4: 1, 7: 1},
}
# A 1g of double memory has more SMs than a slice from Hopper on, and a compute profile of its own
# (NVML_COMPUTE_INSTANCE_PROFILE_1_SLICE_REV1) for all of them.
_WIDE_SLICE = 7


def _parts_of(
    profile: MigProfile, sms_per_part: int | None, slice_sms: int
) -> tuple[ComputeProfile, ...]:
    """Return its compute instance profiles; `slice_sms` is what a plain 1g has.

    Each slice of a part has `sms_per_part`; None: an equal share of the GPU instance.
    """
    whole = profile.compute_slices
    each = sms_per_part or profile.sm_count // whole
    is_wide = profile.constant == _ONE_DOUBLE and profile.sm_count > slice_sms
    return tuple(
        ComputeProfile(
            constant=_WIDE_SLICE if is_wide else _COMPUTE_CONSTANTS[slices],
            profile_id=_WIDE_SLICE if is_wide else _COMPUTE_CONSTANTS[slices],
            compute_slices=slices,
            count_max=count_max,
            sm_count=profile.sm_count if slices == whole else each * slices,
            is_whole=slices == whole,
        )
        for slices, count_max in _PARTS.get(whole, {}).items()
    )


# --- boards of seven compute slices and eight memory slices

# NVML_GPU_INSTANCE_PROFILE_...: the plain ones, media extensions (REV1), double memory (REV2).
_ONE, _TWO, _THREE, _FOUR, _SEVEN = range(5)
_ONE_MEDIA, _TWO_MEDIA, _ONE_DOUBLE = 7, 8, 9
_ONE_GRAPHICS, _TWO_GRAPHICS, _FOUR_GRAPHICS = 10, 11, 12
_ONE_NO_MEDIA, _TWO_NO_MEDIA, _ONE_ALL_MEDIA, _TWO_ALL_MEDIA = 13, 14, 15, 16

_HOPPER_SMS = 16  # of a slice, also where a GPU instance has more than its slices make up

# Constant, profile ID, compute slices, memory slices, first memory slices, how many at most. Slice
# 7 has no compute slice beside it: only 3g at 4, a double-memory 1g at 6, and 7g reach it.
_SHAPES = (
    (_ONE, 19, 1, 1, (0, 1, 2, 3, 4, 5, 6), 7),
    (_ONE_DOUBLE, 15, 1, 2, (0, 2, 4, 6), 4),
    (_TWO, 14, 2, 2, (0, 2, 4), 3),
    (_THREE, 9, 3, 4, (0, 4), 2),
    (_FOUR, 5, 4, 4, (0,), 1),
    (_SEVEN, 0, 7, 8, (0,), 1),
)
_SEVEN_SLICE_MEDIA_ID = 20

# Name, MiB, SMs, copy engines, decoders, JPEG decoders.
_Row = tuple[str, int, int, int, int, int]


def _of_seven(
    *rows: _Row, sms_per_part: int | None = None, estimated: tuple[str, ...] = ()
) -> Geometry:
    """Return a board's profiles from a row per shape, and the 1g with the media engines."""
    plain = [
        _with_parts(
            MigProfile(
                name=name,
                constant=constant,
                profile_id=profile_id,
                compute_slices=compute,
                memory_slices=memory,
                starts=starts,
                memory_mib=mib,
                sm_count=sm_count,
                copy_engines=copy_engines,
                decoders=decoders,
                jpeg_decoders=jpeg,
                optical_flow=1 if compute == 7 else 0,
                count_max=count_max,
                is_estimated=name in estimated,
            ),
            sms_per_part,
            rows[0][2],
        )
        for (constant, profile_id, compute, memory, starts, count_max), (
            name,
            mib,
            sm_count,
            copy_engines,
            decoders,
            jpeg,
        ) in zip(_SHAPES, rows, strict=True)
    ]
    media = replace(
        plain[0],
        name=f"{plain[0].name}+me",
        constant=_ONE_MEDIA,
        profile_id=_SEVEN_SLICE_MEDIA_ID,
        decoders=1,
        jpeg_decoders=1,
        optical_flow=1,
        count_max=1,
    )
    return Geometry(7, 8, (plain[0], media, *plain[1:]))


def _with_parts(profile: MigProfile, sms_per_part: int | None, slice_sms: int) -> MigProfile:
    return replace(profile, compute_profiles=_parts_of(profile, sms_per_part, slice_sms))


# --- boards of four compute slices; their grid of memory slices is finer or not

# Name, constant, profile ID, compute slices, MiB, SMs, copy engines, decoders, JPEG decoders,
# optical flow accelerators, how many at most.
_FullRow = tuple[str, int, int, int, int, int, int, int, int, int, int]


def _of_four(memory_slices: int, *rows: _FullRow) -> Geometry:
    """Return a board on which every profile may begin wherever its size divides the grid."""
    step = memory_slices // 4
    return Geometry(
        4,
        memory_slices,
        tuple(
            _with_parts(
                MigProfile(
                    name=name,
                    constant=constant,
                    profile_id=profile_id,
                    compute_slices=compute,
                    memory_slices=compute * step,
                    starts=tuple(range(0, memory_slices, compute * step)),
                    memory_mib=mib,
                    sm_count=sm_count,
                    copy_engines=copy_engines,
                    decoders=decoders,
                    jpeg_decoders=jpeg,
                    optical_flow=optical_flow,
                    count_max=count_max,
                ),
                None,
                rows[0][5],
            )
            for (
                name,
                constant,
                profile_id,
                compute,
                mib,
                sm_count,
                copy_engines,
                decoders,
                jpeg,
                optical_flow,
                count_max,
            ) in rows
        ),
    )


A30_24GB: Final = Board(
    name="A30-24GB",
    driver_name="NVIDIA A30",
    pci_device_ids=(0x20B710DE,),
    is_toggled_at_once=False,
    source="-lgip and -lgipp of an A30; 2g.12gb+me with a driver of 525 or later",
    geometry=_of_four(
        4,
        ("1g.6gb", _ONE, 14, 1, 5952, 14, 1, 1, 0, 0, 4),
        ("1g.6gb+me", _ONE_MEDIA, 21, 1, 5952, 14, 1, 1, 1, 1, 1),
        ("2g.12gb", _TWO, 5, 2, 11968, 28, 2, 2, 0, 0, 2),
        ("2g.12gb+me", _TWO_MEDIA, 6, 2, 11968, 28, 2, 2, 1, 1, 1),
        ("4g.24gb", _FOUR, 0, 4, 24000, 56, 4, 4, 1, 1, 1),
    ),
)
A100_40GB: Final = Board(
    name="A100-40GB",
    driver_name="NVIDIA A100-SXM4-40GB",
    pci_device_ids=(0x20B010DE, 0x20B110DE, 0x20F110DE, 0x20F610DE),
    is_toggled_at_once=False,
    source="NVIDIA MIG user guide: -lgip, -lgipp, -lcip",
    geometry=_of_seven(
        ("1g.5gb", 4864, 14, 1, 0, 0),
        ("1g.10gb", 9856, 14, 1, 1, 0),
        ("2g.10gb", 9856, 28, 2, 1, 0),
        ("3g.20gb", 19968, 42, 3, 2, 0),
        ("4g.20gb", 19968, 56, 4, 2, 0),
        ("7g.40gb", 40192, 98, 7, 5, 1),
    ),
)
A100_80GB: Final = Board(
    name="A100-80GB",
    driver_name="NVIDIA A100-SXM4-80GB",
    pci_device_ids=(0x20B210DE, 0x20B510DE, 0x20F310DE, 0x20F510DE),
    is_toggled_at_once=False,
    source="-lgip of PCIe and SXM boards; 7g was seen with 78.75, 79.00 and 79.25 GiB",
    geometry=_of_seven(
        ("1g.10gb", 9728, 14, 1, 0, 0),
        ("1g.20gb", 19968, 14, 1, 1, 0),
        ("2g.20gb", 19968, 28, 2, 1, 0),
        ("3g.40gb", 40192, 42, 3, 2, 0),
        ("4g.40gb", 40192, 56, 4, 2, 0),
        ("7g.80gb", 80896, 98, 7, 5, 1),
    ),
)
H100_80GB: Final = Board(
    name="H100-80GB",
    driver_name="NVIDIA H100 80GB HBM3",
    pci_device_ids=(0x233010DE, 0x233110DE),
    is_toggled_at_once=True,
    source="-lgip of H100 80GB HBM3 boards",
    geometry=_of_seven(
        ("1g.10gb", 9984, 16, 1, 1, 1),
        ("1g.20gb", 20096, 26, 1, 1, 1),
        ("2g.20gb", 20096, 32, 2, 2, 2),
        ("3g.40gb", 40448, 60, 3, 3, 3),
        ("4g.40gb", 40448, 64, 4, 4, 4),
        ("7g.80gb", 81152, 132, 8, 7, 7),
        sms_per_part=_HOPPER_SMS,
    ),
)
H100_94GB: Final = Board(
    name="H100-94GB",
    driver_name="NVIDIA H100 NVL",
    pci_device_ids=(0x232110DE, 0x233A10DE),
    is_toggled_at_once=True,
    source="-lgip and -lgipp of H100 NVL boards (NVIDIA/gpu-operator, pull 903)",
    geometry=_of_seven(
        ("1g.12gb", 11008, 16, 1, 1, 1),
        ("1g.24gb", 22144, 26, 1, 1, 1),
        ("2g.24gb", 22144, 32, 2, 2, 2),
        ("3g.47gb", 47488, 60, 3, 3, 3),
        ("4g.47gb", 47488, 64, 4, 4, 4),
        ("7g.94gb", 95360, 132, 8, 7, 7),
        sms_per_part=_HOPPER_SMS,
    ),
)
GH200_96GB: Final = Board(
    name="GH200-96GB",
    driver_name="NVIDIA GH200 480GB",
    pci_device_ids=(0x234210DE,),
    is_toggled_at_once=True,
    source="-lgip of a GH200 with 96 GB, which also shows the wide compute instance of 1g.24gb",
    geometry=_of_seven(
        ("1g.12gb", 11264, 16, 1, 1, 1),
        ("1g.24gb", 23552, 26, 1, 1, 1),
        ("2g.24gb", 23552, 32, 2, 2, 2),
        ("3g.48gb", 47616, 60, 3, 3, 3),
        ("4g.48gb", 47616, 64, 4, 4, 4),
        ("7g.96gb", 95232, 132, 8, 7, 7),
        sms_per_part=_HOPPER_SMS,
    ),
)
GH200_144GB: Final = Board(
    name="GH200-144GB",
    driver_name="NVIDIA GH200 144G HBM3e",
    pci_device_ids=(0x234810DE,),
    is_toggled_at_once=True,
    source="first rows of -lgip (NVIDIA/mig-parted, pull 139)",
    geometry=_of_seven(
        ("1g.18gb", 17920, 16, 1, 1, 1),
        ("1g.36gb", 36096, 26, 1, 1, 1),
        ("2g.36gb", 36096, 32, 2, 2, 2),
        ("3g.72gb", 72704, 60, 3, 3, 3),
        ("4g.72gb", 72704, 64, 4, 4, 4),
        ("7g.144gb", 145920, 132, 8, 7, 7),
        sms_per_part=_HOPPER_SMS,
        estimated=("3g.72gb", "4g.72gb", "7g.144gb"),
    ),
)
H200_141GB: Final = Board(
    name="H200-141GB",
    driver_name="NVIDIA H200",
    pci_device_ids=(0x233510DE, 0x233B10DE),
    is_toggled_at_once=True,
    source="-lgip of an H200 (NVIDIA/mig-parted, no. 120)",
    geometry=_of_seven(
        ("1g.18gb", 16384, 16, 1, 1, 1),
        ("1g.35gb", 33024, 26, 1, 1, 1),
        ("2g.35gb", 33024, 32, 2, 2, 2),
        ("3g.71gb", 71168, 60, 3, 3, 3),
        ("4g.71gb", 71168, 64, 4, 4, 4),
        ("7g.141gb", 143104, 132, 8, 7, 7),
        sms_per_part=_HOPPER_SMS,
    ),
)
B200_180GB: Final = Board(
    name="B200",
    driver_name="NVIDIA B200",
    pci_device_ids=(0x290110DE,),
    is_toggled_at_once=True,
    source="first rows of -lgip (NVIDIA/mig-parted, pulls 166 and 187)",
    geometry=_of_seven(
        ("1g.23gb", 22528, 18, 2, 1, 1),
        ("1g.45gb", 45312, 30, 2, 1, 1),
        ("2g.45gb", 45312, 36, 4, 2, 2),
        ("3g.90gb", 91136, 70, 6, 3, 3),
        ("4g.90gb", 91136, 72, 8, 4, 4),
        ("7g.180gb", 182784, 148, 16, 7, 7),
        estimated=("3g.90gb", "4g.90gb", "7g.180gb"),
    ),
)
GB200_186GB: Final = Board(
    name="GB200",
    driver_name="NVIDIA GB200",
    pci_device_ids=(0x294110DE,),
    is_toggled_at_once=True,
    source="first rows of -lgip (NVIDIA/gpu-operator, no. 1303; NVIDIA/mig-parted, no. 227)",
    geometry=_of_seven(
        ("1g.23gb", 22528, 18, 2, 1, 1),
        ("1g.47gb", 46592, 32, 2, 1, 1),
        ("2g.47gb", 46592, 38, 4, 2, 2),
        ("3g.93gb", 94208, 72, 6, 3, 3),
        ("4g.93gb", 94208, 76, 8, 4, 4),
        ("7g.186gb", 188928, 152, 16, 7, 7),
        estimated=("3g.93gb", "4g.93gb", "7g.186gb"),
    ),
)
RTX_PRO_6000: Final = Board(
    name="RTX-PRO-6000",
    driver_name="NVIDIA RTX PRO 6000 Blackwell Server Edition",
    pci_device_ids=(0x2BB510DE,),
    is_toggled_at_once=True,
    source="-lgip and -lgipp of server boards; an older driver shows 23.12, 46.50 and 93.38 GiB",
    geometry=_of_four(
        12,
        ("1g.24gb", _ONE, 14, 1, 24192, 46, 1, 1, 1, 0, 4),
        ("1g.24gb+me", _ONE_MEDIA, 21, 1, 24192, 46, 1, 1, 1, 1, 1),
        ("1g.24gb+gfx", _ONE_GRAPHICS, 47, 1, 24192, 46, 1, 1, 1, 0, 4),
        ("1g.24gb+me.all", _ONE_ALL_MEDIA, 65, 1, 24192, 46, 1, 4, 4, 1, 1),
        ("1g.24gb-me", _ONE_NO_MEDIA, 67, 1, 24192, 46, 1, 0, 0, 0, 4),
        ("2g.48gb", _TWO, 5, 2, 48512, 94, 2, 2, 2, 0, 2),
        ("2g.48gb+gfx", _TWO_GRAPHICS, 35, 2, 48512, 94, 2, 2, 2, 0, 2),
        ("2g.48gb+me.all", _TWO_ALL_MEDIA, 64, 2, 48512, 94, 2, 4, 4, 1, 1),
        ("2g.48gb-me", _TWO_NO_MEDIA, 66, 2, 48512, 94, 2, 0, 0, 0, 2),
        ("4g.96gb", _FOUR, 0, 4, 97280, 188, 4, 4, 4, 1, 1),
        ("4g.96gb+gfx", _FOUR_GRAPHICS, 32, 4, 97408, 188, 4, 4, 4, 1, 1),
    ),
)

BOARDS: Final = (
    A30_24GB,
    A100_40GB,
    A100_80GB,
    H100_80GB,
    H100_94GB,
    GH200_96GB,
    GH200_144GB,
    H200_141GB,
    B200_180GB,
    GB200_186GB,
    RTX_PRO_6000,
)
