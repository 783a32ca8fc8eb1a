"""Which GPUs of a node lie best to each other: tables of real boards, and laws for any."""

from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.aggregator.placing.boards import (
    bridged_pairs,
    dgx_h100,
    dgx_v100,
    plain,
    unlinked,
    wired,
)

from stoker.aggregator.model import Gpu, GpuTopology
from stoker.aggregator.placing.topology import best_set, links_between, satisfies


@dataclass(frozen=True)
class Best:
    what: str
    gpus: tuple[Gpu, ...]
    taken: tuple[int, ...]
    count: int
    expected: tuple[int, ...]
    topology: GpuTopology = GpuTopology.ANY
    must: int | None = None


NVSWITCH = (
    Best("any two are alike, so the first in PCI order", dgx_h100(), (), 2, (0, 1)),
    Best("four at one socket", dgx_h100(), (1, 2), 4, (4, 5, 6, 7)),
    Best("the socket that is begun goes first", dgx_h100(), (0, 1), 2, (2, 3)),
    Best("one GPU from the socket with fewest left", dgx_h100(), (0, 5, 6), 1, (4,)),
    Best("five take one socket whole", dgx_h100(), (0,), 5, (1, 4, 5, 6, 7)),
    Best("all that are left", dgx_h100(), (0, 1), 6, (2, 3, 4, 5, 6, 7)),
    Best("a named one is kept to", dgx_h100(), (), 2, (4, 6), must=6),
    Best("with it its socket", dgx_h100(), (), 4, (4, 5, 6, 7), must=6),
)
LOST_LINK = unlinked([0] * 8, switch_links=[18, 18, 17, 18, 18, 18, 18, 18])
SWITCH_LINKS = (
    Best("a GPU that lost a link is not among the best", LOST_LINK, (), 3, (0, 1, 3)),
    Best("and is the one to take alone", LOST_LINK, (), 1, (2,)),
)
CUBE_MESH = (
    Best("a pair with two links, at one socket", dgx_v100(), (), 2, (0, 3)),
    Best("across, where only there are two links", dgx_v100(), (1, 2, 3, 5, 7), 2, (0, 4)),
    Best("a quad is all linked", dgx_v100(), (), 4, (0, 1, 2, 3)),
    Best("the quad that is whole", dgx_v100(), (1,), 4, (4, 5, 6, 7)),
    Best("an odd GPU rather than one of a quad that is whole", dgx_v100(), (2,), 1, (1,)),
    Best("three of a quad, all linked", dgx_v100(), (0, 1, 6), 3, (4, 5, 7)),
    Best("by NUMA node first if so wished", dgx_v100(), (), 2, (0, 3), GpuTopology.NUMA),
)
PAIRS = (
    Best("one breaks no pair while an odd one is free", bridged_pairs(), (5,), 1, (4,)),
    Best("two are a pair", bridged_pairs(), (0, 3), 2, (4, 5)),
    Best("three are a pair and an odd one", bridged_pairs(), (6,), 3, (4, 5, 7)),
    Best("three of whole pairs break one", bridged_pairs(), (), 3, (0, 1, 2)),
    Best("four are two pairs at one socket", bridged_pairs(), (2,), 4, (4, 5, 6, 7)),
    Best("with a named one comes its other half", bridged_pairs(), (), 2, (6, 7), must=7),
    Best("odd ones for two where no pair is left", bridged_pairs(), (0, 2, 5, 7), 2, (1, 3)),
)
ODD_TRIPLE = wired(
    # 0-1 is a pair with one link each way; 2-5 are a quad with four, of which 5 is taken.
    [
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 4, 4, 4],
        [0, 0, 4, 0, 4, 4],
        [0, 0, 4, 4, 0, 4],
        [0, 0, 4, 4, 4, 0],
    ]
)
WITHOUT_NVLINK = (
    Best("the socket with fewest left", plain(), (0, 4, 5), 1, (6,)),
    Best("three at one socket", plain(), (0, 1), 3, (4, 5, 6)),
    Best("four at one socket", plain(), (0,), 4, (4, 5, 6, 7)),
    Best("five", plain(), (0,), 5, (1, 4, 5, 6, 7)),
    Best("unknown memory nodes are no reason", unlinked([None] * 4), (1,), 2, (0, 2)),
    Best(
        "unknown ones are not one node",
        unlinked([None, None, 0, 0]),
        (),
        2,
        (2, 3),
        GpuTopology.NUMA,
    ),
    Best("a clique that is begun before one that is whole", ODD_TRIPLE, (5,), 1, (2,)),
)


