"""Health on the agent's own page: verdicts, faults, memory without an owner, what is not seen."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from tests.support.pages import read_page
from tests.support.snapshots import BARE, FAULTS, FULL, GIB, TABLE, VIEW, own_page, snapshot

from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.model import NodeView
from stoker.agent.readings import GpuFault
from stoker.agent.verdicts import Check, Fault, GpuHealth, KernelLogStatus, RepairAction, Verdict

# Every GPU is read, and whose processes run on which is known of the first.
KNOWN = replace(VIEW, processes=TABLE, memory_unattributed_bytes={"GPU-0": GIB, "GPU-1": GIB})


def series(shown: Snapshot, name: str) -> list[tuple[dict[str, str], float]]:
    found = read_page(own_page(shown)).get(name, {})
    return [(dict(labels), value) for labels, value in found.items()]


def judged(*gpus: GpuHealth) -> Snapshot:
    return snapshot(replace(VIEW, health=gpus))


@pytest.mark.parametrize("verdict", Verdict)
def test_one_verdict_is_1(verdict: Verdict) -> None:
    told = series(judged(GpuHealth("GPU-0", verdict)), "stoker_gpu_health")
    assert {labels["verdict"]: value for labels, value in told} == {
        each.value: float(each is verdict) for each in Verdict
    }
    assert {labels["model"] for labels, _ in told} == {"NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize(
    ("missing", "index"),
    [((GpuFault(5, "GPU-gone", "gpu_lost", "it is lost"),), "5"), ((), "")],
    ids=["the driver counts it", "nobody counts it"],
)
def test_a_gpu_that_is_not_in_the_inventory_keeps_its_verdict_and_faults(
    missing: tuple[GpuFault, ...], index: str
) -> None:
    assert VIEW.inventory is not None
    gone = GpuHealth("GPU-gone", Verdict.UNHEALTHY, RepairAction.REBOOT, faults=FAULTS)
    view = replace(VIEW, health=(gone,), inventory=replace(VIEW.inventory, missing=missing))
    for name, count in (("stoker_gpu_health", len(Verdict)), ("stoker_gpu_fault", len(FAULTS))):
        told = series(snapshot(view), name)
        assert len(told) == count
        assert {(labels["gpu"], labels["uuid"], labels["model"]) for labels, _ in told} == {
            (index, "GPU-gone", "")
        }


@pytest.mark.parametrize("monotonic", [101.0, 9999.0], ids=["fresh", "long after the last reading"])
def test_a_verdict_outlives_the_reading_that_it_came_from(monotonic: float) -> None:
    view = replace(VIEW, health=(GpuHealth("GPU-0", Verdict.UNKNOWN),))
    told = series(snapshot(view, monotonic), "stoker_gpu_health")
    assert [labels["verdict"] for labels, value in told if value] == ["unknown"]


def test_every_fault_that_lasts_has_a_series_and_the_time_it_was_seen_last() -> None:
    shown = judged(GpuHealth("GPU-0", Verdict.UNHEALTHY, RepairAction.REBOOT, faults=FAULTS))
    faults = series(shown, "stoker_gpu_fault")
    parts = ("check", "code", "verdict", "action")
    assert {tuple(labels[part] for part in parts): value for labels, value in faults} == {
        ("xid", "79", "unhealthy", "reboot"): 1,
        ("nvlink_errors", "4", "degraded", "drain"): 1,
    }
    times = series(shown, "stoker_gpu_fault_last_timestamp_seconds")
    assert {(labels["check"], labels["code"]): value for labels, value in times} == {
        ("xid", "79"): 901.5,
        ("nvlink_errors", "4"): 999.0,
    }


def test_when_a_fault_was_seen_stays_one_series_however_it_is_judged() -> None:
    milder = replace(FAULTS[0], verdict=Verdict.DEGRADED, action=RepairAction.RESET_GPU)
    pages = [judged(GpuHealth("GPU-0", f.verdict, faults=(f,))) for f in (FAULTS[0], milder)]
    first, second = (series(page, "stoker_gpu_fault_last_timestamp_seconds") for page in pages)
    assert first == second


def test_a_code_is_text_that_may_hold_anything() -> None:
    odd = Fault(Check.XID, 'a"b\\c\n', Verdict.DEGRADED, RepairAction.NONE, "", 1.0, 2.0, 1)
    shown = judged(GpuHealth("GPU-0", Verdict.DEGRADED, faults=(odd,)))
    assert [labels["code"] for labels, _ in series(shown, "stoker_gpu_fault")] == [odd.code]


@pytest.mark.parametrize(
    ("view", "monotonic", "told"),
    [
        (KNOWN, 101.0, {"0": GIB}),
        (replace(KNOWN, memory_unattributed_bytes={"GPU-0": 0}), 101.0, {"0": 0}),
        (replace(KNOWN, memory_unattributed_bytes={}), 101.0, {}),
        (replace(KNOWN, telemetry=(BARE,)), 101.0, {}),
        (replace(KNOWN, telemetry=(FULL,)), 101.0, {"0": GIB}),
        (KNOWN, 103.5, {}),
        (replace(KNOWN, processes=None), 101.0, {}),
        (replace(KNOWN, processes_monotonic_seconds=None), 101.0, {}),
    ],
    ids=[
        *("of the GPU whose processes are known", "every byte has an owner", "it is not told"),
        *("the GPU was not read", "the other was not read", "its reading is old"),
        *("processes are not known", "processes were never read"),
    ],
)
def test_memory_without_an_owner_is_told_while_both_its_parts_are_known(
    view: NodeView, monotonic: float, told: Mapping[str, float]
) -> None:
    found = series(snapshot(view, monotonic), "stoker_gpu_memory_unattributed_bytes")
    assert {labels["gpu"]: value for labels, value in found} == told


@pytest.mark.parametrize("is_followed", [True, False])
def test_whether_the_kernels_log_is_followed_is_always_told(is_followed: bool) -> None:
    view = replace(VIEW, kernel_log=KernelLogStatus(is_followed, "helper" * is_followed))
    assert series(snapshot(view), "stoker_agent_kernel_log_followed") == [({}, is_followed)]
