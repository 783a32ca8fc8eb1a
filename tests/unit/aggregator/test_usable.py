"""How much of a node is of use, in tables, and what an allocation is worth."""

from collections.abc import Callable

import pytest
from tests.unit.aggregator.builders import A100, GIB, Scene, make_facts, make_gpus, share, whole
from tests.unit.aggregator.moving import hold, wish_before

from stoker.aggregator.model import Device, Request
from stoker.aggregator.usable import KINDS_MAX, Usable, kinds_of, share_milli, size_milli
from stoker.aggregator.wishes import Cordon


def usable_of(scene: Scene, *wishes: Request) -> float:
    """The usable capacity of n1, were these the wishes of the fleet."""
    wished = Scene()
    for each in wishes:
        wish_before(wished, each)
    view = scene.view()
    return Usable(kinds_of(wished.fleet.allocations.values())).milli(view.nodes["n1"], view)


def node(*held: Callable[[Scene], object], gpus: int = 4) -> Scene:
    scene = Scene(make_facts("n1", gpus))
    for each in held:
        each(scene)
    return scene


# A node of four, what is held of it, the wishes of the fleet -> thousandths of a GPU
CASES: dict[str, tuple[Scene, list[Request], float]] = {
    "nothing is held": (node(), [whole(4)], 4000),
    "nobody ever asked for anything": (node(), [], 0),
    "one is held, four are wished for": (node(lambda s: hold(s, whole(), "n1", 0)), [whole(4)], 0),
    "one is held, three are wished for": (
        node(lambda s: hold(s, whole(), "n1", 0)),
        [whole(3)],
        3000,
    ),
    "a share leaves a fragment to whole GPUs": (
        node(lambda s: hold(s, share(20), "n1", 0)),
        [whole(1)],
        3000,
    ),
    "and room for shares": (node(lambda s: hold(s, share(20), "n1", 0)), [share(20)], 3750),
    "but not for larger ones": (node(lambda s: hold(s, share(20), "n1", 0)), [share(70)], 3000),
    "half of the wishes can use it": (
        node(lambda s: hold(s, whole(), "n1", 0)),
        [whole(4), whole(2)],
        1500,
    ),
    "another model was asked for": (node(), [whole(1, models=("A100",))], 0),
    "another pool was asked for": (node(), [whole(1, pool="p")], 0),
    "compute is short": (
        node(lambda s: hold(s, share(8, compute_milli=700), "n1", 0), gpus=1),
        [share(8, compute_milli=400)],
        0,
    ),
    "compute is what is least": (
        node(lambda s: hold(s, share(8, compute_milli=700), "n1", 0), gpus=1),
        [share(8, compute_milli=200)],
        300,
    ),
    "it is cordoned": (node(lambda s: s.decide(Cordon("n1", "why not"))), [whole(1)], 0),
    "it is not connected": (node(lambda s: s.disconnect("n1")), [whole(1)], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_of_use(name: str) -> None:
    scene, wishes, expected = CASES[name]
    assert usable_of(scene, *wishes) == expected


def test_all_gpus_of_one_request_are_of_one_model() -> None:
    scene = Scene(make_facts("n1", (*make_gpus("n1", 2), *make_gpus("a", 2, A100, 40))))
    assert usable_of(scene, whole(2)) == 4000
    assert usable_of(scene, whole(3)) == 0


def test_a_node_without_enough_cpu_is_of_no_use() -> None:
    scene = Scene(make_facts("n1", 2))
    scene.change_facts("n1", cpu_milli=8000, host_memory_bytes=8 * GIB)
    assert usable_of(scene, whole(1, cpu_milli=8000, host_memory_bytes=8 * GIB)) == 2000
    hold(scene, whole(1, cpu_milli=1, host_memory_bytes=1), "n1", 0)
    assert usable_of(scene, whole(1, cpu_milli=8000)) == 0
    assert usable_of(scene, whole(1, host_memory_bytes=8 * GIB)) == 0
    assert usable_of(scene, whole(1)) == 1000


def test_the_rarest_kinds_of_request_are_left_out() -> None:
    scene = Scene()
    for number in range(KINDS_MAX + 5):
        wish_before(scene, whole(number + 1), times=1 + (number == KINDS_MAX + 4))
    kinds = kinds_of(scene.fleet.allocations.values())
    assert len(kinds) == KINDS_MAX
    assert kinds[0].request.gpus == KINDS_MAX + 5  # the most frequent
    assert kinds[-1].request.gpus == KINDS_MAX - 1  # and then as they came


@pytest.mark.parametrize(
    ("memory", "exclusive", "compute", "expected"),
    [
        (80, True, None, 1000),
        (20, False, None, 250),
        (20, False, 500, 500),
        (20, False, 100, 250),
        (1, False, None, 13),  # never less than it is
    ],
)
def test_what_a_device_is_worth(
    memory: int, exclusive: bool, compute: int | None, expected: int
) -> None:
    device = Device("GPU-1", "H100", 0, memory * GIB, exclusive, compute)
    assert share_milli(device, 80 * GIB) == expected


def test_what_an_allocation_is_worth() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 4))
    gang = hold(scene, whole(2, nodes=2), "n1", 0, 1, more="n2")
    assert size_milli(gang, scene.view().nodes) == 4000
