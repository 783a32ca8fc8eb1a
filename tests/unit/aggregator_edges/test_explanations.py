"""Twenty-odd questions as operators ask them, and what `stoker why` and `stoker place` answer.

Each is asked with the command's own words, of a fleet in that state, through the clients' door.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import click
import pytest
from tests.conftest import Golden
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
from tests.unit.cli.test_render import text_of

from stoker.aggregator import events as e
from stoker.aggregator.answers import allocation_row
from stoker.aggregator.api_explain import Explainer
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import MIG_ANY, Gpu, MigDevice, NodeFacts
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.wire_requests import read_request
from stoker.aggregator.wishes import Cordon
from stoker.cli.render_why import explanation
from stoker.cli.suppositions import parse_supposition
from stoker.cli.why import place, why
from stoker.cli.wishes import wish_of
from stoker.client import wire, wire_answers
from stoker.client.requesting import build_request
from stoker.testing.clock import VirtualClock

PROFILE_BYTES = {"1g.10gb": 10 * GIB, "2g.20gb": 20 * GIB, "3g.40gb": 40 * GIB}


def node(
    name: str, gpus: int | tuple[Gpu, ...] = 8, model: str = H100, gib: int = 80, **facts: Any
) -> NodeFacts:
    cards = make_gpus(name, gpus, model, gib) if isinstance(gpus, int) else gpus
    return replace(make_facts(name, cards), **facts)


def fleet(*names: str, **facts: Any) -> Scene:
    return Scene(*(node(name, **facts) for name in names))


def linked_in_pairs(name: str, count: int = 4) -> tuple[Gpu, ...]:
    return tuple(
        replace(gpu, nvlink_peers=((f"{name}-{gpu.index ^ 1}", 4),))
        for gpu in make_gpus(name, count)
    )


def in_mig_mode(name: str, *profiles: str) -> Gpu:
    devices = tuple(
        MigDevice(f"MIG-{i}", profile, PROFILE_BYTES[profile], i, 0)
        for i, profile in enumerate(profiles)
    )
    return replace(make_gpus(name, 1)[0], mig_enabled=True, mig_devices=devices)


def half_used() -> Scene:
    scene = fleet("n1", "n2", "n3", "n4")
    for name in ("n1", "n2", "n3", "n4"):
        scene.grant(whole(4, node=name, holder="train@lab", priority=5))
    return scene


def of_three_models() -> Scene:
    return Scene(node("n1", 4, H100, 80), node("n2", 8, A100, 40), node("n3", 4, T4, 16))


def one_cordoned() -> Scene:
    scene = Scene(node("n1", 8), node("n2", 4, A100, 40))
    scene.record(e.NodeCordoned(scene.now, "n1", "fan is loud, ticket 4711"))
    return scene


def one_gpu_ill() -> Scene:
    scene = fleet("n1")
    scene.record(e.GpuCordoned(scene.now, "n1", "n1-3", "Xid 79", by_health=True, drain_at=None))
    scene.later(3600.0)
    return scene


def somebody_else_on_it() -> Scene:
    scene = fleet("n1", gpus=1)
    process = make_process("n1-0", 4242, memory_used_bytes=30 * GIB)
    scene.frame("n1", processes=ProcessTable(scene.now, (process,)))
    return scene


def shared_out() -> Scene:
    scene = fleet("n1", gpus=2)
    for _ in range(2):
        scene.grant(share(62, holder="web@prod", priority=1))
    return scene


def compute_promised() -> Scene:
    scene = fleet("n1", gpus=1)
    scene.grant(share(8, compute_milli=700, holder="web@prod", priority=1))
    return scene


def cut_in_sevenths() -> Scene:
    gpus = (
        in_mig_mode("n1", *("1g.10gb",) * 7),
        replace(make_gpus("n1", 2)[1], mig_enabled=True),
    )
    return Scene(node("n1", gpus))


def mig_all_taken() -> Scene:
    scene = Scene(node("n1", (in_mig_mode("n1", "1g.10gb", "1g.10gb", "2g.20gb"),)))
    for _ in range(2):
        scene.grant(whole(mig_profile="1g.10gb", holder="notebook@lab"))
    return scene


def pairs_broken() -> Scene:
    scene = Scene(node("n1", linked_in_pairs("n1")))
    for uuid in ("n1-0", "n1-2"):
        scene.grant(whole(preferred_gpu_uuid=uuid, holder="eval@lab", priority=3))
    return scene


def three_of_four() -> Scene:
    scene = fleet("n1", "n2", "n3", "n4")
    scene.grant(whole(2, node="n4", holder="debug@lab", priority=9))
    return scene


def racks() -> Scene:
    where = {"n1": "r1", "n2": "r1", "n3": "r2", "n4": "r2"}
    scene = Scene(*(node(name, labels={"rack": rack}) for name, rack in where.items()))
    for name in ("n2", "n3"):
        scene.grant(whole(8, node=name, holder="train@lab", priority=5))
    return scene


def a_replica_on_each_rack() -> Scene:
    scene = Scene(node("n1", labels={"rack": "r1"}), node("n2", labels={"rack": "r2"}))
    for name in ("n1", "n2"):
        scene.grant(whole(1, node=name, service="chat", holder="chat@prod", priority=5))
    return scene


def queue() -> Scene:
    scene = fleet("n1", gpus=4)
    scene.grant(whole(1, ttl_seconds=1e6, holder="long@lab", priority=9))
    scene.wait(whole(4, holder="big@lab"))
    scene.later(600.0)
    scene.wait(whole(1, holder="small@lab"))
    scene.later(120.0)
    return scene


def silent_node() -> Scene:
    scene = fleet("n1", "n2")
    scene.disconnect("n2", "no frame for 30s")
    return scene


def old_drivers() -> Scene:
    return Scene(
        node("n1", 2, driver_version="535.129.03"), node("n2", 2, driver_version="550.54.15")
    )


def cpus_taken() -> Scene:
    scene = fleet("n1", gpus=4, cpu_milli=64_000, host_memory_bytes=256 * GIB)
    scene.grant(whole(1, cpu_milli=56_000, holder="loader@lab", priority=1))
    return scene


def lower_priorities() -> Scene:
    scene = fleet("n1", "n2")
    scene.grant(whole(8, node="n1", holder="prod@web", priority=10))
    scene.grant(whole(6, node="n2", holder="sweep@lab", priority=-1))
    scene.grant(whole(2, node="n2", holder="notebook@lab", priority=0))
    return scene


def full() -> Scene:
    scene = fleet("n1", "n2", gpus=1)
    for name in ("n1", "n2"):
        scene.grant(whole(1, node=name, holder="prod@web", priority=10))
    return scene


def given_up() -> Scene:
    scene = fleet("n1", gpus=2)
    held = scene.grant(whole(2, holder="train@lab"))
    scene.obey("n1")
    scene.release(held.id)
    return scene


def pools() -> Scene:
    return Scene(node("n1", 4, pool="train"), node("n2", 4, pool="infer"))


def hundreds() -> Scene:
    scene = Scene(
        *(node(f"v-{i}", 1, "Tesla V100-SXM2-16GB", 16) for i in range(60)),
        *(node(f"t-{i}", 1, T4, 16) for i in range(20)),
        *(node(f"h-{i}", 4) for i in range(30)),
    )
    for i in range(30):
        taken = 1 if i == 17 else 2 + i % 3
        scene.grant(whole(taken, node=f"h-{i}", holder="train@lab", priority=5))
    for i in range(25, 29):
        scene.record(e.NodeCordoned(scene.now, f"h-{i}", "Xid 79"))
    return scene


def quarantined_by_hand() -> Scene:
    scene = fleet("n1", gpus=2)
    scene.decide(Cordon("n1", "being reseated", "n1-1"))
    return scene


@dataclass(frozen=True)
class Asked:
    name: str
    question: str
    scene: Callable[[], Scene]
    command: str


ASKED = (
    Asked("sixteen-free", "16 GPUs are free. Why does my job with 8 wait?", half_used,
          "why --gpus 8"),
    Asked("another-model", "I want 8 H100 on one node. What can I have?", of_three_models,
          "why --gpus 8 --model H100"),
    Asked("cordoned", "The H100 node is idle. Why does nobody get it?", one_cordoned,
          "why --gpus 8 --model H100"),
    Asked("ill-gpu", "One GPU is ill. Can I still have the node?", one_gpu_ill, "why --gpus 8"),
    Asked("cordoned-gpu", "GPU 1 is being reseated. What can I have meanwhile?",
          quarantined_by_hand, "why --gpus 2 --model H100"),
    Asked("foreign-process", "The GPU shows no allocation. Why is it not free?",
          somebody_else_on_it, "why --gpus 1"),
    Asked("share", "Two GPUs are shared. Is there room for 20 GiB?", shared_out,
          "why --memory 20GiB"),
    Asked("compute", "The GPU has memory left. Why no half of its compute?", compute_promised,
          "why --memory 8GiB --compute 0.5"),
    Asked("mig-not-cut", "No card is cut into 3g.40gb. What would it take?", cut_in_sevenths,
          "why --mig 3g.40gb"),
    Asked("mig-taken", "All 1g.10gb are taken. What else is there?", mig_all_taken,
          "why --mig 1g.10gb"),
    Asked("mig-any", "A MIG device with 60 GiB?", mig_all_taken, "why --mig any --memory 60GiB"),
    Asked("nvlink", "Two GPUs are free. Why not for me?", pairs_broken,
          "why --gpus 2 --topology nvlink --require-topology"),
    Asked("gang", "Four nodes, four times 8 GPUs. Why does my gang wait?", three_of_four,
          "why --nodes 4 --gpus 8"),
    Asked("one-rack", "Two whole nodes are free. Why not for two of one rack?", racks,
          "why --nodes 2 --gpus 8 --same rack --require-same"),
    Asked("anti-affinity", "There are 14 free GPUs. Why no third replica?", a_replica_on_each_rack,
          "why --gpus 1 --service chat --anti-affinity rack"),
    Asked("queue", "Three GPUs are free and I want one. Why do I wait?", queue, "why a3"),
    Asked("silent-node", "Why does n2 not take my job?", silent_node, "why --gpus 1 --node n2"),
    Asked("old-driver", "Which nodes have driver 570?", old_drivers, "why --gpus 2 --driver 570"),
    Asked("cpus", "Three GPUs are free. Why is the node full?", cpus_taken,
          "why --gpus 1 --cpus 12 --host-memory 64GiB"),
    Asked("release", "Who would have to go for my 8 GPUs?", lower_priorities, "why --gpus 8"),
    Asked("full", "Everything is taken by production. What now?", full, "why --gpus 1"),
    Asked("given-up", "The job has ended. Why are its GPUs not free?", given_up, "why --gpus 2"),
    Asked("no-such-pool", "Nothing is placed in pool trian?", pools, "why --gpus 1 --pool trian"),
    Asked("other-pool", "n1 is idle. Why are my 4 GPUs not there?", pools,
          "why --gpus 4 --pool infer --node n1"),
    Asked("hundreds", "110 nodes, and no 4 H100 on one?", hundreds, "why --gpus 4 --model H100"),
    Asked("fits", "Where would my job go, and why there?", half_used, "why --gpus 2"),
    Asked("what-if-add", "Would one more node be enough?", half_used,
          'place --dry-run --gpus 8 --what-if "add 8xH100-node"'),
    Asked("what-if-gang", "Would two be enough for my gang?", full,
          'place --dry-run --nodes 2 --gpus 8 --what-if "add 2 nodes 8xH100-80GB"'),
    Asked("what-if-remove", "Can I take n1 away tonight?", silent_node,
          'place --dry-run --gpus 8 --what-if "remove n1"'),
    Asked("what-if-uncordon", "Would it help to uncordon n1?", one_cordoned,
          'place --dry-run --gpus 8 --model H100 --what-if "uncordon n1"'),
)  # fmt: skip


def explainer(scene: Scene) -> Explainer:
    def check_model(path: str, asked: str) -> None:
        if asked == "H1000":
            raise Malformed(path, "no such model")

    return Explainer(
        scene.fleet,
        VirtualClock(scene.now),
        read_request,
        check_model,
        lambda allocation: allocation_row(scene.fleet, allocation).message(),
        Placer(),
    )


def message_of(command: str) -> Any:
    """Return what the command sends."""
    verb, *words = shlex.split(command)
    known: click.Command = {"why": why, "place": place}[verb]
    options = dict(known.make_context(verb, words).params)
    supposed = [parse_supposition(each) for each in options.pop("what_if", ())]
    id_ = options.pop("allocation_id", None)
    if id_ is not None:
        return wire.explain(id_, supposed).message
    wish = wish_of({**options, "holder": "ann@lab"})
    return wire.explain(build_request(wish, holder="", ttl_seconds=60.0), supposed).message


@pytest.mark.parametrize("asked", ASKED, ids=[each.name for each in ASKED])
async def test_answer(asked: Asked, golden: Golden) -> None:
    scene = asked.scene()
    answer = await explainer(scene).explain(message_of(asked.command))
    shown = text_of(explanation(wire_answers.explanation(answer), scene.now), width=160)
    head, *rest = shown.splitlines()
    lines = [head, *rest[:24], *(["..."] if len(rest) > 24 else [])]
    golden(
        f"why/{asked.name}.txt",
        f"{asked.question}\n$ stoker {asked.command}\n" + "\n".join(lines) + "\n",
    )


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ('place --gpus 1 --what-if "remove n9"', r"what_if\[0\].remove_node: there is no node n9"),
        ('place --gpus 1 --what-if "remove n1" --what-if "uncordon n1"', r"what_if\[1\].*removed"),
        ('place --gpus 1 --what-if "add H1000"', r"what_if\[0\].add.model: no such model"),
        ('place --gpus 1 --what-if "add 65xH100"', r"what_if\[0\].add.gpus: .* 1 to 64"),
        (
            'place --gpus 1 --what-if "add 1001 nodes H100"',
            r"what_if\[0\].add.nodes: .* 1 to 1,000",
        ),
    ],
)
async def test_what_cannot_be_supposed_is_told(command: str, problem: str) -> None:
    with pytest.raises(Malformed, match=problem):
        await explainer(silent_node()).explain(message_of(command))


async def test_nothing_is_supposed_about_what_is_granted() -> None:
    scene = half_used()
    message = message_of("why a1")
    message.what_if.add().remove_node = "n1"
    with pytest.raises(Malformed, match="allocation a1 does not wait, it is granted"):
        await explainer(scene).explain(message)


async def test_of_a_gang_those_nodes_are_named_that_have_not_let_go() -> None:
    scene = Scene(*(make_facts(name, 1) for name in ("n1", "n2", "n3")))
    gang = scene.grant(whole(nodes=3))
    scene.release(gang.id)
    for name, who in (
        ("n1", "nodes n1, n2, n3 have"),
        ("n2", "nodes n2, n3 have"),
        ("", "node n3 has"),
    ):
        answer = await explainer(scene).explain(message_of(f"why {gang.id}"))
        assert answer.summary == f"given up (released); {who} not confirmed yet to have let go"
        if name:
            scene.obey(name)


async def test_a_question_changes_nothing() -> None:
    scene = queue()
    before = (scene.fleet.version, list(scene.fleet.allocations.items()), scene.view().nodes)
    nodes = dict(before[2])
    for command in ("why a3", 'place --gpus 1 --what-if "remove n1" --what-if "add T4"'):
        await explainer(scene).explain(message_of(command))
    after = (scene.fleet.version, list(scene.fleet.allocations.items()), scene.view().nodes)
    assert after[:2] == before[:2]
    assert dict(after[2]) == nodes


def test_any_mig_device_is_a_profile() -> None:
    assert message_of("why --mig any --memory 60GiB").request.mig_profile == MIG_ANY
