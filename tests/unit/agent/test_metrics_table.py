"""The table of the agent's own metrics: complete, bounded, and named as Prometheus wants it."""

import os
import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.snapshots import FULL, VIEW, eventful, snapshot

from stoker.agent.config import MetricsConfig
from stoker.agent.dcgm import fields as dcgm_fields
from stoker.agent.facts import FACTS
from stoker.agent.metrics.exporter import Pages
from stoker.agent.metrics.exposition import FamilyKind
from stoker.agent.metrics.row import LABELS_MAX, Metric
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.metrics.table import LABEL_BOUNDS, METRICS, MIG_FACTS, RATE_OF
from stoker.agent.nvml import facts as nvml_facts
from stoker.agent.nvml import gpm as nvml_gpm


def everything() -> Snapshot:
    """A snapshot with something to say in every family but the rates that have counters."""
    return replace(eventful(), host_pid=os.getpid())


def without_counters() -> Snapshot:
    """A GPU whose rates have no counters beside them."""
    gpu = replace(
        FULL,
        facts={fact: value for fact, value in FULL.facts.items() if fact not in RATE_OF.values()},
        by_label={},
    )
    return snapshot(replace(VIEW, telemetry=(gpu,)))


@pytest.fixture(scope="module")
def shown() -> dict[str, tuple[str, list[frozenset[str]]]]:
    """Of every family on the pages: its type, and the labels of each of its samples."""
    return {
        family.name: (family.type, [frozenset(sample.labels) for sample in family.samples])
        for take in (without_counters, everything)
        for family in text_string_to_metric_families(Pages(take, MetricsConfig()).own("").text)
    }


def bare(metric: Metric) -> str:
    """The name as the parser gives it: a counter's without `_total`."""
    return metric.name.removesuffix("_total") if metric.kind is FamilyKind.COUNTER else metric.name


def test_every_row_is_shown_and_every_family_shown_is_a_row(
    shown: dict[str, tuple[str, list[frozenset[str]]]],
) -> None:
    rows = {bare(metric): str(metric.kind) for metric in METRICS.values()}
    assert {name: kind for name, (kind, _) in shown.items()} == rows


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_series_has_the_labels_of_its_row(
    metric: Metric, shown: dict[str, tuple[str, list[frozenset[str]]]]
) -> None:
    _, series = shown[bare(metric)]
    own = {frozenset(metric.labels)}
    if metric.kind is FamilyKind.HISTOGRAM:
        own |= {frozenset((*metric.labels, "le"))}
    assert set(series) == own


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_labels_are_few_and_their_values_bounded(metric: Metric) -> None:
    assert len(metric.labels) <= LABELS_MAX
    assert [label for label in metric.labels if label not in LABEL_BOUNDS] == []


def test_no_bound_is_for_a_label_that_nobody_has() -> None:
    used = {label for metric in METRICS.values() for label in metric.labels}
    assert used | {"le"} == LABEL_BOUNDS.keys()


def test_no_name_is_another_one_in_openmetrics() -> None:
    names = [bare(metric) for metric in METRICS.values()]
    assert len(names) == len(set(names))


def test_a_fact_is_told_under_its_own_name() -> None:
    assert {name for fact in FACTS if (name := f"stoker_gpu_{fact}") in METRICS} | {
        f"stoker_gpu_{fact}" for fact in FACTS if f"stoker_gpu_{fact}_total" in METRICS
    } == {f"stoker_gpu_{fact}" for fact in FACTS}


@pytest.mark.parametrize("name", METRICS)
def test_counters_and_only_they_end_in_total(name: str) -> None:
    assert name.endswith("_total") is (METRICS[name].kind is FamilyKind.COUNTER)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("stoker_gpu_power_max_watts", "W"),
        ("stoker_gpu_energy_joules_total", "J"),
        ("stoker_gpu_memory_utilization_mean_ratio", "0 to 1"),
        ("stoker_gpu_pcie_transmit_bytes_per_second", "bytes/s"),
        ("stoker_gpu_pcie_transmit_bytes_total", "bytes"),
        ("stoker_gpu_xid_last_timestamp_seconds", "Unix seconds"),
        ("stoker_gpu_clock_event_seconds_total", "s"),
        ("stoker_gpu_clock_event_active", "0 or 1"),
        ("stoker_gpu_pcie_replays_total", "number"),
        ("stoker_gpu_info", "always 1"),
    ],
)
def test_the_unit_is_read_off_the_name(name: str, unit: str) -> None:
    assert METRICS[name].unit == unit


def test_what_a_mig_device_can_tell_is_what_is_read_of_it() -> None:
    counted = {fact for _, fact, _ in nvml_gpm.METRICS}
    assert set(MIG_FACTS) == set(nvml_facts.MEMORY.facts) | counted
    assert set(dcgm_fields.FIELDS.values()) <= counted
    assert [fact for fact in MIG_FACTS if FACTS[fact].label is not None] == []
