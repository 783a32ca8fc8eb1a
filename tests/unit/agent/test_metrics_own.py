"""The agent's own page: what it shows, and above all what it does not show."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import Golden
from tests.support.pages import read_page
from tests.support.snapshots import (
    BARE,
    EVERY_FACT,
    EVERY_LABELLED_FACT,
    FULL,
    IDENTITIES,
    MIG_DEVICE,
    VIEW,
    dcgm_page,
    eventful,
    own_page,
    snapshot,
    told,
)

from stoker.agent.facts import FACTS, Fact
from stoker.agent.metrics.row import GPU_LABELS
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.metrics.table import RATE_OF, gpu_metric_name, mig_metric_name
from stoker.agent.model import (
    CollectorStatus,
    DriverState,
    DriverStatus,
    NodeView,
    NumberedInventory,
)
from stoker.agent.readings import GpuFault
from stoker.agent.telemetry import XidCount

# What is told of a GPU that is in the inventory, whether it was read or not.
ALWAYS = {
    "stoker_gpu_up",
    "stoker_gpu_info",
    "stoker_gpu_allocations",
    "stoker_gpu_allocated_memory_bytes",
}
PROCESSES = {"stoker_gpu_processes", "stoker_gpu_foreign_processes"}
READ = {gpu_metric_name(fact) for fact in FACTS} - {gpu_metric_name(fact) for fact in RATE_OF}


def gpu_series(shown: Snapshot) -> set[tuple[str, str]]:
    """Return (name, index) of every series of a GPU."""
    return {
        (name, dict(labels)["gpu"])
        for name, series in read_page(own_page(shown)).items()
        for labels in series
        if "gpu" in dict(labels)
    }


def of_gpu(shown: Snapshot, gpu: str) -> set[str]:
    return {name for name, index in gpu_series(shown) if index == gpu}


def value(shown: Snapshot, name: str, **labels: str) -> float | None:
    """Return the value of the series with at least these labels."""
    for found, number in read_page(own_page(shown)).get(name, {}).items():
        if labels.items() <= dict(found).items():
            return number
    return None


def test_the_whole_page(golden: Golden) -> None:
    golden("metrics/everything.prom", own_page(eventful()))


def test_every_fact_is_told_with_its_value_and_labels() -> None:
    page = read_page(own_page(told(FULL)))
    labels = tuple(sorted(zip(GPU_LABELS, ("n1", "0", "GPU-0", IDENTITIES[0].model), strict=True)))
    for fact, number in EVERY_FACT.items():
        if fact not in RATE_OF:
            assert page[gpu_metric_name(fact)] == {labels: number}
    for fact, values in FULL.by_label.items():
        label = FACTS[fact].label
        assert label is not None
        series = {dict(each)[label]: number for each, number in page[gpu_metric_name(fact)].items()}
        assert series == values


def test_a_fact_that_a_card_does_not_tell_is_absent() -> None:
    assert of_gpu(snapshot(), "1") == ALWAYS | {"stoker_gpu_memory_used_bytes"}


@given(
    st.sets(st.sampled_from(list(EVERY_FACT))), st.sets(st.sampled_from(list(EVERY_LABELLED_FACT)))
)
def test_what_is_told_is_shown_and_nothing_else(plain: set[Fact], labelled: set[Fact]) -> None:
    gpu = replace(
        FULL,
        facts={fact: EVERY_FACT[fact] for fact in plain},
        by_label={fact: EVERY_LABELLED_FACT[fact] for fact in labelled},
        extents={},
    )
    shown = {name for name in of_gpu(told(gpu), "0") if name not in ALWAYS | PROCESSES}
    kept_back = {rate for rate, counter in RATE_OF.items() if counter in plain | labelled}
    assert shown == {gpu_metric_name(fact) for fact in (plain | labelled) - kept_back}
    list(text_string_to_metric_families(dcgm_page(told(gpu))))  # raises where it is malformed


@pytest.mark.parametrize("rate", RATE_OF)
def test_a_rate_is_told_only_where_the_counter_of_its_direction_is_not(rate: Fact) -> None:
    counter = RATE_OF[rate]
    name = gpu_metric_name(rate)
    plain = {fact: number for fact, number in FULL.facts.items() if fact is not counter}
    labelled = {fact: values for fact, values in FULL.by_label.items() if fact is not counter}
    assert name not in of_gpu(told(FULL), "0")
    shown = of_gpu(told(replace(FULL, facts=plain, by_label=labelled)), "0")
    assert name in shown
    # The other direction, and the other bus, go their own ways.
    assert {gpu_metric_name(fact) for fact in RATE_OF} & shown == {name}


@pytest.mark.parametrize(
    ("changed", "monotonic", "is_shown"),
    [
        (VIEW, 103.0, True),
        (VIEW, 103.01, False),
        (replace(VIEW, telemetry=()), 100.0, False),
        (replace(VIEW, last_success_monotonic_seconds=None, telemetry=()), 100.0, False),
    ],
    ids=["three intervals old", "older", "the last tick failed", "nothing was ever read"],
)
def test_values_are_shown_only_while_they_are_fresh(
    changed: NodeView, monotonic: float, is_shown: bool
) -> None:
    shown = snapshot(changed, monotonic)
    names = of_gpu(shown, "0")
    assert {name in names for name in READ} == {is_shown}
    assert names >= ALWAYS
    assert value(shown, "stoker_gpu_up", gpu="0") == float(is_shown)


@pytest.mark.parametrize(("monotonic", "is_shown"), [(105.0, True), (105.01, False)])
def test_processes_are_shown_only_while_they_are_fresh(monotonic: float, is_shown: bool) -> None:
    shown = gpu_series(snapshot(monotonic=monotonic))
    assert (("stoker_gpu_processes", "0") in shown) is is_shown
    assert ("stoker_gpu_processes", "1") not in shown


def test_before_the_first_answer_there_is_a_page_without_gpus() -> None:
    fresh = replace(
        VIEW,
        inventory=None,
        telemetry=(),
        processes=None,
        processes_monotonic_seconds=None,
        held=(),
        last_success_at=None,
        last_success_monotonic_seconds=None,
        sample_failures={},
    )
    assert gpu_series(snapshot(fresh)) == set()
    names = read_page(own_page(snapshot(fresh))).keys()
    assert "stoker_agent_samples_total" in names
    assert "stoker_agent_last_success_timestamp_seconds" not in names


def test_a_gpu_that_cannot_be_read_keeps_only_what_the_agent_knows() -> None:
    view = replace(VIEW, telemetry=(BARE,), xids={"GPU-0": {79: XidCount(1, 900.0)}})
    shown = snapshot(view)
    xids = {"stoker_gpu_xid_errors_total", "stoker_gpu_xid_last_timestamp_seconds"}
    assert of_gpu(snapshot(view, 102.0), "0") == ALWAYS | PROCESSES | xids
    assert value(shown, "stoker_gpu_up", gpu="0") == 0
    assert value(shown, "stoker_gpu_up", gpu="1") == 1


def test_xids_are_counted_with_the_time_of_the_last_and_only_those_seen() -> None:
    xids = {"GPU-0": {31: XidCount(2, 900.5)}, "GPU-gone": {79: XidCount(1, 901.5)}}
    shown = snapshot(replace(VIEW, xids=xids))
    total, last = "stoker_gpu_xid_errors_total", "stoker_gpu_xid_last_timestamp_seconds"
    assert len(read_page(own_page(shown))[total]) == 2
    assert value(shown, total, gpu="0", uuid="GPU-0", xid="31") == 2
    assert value(shown, last, gpu="0", uuid="GPU-0", xid="31") == 900.5
    assert value(shown, total, gpu="", model="", uuid="GPU-gone", xid="79") == 1
    assert "stoker_gpu_xid" not in own_page(snapshot())


def test_missing_gpus_are_named_once_with_the_kind_of_error() -> None:
    faults = (
        GpuFault(2, None, "gpu_lost", "one text"),
        GpuFault(2, None, "gpu_lost", "another text"),
        GpuFault(3, "GPU-3", "reset_required", "wants a reset"),
    )
    shown = snapshot(replace(VIEW, inventory=NumberedInventory("580.1", "13.0", (), faults)))
    missing = read_page(own_page(shown))["stoker_gpu_missing"]
    assert {
        (each["gpu"], each["uuid"], each["error_kind"]): number
        for labels, number in missing.items()
        if (each := dict(labels))
    } == {("2", "", "gpu_lost"): 1, ("3", "GPU-3", "reset_required"): 1}


def test_mig_devices_tell_their_own_facts() -> None:
    device = replace(MIG_DEVICE, facts={Fact.MEMORY_USED_BYTES: 5.0, Fact.SM_ACTIVE_RATIO: 0.5})
    shown = told(replace(FULL, mig_devices=(device, replace(device, uuid="MIG-b"))))
    page = read_page(own_page(shown))
    assert {name for name in page if name.startswith("stoker_mig_")} == {
        mig_metric_name(fact) for fact in device.facts
    }
    labels = {
        "node": "n1",
        "gpu": "0",
        "uuid": "GPU-0",
        "mig_uuid": "MIG-b",
        "profile": "1g.10gb",
        "gpu_instance": "3",
        "compute_instance": "0",
    }
    assert page["stoker_mig_sm_active_ratio"][tuple(sorted(labels.items()))] == 0.5
    assert len(page["stoker_mig_sm_active_ratio"]) == 2


def test_what_a_gpu_is_stands_in_an_info_series() -> None:
    (first, second) = read_page(own_page(snapshot()))["stoker_gpu_info"]
    assert dict(first)["pci_bus_id"] == "00000000:53:00.0"
    assert dict(first)["minor_number"] == "3"
    # Prometheus takes an empty label for none.
    assert {name for name, text in second if text} == {"node", "gpu", "uuid", "model"}


@pytest.mark.parametrize("state", DriverState)
def test_one_state_of_the_driver_is_1(state: DriverState) -> None:
    shown = snapshot(replace(VIEW, driver=DriverStatus(state)))
    states = read_page(own_page(shown))["stoker_agent_driver_state"]
    assert {dict(labels)["state"]: number for labels, number in states.items()} == {
        each.value: float(each is state) for each in DriverState
    }


def test_a_reader_that_has_not_run_says_nothing() -> None:
    runs = {"sampling": CollectorStatus(False, 0.5, 900.0), "dcgm": CollectorStatus()}
    shown = replace(snapshot(), collectors=runs)
    prefix = "stoker_agent_collector"
    assert value(shown, f"{prefix}_success", collector="sampling") == 0
    assert value(shown, f"{prefix}_duration_seconds", collector="sampling") == 0.5
    last = f"{prefix}_last_success_timestamp_seconds"
    assert value(shown, last, collector="sampling") == 900.0
    assert value(shown, f"{prefix}_success", collector="dcgm") is None


def test_a_driver_host_that_the_kernel_holds_is_told_with_its_age() -> None:
    name = "stoker_agent_driver_host_unreaped"
    held = replace(snapshot(monotonic=101.0), host_unreaped_since=60.5)
    assert value(held, name) == 1
    assert value(held, f"{name}_seconds") == 40.5
    assert value(snapshot(), name) == 0
    assert value(snapshot(), f"{name}_seconds") is None