@pytest.mark.parametrize(
    "row",
    [*NVSWITCH, *SWITCH_LINKS, *CUBE_MESH, *PAIRS, *WITHOUT_NVLINK],
    ids=lambda row: f"{row.what}: {row.count} of {len(row.gpus) - len(row.taken)}",
)
def test_the_set_that_lies_best(row: Best) -> None:
    free = [place for place in range(len(row.gpus)) if place not in row.taken]
    assert best_set(row.gpus, free, row.count, row.topology, row.must) == row.expected


@pytest.mark.parametrize(
    ("what", "gpus", "topology", "expected"),
    [
        ("one GPU lies as it likes", dgx_h100()[:1], GpuTopology.NVLINK, True),
        ("behind switches all are linked", dgx_h100(), GpuTopology.NVLINK, True),
        ("a quad is", dgx_v100()[:4], GpuTopology.NVLINK, True),
        ("two quads are not, each to each", dgx_v100(), GpuTopology.NVLINK, False),
        ("a pair is", bridged_pairs()[:2], GpuTopology.NVLINK, True),
        ("two pairs are not", bridged_pairs()[:4], GpuTopology.NVLINK, False),
        ("one socket", plain()[:4], GpuTopology.NUMA, True),
        ("two sockets", plain()[3:5], GpuTopology.NUMA, False),
        ("sockets that nobody knows", unlinked([None] * 2), GpuTopology.NUMA, False),
        ("anything will do", plain(), GpuTopology.ANY, True),
    ],
)
def test_whether_gpus_lie_as_asked(
    what: str, gpus: tuple[Gpu, ...], topology: GpuTopology, expected: bool
) -> None:
    assert satisfies(gpus, topology) is expected


def test_a_link_that_one_side_has_lost_is_none() -> None:
    one, other = wired([[0, 2], [0, 0]])
    assert links_between(one, other) == links_between(other, one) == 0


@dataclass(frozen=True)
class Choice:
    gpus: tuple[Gpu, ...]
    free: tuple[int, ...]
    count: int
    topology: GpuTopology
    must: int | None


@st.composite
def choices(draw: st.DrawFn, size_max: int = 7) -> Choice:
    size = draw(st.integers(1, size_max))
    pairs = list(combinations(range(size), 2))
    kind = draw(st.sampled_from(("links", "none", "switches", "both")))
    drawn = draw(st.lists(st.integers(0, 2), min_size=len(pairs), max_size=len(pairs)))
    links = [[0] * size for _ in range(size)]
    if kind in ("links", "both"):
        for (i, j), count in zip(pairs, drawn, strict=True):
            links[i][j] = links[j][i] = count
    switched = None
    if kind in ("switches", "both"):
        switched = draw(st.lists(st.sampled_from((0, 3, 3)), min_size=size, max_size=size))
    numa = draw(st.lists(st.sampled_from((0, 1, 2, None)), min_size=size, max_size=size))
    free = draw(st.sets(st.integers(0, size - 1), min_size=1))
    must = draw(st.none() | st.sampled_from(sorted(free)))
    gpus = wired(links, numa, switch_links=switched)
    count = draw(st.integers(1, len(free)))
    topology = draw(st.sampled_from(GpuTopology))
    return Choice(gpus, tuple(sorted(free)), count, topology, must)


