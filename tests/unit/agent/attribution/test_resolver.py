"""Whose processes are from one reading to the next, on machines that tests make up."""

from pathlib import Path

import pytest
from tests.support.proc_tree import ProcTree

from stoker.agent.attribution import resolver
from stoker.agent.attribution.cgroups import Place, parse_cgroup
from stoker.agent.attribution.resolver import Attributed, Attribution, Looked
from stoker.agent.owners import NOBODY, Owner
from stoker.agent.proctable import REMEMBER_SECONDS, ProcTable
from stoker.agent.readings import ProcessReading
from stoker.agent.tenants import describe_all

UID = "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6"
ID = "a" * 64
DOCKER = f"0::/docker/{ID}\n"
POD = f"0::/kubepods/pod{UID}/{ID}\n"


class Machine:
    """A /proc, the kubelet's folders, and a clock."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.logs = ProcTree(root / "proc"), root / "pods"
        self.logs.mkdir()
        self.now = 1000.0
        self.table = ProcTable(str(self.proc.root), monotonic=self.monotonic)
        self.attribution = Attribution(
            pod_resources=None,
            proc_root=str(self.proc.root),
            cgroup_root=root / "cgroup",
            pods_log_root=self.logs,
            containers_log_root=None,
            monotonic=self.monotonic,
        )
        self.parsed = 0

        def counted(text: str) -> Place:
            self.parsed += 1
            return parse_cgroup(text)

        monkeypatch.setattr(resolver, "parse_cgroup", counted)

    def monotonic(self) -> float:
        return self.now

    def look(self, *pids: int) -> Looked:
        """Have the driver tell these processes, and look at them."""
        readings = [ProcessReading("GPU-0", pid, "compute", name="told") for pid in pids]
        return self.attribution.look(describe_all(readings, self.table).values())

    def owner(self, pid: int) -> Owner:
        return self.look(pid).owners[pid]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_nothing_is_made_anew_while_nothing_changes(machine: Machine) -> None:
    machine.proc.start(1, cgroup=DOCKER)
    machine.proc.start(2, cgroup="0::/a.service\n")
    first = machine.look(1, 2)
    assert machine.parsed == 2
    for _ in range(10):
        machine.now += REMEMBER_SECONDS / 2
        assert machine.look(1, 2).owners == first.owners
    assert machine.parsed == 2


def test_a_process_that_was_moved_has_another_owner_within_a_minute(machine: Machine) -> None:
    machine.proc.start(1, cgroup="0::/user.slice/user-1.slice/session-3.scope\n")
    assert machine.owner(1) == Owner(unit="session-3.scope")
    (machine.proc.root / "1" / "cgroup").write_text("0::/system.slice/train.service\n")
    machine.now += REMEMBER_SECONDS
    assert machine.owner(1) == Owner(unit="train.service")


def test_a_pid_that_was_given_away_has_another_owner_at_once(machine: Machine) -> None:
    machine.proc.start(1, cgroup=DOCKER, ticks=500)
    assert machine.owner(1).container_id == ID
    machine.proc.start(1, cgroup="0::/a.service\n", ticks=900)
    assert machine.owner(1) == Owner(unit="a.service")


def test_a_process_that_has_ended_has_no_owner(machine: Machine) -> None:
    machine.proc.start(1, cgroup=DOCKER)
    machine.look(1)
    machine.proc.end(1)
    assert machine.owner(1) == NOBODY


def test_a_process_that_is_not_told_any_more_is_forgotten(machine: Machine) -> None:
    machine.proc.start(1, cgroup=DOCKER)
    machine.look(1)
    assert machine.look().owners == {}
    machine.look(1)
    assert machine.parsed == 2


def test_a_pod_has_its_name_as_soon_as_its_folder_is_there(machine: Machine) -> None:
    machine.proc.start(1, cgroup=POD)
    assert machine.owner(1) == Owner(container_id=ID, pod_uid=UID)
    (machine.logs / f"ml_train-0_{UID}").mkdir()
    machine.now += 5.0
    assert machine.owner(1).described() == "pod ml/train-0"
    assert machine.parsed == 1


def test_an_environment_that_we_may_not_read_is_asked_for(machine: Machine) -> None:
    machine.proc.start(1, environ=None)
    machine.proc.start(2, environ={})  # as unreadable, to us
    machine.proc.start(3, environ={"HOME": "/"})
    machine.proc.start(4, cgroup=POD, environ=None)  # of a pod, and perhaps of an allocation
    machine.proc.start(5, cgroup="0::/slurmstepd.scope/job_17/step_0\n", environ=None)
    assert [facts.pid for facts in machine.look(1, 2, 3, 4, 5, 6).asked] == [1, 2, 4, 5]


def test_a_pod_without_a_name_is_the_only_one_that_has_its_gpu() -> None:
    in_pod = Owner(container_id=ID, pod_uid=UID)
    only = Owner(pod_namespace="ml", pod_name="train-0", container_name="trainer")
    told = Attributed({1: in_pod, 2: Owner(unit="a.service")}, pods={"GPU-0": only})
    assert told.owner(1, "GPU-0") == Owner(
        container_id=ID,
        pod_uid=UID,
        pod_namespace="ml",
        pod_name="train-0",
        container_name="trainer",
    )
    assert told.owner(1, "GPU-1") == in_pod
    assert told.owner(2, "GPU-0") == Owner(unit="a.service")
    assert told.owner(3, "GPU-0") == NOBODY
