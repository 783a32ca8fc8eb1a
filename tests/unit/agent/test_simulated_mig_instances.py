"""GPU instances of simulated GPUs: what is offered, where they go, refusals, stale handles."""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_uint, pointer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mig_cards import MOST, MigCard, in_mig_mode, profile_of
from tests.support.simulated_nodes import NVML, World, fields_of, node, outcome, refused

from stoker.core.gpu_models import MODELS
from stoker.core.mig.geometry import Geometry, Placed
from stoker.core.mig.layouts import layouts, objection

BOARDS = [name for name, model in MODELS.items() if model.mig is not None]
# A board of each geometry, each generation.
KINDS = ["A30-24GB", "A100-40GB", "H100-80GB", "RTX-PRO-6000"]


def geometry_of(model: str) -> Geometry:
    geometry = MODELS[model].mig
    assert geometry is not None
    return geometry


# What is offered ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", BOARDS)
def test_profiles_are_numbered_until_the_driver_knows_no_more(model: str) -> None:
    gpu = in_mig_mode(model)
    ask = gpu.nvml.nvmlDeviceGetGpuInstanceProfileInfo
    told = [outcome(ask, gpu.gpu, constant) for constant in range(20)]
    assert told[18:] == ["INVALID_ARGUMENT"] * 2
    there = {number: info for number, info in enumerate(told[:18]) if info != "NOT_SUPPORTED"}
    assert {number: info.name for number, info in there.items()} == {
        profile.constant: f"MIG {profile.name}" for profile in geometry_of(model).profiles
    }
    assert len(there) < 18  # holes are no end
    with refused("INVALID_ARGUMENT"):
        ask(gpu.gpu, -1)


def test_a_profile_is_told_in_two_forms() -> None:
    gpu = in_mig_mode("H100-80GB")
    ask, double = gpu.nvml.nvmlDeviceGetGpuInstanceProfileInfo, 9
    new, old = ask(gpu.gpu, double), ask(gpu.gpu, double, 1)
    assert fields_of(new) == {
        "version": NVML.nvmlGpuInstanceProfileInfo_v2,
        "id": 15,
        "isP2pSupported": 0,
        "sliceCount": 1,
        "instanceCount": 4,
        "multiprocessorCount": 26,
        "copyEngineCount": 1,
        "decoderCount": 1,
        "encoderCount": 0,
        "jpegCount": 1,
        "ofaCount": 0,
        "memorySizeMB": 20096,
        "name": "MIG 1g.20gb",
    }
    same = {
        name: value for name, value in fields_of(new).items() if name not in ("version", "name")
    }
    assert fields_of(old) == same
    assert fields_of(gpu.nvml.nvmlDeviceGetGpuInstanceProfileInfoV(gpu.gpu, double)) == fields_of(
        new
    )
    by_id = gpu.nvml.nvmlDeviceGetGpuInstanceProfileInfoById(gpu.gpu, 15)
    assert fields_of(by_id) == fields_of(new)
    with refused("FUNCTION_NOT_FOUND"):
        ask(gpu.gpu, double, 3)


@pytest.mark.parametrize(
    ("model", "name", "starts"),
    [
        ("A100-40GB", "1g.5gb", [0, 1, 2, 3, 4, 5, 6]),
        ("A100-40GB", "1g.10gb", [0, 2, 4, 6]),
        ("A100-40GB", "3g.20gb", [0, 4]),
        ("A30-24GB", "2g.12gb", [0, 2]),
        ("RTX-PRO-6000", "1g.24gb+me.all", [0, 3, 6, 9]),
    ],
)
def test_places_are_all_told_whatever_is_there(model: str, name: str, starts: list[int]) -> None:
    gpu, profile = in_mig_mode(model), profile_of(model, name)
    gpu.create(name)
    ask, count = gpu.nvml.nvmlDeviceGetGpuInstancePossiblePlacements, c_uint()
    assert ask(gpu.gpu, profile.profile_id, None, byref(count)) == NVML.NVML_SUCCESS
    assert count.value == len(starts)
    places = (NVML.c_nvmlGpuInstancePlacement_t * MOST)()
    ask(gpu.gpu, profile.profile_id, places, byref(count))
    found = [(place.start, place.size) for place in places[: count.value]]
    assert found == [(start, profile.memory_slices) for start in starts]


def test_places_are_told_without_mig_mode() -> None:
    gpu = MigCard(node(World(), 1, "A100-40GB", is_root=True))
    count = c_uint()
    gpu.nvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu.gpu, 19, None, byref(count))
    assert count.value == 7
    for ask in (
        lambda: gpu.create("1g.5gb"),
        lambda: gpu.create("1g.5gb", 0),
        lambda: gpu.instances,
        lambda: gpu.remaining("1g.5gb"),
        lambda: gpu.nvml.nvmlDeviceGetGpuInstanceById(gpu.gpu, 0),
    ):
        with refused("NOT_SUPPORTED"):
            ask()


