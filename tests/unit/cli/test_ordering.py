"""Requirements on the order of what people look for."""

from hypothesis import given
from hypothesis import strategies as st

from stoker.cli.ordering import name_key


def test_numbers_in_names_count() -> None:
    names = ["gpu-10", "rack2-gpu1", "gpu-2", "login", "rack10-gpu1", "gpu-1"]
    expected = ["gpu-1", "gpu-2", "gpu-10", "login", "rack2-gpu1", "rack10-gpu1"]
    assert sorted(names, key=name_key) == expected


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_equal_but_for_a_number_the_number_decides(one: int, other: int) -> None:
    keys = name_key(f"rack-{one}.lab"), name_key(f"rack-{other}.lab")
    assert (keys[0] < keys[1]) == (one < other)


@given(st.lists(st.text(max_size=8)))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert sorted(sorted(names, key=name_key)) == sorted(names)
