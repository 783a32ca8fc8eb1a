"""What is known of each board before its driver was asked, and what the driver's word changes."""

from dataclasses import replace

import pytest

from stoker.core.gpu_models import MODELS, GpuModel
from stoker.core.mig.boards import (
    A30_24GB,
    A100_40GB,
    B200_180GB,
    BOARDS,
    GB200_186GB,
    GH200_144GB,
    H100_80GB,
    RTX_PRO_6000,
    Board,
    board_of,
    told,
)
from stoker.core.mig.geometry import Geometry, MigProfile, Placed
from stoker.core.mig.layouts import layouts, objection

every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def test_eleven_boards_with_seventy_nine_profiles() -> None:
    assert len(BOARDS) == 11
    assert sum(len(board.geometry.profiles) for board in BOARDS) == 79
    assert len({board.name for board in BOARDS}) == 11
    ids = [device for board in BOARDS for device in board.pci_device_ids]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("board", "name", "profile_id", "mib", "sm_count", "count_max", "starts", "size"),
    [
        (A30_24GB, "1g.6gb", 14, 5952, 14, 4, (0, 1, 2, 3), 1),
        (A30_24GB, "2g.12gb+me", 6, 11968, 28, 1, (0, 2), 2),
        (A30_24GB, "4g.24gb", 0, 24000, 56, 1, (0,), 4),
        (A100_40GB, "1g.5gb+me", 20, 4864, 14, 1, (0, 1, 2, 3, 4, 5, 6), 1),
        (A100_40GB, "1g.10gb", 15, 9856, 14, 4, (0, 2, 4, 6), 2),
        (A100_40GB, "2g.10gb", 14, 9856, 28, 3, (0, 2, 4), 2),
        (A100_40GB, "7g.40gb", 0, 40192, 98, 1, (0,), 8),
        (H100_80GB, "1g.20gb", 15, 20096, 26, 4, (0, 2, 4, 6), 2),
        (H100_80GB, "3g.40gb", 9, 40448, 60, 2, (0, 4), 4),
        (H100_80GB, "4g.40gb", 5, 40448, 64, 1, (0,), 4),
        (RTX_PRO_6000, "1g.24gb+gfx", 47, 24192, 46, 4, (0, 3, 6, 9), 3),
        (RTX_PRO_6000, "2g.48gb-me", 66, 48512, 94, 2, (0, 6), 6),
        (RTX_PRO_6000, "1g.24gb+me.all", 65, 24192, 46, 1, (0, 3, 6, 9), 3),
        (RTX_PRO_6000, "4g.96gb+gfx", 32, 97408, 188, 1, (0,), 12),
    ],
)
def test_what_listings_of_real_boards_show(
    board: Board,
    name: str,
    profile_id: int,
    mib: int,
    sm_count: int,
    count_max: int,
    starts: tuple[int, ...],
    size: int,
) -> None:
    found = profile(board.geometry, name)
    assert (found.profile_id, found.memory_mib, found.sm_count) == (profile_id, mib, sm_count)
    assert (found.count_max, found.starts, found.memory_slices) == (count_max, starts, size)


def profile(geometry: Geometry, name: str) -> MigProfile:
    found = geometry.profile(name)
    assert found is not None
    return found


def test_only_what_no_listing_shows_is_marked() -> None:
    marked = [
        (board, each.name)
        for board in BOARDS
        for each in board.geometry.profiles
        if each.is_estimated
    ]
    assert marked == [
        *((GH200_144GB, name) for name in ("3g.72gb", "4g.72gb", "7g.144gb")),
        *((B200_180GB, name) for name in ("3g.90gb", "4g.90gb", "7g.180gb")),
        *((GB200_186GB, name) for name in ("3g.93gb", "4g.93gb", "7g.186gb")),
    ]


@every_board
def test_no_layout_has_more_than_the_board(board: Board) -> None:
    geometry = board.geometry
    largest = max(geometry.profiles, key=lambda each: each.memory_mib)
    chips = max(each.sm_count for each in geometry.profiles)
    for layout in layouts(geometry, plain=False):
        profiles = [profile(geometry, each.profile) for each in layout]
        assert sum(each.memory_mib for each in profiles) <= largest.memory_mib
        assert sum(each.sm_count for each in profiles) <= chips
        assert sum(each.compute_slices for each in profiles) <= geometry.compute_slices
        assert sum(each.optical_flow for each in profiles) <= 1


@every_board
def test_a_profile_is_what_its_name_says(board: Board) -> None:
    geometry = board.geometry
    for attribute in ("name", "constant", "profile_id"):
        assert len({getattr(each, attribute) for each in geometry.profiles}) == len(
            geometry.profiles
        )
    for each in geometry.profiles:
        assert each.name.startswith(f"{each.compute_slices}g.")
        alone = tuple(
            Placed(start, each.memory_slices, each.name) for start in each.starts[: each.count_max]
        )
        assert len(alone) == each.count_max
        assert objection(geometry, alone) is None  # as many as there may be do fit
        assert all(start + each.memory_slices <= geometry.memory_slices for start in each.starts)


@every_board
def test_compute_instances_are_parts_of_their_gpu_instance(board: Board) -> None:
    for each in board.geometry.profiles:
        parts = each.compute_profiles
        (whole,) = (part for part in parts if part.is_whole)
        assert (whole.compute_slices, whole.sm_count) == (each.compute_slices, each.sm_count)
        assert len({part.profile_id for part in parts}) == len(parts)
        for part in parts:
            assert part.compute_slices * part.count_max <= each.compute_slices
            assert part.sm_count * part.count_max <= each.sm_count