# What is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "starts"),
    [
        # NVIDIA's guide: the order matters where the driver chooses the places.
        (["1g.5gb", "1g.5gb", "2g.10gb", "3g.20gb"], [6, 4, 0, None]),
        (["3g.20gb", "1g.5gb", "2g.10gb", "1g.5gb"], [4, 0, 2, 1]),
        (["1g.5gb", "2g.10gb", "4g.20gb"], [6, 4, 0]),
        (["2g.10gb", "2g.10gb", "2g.10gb", "2g.10gb"], [4, 0, 2, None]),
        (["3g.20gb", "3g.20gb", "1g.5gb"], [4, 0, None]),
        (["1g.10gb"] * 5, [6, 4, 0, 2, None]),
        (["1g.5gb"] * 8, [6, 4, 5, 0, 1, 2, 3, None]),
        (["1g.5gb+me", "1g.5gb+me"], [6, None]),
        (["7g.40gb", "1g.5gb"], [0, None]),
    ],
)
def test_the_driver_chooses_places_as_the_guide_shows(
    wanted: list[str], starts: list[int | None]
) -> None:
    gpu = in_mig_mode()
    for name, start in zip(wanted, starts, strict=True):
        made = outcome(gpu.create, name)
        if start is None:
            assert made == "INSUFFICIENT_RESOURCES"
        else:
            assert gpu.nvml.nvmlGpuInstanceGetInfo(made).placement.start == start


@pytest.mark.parametrize(
    ("model", "there", "wanted", "error"),
    [
        ("A100-40GB", [("3g.20gb", 4)], ("3g.20gb", 4), "INSUFFICIENT_RESOURCES"),
        ("A100-40GB", [("3g.20gb", 4)], ("1g.5gb", 6), "INSUFFICIENT_RESOURCES"),
        ("A100-40GB", [("1g.5gb", 0)], ("7g.40gb", 0), "INSUFFICIENT_RESOURCES"),
        ("A100-40GB", [], ("2g.10gb", 6), "INVALID_ARGUMENT"),  # slice 7 has no compute slice
        ("A100-40GB", [], ("1g.5gb", 7), "INVALID_ARGUMENT"),
        ("A100-40GB", [], ("4g.20gb", 4), "INVALID_ARGUMENT"),
        ("A100-40GB", [("1g.5gb+me", 0)], ("1g.5gb+me", 1), "INSUFFICIENT_RESOURCES"),
        ("A30-24GB", [("1g.6gb+me", 0)], ("2g.12gb+me", 2), "INSUFFICIENT_RESOURCES"),
        ("RTX-PRO-6000", [("1g.24gb+me.all", 0)], ("1g.24gb", 3), "INSUFFICIENT_RESOURCES"),
        ("RTX-PRO-6000", [("1g.24gb", 0)], ("1g.24gb+me.all", 3), "INSUFFICIENT_RESOURCES"),
        ("RTX-PRO-6000", [], ("1g.24gb", 1), "INVALID_ARGUMENT"),  # a grid of three
    ],
)
def test_a_place_that_cannot_be_had_is_refused(
    model: str, there: list[tuple[str, int]], wanted: tuple[str, int], error: str
) -> None:
    gpu = in_mig_mode(model)
    for name, start in there:
        gpu.create(name, start)
    before = gpu.places
    with refused(error):
        gpu.create(*wanted)
    assert gpu.places == before


def test_a_place_is_a_pointer_of_the_right_size() -> None:
    gpu = in_mig_mode()
    create = gpu.nvml.nvmlDeviceCreateGpuInstanceWithPlacement
    for place in (
        NVML.c_nvmlGpuInstancePlacement_t(0, 4),  # not its address
        None,
        pointer(NVML.c_nvmlGpuInstancePlacement_t(0, 3)),
    ):
        with refused("INVALID_ARGUMENT"):
            create(gpu.gpu, 9, place)
    assert create(gpu.gpu, 9, byref(NVML.c_nvmlGpuInstancePlacement_t(0, 4)))


def test_what_root_may_others_may_not() -> None:
    user = in_mig_mode(is_root=False)
    array, count = (NVML.c_nvmlGpuInstance_t * MOST)(), c_uint()
    nvml, gpu = user.nvml, user.gpu
    for ask in (
        lambda: nvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, 19, None, byref(count)),
        lambda: nvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 19),
        lambda: nvml.nvmlDeviceGetGpuInstances(gpu, 19, array, byref(count)),
        lambda: nvml.nvmlDeviceGetGpuInstanceById(gpu, 0),
        lambda: nvml.nvmlDeviceCreateGpuInstance(gpu, 19),
        lambda: user.create("1g.5gb", 0),
    ):
        with refused("NO_PERMISSION"):
            ask()
    assert nvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 0).name == "MIG 1g.5gb"


