"""Which GPU instances fit beside each other on a board, and where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.core import mig_profiles
from stoker.core.gpu_models import MODELS, GpuModel
from stoker.core.mig_profiles import MEMORY_SLICES, instance_id, place

PROFILES = {profile.name: profile for profile in mig_profiles.H100_80GB}


@pytest.mark.parametrize(
    ("names", "starts"),
    [
        ([], ()),
        (["7g.80gb"], (0,)),
        (["3g.40gb"], (4,)),  # at 0 it would waste a compute slice
        (["3g.40gb", "3g.40gb"], (0, 4)),
        (["4g.40gb", "3g.40gb"], (0, 4)),
        (["3g.40gb", "4g.40gb"], (4, 0)),
        (["1g.10gb"] * 7, (0, 1, 2, 3, 4, 5, 6)),
        (["1g.20gb"] * 4, (0, 2, 4, 6)),
        (["2g.20gb", "2g.20gb", "2g.20gb", "1g.10gb"], (0, 2, 4, 6)),
        # The order in which the driver would fail: the large one last.
        (["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"], (2, 3, 0, 4)),
        (["1g.10gb+me", "1g.10gb"], (0, 1)),
        (["4g.40gb", "4g.40gb"], None),
        (["3g.40gb"] * 3, None),
        (["2g.20gb"] * 4, None),
        (["1g.10gb"] * 8, None),
        (["7g.80gb", "1g.10gb"], None),
        (["1g.10gb+me", "1g.10gb+me"], None),
        (["3g.40gb", "1g.20gb", "1g.20gb", "1g.20gb"], None),
    ],
)
def test_what_fits(names: list[str], starts: tuple[int, ...] | None) -> None:
    found = place([PROFILES[name] for name in names])
    if starts is not None and names.count("3g.40gb") == 2:
        assert found is not None
        assert sorted(found) == sorted(starts)  # two alike may change places
    else:
        assert found == starts


@given(st.lists(st.sampled_from(sorted(PROFILES)), max_size=8))
def test_instances_lie_where_they_may_and_never_on_each_other(names: list[str]) -> None:
    profiles = [PROFILES[name] for name in names]
    starts = place(profiles)
    if starts is None:
        return
    taken: set[int] = set()
    for profile, start in zip(profiles, starts, strict=True):
        assert start in profile.starts
        slices = set(range(start, start + profile.memory_slices))
        assert not slices & taken
        assert max(slices) < MEMORY_SLICES
        taken |= slices
    ids = [instance_id(p.memory_slices, s) for p, s in zip(profiles, starts, strict=True)]
    assert len(set(ids)) == len(ids)


@given(st.permutations(["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]))
def test_the_order_of_asking_decides_nothing(names: list[str]) -> None:
    assert place([PROFILES[name] for name in names]) is not None


@pytest.mark.parametrize("model", [m for m in MODELS.values() if m.has_mig], ids=lambda m: m.name)
def test_a_table_is_believable(model: GpuModel) -> None:
    profiles = model.mig_profiles
    assert len({profile.name for profile in profiles}) == 7
    assert len({profile.profile_id for profile in profiles}) == 7
    for profile in profiles:
        fitting = place([profile] * profile.count_max)
        assert fitting is not None
        assert profile.memory_mib * profile.count_max <= model.memory_total_bytes / 2**20
        assert profile.sm_count * profile.count_max <= model.sm_count
        assert profile.name.startswith(f"{profile.compute_slices}g.")
