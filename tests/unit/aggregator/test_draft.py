"""An overlay reads like a dict that was copied and changed, and leaves what is below alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.draft import Overlay

KEYS = st.integers(0, 5)
TABLES = st.dictionaries(KEYS, st.integers())
# A value to write, or None to delete.
CHANGES = st.lists(st.tuples(KEYS, st.none() | st.integers()), max_size=20)


@given(base=TABLES, changes=CHANGES)
def test_overlay_is_like_a_changed_copy(
    base: dict[int, int], changes: list[tuple[int, int | None]]
) -> None:
    below, copy = dict(base), dict(base)
    overlay: Overlay[int, int] = Overlay(below)
    for key, value in changes:
        if value is not None:
            overlay[key] = copy[key] = value
        elif key in copy:
            del overlay[key], copy[key]
        else:
            assert overlay.pop(key, None) is None
        assert overlay == copy
        assert len(overlay) == len(copy)
        assert sorted(overlay) == sorted(copy)
        assert sorted(overlay.items()) == sorted(copy.items())
        for any_key in range(6):
            assert (any_key in overlay) == (any_key in copy)
            assert overlay.get(any_key) == copy.get(any_key)
    assert below == base


@given(base=TABLES, key=KEYS)
def test_deleting_what_is_not_there_is_an_error(base: dict[int, int], key: int) -> None:
    overlay: Overlay[int, int] = Overlay(base)
    overlay.pop(key, None)
    for reading in (overlay.__getitem__, overlay.__delitem__):
        with pytest.raises(KeyError, match=str(key)):
            reading(key)


@given(base=TABLES, over=TABLES, again=TABLES)
def test_overlays_can_be_laid_over_each_other(
    base: dict[int, int], over: dict[int, int], again: dict[int, int]
) -> None:
    first: Overlay[int, int] = Overlay(base)
    first.update(over)
    second: Overlay[int, int] = Overlay(first)
    second.update(again)
    assert second == {**base, **over, **again}
    assert first == {**base, **over}


def test_unchanged_keys_keep_their_order_and_written_ones_follow() -> None:
    overlay: Overlay[str, int] = Overlay({"c": 1, "a": 2, "b": 3})
    overlay["a"] = 4
    overlay["0"] = 5
    assert list(overlay) == ["c", "b", "a", "0"]
