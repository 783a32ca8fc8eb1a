"""Sizes and durations: what text means, what is refused, and what people read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.core.errors import BadInput
from stoker.core.units import (
    BYTES_MAX,
    DURATION_SECONDS_MAX,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512 MiB", 512 * 2**20),
        ("20GiB", 20 * GIB),
        ("  20GiB\n", 20 * GIB),
        ("10GB", 10**10),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("0.5TB", 5 * 10**11),
        ("0.1B", 1),
        ("1.0000000001KiB", 1025),
        ("007", 7),
        (str(BYTES_MAX), BYTES_MAX),
        ("8388607.9999999999TiB", BYTES_MAX - 108),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GiB", "20G", "20 gib", "20gb", "20Gib", "-1", "+1", "1e3", "0x10", "1,5GiB"),
        *("1.GiB", ".5GiB", "1..5GiB", "1 2", "1GiB 1", "20GiBs", "nan", "inf", "٢GiB", "1_000"),
        *("20\u00a0Gi\u0130B", "1\x00", "9" * 31, "9" * 10_000_000, "1" + " " * 100_000 + "!"),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_bytes(text, "--memory")
    message = str(refused.value)
    assert message.startswith("--memory: ")
    assert "is not a size; write a number and a unit of B, KB, MB, GB, TB, KiB, MiB" in message
    assert len(message) < 250


@pytest.mark.parametrize("text", [str(BYTES_MAX + 1), "8388608TiB", "9" * 30 + "GiB"])
def test_size_beyond_63_bits_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"size: .* is larger than 2\^63 - 1 bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("45s", 45.0),
        ("250ms", 0.25),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("30m1h", 5400.0),
        ("1.5h", 5400.0),
        ("2d", 172_800.0),
        ("1w", 604_800.0),
        (" 5s ", 5.0),
        ("3650d", DURATION_SECONDS_MAX),
    ],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        *("", "s", "-5s", "-1", "1h30", "5 s", "1h 30m", "5sec", "5S", "1e3s", "nan", "inf"),
        *("1:30", "٥s", "1" * 100_000 + "x", "1s" * 50_000 + "!"),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_duration(text, "ttl")
    message = str(refused.value)
    assert message.startswith("ttl: ")
    assert message.endswith(
        " is not a duration; write seconds or a sum of ms, s, m, h, d, w, such as 45s, 10m or 1h30m"
    )
    assert len(message) < 250


@pytest.mark.parametrize("text", ["3650d1ms", "11000d", "9" * 400, "9" * 400 + "s"])
def test_duration_beyond_ten_years_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"duration: .* is longer than ten years"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (81559 * 2**20, "79.6 GiB"),
        (80 * GIB, "80 GiB"),
        (3 * 2**40, "3 TiB"),
        (5000 * 2**40, "5000 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_size_for_a_person(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.25, "250ms"),
        (0.9994, "999ms"),
        (0.9996, "1s"),
        (45.0, "45s"),
        (59.7, "1m"),
        (90.0, "1m 30s"),
        (5400.0, "1h 30m"),
        (5445.0, "1h 30m"),
        (86_400.0, "1d"),
        (90_061.0, "1d 1h"),
    ],
)
def test_duration_for_a_person(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 2**60))
def test_size_for_a_person_is_read_back_near_what_it_was(size: int) -> None:
    back = parse_bytes(format_bytes(size))
    assert back == size or abs(back - size) <= 0.05 * size


@given(st.integers(0, 2**40), st.sampled_from(["B", "KB", "KiB", "MB", "MiB"]))
def test_whole_sizes_are_exact(count: int, unit: str) -> None:
    scale = {"B": 1, "KB": 1000, "KiB": 1024, "MB": 10**6, "MiB": 2**20}[unit]
    assert parse_bytes(f"{count}{unit}") == count * scale


@given(st.floats(1.0, DURATION_SECONDS_MAX))
def test_duration_for_a_person_is_read_back_near_what_it_was(seconds: float) -> None:
    back = parse_duration(format_duration(seconds).replace(" ", ""))
    # Two units are told: of a day and some hours, the minutes are not.
    assert math.isclose(back, seconds, rel_tol=1 / 24, abs_tol=0.5)
