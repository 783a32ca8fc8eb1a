"""The table of facts keeps what its readers rely on: units in names, one sentence each, rates."""

import re

import pytest

from stoker.agent.facts import (
    BANK_AVAILABILITIES,
    CLOCK_EVENT_BITS,
    FACTS,
    Fact,
    FactSpec,
    Kind,
    Rate,
    facts_at,
)

ROWS = pytest.mark.parametrize(("fact", "spec"), FACTS.items(), ids=list(FACTS))
# What has no unit: states, switches and plain counts.
UNITLESS = re.compile(
    r".*(_mode|_mode_pending|_state|_enabled|_action|_active|_up|_generation(_max)?|_width(_max)?"
    r"|_replays|_errors|_rows|_rows_pending|_rows_failed|_banks|_pages|_pages_pending)"
)
UNITS = re.compile(r".*_(bytes|ratio|hertz|watts|joules|celsius|seconds|bytes_per_second)")


def test_every_fact_has_a_row() -> None:
    assert set(FACTS) == set(Fact)


@ROWS
def test_a_quantity_ends_with_its_base_unit(fact: Fact, spec: FactSpec) -> None:
    assert UNITS.fullmatch(fact) or UNITLESS.fullmatch(fact), fact


@ROWS
def test_a_fact_is_explained_in_one_sentence(fact: Fact, spec: FactSpec) -> None:
    assert re.fullmatch(r"[A-Z].*\.", spec.doc), spec.doc


@ROWS
def test_what_only_grows_is_a_counter_and_no_ratio_is(fact: Fact, spec: FactSpec) -> None:
    grows = ("_errors", "_replays", "_joules", "_event_seconds", "transmit_bytes", "receive_bytes")
    assert (spec.kind is Kind.COUNTER) is fact.endswith(grows)


@ROWS
def test_no_name_ends_as_exposition_would_end_it(fact: Fact, spec: FactSpec) -> None:
    assert not fact.endswith(("_total", "_info", "_sum", "_count", "_bucket", "_created"))


def test_every_fact_has_one_rate() -> None:
    assert facts_at(Rate.FAST) | facts_at(Rate.SLOW) == set(Fact)
    assert not facts_at(Rate.FAST) & facts_at(Rate.SLOW)


def test_label_values_are_words() -> None:
    for word in (*CLOCK_EVENT_BITS.values(), *BANK_AVAILABILITIES):
        assert re.fullmatch(r"[a-z][a-z_]*", word)
    assert all(bit & (bit - 1) == 0 for bit in CLOCK_EVENT_BITS)
