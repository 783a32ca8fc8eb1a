"""Deadlines tell what is due like a scan of the whole table would."""

from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator.deadlines import Deadlines

KEYS = st.sampled_from("abcd")
TIMES = st.integers(0, 9).map(float)
# A time to set, None to take the key out, or a time to ask at.
STEPS = st.lists(
    st.tuples(st.just("set"), KEYS, TIMES)
    | st.tuples(st.just("drop"), KEYS, TIMES)
    | st.tuples(st.just("ask"), KEYS, TIMES),
    max_size=40,
)


@given(STEPS)
def test_due_is_what_a_scan_finds(steps: list[tuple[str, str, float]]) -> None:
    times: dict[str, float] = {}
    deadlines = Deadlines(times)
    for step, key, at in steps:
        if step == "set":
            is_news = key not in times or at < times[key]
            times[key] = at
            if is_news:
                deadlines.add(key)
        elif step == "drop":
            times.pop(key, None)
        else:
            found = deadlines.due(at)
            assert sorted(found) == sorted(key for key, due in times.items() if due <= at)
            assert [times[key] for key in found] == sorted(times[key] for key in found)
        assert deadlines.first() == min(times.values(), default=None)


def test_what_went_long_before_its_time_is_not_kept() -> None:
    times: dict[str, float] = {}
    deadlines = Deadlines(times)
    for i in range(20_000):
        times[str(i)] = 1e9 + i
        deadlines.add(str(i))
        if i >= 10:
            del times[str(i - 10)]
    assert len(deadlines) < 2_000
    assert deadlines.first() == 1e9 + 19_990
    assert len(deadlines.due(2e9)) == 10
