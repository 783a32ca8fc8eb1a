"""The page for Prometheus: the fleet as it is; what is not known is not told."""

from dataclasses import replace

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
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.meters import Meters
from stoker.aggregator.model import (
    Device,
    DriverState,
    Frame,
    GpuSample,
    MigDevice,
    MissingGpu,
    Placement,
)
from stoker.aggregator.picture import take_picture
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.verdicts import RepairAction, Verdict
from stoker.core.mig.geometry import MigState

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


def make_partitioned_fleet() -> Fleet:
    """Of n1 one GPU is cut and in use, one is being cut; that of n2 is not heard of any more."""
    fleet = Fleet()
    first, second, third = make_gpus("n1", 3)
    devices = tuple(MigDevice(f"MIG-{i}", "1g.10gb", 10 * GIB, i, 0) for i in range(3))
    large = MigDevice("MIG-9", "3g.40gb", 40 * GIB, 9, 0)
    cut = replace(first, mig_enabled=True, mig_devices=(*devices, large))
    fleet.apply(e.NodeRegistered(NOW, make_facts("n1", (cut, second, third))), 1)
    fleet.apply(e.NodeRegistered(NOW, make_facts("n2", 1)), 2)
    part = Device(
        *("n1-0", first.model, 0, 10 * GIB, False), mig_device_uuid="MIG-1", mig_profile="1g.10gb"
    )
    wanted = whole(mig_profile="1g.10gb")
    granted = e.AllocationGranted(NOW, "a", wanted, "", NOW, (Placement("n1", (part,)),))
    fleet.apply(granted, 3)
    frame = Frame(
        *(1, NOW, 0.0),
        samples={gpu.uuid: GpuSample(power_watts=1.0, at=NOW) for gpu in (first, second, third)},
        processes=ProcessTable(NOW, (make_process("n1-0", gpu_instance_id=2),)),
        driver=DriverState.READING,
        mig={
            "n1-0": GpuMig("n1-0", MigState.SUCCESS, config="small"),
            "n1-1": GpuMig("n1-1", MigState.APPLYING, config="small", is_withheld=True),
            "n1-2": GpuMig("n1-2"),
        },
    )
    for session, name in ((1, "n1"), (2, "n2")):
        fleet.note(e.AgentConnected(NOW, name, session, (), 0))
    fleet.note(e.FrameArrived(NOW, "n1", 1, frame, NOW))
    failed = {"n2-0": GpuMig("n2-0", MigState.FAILED, is_withheld=True)}
    fleet.note(e.FrameArrived(NOW, "n2", 2, Frame(1, NOW, 0.0, mig=failed), NOW))
    fleet.note(e.AgentDisconnected(NOW, "n2", 2, "the connection broke"))
    return fleet


def test_page_of_partitions_is_as_reviewed(golden: Golden) -> None:
    registry = CollectorRegistry()
    fleet = make_partitioned_fleet()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    lines = [line for line in generate_latest(registry).decode().splitlines() if "mig" in line]
    golden("aggregator_metrics_mig.txt", "\n".join(lines) + "\n")


def test_gpu_is_in_the_state_that_its_node_told_last_and_in_no_other() -> None:
    fleet = make_partitioned_fleet()
    registry = CollectorRegistry()
    registry.register(FleetCollector(lambda: take_picture(fleet, NOW), "9.9"))
    frame = Frame(2, NOW, 0.0, mig={"n1-1": GpuMig("n1-1", MigState.SUCCESS, config="small")})
    fleet.note(e.FrameArrived(NOW, "n1", 1, frame, NOW))
    told = by_label(registry, "stoker_fleet_mig_gpus", "state")
    assert {state: count for state, count in told.items() if count} == {"success": 1}
    assert by_label(registry, "stoker_fleet_gpu_mig_withheld", "uuid") == {}


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