def whole_cliques(choice: Choice) -> list[frozenset[int]]:
    """The largest sets of GPUs that are all linked to each other and all free, by trying all."""
    places = range(len(choice.gpus))
    linked = [
        frozenset(chosen)
        for size in range(2, len(choice.gpus) + 1)
        for chosen in combinations(places, size)
        if satisfies([choice.gpus[place] for place in chosen], GpuTopology.NVLINK)
    ]
    largest = [one for one in linked if not any(one < other for other in linked)]
    return [clique for clique in largest if clique <= set(choice.free)]


def cost(choice: Choice, chosen: tuple[int, ...]) -> tuple[object, ...]:
    """What the module says of a set, word by word: the lesser the better."""
    gpus = choice.gpus
    rest = [place for place in choice.free if place not in chosen]
    links = [links_between(gpus[i], gpus[j]) for i, j in combinations(chosen, 2)]
    all_unknown = all(gpu.numa_node is None for gpu in gpus)

    def numa(place: int) -> object:
        known = gpus[place].numa_node
        return known if known is not None else "unknown" if all_unknown else ("own", place)

    nodes = len({numa(place) for place in chosen})
    linked = (-min(links, default=0), -sum(links))
    broken = [
        len(clique)
        for clique in whole_cliques(choice)
        if 0 < len(clique & set(chosen)) < len(clique)
    ]
    return (
        (nodes, linked) if choice.topology is GpuTopology.NUMA else (linked, nodes),
        [broken.count(size) for size in range(len(gpus), 1, -1)],
        sum(links_between(gpus[i], gpus[j]) for i in chosen for j in rest),
        sum(numa(i) == numa(j) for i in chosen for j in rest),
        chosen,
    )


@given(choices())
def test_no_other_set_is_better(choice: Choice) -> None:
    chosen = best_set(choice.gpus, choice.free, choice.count, choice.topology, choice.must)
    others = [
        other
        for other in combinations(choice.free, choice.count)
        if choice.must is None or choice.must in other
    ]
    assert chosen == min(others, key=lambda other: cost(choice, other))


@given(choices())
def test_a_set_that_lies_as_asked_is_found_if_there_is_one(choice: Choice) -> None:
    chosen = best_set(choice.gpus, choice.free, choice.count, choice.topology)
    exists = any(
        satisfies([choice.gpus[place] for place in other], choice.topology)
        for other in combinations(choice.free, choice.count)
    )
    assert satisfies([choice.gpus[place] for place in chosen], choice.topology) is exists


@st.composite
def large_choices(draw: st.DrawFn) -> Choice:
    """On more GPUs than are searched through: few links, several NUMA nodes."""
    size = 18
    links = [[0] * size for _ in range(size)]
    for i, j in draw(st.sets(st.tuples(st.integers(0, 17), st.integers(0, 17)), max_size=30)):
        if i != j:
            links[i][j] = links[j][i] = 1 + (i + j) % 2
    numa = draw(st.lists(st.sampled_from((0, 1, 2, 3, None)), min_size=size, max_size=size))
    free = tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=4))))
    count, topology = draw(st.integers(1, 4)), draw(st.sampled_from(GpuTopology))
    must = draw(st.none() | st.sampled_from(free))
    return Choice(wired(links, numa), free, count, topology, must)


@settings(max_examples=50)
@given(large_choices())
def test_boards_too_large_for_a_search_still_give_gpus_that_lie_as_asked(choice: Choice) -> None:
    chosen = best_set(choice.gpus, choice.free, choice.count, choice.topology, choice.must)
    assert len(set(chosen)) == choice.count
    assert set(chosen) <= set(choice.free)
    assert list(chosen) == sorted(chosen)
    assert choice.must is None or choice.must in chosen
    exists = any(
        satisfies([choice.gpus[place] for place in other], choice.topology)
        for other in combinations(choice.free, choice.count)
        if choice.must is None or choice.must in other
    )
    assert satisfies([choice.gpus[place] for place in chosen], choice.topology) is exists
