"""The page for Prometheus: what it shows, and above all what it does not show."""

import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.conftest import Golden
from tests.support.pages import read_page

from stoker.agent.driver_link import HostCounters
from stoker.agent.exporter import Durations, MetricsServer, NodeCollector, Snapshot
from stoker.agent.model import (
    AttributedProcess,
    DriverState,
    DriverStatus,
    HeldAllocation,
    NodeIdentity,
    NodeView,
    NumberedGpu,
    NumberedInventory,
    ProcessSeen,
    ProcessTable,
)
from stoker.agent.readings import GpuIdentity, GpuSample
from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

GIB = 2**30
NO_FAILURES: Mapping[str, int] = MappingProxyType({})

FULL = GpuSample(
    uuid="GPU-0",
    at=1000.0,
    memory_total_bytes=16 * GIB,
    memory_used_bytes=2 * GIB,
    memory_reserved_bytes=GIB,
    memory_free_bytes=13 * GIB,
    utilization_ratio=0.75,
    memory_utilization_ratio=0.5,
    temperature_celsius=61.0,
    power_watts=65.5,
    energy_joules_total=123456.5,
    sm_clock_hertz=1.59e9,
    memory_clock_hertz=5.0e9,
)
# A card that tells little: nothing else about it may be on the page.
BARE = GpuSample(uuid="GPU-1", at=1000.0, memory_used_bytes=0)

VIEW = NodeView(
    identity=NodeIdentity("n1", "0.1.0", "boot", False, "", {}, 1.0, "process"),
    incarnation="life",
    inventory=NumberedInventory(
        "580.1",
        "13.0",
        tuple(
            NumberedGpu(i + 1, GpuIdentity(i, f"GPU-{i}", "Tesla T4", 16 * GIB)) for i in range(2)
        ),
    ),
    samples=(FULL, BARE),
    processes=ProcessTable(
        990.0,
        (
            AttributedProcess(ProcessSeen("GPU-0", 7), "a"),
            AttributedProcess(ProcessSeen("GPU-0", 8), ""),
        ),
        unread_gpu_uuids=("GPU-1",),
    ),
    processes_monotonic_seconds=90.0,
    held=(
        HeldAllocation("a", ("GPU-0",), 3 * GIB, "ann", 60.0, 0.0),
        HeldAllocation("b", ("GPU-0",), 4 * GIB, "bob", 60.0, 0.0),
        HeldAllocation("c", ("GPU-1",), None, "cyd", 60.0, 0.0),
    ),
    ending=frozenset(),
    driver=DriverStatus(DriverState.READING),
    connected=True,
    outbox_frames=2,
    frames_dropped=5,
    samples_total=900,
    sample_failures={"driver_timeout": 3, "gpu_lost": 1},
    last_success_at=1000.25,
    last_success_monotonic_seconds=100.0,
)


def snapshot(view: NodeView = VIEW, monotonic: float = 101.0) -> Snapshot:
    return Snapshot(
        view=view,
        monotonic_seconds=monotonic,
        host=HostCounters(
            starts_total=3, restarts_total=2, timeouts_total=4, failures_total=6, kills_total=1
        ),
        sample_durations=Durations().with_one(0.001).with_one(0.03).with_one(7.0),
        processes_interval_seconds=5.0,
    )


def page(shown: Snapshot) -> str:
    registry = CollectorRegistry()
    registry.register(NodeCollector(lambda: shown))
    return generate_latest(registry).decode()


def gpu_series(shown: Snapshot) -> set[tuple[str, str]]:
    return {
        (name, dict(labels)["gpu"])
        for name, series in read_page(page(shown)).items()
        for labels in series
        if name.startswith("stoker_gpu_")
    }


def test_the_whole_page(golden: Golden) -> None:
    golden("agent-metrics.prom", page(snapshot()))


def test_a_fact_that_a_card_does_not_tell_is_absent() -> None:
    assert {name for name, gpu in gpu_series(snapshot()) if gpu == "1"} == {
        "stoker_gpu_memory_total_bytes",
        "stoker_gpu_memory_used_bytes",
        "stoker_gpu_allocations",
        "stoker_gpu_allocated_memory_bytes",
    }


READ_FACTS = {
    "memory_used_bytes",
    "memory_free_bytes",
    "memory_reserved_bytes",
    "utilization_ratio",
    "memory_utilization_ratio",
    "temperature_celsius",
    "power_watts",
    "sm_clock_hertz",
    "memory_clock_hertz",
    "energy_joules_total",
}


@pytest.mark.parametrize(
    ("changed", "monotonic", "is_shown"),
    [
        (VIEW, 103.0, True),
        (VIEW, 103.01, False),
        (replace(VIEW, samples=()), 100.0, False),
        (replace(VIEW, last_success_monotonic_seconds=None, samples=()), 100.0, False),
    ],
    ids=["three intervals old", "older", "the last tick failed", "nothing was ever read"],
)
def test_values_are_shown_only_while_they_are_fresh(
    changed: NodeView, monotonic: float, is_shown: bool
) -> None:
    shown = {name for name, gpu in gpu_series(snapshot(changed, monotonic)) if gpu == "0"}
    assert {f"stoker_gpu_{fact}" in shown for fact in READ_FACTS} == {is_shown}
    assert "stoker_gpu_memory_total_bytes" in shown


@pytest.mark.parametrize(("monotonic", "is_shown"), [(105.0, True), (105.01, False)])
def test_processes_are_shown_only_while_they_are_fresh(monotonic: float, is_shown: bool) -> None:
    shown = gpu_series(snapshot(monotonic=monotonic))
    assert (("stoker_gpu_processes", "0") in shown) is is_shown
    assert ("stoker_gpu_processes", "1") not in shown


def test_before_the_first_answer_there_is_a_page_without_gpus() -> None:
    fresh = replace(
        VIEW,
        inventory=None,
        samples=(),
        processes=None,
        processes_monotonic_seconds=None,
        held=(),
        last_success_at=None,
        last_success_monotonic_seconds=None,
        sample_failures=NO_FAILURES,
    )
    assert gpu_series(snapshot(fresh)) == set()
    names = read_page(page(snapshot(fresh))).keys()
    assert "stoker_agent_samples_total" in names
    assert "stoker_agent_last_success_timestamp_seconds" not in names


def test_the_server_serves_one_page_and_names_a_port_in_use() -> None:
    server = MetricsServer(Address("127.0.0.1", 0), snapshot)
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
            assert answer.read().decode() == page(snapshot())
        with pytest.raises(InUse, match=f"{server.address}: Address already in use"):
            MetricsServer(server.address, snapshot)
    finally:
        server.close()


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(BadInput, match=r"metrics\.listen: 192\.0\.2\.1:9410: Cannot assign"):
        MetricsServer(Address("192.0.2.1", 9410), snapshot)
