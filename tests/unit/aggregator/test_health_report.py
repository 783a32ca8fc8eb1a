"""The list of GPUs that clients are shown."""

from tests.unit.aggregator.builders import Scene, make_facts, make_gpus, make_health

from stoker.aggregator.health_report import gpu_rows
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.wishes import Cordon

XID = make_health("n1-0")


def test_list_without_the_healthy_is_the_whole_list_without_them() -> None:
    gpus = make_gpus("n1", 3)
    scene = Scene(make_facts("n1", gpus=gpus), make_facts("n2", 2), make_facts("n3", 1))
    scene.judge("n1", XID, make_health("n1-1", Verdict.DEGRADED))
    scene.judge("n3", make_health("n3-0"))
    scene.decide(Cordon("n2", "loud", "n2-1"), Cordon("n1", "taken out soon", "n1-2"))
    scene.change_facts("n2", gpus=(*make_gpus("n2", 2), gpus[1]))  # moved, and still listed
    scene.change_facts("n1", gpus=gpus[:2])
    scene.change_facts("n3", gpus=())
    listed = [
        gpu_rows(scene.fleet, scene.watch.policy, scene.now, include_healthy=each)
        for each in (True, False)
    ]
    assert [row for row in listed[0] if not row.is_healthy] == listed[1]
    assert {row.uuid for row in listed[1]} == {"n1-0", "n1-1", "n1-2", "n2-1", "n3-0"}
    assert {row.uuid for row in listed[1] if row.gpu is None} == {"n1-2", "n3-0"}
