"""The text of a page: Prometheus' own parsers read back what was written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as read_prometheus
from tests.support.pages import read_openmetrics

from stoker.agent.metrics.exposition import (
    Family,
    FamilyKind,
    family,
    histogram,
    labels,
    number,
    openmetrics_text,
    prometheus_text,
)

LABEL_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=9)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(FINITE)
def test_a_number_reads_back_as_itself(value: float) -> None:
    assert float(number(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (True, "1"),
        (-3.0, "-3"),
        (0.1, "0.1"),
        (85899345920.0, "85899345920"),
        (1e300, "1e+300"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@given(st.dictionaries(LABEL_TEXTS, FINITE, min_size=1, max_size=4), st.sampled_from(["", "more"]))
def test_both_parsers_read_what_was_written(values: dict[str, float], more: str) -> None:
    series = [(labels(("a", "b"), (each, more)), value) for each, value in values.items()]
    families = [
        family("stoker_x_watts", FamilyKind.GAUGE, 'A "quoted" \\ doc.', series),
        family("stoker_y_total", FamilyKind.COUNTER, "Doc.", [("", 3)]),
    ]
    for gauge, counter in (
        list(read_prometheus(prometheus_text(families))),
        read_openmetrics(openmetrics_text(families)),
    ):
        assert (gauge.type, gauge.documentation) == ("gauge", 'A "quoted" \\ doc.')
        assert {sample.labels["a"]: sample.value for sample in gauge.samples} == values
        assert {sample.labels["b"] for sample in gauge.samples} == {more}
        assert (counter.type, counter.name) == ("counter", "stoker_y")
        assert [(each.name, each.value) for each in counter.samples] == [("stoker_y_total", 3)]


def test_a_histogram() -> None:
    families = [histogram("stoker_z_seconds", "Doc.", [(0.5, 1), (1.0, 3)], 7.25, 4)]
    for (found,) in (
        list(read_prometheus(prometheus_text(families))),
        read_openmetrics(openmetrics_text(families)),
    ):
        assert found.type == "histogram"
        assert [(s.name, s.labels, s.value) for s in found.samples] == [
            ("stoker_z_seconds_bucket", {"le": "0.5"}, 1),
            ("stoker_z_seconds_bucket", {"le": "1.0"}, 3),
            ("stoker_z_seconds_bucket", {"le": "+Inf"}, 4),
            ("stoker_z_seconds_count", {}, 4),
            ("stoker_z_seconds_sum", {}, 7.25),
        ]


def test_a_family_without_series_is_not_mentioned() -> None:
    empty = Family("stoker_x", FamilyKind.GAUGE, "Doc.", ())
    assert prometheus_text([empty]) == ""
    assert openmetrics_text([empty]) == "# EOF\n"
