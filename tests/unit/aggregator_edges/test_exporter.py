"""The page for Prometheus: the fleet as it is; what is not known is not told."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.conftest import Golden
from tests.unit.aggregator.builders import (
    GIB,
    make_facts,
    make_gpus,
    make_health,
    make_process,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.exporter import FleetCollector
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import Device, DriverState, Frame, GpuSample, MissingGpu, Placement
from stoker.aggregator.picture import take_picture
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.verdicts import RepairAction, Verdict

NOW = 1_000.0


def make_fleet() -> Fleet:
    """Node n1: whole, shared, foreign, free and unread; n2 has not connected; one request waits."""
    fleet = Fleet()
    gpus = make_gpus("n1", 5)
    fleet.apply(e.NodeRegistered(NOW, make_facts("n1", gpus)), 1)
    fleet.apply(e.NodeRegistered(NOW, make_facts("n2", 1)), 2)
    fleet.apply(e.NodeCordoned(NOW, "n2", "fans"), 3)
    fleet.apply(e.AllocationRequested(NOW, "w", whole(), "", NOW + 60), 4)
    whole_gpu = Device("n1-0", gpus[0].model, 0, 80 * GIB, exclusive=True)
    fleet.apply(
        e.AllocationGranted(NOW, "a", whole(), "", NOW, (Placement("n1", (whole_gpu,)),)), 5
    )
    part = Device("n1-1", gpus[1].model, 1, GIB, exclusive=False)
    fleet.apply(e.AllocationGranted(NOW, "b", share(1), "", NOW, (Placement("n1", (part,)),)), 6)
    fleet.note(e.AgentConnected(NOW, "n1", 1, (), 0))
    samples = {
        gpu.uuid: GpuSample(
            memory_used_bytes=index * GIB,
            utilization_ratio=0.25 * index,
            temperature_celsius=40.0 + index,
            power_watts=None if index == 1 else 100.0,
            at=NOW,
        )
        for index, gpu in enumerate(gpus[:4])
    }
    samples["n1-4"] = GpuSample(at=NOW)  # could not be read
    frame = Frame(
        1,
        NOW,
        0.0,
        samples=samples,
        processes=ProcessTable(NOW, (make_process("n1-2"),)),
        driver=DriverState.READING,
    )
    fleet.note(e.FrameArrived(NOW, "n1", 1, frame, NOW))
    return fleet


def make_ailing_fleet() -> Fleet:
    """Two of four GPUs of n1 are not well, one is lost, two are cordoned; n2 judged nothing."""
    fleet = Fleet()
    fleet.apply(e.NodeRegistered(NOW, make_facts("n1", 4)), 1)
    fleet.apply(e.NodeRegistered(NOW, make_facts("n2", 1)), 2)
    verdicts = (
        make_health("n1-0", Verdict.HEALTHY),
        make_health("n1-1"),
        make_health("n1-2", Verdict.DEGRADED, "thermal", action=RepairAction.DRAIN),
        make_health("n1-3"),
    )
    events: list[e.DurableEvent] = [
        *(e.GpuHealthChanged(NOW, "n1", each.uuid, "", each) for each in verdicts),
        e.GpuCordoned(NOW, "n1", "n1-1", "xid", by_health=True, fault=verdicts[1].fault),
        e.GpuCordoned(NOW, "n1", "n1-2", "hot", by_health=False),
    ]
    for version, event in enumerate(events, 3):
        fleet.apply(event, version)
    fleet.note(e.AgentConnected(NOW, "n1", 1, (), 0))
    fleet.note(e.FrameArrived(NOW, "n1", 1, Frame(1, NOW, 0.0, health=verdicts), NOW))
    return fleet


def test_page_of_health_is_as_reviewed(golden: Golden) -> None:
    registry = CollectorRegistry()
    fleet = make_ailing_fleet()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    page = generate_latest(registry).decode().splitlines()
    told = ("stoker_fleet_gpu_verdict", "stoker_fleet_gpu_unhealthy", "stoker_fleet_gpu_cordon")
    lines = [line for line in page if any(name in line for name in (*told, "findings"))]
    golden("aggregator_metrics_health.txt", "\n".join(lines) + "\n")


def test_verdict_counts_as_the_ledger_has_it_while_a_node_is_away() -> None:
    fleet = make_ailing_fleet()
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    before = by_label(registry, "stoker_fleet_gpu_verdicts", "verdict")
    assert before == {"healthy": 1, "degraded": 1, "unhealthy": 2, "unknown": 1}
    fleet.note(e.AgentConnected(NOW, "n1", 2, (), 0))
    assert by_label(registry, "stoker_fleet_gpu_verdicts", "verdict") == before


def test_cordon_that_is_withheld_is_counted() -> None:
    fleet = make_ailing_fleet()
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    for name, value in (("max", 1.0), ("withheld", 1.0)):
        assert registry.get_sample_value(f"stoker_fleet_gpu_cordons_{name}") == value


def test_card_that_two_nodes_list_counts_once() -> None:
    fleet = make_ailing_fleet()
    fleet.apply(e.NodeRegistered(NOW, make_facts("n3", make_gpus("n1", 4))), 20)
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    assert sum(by_label(registry, "stoker_fleet_gpu_verdicts", "verdict").values()) == 5
    assert by_label(registry, "stoker_fleet_gpu_unhealthy", "node") == {"n1": 1.0}


def registry_at(now: float) -> CollectorRegistry:
    fleet = make_fleet()
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, now), "9.9"))
    return registry


def by_label(registry: CollectorRegistry, metric: str, label: str) -> dict[str, float]:
    return {
        sample.labels[label]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == metric
    }


def test_page_is_as_reviewed(golden: Golden) -> None:
    golden("aggregator_metrics.txt", generate_latest(registry_at(NOW)).decode())


def test_own_counters_are_as_reviewed(golden: Golden) -> None:
    golden("aggregator_meters.txt", generate_latest(Meters().registry).decode())


def test_every_gpu_is_in_one_state() -> None:
    assert by_label(registry_at(NOW), "stoker_fleet_gpus", "state") == {
        "free": 1, "allocated": 1, "shared": 1, "foreign": 1, "unavailable": 2,
    }  # fmt: skip


def test_nodes_are_counted_by_state() -> None:
    assert by_label(registry_at(NOW), "stoker_fleet_nodes", "state") == {
        "ready": 1, "stale": 0, "disconnected": 1,
    }  # fmt: skip
    assert by_label(registry_at(NOW + 60), "stoker_fleet_nodes", "state") == {
        "ready": 0, "stale": 1, "disconnected": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "metric",
    [
        "stoker_fleet_gpu_memory_used_bytes",
        "stoker_fleet_gpu_utilization_ratio",
        "stoker_fleet_gpu_temperature_celsius",
        "stoker_fleet_gpu_power_watts",
    ],
)
def test_value_that_is_old_or_was_not_read_is_absent(metric: str) -> None:
    told = {"n1-0", "n1-1", "n1-2", "n1-3"} - ({"n1-1"} if "power" in metric else set())
    assert by_label(registry_at(NOW), metric, "uuid").keys() == told
    assert by_label(registry_at(NOW + 3.0), metric, "uuid").keys() == told
    assert by_label(registry_at(NOW + 3.1), metric, "uuid") == {}


def test_card_that_is_out_of_use_has_no_series_of_its_own() -> None:
    fleet = make_fleet()
    frame = Frame(
        *(2, NOW, 0.0),
        samples={gpu.uuid: GpuSample(power_watts=1.0, at=NOW) for gpu in make_gpus("n1", 5)},
        missing=(
            MissingGpu(2, "n1-2", "driver_timeout", "hangs"),
            MissingGpu(5, "", "gpu_lost", "gone"),
            MissingGpu(6, "", "gpu_lost", "gone"),
        ),
    )
    fleet.note(e.FrameArrived(NOW, "n1", 1, frame, NOW))
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    page = generate_latest(registry).decode()
    assert 'uuid="n1-1"' in page
    assert 'uuid="n1-2"' not in page
    missing = by_label(registry, "stoker_fleet_gpus_missing", "error_kind")
    assert missing == {"driver_timeout": 1, "gpu_lost": 2}


def test_what_does_not_change_is_told_of_every_gpu() -> None:
    assert len(by_label(registry_at(NOW + 60), "stoker_fleet_gpu_memory_total_bytes", "uuid")) == 6


def test_loop_that_is_stuck_leaves_the_fleet_out() -> None:
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: None, "9.9"))
    assert [family.name for family in registry.collect()] == ["stoker_build_info"]