def test_an_instance_is_found_by_profile_by_id_and_by_handle() -> None:
    gpu = in_mig_mode()
    made = gpu.create("2g.10gb", 2)
    assert gpu.places == {4: (2, 14)}
    info = gpu.nvml.nvmlGpuInstanceGetInfo(made)
    assert (info.id, info.profileId, info.placement.start, info.placement.size) == (4, 14, 2, 2)
    by_id = gpu.nvml.nvmlDeviceGetGpuInstanceById(gpu.gpu, 4)
    assert gpu.nvml.nvmlGpuInstanceGetInfo(by_id).profileId == 14
    with refused("NOT_FOUND"):
        gpu.nvml.nvmlDeviceGetGpuInstanceById(gpu.gpu, 3)
    with refused("INVALID_ARGUMENT"):
        gpu.nvml.nvmlDeviceGetGpuInstances(
            gpu.gpu, 3, (NVML.c_nvmlGpuInstance_t * MOST)(), byref(c_uint())
        )
    with refused("INVALID_ARGUMENT"):
        gpu.nvml.nvmlDeviceGetGpuInstances(gpu.gpu, 14, None, byref(c_uint()))


def test_a_handle_of_an_instance_that_is_gone_leads_nowhere() -> None:
    gpu = in_mig_mode()
    instance = gpu.create("2g.10gb", 2)
    part = gpu.split(instance, "2g.10gb")
    gpu.nvml.nvmlComputeInstanceDestroy(part)
    gpu.nvml.nvmlGpuInstanceDestroy(instance)
    again = gpu.create("2g.10gb", 2)  # the same place, the same ID
    gpu.split(again, "2g.10gb")
    stale: list[tuple[Callable[..., Any], Any]] = [
        (gpu.nvml.nvmlGpuInstanceGetInfo, instance),
        (gpu.nvml.nvmlGpuInstanceDestroy, instance),
        (gpu.nvml.nvmlComputeInstanceGetInfo_v2, part),
        (gpu.nvml.nvmlComputeInstanceDestroy, part),
        (gpu.nvml.nvmlGpuInstanceGetInfo, part),  # of another kind
        (gpu.nvml.nvmlGpuInstanceGetInfo, NVML.c_nvmlGpuInstance_t()),  # NULL
        (gpu.nvml.nvmlGpuInstanceGetInfo, ctypes.cast(64, NVML.c_nvmlGpuInstance_t)),
    ]
    for ask, handle in stale:
        with refused("INVALID_ARGUMENT"):
            ask(handle)
    assert len(gpu.places) == 1


@pytest.mark.parametrize("model", KINDS)
def test_the_driver_admits_exactly_the_layouts_that_are_legal(model: str) -> None:
    """From every legal layout, variants too: one more instance anywhere, and what still fits."""
    geometry = geometry_of(model)
    every = sorted(layouts(geometry, plain=False))
    for layout in every[:: max(1, len(every) // 60)]:
        gpu = in_mig_mode(model)
        for placed in sorted(layout, key=lambda each: -each.size):
            gpu.create(placed.profile, placed.start)
        for profile in geometry.profiles:
            free = 0
            for start in profile.starts:
                more = (*layout, Placed(start, profile.memory_slices, profile.name))
                made = outcome(gpu.create, profile.name, start)
                is_legal = objection(geometry, tuple(sorted(more))) is None
                assert (made != "INSUFFICIENT_RESOURCES") == is_legal, (layout, profile.name, start)
                if is_legal:
                    free += 1
                    gpu.nvml.nvmlGpuInstanceDestroy(made)
            assert (gpu.remaining(profile.name) > 0) == (free > 0), (layout, profile.name)


@settings(max_examples=60, deadline=None)
@given(model=st.sampled_from(KINDS), data=st.data())
def test_what_remains_is_what_can_be_made(model: str, data: st.DataObject) -> None:
    gpu, names = in_mig_mode(model), [profile.name for profile in geometry_of(model).profiles]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=6)):
        left = gpu.remaining(name)
        made = outcome(gpu.create, name)
        assert (made == "INSUFFICIENT_RESOURCES") == (left == 0)
    masks = 0
    for start, profile_id in gpu.places.values():
        size = next(
            p.memory_slices for p in geometry_of(model).profiles if p.profile_id == profile_id
        )
        mask = (1 << size) - 1 << start
        assert masks & mask == 0
        masks |= mask
    wanted = data.draw(st.sampled_from(names))
    left = gpu.remaining(wanted)
    for _ in range(left):
        gpu.create(wanted)
    assert gpu.remaining(wanted) == 0
    with refused("INSUFFICIENT_RESOURCES"):
        gpu.create(wanted)