@pytest.mark.parametrize(
    ("board", "name", "parts"),
    [
        (A100_40GB, "3g.20gb", {1: (0, 3, 14), 2: (1, 1, 28), 3: (2, 1, 42)}),
        (
            A100_40GB,
            "7g.40gb",
            {1: (0, 7, 14), 2: (1, 3, 28), 3: (2, 2, 42), 4: (3, 1, 56), 7: (4, 1, 98)},
        ),
        (A100_40GB, "1g.10gb", {1: (0, 1, 14)}),
        # From Hopper on a double-memory 1g has more SMs than a slice, and its own compute profile.
        (H100_80GB, "1g.20gb", {1: (7, 1, 26)}),
        (H100_80GB, "1g.10gb", {1: (0, 1, 16)}),
        (H100_80GB, "3g.40gb", {1: (0, 3, 16), 2: (1, 1, 32), 3: (2, 1, 60)}),
        (RTX_PRO_6000, "4g.96gb", {1: (0, 4, 47), 2: (1, 2, 94), 4: (3, 1, 188)}),
    ],
)
def test_the_compute_instances_of_a_profile(
    board: Board, name: str, parts: dict[int, tuple[int, int, int]]
) -> None:
    found = profile(board.geometry, name).compute_profiles
    assert {
        part.compute_slices: (part.profile_id, part.count_max, part.sm_count) for part in found
    } == parts


@pytest.mark.parametrize(
    ("device", "name", "board"),
    [
        (0x233010DE, "", "H100-80GB"),
        (0x20F110DE, "NVIDIA A100-PCIE-40GB", "A100-40GB"),
        (0x2BB510DE, "whatever", "RTX-PRO-6000"),
        (0, "NVIDIA A30", "A30-24GB"),  # another device of that name
        (0x26B910DE, "NVIDIA L40S", None),
        (0x20B6, "NVIDIA PG506-232", None),
    ],
)
def test_which_board_it_is(device: int, name: str, board: str | None) -> None:
    found = board_of(device, name)
    assert (found.name if found else None) == board


def test_boards_that_change_the_mode_by_a_reset() -> None:
    ampere = {board.name for board in BOARDS if not board.is_toggled_at_once}
    assert ampere == {"A30-24GB", "A100-40GB", "A100-80GB"}


@pytest.mark.parametrize("model", [m for m in MODELS.values() if m.has_mig], ids=lambda m: m.name)
def test_what_is_simulated_is_a_board_of_the_table(model: GpuModel) -> None:
    board = board_of(model.pci_device_id, "")
    assert board is not None
    assert board.geometry is model.mig
    assert board.driver_name == model.driver_name
    assert board.name == model.name
    for each in model.mig_profiles:
        assert each.memory_mib * each.count_max * 2**20 <= model.memory_total_bytes
        assert each.sm_count * each.count_max <= model.sm_count


# --- the driver's word


def told_as_root(geometry: Geometry) -> Geometry:
    """What a driver tells root where there are no GPU instances: no compute instance profiles."""
    return Geometry(0, 0, tuple(replace(each, compute_profiles=()) for each in geometry.profiles))


def told_as_anybody(geometry: Geometry) -> Geometry:
    """What it tells everybody else: no places either."""
    profiles = told_as_root(geometry).profiles
    return Geometry(0, 0, tuple(replace(each, starts=(), memory_slices=0) for each in profiles))


@every_board
def test_the_table_fills_in_what_the_driver_does_not_tell(board: Board) -> None:
    assert told(board.geometry, told_as_root(board.geometry)) == board.geometry
    assert told(board.geometry, told_as_anybody(board.geometry)) == board.geometry
    assert told(board.geometry, board.geometry) == board.geometry


def test_the_driver_wins() -> None:
    table = GB200_186GB.geometry
    plain = {each.name: each for each in table.profiles}
    # As a board with more memory tells: other names, figures, and no double-memory 1g.
    actual = Geometry(
        7,
        8,
        (
            replace(plain["1g.23gb"], memory_mib=20992),
            replace(plain["7g.186gb"], name="7g.189gb", memory_mib=191000, is_estimated=False),
        ),
    )
    assert told(table, actual) == actual


def test_places_that_the_driver_tells_are_not_replaced() -> None:
    table = A30_24GB.geometry
    one = replace(table.profiles[0], starts=(0, 2), compute_profiles=())
    found = told(table, Geometry(4, 4, (one,)))
    assert found.profiles[0].starts == (0, 2)
    assert found.profiles[0].compute_profiles == table.profiles[0].compute_profiles


def test_a_board_with_fewer_multiprocessors_has_smaller_parts() -> None:
    three = profile(H100_80GB.geometry, "3g.40gb")
    actual = Geometry(7, 8, (replace(three, sm_count=30, compute_profiles=()),))
    (found,) = told(H100_80GB.geometry, actual).profiles
    assert [part.sm_count for part in found.compute_profiles] == [8, 16, 30]


@every_board
def test_without_a_table_compute_instances_follow_the_common_rule(board: Board) -> None:
    found = told(None, told_as_root(board.geometry))
    assert (found.compute_slices, found.memory_slices) == (
        board.geometry.compute_slices,
        board.geometry.memory_slices,
    )
    for each in board.geometry.profiles:
        ours = profile(found, each.name).compute_profiles
        assert [(part.profile_id, part.count_max, part.is_whole) for part in ours] == [
            (part.profile_id, part.count_max, part.is_whole) for part in each.compute_profiles
        ]


def test_without_a_table_and_without_root_there_is_no_place() -> None:
    found = told(None, told_as_anybody(A100_40GB.geometry))
    assert found.compute_slices == 7
    assert list(layouts(found)) == [()]
