"""Fleets that are but supposed: they differ in what was supposed, and the real one stays."""

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    A100,
    GIB,
    H100,
    T4,
    Scene,
    make_facts,
    make_gpus,
    make_process,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.model import Plan, Request
from stoker.aggregator.placing.place import place
from stoker.aggregator.placing.whatif import (
    AddNodes,
    EndProcesses,
    Release,
    RemoveNode,
    Repartition,
    Supposition,
    Uncordon,
    UnknownModel,
    WhatIf,
    cordoned_gpus,
)
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.views import FleetView
from stoker.aggregator.wishes import Cordon


def fits(request: Request, view: FleetView) -> bool:
    return isinstance(place(request, view), Plan)


def scene_of(*models: str) -> Scene:
    sizes = {H100: 80, A100: 40, T4: 16}
    return Scene(
        *(make_facts(f"n{i}", make_gpus(f"n{i}", 2, m, sizes[m])) for i, m in enumerate(models))
    )


def test_new_nodes_are_like_those_of_the_fleet() -> None:
    scene = Scene(
        replace(
            make_facts("n1", make_gpus("n1", 2, H100, 79)),
            driver_version="570.1",
            cpu_milli=8000,
        ),
        replace(make_facts("n2", make_gpus("n2", 1, T4, 16)), driver_version="580.2"),
    )
    view = WhatIf(scene.view()).suppose(AddNodes(2, 4, "H100", "train"))
    assert list(view.nodes) == ["n1", "n2", "new-1", "new-2"]
    new = view.nodes["new-2"]
    facts = new.node.facts
    assert (facts.pool, facts.driver_version, facts.cpu_milli) == ("train", "580.2", 8000)
    assert [gpu.gpu.memory_total_bytes for gpu in new.gpus] == [79 * GIB] * 4
    assert len({gpu.gpu.uuid for node in view.nodes.values() for gpu in node.gpus}) == 11
    assert fits(whole(4, pool="train", nodes=2), view)
    assert not fits(whole(4, pool="train", nodes=3), view)


def test_new_nodes_of_a_model_of_the_catalogue() -> None:
    view = WhatIf(Scene().view()).suppose(AddNodes(1, 8, "H100-80GB"))
    gpus = view.nodes["new-1"].gpus
    assert {gpu.gpu.model for gpu in gpus} == {H100}
    assert gpus[0].room_bytes == (81559 - 480) * 2**20
    assert gpus[0].gpu.compute_capability == "9.0"
    for request in (whole(8), share(60), whole(4, compute_capability_min=(9, 0))):
        assert fits(request, view)


def test_new_nodes_do_not_take_names_that_there_are() -> None:
    scene = Scene(make_facts("new-1", 1), make_facts("new-3", 1))
    view = WhatIf(scene.view()).suppose(AddNodes(2, 1, "H100"))
    assert list(view.nodes) == ["new-1", "new-3", "new-2", "new-4"]


def test_a_model_that_nobody_knows() -> None:
    with pytest.raises(UnknownModel):
        WhatIf(scene_of(T4).view()).suppose(AddNodes(1, 1, "H1000"))


def test_a_node_that_is_gone_takes_what_it_holds_with_it() -> None:
    scene = scene_of(H100, A100)
    scene.grant(whole(2, node="n0"))
    view = WhatIf(scene.view()).suppose(RemoveNode("n1"))
    assert list(view.nodes) == ["n0"]
    assert not fits(whole(1), view)


def test_an_uncordoned_node_with_and_without_its_gpus() -> None:
    scene = scene_of(H100)
    scene.record(e.NodeCordoned(scene.now, "n0", "fan"))
    scene.decide(Cordon("n0", "Xid 79", "n0-1"))
    what_if = WhatIf(scene.view())
    assert fits(whole(1), what_if.suppose(Uncordon("n0")))
    assert not fits(whole(2), what_if.suppose(Uncordon("n0")))
    gpus = cordoned_gpus(scene.view().nodes["n0"])
    assert gpus == ("n0-1",)
    assert fits(whole(2), what_if.suppose(Uncordon("n0", gpus)))
    assert not fits(whole(1), what_if.suppose(Uncordon("n0", gpus, is_node=False)))


def test_what_is_released_is_free_everywhere_with_its_cpus_and_its_service() -> None:
    facts = [replace(make_facts(name, 2), cpu_milli=8000) for name in ("n1", "n2")]
    scene = Scene(*facts)
    gang = scene.grant(whole(2, nodes=2, cpu_milli=6000, service="web"))
    for name in ("n1", "n2"):
        scene.obey(name)
        process = make_process(f"{name}-0", allocation_id=gang.id)
        scene.frame(name, processes=ProcessTable(scene.now, (process,)))
    view = WhatIf(scene.view()).suppose(Release((gang.id,)))
    apart = whole(2, nodes=2, cpu_milli=8000, service="web", anti_affinity="node")
    assert fits(apart, view)
    assert not fits(apart, scene.view())


def test_processes_of_others_that_have_ended() -> None:
    scene = scene_of(H100)
    processes = tuple(make_process(f"n0-{i}", pid=i) for i in range(2))
    scene.frame("n0", processes=ProcessTable(scene.now, processes))
    view = WhatIf(scene.view()).suppose(EndProcesses("n0", ("n0-1",)))
    assert [gpu.is_free for gpu in view.nodes["n0"].gpus] == [False, True]


@pytest.mark.parametrize(
    ("profile", "fitting", "refused"),
    [
        ("3g.20gb", whole(mig_profile="3g.20gb"), whole(2)),
        (None, whole(2), whole(mig_profile="1g.5gb")),
    ],
)
def test_a_card_that_is_cut_anew(profile: str | None, fitting: Request, refused: Request) -> None:
    first, second = make_gpus("n0", 2, A100, 40)
    gpus = (replace(first, mig_enabled=True), second)
    scene = Scene(make_facts("n0", gpus))
    view = WhatIf(scene.view()).suppose(Repartition("n0", ("n0-0",), profile))
    assert fits(fitting, view)
    assert not fits(refused, view)


SUPPOSED: tuple[tuple[Supposition, list[str]], ...] = (
    (AddNodes(2, 1, "T4"), ["new-1", "new-2"]),
    (RemoveNode("n1"), []),
    (Uncordon("n0"), ["n0"]),
    (Release(("a1",)), ["n0", "n1"]),
    (EndProcesses("n1", ("n1-0",)), ["n1"]),
    (Repartition("n0", ("n0-0",), None), ["n0"]),
)


@pytest.mark.parametrize(("supposed", "touched"), SUPPOSED, ids=lambda each: type(each).__name__)
def test_only_what_is_touched_is_another_and_the_real_fleet_stays(
    supposed: Any, touched: list[str]
) -> None:
    scene = scene_of(H100, H100, T4)
    scene.grant(whole(1, nodes=2))
    process = make_process("n1-1")
    scene.frame("n1", processes=ProcessTable(scene.now, (process,)))
    view = scene.view()
    before = dict(view.nodes)
    what_if = WhatIf(view)
    after = what_if.suppose(supposed)
    assert what_if.touched(supposed, after) == touched
    same = [name for name in after.nodes if name not in touched]
    assert all(after.nodes[name] is before[name] for name in same)
    assert dict(view.nodes) == before
