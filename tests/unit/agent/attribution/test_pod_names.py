"""What pods and their containers are called, by the folders of their logs."""

from pathlib import Path

import pytest

from stoker.agent.attribution.pod_names import (
    LIST_SECONDS_MIN,
    PodName,
    PodNames,
    parse_container_link,
    parse_pod_folder,
)

UID = "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6"
STATIC = "9f86d081884c7d659a2feaa0c55ad015"
ID = "a" * 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"ml_train-0_{UID}", (UID, ("ml", "train-0"))),
        (f"kube-system_etcd-node.1_{STATIC}", (STATIC, ("kube-system", "etcd-node.1"))),
        ("ml_train-0", None),
        (f"ml__{UID}", None),
        (f"a_b_c_{UID}", None),
        ("", None),
    ],
)
def test_folder_of_a_pod(name: str, expected: tuple[str, tuple[str, str]] | None) -> None:
    assert parse_pod_folder(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"train-0_ml_trainer-{ID}.log", (ID, "trainer")),
        (f"train-0_ml_side-car-{ID}.log", (ID, "side-car")),
        (f"train-0_ml_trainer-{ID[1:]}.log", None),
        (f"train-0_trainer-{ID}.log", None),
        (f"{ID}.log", None),
        ("", None),
    ],
)
def test_link_of_a_container(name: str, expected: tuple[str, str] | None) -> None:
    assert parse_container_link(name) == expected


class Logs:
    """The folders of a kubelet."""

    def __init__(self, root: Path) -> None:
        self.pods, self.containers = root / "pods", root / "containers"
        self.pods.mkdir()
        self.containers.mkdir()
        self.now = 1000.0
        self.names = PodNames(self.pods, self.containers, monotonic=lambda: self.now)

    def add(self, namespace: str, pod: str, uid: str, container: str, id_: str) -> None:
        (self.pods / f"{namespace}_{pod}_{uid}").mkdir()
        (self.containers / f"{pod}_{namespace}_{container}-{id_}.log").touch()


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_a_pod_and_its_container(logs: Logs) -> None:
    logs.add("ml", "train-0", UID, "trainer", ID)
    assert logs.names.look_up(UID, [ID]) == PodName("ml", "train-0", "trainer")


def test_of_containers_in_containers_the_pods_own_has_the_name(logs: Logs) -> None:
    logs.add("ci", "runner-0", UID, "dind", ID)
    assert logs.names.look_up(UID, [ID, "b" * 64]) == PodName("ci", "runner-0", "dind")


def test_a_container_whose_link_is_gone_has_no_name(logs: Logs) -> None:
    (logs.pods / f"ml_train-0_{UID}").mkdir()
    assert logs.names.look_up(UID, [ID]) == PodName("ml", "train-0")


def test_a_name_that_is_not_there_is_looked_for_again_after_a_while(logs: Logs) -> None:
    assert logs.names.look_up(UID, [ID]) == PodName()
    logs.add("ml", "train-0", UID, "trainer", ID)
    assert logs.names.look_up(UID, [ID]) == PodName()
    logs.now += LIST_SECONDS_MIN
    assert logs.names.look_up(UID, [ID]) == PodName("ml", "train-0", "trainer")


def test_a_machine_without_pods_has_no_names(tmp_path: Path) -> None:
    assert PodNames(tmp_path / "none", tmp_path / "none").look_up(UID, [ID]) == PodName()
    assert PodNames(None, None).look_up(UID, [ID]) == PodName()
