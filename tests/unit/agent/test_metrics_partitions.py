"""Partitions of GPUs on the agent's own page: states, who is withheld, where instances are."""

from dataclasses import replace

import pytest
from tests.support.pages import read_page
from tests.support.snapshots import VIEW, own_page, snapshot

from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.partitions import GpuMigStatus
from stoker.core.mig.geometry import MigState, Placed

LAYOUT = (Placed(0, 2, "2g.20gb"), Placed(4, 4, "3g.40gb"))


def told(*gpus: GpuMigStatus) -> Snapshot:
    return snapshot(replace(VIEW, mig=gpus))


def series(shown: Snapshot, name: str) -> list[tuple[dict[str, str], float]]:
    found = read_page(own_page(shown)).get(name, {})
    return [(dict(labels), value) for labels, value in found.items()]


@pytest.mark.parametrize("state", MigState)
def test_one_state_is_1(state: MigState) -> None:
    shown = series(told(GpuMigStatus("GPU-0", state)), "stoker_gpu_mig_state")
    assert {labels["state"]: value for labels, value in shown} == {
        each.value: float(each is state) for each in MigState
    }
    assert {(labels["gpu"], labels["uuid"]) for labels, _ in shown} == {("0", "GPU-0")}


def test_where_nothing_was_declared_there_is_no_state() -> None:
    assert series(told(GpuMigStatus("GPU-0")), "stoker_gpu_mig_state") == []


@pytest.mark.parametrize(
    "name",
    [
        "stoker_gpu_mig_state",
        "stoker_gpu_mig_withheld",
        "stoker_gpu_mig_changed_timestamp_seconds",
        "stoker_mig_instance_info",
    ],
)
def test_of_a_gpu_of_which_nothing_is_told_there_is_no_series(name: str) -> None:
    full = GpuMigStatus("GPU-0", MigState.SUCCESS, changed_at=990.5, layout=LAYOUT)
    assert {labels["uuid"] for labels, _ in series(told(full), name)} == {"GPU-0"}
    assert series(told(), name) == []


@pytest.mark.parametrize("is_withheld", [True, False])
def test_a_gpu_that_is_withheld_says_so(is_withheld: bool) -> None:
    shown = told(GpuMigStatus("GPU-1", is_withheld=is_withheld))
    ((labels, value),) = series(shown, "stoker_gpu_mig_withheld")
    assert (labels["uuid"], value) == ("GPU-1", float(is_withheld))


def test_every_instance_is_told_with_its_place() -> None:
    shown = series(told(GpuMigStatus("GPU-0", layout=LAYOUT)), "stoker_mig_instance_info")
    parts = ("uuid", "gpu", "profile", "start", "size")
    assert [tuple(labels[part] for part in parts) for labels, _ in shown] == [
        ("GPU-0", "0", "2g.20gb", "0", "2"),
        ("GPU-0", "0", "3g.40gb", "4", "4"),
    ]


@pytest.mark.parametrize("layout", [None, ()], ids=["not readable", "no instances"])
def test_without_instances_there_is_no_place(layout: tuple[Placed, ...] | None) -> None:
    shown = told(GpuMigStatus("GPU-0", MigState.SUCCESS, layout=layout))
    assert series(shown, "stoker_mig_instance_info") == []


def test_a_gpu_that_is_lost_keeps_its_state() -> None:
    shown = told(GpuMigStatus("GPU-gone", MigState.FAILED, is_withheld=True))
    ((labels, value),) = series(shown, "stoker_gpu_mig_withheld")
    assert (labels["uuid"], labels["model"], value) == ("GPU-gone", "", 1.0)
